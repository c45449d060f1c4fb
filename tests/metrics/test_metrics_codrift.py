"""The co-drift divergence: metrics.md section 3a, every closed form, and the Gram route against d_out-long vectors."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError

fast = settings(max_examples=30, deadline=None)


class Pair(NamedTuple):
    gate0: np.ndarray
    gate1: np.ndarray
    z0: np.ndarray
    z1: np.ndarray
    B0: np.ndarray
    B1: np.ndarray


def pair(
    seed: int = 0,
    sites: tuple[int, ...] = (2,),
    tokens: int = 7,
    experts: tuple[int, int] = (3, 3),
    ranks: tuple[int, int] = (4, 4),
) -> Pair:
    generator = np.random.default_rng(seed)
    gates = [generator.dirichlet(np.full(e, 0.5), size=(*sites, tokens)) for e in experts]
    paths = [generator.normal(size=(*sites, tokens, e, r)) for e, r in zip(experts, ranks, strict=True)]
    factors = [generator.normal(size=(*sites, e, 11, r)) for e, r in zip(experts, ranks, strict=True)]
    return Pair(*gates, *paths, *factors)


def outputs(z: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.einsum("...nek,...edk->...ned", z, B)


def loop(p: Pair, site: int, sample: np.ndarray | None = None) -> dict[str, float]:
    """Phi and its parts written from the equations, with explicit vectors of length d_out."""
    tokens = p.gate0.shape[-2]
    rows = []
    for i in range(tokens):
        o0, o1 = outputs(p.z0[site, i][None], p.B0[site])[0], outputs(p.z1[site, i][None], p.B1[site])[0]
        router, experts = np.zeros(11), np.zeros(11)
        u00, u11 = np.zeros(11), np.zeros(11)
        for e in range(o0.shape[0]):
            router += (p.gate1[site, i, e] - p.gate0[site, i, e]) * (o0[e] + o1[e]) / 2
            experts += (p.gate0[site, i, e] + p.gate1[site, i, e]) / 2 * (o1[e] - o0[e])
            u00 += p.gate0[site, i, e] * o0[e]
            u11 += p.gate1[site, i, e] * o1[e]
        np.testing.assert_allclose(router + experts, u11 - u00, atol=1e-12)
        change = u11 - u00
        rows.append([change @ change, router @ router, experts @ experts, router @ experts, u00 @ u00 + u11 @ u11])
    if sample is None:
        means = np.mean(rows, axis=0)
    else:
        means = np.mean(
            [np.mean([r for r, s in zip(rows, sample, strict=True) if s == n], axis=0) for n in set(sample)], axis=0
        )
    total, rr, ee, re = means[:4] / (2 * means[4])
    return {
        "total": total,
        "router": rr,
        "experts": ee,
        "cross": re,
        "coupling": re / np.sqrt(rr * ee),
        "share": 2 * re / total,
    }


@pytest.mark.parametrize("sample", [None, np.array([4, 4, 1, 1, 1, 1, 0])])
def test_brute_force(sample: np.ndarray | None) -> None:
    p = pair()
    result = m.codrift(*p, sample)
    for site in range(2):
        for name, value in loop(p, site, sample).items():
            assert getattr(result, name)[site] == pytest.approx(value, rel=1e-11), name
    assert (result.reason == m.Reason.DEFINED).all()
    assert (result.coupling_reason == m.Reason.DEFINED).all()


def test_identity_gives_zero() -> None:
    p = pair()
    result = m.codrift(p.gate0, p.gate0, p.z0, p.z0, p.B0, p.B0)
    for part in (result.total, result.router, result.experts, result.cross):
        np.testing.assert_allclose(part, 0.0, atol=1e-14)
    assert np.isnan(result.coupling).all()
    assert (result.coupling_reason == m.Reason.NOTHING_MOVED).all()
    assert np.isnan(result.share).all()


def test_equal_gates_leave_no_router_part() -> None:
    p = pair()
    result = m.codrift(p.gate0, p.gate0, p.z0, p.z1, p.B0, p.B1)
    assert (result.router == 0).all()
    assert (result.cross == 0).all()
    assert (result.coupling_reason == m.Reason.ROUTER_DID_NOT_MOVE).all()
    assert np.isnan(result.coupling).all()
    np.testing.assert_allclose(result.total, result.experts, rtol=1e-12)
    np.testing.assert_allclose(result.share, 0.0, atol=1e-12)


def test_equal_experts_leave_no_expert_part() -> None:
    p = pair()
    result = m.codrift(p.gate0, p.gate1, p.z0, p.z0, p.B0, p.B0)
    np.testing.assert_allclose(result.experts, 0.0, atol=1e-14)
    assert (result.coupling_reason == m.Reason.EXPERTS_DID_NOT_MOVE).all()
    assert np.isnan(result.coupling).all()
    np.testing.assert_allclose(result.total, result.router, rtol=1e-12)


def test_reversal_gives_one_and_unrelated_gives_a_half() -> None:
    p = pair()
    reversed_ = m.codrift(p.gate0, p.gate0, p.z0, p.z0, p.B0, -p.B0)
    np.testing.assert_allclose(reversed_.total, 1.0, rtol=1e-13)
    orthogonal = np.concatenate([p.B0, np.zeros_like(p.B0)], axis=-2)
    other = np.concatenate([np.zeros_like(p.B0), p.B0], axis=-2)
    np.testing.assert_allclose(m.codrift(p.gate0, p.gate0, p.z0, p.z0, orthogonal, other).total, 0.5, rtol=1e-13)
    np.testing.assert_allclose(m.codrift(*p._replace(B1=0 * p.B1)).total, 0.5, rtol=1e-13)


def test_a_scaled_update_has_a_closed_form() -> None:
    p = pair()
    for c in (0.5, 3.0):
        result = m.codrift(p.gate0, p.gate0, p.z0, p.z0, p.B0, c * p.B0)
        np.testing.assert_allclose(result.total, (c - 1) ** 2 / (2 * (1 + c * c)), rtol=1e-12)


def test_coupling_is_plus_one_when_both_push_alike_and_minus_one_when_one_repairs() -> None:
    # One output direction; expert 0 gives 1, expert 1 gives 0. The gate moves to expert 0 while it grows or shrinks.
    z = np.ones((1, 2, 1))
    B0 = np.array([[[1.0]], [[0.0]]])
    gate0, gate1 = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
    together = m.codrift(gate0, gate1, z, z, B0, 2 * B0)
    assert together.coupling == pytest.approx(1.0)
    assert together.share > 0
    # R = .25 * 1.5 = .375, E = .625 * 1 = .625, u: .5 -> 1.5
    assert together.router == pytest.approx(0.375**2 / (2 * (0.25 + 2.25)))
    repaired = m.codrift(gate0, gate1, z, z, B0, B0 * 2 / 3)
    assert repaired.total == pytest.approx(0.0, abs=1e-15)  # .5 * 1 = .75 * 2/3: the router repairs it exactly
    assert repaired.coupling == pytest.approx(-1.0)
    assert np.isnan(repaired.share)


@fast
@given(
    st.integers(0, 2**20),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_parts_sum_to_the_whole_and_stay_in_range(seed: int, experts: tuple[int, int], ranks: tuple[int, int]) -> None:
    p = pair(seed, experts=experts, ranks=ranks)
    result = m.codrift(*p)
    np.testing.assert_allclose(result.router + result.experts + 2 * result.cross, result.total, atol=1e-12)
    u00 = np.einsum("...ne,...ned->...nd", p.gate0, outputs(p.z0, p.B0))
    u11 = np.einsum("...ne,...ned->...nd", p.gate1, outputs(p.z1, p.B1))
    change = ((u11 - u00) ** 2).sum(-1).mean(-1)
    scale = 2 * ((u00**2).sum(-1) + (u11**2).sum(-1)).mean(-1)
    np.testing.assert_allclose(result.total, change / scale, atol=1e-12)
    assert np.all((result.total >= 0) & (result.total <= 1 + 1e-12))
    coupling = result.coupling[~np.isnan(result.coupling)]
    assert np.all(np.abs(coupling) <= 1)


@fast
@given(st.integers(0, 2**20), st.booleans(), st.booleans())
def test_any_gauge_on_either_checkpoint(seed: int, first: bool, second: bool) -> None:
    p = pair(seed)
    generator = np.random.default_rng(seed)
    changed = p
    for apply, z, B in ((first, "z0", "B0"), (second, "z1", "B1")):
        gauge = 2 * np.eye(4) + 0.3 * generator.normal(size=(2, 3, 4, 4))
        if np.linalg.cond(gauge).max() > 100:
            return
        if apply:
            changed = changed._replace(
                **{
                    z: np.einsum("sekl,snel->snek", gauge, getattr(p, z)),
                    B: getattr(p, B) @ np.linalg.inv(gauge),
                }
            )
    plain, gauged = m.codrift(*p), m.codrift(*changed)
    for name in ("total", "router", "experts", "cross", "coupling", "share"):
        np.testing.assert_allclose(getattr(gauged, name), getattr(plain, name), rtol=1e-8, atol=1e-10, err_msg=name)


@fast
@given(st.integers(0, 2**20))
def test_relabelling_the_experts_of_one_checkpoint_is_no_drift(seed: int) -> None:
    p = pair(seed)
    order = np.random.default_rng(seed).permutation(3)
    result = m.codrift(p.gate0, p.gate0[..., order], p.z0, p.z0[..., order, :], p.B0, p.B0[:, order])
    np.testing.assert_allclose(result.total, 0.0, atol=1e-13)


@fast
@given(st.integers(0, 2**20))
def test_common_relabelling_token_order_and_common_rotation_change_nothing(seed: int) -> None:
    p = pair(seed)
    generator = np.random.default_rng(seed)
    order, tokens = generator.permutation(3), generator.permutation(7)
    turn = np.linalg.qr(generator.normal(size=(11, 11)))[0]
    moved = Pair(
        *(gate[..., tokens, :][..., order] for gate in p[:2]),
        *(z[..., tokens, :, :][..., order, :] for z in p[2:4]),
        *(turn @ B[:, order] for B in p[4:]),
    )
    plain, changed = m.codrift(*p), m.codrift(*moved)
    for name in ("total", "router", "experts", "cross", "coupling"):
        np.testing.assert_allclose(getattr(changed, name), getattr(plain, name), rtol=1e-9, atol=1e-12)


def test_symmetric_in_time_except_for_nothing() -> None:
    p = pair()
    back = m.codrift(p.gate1, p.gate0, p.z1, p.z0, p.B1, p.B0)
    forth = m.codrift(*p)
    for name in ("total", "router", "experts", "cross"):
        np.testing.assert_allclose(getattr(back, name), getattr(forth, name), rtol=1e-12)


def test_a_grown_expert_equals_one_with_gate_and_output_zero() -> None:
    p = pair(experts=(2, 4), ranks=(3, 4))
    padded = p._replace(
        gate0=np.concatenate([p.gate0, np.zeros((2, 7, 2))], axis=-1),
        z0=np.pad(p.z0, [(0, 0), (0, 0), (0, 2), (0, 1)]),
        B0=np.pad(p.B0, [(0, 0), (0, 2), (0, 0), (0, 1)]),
    )
    grown, explicit = m.codrift(*p), m.codrift(*padded)
    for name in ("total", "router", "experts", "cross", "coupling"):
        np.testing.assert_allclose(getattr(grown, name), getattr(explicit, name), rtol=1e-12)
    back = m.codrift(p.gate1, p.gate0, p.z1, p.z0, p.B1, p.B0)
    np.testing.assert_allclose(back.total, grown.total, rtol=1e-12)


def test_unnormalised_gates_are_taken_as_used() -> None:
    p = pair()
    doubled = m.codrift(2 * p.gate0, 2 * p.gate1, *p[2:])
    np.testing.assert_allclose(doubled.total, m.codrift(*p).total, rtol=1e-12)
    one_side = m.codrift(p.gate0, 3 * p.gate0, p.z0, p.z0, p.B0, p.B0)
    np.testing.assert_allclose(one_side.total, 4 / 20, rtol=1e-12)


def test_grams_with_scaling_equal_factors_with_scaling() -> None:
    p = pair()
    s0, s1 = 2.0, 0.5
    G00, G01, G11 = m.expert_grams(p.B0, p.B1)
    by_gram = m.codrift_from_grams(*p[:4], s0 * s0 * G00, s0 * s1 * G01, s1 * s1 * G11).reduce()
    np.testing.assert_allclose(by_gram.total, m.codrift(*p[:4], s0 * p.B0, s1 * p.B1).total, rtol=1e-12)
    flat = np.moveaxis(p.B0, -3, -2).reshape(2, 11, 12)
    np.testing.assert_allclose(G00, flat.swapaxes(-1, -2) @ flat, rtol=1e-12)


def test_no_output_at_either_checkpoint_is_undefined_with_the_reason() -> None:
    p = pair()
    result = m.codrift(*p[:4], 0 * p.B0, 0 * p.B1)
    for part in (result.total, result.router, result.experts, result.cross, result.coupling, result.share):
        assert np.isnan(part).all()
    assert (result.reason == m.Reason.NO_OUTPUT).all()
    assert (result.coupling_reason == m.Reason.NO_OUTPUT).all()
    assert m.Reason.NO_OUTPUT.text == "the experts give no output at either checkpoint (B = 0)"


def test_zero_tokens_are_undefined() -> None:
    result = m.codrift(*pair(tokens=0))
    assert np.isnan(result.total).all()
    assert (result.reason == m.Reason.NO_TOKENS).all()
    assert (result.coupling_reason == m.Reason.NO_TOKENS).all()


def test_nan_stays_with_its_site() -> None:
    p = pair()
    for broken in (np.nan, np.inf):
        p.z1[1, 2, 0, 0] = broken
        result = m.codrift(*p)
        assert np.isnan(result.total).tolist() == [False, True]
        assert result.reason.tolist() == [m.Reason.DEFINED, m.Reason.NOT_FINITE]
        assert result.coupling_reason.tolist() == [m.Reason.DEFINED, m.Reason.NOT_FINITE]


def test_float16_pathways_do_not_overflow() -> None:
    p = pair()
    big = np.clip(p.z0 * 20_000, -60_000, 60_000).astype(np.float16)
    result = m.codrift(p.gate0.astype(np.float16), p.gate1.astype(np.float16), big, big, p.B0, p.B1)
    assert result.total.dtype == np.float64
    assert np.isfinite(result.total).all()


def test_one_expert_of_rank_one_is_the_plain_relative_change() -> None:
    z0, z1 = np.array([[[1.0]], [[2.0]]]), np.array([[[3.0]], [[-1.0]]])
    B = np.array([[[3.0], [4.0]]])
    gate = np.ones((2, 1))
    result = m.codrift(gate, gate, z0, z1, B, B)
    # u: 5 -> 15 and 10 -> -5 along one direction; (100 + 225) / (2 (25 + 100 + 225 + 25))
    assert result.total == pytest.approx(325 / 750)
    assert result.coupling_reason == m.Reason.ROUTER_DID_NOT_MOVE


def test_leading_axes_are_free() -> None:
    p = pair(sites=(2, 3))
    whole = m.codrift(*p)
    assert whole.total.shape == (2, 3)
    for index in np.ndindex(2, 3):
        assert m.codrift(*(part[index] for part in p)).total == pytest.approx(whole.total[index], rel=1e-12)


def test_impact_relates_the_drift_to_the_base_output() -> None:
    p = pair()
    sample = np.array([0, 0, 0, 1, 1, 2, 2])
    tokens = m.codrift_from_grams(*p[:4], *m.expert_grams(p.B0, p.B1))
    base = np.random.default_rng(3).random((2, 7)) + 1
    result = tokens.impact(base, sample)
    u00 = np.einsum("...ne,...ned->...nd", p.gate0, outputs(p.z0, p.B0))
    u11 = np.einsum("...ne,...ned->...nd", p.gate1, outputs(p.z1, p.B1))
    change = ((u11 - u00) ** 2).sum(-1)
    weight = np.array([1 / 9] * 3 + [1 / 6] * 4)
    np.testing.assert_allclose(result.total, (change * weight).sum(-1) / (base * weight).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(result.router + result.experts + 2 * result.cross, result.total, rtol=1e-12)
    np.testing.assert_allclose(tokens.change_sq, change, rtol=1e-10)
    assert np.isnan(tokens.impact(0 * base).total).all()
    with pytest.raises(ProbeError, match="drift and base outputs of the two checkpoints hold 7 and 6 tokens"):
        tokens.impact(base[:, :6])


def test_interval_covers_the_value_and_averages_sites_together() -> None:
    p = pair(tokens=60)
    sample = np.repeat(np.arange(12), 5)
    tokens = m.codrift_from_grams(*p[:4], *m.expert_grams(p.B0, p.B1))
    result = tokens.interval("total", sample, draws=400)
    np.testing.assert_allclose(result.value, m.codrift(*p, sample).total, rtol=1e-12)
    assert np.all((result.low < result.value) & (result.value < result.high))
    mean = tokens.interval("total", sample, draws=400, average_over=-1)
    assert mean.value == pytest.approx(result.value.mean())
    per_sample = tokens.per_sample(sample)
    assert per_sample.rr.shape == (2, 12)
    np.testing.assert_allclose(per_sample.interval("total", draws=400).low, result.low)
    with pytest.raises(ConfigError, match="No interval for 'phi'; the fields are total, router, experts, cross"):
        tokens.interval("phi", sample)


def test_a_stricter_threshold_for_standing_still() -> None:
    p = pair()
    barely = p.gate0 + 1e-4 * (p.gate1 - p.gate0)
    tokens = m.codrift_from_grams(p.gate0, barely, p.z0, p.z1, *m.expert_grams(p.B0, p.B1))
    assert (tokens.reduce().coupling_reason == m.Reason.DEFINED).all()
    assert (tokens.reduce(still=1e-6).coupling_reason == m.Reason.ROUTER_DID_NOT_MOVE).all()


def test_shapes_that_do_not_fit_are_named() -> None:
    p = pair()
    with pytest.raises(ProbeError, match="hold 7 and 6 tokens"):
        m.codrift(p.gate0, p.gate1[:, :6], p.z0, p.z1[:, :6], p.B0, p.B1)
    with pytest.raises(
        ConfigError, match=r"The current's gates have shape \(2, 7, 3\) and its pathways \(2, 7, 2, 4\)"
    ):
        m.codrift(p.gate0, p.gate1, p.z0, p.z1[:, :, :2], p.B0, p.B1)
    with pytest.raises(ConfigError, match=r"expected \[..., E, d_out, r\] with one d_out"):
        m.codrift(*p[:5], p.B1[:, :, :10])
    G00, G01, G11 = m.expert_grams(p.B0, p.B1)
    with pytest.raises(ConfigError, match=r"G01 has shape \(2, 12, 11\); expected \[..., 12, 12\]"):
        m.codrift_from_grams(*p[:4], G00, G01[..., :11], G11)


def tokens_of(rr: float, ee: float, re: float, u00_sq: float = 1.0, u11_sq: float = 1.0) -> m.CoDriftTokens:
    return m.CoDriftTokens(*(np.array([value]) for value in (rr, ee, re, u00_sq, u11_sq)))


def test_rounding_never_leaves_the_documented_ranges() -> None:
    more = 1 + 1e-13
    cancelled = tokens_of(1.0, 1.0, -more).reduce()
    assert (cancelled.total, cancelled.coupling) == (0.0, -1.0)
    assert tokens_of(1.0, 1.0, more).reduce().coupling == 1.0
    assert tokens_of(0.0, 4 * more, 0.0).reduce().total == 1.0
    assert tokens_of(1.0, 1.0, -more).change_sq == 0.0


def test_parts_at_the_threshold_did_not_move() -> None:
    tokens = tokens_of(1.0, 1.0, 0.5)  # router = experts = 1/4, total = 3/4
    still = tokens.reduce(still=0.25)
    assert still.coupling_reason == m.Reason.NOTHING_MOVED
    assert np.isnan(still.coupling)
    assert still.share == pytest.approx(1 / 3)
    assert np.isnan(tokens.reduce(still=0.75).share)
    for router, experts, reason in (
        (1.0, 2.0, m.Reason.ROUTER_DID_NOT_MOVE),
        (2.0, 1.0, m.Reason.EXPERTS_DID_NOT_MOVE),
    ):
        one = tokens_of(router, experts, 0.5).reduce(still=0.25)
        assert one.coupling_reason == reason
        assert np.isnan(one.coupling)
        assert one.reason == m.Reason.DEFINED


def test_a_single_site_needs_no_site_axis() -> None:
    p = pair()
    alone = m.codrift_from_grams(*(part[0] for part in p[:4]), *(gram[0] for gram in m.expert_grams(p.B0, p.B1)))
    both = m.codrift_from_grams(*p[:4], *m.expert_grams(p.B0, p.B1))
    base = np.random.default_rng(3).random((2, 7)) + 1
    sample = np.array([0, 0, 0, 1, 1, 2, 2])
    np.testing.assert_allclose(alone.impact(base[0], sample), np.array(both.impact(base, sample))[:, 0], rtol=1e-12)
    np.testing.assert_allclose(alone.per_sample(sample).re, both.per_sample(sample).re[0], rtol=1e-12)


def test_reasons_have_no_interval() -> None:
    p = pair()
    tokens = m.codrift_from_grams(*p[:4], *m.expert_grams(p.B0, p.B1))
    for field in ("reason", "coupling_reason", "change_sq"):
        with pytest.raises(ConfigError) as caught:
            tokens.interval(field)
        assert str(caught.value) == (
            f"No interval for {field!r}; the fields are total, router, experts, cross, coupling, share."
        )


def test_every_shape_that_does_not_fit_is_named_with_what_is_expected() -> None:
    p = pair(experts=(2, 3), ranks=(2, 4))
    grams = dict(zip(("G00", "G01", "G11"), m.expert_grams(p.B0, p.B1), strict=True))
    sizes = {"G00": (4, 4), "G01": (4, 12), "G11": (12, 12)}
    for name, gram in grams.items():
        changed = {**grams, name: gram[..., :-1]}
        with pytest.raises(ConfigError) as caught:
            m.codrift_from_grams(*p[:4], *changed.values())
        rows, columns = sizes[name]
        assert str(caught.value) == (
            f"{name} has shape {changed[name].shape}; expected [..., {rows}, {columns}] for E r columns."
        )
    for name, z0, z1 in (("anchor", p.z0[:, :, :1], p.z1), ("current", p.z0, p.z1[:, :, :1])):
        with pytest.raises(ConfigError) as caught:
            m.codrift_from_grams(p.gate0, p.gate1, z0, z1, *grams.values())
        gate, path = (p.gate0, z0) if name == "anchor" else (p.gate1, z1)
        assert str(caught.value) == (
            f"The {name}'s gates have shape {gate.shape} and its pathways {path.shape}; expected [..., n, E] and "
            "[..., n, E, r]."
        )
