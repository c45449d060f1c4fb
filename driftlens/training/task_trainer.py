"""One task's training: a ``transformers.Trainer`` with a method's phases around each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from driftlens.adapters import iter_sites, load_balance_loss
from driftlens.errors import DriftLensError
from driftlens.methods import Method
from driftlens.training.config import TrainingOptions
from driftlens.training.data import EncodedTask, TrainingCollator

__all__ = ["LOG_COLUMNS", "TaskTrainer", "derived_seed", "training_arguments"]

LOG_COLUMNS = ["task_index", "task", "step", "loss", "task_loss", "penalty", "gate_entropy", "learning_rate"]


def derived_seed(seed: int, *path: int) -> int:
    """Return a 31-bit seed for one purpose (such as one task) of a run, independent of the others."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0] >> 1)


def training_arguments(
    options: TrainingOptions, *, device: torch.device, seed: int, scratch: Path
) -> TrainingArguments:
    """Return the Trainer's arguments for one task; nothing is written to ``scratch`` by the Trainer."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=options.steps_per_task,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bf16",
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    # One process drives one device: DataParallel would split the batch, but not the mask that the hooks use.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _StepCallback(TrainerCallback):
    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report one optimizer step."""
        self.on_step()


class TaskTrainer(Trainer):
    """Trains the active adapter on one task with one method and keeps a log by step.

    Args:
        model: PEFT model with the method's adapter.
        method: the continual-learning method.
        data: the task's encoded training samples.
        options: how to train.
        seed: seed of this task.
        device: where to train.
        pad_token_id: id that fills padded positions.
        scratch: a folder that exists; the Trainer insists on one.
        on_step: called after every optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        data: EncodedTask,
        *,
        options: TrainingOptions,
        seed: int,
        device: torch.device,
        pad_token_id: int,
        scratch: Path,
        on_step: Callable[[], None],
    ) -> None:
        super().__init__(
            model=model,
            args=training_arguments(options, device=device, seed=seed, scratch=scratch),
            train_dataset=data,
            data_collator=TrainingCollator(pad_token_id),
            callbacks=[_StepCallback(on_step)],
        )
        self.remove_callback(PrinterCallback)
        self.method = method
        self._rows: list[dict[str, Tensor | float]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the task loss plus the method's penalty; both and the gate entropy are logged."""
        self.method.begin_step(model, self.state.global_step / self.args.max_steps)
        mask = inputs["attention_mask"]
        with self.method.observing(model, mask), _gate_entropy(model, mask) as entropies:
            task_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        parts = [part for part in (load_balance_loss(model), self.method.penalty(model)) if part is not None]
        penalty = torch.stack(parts).sum() if parts else torch.zeros_like(task_loss)
        loss = task_loss + penalty if parts else task_loss
        self._rows.append(
            {
                "step": float(self.state.global_step + 1),
                "loss": loss.detach(),
                "task_loss": task_loss.detach(),
                "penalty": penalty.detach(),
                "gate_entropy": torch.stack(entropies).mean() if entropies else torch.full_like(task_loss, math.nan),
                "learning_rate": self._get_learning_rate(),
            }
        )
        return (loss, outputs) if return_outputs else loss

    def log_frame(self, task_index: int, task: str) -> pd.DataFrame:
        """Return the log of the task, one row per forward (columns: ``LOG_COLUMNS``).

        Raises:
            DriftLensError: a loss was not finite.
        """
        frame = pd.DataFrame([{key: float(value) for key, value in row.items()} for row in self._rows])
        frame["step"] = frame["step"].astype("int64")
        broken = frame.loc[~np.isfinite(frame["loss"]), "step"]
        if len(broken):
            raise DriftLensError(
                f"The loss of task {task!r} is no longer finite from step {broken.iloc[0]} of {len(frame)} on. What "
                "was finished before this task is kept. Lower training.learning_rate, or set training.max_grad_norm."
            )
        frame.insert(0, "task_index", task_index)
        frame.insert(1, "task", task)
        return frame[LOG_COLUMNS]


@contextmanager
def _gate_entropy(model: nn.Module, token_mask: Tensor) -> Iterator[list[Tensor]]:
    """Collect each site's mean normalised gate entropy over real tokens; single-expert sites give nothing."""
    values: list[Tensor] = []
    weight = (token_mask / token_mask.sum()).flatten()

    def hook(_module: nn.Module, _args: Any, gate: Tensor) -> None:
        if gate.shape[-1] < 2:
            return
        with torch.no_grad():
            # Some decoders (OPT) hand [batch * n, d] to their feed-forward layers.
            entropy = torch.special.entr(gate.detach().float()).sum(dim=-1).flatten()
            values.append((entropy * weight).sum() / math.log(gate.shape[-1]))

    handles = []
    try:
        for _, site in iter_sites(model):
            handles += [
                site.moe_lora_gate[name].register_forward_hook(hook)
                for name in site.active_adapters
                if name in site.moe_lora_gate
            ]
        yield values
    finally:
        for handle in handles:
            handle.remove()
