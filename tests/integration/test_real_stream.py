"""The real backbone on three real tasks: learn, record, analyse. Small, but nothing in it is a toy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from driftlens.analysis import open_run
from driftlens.backbones import fetch_assets
from driftlens.errors import NotFoundError
from driftlens.recording import record_run
from driftlens.training import load_config, train_run

TASKS = ["garment", "digit", "noun-class"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    try:
        fetch_assets()
    except NotFoundError as error:
        pytest.skip(f"the backbone's weights cannot be fetched here: {error}")
    overrides = [
        f"stream.tasks={TASKS}",
        "stream.train_samples=64",
        "stream.test_samples=12",
        "training.steps_per_task=10",
        "training.prefix_cache=memory",
        "training.learning_rate=0.002",
    ]
    folder = train_run(load_config("builtin/moe-lora", overrides), tmp_path_factory.mktemp("real") / "run")
    record_run(folder, tokens_per_sample=4)
    return open_run(folder)


def test_it_learns(run):
    nll = run.scores["nll"]
    for index, task in enumerate(TASKS, start=1):
        before, after = (float(nll.sel(checkpoint=t, task=task)) for t in (index - 1, index))
        assert after < before - 0.5, f"{task}: {before} -> {after} nats"
    assert float(run.stream["AP"].sel(scorer="strict")) > 0.2


def test_answers_are_words_that_were_generated(run):
    table = pd.read_parquet(run.path / "scores.parquet")
    last = table[table["checkpoint"] == 3]
    known = set(last["reference"])
    assert last["prediction"].isin(known).mean() > 0.8
    assert table.loc[table["checkpoint"] == 0, "prediction"].nunique() > 5


def test_it_routes_and_drifts(run):
    summary = run.summary
    assert float(summary["gate_entropy"].sel(probe="garment", checkpoint=3)) < 0.99
    drift = summary["router_js"].sel(probe="garment", checkpoint=3)
    noise = float(summary["router_js_noise"].sel(probe="garment"))
    assert float(drift) > 10 * noise
    phi = run.codrift["codrift_divergence"].sel(probe="garment", checkpoint=3).values
    assert np.isfinite(phi).all()
    assert (phi > 0).all()
    assert (phi < 1).all()
