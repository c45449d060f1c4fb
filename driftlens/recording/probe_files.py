"""Reading and writing a probe set as a folder of plain files.

``probe_set.yaml`` lists the tasks in order, the roles to record, tokens per sample, seed and licence; each task is
one ``TASK.jsonl`` with a sample per line and image paths relative to the folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from driftlens.backbones.encoding import ROLES
from driftlens.errors import NotFoundError, ProbeError, nearest_name
from driftlens.recording.probes import ProbeSample, ProbeSet
from driftlens.store import atomic_folder

__all__ = ["INDEX_FILE", "load_probes", "write_probes"]

INDEX_FILE = "probe_set.yaml"
_INDEX_KEYS = ("schema", "tasks", "roles", "tokens_per_sample", "seed", "licence")
_LINE_KEYS = ("id", "prompt", "messages", "input_ids", "answer", "answer_ids", "image")
_PROMPTS = ("prompt", "messages", "input_ids")
_SHOWN = 8


def load_probes(folder: Path | str) -> ProbeSet:
    """Read a probe set from ``folder``.

    Raises:
        NotFoundError: the folder or its ``probe_set.yaml`` does not exist.
        ProbeError: anything in it that cannot be used; all problems of all files in one message, with line numbers.
    """
    root = Path(folder)
    index_path = root / INDEX_FILE
    if not index_path.is_file():
        raise NotFoundError(
            f"No probe set at {root}: it has no {INDEX_FILE}. A probe set is a folder with {INDEX_FILE} and one "
            "TASK.jsonl per task; leave --probes out to use the probes of the run's own stream."
        )
    index = _read_index(index_path)
    problems: list[str] = []
    samples = {task: _read_task(root, task, problems) for task in index["tasks"]}
    if problems:
        more = f"\n  ({len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise ProbeError(f"The probe set {root} cannot be used:\n  - " + "\n  - ".join(problems[:_SHOWN]) + more)
    return ProbeSet(
        samples,
        roles=tuple(index.get("roles") or ROLES),
        tokens_per_sample=index.get("tokens_per_sample"),
        seed=index.get("seed", 0),
        licence=index.get("licence") or "",
    )


def write_probes(probes: ProbeSet, folder: Path | str) -> Path:
    """Write ``probes`` as a new folder and return its path; ``load_probes`` gives back the same SHA-256.

    The folder appears complete or not at all.

    Raises:
        ProbeError: a task's name cannot be a file name.
        StorageError: the folder exists, or the disk refuses.
    """
    target = Path(folder)
    problems = _impossible_names(probes.tasks)
    if problems:
        raise ProbeError(f"The probe set cannot be written to {target}: " + "; ".join(problems) + ". Rename the task.")
    with atomic_folder(target) as partial:
        for task, rows in probes.samples.items():
            lines = []
            for number, row in enumerate(rows):
                fields = row.as_json()
                if row.image is not None:
                    image = partial / "images" / f"{task}-{number:05d}.{_image_suffix(row.image)}"
                    image.parent.mkdir(exist_ok=True)
                    image.write_bytes(row.image)
                    fields["image"] = image.relative_to(partial).as_posix()
                lines.append(json.dumps(fields, ensure_ascii=False, sort_keys=True) + "\n")
            (partial / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        index = {
            "schema": 1,
            "tasks": list(probes.tasks),
            "roles": list(probes.roles),
            "tokens_per_sample": probes.tokens_per_sample,
            "seed": probes.seed,
            "licence": probes.licence,
        }
        (partial / INDEX_FILE).write_text(yaml.safe_dump(index, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return target


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProbeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(index, dict):
        raise ProbeError(f"{path} must hold keys ({', '.join(_INDEX_KEYS)}); found {type(index).__name__}.")
    problems = []
    for key in index:
        if key not in _INDEX_KEYS:
            guess = nearest_name(str(key), _INDEX_KEYS)
            problems.append(f"unknown key {key!r}" + (f" (did you mean {guess!r}?)" if guess else ""))
    tasks = index.get("tasks")
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, str) and t for t in tasks):
        problems.append("`tasks` must be a list of task names in order")
    elif len(set(tasks)) != len(tasks):
        problems.append("`tasks` names a task twice")
    else:
        problems += _impossible_names(tasks)
    if index.get("schema", 1) != 1:
        problems.append(f"schema {index['schema']!r} is not known; this version reads schema 1")
    roles = index.get("roles") or list(ROLES)
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        problems.append(f"`roles` must be a list out of {', '.join(ROLES)}")
    for key in ("tokens_per_sample", "seed"):
        if index.get(key) is not None and not _is_int(index[key]):
            problems.append(f"`{key}` must be a whole number; found {index[key]!r}")
    if problems:
        raise ProbeError(f"{path}: " + "; ".join(problems) + ".")
    return index


def _impossible_names(tasks: Iterable[str]) -> list[str]:
    return [
        f"task name {task!r} cannot be a file name"
        for task in tasks
        if Path(task).name != task or task.startswith(".") or "\0" in task
    ]


def _read_task(root: Path, task: str, problems: list[str]) -> tuple[ProbeSample, ...]:
    path = root / f"{task}.jsonl"
    if not path.is_file():
        others = sorted(p.stem for p in root.glob("*.jsonl"))
        problems.append(
            f"task {task!r} is listed in {INDEX_FILE} but {path.name} is missing (found: {others or 'none'})"
        )
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        problems.append(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start})")
        return ()
    rows: dict[str, ProbeSample] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not valid JSON ({error.msg}, column {error.colno})")
            continue
        row = _read_sample(root, fields, where, problems)
        if row is None:
            continue
        if row.id in rows:
            problems.append(f"{where}: the id {row.id!r} is used twice in this task")
        rows[row.id] = row
    if not lines:
        problems.append(f"{path.name} has no sample")
    return tuple(rows.values())


def _read_sample(root: Path, fields: object, where: str, problems: list[str]) -> ProbeSample | None:
    if not isinstance(fields, dict):
        problems.append(f"{where}: a sample must be a JSON object; found {type(fields).__name__}")
        return None
    before = len(problems)
    for key in fields:
        if key not in _LINE_KEYS:
            guess = nearest_name(str(key), _LINE_KEYS)
            problems.append(f"{where}: unknown key {key!r}" + (f" (did you mean {guess!r}?)" if guess else ""))
    if not isinstance(fields.get("id"), str | int) or isinstance(fields.get("id"), bool):
        problems.append(f"{where}: `id` is missing or is not a string")
    given = [key for key in _PROMPTS if fields.get(key) is not None]
    if len(given) != 1:
        found = "none" if not given else " and ".join(given)
        problems.append(f"{where}: exactly one of {', '.join(_PROMPTS)} is needed; found {found}")
    _check_types(fields, where, problems)
    image = _read_image(root, fields.get("image"), where, problems)
    if len(problems) > before:
        return None
    return ProbeSample(
        id=str(fields["id"]),
        answer=fields.get("answer"),
        prompt=fields.get("prompt"),
        messages=None if fields.get("messages") is None else tuple(fields["messages"]),
        input_ids=None if fields.get("input_ids") is None else tuple(fields["input_ids"]),
        answer_ids=None if fields.get("answer_ids") is None else tuple(fields["answer_ids"]),
        image=image,
    )


def _check_types(fields: Mapping[str, Any], where: str, problems: list[str]) -> None:
    if fields.get("prompt") is not None and not isinstance(fields["prompt"], str):
        problems.append(f"{where}: `prompt` must be text; found {type(fields['prompt']).__name__}")
    answer, answer_ids = fields.get("answer"), fields.get("answer_ids")
    if answer_ids is None and (not isinstance(answer, str) or not answer.strip()):
        problems.append(f"{where}: the answer is missing (`answer` as text, or `answer_ids` beside `input_ids`)")
    if answer_ids is not None and fields.get("input_ids") is None:
        problems.append(f"{where}: `answer_ids` needs `input_ids`; with a prompt as text give `answer`")
    for key in ("input_ids", "answer_ids"):
        ids = fields.get(key)
        if ids is not None and (not isinstance(ids, list) or not ids or not all(_is_int(i) for i in ids)):
            problems.append(f"{where}: `{key}` must be a non-empty list of token ids")
    messages = fields.get("messages")
    if messages is not None and not (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    ):
        problems.append(f"{where}: `messages` must be a list of objects with `role` and `content`")


def _read_image(root: Path, name: object, where: str, problems: list[str]) -> bytes | None:
    if name is None:
        return None
    if not isinstance(name, str):
        problems.append(f"{where}: `image` must be a path; found {type(name).__name__}")
        return None
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        problems.append(f"{where}: the image {name!r} lies outside the probe set's folder; copy it into images/")
        return None
    if not path.is_file():
        problems.append(f"{where}: the image {name!r} does not exist")
        return None
    raw = path.read_bytes()
    try:
        Image.open(io.BytesIO(raw)).verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        problems.append(f"{where}: the image {name!r} cannot be read ({type(error).__name__})")
        return None
    return raw


def _image_suffix(raw: bytes) -> str:
    with Image.open(io.BytesIO(raw)) as image:
        return (image.format or "png").lower()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
