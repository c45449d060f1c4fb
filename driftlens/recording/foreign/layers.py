"""A linear layer with foreign experts: computes the evaluation forward of each codebase, and shows its gate.

With experts A_e [r, d_in], B_e [d_out, r], pathways z_e = A_e h and gates g, the layer adds to W h + b

    sum_gBA           s sum_e g_e B_e z_e
    product_of_sums   s (sum_j g_j B_j)(sum_i g_i z_i)

All methods differ in the gate alone: a per-token router, SAME's router over a sample, or fixed weights per expert
(ones up to the current task, or weights that come from CLIP features and are the same for all tokens).
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import linear

from driftlens.errors import SiteError

__all__ = ["FixedGate", "ForeignGate", "ForeignLinear", "Padding", "RouterGate", "SameGate"]

_SAME_TOP_K = 2


class Padding:
    """Which tokens of the running forward are padding; one object is shared by a model and its gates."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def tokens(self, h: Float[Tensor, "B T d"]) -> Bool[Tensor, "B T"]:
        """Return which tokens of ``h`` are real.

        Raises:
            SiteError: the forward's attention mask does not cover them.
        """
        if self.mask is None:
            return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        mask = self.mask
        if mask.dim() != 2 or len(mask) != len(h) or mask.shape[1] < h.shape[1]:
            raise SiteError(
                f"SAME's gate averages over the tokens of a sample and needs a mask [batch, length] of them; found "
                f"attention_mask {list(mask.shape)} for an input {list(h.shape)}. Give a plain 2-D attention_mask."
            )
        # with a cache the mask also covers what came before
        return mask[:, -h.shape[1] :].to(h.device) > 0


class ForeignGate(nn.Module):
    """Gate of a foreign site.

    Attributes:
        kind: what recordings call it.
        top_k: how many experts it keeps; 0 for all.
        normalised: whether its rows sum to 1.
        per_token: whether the gate of a token follows from that token's input alone.
    """

    kind: str
    top_k = 0
    normalised = True
    per_token = True

    @property
    def router(self) -> Float[Tensor, "E d_in"] | None:
        """The rows of the router; None for gates that own none."""
        return None

    def forward(self, h: Float[Tensor, "... d_in"], z: Float[Tensor, "... E r"]) -> Float[Tensor, "... E"]:
        """Return the weight of every expert for every token."""
        raise NotImplementedError


class RouterGate(ForeignGate):
    """softmax(R h) per token, without noise, bias or top-k (CoIN, MCITlib MoELoRA and CL-MoE, Prism moelora)."""

    kind = "softmax"

    def __init__(self, weight: Float[Tensor, "E d_in"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def router(self) -> Float[Tensor, "E d_in"] | None:
        """The rows of the router."""
        return self.weight

    def forward(self, h: Float[Tensor, "... d_in"], z: Float[Tensor, "... E r"]) -> Float[Tensor, "... E"]:
        """Return softmax(R h)."""
        return torch.softmax(linear(h, self.weight), dim=-1)


class SameGate(RouterGate):
    """Prism SAME at evaluation: p = mean_t softmax(R h_t / E), times prototypes, normalised, top 2, normalised.

    The release takes the mean over all tokens of a batch, padding included, so that its results depend on what else is
    in the batch. Here every sample is routed alone and padding is left out: what the release does at batch size 1.

    Args:
        weight: the router.
        prototypes: m_e, how near the sample is to the prototype of expert e's task.
        kind: what recordings call the gate.
        padding: says which tokens are real.
    """

    top_k = _SAME_TOP_K
    per_token = False

    def __init__(
        self, weight: Float[Tensor, "E d_in"], prototypes: Float[Tensor, " E"], kind: str, padding: Padding
    ) -> None:
        super().__init__(weight)
        self.kind = kind
        self.prototypes = nn.Parameter(prototypes, requires_grad=False)
        self._padding = padding

    def forward(self, h: Float[Tensor, "B T d_in"], z: Float[Tensor, "B T E r"]) -> Float[Tensor, "B T E"]:
        """Return one gate per sample, repeated for all of its tokens."""
        if h.dim() != 3:
            raise SiteError(f"SAME's gate needs inputs [batch, length, d_in]; found {list(h.shape)}.")
        real = self._padding.tokens(h).to(h.dtype)[..., None]
        routed = torch.softmax(linear(h, self.weight) / len(self.weight), dim=-1)
        mean = (routed * real).sum(1) / real.sum(1).clamp_min(1.0)
        mixed = _normalise(mean * self.prototypes)
        kept = mixed.topk(min(self.top_k, mixed.shape[-1]), dim=-1)
        gate = _normalise(torch.zeros_like(mixed).scatter(-1, kept.indices, kept.values))
        return gate[:, None].expand(-1, h.shape[1], -1)


class FixedGate(ForeignGate):
    """The same weights for all tokens.

    Args:
        weights: g_e.
        kind: what recordings call the gate.
        normalised: whether the weights sum to 1 by construction.
    """

    def __init__(self, weights: Float[Tensor, " E"], kind: str, *, normalised: bool) -> None:
        super().__init__()
        self.kind, self.normalised = kind, normalised
        self.weights = nn.Parameter(weights, requires_grad=False)

    def forward(self, h: Float[Tensor, "... d_in"], z: Float[Tensor, "... E r"]) -> Float[Tensor, "... E"]:
        """Return the weights, repeated for all tokens."""
        return self.weights.expand(*h.shape[:-1], -1)


class ForeignLinear(nn.Module):
    """A linear layer of the base model with the experts of a foreign checkpoint, for evaluation.

    Args:
        base_layer: the layer itself; it runs exactly once per forward.
        a: down-projections of the experts.
        b: up-projections.
        gate: gives g; it runs exactly once per forward, on the layer's input and the pathways.
        scaling: s = lora_alpha over the rank of all experts together.
        product: whether A and B are mixed apart (product_of_sums) or expert by expert (sum_gBA).
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        a: Float[Tensor, "E r d_in"],
        b: Float[Tensor, "E d_out r"],
        gate: ForeignGate,
        *,
        scaling: float,
        product: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.num_experts, self.rank = a.shape[:2]
        self.scaling, self.product = scaling, product
        self.base_layer, self.gate = base_layer, gate
        self.lora_a = nn.Parameter(a.flatten(0, 1), requires_grad=False)
        # expert e owns columns e*r .. (e+1)*r
        self.lora_b = nn.Parameter(b.permute(1, 0, 2).flatten(1), requires_grad=False)

    @property
    def a(self) -> Float[Tensor, "E r d_in"]:
        """Down-projections by expert."""
        return self.lora_a.reshape(self.num_experts, self.rank, -1)

    @property
    def b(self) -> Float[Tensor, "E d_out r"]:
        """Up-projections by expert."""
        return self.lora_b.reshape(-1, self.num_experts, self.rank).permute(1, 0, 2)

    def pathway(self, h: Float[Tensor, "... d_in"]) -> Float[Tensor, "... E r"]:
        """Return z_e = A_e h."""
        return linear(h, self.lora_a).reshape(*h.shape[:-1], self.num_experts, self.rank)

    def forward(self, h: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return W h + b plus what the experts add."""
        z = self.pathway(h)
        gate = cast(Tensor, self.gate(h, z))[..., None]
        inner = (gate * z).sum(-2, keepdim=True) if self.product else z
        return cast(Tensor, self.base_layer(h)) + linear((gate * inner).flatten(-2), self.lora_b) * self.scaling


def _normalise(weights: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
