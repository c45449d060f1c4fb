"""A run: one method over one stream, one checkpoint per task, resumable after a kill at any moment.

Everything that belongs to a task (weights, method state, scores, log) is written into one folder that is renamed
into place, and the manifest is rewritten after it. A resumed run starts from the last listed checkpoint; since every
random choice of a task is seeded by (run seed, task), it ends with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import ctypes
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import set_seed

from driftlens import __version__
from driftlens.backbones import Backbone, decoder_layers, load_backbone
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.errors import ConfigError, FormatError, NotFoundError
from driftlens.methods import Method, TaskContext
from driftlens.store import Manifest, RunLock, atomic_file, atomic_folder
from driftlens.store.manifest import MANIFEST_NAME
from driftlens.streams import Stream, load_stream
from driftlens.training.config import RunConfig
from driftlens.training.data import EncodedTask, TrainingCollator, disk_errors, encode_task
from driftlens.training.evaluate import TaskScorer
from driftlens.training.task_trainer import TaskTrainer, derived_seed

__all__ = [
    "START",
    "Progress",
    "build_stream",
    "checkpoint_name",
    "first_adapted_layer",
    "numerics",
    "pick_device",
    "skipping",
    "train_run",
]

START = "00-start"
"""Name of the checkpoint before the first task."""

_EVALUATION_COST = 3.0
"""Progress units of scoring one task, in training steps; only the ETA depends on it."""


@dataclass(frozen=True)
class Progress:
    """What a long computation tells its caller: a message and how far it is (in units of training steps)."""

    message: str
    done: float
    total: float


def checkpoint_name(index: int, task: str) -> str:
    """Return the folder name of the checkpoint after task ``index`` (1-based), for example ``03-digit``."""
    return f"{index:02d}-{task}"


def build_stream(config: RunConfig) -> Stream:
    """Return the configured stream, its tasks in the configured order and cut to the configured sizes."""
    options = {
        "tasks": config.stream.tasks,
        "train": config.stream.train_samples,
        "test": config.stream.test_samples,
    }
    return load_stream(config.stream.name, **{key: value for key, value in options.items() if value is not None})


def first_adapted_layer(model: nn.Module) -> int:
    """Return the index of the lowest decoder layer that holds a trainable parameter.

    0 also where something outside the decoder layers and the head is trainable, since then nothing may be cached.
    """
    layers = decoder_layers(model)
    inside = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
    trainable = [inside.get(id(p), 0) for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("The adapter has no trainable parameter; check adapter.target_modules and adapter.layers.")
    return min(trainable)


def train_run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Train one method over one stream and return the run folder.

    Args:
        config: the resolved configuration.
        out: the run folder; created.
        resume: continue the run in ``out`` from its last finished checkpoint.
        on_progress: called after every step and every scored task.

    Raises:
        ConfigError: ``out`` holds a run and ``resume`` is False, or a run of another configuration.
        LockedError: another process writes to ``out``.
        StorageError: the disk refuses; what was finished stays.
    """
    out = Path(out)
    with RunLock(out):
        return _Runner(config, out, resume, on_progress or (lambda _: None)).run()


