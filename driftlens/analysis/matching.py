"""Experts of independent runs side by side: who is whose counterpart, how sure that is, and measures in that order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.datasets import attributes
from driftlens.analysis.inputs import check_aligned
from driftlens.analysis.run import Run, open_run
from driftlens.errors import ConfigError, NotFoundError, SiteError, UnknownNameError
from driftlens.metrics import (
    NEAR_UNIFORM_ENTROPY,
    Reason,
    gate_entropy,
    match_profiles,
    null_pairings,
    other_site_scores,
    responsibility,
    sample_means,
)
from driftlens.metrics.arrays import FloatArray, as_float, mean_defined, normalise
from driftlens.metrics.matching import Exchange, ProfileMatching
from driftlens.store import Recording

__all__ = ["align_experts", "match_experts"]

Profile = Literal["responsibility", "gate"]
Unit = Literal["token", "sample"]
_SITE: Final = ("site",)
_EXPERT: Final = ("site", "expert")


def match_experts(
    run_a: Run | str | os.PathLike[str],
    run_b: Run | str | os.PathLike[str],
    checkpoint: int | str | None = None,
    *,
    checkpoint_b: int | str | None = None,
    profile: Profile = "responsibility",
    unit: Unit = "token",
    exchange: Exchange = "probes",
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> xr.Dataset:
    """Match the experts of every site that two runs share, by what they are responsible for.

    Args:
        run_a: a run or its folder; its experts label the result.
        run_b: another, recorded on the same probes.
        checkpoint: index or name; None for the last one that both recorded.
        checkpoint_b: that of ``run_b``, where it is another one.
        profile: ``"responsibility"``: an expert's share of the update (metrics.md section 3b); ``"gate"``: its share of
            the gate, for native experts, whose single outputs were not recorded.
        unit: entries of a profile. Means over samples lose what experts do within one; they are for large recordings.
        exchange: what changes places under the null; see `driftlens.metrics.null_pairings`.
        draws: draws of the null.
        seed: their seed.
        level: coverage of the null's central interval, whose upper end is ``null_high``.

    Returns:
        By site and expert of ``run_a``: ``partner`` (expert of ``run_b``, -1 for none), ``score`` (correlation of the
        two profiles), ``score_null_mean``, ``score_null_high`` and ``score_p``. By site: ``site_score`` (mean over the
        pairs), ``site_null_mean``, ``site_null_high``, ``z``, ``p``; ``other_mean`` and ``other_p``, the same site
        against other sites of ``run_b``, which hold no counterpart but see the same words; ``reason`` of a site without
        a pair; ``near_uniform_a`` and ``near_uniform_b``. Of all sites together: ``overall_score``,
        ``overall_null_mean``, ``overall_p``. p-values of single sites are not corrected for their number.

        A match needs both: ``p`` alone is small for any two routers that treat one word alike wherever it stands, or
        whose inputs have few dimensions.

    Raises:
        ProbeError: the runs were recorded on other probes or tokens.
        SiteError: they share no site.
        NotFoundError: no checkpoint was recorded in both.
        UnknownNameError: no such checkpoint.
        ConfigError: an unknown profile, unit or exchange, or no draw.
    """
    _choose("profile", profile, get_args(Profile))
    _choose("unit", unit, get_args(Unit))
    run_a, run_b = (open_run(run) if isinstance(run, str | os.PathLike) else run for run in (run_a, run_b))
    point = _common_checkpoint(run_a, run_b) if checkpoint is None else checkpoint
    point_b = point if checkpoint_b is None else checkpoint_b
    with run_a.recording(point) as first, run_b.recording(point_b) as second:
        check_aligned({str(first.path): first, str(second.path): second})
        shared = _shared_sites(first, second)
        probe, sample = _units(first)
        profiles = [_profiles(recording, shared, profile) for recording in (first, second)]
    ours, theirs = (part.profile for part in profiles)
    if unit == "sample":
        ours, theirs = (sample_means(part, sample, skip_undefined=True, axis=-2) for part in (ours, theirs))
        starts = np.flatnonzero(np.r_[True, sample[1:] != sample[:-1]])
        probe, sample = probe[starts], sample[starts]
    pairings = null_pairings(probe, sample, draws=draws, seed=seed, exchange=exchange)
    found, others = match_profiles(ours, theirs, pairings, level=level), other_site_scores(ours, theirs)
    about: dict[str, Any] = {"run_a": str(run_a.path), "run_b": str(run_b.path)}
    about |= {"checkpoint_a": _checkpoint_name(run_a, point), "checkpoint_b": _checkpoint_name(run_b, point_b)}
    about |= {"profile": profile, "unit": unit, "exchange": exchange, "draws": draws, "seed": seed, "level": level}
    about |= {"units": len(probe), "other_sites": len(others)}
    return _dataset(found, others, profiles, shared, first, second, about)


def align_experts(
    run_a: Run, run_b: Run, measure: str, *, matching: xr.Dataset | None = None, alpha: float = 0.05
) -> xr.Dataset:
    """Put a measure of single experts of two runs side by side, each expert beside its counterpart.

    Only counterparts that the matching vouches for are compared: the expert's and the site's ``p`` at most ``alpha``,
    and a site score that at most a share ``alpha`` of other sites reach (none, where there are fewer than 1/alpha).
    Aligning settles which expert is which. It does not settle the gauge: a measure marked ``within_run`` still depends
    on how each run shares a factor between A and B.

    Args:
        run_a: the run whose labels are kept.
        run_b: the other run.
        measure: a variable with an expert axis of ``Run.drift`` (``load``), ``Run.subspaces`` or ``Run.importance``;
            averaged over pathways where it has them.
        matching: as `match_experts` returns it for these two runs; None makes one at the last common checkpoint.
        alpha: largest p-value.

    Returns:
        ``MEASURE_a`` and ``MEASURE_b`` by probe, site and expert of ``run_a`` at the matching's checkpoint, NaN where
        experts are not aligned; ``aligned`` by site and expert.

    Raises:
        UnknownNameError: no such measure.
        ConfigError: no expert is aligned, so nothing can be compared; or a matching of other runs.
        ProbeError, SiteError, NotFoundError: as `match_experts`.
    """
    found = match_experts(run_a, run_b) if matching is None else matching
    if (found.attrs["run_a"], found.attrs["run_b"]) != (str(run_a.path), str(run_b.path)):
        raise ConfigError(
            f"The matching is of {found.attrs['run_a']} and {found.attrs['run_b']}, not of {run_a.path} and "
            f"{run_b.path}. Make it with match_experts(run_a, run_b)."
        )
    stricter = np.maximum(alpha, 1 / (1 + found.attrs["other_sites"])) if found.attrs["other_sites"] else 1.0
    vouched = (found["p"] <= alpha) & ~(found["other_p"] > stricter + 1e-12)
    aligned = vouched & (found["score_p"] <= alpha) & (found["partner"] >= 0)
    if not bool(aligned.any()):
        raise ConfigError(
            f"No expert of {run_a.name} has a counterpart in {run_b.name} at alpha = {alpha:g} (score "
            f"{float(found['overall_score']):.2f}, null {float(found['overall_null_mean']):.2f}): experts of these "
            "runs cannot be compared one by one. Compare measures of whole sites: `driftlens compare RUN RUN`."
        )
    first, second = (_by_expert(run, measure, found, end) for end, run in (("a", run_a), ("b", run_b)))
    chosen = found["partner"].clip(min=0).drop_vars("expert")
    second = second.drop_vars("expert").isel(expert=chosen).assign_coords(expert=found["expert"])
    about = attributes(measure)
    data = {f"{measure}_a": first.where(aligned), f"{measure}_b": second.where(aligned)}
    for end, array in zip("ab", data.values(), strict=True):
        array.attrs = about | {"long_name": f"{about['long_name']}, run_{end}"}
    return xr.Dataset({**data, "aligned": aligned}, attrs=dict(found.attrs) | {"alpha": alpha})


def _by_expert(run: Run, measure: str, found: xr.Dataset, end: str) -> xr.DataArray:
    tables = [run.drift, run.subspaces, run.importance]
    known = {name: table[name] for table in tables for name in table.data_vars if "expert" in table[name].dims}
    if measure not in known:
        raise UnknownNameError("measure of single experts", measure, map(str, known))
    array = known[measure]
    array = array.isel(checkpoint=array["checkpoint_name"].to_numpy().tolist().index(found.attrs[f"checkpoint_{end}"]))
    array = array.mean("rank_index") if "rank_index" in array.dims else array
    wide = max(array.sizes["expert"], int(found["partner"].max()) + 1, found.sizes["expert"])
    return array.reindex(site=found["site"], expert=np.arange(wide)).drop_vars(
        [name for name in array.coords if name not in ("probe", "site", "expert")]
    )


def _choose(kind: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnknownNameError(kind, str(value), allowed)


def _common_checkpoint(run_a: Run, run_b: Run) -> int:
    both = set(run_a.recorded) & set(run_b.recorded)
    if not both:
        raise NotFoundError(
            f"{run_a.path} has recordings of the checkpoints {list(run_a.recorded)}, {run_b.path} of "
            f"{list(run_b.recorded)}: none in common. Record both: `driftlens record --run RUN`."
        )
    return max(both)


def _checkpoint_name(run: Run, point: int | str) -> str:
    return next(entry.name for entry in run.checkpoints if point in (entry.index, entry.name))


def _shared_sites(first: Recording, second: Recording) -> list[str]:
    theirs = {site.name for site in second.sites}
    shared = [site.name for site in first.sites if site.name in theirs]
    if not shared:
        raise SiteError(
            f"{first.path} and {second.path} have no site in common ({first.sites[0].name!r} and "
            f"{second.sites[0].name!r}, for example). Match runs that adapt the same modules of one base model."
        )
    return shared


def _units(recording: Recording) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the probe and the sample of every stored token; samples are numbered through all probes."""
    probes, samples, offset = [], [], 0
    for number, probe in enumerate(recording.probes):
        own = np.asarray(recording.tokens(probe)["sample"], dtype=np.intp)
        probes.append(np.full(own.size, number, dtype=np.intp))
        samples.append(own + offset)
        offset += len(recording.sample_ids(probe))
    return np.concatenate(probes), np.concatenate(samples)


