"""The mixtures that PEFT ships: X-LoRA, Poly and Lily, each recorded with the weights that its layer really uses.

* X-LoRA (arXiv:2402.07148): a classifier on the last hidden state of a preliminary pass weighs trained adapters per
  token and layer; u = s sum_e g_e B_e A_e h with s = scaling * ``global_scaling_weight``. Only the second, real pass
  is recorded. The gate is no function of the layer's input. Without a softmax the scalings may be negative; such
  models are left out.
* Poly (arXiv:2202.13914): a table of logits per task, sigmoid, normalised over skills within each of Q splits of the
  layer's width; both factors are mixed before they are applied (``product_of_sums``):
  u = (1/r) (sum_j g_j B_j)(sum_i g_i A_i h). Expert q*skills + k is skill k of split q: its A reads the q-th block
  of the input, its B writes the q-th block of the output, and both are zero elsewhere. Gate rows sum to Q.
  The model needs ``task_ids`` in every forward.
* Lily (arXiv:2407.09946): u = s (sum_e g_e B_e) A h with one A for all experts and g the softmax of a router on A h,
  averaged over all positions of the batch, padding included. That average is what the layer uses and what is
  recorded: all tokens of a batch have one gate, and it depends on how the probes are batched. Record with
  ``batch_size=1`` for gates that depend on one sample only. Its router reads z, so that the router rows of
  `SiteWeights` are W_router A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lily.layer import LilyLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.poly.layer import PolyLayer
from peft.tuners.xlora.layer import XLoraLayer, XLoraLinearLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from driftlens.errors import SiteError
from driftlens.recording.families.peft_lora import LoraExperts, Skipped, active_adapters, tuned_modules, xlora_layer
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, SiteWeights, layer_index
from driftlens.store import SiteInfo

__all__ = ["LilyFamily", "PolyFamily", "XLoraFamily"]


class XLoraFamily:
    """X-LoRA: trained LoRA adapters weighed per token by a classifier."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield the linear layers of an X-LoRA model.

        Embeddings, convolutions, and scalings without a softmax are left out with one warning per reason.

        Raises:
            SiteError: an adapter is merged into the base weights.
        """
        skipped = Skipped()
        for name, layer in tuned_modules(model):
            mixture = xlora_layer(layer) if isinstance(layer, LoraLayer) else None
            if mixture is None or mixture.adapters_disabled:
                continue
            if not isinstance(mixture, XLoraLinearLayer):
                skipped.add("is not a linear layer", name)
                continue
            if not (mixture.config.enable_softmax or mixture.config.enable_softmax_topk):
                skipped.add("is weighed by X-LoRA scalings without a softmax: signed numbers, not a gate", name)
                continue
            adapters = active_adapters(name, layer, list(cast(Any, layer).lora_A))
            if adapters:
                yield _xlora_site(name, layer, mixture, adapters)
        skipped.warn()


def _xlora_site(name: str, layer: Any, mixture: XLoraLayer, adapters: list[str]) -> Site:
    experts, config = LoraExperts(layer, adapters), mixture.config
    # The layer weighs adapter e by column e of the scalings, counted over all active adapters.
    columns = [layer.active_adapters.index(adapter) for adapter in adapters]

    def read(part: str, args: tuple[Any, ...], output: Any) -> Mapping[str, Tensor]:
        if part == "base":
            return {"base_norm": torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)}
        used = cast(Any, mixture.model).internal_xlora_scalings
        if not any(arg is used for arg in args if arg is not None):
            raise SiteError(
                f"X-LoRA's site {name} ran without the scalings of its classifier. Call the PEFT model itself, not the "
                "model inside it."
            )
        h = args[0].detach()
        return {"gate": mixture.get_maybe_topk_scalings(used)[..., columns].detach(), "pathway": experts.pathway(h)}

    def weights() -> SiteWeights:
        a, b = experts.weights()
        return SiteWeights(a=a, b=b, router=None)

    top_k = int(config.top_k_lora or 0)
    info = SiteInfo(
        name=name,
        layer=layer_index(name),
        kind=name.rsplit(".", 1)[-1],
        num_experts=len(adapters),
        rank=experts.rank,
        d_in=int(layer.in_features),
        d_out=int(layer.out_features),
        scaling=experts.scaling * float(config.global_scaling_weight),
        gate="topk" if top_k else "softmax",
        top_k=top_k,
        family="peft-xlora",
        # softmax over all and then top-k leaves rows that sum to less
        normalised=config.enable_softmax_topk or not top_k,
    )

    def is_real() -> bool:
        # for its preliminary pass X-LoRA switches the layers off (their forward does not look)
        return not layer.disable_adapters

    points = (HookPoint(name, "layer", layer, is_real), HookPoint(name, "base", layer.base_layer, is_real))
    return Site(info, layer, points, read, weights)


class PolyFamily:
    """Poly: skills mixed by a table of weights per task."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield the Poly layers whose adapter is active.

        Raises:
            SiteError: several adapters are active at one layer.
        """
        for name, layer in tuned_modules(model):
            if isinstance(layer, PolyLayer):
                adapter = _one_adapter(name, layer, list(layer.poly_lora_A))
                if adapter is not None:
                    yield _poly_site(name, layer, adapter)


def _one_adapter(name: str, layer: Any, owned: list[str]) -> str | None:
    adapters = active_adapters(name, layer, owned)
    if len(adapters) > 1:
        raise SiteError(
            f"Site {name} has {len(adapters)} active adapters ({', '.join(adapters)}), each with a gate of its own; a "
            "recording is of one. Choose it with model.set_adapter(...)."
        )
    return adapters[0] if adapters else None


def _poly_site(name: str, layer: Any, adapter: str) -> Site:
    splits, skills, rank = layer.n_splits[adapter], layer.n_skills[adapter], layer.r[adapter]

    def factors() -> tuple[Float[Tensor, "E r d_in"], Float[Tensor, "E d_out r"]]:
        a, b = layer.poly_lora_A[adapter].detach(), layer.poly_lora_B[adapter].detach()
        a_full = a.new_zeros(splits, skills, rank, splits, a.shape[2])
        b_full = b.new_zeros(splits, skills, splits, b.shape[3], rank)
        for q in range(splits):
            a_full[q, :, :, q], b_full[q, :, q] = a[q].mT, b[q].mT
        return a_full.reshape(splits * skills, rank, -1), b_full.reshape(splits * skills, -1, rank)

    def read(part: str, args: tuple[Any, ...], output: Any) -> Mapping[str, Tensor]:
        if part == "base":
            return {"base_norm": torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)}
        h = args[-1].detach()  # router(task_ids=..., input_ids=x)
        a = layer.poly_lora_A[adapter].detach()
        z = torch.einsum("btqd,qkdr->btqkr", h.to(a.dtype).unflatten(-1, (splits, -1)), a).flatten(2, 3)
        return {"gate": output.detach().flatten(1).unsqueeze(1).expand(z.shape[:-1]), "pathway": z}

    def weights() -> SiteWeights:
        a, b = factors()
        return SiteWeights(a=a, b=b, router=None)

    info = SiteInfo(
        name=name,
        layer=layer_index(name),
        kind=name.rsplit(".", 1)[-1],
        num_experts=splits * skills,
        rank=rank,
        d_in=int(layer.in_features),
        d_out=int(layer.out_features),
        scaling=1.0 / rank,
        gate="task",
        family="peft-poly",
        semantics="product_of_sums",
        normalised=splits == 1,
    )
    points = (HookPoint(name, "router", layer.poly_router[adapter]), HookPoint(name, "base", layer.base_layer))
    return Site(info, layer, points, read, weights)


class LilyFamily:
    """Lily: one A and several B per layer, shared between layers, weighed by a router on A h."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield the Lily layers whose adapter is active.

        Raises:
            SiteError: several adapters are active at one layer.
        """
        for name, layer in tuned_modules(model):
            if isinstance(layer, LilyLayer):
                adapter = _one_adapter(name, layer, list(layer.lily_A))
                if adapter is not None:
                    yield _lily_site(name, layer, adapter)


def _lily_site(name: str, layer: Any, adapter: str) -> Site:
    count, rank = int(layer.num_B[adapter]), int(layer.r[adapter])

    def read(part: str, args: tuple[Any, ...], output: Any) -> Mapping[str, Tensor]:
        if part == "base":
            return {"base_norm": torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)}
        z = args[0].detach().unsqueeze(-2)
        gate = output.detach().softmax(-1).flatten(0, -2).mean(0)
        return {"gate": gate.expand(output.shape), "pathway": z.expand(*output.shape, rank)}

    def weights() -> SiteWeights:
        a, b, router = (part[adapter].weight.detach() for part in (layer.lily_A, layer.lily_B, layer.lily_router))
        return SiteWeights(
            a=a.expand(count, *a.shape),
            b=b.reshape(count, rank, -1).mT,
            router=linear(router, a.T),
        )

    info = SiteInfo(
        name=name,
        layer=layer_index(name),
        kind=name.rsplit(".", 1)[-1],
        num_experts=count,
        rank=rank,
        d_in=int(layer.in_features),
        d_out=int(layer.out_features),
        scaling=float(layer.scaling[adapter]),
        gate="softmax",
        family="peft-lily",
    )
    # A and B are shared between layers and would fire several times; the router is the layer's own.
    points = (HookPoint(name, "router", layer.lily_router[adapter]), HookPoint(name, "base", layer.base_layer))
    return Site(info, layer, points, read, weights)
