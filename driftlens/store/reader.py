"""Reading a recording: the heads when it is opened, the data where it is asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftlens.errors import FormatError, NotFoundError, UnknownNameError
from driftlens.store.encoding import to_float32
from driftlens.store.guard import GuardedFile, LazyArray
from driftlens.store.schema import (
    MAX_EXTENT,
    REFERENCE_GRAMS,
    REFERENCE_PREFIX,
    REFERENCE_STATS,
    SCHEMA_VERSION,
    SITE_COLUMNS,
    SITE_DEFAULTS,
    SITE_TEXT_COLUMNS,
    STATS,
    TOKEN_COLUMNS,
    SiteInfo,
    as_text,
    check_schema_version,
    group_name,
    group_sites,
    stats_shapes,
    value_shapes,
    weights_name,
)

__all__ = ["Group", "Recording", "ReferenceGroup", "open_recording"]

_VALUE_TYPES = ("<f2", "<f4")


class _Stats(Mapping[str, NDArray[np.float64]]):
    """The sums of one group; each is read when it is first asked for and then kept."""

    def __init__(
        self,
        file: GuardedFile,
        keys: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        full: dict[str, tuple[int, ...]],
    ):
        self._file, self._keys, self._shapes, self._full = file, keys, shapes, full
        self._read: dict[str, NDArray[np.float64]] = {}

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if name not in self._full:
            raise UnknownNameError("sum", name, self._full)
        if name not in self._read:
            if name in self._shapes:
                self._read[name] = self._file.array(self._keys[name], self._shapes[name], ("<f8",))[...]
            else:
                self._read[name] = np.full(self._full[name], np.nan)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._full)

    def __len__(self) -> int:
        return len(self._full)


class Group:
    """The sites of a recording that share E and r, stacked.

    Attributes:
        index: number of the group.
        site_index: [S] indices into ``Recording.sites``.
        num_experts: E.
        rank: r; 0 where the sites have no pathways.
        stats: exact float64 sums over all tokens of a probe, by name: ``count`` [probe], ``gate_sum``
            [S, probe, E], ``gate_outer`` [S, probe, E, E], ``gated_energy`` [S, probe, E, r], ``second_moment``
            [S, probe, E, r, r], ``entropy`` [S, probe] (nats), ``energy`` and ``expert_sq`` [S, probe, E],
            ``base_sq`` [S, probe]. Where r is 0, ``energy`` and ``expert_sq`` are NaN.
    """

    def __init__(self, recording: Recording, index: int, members: Sequence[int]) -> None:
        first = recording.sites[members[0]]
        self.index, self.site_index = index, np.array(members, dtype=np.intp)
        self.num_experts, self.rank = first.num_experts, first.rank
        self._recording, self._key = recording, f"/{group_name(index)}"
        n_sites, n_probes = len(members), len(recording.probes)
        shapes = self._stats_shapes(n_sites, n_probes)
        empty = (n_sites, n_probes, self.num_experts, 0)
        full: dict[str, tuple[int, ...]] = {"gated_energy": empty, "second_moment": (*empty, 0)}
        full |= dict.fromkeys(("energy", "expert_sq", "drift_sq"), empty[:-1])
        keys = self._stats_keys()
        self.stats: Mapping[str, NDArray[np.float64]] = _Stats(
            recording.file, keys, shapes, {name: shapes.get(name) or full[name] for name in keys}
        )

    def _stats_keys(self) -> dict[str, str]:
        return {name: f"{self._key}/stats/{name}" for name in STATS}

    def _stats_shapes(self, n_sites: int, n_probes: int) -> dict[str, tuple[int, ...]]:
        return stats_shapes(n_sites, n_probes, self.num_experts, self.rank)

    @cached_property
    def reference(self) -> ReferenceGroup | None:
        """What the reference's parameters made of the same inputs; None in a recording without a reference."""
        return ReferenceGroup(self._recording, self.index, self.site_index.tolist()) if self._has_reference else None

    @property
    def _has_reference(self) -> bool:
        return "reference" in self._recording.file.members(self._key)

    @cached_property
    def gate(self) -> LazyArray:
        """[S, N, E] the weights really used, of the stored tokens."""
        return self._value("gate")

    @cached_property
    def pathway(self) -> LazyArray | NDArray[np.float16]:
        """[S, N, E, r] pathway activations z before gate and scaling; an empty array where r is 0."""
        if self.rank == 0:
            return np.zeros((len(self.site_index), self._recording.n_tokens, self.num_experts, 0), dtype=np.float16)
        return self._value("pathway")

    @cached_property
    def expert_norm(self) -> LazyArray | NDArray[np.float16]:
        """[S, N, E] norm of every expert's output; NaN where r is 0, because single outputs were not observed."""
        if self.rank == 0:
            shape = (len(self.site_index), self._recording.n_tokens, self.num_experts)
            return np.full(shape, np.nan, dtype=np.float16)
        return self._value("expert_norm")

    @cached_property
    def base_norm(self) -> LazyArray:
        """[S, N] norm of the base module's output."""
        return self._value("base_norm")

    def _value(self, name: str) -> LazyArray:
        shapes = value_shapes(len(self.site_index), self._recording.n_tokens, self.num_experts, self.rank)
        return self._recording.file.array(f"{self._key}/{name}", shapes[name], _VALUE_TYPES)

    def read(self, name: str, probe: str | int) -> NDArray[np.float32]:
        """Return one value of all sites on the stored tokens of one probe.

        Args:
            name: ``gate``, ``pathway``, ``expert_norm`` or ``base_norm``.
            probe: name or index.

        Returns:
            [S, n, ...] float32.

        Raises:
            UnknownNameError: no such value or probe.
            FormatError: damaged data.
        """
        values = {"gate": "gate", "pathway": "pathway", "expert_norm": "expert_norm", "base_norm": "base_norm"}
        if name not in values:
            raise UnknownNameError("token value", name, values)
        array: LazyArray | NDArray[np.float16] = getattr(self, name)
        return to_float32(array[:, self._recording.token_slice(probe)])

    def __repr__(self) -> str:
        return f"Group({self.index}: {len(self.site_index)} sites, E={self.num_experts}, r={self.rank})"


