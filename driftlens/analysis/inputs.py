"""Reading recordings for analysis: proof that tokens are the same, blocks of sites, and their Gram matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from driftlens.analysis.pairs import Floats, Pass
from driftlens.errors import FormatError, ProbeError
from driftlens.metrics.arrays import FloatArray
from driftlens.store import Recording, SiteInfo

__all__ = [
    "Block",
    "Grams",
    "block_rows",
    "check_aligned",
    "factor_grams",
    "read_grams",
    "read_pass",
    "site_blocks",
    "site_union",
    "token_table_hash",
]

_TOKEN_COLUMNS = ("sample", "position", "token_id", "role")
_PASS_BYTES = 8 << 20
"""Target size of one pass of a block in float64. A pass of every checkpoint lives at once, in every worker."""
_GRAM_BYTES = 64 << 20


def token_table_hash(recording: Recording, probe: str) -> str:
    """Return the SHA-256 of a probe's token table: sample ids, and sample, position, token id, role of every row."""
    digest = hashlib.sha256()
    for text in recording.sample_ids(probe):
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    tokens = recording.tokens(probe)
    for name in _TOKEN_COLUMNS:
        digest.update(name.encode() + np.ascontiguousarray(tokens[name], dtype="<i8").tobytes())
    return digest.hexdigest()


def check_aligned(recordings: Mapping[str, Recording]) -> None:
    """Prove that recordings hold the same tokens of the same probes in the same order.

    Args:
        recordings: by the name to use in messages.

    Raises:
        ProbeError: probes, sample ids or stored tokens differ; the message names the first difference.
    """
    entries = list(recordings.items())
    if not entries:
        return
    first_name, first = entries[0]
    for name, other in entries[1:]:
        if other.probes != first.probes:
            raise ProbeError(
                f"{name} was recorded on the probes {', '.join(other.probes)}, {first_name} on "
                f"{', '.join(first.probes)}. Drift pairs the same tokens; record both on one probe set: "
                "`driftlens record --run RUN`."
            )
    for probe in first.probes:
        wanted = token_table_hash(first, probe)
        for name, other in entries[1:]:
            found = token_table_hash(other, probe)
            if found != wanted:
                raise ProbeError(
                    f"The tokens of probe {probe!r} differ between {first_name} ({_size(first, probe, wanted)}) and "
                    f"{name} ({_size(other, probe, found)}). Drift pairs the same tokens in the same order; record "
                    "every checkpoint on one probe set with the same tokenizer: `driftlens record --run RUN`."
                )


def _size(recording: Recording, probe: str, digest: str) -> str:
    tokens = recording.token_slice(probe)
    return f"{len(recording.sample_ids(probe))} samples, {tokens.stop - tokens.start} tokens, SHA-256 {digest[:12]}"


@dataclass(frozen=True)
class Block:
    """Sites that are analysed together because they have the same E and r.

    Attributes:
        index: [S] positions on the tables' site axis.
        sites: the sites, as their latest recording describes them.
        num_experts: E, the largest over all recordings (methods may grow).
        rank: r, likewise.
    """

    index: NDArray[np.intp]
    sites: tuple[SiteInfo, ...]
    num_experts: int
    rank: int


def site_union(recordings: Sequence[Recording]) -> list[SiteInfo]:
    """Return every site of any recording, as the last recording that has it describes it, with the largest E and r."""
    found: dict[str, SiteInfo] = {}
    extent: dict[str, tuple[int, int]] = {}
    for recording in recordings:
        for site in recording.sites:
            experts, rank = extent.get(site.name, (0, 0))
            extent[site.name] = (max(experts, site.num_experts), max(rank, site.rank))
            found[site.name] = site
    return [
        SiteInfo(**{**vars(site), "num_experts": extent[name][0], "rank": extent[name][1]})
        for name, site in found.items()
    ]


