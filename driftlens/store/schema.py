"""Schema 1 of a recording: which datasets exist, their axes, their types, and the limits a reader accepts.

Writer, reader and verifier all work from the tables of this module, so that a dataset is described once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from driftlens.errors import FormatError

__all__ = [
    "GATE_SUM_TOLERANCE",
    "MAX_CHUNK_BYTES",
    "MAX_COMPRESSION_RATIO",
    "MAX_DATASET_BYTES",
    "MAX_EXTENT",
    "MAX_NAME_BYTES",
    "MAX_TOKENS",
    "PATHWAY_NAMES",
    "REFERENCE_GRAMS",
    "REFERENCE_PREFIX",
    "REFERENCE_STATS",
    "REFERENCE_VALUES",
    "SCHEMA_MAJOR",
    "SCHEMA_VERSION",
    "SEMANTICS",
    "SITE_COLUMNS",
    "SITE_DEFAULTS",
    "SITE_TEXT_COLUMNS",
    "STATS",
    "TOKEN_COLUMNS",
    "VALUES",
    "Grams",
    "Problem",
    "SiteInfo",
    "as_text",
    "check_schema_version",
    "estimate_bytes",
    "group_name",
    "group_sites",
    "stats_shapes",
    "value_shapes",
    "weights_name",
]

SCHEMA_MAJOR: Final = 1
SCHEMA_VERSION: Final = "1.1"

# Limits of what a reader accepts before it reads any data. They are far above what the largest real run
# needs and far below what a hostile header can declare.
MAX_EXTENT: Final = 1 << 20  # sites, probes, samples, experts, ranks, layer widths
MAX_TOKENS: Final = 1 << 31
MAX_NAME_BYTES: Final = 1024
MAX_CHUNK_BYTES: Final = 64 << 20
MAX_DATASET_BYTES: Final = 1 << 42
# bitshuffle compresses blocks of 8 KiB one by one; even zeros cannot shrink further than about 400 times.
MAX_COMPRESSION_RATIO: Final = 1024

# A float16 gate weight is off by at most 2**-12 of itself, so a row that sums to 1 stays within 2**-11.
GATE_SUM_TOLERANCE: Final = 2.0**-10

#: Values of stored tokens, one set per group: name -> axes. float16, or float32 where float16 would overflow.
VALUES: Final[dict[str, tuple[str, ...]]] = {
    "gate": ("site", "token", "expert"),
    "pathway": ("site", "token", "expert", "rank"),
    "expert_norm": ("site", "token", "expert"),
    "base_norm": ("site", "token"),
}

#: Exact float64 sums over all tokens of a probe, one set per group: name -> axes.
STATS: Final[dict[str, tuple[str, ...]]] = {
    "count": ("probe",),
    "gate_sum": ("site", "probe", "expert"),
    "gate_outer": ("site", "probe", "expert", "expert_col"),
    "gated_energy": ("site", "probe", "expert", "rank"),
    "second_moment": ("site", "probe", "expert", "rank", "rank_col"),
    "entropy": ("site", "probe"),
    "energy": ("site", "probe", "expert"),
    "expert_sq": ("site", "probe", "expert"),
    "base_sq": ("site", "probe"),
}

#: What a recording with a reference adds to every group: the anchor's parameters on the same inputs. A writer is given
#: these names with ``reference/`` before them, and stores them in ``/group_G/reference`` and its ``stats``.
REFERENCE_PREFIX: Final = "reference/"
REFERENCE_VALUES: Final = {name: axes for name, axes in VALUES.items() if name != "base_norm"}
REFERENCE_STATS: Final = {name: axes for name, axes in STATS.items() if name not in ("count", "base_sq")} | {
    "drift_sq": ("site", "probe", "expert")
}

#: Gram matrices of all B between anchor and current, scalings included: names in ``/group_G/reference/grams``.
REFERENCE_GRAMS: Final = ("anchor", "cross", "current")

#: Values and sums that exist only where a site has low-rank pathways.
PATHWAY_NAMES: Final = frozenset(
    {"pathway", "expert_norm", "gated_energy", "second_moment", "energy", "expert_sq", "drift_sq"}
)

#: Columns of /tokens (axis: token): name -> type. ``sample`` counts within the probe.
TOKEN_COLUMNS: Final[dict[str, str]] = {
    "sample": "<i4",
    "position": "<i4",
    "token_id": "<i4",
    "role": "|u1",
    "probe_index": "<i4",
}

#: Numeric columns of /sites (axis: site): field of SiteInfo -> type.
SITE_COLUMNS: Final[dict[str, str]] = {
    "layer": "<i4",
    "num_experts": "<i4",
    "rank": "<i4",
    "d_in": "<i4",
    "d_out": "<i4",
    "scaling": "<f8",
    "top_k": "<i4",
    "shared_experts": "<i4",
    "normalised": "<i4",
}

#: Text columns of /sites: fields of SiteInfo, stored as fixed-length UTF-8.
SITE_TEXT_COLUMNS: Final = ("name", "kind", "gate", "family", "semantics")

#: What schema 1.0 did not say about a site, and what was true of all its sites.
SITE_DEFAULTS: Final[dict[str, str | int]] = {"family": "moe-lora", "semantics": "sum_gBA", "normalised": 1}

#: How gates g and experts combine to the site's output u, with middle activations z_e = A_e h and scaling s.
SEMANTICS: Final[dict[str, str]] = {
    "sum_gBA": "u = s sum_e g_e B_e z_e",
    "product_of_sums": "u = s (sum_j g_j B_j)(sum_i g_i z_i)",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a file or a run.

    Attributes:
        path: the file (or folder) concerned, as text.
        what: what was found, what was expected, and what to do.
    """

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class SiteInfo:
    """A module where routing and pathways were observed.

    Attributes:
        name: module path inside the base model, for example ``model.layers.20.mlp.down_proj``.
        layer: index of the decoder layer; -1 where the path names none.
        kind: kind of module, for example ``down_proj``.
        num_experts: E, the number of routed experts.
        rank: r, the rank of one expert; 0 where the site has a router but no low-rank pathways.
        d_in: width of the module's input.
        d_out: width of the module's output.
        scaling: factor of the adapter branch (not contained in the stored B).
        gate: kind of gate, for example ``softmax``.
        top_k: how many experts a top-k gate keeps; 0 where all experts are weighted.
        shared_experts: number of experts outside the routing.
        family: the site family that found it.
        semantics: how gates and experts combine to the output, a key of ``SEMANTICS``.
        normalised: whether gate rows sum to 1; False where a method uses them as they are (plain sums of adapters,
            top-k without renormalisation).
    """

    name: str
    layer: int
    kind: str
    num_experts: int
    rank: int
    d_in: int
    d_out: int
    scaling: float
    gate: str
    top_k: int = 0
    shared_experts: int = 0
    family: str = "moe-lora"
    semantics: str = "sum_gBA"
    normalised: bool = True

    def check(self) -> None:
        """Raise FormatError if a field cannot be stored or lies outside the format's limits."""
        for field in SITE_TEXT_COLUMNS:
            check_text(f"{field} of site {self.name!r}", getattr(self, field))
        if self.semantics not in SEMANTICS:
            raise FormatError(
                f"Site {self.name!r} has semantics {self.semantics!r}; allowed are {', '.join(SEMANTICS)}. "
                "Describe how its experts combine, or upgrade driftlens."
            )
        limits = {"layer": -1, "num_experts": 1, "rank": 0, "d_in": 1, "d_out": 1, "top_k": 0, "shared_experts": 0}
        for field, low in limits.items():
            value = getattr(self, field)
            if not low <= value <= MAX_EXTENT:
                raise FormatError(
                    f"Site {self.name!r} has {field} = {value}; allowed are {low} to {MAX_EXTENT}. "
                    "Check how the site was described."
                )
        if not np.isfinite(self.scaling):
            raise FormatError(f"Site {self.name!r} has scaling {self.scaling}; it must be finite.")


