"""What accumulators, attribution, nulls and matching say to requests that cannot be met, word for word; defaults."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.errors import ConfigError, DriftLensError, ProbeError

GATE, PATH = np.full((5, 3), 0.5), np.ones((5, 3, 2))


def updated(sums: Any, *arguments: Any, **options: Any) -> Any:
    sums.update(*arguments, **options)
    return sums


def by_sample(samples: list[int], **values: Any) -> m.SampleSums:
    return updated(m.SampleSums(), np.array(samples), values)


TOKENS = m.codrift_from_grams(GATE, GATE, PATH, PATH, *[np.eye(6)] * 3)
SHARDS = "shards need the same sites, experts and statistics. Pad the experts of a method that grew, or use one "
REFUSALS: list[tuple[type[DriftLensError], str, Callable[[], Any]]] = [
    (
        ProbeError,
        "x has shape (2,) for 3 samples; expected one sample per token.",
        lambda: by_sample([0, 1, 1], x=[1.0, 2]),
    ),
    (
        ProbeError,
        "x has shape () for 1 samples; expected one sample per token.",
        lambda: by_sample([0], x=1.0),
    ),
    (
        ProbeError,
        "Nothing was accumulated; call update with at least one batch first.",
        lambda: m.SampleSums().result(),
    ),
    (
        ConfigError,
        "Sums of {'x': ()} and of {'x': (2,)} cannot be added; " + SHARDS + "accumulator for each group of sites.",
        lambda: by_sample([0], x=[1.0]).merge(by_sample([0], x=[[1.0, 2]])),
    ),
    (
        ConfigError,
        "Sums with k = 1 and k = None cannot be added; use the same k for all shards.",
        lambda: m.RoutingSums(1).merge(m.RoutingSums()),
    ),
    (
        ConfigError,
        "Sums with k = 2 and k = 3 cannot be added; use the same k for all shards.",
        lambda: m.UsageSums(2).merge(m.UsageSums(3)),
    ),
    (
        ConfigError,
        "Sums of CoDriftTokens and DriftOriginTokens cannot be added.",
        lambda: m.TokenSums(m.CoDriftTokens).merge(m.TokenSums(m.DriftOriginTokens)),  # type: ignore[arg-type]
    ),
    (
        ConfigError,
        "Results of kind CoDriftTokens were given; expected DriftOriginTokens.",
        lambda: updated(m.TokenSums(m.DriftOriginTokens), TOKENS),
    ),
    (
        ProbeError,
        "The gates and pathways of the two checkpoints hold 5 and 4 tokens; drift pairs the same token at both. "
        "Record both checkpoints on the same probe set.",
        lambda: updated(m.UsageSums(), GATE, PATH[1:]),
    ),
    (
        ProbeError,
        "The gates of the two checkpoints hold 5 and 4 tokens; drift pairs the same token at both. "
        "Record both checkpoints on the same probe set.",
        lambda: updated(m.RoutingSums(), GATE, GATE[1:]),
    ),
    (
        ConfigError,
        "3 orders of 2 players were asked for; give at least one player and one order, and an even number of "
        "antithetic orders, such as 16.",
        lambda: m.player_orders(2, 3),
    ),
    (
        ConfigError,
        "0 orders of 2 players were asked for; give at least one player and one order, and an even number of "
        "antithetic orders, such as 16.",
        lambda: m.player_orders(2, 0, antithetic=False),
    ),
    (
        ConfigError,
        "1 orders of 0 players were asked for; give at least one player and one order, and an even number of "
        "antithetic orders, such as 16.",
        lambda: m.player_orders(0, 1, antithetic=False),
    ),
    (
        ConfigError,
        "Orders of shape (1, 2) must hold a permutation of 0..K-1 in every row [P, K].",
        lambda: m.permutation_shapley(np.array([[1, 2]]), np.zeros((1, 3))),
    ),
    (
        ConfigError,
        "Scores have shape (2, 2); 2 orders of 2 players need [..., 2, 3].",
        lambda: m.permutation_shapley(np.array([[0, 1], [1, 0]]), np.zeros((2, 2))),
    ),
    (
        ConfigError,
        "1 orders cannot be antithetic pairs; give an even number, or antithetic=False.",
        lambda: m.permutation_shapley(np.array([[0, 1]]), np.zeros((1, 3))),
    ),
    (
        ConfigError,
        'The tail is \'both\'; expected "low" (small values are unusual) or "high".',
        lambda: m.null_test(1.0, [1.0], "both"),  # type: ignore[arg-type]
    ),
    (
        ConfigError,
        "Draws of shape (3, 2) for values of shape (3,); expected [D, ...], D >= 1.",
        lambda: m.null_test(np.zeros(3), np.zeros((3, 2))),
    ),
    (
        ConfigError,
        "Draws of shape (0, 3) for values of shape (3,); expected [D, ...], D >= 1.",
        lambda: m.null_test(np.zeros(3), np.zeros((0, 3))),
    ),
    (
        ConfigError,
        "Draws of shape (3,) for values of shape (3,); expected [D, ...], D >= 1.",
        lambda: m.null_test(np.zeros(3), np.zeros(3)),
    ),
    (
        ConfigError,
        "axis is 0 and site_axes 0 for an array of shape (5, 3); count the expert axis from the end (-1 is the last), "
        "behind the site axes.",
        lambda: m.permuted_experts(np.sum, GATE, axis=0),
    ),
    (
        ConfigError,
        "axis is -2 and site_axes 1 for an array of shape (5, 3); count the expert axis from the end (-1 is the "
        "last), behind the site axes.",
        lambda: m.permuted_experts(np.sum, GATE, axis=-2, site_axes=1),
    ),
    (
        ConfigError,
        "A null of 0 draws was asked for; at least 1 is needed, 200 is usual.",
        lambda: m.permuted_tokens(np.sum, GATE, draws=0),
    ),
    (
        ConfigError,
        "Ranks 3.0 and 1.0 in dimension 2.0; expected 1 <= rank <= dimension.",
        lambda: m.random_overlap(3, 1, 2),
    ),
    (
        ConfigError,
        "Ranks 1.0 and 0.0 in dimension 2.0; expected 1 <= rank <= dimension.",
        lambda: m.random_overlap_null(0.5, 1, 0, 2),
    ),
    (
        ConfigError,
        "Profiles have shapes (3,) and (5, 3); expected [..., units, experts] of both runs.",
        lambda: m.profile_similarity(GATE[0], GATE),
    ),
    (
        ProbeError,
        "The profiles of the two runs have 5 and 4 units (tokens or samples); experts are matched by what they do on "
        "the same ones. Record both runs on one probe set.",
        lambda: m.profile_similarity(GATE, GATE[1:]),
    ),
    (
        ConfigError,
        "similarity has shape (0, 3); expected [..., experts, experts], at least one each.",
        lambda: m.best_matching(np.zeros((0, 3))),
    ),
    (
        ConfigError,
        "similarity has shape (3,); expected [..., experts, experts], at least one each.",
        lambda: m.best_matching(np.zeros(3)),
    ),
    (
        ConfigError,
        "Unknown exchange 'tokens'; choose one of probes, samples, within_probes.",
        lambda: m.null_pairings(np.zeros(3), np.zeros(3), exchange="tokens"),  # type: ignore[arg-type]
    ),
    (
        ConfigError,
        "A null of 0 draws was asked for; at least 1 is needed, 1000 is usual.",
        lambda: m.null_pairings(np.zeros(3), np.zeros(3), draws=0),
    ),
    (
        ProbeError,
        "probe and sample have shapes (3,) and (2,); expected one entry per unit.",
        lambda: m.null_pairings(np.zeros(3), np.zeros(2)),
    ),
    (
        ProbeError,
        "probe and sample have shapes (3, 1) and (3, 1); expected one entry per unit.",
        lambda: m.null_pairings(np.zeros((3, 1)), np.zeros((3, 1))),
    ),
    (
        ProbeError,
        "pairings has shape (1, 4) for 5 units; expected [draws, units].",
        lambda: m.match_profiles(GATE, GATE, np.zeros((1, 4), dtype=int)),
    ),
    (
        ProbeError,
        "pairings has shape (5,) for 5 units; expected [draws, units].",
        lambda: m.match_profiles(GATE, GATE, np.arange(5)),
    ),
]


@pytest.mark.parametrize(("error", "text", "ask"), REFUSALS, ids=[text[:40] for _, text, _ in REFUSALS])
def test_refusals_word_for_word(error: type[DriftLensError], text: str, ask: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        ask()
    assert type(caught.value) is error
    assert str(caught.value) == text


@pytest.mark.parametrize("name", ["gate0", "gate1"])
def test_logits_are_refused_by_the_accumulator_under_their_name(name: str) -> None:
    gates = {"gate0": GATE, "gate1": GATE, name: -GATE}
    with pytest.raises(ConfigError, match=rf"^{name} holds negative entries"):
        m.RoutingSums().update(**gates)
    with pytest.raises(ConfigError, match=r"^gate holds negative entries"):
        m.UsageSums().update(-GATE)


def test_attribution_has_the_documented_defaults() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 30))
    usual = m.bootstrap_attribution(*scores, draws=1000, seed=0, level=0.95)
    for found, wanted in zip(m.bootstrap_attribution(*scores), usual, strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(m.player_orders(5, 8), m.player_orders(5, 8, 0, antithetic=True))
    assert m.player_orders(1, 1, antithetic=False).tolist() == [[0]]
    orders = m.player_orders(3, 6)
    steps = np.random.default_rng(1).normal(size=(6, 4))
    plain, paired = m.permutation_shapley(orders, steps), m.permutation_shapley(orders, steps, antithetic=True)
    np.testing.assert_array_equal(plain.error, paired.error)


def test_matching_has_the_documented_defaults() -> None:
    probe, sample = np.repeat([0, 1, 2], 4), np.repeat(np.arange(6), 2)
    pairings = m.null_pairings(probe, sample)
    assert pairings.shape == (1000, 12)
    np.testing.assert_array_equal(pairings, m.null_pairings(probe, sample, draws=1000, seed=0, exchange="probes"))
    assert not np.array_equal(pairings, m.null_pairings(probe, sample, seed=1))
    profiles = np.random.default_rng(2).dirichlet(np.ones(3), size=(2, 12))
    found, wanted = (m.match_profiles(*profiles, pairings[:50], **level) for level in ({}, {"level": 0.95}))
    np.testing.assert_array_equal(found.null_high, wanted.null_high)
    np.testing.assert_array_equal(found.expert_null_high, wanted.expert_null_high)
    narrow = m.match_profiles(*profiles, pairings[:50], level=0.2)
    assert narrow.null_high < found.null_high
    assert (narrow.expert_null_high <= found.expert_null_high).all()
    sites = np.random.default_rng(3).dirichlet(np.ones(3), size=(2, 70, 12))
    np.testing.assert_array_equal(m.other_site_scores(*sites), m.other_site_scores(*sites, most=64))
    assert m.other_site_scores(*sites).shape == (64, 70)
    assert m.other_site_scores(*sites, most=3).shape == (3, 70)


def test_scores_that_cancel_are_scores_and_two_orders_have_an_error() -> None:
    found = m.bootstrap_attribution([1.0, 2.0], [0.5, 0.0], [-0.5, 0.0], [0.0, 0.0])
    assert found.forgetting.value == 1.5
    assert found.phi_router.value + found.phi_experts.value == pytest.approx(1.5)
    steps = np.array([[0.0, 1.0, 3.0], [0.0, 4.0, 3.0]])
    drawn = m.permutation_shapley(np.array([[0, 1], [1, 0]]), steps, antithetic=False)
    np.testing.assert_allclose(drawn.value, [0.0, 3.0])
    np.testing.assert_allclose(drawn.error, [1.0, 1.0])