@dataclass(frozen=True)
class _Profiles:
    """Profiles [S, n, E] of the shared sites of one run, and what their NaN and their worth depend on, each [S]."""

    profile: FloatArray
    experts: NDArray[np.int64]
    entropy: FloatArray
    measured: NDArray[np.bool_]


def _profiles(recording: Recording, sites: list[str], profile: Profile) -> _Profiles:
    counts = [recording.sites[recording.site_number(name)].num_experts for name in sites]
    shape = (len(sites), recording.n_tokens, max(counts))
    result, entropy = np.zeros(shape), np.full(len(sites), np.nan)
    measured = np.ones(len(sites), dtype=bool)
    for number, (name, experts) in enumerate(zip(sites, counts, strict=True)):
        group, row = recording.locate(name)
        gate = as_float(group.gate[row])
        entropy[number] = gate_entropy(gate)
        if profile == "gate":
            result[number, :, :experts] = normalise(gate)
        else:
            norm = as_float(group.expert_norm[row])
            measured[number] = not np.isnan(norm).all()
            result[number, :, :experts] = responsibility(gate, norm)
    return _Profiles(result, np.array(counts, dtype=np.int64), entropy, measured)


def _dataset(
    found: ProfileMatching,
    others: FloatArray,
    profiles: list[_Profiles],
    shared: list[str],
    first: Recording,
    second: Recording,
    about: dict[str, Any],
) -> xr.Dataset:
    infos = [first.sites[first.site_number(name)] for name in shared]
    total, left_out = (
        found.matching.total,
        [sorted({site.name for site in recording.sites} - set(shared)) for recording in (first, second)],
    )
    reached = (others >= total - 1e-12).sum(axis=0)
    other_p = np.where(np.isnan(total) | (len(others) == 0), np.nan, (1 + reached) / (1 + len(others)))
    codes = {"flag_values": [int(reason) for reason in Reason], "flag_meanings": "; ".join(r.text for r in Reason)}
    data: dict[str, Any] = {
        "partner": (_EXPERT, found.matching.partner.astype(np.int64), _title("expert of run_b, -1 for none")),
        "score": (_EXPERT, found.matching.score, _title("correlation of the two profiles")),
        "score_null_mean": (_EXPERT, found.expert_null_mean, _title("correlation with the best partner, null mean")),
        "score_null_high": (_EXPERT, found.expert_null_high, _title("upper end of the null's interval")),
        "score_p": (_EXPERT, found.expert_p, _title("permutation p-value of the expert's score")),
        "site_score": (_SITE, total, _title("mean correlation of the pairs")),
        "site_null_mean": (_SITE, found.null_mean, _title("mean correlation of the best pairs, null mean")),
        "site_null_high": (_SITE, found.null_high, _title("upper end of the null's interval")),
        "z": (_SITE, found.z, _title("distance from the null's mean in its standard deviations")),
        "p": (_SITE, found.p, _title("permutation p-value of the site's score")),
        "other_mean": (_SITE, mean_defined(others, axis=0), _title("mean score against other sites")),
        "other_p": (_SITE, other_p, _title("share of other sites that match as well")),
        "reason": (_SITE, _reasons(total, profiles), {"long_name": "why no expert has a partner", **codes}),
        "overall_score": ((), found.overall, _title("mean site score")),
        "overall_null_mean": ((), found.overall_null_mean, _title("mean site score, null mean")),
        "overall_p": ((), found.overall_p, _title("permutation p-value of the mean site score")),
    }
    for end, part in zip("ab", profiles, strict=True):
        flag = part.entropy > NEAR_UNIFORM_ENTROPY
        data[f"near_uniform_{end}"] = (_SITE, flag, _title(f"gate of run_{end} that hardly routes"))
    coords = {
        "site": np.array(shared, dtype=np.str_),
        "expert": np.arange(found.matching.partner.shape[-1]),
        "layer": ("site", np.array([site.layer for site in infos], dtype=np.int64)),
        "kind": ("site", np.array([site.kind for site in infos], dtype=np.str_)),
        "experts_a": ("site", profiles[0].experts),
        "experts_b": ("site", profiles[1].experts),
    }
    return xr.Dataset(data, coords, about | {"sites_only_in_a": left_out[0], "sites_only_in_b": left_out[1]})


def _title(text: str) -> dict[str, str]:
    return {"long_name": text, "units": "1"}


def _reasons(total: FloatArray, profiles: list[_Profiles]) -> NDArray[np.uint8]:
    """Say why a site has no pair; a profile that never varies is that of a gate that sends all tokens one way."""
    reason = np.full(total.shape, Reason.BELOW_NOISE_FLOOR, dtype=np.uint8)
    for part in profiles:
        reason[part.experts == 1] = Reason.ONE_EXPERT
        reason[np.isnan(part.profile).all(axis=(1, 2))] = Reason.NO_OUTPUT
        reason[~part.measured] = Reason.NOT_MEASURED
    return np.where(np.isnan(total), reason, np.uint8(Reason.DEFINED)).astype(np.uint8)
