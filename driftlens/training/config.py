"""The configuration of a run: one YAML file plus ``key=value`` overrides, checked as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.trainer_utils import SchedulerType

from driftlens.errors import ConfigError, NotFoundError, UnknownNameError, nearest_name
from driftlens.methods import METHODS, AdapterOptions, Method, create_method
from driftlens.streams import STREAMS

__all__ = [
    "EvaluationOptions",
    "RecordingOptions",
    "RunConfig",
    "StreamOptions",
    "TrainingOptions",
    "load_config",
    "parse_config",
    "preset_names",
]

_PRESETS = Path(__file__).parent / "presets"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Section):
    """Which stream, which of its tasks in which order, and how many samples of each."""

    name: str = "builtin"
    tasks: list[str] | None = None
    train_samples: int | None = Field(default=None, ge=1)
    test_samples: int | None = Field(default=None, ge=1)


class TrainingOptions(_Section):
    """How each task is trained. ``seed`` fixes every random choice; ``threads`` belongs to the seed on a CPU.

    ``matmul_precision`` is torch's float32 matrix-product setting. On CPUs ``medium`` hands the products to oneDNN:
    still float32 on most of them and about twice as fast where MKL does not know the processor, bfloat16 inside on
    CPUs with AMX.
    """

    steps_per_task: int = Field(default=50, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    lr_scheduler: str = "cosine"
    warmup: float = Field(default=0.1, ge=0, description="share of a task's steps (below 1) or number of steps")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    gradient_checkpointing: bool = False
    prefix_cache: Literal["disk", "memory", "off"] = "disk"


class EvaluationOptions(_Section):
    """How answers are generated and scored."""

    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=8, ge=1)


class RecordingOptions(_Section):
    """What ``driftlens record --run`` uses unless told otherwise."""

    probes: str | None = None
    batch_size: int = Field(default=16, ge=1)
    tokens_per_sample: int | None = Field(default=None, ge=1)


class RunConfig(_Section):
    """The whole resolved configuration of a run; :meth:`digest` identifies it."""

    name: str | None = None
    base: str = "builtin"
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "pass-moe"})
    stream: StreamOptions = Field(default_factory=StreamOptions)
    adapter: AdapterOptions = Field(default_factory=AdapterOptions)
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    evaluation: EvaluationOptions = Field(default_factory=EvaluationOptions)
    recording: RecordingOptions = Field(default_factory=RecordingOptions)

    @property
    def method_name(self) -> str:
        """The registered name of the method."""
        return str(self.method["name"])

    def create_method(self) -> Method:
        """Return a fresh instance of the method with its options."""
        return create_method(self.method_name, {k: v for k, v in self.method.items() if k != "name"})

    def digest(self) -> str:
        """Return the SHA-256 of everything that can change a run's numbers (its name cannot)."""
        content = self.model_dump(mode="json", exclude={"name", "recording"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the configuration as YAML that :func:`load_config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """Return the names of the configurations that ship with the package, such as ``builtin/pass-moe``."""
    return sorted(path.relative_to(_PRESETS).with_suffix("").as_posix() for path in _PRESETS.rglob("*.yaml"))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML configuration and apply overrides such as ``training.seed=1``.

    Args:
        path: a file, the name of a preset (see :func:`preset_names`), or None for the defaults alone.
        overrides: ``dotted.key=value`` strings; values are parsed as YAML.

    Raises:
        NotFoundError: the file does not exist.
        ConfigError: not YAML, or one or more keys or values are wrong (all of them are listed at once).
    """
    content = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply_override(content, override)
    return parse_config(content, str(path) if path else "the command line")


def parse_config(content: dict[str, Any], origin: str) -> RunConfig:
    """Validate a configuration mapping; see :func:`load_config` for what is raised."""
    problems: list[str] = []
    config: RunConfig | None = None
    try:
        config = RunConfig(**content)
    except ValidationError as error:
        problems += _explain(error, RunConfig, ())
    if config is not None:
        problems += _check_names(config)
    if problems or config is None:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) in the configuration from {origin}:\n{listing}")
    return config


def _read_yaml(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file() and str(path) in preset_names():
        file = _PRESETS / f"{path}.yaml"
    if not file.is_file():
        guess = nearest_name(str(path), preset_names())
        hint = f" Did you mean the preset {guess!r}?" if guess else ""
        raise NotFoundError(f"No configuration at {path}.{hint} Presets: {', '.join(preset_names())}.")
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{file} holds a {type(loaded).__name__}; a configuration is a mapping of sections.")
    return loaded or {}


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"Cannot read the override {override!r}. Write key=value, for example training.seed=1.")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"The override {override!r} goes below {parent!r}, which is a value, not a section.")
    try:
        section[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value in {override!r} is not valid YAML: {error}") from error


def _check_names(config: RunConfig) -> list[str]:
    problems = []
    if "name" not in config.method:
        problems.append(f"method.name is missing. Known methods: {', '.join(METHODS.names())}.")
    else:
        try:
            config.create_method()
        except UnknownNameError as error:
            problems.append(str(error))
        except ValidationError as error:
            problems += _explain(error, METHODS.get(config.method_name).Options, ("method",))
    schedules = [str(kind.value) for kind in SchedulerType]
    if config.training.lr_scheduler not in schedules:
        problems.append(str(UnknownNameError("learning-rate schedule", config.training.lr_scheduler, schedules)))
    try:
        STREAMS.get(config.stream.name)
    except UnknownNameError as error:
        problems.append(str(error))
    return problems


def _explain(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...]) -> list[str]:
    """Turn pydantic's findings into one line each, with the nearest known key for unknown ones."""
    lines = []
    for finding in error.errors():
        where = ".".join((*prefix, *(str(part) for part in finding["loc"])))
        if finding["type"] == "extra_forbidden":
            known = _fields_at(model, finding["loc"][:-1])
            guess = nearest_name(str(finding["loc"][-1]), known)
            hint = f" Did you mean {guess!r}?" if guess else ""
            lines.append(f"{where}: unknown key.{hint} Known: {', '.join(known)}.")
        else:
            lines.append(f"{where}: {finding['msg']} (found {finding['input']!r}).")
    return lines


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return sorted(model.model_fields)
