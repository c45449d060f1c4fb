"""A small copy of a run: few tokens, Gram matrices in place of weights, and the full run's analysis."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from driftlens.analysis.attribution_files import ATTRIBUTION_FILES
from driftlens.analysis.cache import ANALYSIS_NAME, write_cache
from driftlens.analysis.listing import file_stamp
from driftlens.analysis.run import Run, open_run
from driftlens.errors import ConfigError
from driftlens.store import Manifest, Recording, atomic_folder, gram_matrices, thin_recording

__all__ = ["thin_run"]

_COPIED: Final = ("config.yaml", "scores.parquet", "train_log.parquet")


def thin_run(run: Run | str | os.PathLike[str], out: str | os.PathLike[str], tokens_per_sample: int = 8) -> Path:
    """Write a copy of a run that is small enough to ship: what the tables and figures need, no weights.

    The copy holds the configuration, scores, training log, adapter configurations, attribution, and thinned recordings:
    the exact sums over all tokens, at most ``tokens_per_sample`` stored tokens of every sample, and Gram matrices of
    every pair of checkpoints. Its analysis is that of the full run; if it is ever computed again, it is from the kept
    tokens.

    Args:
        run: a run, or its path.
        out: folder to write; must not exist.
        tokens_per_sample: stored tokens kept per sample, drawn with a fixed seed, the same at every checkpoint.

    Returns:
        The folder.

    Raises:
        ConfigError: the run has chosen anchors or left out checkpoints, or ``tokens_per_sample`` is below 1.
        NotFoundError: the run has no recordings, or they were thinned before.
        FormatError: a damaged recording.
        StorageError: the folder exists, or the disk refuses.
    """
    opened = run if isinstance(run, Run) else open_run(run)
    if tokens_per_sample < 1:
        raise ConfigError(f"tokens_per_sample is {tokens_per_sample}; keep at least 1 token of every sample.")
    if not opened.is_plain:
        raise ConfigError(
            f"{opened.path} was opened with other anchors or without some checkpoints; thin the run as it is."
        )
    tables = opened.tables()
    target = Path(out)
    with atomic_folder(target) as folder:
        source = opened.manifest
        manifest = Manifest(
            folder,
            config_hash=source.config_hash,
            stream_sha256=source.stream_sha256,
            probes_sha256=source.probes_sha256,
            base=dict(source.base),
            seed=source.seed,
            threads=source.threads,
            versions=dict(source.versions),
            created=source.created,
            complete=source.complete,
        )
        small = [
            name for name in source.files if name.endswith("/adapter_config.json") or ATTRIBUTION_FILES.fullmatch(name)
        ]
        for name in [*(name for name in _COPIED if name in source.files), *small]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(opened.trusted(name), folder / name)
            manifest.add(name)
        (folder / "recordings").mkdir()
        for name in _thin_recordings(opened, folder, tokens_per_sample):
            manifest.add(name)
        manifest.save()
        copy = Run(folder)
        stamps = {name: file_stamp(folder / name) for name in copy.used_files}
        write_cache(folder / ANALYSIS_NAME, copy.analysis_key, stamps, tables)
    return target


def _thin_recordings(run: Run, folder: Path, tokens_per_sample: int) -> list[str]:
    written = []
    with run.open_recordings() as (recordings, noise):
        points = [point.name for point in run.checkpoints if point.index in run.recorded]
        earlier: list[tuple[str, Recording]] = []
        for name, recording in zip(points, recordings, strict=True):
            grams = gram_matrices(recording, earlier, name=name)
            written.append(f"recordings/{name}.h5")
            thin_recording(recording.path, folder / written[-1], tokens_per_sample=tokens_per_sample, grams=grams)
            earlier.append((name, recording))
        if noise is not None:
            written.append(f"recordings/{noise[0]}.noise.h5")
            thin_recording(noise[1].path, folder / written[-1], tokens_per_sample=tokens_per_sample)
    return written
