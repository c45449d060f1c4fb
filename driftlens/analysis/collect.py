"""Making a run of recordings that were made one by one, so that checkpoints of any origin can be analysed together."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import yaml

from driftlens.analysis.inputs import check_aligned
from driftlens.analysis.run import Run, open_run
from driftlens.errors import ConfigError, FormatError
from driftlens.store import Manifest, Recording, atomic_folder, open_recording, verify_recording

__all__ = ["collect"]

_BEFORE: Final = "start"
"""Name of checkpoint 0, the state before the first task."""
_NAME: Final = re.compile(r"[^/\\\0-\x1f]{1,120}")


def collect(
    recordings: Sequence[Path | str],
    out: Path | str,
    *,
    tasks: Sequence[str] | None = None,
    start: Path | str | None = None,
    method: str | None = None,
) -> Run:
    """Copy lone recordings into a run folder, in the order of the stream.

    Args:
        recordings: one file per task checkpoint, in the order in which the tasks were learned.
        out: the run folder to make; it must not exist.
        tasks: the task learned just before each recording; None takes the probes in their order, as far as they go.
        start: recording of the model before the first task, or None.
        method: name of the method, shown in tables and figures.

    Returns:
        The run. It has no scores: what needs them says so.

    Raises:
        ConfigError: no recording, or names that do not fit.
        FormatError: a damaged recording, or one of another base model, other sites, or other functions at a site.
        ProbeError: recordings of other probes or other tokens.
        StorageError: ``out`` exists, or the disk refuses.
    """
    target = Path(out)
    paths = [Path(path) for path in recordings]
    with ExitStack() as stack:
        opened = [stack.enter_context(open_recording(path)) for path in paths]
        first = stack.enter_context(open_recording(start)) if start is not None else None
        named = _names(opened, tasks)
        everything = {str(recording.path): recording for recording in ([first] if first else []) + opened}
        if len(everything) < len(opened) + (first is not None):
            raise ConfigError("A recording was given twice; every checkpoint of a run has its own.")
        check_aligned(everything)
        _check_base(list(everything.values()))
        _check_sites(list(everything.values()))
        head = opened[0].meta
        files = {
            f"{number:02d}-{task}.h5": path for number, (task, path) in enumerate(zip(named, paths, strict=True), 1)
        }
        if first is not None:
            files[f"00-{_BEFORE}.h5"] = first.path
    for path in files.values():
        problems = verify_recording(path)
        if problems:
            raise FormatError(f"{path} is damaged and was not collected: {problems[0].what} Record it again.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as folder:
        (folder / "recordings").mkdir()
        for name, path in sorted(files.items()):
            shutil.copyfile(path, folder / "recordings" / name)
        config = {"name": target.name, "method": {"name": method or "unknown"}, "stream": {"tasks": list(named)}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        manifest = Manifest(
            folder,
            probes_sha256=str(head.get("probes_sha256", "")),
            base={"name": str(head.get("base", "")), "sha256": str(head.get("base_sha256", ""))},
            complete=True,
        )
        manifest.add("recordings")
        manifest.add("config.yaml")
        manifest.save()
    return open_run(target)


def _names(opened: Sequence[Recording], tasks: Sequence[str] | None) -> list[str]:
    if not opened:
        raise ConfigError("No recording was given. Make one per checkpoint with `driftlens record --ckpt CKPT`.")
    probes = opened[0].probes
    named = list(probes[: len(opened)] if tasks is None else tasks)
    if len(named) != len(opened):
        raise ConfigError(
            f"{len(opened)} recordings were given and {len(named)} task names ({', '.join(named)}). Name the task that "
            "was learned just before each recording, in the same order: --tasks a,b,c."
        )
    bad = [name for name in named if not _NAME.fullmatch(name)]
    if bad or len(set(named)) < len(named):
        raise ConfigError(
            f"The task names {', '.join(map(repr, named))} cannot name files: they must be unique, of 1 to 120 "
            "characters, without slashes or control characters. Give others with --tasks."
        )
    return named


def _check_base(opened: Sequence[Recording]) -> None:
    hashes = {str(recording.path): recording.meta.get("base_sha256") for recording in opened}
    if len(set(hashes.values())) > 1:
        named = "; ".join(f"{path}: {str(value)[:12]}" for path, value in hashes.items())
        raise FormatError(
            f"The recordings are of different base models ({named}). Drift compares checkpoints of one base; record "
            "all of them with the same --base."
        )


def _check_sites(opened: Sequence[Recording]) -> None:
    """Experts may grow and sites may be added; what a site computes, and how, must stay the same kind of thing."""
    first = opened[0]
    known = {site.name: site for site in first.sites}
    for other in opened[1:]:
        shared = [site for site in other.sites if site.name in known]
        if not shared:
            raise FormatError(
                f"{other.path} and {first.path} have no site in common (for example {other.sites[0].name} and "
                f"{first.sites[0].name}). Drift compares the same modules; record checkpoints of one adapter."
            )
        for site in shared:
            for field in ("family", "semantics", "gate"):
                old, new = getattr(known[site.name], field), getattr(site, field)
                if old != new:
                    raise FormatError(
                        f"Site {site.name} has {field} {old!r} in {first.path} and {new!r} in {other.path}: these are "
                        "different functions, and what lies between them is no drift. Record all checkpoints in the "
                        "same way (for CoIN, MCITlib and Prism with the same --semantics)."
                    )
