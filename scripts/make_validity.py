"""Which drift measures predict forgetting, on a folder of finished runs.

    python scripts/make_validity.py [--runs runs/table] [--out docs/results/validity] [--select 0] [--draws 2000]

OUT.csv holds every measure and target, OUT_rows.csv the rows behind it, OUT_search.csv every variant of co-drift and
impact on the seeds it was chosen on and on the others, OUT.md the tables of all that. Minutes; the runs are read only
(their analysis is cached in them, as by any command).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from driftlens.analysis import Validity, open_run
from driftlens.analysis.simple import SIMPLE
from driftlens.analysis.study import ATTRIBUTED, validity_rows
from driftlens.analysis.validity import correlate
from driftlens.analysis.variants import VARIANTS, variant_names
from driftlens.store import write_bytes

TARGETS = {"lost_strict": "accuracy lost", "nll_rise": "rise in NLL"}
FOLLOWED = ["impact_scored", "impact_experts_scored", "update_share_scored", "impact", "codrift_divergence"]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/validity"))
    parser.add_argument("--select", type=int, nargs="*", default=[0], help="seeds that variants are chosen on")
    parser.add_argument("--draws", type=int, default=2000)
    args = parser.parse_args()
    folders = sorted({path.parents[1] for path in args.runs.glob("*/recordings/*.noise.h5")})
    if not folders:
        raise SystemExit(f"{args.runs} holds no finished run; make them with scripts/run_table.py.")
    names = variant_names()
    rows, undefined = read_rows(folders, names)
    shown = rows[[name for name in rows.columns if is_shown(str(name), names)]]
    study = correlate(shown, draws=args.draws, undefined=undefined)
    search = search_table(rows, names, args.select)
    out = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = study.table.round(4)
    write_bytes(out.with_suffix(".csv"), numbers.to_csv(index=False).encode())
    kept = shown[[name for name in shown.columns if not str(name).endswith("_noise")]]
    write_bytes(out.with_name(f"{out.name}_rows.csv"), kept.round(6).to_csv(index=False).encode())
    write_bytes(out.with_name(f"{out.name}_search.csv"), search.round(4).to_csv(index=False).encode())
    text = page(rows, study, search, args.select, args.draws)
    write_bytes(out.with_suffix(".md"), text.encode())


def read_rows(folders: list[Path], variants: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the rows of all runs, and why measures are undefined in some of them."""
    parts: list[pd.DataFrame] = []
    undefined: dict[str, str] = {}
    for folder in folders:
        frame, facts = validity_rows(open_run(folder), variants)
        parts.append(frame)
        for name, fact in facts.items():
            undefined[name] = f"{undefined[name]}; {folder.name}" if name in undefined else f"{fact}: {folder.name}"
    return pd.concat(parts, ignore_index=True), undefined


def is_shown(column: str, variants: list[str]) -> bool:
    """Whether a column belongs to the main table: all but the variants that only the search looks at."""
    measure = column.removesuffix("_noise")
    tables = {"codrift_divergence", "codrift_experts", "codrift_cross", "router_js", *SIMPLE}
    tables |= {"impact", "impact_experts", "impact_router", "impact_cross"}
    return measure not in variants or measure in VARIANTS or measure in tables


def search_table(rows: pd.DataFrame, variants: list[str], select: list[int]) -> pd.DataFrame:
    """Return rho of every variant and target on the seeds for choosing and on the others, and by method."""
    chosen = rows["seed"].isin(select).to_numpy()
    others = [str(name) for name in rows.columns if str(name) in SIMPLE]
    result = []
    for measure in [*variants, *(name for name in others if name not in variants)]:
        if not np.isfinite(rows[measure].astype(float)).any():
            continue
        entry: dict[str, object] = {"measure": measure}
        for target, short in (("lost_strict", "strict"), ("nll_rise", "nll")):
            entry[f"{short}_chosen"] = spearman(rows[chosen], measure, target)
            entry[f"{short}_held_out"] = spearman(rows[~chosen], measure, target)
            for method in sorted(rows["method"].unique()):
                entry[f"{short}_{method}"] = spearman(rows[rows["method"] == method], measure, target)
                entry[f"{short}_without_{method}"] = spearman(rows[rows["method"] != method], measure, target)
        entry["criterion"] = min(spearman(rows[chosen], measure, target) for target in TARGETS)
        result.append(entry)
    return pd.DataFrame(result).sort_values("criterion", ascending=False, kind="stable").reset_index(drop=True)


def spearman(rows: pd.DataFrame, measure: str, target: str) -> float:
    """Return Spearman's correlation over the rows that have both; NaN where a side is constant."""
    both = rows[[measure, target]].dropna()
    if len(both) < 5 or both[measure].nunique() < 2:
        return float("nan")
    return float(both[measure].rank().corr(both[target].rank()))


