"""Checking a recording completely: every checksum, shape and value, and that nothing else is in the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from driftlens.errors import FormatError, NotFoundError
from driftlens.store.encoding import is_finite
from driftlens.store.guard import LazyArray
from driftlens.store.reader import Group, Recording, ReferenceGroup
from driftlens.store.schema import (
    GATE_SUM_TOLERANCE,
    PATHWAY_NAMES,
    REFERENCE_GRAMS,
    REFERENCE_STATS,
    REFERENCE_VALUES,
    SITE_COLUMNS,
    SITE_TEXT_COLUMNS,
    STATS,
    TOKEN_COLUMNS,
    VALUES,
    Problem,
    group_name,
    weights_name,
)

__all__ = ["verify_recording"]

_BLOCK_VALUES: Final = 1 << 22


def verify_recording(path: str | os.PathLike[str]) -> list[Problem]:
    """Read a whole recording and report everything that is wrong with it.

    Args:
        path: the file.

    Returns:
        The problems, each with the key concerned; empty if the recording is sound. Memory stays bounded.
    """
    try:
        recording = Recording(path)
    except (FormatError, NotFoundError) as error:
        return [Problem(str(path), str(error))]
    with recording:
        found: list[Problem] = []
        for check in _checks(recording):
            try:
                found += [Problem(str(path), what) for what in check()]
            except FormatError as error:
                found.append(Problem(str(path), str(error).removeprefix(f"{path}: ")))
    return found


def _checks(recording: Recording) -> Iterator[Callable[[], Iterator[str]]]:
    """Yield the checks one by one: damage in one dataset must not hide damage in another."""
    yield partial(_check_members, recording)
    yield partial(_check_tokens, recording)
    for group in recording.groups:
        for name in VALUES:
            if name not in PATHWAY_NAMES or group.rank:
                yield partial(_check_value, recording, group, name)
        yield partial(_check_stats, recording, group)
        yield partial(_check_reference, recording, group)
        if recording.has_grams and group.rank:
            yield partial(_check_grams, recording, group)
    if recording.has_weights:
        for site in range(len(recording.sites)):
            yield partial(_check_weights, recording, site)


def _expected_members(recording: Recording) -> Iterator[tuple[str, set[str], set[str]]]:
    """Yield every group of the file, the counting axes and the other names that may be in it."""
    groups = [group_name(group.index) for group in recording.groups]
    yield "/", {"token"}, {"probe", "samples", "sites", "tokens", "weights", "grams", *groups}
    yield "/samples", {"sample"}, {"id", "probe_index"}
    yield "/sites", {"site"}, {*SITE_TEXT_COLUMNS, *SITE_COLUMNS}
    yield "/tokens", set(), set(TOKEN_COLUMNS)
    for name in groups:
        # The sites of a group were compared with /sites when the file was opened.
        reference = {"reference"} if recording.has_reference else set()
        yield f"/{name}", {"expert", "expert_col", "rank", "rank_col"}, {"site", "stats", *VALUES, *reference}
        yield f"/{name}/stats", set(), set(STATS)
    for group in (group for group in recording.groups if group.reference is not None):
        key = f"/{group_name(group.index)}/reference"
        yield key, set(), {"stats", *REFERENCE_VALUES, *(("grams",) if group.rank else ())}
        yield f"{key}/stats", set(), set(REFERENCE_STATS)
        if group.rank:
            yield f"{key}/grams", {"pathway", "pathway_col"}, set(REFERENCE_GRAMS)
    if recording.has_weights:
        sites = [weights_name(site) for site in range(len(recording.sites))]
        yield "/weights", set(), set(sites)
        for name in sites:
            yield f"/weights/{name}", {"expert", "rank", "d_in", "d_out"}, {"A", "B", "router"}
    if recording.has_grams:
        ranked = [group_name(group.index) for group in recording.groups if group.rank]
        yield "/grams", set(), {"checkpoint", *ranked}
        for name in ranked:
            axes = {"expert", "rank", "rank_col", "pathway", "pathway_col"}
            yield f"/grams/{name}", axes, {"site", "a_gram", "b_gram"}


def _check_members(recording: Recording) -> Iterator[str]:
    for key, axes, others in _expected_members(recording):
        names, parent = set(recording.file.members(key)), key.rstrip("/")
        # A newer minor schema may hold more; the same one may not.
        if not recording.newer:
            for name in sorted(names - axes - others):
                yield f"{parent}/{name} is not part of schema {recording.schema}; another program changed the file."
        for name in sorted(names & axes):
            values = recording.file.array(f"{parent}/{name}", (None,), ("<i4",))[...]
            if not np.array_equal(values, np.arange(len(values))):
                yield f"{parent}/{name} does not count 0, 1, 2, ...; the file is damaged."


def _check_tokens(recording: Recording) -> Iterator[str]:
    for number, probe in enumerate(recording.probes):
        columns, known = recording.tokens(number), len(recording.sample_ids(number))
        sample = columns["sample"]
        if sample.size and not (sample.min() >= 0 and sample.max() < known):
            yield f"/tokens/sample of probe {probe!r} ranges to {sample.max()}; {known} samples are listed."


def _blocks(array: LazyArray) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (first index on axis 0, part) so that a part is at most some tens of megabytes and whole chunks."""
    row = int(np.prod(array.shape[1:], dtype=np.int64))
    if array.ndim < 2 or row <= _BLOCK_VALUES:
        step = max(1, _BLOCK_VALUES // max(row, 1))
        for start in range(0, len(array), step):
            yield start, array[start : start + step]
        return
    inner = max(1, row // array.shape[1])
    step = max(array.chunks[1], _BLOCK_VALUES // inner // array.chunks[1] * array.chunks[1])
    for start in range(len(array)):
        for begin in range(0, array.shape[1], step):
            yield start, array[start : start + 1, begin : begin + step]


def _check_value(recording: Recording, group: Group, name: str) -> Iterator[str]:
    array: LazyArray = getattr(group, name)
    normalised = _normalised(recording, group)
    for start, part in _blocks(array):
        bad = ~np.isfinite(part) if not is_finite(part) else np.zeros(0, dtype=np.bool_)
        if name == "gate" and not bad.any():
            total = part.sum(axis=-1, dtype=np.float64)
            bad = np.abs(total - 1) > GATE_SUM_TOLERANCE
            # A reference may lack a site: nobody acts there.
            bad &= normalised[start : start + len(part), None] & ~(isinstance(group, ReferenceGroup) & (total == 0))
        if bad.any():
            row = start + int(np.argmax(bad.reshape(len(part), -1).any(axis=1)))
            site = recording.sites[int(group.site_index[row])].name
            what = (
                "gate rows that do not sum to 1 or are not finite" if name == "gate" else "values that are not finite"
            )
            yield f"{array.key} has {what} at site {site!r}; record it again."
            return


def _check_stats(recording: Recording, group: Group) -> Iterator[str]:
    key = f"/{group_name(group.index)}/stats"
    for name, array in group.stats.items():
        if not is_finite(array) and (group.rank or name not in PATHWAY_NAMES):
            yield f"{key}/{name} has values that are not finite; record it again."
    count, total = group.stats["count"], group.stats["gate_sum"].sum(axis=-1)
    stored = np.array([recording.token_slice(n).stop - recording.token_slice(n).start for n in range(len(count))])
    if (count < stored).any():
        probe = recording.probes[int(np.argmax(count < stored))]
        yield f"{key}/count of probe {probe!r} is below its number of stored tokens; record it again."
    wrong = (np.abs(total - count) > GATE_SUM_TOLERANCE * count) & _normalised(recording, group)[:, None]
    if wrong.any():
        row = int(np.argmax(wrong.any(axis=1)))
        site = recording.sites[int(group.site_index[row])].name
        yield f"{key}/gate_sum of site {site!r} does not add up to count; record it again."


def _check_reference(recording: Recording, group: Group) -> Iterator[str]:
    inner, key = group.reference, f"/{group_name(group.index)}/reference"
    if (inner is not None) != recording.has_reference:
        yield f"{key} exists in some groups only; record it again."
    if inner is None:
        return
    if not group.index and not recording.meta.get("reference"):
        yield f"{key} exists, but the attribute 'reference' does not say whose parameters it is about; record it again."
    checks = [partial(_check_value, recording, inner, name) for name in REFERENCE_VALUES if _applies(group, name)]
    checks += [
        partial(_check_reference_sum, recording, inner, name) for name in REFERENCE_STATS if _applies(group, name)
    ]
    if group.rank:
        checks += [partial(_check_reference_gram, inner, name) for name in REFERENCE_GRAMS]
    for check in checks:
        try:
            yield from check()
        except FormatError as error:
            yield str(error).removeprefix(f"{recording.path}: ")


def _applies(group: Group, name: str) -> bool:
    return group.rank > 0 or name not in PATHWAY_NAMES


def _check_reference_sum(recording: Recording, inner: ReferenceGroup, name: str) -> Iterator[str]:
    key, array = f"/{group_name(inner.index)}/reference/stats/{name}", inner.stats[name]
    if not is_finite(array):
        yield f"{key} has values that are not finite; record it again."
    elif name == "gate_sum":
        count, total = inner.stats["count"], array.sum(axis=-1)
        wrong = (np.abs(total - count) > GATE_SUM_TOLERANCE * count) & (total != 0)
        wrong &= _normalised(recording, inner)[:, None]
        if wrong.any():
            site = recording.sites[int(inner.site_index[int(np.argmax(wrong.any(axis=1)))])].name
            yield f"{key} of site {site!r} does not add up to count; record it again."


def _check_reference_gram(inner: ReferenceGroup, name: str) -> Iterator[str]:
    array = inner.gram(name)
    if not all(is_finite(part) for _, part in _blocks(array)):
        yield f"{array.key} has values that are not finite; record it again."


def _normalised(recording: Recording, group: Group) -> NDArray[np.bool_]:
    return np.array([recording.sites[int(site)].normalised for site in group.site_index], dtype=np.bool_)


def _check_grams(recording: Recording, group: Group) -> Iterator[str]:
    for array in recording.gram_arrays(group).values():
        if not all(is_finite(part) for _, part in _blocks(array)):
            yield f"{array.key} has values that are not finite; record it again."


def _check_weights(recording: Recording, site: int) -> Iterator[str]:
    for name, array in recording.weights(site).items():
        if array is not None and not is_finite(array):
            yield f"{name} of site {recording.sites[site].name!r} has values that are not finite; record it again."