@dataclass(frozen=True)
class Grams:
    """Gram matrices of one checkpoint's parameters with earlier checkpoints of the same run and with itself.

    They stand in for the weights in a thinned recording: every subspace angle and every norm of a drift follows
    from them.

    Attributes:
        checkpoints: names of the anchors in order; the last one is the checkpoint itself.
        groups: per group index ``a_gram`` [S, checkpoint, E, r, r] = A_e(anchor) A_e(this)^T and
            ``b_gram`` [S, checkpoint, E*r, E*r] = B(anchor)^T B(this), without scaling, float64.
    """

    checkpoints: list[str]
    groups: dict[int, dict[str, NDArray[np.float64]]]


def check_text(what: str, text: str) -> bytes:
    """Return ``text`` as UTF-8 bytes that a fixed-length string can hold.

    Args:
        what: name of the text, for the error message.
        text: the text.

    Raises:
        FormatError: the text is empty, too long, or contains NUL or unpaired surrogates.
    """
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise FormatError(f"The {what} is not valid Unicode: {text!r}. Use another name.") from None
    if not raw or len(raw) > MAX_NAME_BYTES or b"\0" in raw:
        shown = text if len(text) <= 80 else text[:77] + "..."
        what = what if len(what) <= 120 else what[:117] + "..."  # it may name the same text
        raise FormatError(
            f"The {what} cannot be stored: {shown!r} ({len(raw)} bytes). "
            f"Allowed are 1 to {MAX_NAME_BYTES} bytes of UTF-8 without NUL."
        )
    return raw


