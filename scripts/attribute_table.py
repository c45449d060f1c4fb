"""Attribute what every run of the table forgot, study the ledger's residual, and check it against exact restores.

    python scripts/attribute_table.py [--runs runs/table] [--methods ...] [--seeds 0 1 2] [--out ...]

Resumable at any point: finished cells and finished rows are skipped. Three parts, in this order for each run:

1. `driftlens attribute` of all old tasks at the last checkpoint: 8 nodes and swaps; depth groups for seed 0.
2. seed 0: the ledger of the first task with 1, 2, 4, 8 and 16 nodes (OUT_nodes.csv).
3. seed 0: the first task again with every site restored alone (OUT_restores.csv, by site).

The tables OUT.csv, by run and task, and OUT.md are rewritten after each run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from driftlens.analysis import open_run
from driftlens.analysis.attribution import attribution_rows
from driftlens.attribution import AttributionOptions, attribute_run
from driftlens.attribution.ledger import AnswerBatches, book_ledger
from driftlens.attribution.pairs import load_pair
from driftlens.attribution.runs import run_config, run_stream
from driftlens.metrics import spearman
from driftlens.training.run import numerics

METHODS = ["moe-lora", "pass-moe", "moe-lora-topk", "seq-lora"]
NODES = [1, 2, 4, 8, 16]
STUDIED = [0]
"""The first task: it is the oldest and lost most."""


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("docs/results/attribution"))
    parser.add_argument("--skip-study", action="store_true", help="part 1 alone")
    parser.add_argument("--tables-only", action="store_true", help="write the tables from what is there")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [args.runs / f"{method}-seed{seed}" for seed in args.seeds for method in args.methods]
    for folder in [] if args.tables_only else wanted:
        if not list(folder.glob("recordings/*.noise.h5")):  # the last file of a run
            print(f"{folder}: not finished, left out", flush=True)
            continue
        began, seed = time.monotonic(), open_run(folder).seed
        attribute_run(folder, AttributionOptions(depth=5 if seed == 0 else 0))
        print(f"{folder}: attributed in {time.monotonic() - began:.0f} s", flush=True)
        if seed == 0 and not args.skip_study:
            study_nodes(folder, args.out.with_name(f"{args.out.name}_nodes.csv"))
            study_restores(folder, args.out.with_name(f"{args.out.name}_restores.csv"))
        write_tables(args.runs, args.out)
    write_tables(args.runs, args.out)


def study_nodes(folder: Path, table: Path) -> None:
    """Append one row per (task, number of nodes) that the table does not have yet."""
    run = open_run(folder)
    rows = pd.read_csv(table).to_dict("records") if table.is_file() else []
    done = {(row["method"], row["task"], row["nodes"]) for row in rows}
    config, names = run_config(run), [point.name for point in run.checkpoints]
    for number in STUDIED:
        task = run.tasks[number]
        missing = [nodes for nodes in NODES if (run.method, task, nodes) not in done]
        if not missing:
            continue
        checkpoints = [folder / "checkpoints" / name for name in (names[number + 1], names[-1])]
        with numerics(run.manifest.threads or 1, config.training.matmul_precision):
            pair = load_pair(*checkpoints, base=config.base)
            batches = AnswerBatches(pair, run_stream(run, config).task(task).test)
            for nodes in missing:
                began = time.process_time()
                found = book_ledger(pair, batches, nodes=nodes)
                rows.append(
                    {
                        "method": run.method,
                        "task": task,
                        "nodes": nodes,
                        "rise": found.rise,
                        "router": found.router,
                        "experts": found.experts,
                        "residual": found.residual,
                        "residual_share": found.residual / found.rise,
                        "cpu_seconds": round(time.process_time() - began, 1),
                    }
                )
                pd.DataFrame(rows).to_csv(table, index=False)
                print(f"{run.method} {task}: {nodes} nodes, residual {found.residual / found.rise:.2%}", flush=True)
            pair.unload()


def study_restores(folder: Path, table: Path) -> None:
    """Append one row per site with its ledger entries and what comes back when it alone is restored."""
    run = open_run(folder)
    tasks = [run.tasks[number] for number in STUDIED]
    rows = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=["method", "task"])
    wanted = [task for task in tasks if rows[(rows["method"] == run.method) & (rows["task"] == task)].empty]
    if not wanted:
        return
    attribute_run(folder, AttributionOptions(depth=5, restores=True), tasks=wanted)
    found = open_run(folder).attribution
    for task in wanted:
        cell = found.sel(task=task).isel(checkpoint=-1)
        ledger_site, gain = cell["ledger_site"], cell["gain"]
        frame = pd.DataFrame(
            {
                "method": run.method,
                "task": task,
                "site": cell["site"].to_numpy(),
                "ledger_router": ledger_site.sel(part="router").to_numpy(),
                "ledger_experts": ledger_site.sel(part="experts").to_numpy(),
                "restore_router": gain.sel(restored="router").to_numpy(),
                "restore_experts": gain.sel(restored="experts").to_numpy(),
                "restore_both": gain.sel(restored="both").to_numpy(),
            }
        )
        rows = frame if rows.empty else pd.concat([rows, frame], ignore_index=True)
        rows.to_csv(table, index=False)


def write_tables(runs: Path, out: Path) -> None:
    """Write OUT.csv by run and task, and OUT.md."""
    rows = []
    for folder in sorted(path for path in runs.glob("*-seed*") if list(path.glob("attribution/*/*.h5"))):
        run = open_run(folder)
        for row in attribution_rows(run.attribution):
            row["notes"] = " ".join(row["notes"])
            row["largest"] = ", ".join(site["site"].split("layers.")[-1] for site in row["largest"])
            rows.append({"method": run.method, "seed": run.seed} | row)
    if not rows:
        return
    frame = pd.DataFrame(rows)
    frame.round(6).to_csv(out.with_suffix(".csv"), index=False)
    nodes, restores = (out.with_name(f"{out.name}_{name}.csv") for name in ("nodes", "restores"))
    lines = ["# What the runs on the built-in stream forgot, and who forgot it", "", *_intro(frame), ""]
    lines += [*_by_method(frame), "", *_by_task(frame)]
    if nodes.is_file():
        lines += ["", "## Residual by number of nodes", "", *_nodes(pd.read_csv(nodes))]
    if restores.is_file():
        lines += ["", "## Ledger entries of single sites against exact restores", "", *_restores(pd.read_csv(restores))]
    lines += ["", "## By depth", "", *_depth(runs)]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _intro(frame: pd.DataFrame) -> list[str]:
    return [
        f"{frame.groupby(['method', 'seed']).ngroups} runs, every old task at the last checkpoint, on its test samples "
        "(64; 34 for flag-continent). Written by `scripts/attribute_table.py`. Forgetting is strict accuracy lost "
        "since the task's own checkpoint; the rise is of the answer NLL, in nats. Definitions: `docs/metrics.md`, "
        "section 4. Values are means over old tasks, then mean ± standard deviation over seeds.",
    ]


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _by_method(frame: pd.DataFrame) -> list[str]:
    names = {
        "forgetting_strict": "forgetting",
        "phi_router_strict": "phi_router (accuracy)",
        "phi_experts_strict": "phi_experts (accuracy)",
        "rise": "rise (nats)",
        "ledger_router": "ledger router",
        "ledger_experts": "ledger experts",
        "phi_router_nll": "phi_router (nats)",
        "phi_experts_nll": "phi_experts (nats)",
        "residual": "residual (nats)",
    }
    runs = frame.groupby(["method", "seed"])[list(names)].mean()
    share = frame.assign(share=frame["residual"].abs()).groupby(["method", "seed"])["share"].sum()
    share = share / frame.assign(total=frame["rise"].abs()).groupby(["method", "seed"])["total"].sum()
    lines = [_cells(["method", "seeds", *names.values(), "sum of residuals / sum of rises"])]
    lines.append("|" + "---|" * (len(names) + 3))
    for method, values in runs.groupby(level="method"):
        cells = [f"{values[n].mean():.3f} ± {values[n].std():.3f}" for n in names]
        worst = share.loc[method]
        lines.append(
            _cells([str(method), str(len(values)), *cells, f"{worst.mean():.2%} (worst run {worst.max():.2%})"])
        )
    return lines


def _by_task(frame: pd.DataFrame) -> list[str]:
    exact = (frame["phi_router_strict"] + frame["phi_experts_strict"] + frame["remainder_strict"]).to_numpy()
    gap = np.abs(exact - frame["forgetting_strict"].to_numpy()).max()
    nll = (frame["phi_router_nll"] + frame["phi_experts_nll"] + frame["remainder_nll"]).to_numpy()
    gap_nll = np.abs(nll - frame["forgetting_nll"].to_numpy()).max()
    apart = np.abs(frame["ledger_router"] - frame["phi_router_nll"])
    noted = int((frame["notes"].fillna("") != "").sum())
    rest, rest_nll = (frame[f"remainder_{score}"].abs().max() for score in ("strict", "nll"))
    return [
        f"phi_router + phi_experts + remainder equals the measured forgetting to {gap:.1e} (strict accuracy) and "
        f"{gap_nll:.1e} (nats) at worst over {len(frame)} rows; the remainder itself is at most {rest:.1e} and "
        f"{rest_nll:.1e}. The router's part in ledger and swaps differs by {apart.mean():.3f} nats on average and "
        f"{apart.max():.3f} at most; in {noted} rows their intervals do not meet.",
    ]


def _nodes(frame: pd.DataFrame) -> list[str]:
    pivot = frame.pivot_table(index=["method", "task"], columns="nodes", values="residual_share")
    lines = [_cells(["method", "task", "rise (nats)", *(f"{nodes} nodes" for nodes in pivot.columns)])]
    lines.append("|" + "---|" * (len(pivot.columns) + 3))
    for (method, task), row in pivot.iterrows():
        rise = frame[(frame["method"] == method) & (frame["task"] == task)]["rise"].iloc[0]
        shares = ["-" if pd.isna(share) else f"{share:+.2%}" for share in row]
        lines.append(_cells([method, task, f"{rise:.3f}", *shares]))
    return [*lines, "", "Residual as a share of the rise."]


def _restores(frame: pd.DataFrame) -> list[str]:
    lines = [_cells(["method", "task", "sites", "Spearman", "Pearson", "ledger total", "sum of single restores"])]
    lines.append("|" + "---|" * 7)
    for (method, task), part in frame.groupby(["method", "task"], sort=False):
        booked = (part["ledger_router"] + part["ledger_experts"]).to_numpy()
        restored = part["restore_both"].to_numpy()
        rho, r = float(spearman(booked, restored)), float(np.corrcoef(booked, restored)[0, 1])
        total, single = booked.sum(), restored.sum()
        lines.append(_cells([method, task, str(len(part)), f"{rho:.2f}", f"{r:.3f}", f"{total:.3f}", f"{single:.3f}"]))
    return [
        *lines,
        "",
        "Restoring one site alone asks another question than the ledger: what comes back while all others stay as they "
        "are. Single restores do not add up to the rise; the ledger does.",
    ]


def _depth(runs: Path) -> list[str]:
    """Ledger by group of layers and the co-drift divergence there, over seeds; Shapley values of seed 0."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for folder in sorted(path for path in runs.glob("*-seed*") if list(path.glob("attribution/*/*.h5"))):
        run = open_run(folder)
        table = run.attribution.isel(checkpoint=-1)
        table = table.sel(task=table["reason"] == 0)
        drift = run.codrift["codrift_divergence"].isel(checkpoint=-1).sel(probe=list(run.tasks[:-1]))
        lost = table["ledger_site"].sum("part").mean("task")
        for first in range(int(table["layer"].min()), int(table["layer"].max()) + 1, 2):
            name = f"{first}-{first + 1}"
            cell = {
                "ledger": float(lost.isel(site=table["layer"].isin([first, first + 1]).to_numpy()).sum()),
                "drift": float(drift.isel(site=drift["layer"].isin([first, first + 1]).to_numpy()).mean()),
            }
            if "depth_shapley" in table:
                group = table.sel(depth=f"layers {name} both")
                cell["shapley"] = float(group["depth_shapley"].mean())
                cell["error"] = float(np.sqrt((group["depth_error"] ** 2).mean()))
            found.setdefault((run.method, name), []).append(cell)
    names = ["method", "layers", "ledger (nats)", "ledger, seed 0", "Shapley (nats), seed 0", "codrift_divergence"]
    lines = [_cells(names), "|" + "---|" * len(names)]
    for (method, name), cells in sorted(found.items()):
        ledger, drift = (np.array([cell[key] for cell in cells]) for key in ("ledger", "drift"))
        exact = next((cell for cell in cells if "shapley" in cell), None)
        seed0 = (
            ["-", "-"]
            if exact is None
            else [f"{exact['ledger']:.3f}", f"{exact['shapley']:.3f} ± {exact['error']:.3f}"]
        )
        spread = [f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for values in (ledger, drift)]
        lines.append(_cells([method, name, spread[0], *seed0, spread[1]]))
    note = (
        "Means over old tasks, then mean ± standard deviation over seeds. Shapley values were made for seed 0; their ± "
        "is the error of sampling permutations of one task."
    )
    return [*lines, "", note]


if __name__ == "__main__":
    main()