class _Runner:
    def __init__(self, config: RunConfig, out: Path, resume: bool, on_progress: Callable[[Progress], None]) -> None:
        self.config, self.out, self._report = config, out, on_progress
        self.stream = build_stream(config)
        self.manifest = self._open_manifest(resume)
        # A resumed run must add up in the same order as before, so the recorded number of threads wins over today's.
        threads = config.training.threads or self.manifest.threads or torch.get_num_threads()
        self.manifest.threads = threads
        self.device = pick_device(config.training.device)
        self.names = [START] + [checkpoint_name(i, task.name) for i, task in enumerate(self.stream, start=1)]
        tasks = len(self.stream.tasks)
        self._total = tasks * config.training.steps_per_task + (tasks + 1) * tasks * _EVALUATION_COST
        self._done = 0.0

    def run(self) -> Path:
        """Bring the run from where it stands to its end."""
        with numerics(self.manifest.threads, self.config.training.matmul_precision):
            return self._run()

    def _run(self) -> Path:
        finished = self._finished()
        if finished:
            self._check_checkpoints()
            self._merge_tables(finished - 1)
        if finished == len(self.names) and self.manifest.complete:
            self._advance(self._total, "the run is complete")
            return self.out
        backbone = load_backbone(self.config.base, device=self.device)
        if self.manifest.base.setdefault("sha256", backbone.sha256) != backbone.sha256:
            raise ConfigError(
                f"{self.out} was begun on another base model (hash {self.manifest.base['sha256'][:12]}, now "
                f"{backbone.sha256[:12]}). Restore that model, or choose another --out."
            )
        method = self.config.create_method()
        model = self._adapted_model(backbone, method, finished)
        if finished == 0:
            self._begin()
        prefix = self._prefix(model, backbone)
        scorers = self._scorers(backbone, prefix)
        if finished == 0:
            with self._checkpoint(0, model, method) as folder:
                self._score(0, model, scorers).to_parquet(folder / "scores.parquet", index=False)
            finished = 1
        else:
            per_task = self.config.training.steps_per_task
            spent = (finished - 1) * per_task + finished * len(scorers) * _EVALUATION_COST
            self._advance(spent, f"resumed after {self.names[finished - 1]}")
        for index in range(finished, len(self.names)):
            self._train_task(index, model, method, backbone, prefix, scorers)
        self.manifest.complete = True
        self.manifest.save()
        return self.out

    # -- state on disk -------------------------------------------------------------------------------------------

    def _open_manifest(self, resume: bool) -> Manifest:
        if not (self.out / MANIFEST_NAME).is_file():
            if resume:
                raise NotFoundError(
                    f"There is no run to resume in {self.out}: no manifest.json. Start it without --resume."
                )
            return Manifest(
                self.out,
                config_hash=self.config.digest(),
                stream_sha256=self.stream.sha256,
                base={"name": self.config.base},
                seed=self.config.training.seed,
                versions=versions(),
            )
        if not resume:
            raise ConfigError(
                f"{self.out} already holds a run. Use --resume to continue it, or choose another --out; "
                "nothing was changed."
            )
        manifest = Manifest.load(self.out)
        for what, recorded, now in (
            ("configuration", manifest.config_hash, self.config.digest()),
            ("stream", manifest.stream_sha256, self.stream.sha256),
        ):
            if recorded != now:
                raise ConfigError(
                    f"{self.out} holds a run of another {what} (recorded {recorded[:12]}, now {now[:12]}). "
                    f"Resume with {self.out / 'config.yaml'} and the same data, or choose another --out."
                )
        return manifest

    def _begin(self) -> None:
        """Write configuration and manifest; a configuration that cannot work has failed before and left nothing."""
        with atomic_file(self.out / "config.yaml") as partial:
            partial.write_text(self.config.to_yaml(), encoding="utf-8")
        self.manifest.add("config.yaml")
        self.manifest.save()

    def _check_checkpoints(self) -> None:
        """Refuse to continue from checkpoints that are not what was written."""
        files = {str(self.out / name) for name in self.manifest.files if name.startswith("checkpoints/")}
        damaged = [problem for problem in self.manifest.verify() if problem.path in files]
        if damaged:
            listing = "\n".join(f"  - {problem.path} {problem.what}" for problem in damaged)
            raise FormatError(
                f"{self.out} cannot be resumed, {len(damaged)} file(s) of its checkpoints are damaged:\n{listing}\n"
                "Restore them from a copy, or train again into another --out; nothing was changed."
            )

    def _finished(self) -> int:
        """Return how many checkpoints are listed in the manifest, from the first on without a gap."""
        count = 0
        for name in self.names:
            if not self.manifest.lists(f"checkpoints/{name}/adapter_model.safetensors"):
                break
            count += 1
        return count

    @contextmanager
    def _checkpoint(self, index: int, model: PeftModel, method: Method) -> Iterator[Path]:
        """Yield the folder of one checkpoint, add weights and state, rename it into place and list its files."""
        folder = self.out / "checkpoints" / self.names[index]
        folder.parent.mkdir(exist_ok=True)
        # A folder of this name that the manifest does not list was left by a kill; it is made again.
        with atomic_folder(folder, overwrite=True) as partial, disk_errors():
            yield partial
            # The base is frozen and its vocabulary unchanged; asking peft to check would ask a hub.
            model.save_pretrained(str(partial), save_embedding_layers=False)
            (partial / "README.md").unlink(missing_ok=True)
            state = {name: value.contiguous().cpu() for name, value in method.state_dict().items()}
            save_file(state, partial / "method_state.safetensors")
        self.manifest.add(folder.relative_to(self.out))
        self._merge_tables(index)

    def _merge_tables(self, last: int) -> None:
        """Write the run's tables from those of its checkpoints up to ``last``, and list them."""
        for table in ("scores", "train_log"):
            # the checkpoint before the first task has scores, but no training log
            names = [name for name in self.names[: last + 1] if (name, table) != (START, "train_log")]
            if names:
                with atomic_file(self.out / f"{table}.parquet") as partial:
                    frames = [pd.read_parquet(self.out / "checkpoints" / name / f"{table}.parquet") for name in names]
                    pd.concat(frames, ignore_index=True).to_parquet(partial, index=False)
                self.manifest.add(f"{table}.parquet")
        self.manifest.save()

    # -- building ------------------------------------------------------------------------------------------------

    def _adapted_model(self, backbone: Backbone, method: Method, finished: int) -> PeftModel:
        base = backbone.model
        base.requires_grad_(False)
        if self.config.training.gradient_checkpointing:
            base.enable_input_require_grads()
        if finished:
            folder = self.out / "checkpoints" / self.names[finished - 1]
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
            state = load_file(folder / "method_state.safetensors")
            method.load_state_dict(state, self.device)
        else:
            set_seed(derived_seed(self.config.training.seed, 0))
            adapter = method.adapter_config(self.config.adapter)
            model = get_peft_model(base, adapter)
        # The folder that the weights came from is this machine's; the base's name is what another machine needs.
        for stored in model.peft_config.values():
            stored.base_model_name_or_path = self.config.base
        return model.to(self.device)

    def _prefix(self, model: PeftModel, backbone: Backbone) -> FrozenPrefix | None:
        if self.config.training.prefix_cache == "off":
            return None
        return FrozenPrefix(model, first_adapted_layer(model), backbone.need_encoder().pad_token_id)

    def _scorers(self, backbone: Backbone, prefix: FrozenPrefix | None) -> dict[str, TaskScorer]:
        options = self.config.evaluation
        return {
            task.name: TaskScorer(
                task.test,
                backbone.need_encoder(),
                prefix=prefix,
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
                device=self.device,
            )
            for task in self.stream
        }

    # -- one task ------------------------------------------------------------------------------------------------

    def _train_task(
        self,
        index: int,
        model: PeftModel,
        method: Method,
        backbone: Backbone,
        prefix: FrozenPrefix | None,
        scorers: dict[str, TaskScorer],
    ) -> None:
        task = self.stream.tasks[index - 1]
        data = encode_task(task.train, backbone, prefix, options=self.config.training, device=self.device)
        context = TaskContext(index, task.name, lambda: self._replay(model, data, prefix, backbone))
        seed = derived_seed(self.config.training.seed, index)
        set_seed(seed)
        method.begin_task(model, context)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = TaskTrainer(
                model,
                method,
                data,
                options=self.config.training,
                seed=seed,
                device=self.device,
                pad_token_id=backbone.need_encoder().pad_token_id,
                scratch=Path(scratch),
                on_step=lambda: self._advance(1, f"training on {task.name} ({index}/{len(self.stream.tasks)})"),
            )
            with skipping(prefix):
                trainer.train()
        method.end_task(model, context)
        with self._checkpoint(index, model, method) as folder:
            trainer.log_frame(index, task.name).to_parquet(folder / "train_log.parquet", index=False)
            self._score(index, model, scorers).to_parquet(folder / "scores.parquet", index=False)

    @torch.no_grad()
    def _replay(
        self, model: PeftModel, data: EncodedTask, prefix: FrozenPrefix | None, backbone: Backbone
    ) -> Iterator[Tensor]:
        """Run the model over the training data once, in order, in evaluation mode (see ``TaskContext.replay``)."""
        collate = TrainingCollator(backbone.need_encoder().pad_token_id)
        size = 2 * self.config.training.batch_size
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(data), size):
                inputs = collate([data[i] for i in range(start, min(start + size, len(data)))])
                on_device: dict[str, Any] = {
                    key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in inputs.items()
                }
                on_device.pop("labels")
                on_device["logits_to_keep"] = on_device["logits_to_keep"][-1:]
                yield on_device["attention_mask"]
                with skipping(prefix):
                    model(**on_device)
        finally:
            model.train(was_training)

    def _score(self, index: int, model: PeftModel, scorers: dict[str, TaskScorer]) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for task_index, task in enumerate(self.stream, start=1):
            place = {
                "checkpoint": index,
                "checkpoint_name": self.names[index],
                "task": task.name,
                "task_index": task_index,
            }
            rows.extend(place | vars(outcome) for outcome in scorers[task.name].score(model))
            self._advance(_EVALUATION_COST, f"scoring {task.name} after {self.names[index]}")
        return pd.DataFrame(rows)

    def _advance(self, units: float, message: str) -> None:
        self._done = min(self._total, self._done + units)
        self._report(Progress(message, self._done, self._total))


