"""Make sample_runs/ from full runs: the same tables, fewer token rows, Gram matrices instead of weights.

    python scripts/make_sample_runs.py [--runs runs/table] [--methods moe-lora pass-moe] [--seed 0] [--out sample_runs]

Runs that are missing are trained and recorded first, with the configuration that the results table uses.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from run_table import run_one

from driftlens.analysis import open_run, thin_run


def main() -> None:
    """Thin one run per method into the sample folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--methods", nargs="*", default=["moe-lora", "pass-moe"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens-per-sample", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("sample_runs"))
    args = parser.parse_args()
    for method in args.methods:
        run_one(method, args.seed, args.runs, args.threads)
        target = args.out / method
        if target.exists():
            shutil.rmtree(target)
        args.out.mkdir(exist_ok=True)
        thin_run(open_run(args.runs / f"{method}-seed{args.seed}"), target, tokens_per_sample=args.tokens_per_sample)
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
