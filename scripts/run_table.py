"""Train, record and compare methods over seeds on the built-in stream; resumable at any point.

    python scripts/run_table.py [--methods ...] [--seeds 0 1 2] [--runs runs/table] [--out docs/results/builtin]

Every finished run is skipped, a run that was cut off is resumed, and the table is rewritten after each run
(OUT.csv by run, OUT.md by method with mean and standard deviation over seeds).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import pandas as pd
import torch
import transformers

from driftlens.analysis import compare
from driftlens.recording import record_run
from driftlens.training import load_config, train_run

METHODS = ["moe-lora", "pass-moe", "moe-lora-topk", "seq-lora"]
COLUMNS = [
    "AP",
    "AP_lenient",
    "MFT",
    "BWT_T",
    "BWT_T-1",
    "forgetting_max",
    "worst_task_loss",
    "router_js",
    "codrift_divergence",
    "codrift_router",
    "codrift_experts",
    "coupling",
    "gate_entropy",
    "specialisation",
    "seconds",
]


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/builtin"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for seed in args.seeds:  # seeds outside: every method has a first row early
        for method in args.methods:
            run_one(method, seed, args.runs, args.threads)
            write_table(args.runs, args.out)


def run_one(method: str, seed: int, runs: Path, threads: int) -> None:
    """Train and record one run, or finish it."""
    run = runs / f"{method}-seed{seed}"
    config = load_config(f"builtin/{method}", [f"training.seed={seed}", f"training.threads={threads}"])
    began = time.monotonic()
    fresh = not (run / "manifest.json").is_file()
    train_run(config, run, resume=not fresh)
    if fresh:  # a resumed run's duration would be that of its last piece
        (runs / f"{run.name}.seconds").write_text(f"{time.monotonic() - began:.0f}")
    record_run(run)
    print(f"{run}: done", flush=True)


def write_table(runs: Path, out: Path) -> None:
    """Write OUT.csv and OUT.md from every run in the folder."""
    folders = sorted({path.parents[1] for path in runs.glob("*/recordings/*.noise.h5")})  # the last file of a run
    frame = compare(folders)
    durations = {p.stem: float(p.read_text()) for p in runs.glob("*.seconds")}
    frame["seconds"] = [durations.get(f"{row.method}-seed{row.seed}") for row in frame.itertuples()]
    frame["worst_task_loss"] = [worst_loss(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    columns = ["method", "seed", *COLUMNS]
    frame[columns].round(5).to_csv(out.with_suffix(".csv"), index=False)
    mean, spread = (getattr(frame.groupby("method")[COLUMNS], how)() for how in ("mean", "std"))
    seeds = frame.groupby("method")["seed"].nunique()
    lines = [
        "# Methods on the built-in stream",
        "",
        f"Mean ± standard deviation over seeds. Written by `scripts/run_table.py` on {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}. "
        "Definitions: `docs/metrics.md`. Scores are strict unless said; drift columns are means over old tasks at the "
        "last checkpoint. `worst_task_loss` is the largest accuracy that a task lost between its own checkpoint and "
        "the last one. `seconds` is training with evaluation.",
        "",
        "| method | seeds | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for method in mean.index:
        cells = [_cell(mean.loc[method, column], spread.loc[method, column], column) for column in COLUMNS]
        lines.append(f"| {method} | {seeds[method]} | " + " | ".join(cells) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def worst_loss(run: Path) -> float:
    """Return the largest strict accuracy that one task lost between its own checkpoint and the last one."""
    scores = pd.read_parquet(run / "scores.parquet")
    table = scores.pivot_table(index="checkpoint", columns="task_index", values="strict", aggfunc="mean")
    last = table.index.max()
    return max(float(table.loc[j, j] - table.loc[last, j]) for j in table.columns)


def _cell(mean: float, spread: float, column: str) -> str:
    if pd.isna(mean):
        return "-"
    if column == "seconds":
        return f"{mean:.0f}"
    return f"{mean:.3f}" + ("" if pd.isna(spread) else f" ± {spread:.3f}")


if __name__ == "__main__":
    main()
