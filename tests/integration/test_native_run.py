"""A stranger's model from recordings to figures: a transformers mixture of experts, no adapters, no scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import driftlens as dl
from driftlens.analysis.collect import collect
from driftlens.errors import NotFoundError
from driftlens.metrics.undefined import Reason
from driftlens.recording import ProbeSample, ProbeSet, record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dl.Run:
    folder = tmp_path_factory.mktemp("native")
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip
    rng = np.random.default_rng(0)

    def sample(name: str) -> ProbeSample:
        ids = [int(i) for i in rng.integers(3, 64, 9)]
        return ProbeSample(name, input_ids=tuple(ids[:7]), answer_ids=tuple(ids[7:]))

    probes = ProbeSet({task: tuple(sample(str(n)) for n in range(6)) for task in ("a", "b", "c")})
    files = []
    for step in range(4):
        files.append(folder / f"{step}.h5")
        record(model, probes, files[-1], encoder=None, checkpoint_meta={"checkpoint": str(step)})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate.weight"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return collect(files[1:], folder / "run", start=files[0], method="fine-tuning")


def test_routing_drift_grows_and_what_was_not_seen_is_named(run: dl.Run) -> None:
    drift = run.summary["router_js"].sel(probe="a").to_numpy()
    assert drift[1] == pytest.approx(0, abs=1e-6)
    assert 0 < drift[2] < drift[3] <= 1
    for measure in ("codrift_divergence", "responsibility_divergence", "alignment"):
        assert np.isnan(run.codrift[measure]).all()
        codes = run.codrift[f"{measure}_reason"].sel(probe="a", checkpoint=3)
        assert set(codes.to_numpy().tolist()) == {Reason.NOT_MEASURED}
    assert np.isfinite(dl.compare([run])["router_js"]).all()


@pytest.mark.parametrize("name", [n for n in dl.figures.FIGURES.names() if dl.figures.FIGURES.get(n).subject == "run"])
def test_every_figure_draws_or_says_what_is_missing(run: dl.Run, name: str) -> None:
    kind = dl.figures.FIGURES.get(name)
    if name.startswith("accuracy"):
        with pytest.raises(NotFoundError, match=r"scores\.parquet"):
            kind.draw(run)
    else:
        figure = kind.draw(run)
        assert figure.data or figure.layout.annotations
