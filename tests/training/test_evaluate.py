"""Scores against independent computations: ``generate`` of transformers, and a plain teacher-forced forward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model

from driftlens.adapters import iter_sites
from driftlens.backbones import collate, load_backbone
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.methods import AdapterOptions, create_method
from driftlens.streams import load_stream
from driftlens.training.evaluate import TaskScorer, prompt_only


@pytest.fixture(scope="module")
def setting():
    backbone = load_backbone("tiny-random")
    method = create_method("moe-lora", {})
    torch.manual_seed(0)
    model = get_peft_model(backbone.model, method.adapter_config(AdapterOptions(num_experts=3, r=2, layers=[2, 3])))
    with torch.no_grad():
        for _, site in iter_sites(model):
            site.moe_lora_B["default"].weight.normal_(std=0.5)
    samples = [sample for task in load_stream("toy") for sample in task.test]
    return backbone, model.eval(), samples


def scores(setting, prefix_depth, batch_size):
    backbone, model, samples = setting
    prefix = None if prefix_depth is None else FrozenPrefix(model, prefix_depth, backbone.encoder.pad_token_id)
    scorer = TaskScorer(
        samples, backbone.encoder, prefix=prefix, batch_size=batch_size, max_new_tokens=4, device=torch.device("cpu")
    )
    return scorer.score(model)


def test_nll_equals_a_plain_forward_of_each_sample_alone(setting):
    backbone, model, samples = setting
    for outcome, sample in zip(scores(setting, 2, 7), samples, strict=True):
        encoded = backbone.encoder.encode(sample)
        batch = collate([encoded], pad_token_id=backbone.encoder.pad_token_id)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "pixel_values") if k in batch}
        with torch.no_grad():
            logits = model(**inputs).logits[0].double().log_softmax(-1)
        n = encoded.n_prompt
        answer = torch.from_numpy(encoded.input_ids[n:])
        expected = -logits[n - 1 : -1].gather(1, answer[:, None]).mean()
        assert outcome.sample == sample.id
        assert outcome.nll == pytest.approx(float(expected), rel=1e-4)


def test_answers_equal_transformers_generate(setting):
    backbone, model, samples = setting
    encoder = backbone.encoder
    differing = set()
    for outcome, sample in zip(scores(setting, 2, 8), samples, strict=True):
        batch = collate([prompt_only(encoder.encode(sample))], pad_token_id=encoder.pad_token_id)
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
        tokens = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=encoder.end_token_id,
            pad_token_id=encoder.pad_token_id,
        )
        assert outcome.prediction == encoder.decode(tokens[0, batch["input_ids"].shape[1] :])
        differing.add(outcome.prediction)
    assert len(differing) > 1, "a model that always says the same proves nothing"


@pytest.mark.parametrize(("depth", "batch_size"), [(None, 1), (None, 5), (0, 24), (1, 1), (2, 24)])
def test_prefix_and_batch_size_change_nothing(setting, depth, batch_size):
    reference, other = scores(setting, 2, 8), scores(setting, depth, batch_size)
    assert [o.prediction for o in other] == [o.prediction for o in reference]
    np.testing.assert_allclose([o.nll for o in other], [o.nll for o in reference], rtol=1e-4)
    assert [o.strict for o in other] == [o.strict for o in reference]


def test_the_model_is_left_as_it_was(setting):
    _, model, _ = setting
    model.train()
    scores(setting, 2, 8)
    assert model.training
    model.eval()
    forwards = [layer.__dict__.get("forward") for layer in model.get_base_model().model.language_model.layers]
    assert forwards == [None] * len(forwards)
