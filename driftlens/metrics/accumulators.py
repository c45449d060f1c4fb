"""Accumulators: measures of sections 1 to 3 over batches and shards of tokens, without holding the tokens.

Each has ``update`` (one batch), ``merge`` (another shard; neither operand changes) and ``result``. They keep sums in
float64: plain sums over tokens where a definition weighs all tokens alike (`ProbeSums`), sums by sample where it
averages tokens in a sample first (`SampleSums`). A sample may be split over batches and shards in any way. Merging
shards in any order gives what the functions of this package give for all tokens at once, to rounding (about 1e-15
relative), and the sums by sample still serve the bootstrap.

What needs token rows, because it pairs different tokens or centres first, has no accumulator: `relative_js` and `cka`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, as_weights, check_same_tokens, divide, normalise, pad_experts
from driftlens.metrics.codrift import CoDriftTokens
from driftlens.metrics.reference import DriftOriginTokens
from driftlens.metrics.resample import probe_mean
from driftlens.metrics.responsibility import ResponsibilityDrift, ResponsibilityTokens, compose_responsibility
from driftlens.metrics.routing import (
    Top1Switch,
    TopKOverlap,
    js_divergence,
    mass_moved_tokens,
    top1_tokens,
    topk_mask,
    topk_overlap_tokens,
)
from driftlens.metrics.shapes import Gates, Gates0, Gates1, Importance, Paths, PerExpert, PerSite, Reasons, Sample
from driftlens.metrics.sums import ProbeSums, SampleSums
from driftlens.metrics.undefined import Reason
from driftlens.metrics.usage import dead_experts, gate_entropy_tokens, load_entropy

__all__ = [
    "ResponsibilitySums",
    "RoutingDrift",
    "RoutingSums",
    "TokenSums",
    "Usage",
    "UsageSums",
]


def _samples(sample: Sample | None, tokens: int) -> NDArray[np.integer]:
    """All tokens alike is one sample that holds them all."""
    return np.zeros(tokens, dtype=np.int64) if sample is None else np.asarray(sample)


class Usage(NamedTuple):
    """How one checkpoint uses its experts; the fields with k or pathways are None without them.

    Attributes:
        tokens: number of tokens, which `driftlens.metrics.specialisation` needs beside the loads of several probes.
        load: [..., E] mean normalised gate.
        gate_entropy: [...].
        load_entropy: [...].
        dead_experts: [...].
        coactivation: [..., E, E], with k.
        rank_importance: [..., E, r], with pathways.
        second_moment: [..., E, r, r] mean of z z^T, all tokens alike, for `active_rank` and `active_overlap`.
    """

    tokens: int
    load: PerExpert
    gate_entropy: PerSite
    load_entropy: PerSite
    dead_experts: NDArray[np.integer]
    coactivation: Float64[np.ndarray, "*site expert expert"] | None
    rank_importance: Importance | None
    second_moment: Float64[np.ndarray, "*site expert rank rank"] | None


class UsageSums:
    """Use of experts at one checkpoint on one probe (metrics.md sections 1 and 2).

    Args:
        k: size of the top-k set of `coactivation`; None leaves it out.
    """

    def __init__(self, k: int | None = None) -> None:
        self.k = k
        self._samples = SampleSums()
        self._plain = ProbeSums()

    def update(self, gate: Gates, z: Paths | None = None, sample: Sample | None = None) -> None:
        """Add one batch of tokens.

        Args:
            gate: [..., n, E] as used; rank_importance takes it as it is, all else normalises rows.
            z: [..., n, E, r] pathway activations before the scaling, in every batch or in none.
            sample: [n] sample of each token; None, in all batches, weighs all tokens alike.

        Raises:
            ProbeError: different numbers of tokens.
            ConfigError: shapes that are not those of the first batch.
        """
        weights = as_weights(gate)
        tokens = weights.shape[-2]
        ids = _samples(sample, tokens)
        values = {
            "load": np.moveaxis(normalise(weights), -2, 0),
            "entropy": np.moveaxis(gate_entropy_tokens(weights), -1, 0),
        }
        plain: dict[str, FloatArray] = {}
        if z is not None:
            path = as_float(z)
            check_same_tokens(weights, path[..., 0], what="gates and pathways")
            values["importance"] = np.moveaxis(weights[..., None] * path**2, -3, 0)
            by_expert = np.moveaxis(path, -3, -1)  # [..., E, r, n]
            plain["second_moment"] = by_expert @ np.swapaxes(by_expert, -1, -2)
        batch = SampleSums()
        batch.update(ids, values)
        if self.k is not None:
            # A sum of outer products by sample is one matrix product: [n, E, E] is never formed.
            active = topk_mask(weights, self.k).astype(np.float64)
            shape = (len(batch.sample), *weights.shape[:-2], weights.shape[-1], weights.shape[-1])
            batch.sums["together"] = np.zeros(shape)
            for row, number in zip(batch.sums["together"], batch.sample, strict=True):
                own = active[..., ids == number, :]
                row[...] = np.swapaxes(own, -1, -2) @ own
            batch.counts["together"] = batch.counts["load"][..., None]
        self._samples = self._samples.merge(batch)
        self._plain.update(tokens, plain)

    def merge(self, other: UsageSums) -> UsageSums:
        """Return the accumulator of both token sets (neither operand changes).

        Raises:
            ConfigError: another k, or other statistics or shapes.
        """
        _same_k(self.k, other.k)
        merged = UsageSums(self.k)
        merged._samples = self._samples.merge(other._samples)
        merged._plain = self._plain.merge(other._plain)
        return merged

    def result(self) -> Usage:
        """Return the measures of all tokens added so far.

        Raises:
            ProbeError: nothing was added yet.
        """
        means = {name: probe_mean(value, axis=0) for name, value in self._samples.result().items()}
        single = means["load"][..., None, :]  # a mean gate is a probe of one token
        coactivation = None
        if "together" in means:
            own = np.diagonal(means["together"], axis1=-2, axis2=-1)
            coactivation = divide(means["together"], own[..., None])
        moment = self._plain.sums.get("second_moment")
        return Usage(
            tokens=self._plain.count,
            load=means["load"],
            gate_entropy=means["entropy"],
            load_entropy=load_entropy(single),
            dead_experts=dead_experts(single),
            coactivation=coactivation,
            rank_importance=means.get("importance"),
            second_moment=None if moment is None else divide(moment, self._plain.count),
        )


class RoutingDrift(NamedTuple):
    """Drift of the gate between two checkpoints, each [...]; ``topk_overlap`` is None without k."""

    router_js: PerSite
    router_js_distance: PerSite
    marginal_js: PerSite
    sample_js: PerSite
    mass_moved: PerSite
    top1_switch: Top1Switch
    topk_overlap: TopKOverlap | None


class RoutingSums:
    """Drift of the gate on paired passes (metrics.md section 1), all but `relative_js`.

    Args:
        k: size of the top-k set of `topk_overlap`; None leaves it out.
    """

    def __init__(self, k: int | None = None) -> None:
        self.k = k
        self._samples = SampleSums()

    def update(self, gate0: Gates0, gate1: Gates1, sample: Sample | None = None) -> None:
        """Add one batch of the same tokens at both checkpoints.

        Args:
            gate0: anchor gates [..., n, E].
            gate1: current gates [..., n, E'].
            sample: [n] sample of each token; None, in all batches, makes one sample of the probe.

        Raises:
            ProbeError: different numbers of tokens.
            ConfigError: negative entries, or shapes that are not those of the first batch.
        """
        first, second = as_weights(gate0, "gate0"), as_weights(gate1, "gate1")
        check_same_tokens(first, second)
        first, second = pad_experts(first, second)
        js, top1 = js_divergence(first, second), top1_tokens(first, second)
        by_token = {
            "js": js,
            "distance": np.sqrt(js),
            "mass": mass_moved_tokens(first, second),
            "switched": top1.switched,
            "tied": top1.tied,
        }
        if self.k is not None:
            by_token["overlap"] = topk_overlap_tokens(first, second, self.k)
        by_expert = {
            "gate0": normalise(first),
            "gate1": normalise(second),
            "best0": top1.best0,
            "best1": top1.best1,
        }
        values = {name: np.moveaxis(value, -1, 0) for name, value in by_token.items()}
        values |= {name: np.moveaxis(value, -2, 0) for name, value in by_expert.items()}
        self._samples.update(_samples(sample, first.shape[-2]), values)

    def merge(self, other: RoutingSums) -> RoutingSums:
        """Return the accumulator of both token sets (neither operand changes).

        Raises:
            ConfigError: another k, or other shapes.
        """
        _same_k(self.k, other.k)
        merged = RoutingSums(self.k)
        merged._samples = self._samples.merge(other._samples)
        return merged

    def result(self) -> RoutingDrift:
        """Return the measures of all tokens added so far.

        Raises:
            ProbeError: nothing was added yet.
        """
        by_sample = self._samples.result()
        means = {name: probe_mean(value, axis=0) for name, value in by_sample.items()}
        chance = 1.0 - (means["best0"] * means["best1"]).sum(axis=-1)
        overlap = None
        if self.k is not None:
            overlap = TopKOverlap(means["overlap"], self.k / means["gate0"].shape[-1])
        return RoutingDrift(
            router_js=means["js"],
            router_js_distance=means["distance"],
            marginal_js=js_divergence(means["gate0"], means["gate1"]),
            sample_js=probe_mean(js_divergence(by_sample["gate0"], by_sample["gate1"], base=np.e), axis=0),
            mass_moved=means["mass"],
            top1_switch=Top1Switch(means["switched"], chance, means["tied"]),
            topk_overlap=overlap,
        )


def _same_k(first: int | None, second: int | None) -> None:
    if first != second:
        raise ConfigError(f"Sums with k = {first} and k = {second} cannot be added; use the same k for all shards.")


TokensT = TypeVar("TokensT", CoDriftTokens, DriftOriginTokens)


class TokenSums(Generic[TokensT]):
    """Inner products of the co-drift on paired passes (metrics.md section 3a).

    Args:
        kind: the token results that will be added: `CoDriftTokens` (router and experts) or `DriftOriginTokens`
            (inherited and local).
    """

    def __init__(self, kind: type[TokensT]) -> None:
        self._kind: type[TokensT] = kind
        self._samples = SampleSums()

    def update(self, tokens: TokensT, sample: Sample | None = None) -> None:
        """Add the results of one batch, [..., n] in every field; ``sample`` [n] as elsewhere.

        Raises:
            ConfigError: results of another kind, or shapes that are not those of the first batch.
        """
        if not isinstance(tokens, self._kind):
            raise ConfigError(f"Results of kind {type(tokens).__name__} were given; expected {self._kind.__name__}.")
        values = {part.name: np.moveaxis(getattr(tokens, part.name), -1, 0) for part in fields(tokens)}
        count = len(next(iter(values.values())))
        self._samples.update(_samples(sample, count), values)

    def merge(self, other: TokenSums[TokensT]) -> TokenSums[TokensT]:
        """Return the accumulator of both token sets (neither operand changes).

        Raises:
            ConfigError: another kind, or other shapes.
        """
        if self._kind is not other._kind:
            raise ConfigError(f"Sums of {self._kind.__name__} and {other._kind.__name__} cannot be added.")
        merged = TokenSums(self._kind)
        merged._samples = self._samples.merge(other._samples)
        return merged

    def result(self) -> TokensT:
        """Return means by sample, [..., m]: ``.reduce()`` gives the measures, ``.interval(...)`` their bootstrap.

        Raises:
            ProbeError: nothing was added yet.
        """
        means = {name: np.moveaxis(value, 0, -1) for name, value in self._samples.result().items()}
        return self._kind(**means)


_PRECEDENCE = np.array(
    [
        Reason.NO_TOKENS,
        Reason.NO_OUTPUT,
        Reason.NO_OUTPUT_CURRENT,
        Reason.NO_OUTPUT_ANCHOR,
        Reason.DEFINED,
        Reason.NOT_FINITE,
    ],
    dtype=np.uint8,
)
"""Of two shards' reasons the later one is that of both together: one defined token defines, one broken one breaks."""


class ResponsibilitySums:
    """Drift of responsibility on paired passes (metrics.md section 3b)."""

    def __init__(self) -> None:
        self._samples = SampleSums()
        self._rank: NDArray[np.intp] = np.zeros((), dtype=np.intp)

    def update(self, tokens: ResponsibilityTokens, sample: Sample | None = None) -> None:
        """Add the results of one batch of tokens, as `responsibility_tokens` gives them; ``sample`` [n].

        Raises:
            ConfigError: shapes that are not those of the first batch.
        """
        by_token = {
            "total": tokens.total,
            "router": tokens.router,
            "experts": tokens.experts,
            "retained": tokens.retained,
            "whole": np.where(np.isnan(tokens.router), np.nan, tokens.total),
        }
        values = {name: np.moveaxis(value, -1, 0) for name, value in by_token.items()}
        self._samples.update(_samples(sample, len(values["total"])), values, skip_undefined=True)
        self._rank = np.maximum(self._rank, np.argmax(tokens.reason[..., None] == _PRECEDENCE, axis=-1))

    def merge(self, other: ResponsibilitySums) -> ResponsibilitySums:
        """Return the accumulator of both token sets (neither operand changes).

        Raises:
            ConfigError: other shapes.
        """
        merged = ResponsibilitySums()
        merged._samples = self._samples.merge(other._samples)
        merged._rank = np.maximum(self._rank, other._rank)
        return merged

    def result(self) -> ResponsibilityDrift:
        """Return the measures of all tokens added so far, with their reasons.

        Raises:
            ProbeError: nothing was added yet.
        """
        by_sample = self._samples.result()
        reason: Reasons = _PRECEDENCE[self._rank]
        means = {
            name: np.where(reason == Reason.NOT_FINITE, np.nan, probe_mean(value, skip_undefined=True, axis=0))
            for name, value in by_sample.items()
        }
        return compose_responsibility(**means, reason=reason)