def site_blocks(sites: Sequence[SiteInfo], tokens: int, checkpoints: int) -> Iterator[Block]:
    """Cut the sites into blocks of equal shape that fit in memory.

    Args:
        sites: all sites, in the order of the tables.
        tokens: the largest number of stored tokens of a probe.
        checkpoints: number of recordings.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, site in enumerate(sites):
        shapes.setdefault((site.num_experts, site.rank), []).append(number)
    for (experts, rank), members in shapes.items():
        per_pass = 8 * max(tokens, 1) * experts * max(rank, 1)
        per_gram = 8 * (checkpoints * experts * max(rank, 1)) ** 2
        size = max(1, min(_PASS_BYTES // per_pass, _GRAM_BYTES // per_gram))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            yield Block(np.array(part), tuple(sites[number] for number in part), experts, rank)


def block_rows(recording: Recording, block: Block) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.intp]]]:
    """Yield (group, rows in the group, positions in the block) of the block's sites that the recording has."""
    numbers = {site.name: number for number, site in enumerate(recording.sites)}
    by_group: dict[int, tuple[list[int], list[int]]] = {}
    for position, site in enumerate(block.sites):
        if site.name in numbers:
            group, row = recording.locate(site.name)
            rows, positions = by_group.setdefault(group.index, ([], []))
            rows.append(row)
            positions.append(position)
    for index, (rows, positions) in by_group.items():
        yield index, np.array(rows), np.array(positions)


def read_pass(recording: Recording, probe: str, block: Block, *, reference: bool = False) -> Pass:
    """Read the stored tokens of one probe for a block of sites.

    Sites and experts that did not exist at this checkpoint have gate 0 and output 0. With ``reference`` it is what the
    reference's parameters made of the same inputs.
    """
    tokens = recording.token_slice(probe)
    sites, count = len(block.sites), tokens.stop - tokens.start
    gate, norm = (_tokens_last(sites, count, block.num_experts) for _ in range(2))
    pathway = _tokens_last(sites, count, block.num_experts, block.rank) if block.rank else None
    base = np.full((sites, count), np.nan)
    for index, rows, positions in block_rows(recording, block):
        group = recording.groups[index]
        if reference and group.reference is not None:
            group = group.reference
        # Sites of a block are neighbours in their group: one contiguous read, then a selection in memory.
        span, local = slice(int(rows.min()), int(rows.max()) + 1), rows - rows.min()
        parts = [(gate, group.gate), (norm, group.expert_norm)]
        if pathway is not None and group.rank:
            parts.append((pathway, group.pathway))
        for target, stored in parts:
            read = stored[span, tokens]
            for row, position in zip(local, positions, strict=True):
                target[(position, slice(None), *map(slice, read.shape[2:]))] = read[row]
        base[positions] = group.base_norm[span, tokens][local]
    middle = pathway
    product = np.array([site.semantics == "product_of_sums" for site in block.sites])
    if pathway is not None and product.any():
        mixed = np.einsum("sne,sner->snr", gate[product], pathway[product])
        middle = pathway.copy(order="K")
        middle[product] = mixed[:, :, None]
    return Pass(gate, pathway, middle, norm, base)


def _tokens_last(sites: int, tokens: int, *inner: int) -> FloatArray:
    """Zeros [S, n, *inner] with tokens last in memory: sums over experts and ranks then run over whole rows."""
    return np.moveaxis(np.zeros((sites, *inner, tokens)), -1, 1)


@dataclass(frozen=True)
class Grams:
    """Inner products of the factors of every pair of C checkpoints for a block of S sites, float64.

    Attributes:
        a: [C, C, S, E, r, r], entry (j, c) = A_e(j) A_e(c)^T.
        b: [C, C, S, E r, E r], entry (j, c) = B(j)^T B(c) with both scalings.
    """

    a: FloatArray
    b: FloatArray


