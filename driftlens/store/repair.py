"""Bringing a run folder back to what its manifest can vouch for, without deleting anything that may be good.

What interrupted writers left is removed, what is damaged is moved to ``RUN/.repair-DATE`` and no longer listed, and
what proves itself is listed: recordings carry checksums, and each holds the hash of the checkpoint that it is of.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

from driftlens.errors import DriftLensError, FormatError, LockedError, NotFoundError
from driftlens.store.atomic import PARTIAL_SUFFIX, storage_errors
from driftlens.store.lock import RunLock
from driftlens.store.manifest import MANIFEST_NAME, REPAIR_PREFIX, FileEntry, Manifest, leftovers, sha256_file
from driftlens.store.reader import open_recording
from driftlens.store.schema import check_schema_version
from driftlens.store.verify import verify_recording

__all__ = ["RepairStep", "RunIdentity", "repair_run"]

_ASIDE: Final = ".replaced" + PARTIAL_SUFFIX
_TABLES: Final = ("scores.parquet", "train_log.parquet")

Describe = Callable[[Path], "RunIdentity"]


@dataclass(frozen=True)
class RunIdentity:
    """What a configuration says about its run, for a manifest that must be rebuilt.

    Attributes:
        config_hash: SHA-256 of the resolved configuration.
        stream_sha256: content hash of the stream.
        base: name of the base model.
        seed: the run's seed.
        threads: number of CPU threads; 0 if the configuration leaves it open.
        tasks: number of tasks of the stream.
    """

    config_hash: str
    stream_sha256: str
    base: str
    seed: int
    threads: int
    tasks: int


@dataclass(frozen=True)
class RepairStep:
    """One thing that was done, would be done, or cannot be done.

    Attributes:
        path: the file or folder, relative to the run.
        action: ``remove`` (what an interrupted writer left), ``put back`` (an old folder that a writer had moved
            aside), ``move aside`` (into the repair folder), ``list`` or ``unlist`` (in the manifest), ``rebuild`` (the
            manifest), ``doubt`` (listed or left, but nothing proves that it is as written) or ``restore`` (only a
            copy helps).
        why: what was found, and what to do next where that is not over.
    """

    path: str
    action: str
    why: str

    @property
    def unsolved(self) -> bool:
        """Whether the run is still broken there."""
        return self.action == "restore"


def repair_run(
    run: str | os.PathLike[str], *, dry_run: bool = False, describe: Describe | None = None
) -> list[RepairStep]:
    """Repair a run folder as far as that can be done without guessing.

    Files that the manifest lists and that are as listed are never touched; nothing but left-overs of interrupted
    writers and locks of killed ones is deleted. A repair that is killed is finished by the next one.

    Args:
        run: the run folder.
        dry_run: only say what would be done; writes nothing and takes no lock.
        describe: called with the run folder when the manifest must be rebuilt; reads the run's configuration.

    Returns:
        The steps, in order; ``unsolved`` ones need a copy of the run.

    Raises:
        NotFoundError: no such folder, or nothing in it that makes it a run.
        FormatError: the run was written by a newer driftlens.
        LockedError: another process writes to the run.
        StorageError: the disk refuses.
    """
    folder = Path(run)
    if not any((folder / name).exists() for name in (MANIFEST_NAME, "config.yaml", "checkpoints", "recordings")):
        raise NotFoundError(
            f"{folder} is not a run: neither {MANIFEST_NAME} nor config.yaml, checkpoints or recordings are in it. "
            f"List runs with `driftlens ls {folder.parent}`."
        )
    if dry_run:
        return _Repair(folder, describe, dry_run=True).steps()
    with storage_errors(folder / MANIFEST_NAME), RunLock(folder):
        return _Repair(folder, describe, dry_run=False).steps()


class _Repair:
    def __init__(self, run: Path, describe: Describe | None, *, dry_run: bool) -> None:
        self.run, self.describe, self.dry_run = run, describe, dry_run
        self.done: list[RepairStep] = []
        self._aside: Path | None = None
        self._back: dict[str, Path] = {}  # folders that a dry run would have put back, and where they lie

    def steps(self) -> list[RepairStep]:
        """Do everything, files first and the manifest last, so that the next call can finish what this one began."""
        self._load()
        before = dict(self.manifest.files)
        self._stale_locks()
        self._leftovers()
        if self.rebuilding:
            for name in ("config.yaml", *_TABLES):
                if self._own(self.run / name):
                    self._list(self.run / name, "is there.")
        else:
            self._check_listed()
        self._list_checkpoints()
        self._list_recordings()
        if self.rebuilding:
            self._identify()
        if not self.dry_run and (self.rebuilding or self.manifest.files != before):
            self.manifest.save()
        return self.done

    def _load(self) -> None:
        path = self.run / MANIFEST_NAME
        self.rebuilding = False
        try:
            self.manifest = Manifest.load(self.run)
            return
        except NotFoundError:
            why = "is missing; it is made again from what proves itself."
        except FormatError as error:
            _refuse_newer(path)
            why = f"is damaged; it is made again from what proves itself. ({error})"
        self._say(path, "rebuild", why)
        if os.path.lexists(path):
            self._move_aside(path, "is kept for inspection.")
        self.manifest = Manifest(self.run)
        self.rebuilding = True

    # -- what interrupted writers left ---------------------------------------------------------------------------

    def _stale_locks(self) -> None:
        # A writer that ended by itself has taken its name off the lock; the empty file that remains is harmless.
        for owner in sorted(self.run.rglob(".*.lock.owner")):
            path = owner.with_name(owner.name.removesuffix(".owner"))
            target = path.with_name(path.name.removeprefix(".").removesuffix(".lock"))
            if self._inside(path) and not self._held(target):
                self._say(path, "remove", "is the lock of a writer that was killed.")
                if not self.dry_run:
                    path.unlink(missing_ok=True)
                    owner.unlink(missing_ok=True)

    def _leftovers(self) -> None:
        for path in leftovers(self.run):
            if path.name.endswith(_ASIDE) and self._put_back(path):
                continue
            target = path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))
            if self._held(target):
                self._say(path, "doubt", "is being written by another process and was left alone.")
                continue
            self._say(path, "remove", "was left by an interrupted writer.")
            if not self.dry_run:
                _delete(path)

    def _put_back(self, aside: Path) -> bool:
        """Put an old folder back whose writer died before its new one was complete, or whose new one is damaged."""
        target = aside.with_name(aside.name.removesuffix(_ASIDE))
        listed = self._listed_below(target)
        if target.exists():
            as_listed = listed and all(_matches(aside / name, entry) for name, entry in listed.items())
            if not as_listed or all(_matches(target / name, entry) for name, entry in listed.items()):
                return False
            self._move_aside(target, "is not what the manifest lists; the folder that it replaced is.")
        self._say(aside, "put back", f"is the old {target.name}; a writer was killed while replacing it.")
        if self.dry_run:
            self._back[self._key(target) + "/"] = aside
        else:
            aside.rename(target)
        return True

    def _listed_below(self, folder: Path) -> dict[str, FileEntry]:
        prefix = folder.relative_to(self.run).as_posix() + "/"
        return {n.removeprefix(prefix): e for n, e in self.manifest.files.items() if n.startswith(prefix)}

    def _held(self, target: Path) -> bool:
        """Whether another process is writing the file ``target`` (folders are written under the run's own lock)."""
        lock = RunLock(target, file=True)
        if not lock.path.exists():
            return False
        if self.dry_run:
            return False  # trying the lock would write the name of its holder
        try:
            with lock:
                return False
        except LockedError:
            return True

    # -- what the manifest lists ---------------------------------------------------------------------------------

    def _check_listed(self) -> None:
        names = self._checkpoints()
        damaged: dict[str, list[str]] = {}
        for name, entry in sorted(self.manifest.files.items()):
            path = self._where(name)
            if _matches(path, entry) and self._inside(path):
                continue
            parts = PurePosixPath(name).parts
            if parts[0] == "checkpoints" and len(parts) > 2:
                damaged.setdefault(parts[1], []).append(name)
            elif name in _TABLES or (parts[0] == "recordings" and self._can_record(name)) or self._can_attribute(name):
                self._drop(name)
            else:
                self._say(self.run / name, "restore", f"{self._state(name)}. Restore it from a copy of the run.")
        for checkpoint, files in damaged.items():
            if checkpoint == names[-1] and self._inside(self.run / "checkpoints" / checkpoint):
                self._drop_last_checkpoint(checkpoint, files)
                continue
            for name in files:
                self._say(
                    self.run / name,
                    "restore",
                    f"{self._state(name)}, and later checkpoints build on it. Restore it from a copy of the run.",
                )

    def _where(self, name: str) -> Path:
        for prefix, folder in self._back.items():
            if name.startswith(prefix):
                return folder / name.removeprefix(prefix)
        return self.run / name

    def _checkpoints(self) -> list[str]:
        found = {PurePosixPath(name).parts[1] for name in self.manifest.files if name.startswith("checkpoints/")}
        return sorted(found)

    def _can_record(self, name: str) -> bool:
        """Whether a recording can be made again from a checkpoint of the run, or is sound as it is."""
        checkpoint = PurePosixPath(name).name.removesuffix(".h5").removesuffix(".noise")
        path = self.run / name
        return self.manifest.lists(f"checkpoints/{checkpoint}") or (self._own(path) and not verify_recording(path))

    def _can_attribute(self, name: str) -> bool:
        """Whether a file of `driftlens attribute` can be made again: the anchor's weights are in the run."""
        path = PurePosixPath(name)
        return path.parts[0] == "attribution" and self.manifest.lists(
            f"checkpoints/{path.stem}/adapter_model.safetensors"
        )

    def _drop(self, name: str) -> None:
        """Take a file that can be made again out of the manifest; a recording that proves itself is listed as it is."""
        path, state = self.run / name, self._state(name)
        recording = name.startswith("recordings/")
        if recording and self._own(path) and not verify_recording(path):
            self._list(path, f"{state}, but it is a sound recording: it was finished before the manifest was.")
            return
        again = f"driftlens train --out {self.run} --resume"
        if recording:
            again = f"driftlens record --run {self.run}"
        elif name.startswith("attribution/"):
            again = f"driftlens attribute {self.run}"
        if os.path.lexists(path) and self._inside(path):
            self._move_aside(path, f"{state}; made again by `{again}`.")
        else:
            self._say(path, "unlist", f"{state}; made again by `{again}`.")
        self.manifest.remove(name)

    def _drop_last_checkpoint(self, checkpoint: str, files: list[str]) -> None:
        folder = self.run / "checkpoints" / checkpoint
        state = "; ".join(f"{PurePosixPath(name).name} {self._state(name)}" for name in files)
        why = f"{state}. It is the last one: `driftlens train --out {self.run} --resume` trains it again."
        if folder.exists():
            self._move_aside(folder, why)
        else:
            self._say(folder, "unlist", why)
        self.manifest.remove(folder.relative_to(self.run))
        self.manifest.complete = False

    def _state(self, name: str) -> str:
        path = self.run / name
        if path.is_symlink() or not self._inside(path):
            return "is a link, and a run holds its own files only"
        return "differs from what the manifest lists" if path.is_file() else "is listed in the manifest but missing"

    # -- what proves itself --------------------------------------------------------------------------------------

    def _list_recordings(self) -> None:
        for path in sorted((self.run / "recordings").glob("*.h5")):
            if self._key(path) in self.manifest.files or not self._own(path):
                continue
            if self.dry_run and any(step.path == self._key(path) for step in self.done):
                continue  # would have been moved aside before this
            problems = verify_recording(path)
            if problems:
                self._move_aside(path, f"is no sound recording: {problems[0].what}")
            else:
                self._list(path, "is a sound recording that the manifest does not list.")

    def _list_checkpoints(self) -> None:
        """List checkpoints that their recordings prove; without a manifest also those that nothing contradicts."""
        seen = {step.path for step in self.done}
        folders = [
            folder
            for folder in sorted((self.run / "checkpoints").glob("*"))
            if folder.is_dir() and self._inside(folder / "x") and not folder.name.endswith(PARTIAL_SUFFIX)
            if not self.manifest.lists(folder.relative_to(self.run)) and self._key(folder) not in seen
        ]
        if not folders and not self.rebuilding:
            return
        proofs = self._recorded_hashes()
        for folder in folders:
            problem = _checkpoint_problem(folder)
            if not problem and proofs.get(folder.name, "") not in ("", _adapter_sha256(folder)):
                problem = "is not what its recording was made from"
            if problem and self.rebuilding:
                why = f"{problem}. It is not listed: restore it from a copy and repair again before training goes on."
                self._say(folder, "restore", why)
            elif not problem and folder.name in proofs:
                self._say(folder, "list", "has the configuration and weights that its recording was made from.")
                self._add_all(folder)
            elif not problem and self.rebuilding:
                self._say(folder, "doubt", "is whole and listed, but no recording of it proves that it is as written.")
                self._add_all(folder)

    def _add_all(self, folder: Path) -> None:
        for path in sorted(p for p in folder.rglob("*") if self._own(p)):
            self.manifest.add(path.relative_to(self.run))

    def _recorded_hashes(self) -> dict[str, str]:
        """Return the hash of every checkpoint that a sound recording names, and remember what recordings say."""
        proofs: dict[str, str] = {}
        self._meta: dict[str, Any] = {}
        for path in sorted((self.run / "recordings").glob("*.h5")):
            if not self._own(path) or verify_recording(path):
                continue
            with open_recording(path) as recording:
                self._meta = dict(recording.meta)
            if isinstance(self._meta.get("checkpoint_sha256"), str):
                proofs[str(self._meta.get("checkpoint"))] = self._meta["checkpoint_sha256"]
        return proofs

    def _identify(self) -> None:
        """Fill in what the run is: from its configuration, else from its recordings."""
        meta = self._meta
        self.manifest.probes_sha256 = str(meta.get("probes_sha256", ""))
        self.manifest.base = {
            key: str(meta[name]) for key, name in (("name", "base"), ("sha256", "base_sha256")) if meta.get(name)
        }
        config = self.run / "config.yaml"
        if not config.is_file():
            self._say(config, "restore", "is missing: the run can be analysed, but not continued. Restore it.")
            return
        begun = datetime.fromtimestamp(config.stat().st_mtime, UTC)
        self.manifest.created = begun.isoformat(timespec="seconds")
        if not self._checkpoints():
            self.manifest.complete = bool(self.manifest.files)  # recordings that were collected: nothing is to come
            return
        try:
            identity = None if self.describe is None else self.describe(self.run)
            why = ""
        except DriftLensError as error:
            identity, why = None, f" ({error})"
        if identity is None:
            text = "does not tell which configuration and stream the run is of: training cannot resume."
            self._say(config, "doubt", text + why)
            return
        self.manifest.config_hash, self.manifest.stream_sha256 = identity.config_hash, identity.stream_sha256
        self.manifest.seed, self.manifest.threads = identity.seed, identity.threads
        self.manifest.base["name"] = identity.base
        self.manifest.complete = len(self._checkpoints()) == identity.tasks + 1

    # -- doing it ------------------------------------------------------------------------------------------------

    def _key(self, path: Path) -> str:
        return path.relative_to(self.run).as_posix()

    def _inside(self, path: Path) -> bool:
        return path.parent.resolve().is_relative_to(self.run.resolve())

    def _own(self, path: Path) -> bool:
        return path.is_file() and not path.is_symlink() and self._inside(path)

    def _say(self, path: Path, action: str, why: str) -> None:
        self.done.append(RepairStep(self._key(path), action, why))

    def _list(self, path: Path, why: str) -> None:
        self._say(path, "list", why)
        self.manifest.add(path.relative_to(self.run))

    def _move_aside(self, path: Path, why: str) -> None:
        self._say(path, "move aside", why)
        if self.dry_run:
            return
        if self._aside is None:
            stamp = f"{REPAIR_PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S}"
            taken = {name.name for name in self.run.glob(stamp + "*")}
            self._aside = self.run / next(n for n in _numbered(stamp) if n not in taken)
        target = self._aside / path.relative_to(self.run)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _matches(path: Path, entry: FileEntry) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
        return False
    return sha256_file(path) == entry.sha256


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _refuse_newer(path: Path) -> None:
    """Raise FormatError if a manifest is whole and of another schema: that is no damage."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(data, dict) and isinstance(data.get("schema"), str):
        check_schema_version(path, data["schema"])


def _adapter_sha256(folder: Path) -> str:
    """The hash that recordings store as ``checkpoint_sha256`` (see ``recording.checkpoints``, which needs torch)."""
    parts = [sha256_file(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _checkpoint_problem(folder: Path) -> str | None:
    """Return why a checkpoint folder cannot be whole: a file is missing, torn or not of its kind."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            return f"has no {name}"
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json" and not _is_json(path):
            return f"{path.name} is no valid JSON"
        if path.suffix == ".safetensors" and not _is_safetensors(path):
            return f"{path.name} is torn or no safetensors file"
        if path.suffix == ".parquet" and not _is_parquet(path):
            return f"{path.name} is torn or no Parquet file"
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _is_safetensors(path: Path) -> bool:
    """Whether the header is whole and its tensors end where the file ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
            return False
    return 8 + length + max(ends, default=0) == size


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        return head == file.read(4) == b"PAR1"
