"""The ledger: closed forms, an independent loop, and completeness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.ledger import AnswerBatches, book_ledger, site_entries
from driftlens.attribution.pairs import LoadedPair, load_pair
from driftlens.errors import ConfigError, ProbeError
from tests.attribution.support import loaded_pair, save_pair, save_plain_pair, toy_samples


def brute_force(pair: LoadedPair, batches: AnswerBatches, alpha: float) -> np.ndarray:
    """[sites, 2, E] of the mean loss at one point of the path, expert by expert, from vectors of length d_out.

    The gradient comes from a variable that is added to every site's output, one sample at a time.
    """
    total = np.zeros((len(pair.pairs), 2, 3))
    for sample in batches.encoded:
        single = AnswerBatches(pair, [sample], batch_size=1, prefix_cache=False)
        inputs: dict[int, torch.Tensor] = {}
        extra: dict[int, torch.Tensor] = {}

        def watch(number: int, inputs=inputs, extra=extra):
            def hook(_module, args, output):
                inputs[number] = args[0].detach().reshape(-1, args[0].shape[-1])
                extra[number] = torch.zeros_like(output, requires_grad=True)
                return output + extra[number]

            return hook

        with Switchboard(pair) as board:
            board.path(alpha)
            handles = [p.current.module.register_forward_hook(watch(i)) for i, p in enumerate(pair.pairs)]
            single.losses(single.batches[0]).sum().backward()
            for handle in handles:
                handle.remove()
        for number, site in enumerate(pair.pairs):
            g = extra[number].grad.reshape(-1, extra[number].shape[-1]).double()
            gates, outputs = [], []
            for part in (site.anchor, site.current):
                answer, b = part.respond(inputs[number]), part.weights().b
                gates.append(answer["gate"].double())
                outputs.append(torch.einsum("edr,ner->ned", b.double(), answer["pathway"].double()) * part.info.scaling)
            for e in range(3):
                r = (gates[1] - gates[0])[:, e, None] * (outputs[0] + outputs[1])[:, e] / 2
                x = (gates[0] + gates[1])[:, e, None] / 2 * (outputs[1] - outputs[0])[:, e]
                total[number, 0, e] += float((g * r).sum())
                total[number, 1, e] += float((g * x).sum())
    return total / len(batches.encoded)


def test_entries_at_one_node_equal_a_loop_written_from_the_equation(pair: LoadedPair, batches: AnswerBatches) -> None:
    found = book_ledger(pair, batches, nodes=1)  # one node: the middle of the path, with weight 1
    expected = brute_force(pair, batches, 0.5)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found.entries.mean(axis=0), expected, atol=2e-5 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize("gate", ["softmax", "energy"], indirect=True)
def test_the_ledger_of_a_smooth_gate_is_complete(pair: LoadedPair, batches: AnswerBatches) -> None:
    found = book_ledger(pair, batches, nodes=8)
    assert abs(found.rise) > 1e-3
    assert abs(found.residual) < 1e-3 * abs(found.rise)
    assert np.abs(found.residuals).max() < 1e-3 * np.abs(found.nll_current - found.nll_anchor).max()
    np.testing.assert_allclose(found.router + found.experts + found.residual, found.rise, atol=1e-12)


def test_losses_at_the_ends_are_those_of_the_two_checkpoints(pair: LoadedPair, batches: AnswerBatches) -> None:
    found = book_ledger(pair, batches, nodes=1)
    np.testing.assert_allclose(found.nll_current, batches.nll(), atol=2e-5)
    with pair.anchor_alone():
        np.testing.assert_allclose(found.nll_anchor, batches.nll(), atol=2e-5)


def test_more_nodes_leave_less_over(pair: LoadedPair, batches: AnswerBatches, gate: str) -> None:
    one, four = (abs(book_ledger(pair, batches, nodes=n).residual) for n in (1, 4))
    if gate != "topk":  # jumps are no matter of nodes
        assert four < 0.1 * one


def test_a_tolerance_halves_panels_until_it_is_met_or_the_nodes_are_used_up(
    pair: LoadedPair, batches: AnswerBatches, gate: str
) -> None:
    found = book_ledger(pair, batches, nodes=1, tolerance=1e-4, max_nodes=40)
    assert found.panels[0] == 0.0
    assert found.panels[-1] == 1.0
    assert list(found.panels) == sorted(set(found.panels))
    assert len(found.panel_residuals) == len(found.panels) - 1
    np.testing.assert_allclose(sum(found.panel_residuals), found.residual, atol=1e-9)
    assert len(found.panels) > 2, "one node must not do, or this says nothing"
    met = abs(found.residual) <= 1e-4 * abs(found.rise)
    assert met or (gate == "topk" and found.evaluations == 39)
    assert found.evaluations == 1 + 2 * (len(found.panels) - 2)


def test_tokens_and_sites_are_the_same_sum(pair: LoadedPair, batches: AnswerBatches) -> None:
    found = book_ledger(pair, batches, nodes=2)
    by_sample = np.zeros((len(found.samples), 2))
    np.add.at(by_sample, found.tokens.sample, found.tokens.entries)
    np.testing.assert_allclose(by_sample, found.entries.sum(axis=(1, 3)), atol=1e-10)
    for number, sample in enumerate(batches.encoded):
        own = found.tokens.sample == number
        np.testing.assert_array_equal(found.tokens.token_id[own], sample.input_ids)
        np.testing.assert_array_equal(found.tokens.role[own], sample.roles)
        np.testing.assert_array_equal(found.tokens.position[own], np.arange(len(sample.input_ids)))
        # the last token (the end token) predicts nothing that is asked for
        assert np.all(found.tokens.entries[own][-1] == 0)


def test_batches_and_their_order_change_nothing(pair: LoadedPair, batches: AnswerBatches) -> None:
    found = book_ledger(pair, batches, nodes=2)
    samples = toy_samples()
    turned = book_ledger(pair, AnswerBatches(pair, samples[::-1], batch_size=3, prefix_cache=False), nodes=2)
    assert turned.samples == found.samples[::-1]
    scale = np.abs(found.entries).max()
    np.testing.assert_allclose(turned.entries[::-1], found.entries, atol=1e-4 * scale)


def test_equal_checkpoints_have_an_empty_ledger(folders: tuple[Path, Path]) -> None:
    pair = loaded_pair((folders[0], folders[0]))
    found = book_ledger(pair, AnswerBatches(pair, toy_samples(3)), nodes=2)
    assert np.all(found.entries == 0)
    assert abs(found.rise) < 1e-6


def test_plain_lora_books_everything_to_experts(tmp_path: Path) -> None:
    pair = load_pair(*save_plain_pair(tmp_path), base="tiny-random")
    found = book_ledger(pair, AnswerBatches(pair, toy_samples()), nodes=8)
    assert np.all(found.entries[:, :, 0] == 0)
    assert abs(found.rise) > 1e-3
    assert abs(found.residual) < 1e-3 * abs(found.rise)


@pytest.mark.parametrize("only", ["router", "experts"])
def test_what_did_not_move_is_booked_nothing(tmp_path: Path, only: str) -> None:
    anchor, current = save_pair(tmp_path)
    keep = {"router": ("lora_A", "lora_B"), "experts": ("gate",)}[only]
    from safetensors.torch import load_file, save_file

    old, new = (load_file(path / "adapter_model.safetensors") for path in (anchor, current))
    for name in new:
        if any(part in name for part in keep):
            new[name] = old[name]
    save_file(new, current / "adapter_model.safetensors")
    pair = loaded_pair((anchor, current))
    found = book_ledger(pair, AnswerBatches(pair, toy_samples()), nodes=8)
    silent = {"router": 1, "experts": 0}[only]
    assert np.abs(found.entries[:, :, 1 - silent]).max() > 1e-4
    assert np.abs(found.entries[:, :, silent]).max() < 1e-9 + 1e-6 * np.abs(found.entries).max()
    assert abs(found.residual) < 2e-3 * abs(found.rise)


def test_product_of_sums_splits_exactly_on_the_same_input() -> None:
    from driftlens.attribution.pairs import Answers

    g = torch.Generator().manual_seed(0)
    gates, z = torch.rand(2, 5, 3, generator=g), torch.randn(2, 5, 3, 4, generator=g)
    b, grad = torch.randn(2, 3, 6, 4, generator=g), torch.randn(5, 6, generator=g)

    class Pair:
        product = True
        outputs = b.permute(2, 0, 1, 3).flatten(1)

    found = site_entries(Pair(), Answers(*gates, *z), grad)  # type: ignore[arg-type]

    def u(gate: int, by: int) -> torch.Tensor:
        summed = torch.einsum("ne,ner->nr", gates[gate], z[by])
        return torch.einsum("ne,edr,nr->nd", gates[gate], b[by], summed)

    router = (u(1, 0) - u(0, 0) + u(1, 1) - u(0, 1)) / 2
    torch.testing.assert_close(found[:, 0].sum(dim=1), (grad * router).sum(dim=1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.sum(dim=(1, 2)), (grad * (u(1, 1) - u(0, 0))).sum(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"nodes": 0}, "1 <= nodes"), ({"nodes": 9, "max_nodes": 8}, "max_nodes"), ({"tolerance": 0.0}, "positive share")],
)
@pytest.mark.parametrize("gate", ["softmax"], indirect=True)
def test_impossible_settings_are_refused(
    pair: LoadedPair, batches: AnswerBatches, options: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        book_ledger(pair, batches, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["softmax"], indirect=True)
def test_samples_without_answers_are_refused(pair: LoadedPair, batches: AnswerBatches) -> None:
    from dataclasses import replace

    sample = batches.encoded[0]
    mute = replace(sample, input_ids=sample.input_ids[: sample.n_prompt], roles=sample.roles[: sample.n_prompt])
    with pytest.raises(ProbeError, match="have no answer"):
        AnswerBatches(pair, [mute])
    with pytest.raises(ProbeError, match="no samples"):
        AnswerBatches(pair, [])
