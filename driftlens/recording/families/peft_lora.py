"""LoRA layers of PEFT: pathways without a router, one expert per active adapter.

``lora.Linear`` and its quantised kin, on ``nn.Linear`` or ``Conv1D``. What a layer adds to its base module is

    y = base' + s sum_e B_e z_e,    z_e = A_e h,    gate 1 for every adapter,

where base' is everything that goes through no pathway. For plain LoRA and rsLoRA (which only differ in s) base' is
the base module's output. A bias on B (``lora_bias``) is the same for all tokens and belongs to base'. DoRA computes
(m / n) * (W h + s B A h) + bias with the magnitude m and n = the row norms of W + s B A, so that its pathways are
those of LoRA with m / n folded into B, and base' = (m / n) * W h + bias. ``base_norm`` is the norm of base'.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from peft.tuners.lora.variants import DoraLinearVariant, MiCALinearVariant
from peft.tuners.tuners_utils import BaseTuner
from peft.tuners.xlora.layer import XLoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from driftlens.errors import SiteError
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, SiteWeights, layer_index
from driftlens.store import SiteInfo

__all__ = [
    "LoraExperts",
    "PeftLoraFamily",
    "Skipped",
    "active_adapters",
    "check_unmixed",
    "tuned_modules",
    "xlora_layer",
]

_WRAPPERS = re.compile(r"(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|\.base_layer(?=\.|$))")


class PeftLoraFamily:
    """PEFT LoRA on linear layers: plain, rsLoRA, DoRA and MiCA; several active adapters are several experts."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield the LoRA layers that have an active adapter.

        Layers that LoRA adapts in another way (embeddings, convolutions, attention modules, variants with a
        forward of their own) are left out with one warning per reason.

        Raises:
            SiteError: an adapter is merged into the base weights, or adapters are active together that do not add up.
        """
        skipped = Skipped()
        for name, layer in tuned_modules(model):
            if not isinstance(layer, LoraLayer) or _is_elsewhere(layer):
                continue
            adapters = active_adapters(name, layer, [*layer.lora_A, *layer.lora_embedding_A])
            if not adapters:
                continue
            reason = _unsupported(layer, adapters)
            if reason:
                skipped.add(reason, name)
                continue
            if len(adapters) > 1 and any(_is_dora(layer, adapter) for adapter in adapters):
                raise SiteError(
                    f"Site {name} has {len(adapters)} active adapters ({', '.join(adapters)}), one of them DoRA, which "
                    "rescales what the others add. Record one at a time: choose it with model.set_adapter(...)."
                )
            yield _lora_site(name, layer, adapters)
        skipped.warn()


class Skipped:
    """Collects the modules that a family leaves out and says so once per reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        """Note that module ``name`` is left out because it ``reason`` (a verb phrase)."""
        self._names[reason].append(name)

    def warn(self) -> None:
        """Emit one ``UserWarning`` per reason."""
        for reason, names in self._names.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warnings.warn(
                f"Adapted modules that are not recorded, each of which {reason}: {', '.join(names[:3])}{more}.",
                stacklevel=4,
            )


class LoraExperts:
    """The active adapters of one LoRA layer as experts of one rank and one scaling.

    Smaller ranks are padded with rows of zeros in A and columns of zeros in B; other scalings than the first
    adapter's are folded into B. Neither changes an expert's output.

    Attributes:
        rank: the largest rank among the adapters.
        scaling: the scaling that all experts share.
    """

    def __init__(self, layer: LoraLayer, adapters: Sequence[str]) -> None:
        self.layer, self.adapters = layer, list(adapters)
        self.rank = max(layer.r[adapter] for adapter in adapters)
        scalings = [float(layer.scaling[adapter]) for adapter in adapters]
        self.scaling = next((value for value in scalings if value != 0.0), scalings[0])

    def pathway(self, h: Float[Tensor, "... d_in"]) -> Float[Tensor, "... E r"]:
        """Return z_e = A_e h, without dropout, as the layer in evaluation mode computes it."""
        per_expert = []
        for a in self._factors(self.layer.lora_A):
            z = linear(h.to(a.dtype), a)
            per_expert.append(pad(z, (0, self.rank - z.shape[-1])))
        return torch.stack(per_expert, dim=-2)

    def weights(self) -> tuple[Float[Tensor, "E r d_in"], Float[Tensor, "E d_out r"]]:
        """Return A and B as they are now."""
        a = [pad(a, (0, 0, 0, self.rank - a.shape[0])) for a in self._factors(self.layer.lora_A)]
        b = []
        for adapter, factor in zip(self.adapters, self._factors(self.layer.lora_B), strict=True):
            ratio = 1.0 if self.scaling == 0.0 else float(self.layer.scaling[adapter]) / self.scaling
            b.append(pad(factor if ratio == 1.0 else factor * ratio, (0, self.rank - factor.shape[1])))
        return torch.stack(a), torch.stack(b)

    def _factors(self, parts: nn.ModuleDict) -> list[Tensor]:
        return [cast(Tensor, parts[adapter].weight).detach() for adapter in self.adapters]


def tuned_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module below PEFT's wrappers with its path inside the base model."""
    root = next((cast(nn.Module, module.model) for module in model.modules() if isinstance(module, BaseTuner)), model)
    for name, module in root.named_modules():
        yield _WRAPPERS.sub("", name), module


