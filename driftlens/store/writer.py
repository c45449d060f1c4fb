"""Writing a recording: rows in batches, sums and weights at the end, one rename when everything is verified."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftlens.errors import FormatError, SiteError, StorageError, UnknownNameError
from driftlens.store.atomic import atomic_file, storage_errors
from driftlens.store.blocks import TokenBlock, block_length, column_blocks, value_blocks
from driftlens.store.checks import check_columns, check_names, check_shapes, check_values, check_weights
from driftlens.store.encoding import FILE_FORMAT, attach, create_scale, create_text, is_finite, set_attr, write
from driftlens.store.lock import RunLock
from driftlens.store.schema import (
    REFERENCE_GRAMS,
    REFERENCE_PREFIX,
    REFERENCE_STATS,
    SCHEMA_VERSION,
    SITE_COLUMNS,
    SITE_TEXT_COLUMNS,
    STATS,
    TOKEN_COLUMNS,
    VALUES,
    Grams,
    SiteInfo,
    estimate_bytes,
    group_name,
    group_sites,
    stats_shapes,
    weights_name,
)
from driftlens.store.sink import Sink
from driftlens.store.verify import verify_recording

__all__ = ["RecordingWriter"]

_STAT_AXES = STATS | REFERENCE_STATS


class RecordingWriter:
    """Writes one recording; use it as a context manager.

    Everything goes to ``NAME.partial``. Leaving the block normally closes that file, opens it again, verifies every
    checksum, shape and value, and only then renames it. Leaving it by any exception, KeyboardInterrupt included,
    removes it; an existing file of the final name is untouched until the rename.

    Args:
        path: final name of the recording.
        sites: all sites in model order; `group_sites` tells how they are grouped.
        probes: names of the probes (tasks) in order.
        sample_ids: for every probe the ids of its samples in order.
        meta: attributes of the recording (checkpoint, base, hashes, versions, ...): text, numbers, lists, dicts.
        n_tokens: how many token rows will be appended in all, if known: the disk is asked beforehand and the number
            is checked at the end.
        reference: whether an anchor answered to the same inputs: values and sums then come with its own beside them
            (``reference/NAME``), and `set_reference_grams` is called for every group.
        overwrite: True replaces an existing recording at the end; False refuses at once.
        grows: True if probes and samples come up as it goes, see `grow`.

    Raises:
        FormatError: sites, probes or ids that cannot be stored.
        LockedError: on entering, if another writer works on the same path.
        StorageError: on entering or leaving, if the disk refuses or the target exists.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sites: Sequence[SiteInfo],
        probes: Sequence[str],
        sample_ids: Mapping[str, Sequence[str]],
        meta: Mapping[str, Any],
        n_tokens: int | None = None,
        reference: bool = False,
        overwrite: bool = False,
        grows: bool = False,
    ) -> None:
        self.path = Path(path)
        self.sites, self.probes, self.n_tokens, self.overwrite = list(sites), list(probes), n_tokens, overwrite
        self.groups = group_sites(self.sites)
        self.sample_ids = {probe: list(sample_ids.get(probe, ())) for probe in self.probes}
        self.reference = reference
        self._meta = dict(meta)
        self._grows = grows
        if not grows:
            check_names(self.path, self.sites, self.probes, sample_ids)
        self._stats: dict[int, dict[str, NDArray[Any]]] = {}
        self._grams: Grams | None = None
        self._reference_grams: dict[int, dict[str, NDArray[np.float64]]] = {}
        self._weights: set[int] = set()
        self._last_probe = 0
        self._count = 0
        self._stack = contextlib.ExitStack()
        self._h5: h5py.File | None = None

    def _extent(self, group: int) -> tuple[int, int, int]:
        members = self.groups[group]
        first = self.sites[members[0]]
        return len(members), first.num_experts, first.rank

    def __enter__(self) -> RecordingWriter:
        with contextlib.ExitStack() as stack:
            if not self.path.parent.is_dir():
                raise StorageError(
                    f"Cannot write {self.path}: the folder {self.path.parent} does not exist. Create it first."
                )
            stack.enter_context(RunLock(self.path, file=True))
            needed = None
            if self.n_tokens is not None:
                needed = estimate_bytes(self.sites, self.n_tokens, len(self.probes), reference=self.reference)
            self._partial = stack.enter_context(atomic_file(self.path, overwrite=self.overwrite, needed=needed))
            self._sink = stack.enter_context(Sink(self._partial))
            self._h5 = h5py.File(self._sink, "w", libver=FILE_FORMAT)
            stack.callback(self._abandon)
            with self._storing():
                self._start(self._h5)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def _abandon(self) -> None:
        if self._h5 is not None:
            # Whatever made the writer stop is the error to report, not what it broke here.
            with contextlib.suppress(OSError, RuntimeError):
                self._h5.close()
            self._h5 = None

    @contextlib.contextmanager
    def _storing(self) -> Iterator[None]:
        """Turn the first refusal of the disk, which HDF5 does not see, into StorageError."""
        with storage_errors(self.path):
            try:
                yield
            except (OSError, RuntimeError):
                if self._sink.error is None:
                    raise
            if self._sink.error is not None:
                raise self._sink.error

    @property
    def _file(self) -> h5py.File:
        if self._h5 is None:
            raise StorageError(f"{self.path} is not open for writing; use the writer inside its `with` block.")
        return self._h5

    def _start(self, h5: h5py.File) -> None:
        h5.attrs.create(
            "driftlens_schema", SCHEMA_VERSION.encode(), dtype=h5py.string_dtype("utf-8", len(SCHEMA_VERSION))
        )
        if not self._grows:
            self._start_probes(h5)
        self._write_sites(h5.create_group("sites"))
        extents = [self._extent(group) for group in range(len(self.groups))]
        length = block_length([(experts, rank) for _, experts, rank in extents])
        self._columns = column_blocks(h5.create_group("tokens"), TOKEN_COLUMNS, length)
        self._token_scale = TokenBlock(h5, "token", (0,), axis=0, dtype=np.dtype("<i4"), length=length)
        self._values = [
            value_blocks(h5.create_group(group_name(index)), *extent, length, reference=self.reference)
            for index, extent in enumerate(extents)
        ]

    def _start_probes(self, h5: h5py.File) -> None:
        self._scales = {"probe": create_scale(h5, "probe", self.probes)}
        self._write_samples(h5.create_group("samples"))

    def _write_samples(self, group: h5py.Group) -> None:
        ids = [text for probe in self.probes for text in self.sample_ids[probe]]
        index = [number for number, probe in enumerate(self.probes) for _ in self.sample_ids[probe]]
        scales = {"sample": create_scale(group, "sample", np.arange(len(ids)))}
        attach(create_text(group, "id", ids), ("sample",), scales)
        attach(write(group, "probe_index", index, dtype="<i4"), ("sample",), scales)

    def _write_sites(self, group: h5py.Group) -> None:
        scales = {"site": create_scale(group, "site", np.arange(len(self.sites)))}
        for field in SITE_TEXT_COLUMNS:
            attach(create_text(group, field, [getattr(site, field) for site in self.sites]), ("site",), scales)
        for field, dtype in SITE_COLUMNS.items():
            attach(write(group, field, [getattr(site, field) for site in self.sites], dtype=dtype), ("site",), scales)

    def set_meta(self, **meta: Any) -> None:
        """Add or replace attributes that are known only at the end, for example the measured overhead."""
        self._meta.update(meta)

    def grow(self, probe: str, ids: Sequence[str]) -> None:
        """Add samples to a probe, for a recording that was begun without probes because they come up as it goes.

        Args:
            probe: name of the probe; a new name opens the next probe.
            ids: ids of its new samples.

        Raises:
            FormatError: the probes were given at the start.
        """
        if not self._grows:
            raise FormatError(f"{self.path}: probes and samples were given at the start; none can be added.")
        if probe not in self.sample_ids:
            self.probes.append(probe)
            self.sample_ids[probe] = []
        self.sample_ids[probe] += ids

    def append(
        self,
        probe: str,
        *,
        sample: ArrayLike,
        position: ArrayLike,
        token_id: ArrayLike,
        role: ArrayLike,
        values: Sequence[Mapping[str, NDArray[Any]]],
    ) -> None:
        """Append the stored tokens of one batch.

        Probes must come in order; within a probe rows keep the order in which they are appended.

        Args:
            probe: name of the probe.
            sample: [n] index of the sample within the probe's ids.
            position: [n] position of the token in its sequence, padding not counted.
            token_id: [n] vocabulary index.
            role: [n] index of the role (image, prompt, answer).
            values: per group the arrays ``gate`` [S, n, E], ``pathway`` [S, n, E, r] (absent where r is 0),
                ``expert_norm`` [S, n, E] and ``base_norm`` [S, n], and with a reference ``reference/gate``,
                ``reference/pathway`` and ``reference/expert_norm``. They are copied.

        Raises:
            FormatError: shapes that do not fit, probes out of order, unknown samples.
            SiteError: a value that is not finite or a gate row that does not sum to 1, with the site's name.
            StorageError: the disk refuses.
        """
        _ = self._file
        number = self._probe_number(probe)
        columns = {"sample": sample, "position": position, "token_id": token_id, "role": role}
        arrays = {name: np.asarray(value, dtype=np.int64) for name, value in columns.items()}
        n = arrays["sample"].size
        arrays["probe_index"] = np.full(n, number, dtype=np.int64)
        check_columns(self.path, probe, n, arrays, len(self.sample_ids[probe]))
        if len(values) != len(self.groups):
            raise FormatError(
                f"{self.path}: values for {len(values)} groups were appended; the sites form {len(self.groups)}."
            )
        for group, (members, given) in enumerate(zip(self.groups, values, strict=True)):
            sites = [self.sites[site] for site in members]
            check_values(self.path, group, sites, probe, n, given, reference=self.reference)
        with self._storing():
            for name, block in self._columns.items():
                block.append(arrays[name])
            self._token_scale.append(np.arange(self._count, self._count + n))
            for blocks, given in zip(self._values, values, strict=True):
                for name, block in blocks.items():
                    block.append(given[name])
        self._last_probe, self._count = number, self._count + n

    def _probe_number(self, probe: str) -> int:
        if probe not in self.sample_ids:
            raise UnknownNameError("probe", probe, self.probes)
        number = self.probes.index(probe)
        if number < self._last_probe:
            raise FormatError(
                f"{self.path}: rows of probe {probe!r} were appended after rows of {self.probes[self._last_probe]!r}; "
                f"append probes in order: {', '.join(self.probes)}."
            )
        return number

    def set_stats(self, group: int, stats: Mapping[str, NDArray[Any]]) -> None:
        """Give the exact sums over all tokens, by probe, of one group (see `schema.STATS`).

        Args:
            group: index of the group.
            stats: every name of the table that applies, float64; with a reference also those of
                `schema.REFERENCE_STATS`, as ``reference/NAME``.

        Raises:
            FormatError: names or shapes that do not fit.
            SiteError: sums that are not finite.
        """
        n_sites, experts, rank = self._extent(group)
        expected = stats_shapes(n_sites, len(self.probes), experts, rank, reference=self.reference)
        check_shapes(self.path, group, stats, expected)
        for name in expected:
            if not is_finite(stats[name]):
                raise SiteError(f"The sum {name} of group {group} is not finite; accumulate in float64.")
        self._stats[group] = {name: np.array(stats[name], dtype=np.float64) for name in expected}

    def set_weights(
        self,
        site: int,
        A: NDArray[np.float32] | None,
        B: NDArray[np.float32] | None,
        router: NDArray[np.float32] | None = None,
    ) -> None:
        """Store the parameters of one site.

        Args:
            site: index of the site.
            A: [E, r, d_in]; None where the site has no pathways.
            B: [E, d_out, r], without the scaling; likewise.
            router: [E, d_in], or None where the gate has no parameters.

        Raises:
            FormatError: shapes that do not fit, or weights given twice.
            SiteError: values that are not finite.
        """
        info = self.sites[site]
        axes = {"A": ("expert", "rank", "d_in"), "B": ("expert", "d_out", "rank"), "router": ("expert", "d_in")}
        given = {name: array for name, array in (("A", A), ("B", B), ("router", router)) if array is not None}
        check_weights(self.path, info, given, again=site in self._weights)
        sizes = {"expert": info.num_experts, "rank": info.rank, "d_in": info.d_in, "d_out": info.d_out}
        if not info.rank:
            sizes = {name: size for name, size in sizes.items() if name not in ("rank", "d_out")}
        with self._storing():
            group = self._file.require_group("weights").create_group(weights_name(site))
            scales = {name: create_scale(group, name, np.arange(size)) for name, size in sizes.items()}
            for name, array in given.items():
                dataset = write(group, name, array, dtype="<f4", chunks=(1, *array.shape[1:]))
                attach(dataset, axes[name], scales)
        self._weights.add(site)

    def set_grams(self, grams: Grams) -> None:
        """Store Gram matrices with earlier checkpoints, for a recording without weights.

        Raises:
            FormatError: shapes that do not fit the groups.
        """
        for group, arrays in grams.groups.items():
            n_sites, experts, rank = self._extent(group)
            flat, count = experts * rank, len(grams.checkpoints)
            shapes = {"a_gram": (n_sites, count, experts, rank, rank), "b_gram": (n_sites, count, flat, flat)}
            check_shapes(self.path, group, arrays, shapes)
        self._grams = grams

    def set_reference_grams(self, group: int, grams: Mapping[str, NDArray[np.float64]]) -> None:
        """Store the Gram matrices between the factors B of the reference and of this checkpoint.

        Args:
            group: index of the group.
            grams: ``anchor`` = B0^T B0, ``cross`` = B0^T B1, ``current`` = B1^T B1, each [S, E*r, E*r] with the
                scalings included; empty where the rank is 0.

        Raises:
            FormatError: shapes that do not fit, or a recording without a reference.
        """
        n_sites, experts, rank = self._extent(group)
        flat = experts * rank
        names = REFERENCE_GRAMS if self.reference and rank else ()
        check_shapes(self.path, group, grams, dict.fromkeys(names, (n_sites, flat, flat)))
        self._reference_grams[group] = {name: np.array(grams[name], dtype=np.float64) for name in names}

    def _finish(self) -> None:
        h5 = self._file
        if self._grows:
            check_names(self.path, self.sites, self.probes, self.sample_ids)
            with self._storing():
                self._start_probes(h5)
        missing = sorted(set(range(len(self.groups))) - self._stats.keys())
        if missing:
            raise FormatError(
                f"{self.path}: the sums of group {missing[0]} were never given; call set_stats for every group."
            )
        missing = sorted(set(range(len(self.groups))) - self._reference_grams.keys())
        if self.reference and missing:
            raise FormatError(
                f"{self.path}: the reference's Gram matrices of group {missing[0]} were never given; call "
                "set_reference_grams for every group."
            )
        if self._weights and len(self._weights) < len(self.sites):
            absent = next(site.name for index, site in enumerate(self.sites) if index not in self._weights)
            raise FormatError(f"{self.path}: weights of site {absent!r} were never given; give all or none.")
        if self.n_tokens not in (None, self._count):
            raise FormatError(f"{self.path}: {self.n_tokens} token rows were announced, {self._count} were appended.")
        with self._storing():
            self._finish_tokens()
            for group in range(len(self.groups)):
                self._finish_group(h5[group_name(group)], group)
            if self._grams is not None:
                self._write_grams(h5.create_group("grams"), self._grams)
            for key in sorted(self._meta):
                set_attr(h5, key, self._meta[key])
            h5.close()
            self._h5 = None
            self._sink.close()
        problems = verify_recording(self._partial)
        if problems:
            raise FormatError(
                f"{self.path} did not verify after writing and was not kept: {problems[0].what} "
                f"({len(problems)} problem(s)). Check the disk and the recorder."
            )

    def _finish_tokens(self) -> None:
        self._token_scale.flush()
        scale = self._file["token"]
        scale.make_scale("token")
        self._scales["token"] = scale
        for name, block in self._columns.items():
            block.flush()
            attach(self._file["tokens"][name], ("token",), self._scales)

    def _finish_group(self, group: h5py.Group, index: int) -> None:
        _, experts, rank = self._extent(index)
        scales = self._scales | {
            "site": create_scale(group, "site", self.groups[index]),
            "expert": create_scale(group, "expert", np.arange(experts)),
            "expert_col": create_scale(group, "expert_col", np.arange(experts)),
        }
        if rank:
            scales |= {name: create_scale(group, name, np.arange(rank)) for name in ("rank", "rank_col")}
        for name, block in self._values[index].items():
            block.flush()
            attach(group[name], VALUES[name.removeprefix(REFERENCE_PREFIX)], scales)
        folders = [(group.create_group("stats"), "")]
        if self.reference:
            folders.append((group["reference"].create_group("stats"), REFERENCE_PREFIX))
        for name, array in self._stats[index].items():
            parent, prefix = folders[name.startswith(REFERENCE_PREFIX)]
            axes = _STAT_AXES[name.removeprefix(prefix)]
            chunks = array.shape if axes[0] == "probe" else (1, *array.shape[1:])
            attach(write(parent, name.removeprefix(prefix), array, dtype="<f8", chunks=chunks), axes, scales)
        if self.reference and rank:
            self._write_reference_grams(group["reference"].create_group("grams"), index, scales["site"])

    def _write_reference_grams(self, parent: h5py.Group, index: int, site: h5py.Dataset) -> None:
        _, experts, rank = self._extent(index)
        axes = ("site", "pathway", "pathway_col")
        scales = {name: create_scale(parent, name, np.arange(experts * rank)) for name in axes[1:]} | {"site": site}
        for name, array in self._reference_grams[index].items():
            attach(write(parent, name, array, dtype="<f8", chunks=(1, *array.shape[1:])), axes, scales)

    def _write_grams(self, parent: h5py.Group, grams: Grams) -> None:
        scales = {"checkpoint": create_scale(parent, "checkpoint", grams.checkpoints)}
        axes = {
            "a_gram": ("site", "checkpoint", "expert", "rank", "rank_col"),
            "b_gram": ("site", "checkpoint", "pathway", "pathway_col"),
        }
        for index, arrays in sorted(grams.groups.items()):
            group = parent.create_group(group_name(index))
            _, experts, rank = self._extent(index)
            sizes = {"expert": experts, "rank": rank, "rank_col": rank, "pathway": experts * rank}
            sizes["pathway_col"] = experts * rank
            local = scales | {name: create_scale(group, name, np.arange(size)) for name, size in sizes.items()}
            local["site"] = create_scale(group, "site", self.groups[index])
            for name, array in arrays.items():
                attach(write(group, name, array, dtype="<f8", chunks=(1, *array.shape[1:])), axes[name], local)
