"""Thinning: a copy of a recording with fewer stored tokens and Gram matrices in place of the weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftlens.errors import ConfigError, FormatError
from driftlens.store.reader import Group, Recording, open_recording
from driftlens.store.schema import (
    PATHWAY_NAMES,
    REFERENCE_PREFIX,
    REFERENCE_STATS,
    REFERENCE_VALUES,
    STATS,
    VALUES,
    Grams,
)
from driftlens.store.writer import RecordingWriter

__all__ = ["gram_matrices", "thin_recording"]


def gram_matrices(current: Recording, anchors: Sequence[tuple[str, Recording]], *, name: str) -> Grams:
    """Compute the Gram matrices of one checkpoint's parameters with earlier checkpoints and with itself.

    Args:
        current: the recording, with weights.
        anchors: name and recording (with weights) of the earlier checkpoints, in order.
        name: name of the checkpoint itself, listed last.

    Returns:
        The matrices, float64: A_e(anchor) A_e(this)^T and B(anchor)^T B(this), without scaling.

    Raises:
        FormatError: an anchor with other sites.
        NotFoundError: a recording without weights.
    """
    for label, anchor in anchors:
        if anchor.sites != current.sites:
            raise FormatError(
                f"{anchor.path} ({label}) and {current.path} were recorded at different sites; "
                "Gram matrices need the same sites. Record both with the same adapter."
            )
    others = [anchor for _, anchor in anchors] + [current]
    checkpoints = [label for label, _ in anchors] + [name]
    groups = {
        group.index: {
            "a_gram": np.stack([_a_gram(anchor, current, group) for anchor in others], axis=1),
            "b_gram": np.stack([_b_gram(anchor, current, group) for anchor in others], axis=1),
        }
        for group in current.groups
        if group.rank
    }
    return Grams(checkpoints, groups)


def _parameter(recording: Recording, site: int, name: str) -> NDArray[np.float64]:
    array = recording.weights(site)[name]
    return np.asarray(array, dtype=np.float64)


def _a_gram(anchor: Recording, current: Recording, group: Group) -> NDArray[np.float64]:
    sites = group.site_index.tolist()
    return np.stack([_parameter(anchor, s, "A") @ _parameter(current, s, "A").swapaxes(-1, -2) for s in sites])


def _b_gram(anchor: Recording, current: Recording, group: Group) -> NDArray[np.float64]:
    flat = group.num_experts * group.rank
    grams = []
    for site in group.site_index.tolist():
        # [E, d_out, r] -> [d_out, E*r], experts slowest as in the adapter.
        b0, b1 = (_parameter(r, site, "B").swapaxes(0, 1).reshape(-1, flat) for r in (anchor, current))
        grams.append(b0.T @ b1)
    return np.stack(grams)


def thin_recording(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    tokens_per_sample: int | None = None,
    keep_tokens: NDArray[np.bool_] | None = None,
    grams: Grams | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write a copy without weights and with fewer stored tokens; the exact sums over all tokens stay.

    Args:
        src: a recording.
        dst: the copy.
        tokens_per_sample: at most so many stored tokens per sample, drawn with ``seed``. The draw depends on the
            tokens alone, so that all checkpoints of a run keep the same ones.
        keep_tokens: [N] which stored tokens to keep, in file order; instead of ``tokens_per_sample``.
        grams: Gram matrices to store (see `gram_matrices`).
        seed: seed of the draw.
        overwrite: True replaces an existing copy.

    Raises:
        ConfigError: both or none of the two selections, or a selection that does not fit.
        FormatError: a damaged source.
        StorageError: the disk refuses, or the copy exists.
    """
    if (tokens_per_sample is None) == (keep_tokens is None):
        raise ConfigError("Give either tokens_per_sample or keep_tokens to thin a recording.")
    with open_recording(src) as source:
        if keep_tokens is None:
            keep = _draw(source, tokens_per_sample or 0, seed)
        elif keep_tokens.shape != (source.n_tokens,):
            raise ConfigError(
                f"keep_tokens has shape {list(keep_tokens.shape)}, expected [{source.n_tokens}] for {source.path}."
            )
        else:
            keep = np.asarray(keep_tokens, dtype=np.bool_)
        with RecordingWriter(
            dst,
            sites=source.sites,
            probes=source.probes,
            sample_ids={probe: source.sample_ids(probe) for probe in source.probes},
            meta=source.meta | {"thinned": True},
            n_tokens=int(keep.sum()),
            reference=source.has_reference,
            overwrite=overwrite,
        ) as writer:
            _copy_tokens(source, writer, keep)
            for group in source.groups:
                stats = {name: group.stats[name] for name in _present(group, STATS)}
                if group.reference is not None:
                    names, inner = _present(group, REFERENCE_STATS), group.reference
                    stats |= {REFERENCE_PREFIX + name: inner.stats[name] for name in names}
                    stored = inner.grams or {}
                    writer.set_reference_grams(group.index, {name: array[...] for name, array in stored.items()})
                writer.set_stats(group.index, stats)
            if grams is not None:
                writer.set_grams(grams)


def _draw(source: Recording, per_sample: int, seed: int) -> NDArray[np.bool_]:
    keep = np.zeros(source.n_tokens, dtype=np.bool_)
    rng = np.random.default_rng(seed)
    for probe in source.probes:
        part = source.token_slice(probe)
        sample = source.tokens(probe)["sample"]
        # Rank of every token in a random order of its sample; keeping ranks below the limit draws uniformly.
        order = np.lexsort((rng.random(sample.size), sample))
        starts = np.searchsorted(sample[order], sample[order])
        keep[part.start + order] = np.arange(sample.size) - starts < per_sample
    return keep


def _copy_tokens(source: Recording, writer: RecordingWriter, keep: NDArray[np.bool_]) -> None:
    for probe in source.probes:
        part = source.token_slice(probe)
        chosen = keep[part]
        columns: dict[str, Any] = {name: column[chosen] for name, column in source.tokens(probe).items()}
        values = [_rows(group, probe, chosen) for group in source.groups]
        writer.append(probe, **columns, values=values)


def _rows(group: Group, probe: str, chosen: NDArray[np.bool_]) -> dict[str, NDArray[np.float32]]:
    rows = {name: group.read(name, probe)[:, chosen] for name in _present(group, VALUES)}
    if group.reference is not None:
        for name in _present(group, REFERENCE_VALUES):
            rows[REFERENCE_PREFIX + name] = group.reference.read(name, probe)[:, chosen]
    return rows


def _present(group: Group, names: Iterable[str]) -> list[str]:
    return [name for name in names if group.rank or name not in PATHWAY_NAMES]