def active_adapters(name: str, layer: Any, owned: Sequence[str]) -> list[str]:
    """Return which of the adapters that ``layer`` owns act in a forward now, in the order in which they act.

    Raises:
        SiteError: an adapter is merged into the base weights.
    """
    if layer.disable_adapters:
        return []
    if layer.merged:
        raise SiteError(
            f"Adapter {', '.join(layer.merged_adapters)} of site {name} is merged into the base weights, so that no "
            "pathway runs. Call model.unmerge_adapter() first, or load the checkpoint again."
        )
    return [adapter for adapter in layer.active_adapters if adapter in owned]


def xlora_layer(layer: nn.Module) -> XLoraLayer | None:
    """Return the X-LoRA mixture that took over the forward of a LoRA layer, if one did."""
    owner = getattr(layer.forward, "__self__", None)
    return owner if isinstance(owner, XLoraLayer) else None


def check_unmixed(name: str, layer: nn.Module) -> None:
    """Raise SiteError while PEFT feeds ``layer`` a batch whose samples use different adapters."""
    if any(getattr(hook, "keywords", {}).get("adapter_names") for hook in layer._forward_pre_hooks.values()):
        raise SiteError(
            f"Site {name} ran with adapter_names: every sample used its own adapter, and there is no common gate. "
            "Record one adapter at a time: choose it with model.set_adapter(...)."
        )


def _is_elsewhere(layer: Any) -> bool:
    # LoRA layers that are sites of other families
    return isinstance(layer, ParamWrapper) or xlora_layer(layer) is not None


def _unsupported(layer: LoraLayer, adapters: Sequence[str]) -> str | None:
    kind = type(layer).__name__
    if isinstance(layer, Embedding):
        return "looks up rows of an embedding (its input is a token id, not a vector)"
    if isinstance(layer, _ConvNd):
        return "is a convolution (a pathway sees a window, not a token)"
    if isinstance(layer, MultiheadAttention):
        return "is an nn.MultiheadAttention (PEFT merges its adapter for each forward; no pathway runs)"
    if any(not isinstance(layer.lora_A[adapter], nn.Linear) for adapter in adapters):
        return f"is a lora.{kind} (no plain linear A)"
    for adapter in adapters:
        variant = layer.lora_variant.get(adapter)
        if not isinstance(variant, DoraLinearVariant | MiCALinearVariant | None):
            return f"is a lora.{kind} with a forward of its own ({type(variant).__name__})"
    return None


def _is_dora(layer: LoraLayer, adapter: str) -> bool:
    return isinstance(layer.lora_variant.get(adapter), DoraLinearVariant)


def _lora_site(name: str, layer: LoraLayer, adapters: Sequence[str]) -> Site:
    module = cast(Any, layer)
    experts, count = LoraExperts(layer, adapters), len(adapters)
    dora = adapters[0] if _is_dora(layer, adapters[0]) else None

    def respond(h: Tensor) -> Mapping[str, Tensor]:
        pathway = experts.pathway(h)
        return {"gate": pathway.new_ones(pathway.shape[:-1]), "pathway": pathway}

    def read(part: str, args: tuple[Any, ...], output: Any) -> Mapping[str, Tensor]:
        check_unmixed(name, module)
        base = output.detach()
        if dora is not None:
            scale, bias = _dora_scale(layer, dora).to(base.dtype), getattr(layer.get_base_layer(), "bias", None)
            base = base * scale if bias is None else (base - bias) * scale + bias
        for adapter in adapters:
            # never with DoRA: PEFT refuses that
            offset = getattr(layer.lora_B[adapter], "bias", None)
            if offset is not None:
                base = base + offset * layer.scaling[adapter]
        norm = torch.linalg.vector_norm(base, dim=-1, dtype=torch.float32)
        return {"input": args[0], "base_norm": norm, **respond(args[0].detach())}

    def weights() -> SiteWeights:
        a, b = experts.weights()
        return SiteWeights(a=a, b=b if dora is None else b * _dora_scale(layer, dora)[None, :, None], router=None)

    info = SiteInfo(
        name=name,
        layer=layer_index(name),
        kind=name.rsplit(".", 1)[-1],
        num_experts=count,
        rank=experts.rank,
        d_in=int(module.in_features),
        d_out=int(module.out_features),
        scaling=experts.scaling,
        gate="none" if count == 1 else "sum",
        family="peft-lora",
        normalised=count == 1,
    )
    # The base module sees h and always runs once. A of a DoRA layer runs twice: also on the unit matrix.
    points = (HookPoint(name, "base", layer.base_layer),)
    return Site(info, module, points, read, weights, respond)


@torch.no_grad()
def _dora_scale(layer: LoraLayer, adapter: str) -> Float[Tensor, " d_out"]:
    """Return m / n: DoRA's magnitudes over the row norms of W + s B A."""
    dora = cast(Any, layer.lora_magnitude_vector[adapter])
    a, b = (cast(Tensor, part[adapter].weight) for part in (layer.lora_A, layer.lora_B))
    weight = dequantize_module_weight(layer.get_base_layer()).to(a.dtype)
    norm = dora.get_weight_norm(weight, b @ a, layer.scaling[adapter])
    return cast(Tensor, dora.weight.detach() / norm)