def read_grams(recordings: Sequence[Recording], names: Sequence[str], block: Block) -> Grams | None:
    """Return the Gram matrices of a block between all checkpoints, from weights or, in thinned runs, from ``/grams``.

    Args:
        recordings: one per checkpoint, in order.
        names: the checkpoints' names, as ``/grams`` uses them.
        block: the sites.

    Returns:
        The matrices; None where the sites have no factors or a recording has neither weights nor Gram matrices.

    Raises:
        FormatError: a thinned recording lacks an earlier checkpoint.
    """
    if not block.rank:
        return None
    if all(recording.has_weights for recording in recordings):
        return _grams_of_weights(recordings, block)
    if all(recording.has_grams for recording in recordings):
        return _stored_grams(recordings, names, block)
    return None


def _grams_of_weights(recordings: Sequence[Recording], block: Block) -> Grams:
    count, experts, rank = len(recordings), block.num_experts, block.rank
    flat = experts * rank
    a = np.empty((count, count, len(block.sites), experts, rank, rank))
    b = np.empty((count, count, len(block.sites), flat, flat))
    known = [{site.name: site for site in recording.sites} for recording in recordings]
    for position, site in enumerate(block.sites):
        down = np.zeros((count, experts, rank, site.d_in), dtype=np.float32)
        up = np.zeros((count, experts, rank, site.d_out))
        for number, recording in enumerate(recordings):
            info = known[number].get(site.name)
            if info is None:
                continue
            weights = recording.weights(site.name)
            down[number, : info.num_experts, : info.rank] = weights["A"]
            up[number, : info.num_experts, : info.rank] = info.scaling * np.swapaxes(np.asarray(weights["B"]), -1, -2)
        a[:, :, position] = factor_grams(down)
        rows = up.reshape(count * flat, site.d_out)
        b[:, :, position] = (rows @ rows.T).reshape(count, flat, count, flat).transpose(0, 2, 1, 3)
    return Grams(a, b)


def factor_grams(factors: Floats) -> FloatArray:
    """Inner products A_e(j) A_e(c)^T between all checkpoints: [C, E, r, d] gives [C, C, E, r, r]."""
    count, experts, rank, width = factors.shape
    result = np.empty((count, count, experts, rank, rank))
    for expert in range(experts):
        rows = factors[:, expert].reshape(count * rank, width).astype(np.float64)
        result[:, :, expert] = (rows @ rows.T).reshape(count, rank, count, rank).transpose(0, 2, 1, 3)
    return result


def _stored_grams(recordings: Sequence[Recording], names: Sequence[str], block: Block) -> Grams:
    count, experts, rank = len(recordings), block.num_experts, block.rank
    a = np.zeros((count, count, len(block.sites), experts, rank, rank))
    b = np.zeros((count, count, len(block.sites), experts * rank, experts * rank))
    scaling = np.zeros((count, len(block.sites)))
    for current, recording in enumerate(recordings):
        known = recording.gram_checkpoints
        missing = [name for name in names[: current + 1] if name not in known]
        if missing:
            raise FormatError(
                f"{recording.path} has Gram matrices with {', '.join(known)} but not with {', '.join(missing)}. "
                "Thin the full run again: its recordings must be thinned together."
            )
        anchors = [known.index(name) for name in names[: current + 1]]
        for index, rows, positions in block_rows(recording, block):
            group = recording.groups[index]
            arrays = recording.gram_arrays(group)
            span, local = slice(int(rows.min()), int(rows.max()) + 1), rows - rows.min()
            a_part, b_part = (arrays[name][span][local][:, anchors] for name in ("a_gram", "b_gram"))
            scaling[current, positions] = [recording.sites[group.site_index[row]].scaling for row in rows]
            for anchor in range(current + 1):
                a[anchor, current, positions] = a_part[:, anchor]
                b[anchor, current, positions] = b_part[:, anchor]
                a[current, anchor, positions] = np.swapaxes(a_part[:, anchor], -1, -2)
                b[current, anchor, positions] = np.swapaxes(b_part[:, anchor], -1, -2)
    b *= (scaling[:, None] * scaling[None])[..., None, None]
    return Grams(a, b)
