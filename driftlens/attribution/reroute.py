"""Re-routing, SAME's protocol: freeze the experts of a checkpoint, retrain its routers on an old task, score.

What comes back was lost by the routers' drift, what does not by the experts' (SAME, arXiv 2602.01990, Fig. 1d). It
costs a training and asks another question than the swaps of `driftlens.attribution.swaps`, which stand beside it here:
a swap puts the *old* router before the new experts, re-routing looks for the *best* router that a training of given
length finds for them. So it can recover more than the router ever lost, and less where the training is short.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float64
from peft import get_peft_model
from torch import nn
from transformers import set_seed

from driftlens.adapters import iter_sites
from driftlens.analysis.run import Checkpoint, Run, open_run
from driftlens.attribution.pairs import LoadedPair, load_pair
from driftlens.attribution.runs import At, choose_cells, run_config, run_stream
from driftlens.attribution.swaps import ANCHOR, COMBINATIONS, MEASURES, Measure, swap_scores, task_scorer
from driftlens.backbones import Backbone, load_backbone
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.errors import ConfigError, FormatError, NotFoundError, SiteError
from driftlens.methods.base import Method, MethodOptions
from driftlens.metrics import bootstrap_attribution, bootstrap_mean
from driftlens.recording.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, checkpoint_sha256
from driftlens.store import RunLock
from driftlens.store.atomic import write_json
from driftlens.streams import Task
from driftlens.training.config import RunConfig, TrainingOptions
from driftlens.training.costs import skeleton
from driftlens.training.data import encode_task
from driftlens.training.run import Progress, first_adapted_layer, numerics, pick_device, skipping, versions
from driftlens.training.task_trainer import TaskTrainer, derived_seed

__all__ = ["REROUTED", "Rerouted", "estimate_reroute", "reroute_run", "router_parameters"]

REROUTED: Final = "rerouted"
"""Key of the current experts behind retrained routers, beside `COMBINATIONS` and `ANCHOR`."""

_SCHEMA: Final = "1.0"
_SCORING = 3.0
"""Progress units of scoring a task once, in training steps; only the ETA depends on it."""

_Values = dict[str, dict[str, list[float | None]]]

_SIGN: Final = {"strict": 1.0, "lenient": 1.0, "nll": -1.0}

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Rerouted:
    """One old task with the routers of a later checkpoint retrained on it.

    Attributes:
        path: its file.
        about: what was compared and how: checkpoints and hashes, settings, number of router parameters, versions.
        samples: ids of the test samples.
        values: by state (`COMBINATIONS`, `ANCHOR`, `REROUTED`) and measure one value per sample: 0 or 1, or nats; None
            where a model that diverged gave no finite one.
        log: ``loss`` and ``gate_entropy`` (mean over sites, 0..1) of every training step.
        skipped: whether the file was there already.
    """

    path: Path
    about: Mapping[str, Any]
    samples: tuple[str, ...]
    values: Mapping[str, Mapping[str, Sequence[float | None]]]
    log: Mapping[str, Sequence[float]]
    skipped: bool = False

    def scores(self, state: str, measure: Measure) -> Float64[np.ndarray, " sample"]:
        """Return one score per sample, larger being better: a NLL with its sign turned. NaN for None."""
        return _SIGN[measure] * np.array(self.values[state][measure], dtype=np.float64)

    def row(self, measure: Measure, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Return what `driftlens reroute` prints: means over samples, and intervals of what was recovered.

        ``recovered`` (rerouted - current) and ``remaining`` (anchor - rerouted) sum to ``forgetting`` (anchor -
        current), as ``phi_router`` + ``phi_experts`` of the swaps do but for their remainder; all five are positive for
        what was lost, in accuracy or in nats. ``anchor`` (by itself), ``s_aa`` (its router and experts in the current
        model), ``current`` (S_cc), ``old_router`` (S_ac: old router, current experts) and ``rerouted`` are plain means;
        ``gate_entropy_before`` and ``_after`` are those of the first and the last training step.
        """
        by_state = {state: self.scores(state, measure) for state in self.values}
        recovered = bootstrap_mean(by_state[REROUTED] - by_state["cc"], draws=draws, seed=seed)
        remaining = bootstrap_mean(by_state[ANCHOR] - by_state[REROUTED], draws=draws, seed=seed)
        swap = bootstrap_attribution(*(by_state[key] for key in COMBINATIONS), draws=draws, seed=seed)
        plain = {state: float(_SIGN[measure] * scores.mean()) for state, scores in by_state.items()}
        return {
            "task": self.about["task"],
            "checkpoint": self.about["current"],
            "measure": measure,
            "anchor": plain[ANCHOR],
            "s_aa": plain["aa"],
            "current": plain["cc"],
            "old_router": plain["ac"],
            "rerouted": plain[REROUTED],
            "forgetting": float((by_state[ANCHOR] - by_state["cc"]).mean()),
            "recovered": float(recovered.value),
            "recovered_low": float(recovered.low),
            "recovered_high": float(recovered.high),
            "remaining": float(remaining.value),
            "remaining_low": float(remaining.low),
            "remaining_high": float(remaining.high),
            "phi_router": float(swap.phi_router.value),
            "phi_experts": float(swap.phi_experts.value),
            "gate_entropy_before": self.log["gate_entropy"][0],
            "gate_entropy_after": self.log["gate_entropy"][-1],
            "steps": self.about["settings"]["training"]["steps_per_task"],
            "samples": len(self.samples),
        }