class ReferenceGroup(Group):
    """The same sites and tokens of the same pass, seen with the parameters of the reference checkpoint.

    Everything of `Group`: gates, pathways and expert norms are the reference's; ``base_norm``, ``count`` and
    ``base_sq`` belong to the pass and are its own. Sites and experts that the reference lacks have gate 0 and output 0.
    ``stats`` has one sum more: ``drift_sq`` [S, probe, E] = sum ||o_e - o_e(reference)||^2 over all tokens.
    """

    def __init__(self, recording: Recording, index: int, members: Sequence[int]) -> None:
        super().__init__(recording, index, members)
        self._key = f"/{group_name(index)}/reference"

    def _stats_keys(self) -> dict[str, str]:
        own = {name: f"{self._key}/reference/stats/{name}" for name in REFERENCE_STATS}
        return super()._stats_keys() | own

    def _stats_shapes(self, n_sites: int, n_probes: int) -> dict[str, tuple[int, ...]]:
        shapes = stats_shapes(n_sites, n_probes, self.num_experts, self.rank, reference=True)
        return {name.removeprefix(REFERENCE_PREFIX): shape for name, shape in shapes.items()}

    @property
    def base_norm(self) -> LazyArray:
        """[S, N] norm of the base module's output in this pass."""
        return self._recording.groups[self.index].base_norm

    @property
    def _has_reference(self) -> bool:
        return False

    @property
    def grams(self) -> dict[str, LazyArray] | None:
        """``anchor`` = B0^T B0, ``cross`` = B0^T B1 and ``current`` = B1^T B1 [S, E*r, E*r], unread; None where r is 0.

        B0 are the reference's factors, B1 this checkpoint's, both with their scaling.
        """
        return {name: self.gram(name) for name in REFERENCE_GRAMS} if self.rank else None

    def gram(self, name: str) -> LazyArray:
        """Return one of `grams`, unread."""
        flat = self.num_experts * self.rank
        return self._recording.file.array(f"{self._key}/grams/{name}", (len(self.site_index), flat, flat), ("<f8",))


