"""The manifest of a run: what the run is, and every finished file with its size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

from driftlens.errors import FormatError, NotFoundError
from driftlens.store.atomic import PARTIAL_SUFFIX, write_json
from driftlens.store.schema import SCHEMA_VERSION, Problem, check_schema_version

__all__ = ["MANIFEST_NAME", "REPAIR_PREFIX", "FileEntry", "Manifest", "leftovers", "sha256_file"]

MANIFEST_NAME: Final = "manifest.json"
REPAIR_PREFIX: Final = ".repair-"
"""Folders of a run into which `driftlens repair` moves what is damaged."""
UNLISTED: Final = ("analysis.h5",)
"""Files of a run that are derived from listed ones, checked by their own keys and made again when missing."""
_MAX_BYTES: Final = 64 << 20
_ADVICE: Final = "Restore it from a copy; a run that was interrupted is completed by `driftlens train --resume`."
_RESTORE: Final = "It was changed after it was finished: restore it from a copy."
_TEXT_FIELDS: Final = ("created", "config_hash", "stream_sha256", "probes_sha256")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of a finished file."""

    size: int
    sha256: str


@dataclass
class Manifest:
    """What a run folder holds. Readers trust only the files that are listed here.

    Attributes:
        run: the run folder.
        config_hash: SHA-256 of the resolved configuration.
        stream_sha256: content hash of the stream.
        probes_sha256: content hash of the probe set; empty before the first recording.
        base: name and hash of the base model.
        seed: the run's seed.
        threads: number of CPU threads used.
        versions: versions of the libraries used.
        created: UTC time, ISO 8601.
        complete: whether the run has finished.
        files: finished files by path relative to the run folder, with forward slashes.
        schema: schema version of the run folder.
    """

    run: Path
    config_hash: str = ""
    stream_sha256: str = ""
    probes_sha256: str = ""
    base: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    complete: bool = False
    files: dict[str, FileEntry] = field(default_factory=dict)
    schema: str = SCHEMA_VERSION

    @property
    def path(self) -> Path:
        """The manifest file."""
        return self.run / MANIFEST_NAME

    @classmethod
    def load(cls, run: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of a run folder.

        Raises:
            NotFoundError: no such folder, or a folder without manifest.
            FormatError: damaged, of a newer major schema, or with paths that leave the run folder.
        """
        folder = Path(run)
        path = folder / MANIFEST_NAME
        try:
            if not path.is_file():
                raise FileNotFoundError
            if path.stat().st_size > _MAX_BYTES:
                raise FormatError(f"{path} has {path.stat().st_size:,} bytes; a manifest has at most {_MAX_BYTES:,}.")
            data = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"{folder} is not a run: there is no {MANIFEST_NAME}. List runs with `driftlens ls {folder.parent}`."
            ) from None
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path} is not valid JSON ({error}). {_ADVICE}") from None
        if not isinstance(data, dict):
            raise FormatError(f"{path} holds {type(data).__name__}, expected an object. {_ADVICE}")
        check_schema_version(path, data.get("schema"))
        return cls(run=folder, **_parse(path, data))

    def add(self, path: str | os.PathLike[str]) -> None:
        """List a finished file, or every file of a finished folder, with size and SHA-256.

        Args:
            path: inside the run folder, relative to it or absolute.

        Raises:
            NotFoundError: the path does not exist.
            FormatError: the path lies outside the run folder, or is a link.
        """
        target = self.run / path
        if not target.exists():
            raise NotFoundError(f"{target} does not exist and cannot be listed in {self.path}.")
        for file in sorted(_walk(target)) if target.is_dir() else [target]:
            if file.is_symlink() or not file.resolve().is_relative_to(self.run.resolve()):
                raise FormatError(f"{file} is a link or lies outside {self.run}; a run holds its own files only.")
            key = file.resolve().relative_to(self.run.resolve()).as_posix()
            self.files[key] = FileEntry(file.stat().st_size, sha256_file(file))

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Stop listing a file, or every file of a folder; the files themselves stay."""
        key = self._key(path)
        self.files = {name: e for name, e in self.files.items() if name != key and not name.startswith(key + "/")}

    def lists(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a file, or at least one file of a folder, is listed."""
        key = self._key(path)
        return key in self.files or any(name.startswith(key + "/") for name in self.files)

    def _key(self, path: str | os.PathLike[str]) -> str:
        target = self.run / path
        if not target.is_relative_to(self.run):
            raise FormatError(f"{target} lies outside {self.run}; a run holds its own files only.")
        return target.relative_to(self.run).as_posix()

    def save(self) -> None:
        """Write the manifest atomically; StorageError if the disk refuses."""
        data: dict[str, Any] = {name: getattr(self, name) for name in _TEXT_FIELDS}
        data |= {"schema": self.schema, "base": self.base, "seed": self.seed, "threads": self.threads}
        data |= {"versions": self.versions, "complete": self.complete}
        data["files"] = {name: {"size": e.size, "sha256": e.sha256} for name, e in self.files.items()}
        _parse(self.path, data)  # what could not be loaded again is not written
        write_json(self.path, data)

    def verify(self) -> list[Problem]:
        """Compare the run folder with the manifest.

        Returns:
            Files that are missing, changed or not listed, links, and left-overs of interrupted writers.
        """
        found: list[Problem] = []
        for name, entry in sorted(self.files.items()):
            file = self.run / name
            if file.is_symlink() or not file.is_file():
                found.append(Problem(str(file), "is listed in the manifest but is no file. Restore it from a copy."))
                continue
            size = file.stat().st_size
            if size != entry.size:
                found.append(Problem(str(file), f"has {size:,} bytes, {entry.size:,} are listed. {_RESTORE}"))
            elif (digest := sha256_file(file)) != entry.sha256:
                found.append(Problem(str(file), f"has SHA-256 {digest}, {entry.sha256} is listed. {_RESTORE}"))
        left = "was left by an interrupted writer and is ignored. Delete it when nothing writes to the run."
        found += [Problem(str(file), left) for file in leftovers(self.run)]
        listed = {self.run / name for name in self.files} | {self.path}
        for file in sorted(_walk(self.run)):
            if file not in listed and not _is_housekeeping(file.relative_to(self.run)):
                found.append(Problem(str(file), "is not listed in the manifest and is ignored. Move it elsewhere."))
        return found


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leftovers(run: str | os.PathLike[str]) -> list[Path]:
    """Return what interrupted writers left in a run folder: files and folders named ``*.partial``."""
    found = []
    for folder, folders, files in os.walk(run):
        if Path(folder) == Path(run):
            folders[:] = [name for name in folders if not name.startswith(REPAIR_PREFIX)]
        found += [Path(folder, name) for name in (*folders, *files) if name.endswith(PARTIAL_SUFFIX)]
        folders[:] = [name for name in folders if not name.endswith(PARTIAL_SUFFIX)]
    return sorted(found)


def _walk(root: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(root):
        yield from (Path(folder, name) for name in files)


def _is_housekeeping(path: Path) -> bool:
    if path.as_posix() in UNLISTED or path.parts[0].startswith(REPAIR_PREFIX):
        return True
    lock = path.name.startswith(".") and path.name.endswith((".lock", ".lock.owner"))
    return lock or any(part.endswith(PARTIAL_SUFFIX) for part in path.parts)


def _parse(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Check every field's type; unknown fields of a newer minor schema are ignored."""

    def fail(key: str, found: object, expected: str) -> FormatError:
        return FormatError(f"{path}: {key} is {found!r:.80}, expected {expected}. {_ADVICE}")

    fields: dict[str, Any] = {"schema": data["schema"]}
    kinds: dict[str, type] = dict.fromkeys(_TEXT_FIELDS, str) | {"seed": int, "threads": int, "complete": bool}
    for key, kind in kinds.items():
        value = data.get(key)
        if type(value) is not kind:
            raise fail(key, value, kind.__name__)
        fields[key] = value
    for key in ("base", "versions"):
        value = data.get(key)
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise fail(key, value, "an object of texts")
        fields[key] = value
    files = data.get("files")
    if not isinstance(files, dict):
        raise fail("files", files, "an object")
    fields["files"] = {}
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or any(c in name for c in "\0\\:"):
            raise fail("a path in files", name, "a path inside the run folder")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or len(digest) != 64:
            raise fail(f"the entry of {name!r}", entry, "a size and a SHA-256")
        fields["files"][name] = FileEntry(size, digest)
    return fields