def group_sites(sites: Sequence[SiteInfo]) -> list[list[int]]:
    """Split sites into the groups that are stored together.

    Args:
        sites: the sites in model order.

    Returns:
        One list of indices into ``sites`` per group, in order of first appearance. All sites of a group
        have the same number of experts and the same rank.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, site in enumerate(sites):
        groups.setdefault((site.num_experts, site.rank), []).append(index)
    return list(groups.values())


def group_name(index: int) -> str:
    """Return the HDF5 name of group ``index``."""
    return f"group_{index}"


def weights_name(site: int) -> str:
    """Return the HDF5 name of the weights of site ``site``; the index is used because site names are free text."""
    return f"site_{site:05d}"


def value_shapes(
    n_sites: int, n_tokens: int, num_experts: int, rank: int, *, reference: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a group's token values; those of pathways are absent where the rank is 0.

    ``reference`` adds the values of a reference, ``reference/NAME``.
    """
    sizes = {"site": n_sites, "token": n_tokens, "expert": num_experts, "rank": rank}
    return _shapes(VALUES, sizes) | (_prefixed(_shapes(REFERENCE_VALUES, sizes)) if reference else {})


def stats_shapes(
    n_sites: int, n_probes: int, num_experts: int, rank: int, *, reference: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a group's sums; those of pathways are absent where the rank is 0.

    ``reference`` adds the sums of a reference, ``reference/NAME``.
    """
    sizes = {
        "site": n_sites,
        "probe": n_probes,
        "expert": num_experts,
        "expert_col": num_experts,
        "rank": rank,
        "rank_col": rank,
    }
    return _shapes(STATS, sizes) | (_prefixed(_shapes(REFERENCE_STATS, sizes)) if reference else {})


def _prefixed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {REFERENCE_PREFIX + name: shape for name, shape in shapes.items()}


def _shapes(table: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(sizes[axis] for axis in axes) for name, axes in table.items()}
    # A site without pathways has no datasets of them: nothing is stored that was not measured.
    return {name: shape for name, shape in shapes.items() if name not in PATHWAY_NAMES or sizes["rank"] > 0}


def estimate_bytes(
    sites: Sequence[SiteInfo], n_tokens: int, n_probes: int, *, weights: bool = True, reference: bool = False
) -> int:
    """Return the bytes of a recording's arrays before compression: an upper estimate of the file's size.

    Args:
        sites: the sites.
        n_tokens: stored tokens over all probes.
        n_probes: number of probes.
        weights: whether the parameters are stored too.
        reference: whether a reference is recorded too.
    """
    total = n_tokens * sum(np.dtype(dtype).itemsize for dtype in TOKEN_COLUMNS.values())
    for members in group_sites(sites):
        first = sites[members[0]]
        extent = first.num_experts, first.rank
        for shape in value_shapes(len(members), n_tokens, *extent, reference=reference).values():
            total += 2 * math.prod(shape)
        for shape in stats_shapes(len(members), n_probes, *extent, reference=reference).values():
            total += 8 * math.prod(shape)
        if reference:
            total += 8 * len(REFERENCE_GRAMS) * len(members) * math.prod(extent) ** 2
    if weights:
        total += sum(4 * site.num_experts * (site.rank * (site.d_in + site.d_out) + site.d_in) for site in sites)
    return total


def check_schema_version(path: object, found: object) -> bool:
    """Check a schema version that was read from a file.

    Args:
        path: the file, for messages.
        found: the stored version, ``"MAJOR.MINOR"``.

    Returns:
        True if the file has a newer minor version than this package (readable, with a warning).

    Raises:
        FormatError: no version, or another major version.
    """
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", found) if isinstance(found, str) else None
    if match is None:
        raise FormatError(f"{path}: no DriftLens schema version was found (found {found!r}). Is this the right file?")
    major, minor = int(match[1]), int(match[2])
    if major != SCHEMA_MAJOR:
        raise FormatError(
            f"{path} has schema {found}; this version of driftlens reads schema {SCHEMA_MAJOR}. "
            + ("Upgrade driftlens to read it." if major > SCHEMA_MAJOR else "Record it again.")
        )
    return minor > int(SCHEMA_VERSION.split(".")[1])


def as_text(raw: NDArray[np.bytes_], path: object, key: str) -> list[str]:
    """Decode fixed-length UTF-8; FormatError names ``path`` and ``key`` if the bytes are not UTF-8."""
    try:
        return [bytes(item).decode() for item in raw]
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path}: {key} holds bytes that are not UTF-8 ({error}). Restore the file or record it again."
        ) from None