@contextmanager
def numerics(threads: int, matmul_precision: str) -> Iterator[None]:
    """Set what the same bytes depend on, and put the process back as it was.

    Args:
        threads: CPU threads that share an operation, and so the order in which it adds.
        matmul_precision: ``highest``, ``high`` or ``medium``, see `TrainingOptions`.
    """
    _keep_freed_memory()
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    # Saturated gates give denormal products, which slow some CPUs down two- to threefold.
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.set_flush_denormal(False)


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the system after every operation.

    Each step frees and asks again for the same hundreds of megabytes; having every page mapped and cleared anew took a
    third of the time of a step. Other C libraries have no such switch and are left alone.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def versions() -> dict[str, str]:
    """Return the versions of what a run's numbers depend on, by library."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")} | {
        "driftlens": __version__,
        "python": platform.python_version(),
    }


def skipping(prefix: FrozenPrefix | None) -> AbstractContextManager[None]:
    """Return the context in which the model starts from the states of ``prefix``; None changes nothing."""
    return nullcontext() if prefix is None else prefix.skipping()


def pick_device(name: str) -> torch.device:
    """Return the device of ``training.device``; ``auto`` is a GPU where there is one.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"training.device: {name!r} is no device. Allowed: auto, cpu, cuda, cuda:0, ...") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch builds without CUDA assert
        raise ConfigError(f"training.device is {name!r}, which this machine does not have. Use auto or cpu.") from error
    return device