def router_parameters(config: RunConfig) -> int:
    """Return how many parameters the gates of a run own, from its configuration alone; no weights are loaded."""
    base = skeleton(config.base)
    model = get_peft_model(base, config.create_method().adapter_config(config.adapter))
    return sum(parameter.numel() for parameter in _routers(model))


def _routers(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the gates' own parameters of the active adapter; a router before one expert decides nothing."""
    for _, site in iter_sites(model):
        for name in site.active_adapters:
            if site.num_experts[name] > 1:
                yield from site.moe_lora_gate[name].parameters()


def estimate_reroute(
    run: Run | str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    at: At = "last",
    steps: int | None = None,
) -> list[dict[str, Any]]:
    """Say what `reroute_run` would do with these arguments; nothing is loaded but names and shapes, nothing is written.

    Returns:
        One row per old task and checkpoint: ``steps``, ``train_samples``, ``router_parameters`` (0: there is no router
        to retrain, and re-routing would be refused), ``scored_answers``, ``kept`` (it is there already).
    """
    job = _Job(open_run(run.path if isinstance(run, Run) else Path(run)), tasks, at, steps, None)
    routers = router_parameters(job.config)
    return [
        {
            "task": cell.task.name,
            "checkpoint": cell.current.name,
            "anchor": cell.anchor.name,
            "steps": job.options.steps_per_task,
            "train_samples": len(cell.task.train),
            "router_parameters": routers,
            "scored_answers": (len(COMBINATIONS) + 2) * len(cell.task.test),
            "kept": job.kept(cell) is not None,
        }
        for cell in job.cells
    ]


def reroute_run(
    run: Run | str | os.PathLike[str],
    *,
    tasks: Sequence[str] | None = None,
    at: At = "last",
    steps: int | None = None,
    base: str | None = None,
    resume: bool = True,
    progress: Report | None = None,
) -> list[Rerouted]:
    """Retrain the routers of a run's checkpoint on old tasks, experts frozen, and score what comes back.

    The training is the run's own: its data, options and number of steps, with a seed of its own; the routers start from
    the checkpoint's. Penalties and schedules of the method are left out, since they would hold back what is asked for;
    a load-balance loss of the adapter stays. Every finished task is a file ``reroute/CHECKPOINT/ANCHOR.json`` of the
    run, listed in its manifest at once; the checkpoints are not touched.

    Args:
        run: a run of ours, with the weights of its checkpoints.
        tasks: old tasks; None for all that are older than the checkpoints.
        at: checkpoints: ``"last"``, ``"all"``, or indices.
        steps: training steps; None for the run's steps per task.
        base: base model; None takes the run's.
        resume: keep finished tasks that were made from the same checkpoints in the same way.
        progress: called after every step.

    Returns:
        One result per checkpoint and old task.

    Raises:
        SiteError: there is no router to retrain: one expert, or gates that follow from what the experts share.
        ConfigError: steps below 1, a task that is not old, or another base model.
        NotFoundError: no run, or one without weights.
        UnknownNameError: no such task or checkpoint.
        ProbeError: the run's stream has changed since.
        LockedError, StorageError: see `driftlens.training.train_run`.
    """
    folder = run.path if isinstance(run, Run) else Path(run)
    open_run(folder)  # before the lock, which would create the folder of a run that does not exist
    with RunLock(folder):
        job = _Job(open_run(folder), tasks, at, steps, progress)
        job.check_routers()
        return job.run(base, resume)


@dataclass(frozen=True)
class _Cell:
    task: Task
    anchor: Checkpoint
    current: Checkpoint
    path: Path


class _Job:
    """A run with the tasks that are to be re-routed."""

    def __init__(
        self, run: Run, tasks: Sequence[str] | None, at: At, steps: int | None, progress: Report | None
    ) -> None:
        if steps is not None and steps < 1:
            raise ConfigError(f"Routers cannot be retrained for {steps} steps; give at least 1.")
        self.folder, self.manifest, self._trusted = run.path, run.manifest, run.trusted
        self.config = run_config(run)
        stream = run_stream(run, self.config)
        self.options: TrainingOptions = self.config.training.model_copy(
            update={} if steps is None else {"steps_per_task": steps}
        )
        self.threads = run.manifest.threads or torch.get_num_threads()
        self.settings = {
            "training": self.options.model_dump(mode="json", exclude={"device", "threads", "prefix_cache"}),
            "evaluation": self.config.evaluation.model_dump(mode="json"),
            "threads": self.threads,
        }
        self.stream_sha256 = stream.sha256
        self.cells = []
        for current, anchor in choose_cells(run, tasks, at):
            assert anchor.task is not None  # an anchor is the checkpoint of a learned task
            path = self.folder / "reroute" / current.name / f"{anchor.name}.json"
            self.cells.append(_Cell(stream.task(anchor.task), anchor, current, path))
        self._progress, self._done = progress or (lambda _: None), 0.0
        self._total = len(self.cells) * self._units

    @property
    def _units(self) -> float:
        return self.options.steps_per_task + (len(COMBINATIONS) + 2) * _SCORING

    def check_routers(self) -> None:
        """Refuse a run whose gates own nothing that could be trained while the experts stay."""
        if router_parameters(self.config):
            return
        adapter = self.config.create_method().adapter_config(self.config.adapter)
        reason = (
            "each site has a single expert, so nothing is routed"
            if adapter.num_experts == 1
            else f"its gates (kind {adapter.gate!r}) own no parameters but follow from A, which the experts share, so "
            "that no router can be trained while the experts stay as they are"
        )
        raise SiteError(
            f"{self.folder} (method {self.config.method_name}) has no router to retrain: {reason}. The causal split "
            "for such methods is that of the swaps, which need no training: driftlens attribute."
        )

    def run(self, base: str | None, resume: bool) -> list[Rerouted]:
        """Make what is missing, one task after the other."""
        results, backbone = [], None
        device = pick_device(self.options.device)
        with numerics(self.threads, self.options.matmul_precision):
            for cell in self.cells:
                found = self.kept(cell) if resume else None
                if found is None:
                    if backbone is None:
                        backbone = self._backbone(base, device)
                    found = self._reroute(cell, backbone, device)
                else:
                    self._advance(self._units, f"{cell.task.name}: there already")
                results.append(found)
        return results

    def _backbone(self, base: str | None, device: torch.device) -> Backbone:
        backbone = load_backbone(base or self.config.base, device=device)
        recorded = self.manifest.base.get("sha256", backbone.sha256)
        if recorded != backbone.sha256:
            raise ConfigError(
                f"{self.folder} was trained on another base model (hash {recorded[:12]}, that of {backbone.name!r} is "
                f"{backbone.sha256[:12]}). Give the one that it was trained on."
            )
        return backbone

    def _reroute(self, cell: _Cell, backbone: Backbone, device: torch.device) -> Rerouted:
        started = time.perf_counter()
        anchor, current = self._checkpoint(cell.anchor), self._checkpoint(cell.current)
        loaded = load_pair(anchor, current, backbone=backbone, device=device)
        try:
            values, log = self._states(cell, loaded)
            about = self._about(cell) | {
                "router_parameters": sum(parameter.numel() for parameter in _routers(loaded.model)),
                "seconds": round(time.perf_counter() - started, 1),
                "versions": versions(),
            }
        finally:
            loaded.unload()
        result = Rerouted(cell.path, about, tuple(sample.id for sample in cell.task.test), values, log)
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(cell.path, about | {"samples": result.samples, "values": values, "log": log})
        self.manifest.add(cell.path.relative_to(self.folder))
        self.manifest.save()
        return result

    def _states(self, cell: _Cell, loaded: LoadedPair) -> tuple[_Values, dict[str, list[float]]]:
        """Score the swaps, retrain the routers, score again."""
        name = cell.task.name
        prefix = self._prefix(loaded)
        swapped = swap_scores(
            loaded,
            cell.task.test,
            self.config.evaluation,
            prefix=prefix,
            on_step=lambda: self._advance(_SCORING, f"{name}: scoring swaps"),
        )
        log = self._train(cell, loaded, prefix)
        outcomes = dict(swapped.outcomes)
        outcomes[REROUTED] = task_scorer(loaded, cell.task.test, self.config.evaluation, prefix).score(loaded.model)
        self._advance(_SCORING, f"{name}: scored")
        values: _Values = {
            state: {measure: [_finite(getattr(one, measure)) for one in scored] for measure in MEASURES}
            for state, scored in outcomes.items()
        }
        return values, log

    def _prefix(self, loaded: LoadedPair) -> FrozenPrefix | None:
        if self.options.prefix_cache == "off":
            return None
        with _trainable_routers(loaded.model):
            depth = first_adapted_layer(loaded.model)
        return FrozenPrefix(loaded.model, depth, loaded.backbone.need_encoder().pad_token_id)

    def _train(self, cell: _Cell, loaded: LoadedPair, prefix: FrozenPrefix | None) -> dict[str, list[float]]:
        """Retrain the routers as the run trained its tasks; nothing else of the model changes."""
        data = encode_task(cell.task.train, loaded.backbone, prefix, options=self.options, device=loaded.device)
        seed = derived_seed(self.options.seed, cell.anchor.index, cell.current.index)
        set_seed(seed)
        if self.options.gradient_checkpointing:
            loaded.backbone.model.enable_input_require_grads()
        with _trainable_routers(loaded.model), tempfile.TemporaryDirectory() as scratch:
            trainer = TaskTrainer(
                loaded.model,
                Method(MethodOptions()),
                data,
                options=self.options,
                seed=seed,
                device=loaded.device,
                pad_token_id=loaded.backbone.need_encoder().pad_token_id,
                scratch=Path(scratch),
                on_step=lambda: self._advance(1, f"{cell.task.name}: retraining routers"),
            )
            with skipping(prefix):
                trainer.train()
        loaded.model.eval()
        frame = trainer.log_frame(cell.anchor.index, cell.task.name)
        return {column: frame[column].tolist() for column in ("loss", "gate_entropy")}

    # -- state on disk -------------------------------------------------------------------------------------------

    def _checkpoint(self, point: Checkpoint) -> Path:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            self._trusted(f"checkpoints/{point.name}/{name}")
        return self.folder / "checkpoints" / point.name

    def _about(self, cell: _Cell) -> dict[str, Any]:
        """What a result depends on; one that says otherwise is made again."""
        return {
            "schema": _SCHEMA,
            "task": cell.task.name,
            "anchor": cell.anchor.name,
            "current": cell.current.name,
            "anchor_sha256": checkpoint_sha256(self._checkpoint(cell.anchor)),
            "current_sha256": checkpoint_sha256(self._checkpoint(cell.current)),
            "stream_sha256": self.stream_sha256,
            "settings": self.settings,
        }

    def kept(self, cell: _Cell) -> Rerouted | None:
        """Return the finished result of a task, or None if it must be made."""
        try:
            content = json.loads(self._trusted(cell.path.relative_to(self.folder).as_posix()).read_text("utf-8"))
        except (NotFoundError, FormatError, ValueError):
            return None
        wanted = self._about(cell)
        if any(content.get(key) != value for key, value in wanted.items()):
            return None
        parts = {key: content.pop(key) for key in ("samples", "values", "log")}
        return Rerouted(cell.path, content, tuple(parts["samples"]), parts["values"], parts["log"], skipped=True)

    def _advance(self, units: float, message: str) -> None:
        self._done = min(self._total, self._done + units)
        self._progress(Progress(message, self._done, self._total))


def _finite(value: float) -> float | None:
    """Return a number as JSON holds it."""
    return float(value) if math.isfinite(value) else None


@contextmanager
def _trainable_routers(model: nn.Module) -> Iterator[None]:
    """Let gradients reach the gates' parameters alone."""
    routers = list(_routers(model))
    for parameter in routers:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in routers:
            parameter.requires_grad_(False)
            parameter.grad = None
