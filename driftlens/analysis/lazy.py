"""Token values of a run as lazily read arrays: for what does not fit in memory.

`Run`'s own tables never hold more than a block of sites. Whoever computes something else on gates and pathways gets
them here as xarray objects over dask arrays: nothing is read until it is asked for, and then chunk by chunk, through
the same checks as every other read. dask is an extra: ``pip install "driftlens[dask]"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.inputs import check_aligned
from driftlens.errors import ConfigError, FormatError, UnknownNameError
from driftlens.store import Recording

__all__ = ["open_tokens"]

_AXES: Final = {
    "gate": ("site", "token", "expert"),
    "pathway": ("site", "token", "expert", "rank"),
    "expert_norm": ("site", "token", "expert"),
    "base_norm": ("site", "token"),
}
_CHUNK_BYTES: Final = 32 << 20
"""Target size of one chunk of pathways as stored; chunks hold whole chunks of the file."""


class _Stored:
    """One value of one group; dask indexes it. A pickled one opens the file again, in the process that reads it."""

    def __init__(self, recording: Recording, group: int, name: str) -> None:
        array = getattr(recording.groups[group], name)
        self._recording, self._group, self._name = recording, group, name
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype[Any] = array.dtype
        self.ndim = len(self.shape)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        return np.asarray(getattr(self._recording.groups[self._group], self._name)[index])


def open_tokens(
    recordings: Mapping[int, Recording],
    names: Sequence[str],
    *,
    group: int = 0,
    chunks: Mapping[str, int] | None = None,
) -> xr.Dataset:
    """Return the stored tokens of several checkpoints without reading their values.

    Args:
        recordings: by checkpoint index, in order; they stay open until the dataset is closed.
        names: the checkpoints' names.
        group: which sites: those of one E and r, as in ``Recording.groups``.
        chunks: numbers of ``site`` and ``token`` per chunk; by default some 32 MB of pathways.

    Returns:
        ``gate`` [checkpoint, site, token, expert], ``pathway`` [checkpoint, site, token, expert, rank] (absent where
        the sites have none), ``expert_norm`` and ``base_norm`` in the stored type (float16: the functions of
        `driftlens.metrics` compute in float64), with the coordinates ``checkpoint_name``, ``layer``, ``kind``, and by
        token ``probe``, ``sample`` (within the probe), ``position``, ``token_id`` and ``role``.

    Raises:
        ConfigError: dask is not installed, or chunks along another axis.
        ProbeError: the recordings hold other tokens.
        UnknownNameError: no such group.
        FormatError: the sites of the group, or their E and r, differ between checkpoints.
    """
    try:
        import dask.array as da
    except ImportError:
        raise ConfigError('Reading lazily needs dask. Install it with: pip install "driftlens[dask]"') from None
    asked = dict(chunks or {})
    if set(asked) - {"site", "token"} or min(asked.values(), default=1) < 1:
        raise ConfigError(f"chunks is {asked}; expected positive numbers for 'site' and 'token'.")
    check_aligned(dict(zip(names, recordings.values(), strict=True)))
    first = next(iter(recordings.values()))
    if not 0 <= group < len(first.groups):
        raise UnknownNameError("group", str(group), [str(number) for number in range(len(first.groups))])
    _check_sites(recordings.values(), names, group)
    known = first.groups[group]
    stored = known.gate.chunks[1]
    size = {"token": stored, "site": max(1, _CHUNK_BYTES // (2 * stored * known.num_experts * max(known.rank, 1)))}
    size |= asked
    variables = {}
    for name, axes in _AXES.items():
        if name == "pathway" and not known.rank:
            continue
        parts = [_Stored(recording, group, name) for recording in recordings.values()]
        cut = tuple(min(size.get(axis, length), length) for axis, length in zip(axes, parts[0].shape, strict=True))
        arrays = [
            da.from_array(part, chunks=cut, name=False, asarray=False, meta=np.empty((0,) * part.ndim, part.dtype))
            for part in parts
        ]
        variables[name] = (("checkpoint", *axes), da.stack(arrays))
    dataset = xr.Dataset(variables, _coordinates(recordings, names, group))

    def close() -> None:
        for recording in recordings.values():
            recording.close()

    dataset.set_close(close)
    return dataset


def _check_sites(recordings: Any, names: Sequence[str], group: int) -> None:
    """Raise FormatError where a checkpoint has other sites in the group, or sites of other E and r."""
    described = []
    for recording in recordings:
        if group >= len(recording.groups):
            described.append("no such group")
            continue
        part = recording.groups[group]
        sites = ", ".join(recording.sites[number].name for number in part.site_index[:2])
        described.append(f"{len(part.site_index)} sites ({sites}, ...) of E = {part.num_experts}, r = {part.rank}")
    for name, text in zip(names, described, strict=True):
        if text != described[0]:
            raise FormatError(
                f"Group {group} of {name} has {text}, of {names[0]} it has {described[0]}; one array needs one shape. "
                "Open checkpoints of one shape together: run.open_tokens(1, 2)."
            )


def _coordinates(recordings: Mapping[int, Recording], names: Sequence[str], group: int) -> dict[str, Any]:
    first = next(iter(recordings.values()))
    sites = [first.sites[number] for number in first.groups[group].site_index]
    columns = [first.tokens(probe) for probe in first.probes]
    counts = [len(column["sample"]) for column in columns]
    tokens = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    return {
        "checkpoint": np.array(list(recordings), dtype=np.int64),
        "checkpoint_name": ("checkpoint", np.array(names, dtype=np.str_)),
        "site": np.array([site.name for site in sites], dtype=np.str_),
        "layer": ("site", np.array([site.layer for site in sites], dtype=np.int64)),
        "kind": ("site", np.array([site.kind for site in sites], dtype=np.str_)),
        "probe": ("token", np.repeat(np.array(first.probes, dtype=np.str_), counts)),
        **{name: ("token", values) for name, values in tokens.items()},
    }
