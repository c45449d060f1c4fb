"""The one context manager through which DriftLens hooks a model.

Hooks only look: they return nothing, so outputs stay bit-equal. They count only while a forward of the
*root* model is open. A gradient-checkpointed layer that runs again during backward therefore does not
count: backward is not inside the root's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from driftlens.errors import SiteError

__all__ = ["HookPoint", "Hooks", "count_hooks"]


@dataclass(frozen=True)
class HookPoint:
    """A module whose forward is observed.

    Attributes:
        site: name of the site that the module belongs to (used in messages).
        part: which part of the site it is, for example ``"gate"`` or ``"base"``.
        module: the module itself.
        when: says whether a firing counts; None if all do. For modules that also run in a preliminary pass inside
            the root's forward.
    """

    site: str
    part: str
    module: nn.Module
    when: Callable[[], bool] | None = None


class Hooks:
    """Hooks on a set of points, present exactly while the context is open.

    Entering the same object again while it is open adds no second set of hooks; leaving removes them at the
    outermost level, after success, exception and KeyboardInterrupt alike. Other people's hooks are never touched.

    Args:
        root: the model whose forward is one *pass* (for a PEFT model, the wrapped base model).
        points: what to observe; every point must fire exactly once per pass.
        on_fire: called as ``on_fire(index, args, output)`` when point number ``index`` fired inside a pass; ``args``
            are the positional arguments, then the values of keyword arguments in call order.
        on_pass: called after each complete pass, when every point has fired.

    Raises:
        SiteError: on the way out of the root's forward, if a point did not fire or fired more than once.
    """

    def __init__(
        self,
        root: nn.Module,
        points: Sequence[HookPoint],
        on_fire: Callable[[int, tuple[Any, ...], Any], None],
        on_pass: Callable[[], None] | None = None,
    ) -> None:
        self.root, self.points = root, tuple(points)
        self.passes = 0
        self._on_fire, self._on_pass = on_fire, on_pass
        self._handles: list[RemovableHandle] = []
        self._depth = 0
        self._open = False
        self._fired = [0] * len(self.points)

    def __enter__(self) -> Hooks:
        self._depth += 1
        if self._depth > 1:
            return self
        try:
            self._handles.append(self.root.register_forward_pre_hook(self._begin))
            for index, point in enumerate(self.points):
                self._handles.append(point.module.register_forward_hook(self._observer(index), with_kwargs=True))
            self._handles.append(self.root.register_forward_hook(self._end))
        except BaseException:
            # __exit__ is not called when __enter__ fails, and an interrupt may strike between two registrations
            self._depth = 0
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self.remove()

    def remove(self) -> None:
        """Remove all hooks of this object; doing it again changes nothing."""
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()
        self._open = False

    def _observer(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        when = self.points[index].when

        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._open and (when is None or when()):
                self._fired[index] += 1
                if self._fired[index] == 1:
                    self._on_fire(index, (*args, *kwargs.values()), output)

        return observe

    def _begin(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        # An earlier pass that ended in an exception left counts behind: a new pass starts from nothing.
        self._fired = [0] * len(self.points)
        self._open = True

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if not self._open:
            return
        self._open = False
        self._check()
        self.passes += 1
        if self._on_pass is not None:
            self._on_pass()

    def _check(self) -> None:
        silent = [p for p, n in zip(self.points, self._fired, strict=True) if n == 0]
        repeated = [(p, n) for p, n in zip(self.points, self._fired, strict=True) if n > 1]
        if silent:
            names = ", ".join(f"{p.site} ({p.part})" for p in silent[:5])
            more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
            raise SiteError(
                f"{len(silent)} of {len(self.points)} observed modules did not fire in a forward: {names}{more}. "
                "A site must run in every forward. Likely causes: the adapter is disabled, the layer is skipped for "
                "this input, or the model was compiled before the hooks were set."
            )
        if repeated:
            names = ", ".join(f"{p.site} ({p.part}, {n} times)" for p, n in repeated[:5])
            raise SiteError(
                f"{len(repeated)} of {len(self.points)} observed modules fired more than once in one forward: {names}. "
                "A site must run exactly once per forward; modules shared between layers cannot be recorded."
            )


def count_hooks(model: nn.Module) -> int:
    """Return how many forward and forward-pre hooks are set on ``model`` and its submodules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
