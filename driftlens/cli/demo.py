"""``driftlens demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note, progress_bar
from driftlens.cli.compare import COMPARED

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs.")] = Path("runs/demo"),
    method: Annotated[list[str] | None, typer.Option("--method", help="Methods to run; repeatable.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole story on the built-in stream: train, record, analyse, compare. Resumes what was begun."""
    from driftlens.analysis import compare as compare_runs
    from driftlens.backbones.assets import fetch_assets
    from driftlens.recording import record_run
    from driftlens.training import load_config, train_run

    def report_assets(stage: str, fraction: float) -> None:
        note(f"{100 * fraction:3.0f} %  {stage}", quiet)

    fetch_assets(progress=report_assets)
    runs = []
    for name in method or ["moe-lora", "pass-moe"]:
        config = load_config(f"builtin/{name}", [f"training.seed={seed}"])
        run = out / f"{name}-seed{seed}"
        note(f"{name}: six tasks, {config.training.steps_per_task} steps each -> {run}", quiet)
        with progress_bar(quiet, f"{name}: ") as report:
            train_run(config, run, resume=(run / "manifest.json").is_file(), on_progress=report)
        with progress_bar(quiet, f"{name}: ") as report:
            record_run(run, progress=report)
        runs.append(run)
    frame = compare_runs(runs)
    emit(frame.to_dict(orient="records"), as_json=as_json, columns=COMPARED)
    note(
        "AP: mean final accuracy. BWT: what learning later tasks did to earlier ones (T: over all tasks, T-1: without "
        "the last). router_js: how far old probes' routing moved (0..1), with its 95 % interval. codrift_divergence: "
        "how far the sites' function moved on old probes (0..1). gate_entropy: 1 means the gate does not choose.",
        quiet or as_json,
    )
    streamlit = Path(sys.executable).with_name("streamlit")
    shown = streamlit.relative_to(Path.cwd()) if streamlit.is_relative_to(Path.cwd()) else streamlit
    note(f"Look at it:  {shown} run app/main.py -- {out}", as_json)
