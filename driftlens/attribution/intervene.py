"""Exchanging parts of sites between two checkpoints while the model runs.

Every site's module keeps its place and its base module; only what the adapter adds to the base output is replaced.
The rest of the model, the layers in between included, runs as always on what the exchanged sites hand on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from driftlens.attribution.pairs import Answers, LoadedPair, SitePair
from driftlens.errors import SiteError

__all__ = ["Book", "Switchboard"]

Mask = NDArray[np.bool_] | bool

Book = Callable[[int, Answers, Tensor], None]
"""Called in the backward pass as ``book(site number, answers, dL/dy [n, d_out])``."""


class Switchboard:
    """Hooks on every site of a pair; a context manager, and the model is as before when it is left.

    On entering, every site computes as the current checkpoint, bit for bit. `swap` exchanges router and experts by
    site, `path` puts all sites on the straight line between the two checkpoints.

    Args:
        loaded: the two checkpoints.

    Raises:
        SiteError: in a forward, if a site's base module did not run before the site's output was due.
    """

    def __init__(self, loaded: LoadedPair) -> None:
        self._loaded, self._pairs = loaded, loaded.pairs
        self._handles: list[RemovableHandle] = []
        self._base: dict[int, Tensor] = {}
        self._alpha: float | None = None
        self._book: Book | None = None
        self._router = self._experts = np.zeros(len(self._pairs), dtype=np.bool_)

    def __enter__(self) -> Switchboard:
        for number, pair in enumerate(self._pairs):
            base = next(point.module for point in pair.current.points if point.part == "base")
            self._handles += [
                base.register_forward_hook(self._keep(number)),
                pair.current.module.register_forward_hook(self._replace(number, pair), with_kwargs=True),
            ]
        self.swap(False, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._base.clear()

    def swap(self, router: Mask, experts: Mask) -> None:
        """Choose the parameters of every site.

        Args:
            router: [sites] or one for all: True takes the anchor's gate. A gate that is computed from A (pathway
                energy) is then computed from the anchor's A, while the outputs stay with ``experts``.
            experts: likewise for A and B as they make the outputs.
        """
        self._alpha = self._book = None
        count = len(self._pairs)
        self._router, self._experts = (np.broadcast_to(np.asarray(m, np.bool_), count) for m in (router, experts))

    def path(self, alpha: float, book: Book | None = None) -> None:
        """Put every site at u = (1 - alpha) u_anchor(h) + alpha u_current(h), both on the live input h.

        Args:
            alpha: 0 is the anchor's update, 1 the current one.
            book: told the gradient at every site's output whenever a backward pass reaches it.
        """
        self._alpha, self._book = alpha, book

    def _keep(self, number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._base[number] = output

        return hook

    def _replace(self, number: int, pair: SitePair) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            base = self._base.pop(number, None)
            if base is None:
                raise SiteError(f"The base module of site {pair.info.name} did not run, so its output is not known.")
            h = args[0] if args else next(iter(kwargs.values()))
            if self._alpha is not None:
                return self._on_path(number, pair, h, base)
            old_router, old_experts = bool(self._router[number]), bool(self._experts[number])
            if not old_router and not old_experts:
                return None  # the module's own output, bit for bit
            answers = pair.answers(h.reshape(-1, h.shape[-1]))
            gated = answers.gated(0 if old_router else 1, 0 if old_experts else 1, pair.product).flatten(-2)
            half = gated.shape[-1]
            b = pair.outputs[:, :half] if old_experts else pair.outputs[:, half:]
            return self._add(base, linear(gated, b))

        return hook

    def _on_path(self, number: int, pair: SitePair, h: Tensor, base: Tensor) -> Tensor:
        answers, alpha, book = pair.answers(h.reshape(-1, h.shape[-1])), self._alpha, self._book
        assert alpha is not None
        parts = ((1 - alpha) * answers.gated(0, 0, pair.product), alpha * answers.gated(1, 1, pair.product))
        output = self._add(base, linear(torch.cat([part.flatten(-2) for part in parts], dim=-1), pair.outputs))
        if book is not None:
            if not output.requires_grad:
                output.requires_grad_()  # the lowest site: everything below it is frozen
            kept = Answers(*(part.detach() for part in answers))

            def booked(grad: Float[Tensor, "... d_out"]) -> None:
                book(number, kept, grad.reshape(-1, grad.shape[-1]))

            output.register_hook(booked)  # type: ignore[no-untyped-call]  # torch has no types for it
        return output

    @staticmethod
    def _add(base: Tensor, update: Float[Tensor, "n d_out"]) -> Tensor:
        return (base + update.reshape(base.shape)).to(base.dtype)
