"""A name is only ever taken by something complete; what was there before survives every failure."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from driftlens.errors import StorageError
from driftlens.store import atomic_file, atomic_folder, write_bytes, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(target: Path, error: BaseException, needed: int | None = None) -> None:
    with atomic_file(target, needed=needed) as partial:
        partial.write_text("half")
        raise error


def interrupt_folder(target: Path) -> None:
    with atomic_folder(target, overwrite=True) as partial:
        (partial / "new").touch()
        raise KeyboardInterrupt


def test_file_appears_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt") as partial:
        assert partial.name == "a.txt.partial"
        partial.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error):
        write_half(target, error())
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_left_over_partial_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt.partial").mkdir()
    with atomic_file(tmp_path / "a.txt") as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert names(tmp_path) == ["a.txt"]


def test_existing_file_may_be_protected(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with (
        pytest.raises(StorageError, match=r"exists already and was left as it is\. Delete it"),
        atomic_file(target, overwrite=False),
    ):
        pytest.fail("the body must not run")
    assert target.read_text() == "old"


def test_missing_folder_and_full_disk_are_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"the folder .*none does not exist. Create it first"):
        write_bytes(tmp_path / "none" / "a", b"x")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"2,000 bytes are needed, 1,000 bytes are free. Free space"):
        write_bytes(tmp_path / "a", b"x" * 2000)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EROFS, "x"), "Read-only file system"),
        (RuntimeError("Unable to flush file (errno = 28, error message = 'No space left on device')"), "No space left"),
    ],
)
def test_refusals_of_the_disk_become_one_clear_error(tmp_path: Path, error: Exception, text: str) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    expected = f"Cannot write .*a.txt: {text}.* 4 bytes were written, 9 bytes are needed, .* free.* Nothing .* is lost"
    with pytest.raises(StorageError, match=expected):
        write_half(target, error, needed=9)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_errors_about_other_files_stay_themselves(tmp_path: Path) -> None:
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/secret")
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a.txt"):
        raise elsewhere


def test_json_is_sorted_and_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": "é", "b": 1}


def test_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "c") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
        assert not (tmp_path / "c").exists()
    assert names(tmp_path) == ["c"]
    assert (tmp_path / "c" / "sub" / "x").read_text() == "1"


def test_folder_is_replaced_only_when_asked_and_only_whole(tmp_path: Path) -> None:
    target = tmp_path / "c"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(StorageError, match="exists already"), atomic_folder(target):
        pytest.fail("the body must not run")
    with pytest.raises(KeyboardInterrupt):
        interrupt_folder(target)
    assert names(target) == ["old"]
    with atomic_folder(target, overwrite=True) as partial:
        (partial / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["c"]


def test_every_interruption_of_the_folder_exchange_keeps_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "c"
    target.mkdir()
    (target / "old").touch()
    rename: Callable[[Path, Path], Path] = Path.rename

    def fails_at_the_second(self: Path, other: Path) -> Path:
        if self.name == "c.partial":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails_at_the_second)
    with pytest.raises(StorageError, match="Input/output error"), atomic_folder(target, overwrite=True) as partial:
        (partial / "new").touch()
    assert names(target) == ["old"]
    monkeypatch.undo()
    # Killed between the two renames: the next writer finds the old folder aside and puts it back first.
    target.rename(tmp_path / "c.replaced.partial")
    with pytest.raises(StorageError, match="exists already"), atomic_folder(target):
        pytest.fail("the body must not run")
    assert names(target) == ["old"]