class Recording:
    """One checkpoint observed on a probe set. Opened by `open_recording`; read-only.

    Attributes:
        path: the file.
        meta: checkpoint, base, hashes, versions and whatever else the recorder wrote.
        sites: the sites in model order.
        probes: names of the probes in order.
        n_tokens: number of stored tokens over all probes.
        newer: whether the file has a newer minor schema, so that it may hold more than is read.
        groups: the sites stacked by (E, r).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.file = GuardedFile(self.path)
        self._columns: dict[str, LazyArray] = {}
        try:
            self._load()
        except BaseException:
            self.file.close()
            raise

    def _load(self) -> None:
        file = self.file
        names = file.members("/")
        self.meta = file.attrs("/")
        version = self.meta.pop("driftlens_schema", None)
        self.newer = check_schema_version(self.path, version)
        if self.newer:
            warnings.warn(
                f"{self.path} has schema {version}, newer than {SCHEMA_VERSION}; "
                "what was added since is ignored. Upgrade driftlens to use it.",
                stacklevel=4,
            )
        self.schema: str = str(version)
        self.probes = self._text("/probe")
        self.sites = self._load_sites()
        token = file.array("/token", (None,), ("<i4",))
        self.n_tokens = token.shape[0]
        self.has_weights, self.has_grams = "weights" in names, "grams" in names
        members = group_sites(self.sites)
        for index, expected in enumerate(members):
            key = f"/{group_name(index)}/site"
            if file.array(key, (len(expected),), ("<i4",))[...].tolist() != expected:
                raise file.refuse(key, "does not list the sites with the same E and r", f"{expected[:8]}...")
        self.groups = [Group(self, index, expected) for index, expected in enumerate(members)]
        self._where = {site: (g, row) for g, group in enumerate(members) for row, site in enumerate(group)}
        self._site_number = {site.name: index for index, site in enumerate(self.sites)}
        if len(self._site_number) != len(self.sites) or len(set(self.probes)) != len(self.probes):
            raise file.refuse("/sites/name or /probe", "repeats a name", "unique names")

    def _text(self, key: str, length: int | None = None) -> list[str]:
        array = self.file.array(key, (length,), ("S",))
        if array.shape[0] > MAX_EXTENT:
            raise self.file.refuse(key, f"has {array.shape[0]} entries", f"at most {MAX_EXTENT}")
        return as_text(array[...], self.path, key)

    def _load_sites(self) -> list[SiteInfo]:
        present = set(self.file.members("/sites"))
        names = self._text("/sites/name")
        columns: dict[str, list[Any]] = {"name": names}
        for field in (*SITE_TEXT_COLUMNS[1:], *SITE_COLUMNS):
            if field in SITE_DEFAULTS and field not in present:
                columns[field] = [SITE_DEFAULTS[field]] * len(names)
            elif field in SITE_COLUMNS:
                columns[field] = self.file.array(f"/sites/{field}", (len(names),), (SITE_COLUMNS[field],))[...].tolist()
            else:
                columns[field] = self._text(f"/sites/{field}", len(names))
        columns["normalised"] = [bool(value) for value in columns["normalised"]]
        sites = [SiteInfo(**{field: column[index] for field, column in columns.items()}) for index in range(len(names))]
        if not sites or not self.probes:
            raise self.file.refuse("/sites or /probe", "is empty", "at least one site and one probe")
        try:
            for site in sites:
                site.check()
        except FormatError as error:
            raise FormatError(f"{self.path}: /sites: {error}") from None
        return sites

    @cached_property
    def _samples(self) -> list[list[str]]:
        ids = self._text("/samples/id")
        probe = self.file.array("/samples/probe_index", (len(ids),), ("<i4",))[...]
        by_probe: list[list[str]] = [[] for _ in self.probes]
        if probe.size and not (probe.min() >= 0 and probe.max() < len(self.probes)):
            raise self.file.refuse("/samples/probe_index", "leads outside /probe", f"0 to {len(self.probes) - 1}")
        for text, number in zip(ids, probe.tolist(), strict=True):
            by_probe[number].append(text)
        return by_probe

    @cached_property
    def _token_bounds(self) -> NDArray[np.intp]:
        probe = self._column("probe_index")[...]
        if probe.size and (not 0 <= probe[0] <= probe[-1] < len(self.probes) or (np.diff(probe) < 0).any()):
            raise self.file.refuse(
                "/tokens/probe_index", "is not sorted or leads outside /probe", "tokens sorted by probe"
            )
        return np.searchsorted(probe, np.arange(len(self.probes) + 1))

    def _column(self, name: str) -> LazyArray:
        if name not in self._columns:
            self._columns[name] = self.file.array(f"/tokens/{name}", (self.n_tokens,), (TOKEN_COLUMNS[name],))
        return self._columns[name]

    def _probe_number(self, probe: str | int) -> int:
        if isinstance(probe, str):
            if probe not in self.probes:
                raise UnknownNameError("probe", probe, self.probes)
            return self.probes.index(probe)
        if not 0 <= probe < len(self.probes):
            raise UnknownNameError("probe", str(probe), self.probes)
        return int(probe)

    def site_number(self, site: str | int) -> int:
        """Return the index of a site given by name or index; UnknownNameError names the nearest one."""
        if isinstance(site, str):
            if site not in self._site_number:
                raise UnknownNameError("site", site, self._site_number)
            return self._site_number[site]
        if not 0 <= site < len(self.sites):
            raise UnknownNameError("site", str(site), self._site_number)
        return int(site)

    @property
    def has_reference(self) -> bool:
        """Whether the parameters of a reference checkpoint were applied to the inputs of this pass."""
        return self.groups[0].reference is not None

    def reference(self, group: Group | int) -> ReferenceGroup | None:
        """Return what the reference's parameters made of the inputs of a group; None without a reference.

        ``meta["reference"]`` and ``meta["reference_sha256"]`` say which checkpoint it is.
        """
        return (self.groups[group] if isinstance(group, int) else group).reference

    def locate(self, site: str | int) -> tuple[Group, int]:
        """Return the group of a site and the site's row in it."""
        group, row = self._where[self.site_number(site)]
        return self.groups[group], row

    def token_slice(self, probe: str | int) -> slice:
        """Return the range of the stored tokens of one probe on the token axis."""
        number = self._probe_number(probe)
        return slice(int(self._token_bounds[number]), int(self._token_bounds[number + 1]))

    def gate(self, site: str | int, probe: str | int) -> NDArray[np.float32]:
        """Return [token, E]: the weights really used at ``site`` on the stored tokens of ``probe``.

        One contiguous read. Rows sum to 1 within float16.
        """
        group, row = self.locate(site)
        return to_float32(group.gate[row, self.token_slice(probe)])

    def pathway(self, site: str | int, probe: str | int) -> NDArray[np.float32]:
        """Return [token, E, r]: the pathway activations z at ``site`` on the stored tokens of ``probe``."""
        group, row = self.locate(site)
        return to_float32(group.pathway[row, self.token_slice(probe)])

    def tokens(self, probe: str | int) -> dict[str, NDArray[Any]]:
        """Return what the stored tokens of a probe are.

        Returns:
            ``sample`` [n] index into ``sample_ids(probe)``, ``position`` [n], ``token_id`` [n], ``role`` [n].
        """
        part = self.token_slice(probe)
        return {name: self._column(name)[part] for name in TOKEN_COLUMNS if name != "probe_index"}

    def sample_ids(self, probe: str | int) -> list[str]:
        """Return the ids of the samples of a probe in order."""
        return list(self._samples[self._probe_number(probe)])

    def weights(self, site: str | int) -> dict[str, NDArray[np.float32] | None]:
        """Return the parameters of a site.

        Returns:
            ``A`` [E, r, d_in], ``B`` [E, d_out, r] without the scaling, ``router`` [E, d_in]; None what it has not.

        Raises:
            NotFoundError: the recording was thinned and has Gram matrices instead.
        """
        number = self.site_number(site)
        info, key = self.sites[number], f"/weights/{weights_name(number)}"
        if not self.has_weights:
            raise NotFoundError(
                f"{self.path} has no weights: it was thinned. Use Recording.grams, or the full recording."
            )
        names = self.file.members(key)
        shapes = {
            "A": (info.num_experts, info.rank, info.d_in),
            "B": (info.num_experts, info.d_out, info.rank),
            "router": (info.num_experts, info.d_in),
        }
        return {
            name: self.file.array(f"{key}/{name}", shape, ("<f4",))[...]
            if name in names or (name != "router" and info.rank)
            else None
            for name, shape in shapes.items()
        }

    @cached_property
    def gram_checkpoints(self) -> list[str]:
        """Names of the anchors that Gram matrices exist for; empty where there are none."""
        return self._text("/grams/checkpoint") if self.has_grams else []

    def grams(self, anchor: str) -> dict[int, dict[str, NDArray[np.float64]]] | None:
        """Return the Gram matrices of this checkpoint's parameters with those of ``anchor``.

        Args:
            anchor: name of a checkpoint, one of ``gram_checkpoints`` (the last one is this checkpoint itself).

        Returns:
            Per group index ``a_gram`` [S, E, r, r] = A_e(anchor) A_e(this)^T and ``b_gram`` [S, E*r, E*r] =
            B(anchor)^T B(this), without scaling; None if the recording has none.

        Raises:
            UnknownNameError: no such anchor.
        """
        if not self.has_grams:
            return None
        if anchor not in self.gram_checkpoints:
            raise UnknownNameError("checkpoint", anchor, self.gram_checkpoints)
        number = self.gram_checkpoints.index(anchor)
        return {
            group.index: {name: array[:, number] for name, array in self.gram_arrays(group).items()}
            for group in self.groups
            if group.rank
        }

    def gram_arrays(self, group: Group) -> dict[str, LazyArray]:
        """Return ``a_gram`` [S, checkpoint, E, r, r] and ``b_gram`` [S, checkpoint, E*r, E*r] of a group, unread."""
        n_sites, count, rank = len(group.site_index), len(self.gram_checkpoints), group.rank
        flat = group.num_experts * rank
        shapes = {"a_gram": (n_sites, count, group.num_experts, rank, rank), "b_gram": (n_sites, count, flat, flat)}
        key = f"/grams/{group_name(group.index)}"
        return {name: self.file.array(f"{key}/{name}", shape, ("<f8",)) for name, shape in shapes.items()}

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        # Workers of a process pool open the file themselves.
        return open_recording, (self.path,)

    def __repr__(self) -> str:
        return (
            f"Recording({self.path.name}: {len(self.sites)} sites in {len(self.groups)} group(s), "
            f"{len(self.probes)} probes, {self.n_tokens:,} stored tokens, {self.file.size:,} bytes)"
        )


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """Open a recording; reads its heads only.

    Args:
        path: the ``.h5`` file.

    Returns:
        The recording; close it or use it in a ``with`` block.

    Raises:
        NotFoundError: no such file.
        FormatError: not a recording, truncated, damaged, hostile, or of a newer major schema.
    """
    return Recording(path)
