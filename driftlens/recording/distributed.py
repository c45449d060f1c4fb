"""Recording by several processes: each runs its share of the batches, the first one writes the file.

Batches are cut as one process would cut them and dealt out in turn, and the first process adds and appends them in
their old order. On equal machines with equal threads the file is therefore the one that a single process writes, byte
for byte. Everything that may fail is a *step*: either all processes finish it or all raise.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from driftlens.errors import ConfigError, DriftLensError

__all__ = ["ALONE", "Ranks"]

T = TypeVar("T")


class Ranks:
    """The processes that record together.

    Args:
        rank: number of this process; process 0 is the one that writes.
        size: how many there are.
        group: process group with a backend for host memory; None where there is one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @classmethod
    def joined(cls, timeout_seconds: float = 1800.0) -> Ranks:
        """Return the processes of the default process group; one alone where there is none.

        Every process must call this. Under `accelerate launch` or `torchrun` the default group is made if the program
        has not made it yet.

        Args:
            timeout_seconds: how long to wait for a process that does not answer; must exceed the slowest batch.

        Raises:
            ConfigError: several processes were launched, and this torch cannot join them.
        """
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if not dist.is_available():
            if launched > 1:
                raise ConfigError("Several processes were launched, but this build of torch has no torch.distributed.")
            return cls()
        timeout = datetime.timedelta(seconds=timeout_seconds)
        if not dist.is_initialized():
            if launched < 2:
                return cls()
            dist.init_process_group("gloo", timeout=timeout)
        if dist.get_world_size() < 2:
            return cls()
        # Objects travel through host memory whatever backend trains the model.
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=timeout))

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def step(self, what: str, call: Callable[[], T]) -> list[T]:
        """Run ``call`` in every process; all finish it, or all raise.

        Args:
            what: what is being done, for the message.
            call: this process's part; its result must be picklable.

        Returns:
            In the main process the results in order of rank; elsewhere an empty list.

        Raises:
            BaseException: whatever ``call`` raised here.
            DriftLensError: it failed in another process (the message says where and why), or one is gone or silent.
        """
        if self.size == 1:
            return [call()]
        own: BaseException | None = None
        answer: tuple[str | None, T | None]
        try:
            answer = (None, call())
        except BaseException as error:  # the others must hear of it before it is raised below
            own, answer = error, (f"{type(error).__name__}: {error}", None)
        try:
            answers = self._gather(answer)
            verdict = self._broadcast(_first_failure(answers))
        except RuntimeError as error:  # what torch.distributed raises for lost peers and timeouts
            if own is not None:
                raise own from None
            raise DriftLensError(
                f"Another process was lost while {what} ({str(error).strip().splitlines()[0]:.200}). Nothing was "
                f"written; look at the messages of the other {self.size - 1} process(es), then start again."
            ) from error
        if own is not None:
            raise own
        if verdict is not None:
            rank, reason = verdict
            raise DriftLensError(
                f"Process {rank} of {self.size} failed while {what}: {reason} All processes stop; nothing was written."
            )
        return [value for _, value in answers if value is not None] if self.main else []

    def from_main(self, what: str, call: Callable[[], T]) -> T:
        """Run ``call`` in the main process and return its result everywhere; if it fails, all raise (see `step`)."""
        results = self.step(what, lambda: call() if self.main else None)
        return self._broadcast(results[0] if self.main else None) if self.size > 1 else results[0]  # type: ignore[return-value]

    def agree(self, what: str, value: str) -> None:
        """Raise ConfigError everywhere unless all processes give the same ``value``."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        other = next((rank for rank, given in enumerate(values) if given != values[0]), None)
        if other is not None:
            raise ConfigError(
                f"The processes do not record the same: {what} of process {other} differs from that of process 0. Give "
                "every process the same model, checkpoint, probes and settings."
            )

    def _gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values if self.main else None, dst=0, group=self._group)
        return values if self.main else []

    def _broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]


ALONE = Ranks()
"""One process."""


def _first_failure(answers: Sequence[tuple[str | None, Any]]) -> tuple[int, str] | None:
    return next(((rank, reason) for rank, (reason, _) in enumerate(answers) if reason is not None), None)