def page(rows: pd.DataFrame, study: Validity, search: pd.DataFrame, select: list[int], draws: int) -> str:
    """Return OUT.md."""
    seeds = sorted(rows["seed"].unique().tolist())
    held = [seed for seed in seeds if seed not in select]
    lines = [
        "# Which drift measures predict forgetting, on the built-in stream",
        "",
        f"Written by `scripts/make_validity.py`. {len(rows)} rows (old task at a later checkpoint) of "
        f"{rows['run'].nunique()} runs: {', '.join(sorted(rows['method'].unique()))}; seeds "
        f"{', '.join(map(str, seeds))}. Spearman's rank correlation over all rows; 95 % intervals from drawing whole "
        f"runs again ({draws} draws). Partial: given the task's learned accuracy, its NLL before training and the "
        "tasks since. Within run: mean of the correlations inside single runs. Beats: simple measures that it beats "
        "with a paired interval above 0. What the numbers say: [../validity.md](../validity.md).",
        "",
        "| measure | kind | accuracy lost | rise in NLL | partial, accuracy | within method | within run | beats "
        "| rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_target = {target: study.table[study.table["target"] == target].set_index("measure") for target in TARGETS}
    for measure, row in by_target["lost_strict"].iterrows():
        other = by_target["nll_rise"].loc[str(measure)]
        name = str(measure) + ("" if row["predicts"] or other["predicts"] else " (does not predict)")
        cells = [name, row["kind"], with_interval(row), with_interval(other), number(row["partial"])]
        cells += [number(row["within_method"]), number(row["within_run"]), f"{row['beats']} of {row['of_simple']}"]
        lines.append(f"| {' | '.join([*cells, str(row['rows'])])} |")
    if any(name in study.table["measure"].unique() for name in ATTRIBUTED):
        lines += ["", "Attribution needs the model; its parts sum to the rise of the NLL by construction."]
    lines += chosen_section(rows, search, select, held, draws) if held else []
    lines += method_section(search)
    return "\n".join(lines) + "\n"


def chosen_section(
    rows: pd.DataFrame, search: pd.DataFrame, select: list[int], held: list[int], draws: int
) -> list[str]:
    """Return the part on choosing on some seeds and looking at the others."""
    variants = search[~search["measure"].isin(SIMPLE)]
    best = variants["measure"].iloc[0]
    bars = search[search["measure"].isin(SIMPLE)]
    followed = list(dict.fromkeys([*variants["measure"].head(6), *FOLLOWED]))
    kept = rows[rows["seed"].isin(held)]
    columns = [name for name in kept.columns if name not in set(variants["measure"]) or name in followed]
    columns = [name for name in columns if not str(name).endswith("_noise")]
    study = correlate(kept[columns], draws=draws)
    lines = [
        "",
        f"## Chosen on seed {', '.join(map(str, select))}, looked at on seed {', '.join(map(str, held))}",
        "",
        f"{len(variants)} variants of co-drift and impact were tried (quantity x tokens x sites); the criterion is "
        f"the lower of the two correlations on seed {', '.join(map(str, select))}. Best there: `{best}`. Beats: simple "
        "measures beaten on the held-out rows with a paired interval above 0.",
        "",
        "| measure | chosen: accuracy lost | chosen: rise in NLL | held out: accuracy lost | held out: rise in NLL "
        "| beats, accuracy | beats, NLL |",
        "|---|---|---|---|---|---|---|",
    ]
    for measure in [*followed, *bars["measure"]]:
        entry = search.set_index("measure").loc[measure]
        cells = [measure, number(entry["strict_chosen"]), number(entry["nll_chosen"])]
        beats = []
        own = study.table[study.table["measure"] == measure].set_index("target")
        for target in TARGETS:
            row = own.loc[target]
            cells.append(with_interval(row))
            beats.append(f"{row['beats']} of {row['of_simple']}")
        lines.append(f"| {' | '.join([*cells, *beats])} |")
    return lines


def method_section(search: pd.DataFrame) -> list[str]:
    """Return the part on leaving one method out when choosing."""
    methods = [name.removeprefix("strict_without_") for name in search.columns if name.startswith("strict_without_")]
    variants = search[~search["measure"].isin(SIMPLE)].set_index("measure")
    lines = [
        "",
        "## Chosen without one method, looked at on that method (all seeds)",
        "",
        "| left out | best without it | its accuracy lost | its rise in NLL "
        "| impact_scored: accuracy lost | rise in NLL | codrift_divergence: accuracy lost | rise in NLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        criterion = variants[[f"strict_without_{method}", f"nll_without_{method}"]].min(axis=1)
        best = str(criterion.idxmax())
        cells = [method, f"`{best}`"]
        for measure in (best, "impact_scored", "codrift_divergence"):
            cells += [number(variants.loc[measure, f"{short}_{method}"]) for short in ("strict", "nll")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(value: float) -> str:
    """Return two digits, or a dash."""
    return "-" if pd.isna(value) else f"{value:.2f}"


def with_interval(row: pd.Series) -> str:
    """Return rho with its interval."""
    return f"{number(row['rho'])} [{number(row['low'])}, {number(row['high'])}]"


if __name__ == "__main__":
    main()
