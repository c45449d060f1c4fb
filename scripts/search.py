"""Search hyper-parameters with the same budget for every method: two trials each, on data that no result uses.

Each trial trains three tasks of the built-in stream (seed 100) on 300 training samples a task and is scored
on the remaining 60 training samples, never on test samples. The grid is one learning rate times two values
of one switch per method. Trials that are already in the table are skipped, so the script may be stopped at any time.

    python scripts/search.py [--out docs/results/search.csv] [--methods pass-moe ...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from driftlens.analysis import open_run
from driftlens.streams import STREAMS, Stream, load_stream
from driftlens.training import load_config, train_run

LEARNING_RATES = [1e-3]
SWITCHES: dict[str, tuple[str, list[object]]] = {
    "seq-lora": ("adapter.lora_alpha", [8, 16]),
    "moe-lora": ("adapter.gate_temperature", [1.0, 2.0]),
    "moe-lora-topk": ("adapter.top_k", [1, 2]),
    "pass-moe": ("method.lambda_a", [0.03, 0.3]),
}


def search_stream(tasks: list[str] | int | None = None, train: int = 300, test: int = 60) -> Stream:
    """Return the built-in stream with its test samples replaced by training samples that are held out."""
    stream = load_stream("builtin", tasks=tasks or ["garment", "digit", "noun-class"])
    return Stream(
        "builtin-search",
        tuple(replace(task, train=task.train[:-test][:train], test=task.train[-test:]) for task in stream),
    )


def main() -> None:
    """Run the trials that the table does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/search.csv"))
    parser.add_argument("--methods", nargs="*", default=list(SWITCHES))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    STREAMS.register("builtin-search", search_stream)
    rows = pd.read_csv(args.out).to_dict("records") if args.out.is_file() else []
    done = {(row["method"], row["learning_rate"], float(row["value"])) for row in rows}
    for method in args.methods:
        key, values = SWITCHES[method]
        for learning_rate in LEARNING_RATES:
            for value in values:
                if (method, learning_rate, float(value)) in done:
                    continue
                overrides = [
                    "stream.name=builtin-search",
                    "training.seed=100",
                    f"training.threads={args.threads}",
                    f"training.learning_rate={learning_rate!r}",
                    f"{key}={value!r}",
                ]
                if method == "pass-moe":
                    overrides.append(f"method.lambda_b={value / 10!r}")
                began = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    run = open_run(train_run(load_config(f"builtin/{method}", overrides), Path(folder) / "run"))
                    scores = run.stream.sel(scorer="strict")
                    rows.append(
                        {
                            "method": method,
                            "learning_rate": learning_rate,
                            "switch": key,
                            "value": value,
                            "AP": round(float(scores["AP"]), 4),
                            "MFT": round(float(scores["MFT"]), 4),
                            "BWT_T": round(float(scores["BWT_T"]), 4),
                            "seconds": round(time.monotonic() - began),
                        }
                    )
                print(rows[-1], flush=True)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
