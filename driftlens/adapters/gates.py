"""Gates: how much each LoRA expert of a site contributes to each token.

A gate maps the site's input and its pathway activations to weights that sum to 1 over the experts. It is a
submodule of the layer, so an ordinary forward hook on it sees the weights that were really used. Scores and
weights are float32 whatever the dtype of the model, also under autocast: bfloat16 keeps 8 bits, and two experts
whose weights differ by less than 0.4 % would become equal.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, one_hot

from driftlens.registry import Registry

if TYPE_CHECKING:
    from driftlens.adapters.config import MoELoraConfig

__all__ = ["GATES", "EnergyGate", "Gate", "SoftmaxGate", "TopKGate"]


class Gate(nn.Module, ABC):
    """Base class of all gates: scores, then a softmax over the experts that are not left out.

    A new gate overrides ``scores`` (and ``left_out`` if it is sparse, and ``problems`` if it reads settings of its
    own), and is added with ``GATES.register(name, cls)``; a gate that is no softmax overrides ``forward``.

    Args:
        d_in: width of the site's input.
        config: the adapter's configuration.

    Attributes:
        kind: the name under which the gate is registered.
        temperature: the softmax temperature tau, > 0.
        balance_loss: load-balance loss of the last training forward, None when ``load_balance_coef`` is 0.
    """

    def __init__(self, d_in: int, config: MoELoraConfig) -> None:
        super().__init__()
        self.kind = config.gate
        self.d_in = d_in
        self.num_experts = config.num_experts
        self.temperature = config.gate_temperature
        self.noise = config.router_noise
        self.balance_coef = config.load_balance_coef
        self.balance_loss: Tensor | None = None

    @classmethod
    def problems(cls, config: MoELoraConfig) -> list[str]:
        """Return one sentence for every setting of ``config`` that this gate cannot work with."""
        return []

    @abstractmethod
    def scores(self, h: Tensor, z: Tensor) -> Tensor:
        """Return float32 scores ``[..., E]`` before the temperature, from ``h [..., d_in]`` and ``z [..., E, r]``."""

    def left_out(self, scores: Tensor) -> Tensor | None:
        """Return the boolean mask ``[..., E]`` of the experts that get weight 0, or None if all are in use."""
        return None

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """Return the gate weights.

        Args:
            h: input of the site, ``[..., d_in]``.
            z: pathway activations ``A_e h`` before scaling, ``[..., E, r]``.

        Returns:
            float32 weights ``[..., E]`` in 0..1; every row sums to 1.
        """
        scores = self.scores(h, z)
        if self.temperature != 1.0:
            scores = scores / self.temperature
        if self.noise > 0.0 and self.training:
            scores = scores + self.noise * torch.randn_like(scores)
        left_out = self.left_out(scores)
        if self.balance_coef > 0.0 and self.training:
            self.balance_loss = _balance(scores, left_out)
        if left_out is not None:
            scores = scores.masked_fill(left_out, -math.inf)
        # Expert-first: a softmax over a few contiguous numbers takes up to eight times as long on a CPU.
        return torch.softmax(scores.movedim(-1, 0), dim=0).movedim(0, -1).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        # The loss of the last step hangs on its autograd graph, which can be neither copied nor pickled.
        return {**self.__dict__, "balance_loss": None}

    def extra_repr(self) -> str:
        """Describe the gate in the printed module tree."""
        return f"kind={self.kind!r}, num_experts={self.num_experts}, temperature={self.temperature}"


class SoftmaxGate(Gate):
    """Dense learned router: ``pi = softmax(W h / tau)``, as in MoELoRA (CoIN).

    ``weight [E, d_in]`` starts like the weight of a bias-free ``nn.Linear``.
    """

    def __init__(self, d_in: int, config: MoELoraConfig) -> None:
        super().__init__(d_in, config)
        self.layernorm = config.router_layernorm
        self.weight = nn.Parameter(torch.empty(config.num_experts, d_in))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def scores(self, h: Tensor, z: Tensor) -> Tensor:
        """Return ``W h``, or ``W LayerNorm(h)`` with ``router_layernorm``."""
        # Autocast would run this product in bfloat16; the context is entered only where it is needed.
        kind = h.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
            h = h.float()
            if self.layernorm:
                h = layer_norm(h, (self.d_in,))
            # Expert-first as well: a product with a few rows is faster than one with a few columns.
            scores = linear(self.weight.float(), h.reshape(-1, self.d_in))
        return scores.t().view(*h.shape[:-1], self.num_experts)


class TopKGate(SoftmaxGate):
    """Sparse learned router: softmax over the ``top_k`` highest scores, 0 elsewhere.

    This equals the full softmax renormalised over the chosen experts. Of equal scores the lower index wins, so
    that the choice is the same on every device.
    """

    def __init__(self, d_in: int, config: MoELoraConfig) -> None:
        super().__init__(d_in, config)
        self.top_k = config.top_k

    @classmethod
    def problems(cls, config: MoELoraConfig) -> list[str]:
        """Check ``top_k`` against the number of experts."""
        if 1 <= config.top_k <= config.num_experts:
            return []
        return [
            f"top_k={config.top_k} does not fit num_experts={config.num_experts}: "
            f"choose 1 to {config.num_experts}, or raise num_experts."
        ]

    def left_out(self, scores: Tensor) -> Tensor | None:
        """Return the mask of all but the ``top_k`` best experts of each token."""
        if self.top_k == self.num_experts:
            return None
        # topk() promises no order among equals; a stable sort does.
        order = torch.sort(scores.detach().contiguous(), dim=-1, descending=True, stable=True).indices
        return torch.ones_like(order, dtype=torch.bool).scatter_(-1, order[..., : self.top_k], False)


class EnergyGate(Gate):
    """Pathway energy: ``pi = softmax_e(||A_e h||^2 / (r tau))``, no parameters (PASs-MoE, Eq. 7)."""

    @classmethod
    def problems(cls, config: MoELoraConfig) -> list[str]:
        """Refuse router settings: this gate has no router."""
        if not config.router_layernorm:
            return []
        return ["router_layernorm=True has no effect on gate='energy', which has no router: set it to False."]

    def scores(self, h: Tensor, z: Tensor) -> Tensor:
        """Return the mean squared pathway activation of each expert."""
        return z.float().square().mean(dim=-1)


def _balance(scores: Tensor, left_out: Tensor | None) -> Tensor:
    """Return ``E sum_e f_e P_e`` (Switch Transformer, arXiv 2101.03961, Eq. 4): 1 when balanced, E when collapsed.

    f_e is expert e's share of the choices (the arg max of each token for a dense gate), P_e the mean softmax weight
    over all experts.
    """
    num_experts = scores.shape[-1]
    chosen = one_hot(scores.argmax(dim=-1), num_experts) if left_out is None else ~left_out
    counts = chosen.reshape(-1, num_experts).sum(dim=0).float()
    mean_weight = torch.softmax(scores, dim=-1).reshape(-1, num_experts).mean(dim=0)
    return num_experts * torch.dot(counts / counts.sum(), mean_weight)


GATES: Registry[type[Gate]] = Registry("gate", "driftlens.gates")
GATES.register("softmax", SoftmaxGate)
GATES.register("topk", TopKGate)
GATES.register("energy", EnergyGate)
