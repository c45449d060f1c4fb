"""Putting a CoIN, MCITlib or Prism adapter on a base model, and taking it off again."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from driftlens.backbones import decoder_layers
from driftlens.errors import ConfigError, FormatError
from driftlens.recording.foreign.layers import FixedGate, ForeignGate, ForeignLinear, Padding, RouterGate, SameGate
from driftlens.recording.foreign.semantics import choose_semantics, current_task
from driftlens.recording.foreign.state import ForeignState, read_state
from driftlens.recording.foreign.tensors import FolderTensors, SiteTensors, read_folder

__all__ = ["ForeignAdapter", "apply_foreign", "build_layers"]

_IN_DECODER = re.compile(r"^(?:model\.)*(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)$")
_WEIGHTED = ("same", "hide", "prism_hide", "disco")
_PROJECTOR = {"0": "linear_1", "2": "linear_2"}


@dataclass
class ForeignAdapter:
    """A foreign adapter that is on a model.

    Attributes:
        folder: where it came from.
        semantics: its forward, a key of ``FOREIGN_SEMANTICS``.
        state: what lay beside the factors.
        restored: parameters of the base model that the checkpoint replaced.
        weights: the experts' weights per sample, for the semantics that use them.
        gate_weights: where the experts' weights per sample came from: ``"given"``, ``"uniform"`` or None.
    """

    folder: Path
    semantics: str
    state: ForeignState
    restored: tuple[str, ...]
    weights: Tensor | None
    gate_weights: str | None
    _undo: list[Callable[[], None]] = field(repr=False, default_factory=list)

    @property
    def meta(self) -> dict[str, Any]:
        """What a recording says about it beside the checkpoint's name and hash."""
        return {"semantics": self.semantics, "expert_weights": self.gate_weights, "restored": list(self.restored)}

    def anchor_layers(self, model: nn.Module, folder: Path) -> dict[str, ForeignLinear]:
        """Return the layers of an earlier checkpoint of the same kind on ``model``, which does not use them.

        Raises:
            NotFoundError, FormatError: the folder cannot be used, or does not fit the model.
        """
        given = self.weights if self.gate_weights == "given" else None
        tensors = read_folder(folder)
        return build_layers(model, tensors, choose_semantics(tensors, self.semantics), given)

    def remove(self) -> None:
        """Make the base model what it was; doing it again changes nothing."""
        while self._undo:
            self._undo.pop()()


def apply_foreign(
    model: nn.Module,
    folder: Path,
    semantics: str | None = None,
    expert_weights: Sequence[float] | Float[Tensor, " E"] | None = None,
) -> ForeignAdapter:
    """Put the adapter in ``folder`` on ``model``, in place.

    Args:
        model: a language model or a LLaVA around one; it stays the same object.
        folder: the adapter folder.
        semantics: key of ``FOREIGN_SEMANTICS``; None infers it.
        expert_weights: for ``same``, ``hide``, ``prism_hide`` and ``disco`` the weights that follow from a sample's
            CLIP features (see `prototype_weights`), used for all samples. None weights all trained slots alike.

    Warns:
        UserWarning: the semantics was guessed among several, weights or ``cur_task`` are stand-ins, or a part of the
            checkpoint has no place in this model.

    Raises:
        NotFoundError, FormatError: the folder cannot be used, or does not fit the model; the model is unchanged.
        ConfigError: semantics unknown or not to be inferred, or expert weights of the wrong length.
    """
    tensors = read_folder(folder)
    chosen = choose_semantics(tensors, semantics)
    state = read_state(folder, tensors.buffers)
    weights, padding = _expert_weights(tensors, chosen, expert_weights), Padding()
    source = None if weights is None else "uniform" if expert_weights is None else "given"
    layers = build_layers(model, tensors, chosen, weights, padding, source or "")
    restored = _projector(model, folder, state)
    adapter = ForeignAdapter(folder, chosen, state, tuple(restored), weights, source)
    for name, value in restored.items():
        _swap_data(adapter, model.get_parameter(name), value)
    for name, layer in layers.items():
        _swap_module(adapter, model, name, layer)
    handle = model.register_forward_pre_hook(_mask_reader(model, padding), with_kwargs=True)
    adapter._undo.append(handle.remove)
    return adapter


def build_layers(
    model: nn.Module,
    tensors: FolderTensors,
    semantics: str,
    weights: Float[Tensor, " E"] | None = None,
    padding: Padding | None = None,
    source: str = "uniform",
) -> dict[str, ForeignLinear]:
    """Return the adapted layers by module path in ``model``, without putting them there.

    Args:
        model: the base model, with or without another foreign adapter.
        tensors: the folder.
        semantics: key of ``FOREIGN_SEMANTICS``.
        weights: the experts' weights for ``same``, ``hide``, ``prism_hide`` and ``disco``; None for uniform ones.
        padding: tells SAME's gate which tokens are real.
        source: where the weights come from; part of the gate's name.

    Raises:
        FormatError: a layer is not in the model or has other sizes.
    """
    decoder = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    given = weights if weights is not None else _expert_weights(tensors, semantics, None)
    current = current_task(tensors, semantics) if semantics in ("hide", "olora", "slot_select") else None
    total = tensors.num_experts * next(iter(tensors.sites.values())).a.shape[1]
    if tensors.config.get("r") not in (None, total):
        warnings.warn(
            f"{tensors.folder}: adapter_config.json says r={tensors.config['r']}, the weights have "
            f"{tensors.num_experts} experts and {total} pathways in all; the scaling lora_alpha / r uses the latter.",
            stacklevel=3,
        )
    layers = {}
    for stored, site in tensors.sites.items():
        match = _IN_DECODER.match(stored)
        if match is None or int(match[1]) >= len(decoder):
            raise FormatError(
                f"{tensors.file} adapts {stored}, but {type(model).__name__} has {len(decoder)} decoder layers below "
                f"{prefix}. The checkpoint belongs to another base model: give the right one with --base."
            )
        name = f"{prefix}.{match[1]}.{match[2]}"
        base = _base_layer(model, name, stored, site, tensors)
        like = base.weight
        a, b = (part.to(like.device, like.dtype) for part in (site.a, site.b))
        last = int(match[1]) == len(decoder) - 1
        gate = _gate(semantics, site, given, current, last, padding or Padding(), source)
        product = semantics in ("product_of_sums", "same") or (semantics == "hide" and not last)
        scaling = float(tensors.config["lora_alpha"]) / (site.a.shape[0] * site.a.shape[1])
        layers[name] = ForeignLinear(
            base, a, b, gate.to(like.device, like.dtype), scaling=scaling, product=product
        ).eval()
    return layers


def _gate(
    semantics: str,
    site: SiteTensors,
    given: Tensor | None,
    current: int | None,
    last: bool,
    padding: Padding,
    source: str,
) -> ForeignGate:
    count = len(site.a)
    if semantics in ("sum_gBA", "product_of_sums", "same"):
        assert site.router is not None  # choose_semantics looked
        if semantics != "same":
            return RouterGate(site.router.clone())
        assert given is not None  # _expert_weights gives them where they are used
        return SameGate(site.router.clone(), given.clone(), f"same-{source}", padding)
    if semantics == "disco" or (semantics in ("hide", "prism_hide") and last):
        assert given is not None
        return FixedGate(given.clone(), f"prototypes-{source}", normalised=True)
    ones = torch.zeros(count)
    if semantics == "slot_select":
        assert current is not None
        ones[current] = 1.0
        return FixedGate(ones, "slot", normalised=True)
    # all slots where the method knows no current task (Prism HiDe)
    ones[: count if current is None else current + 1] = 1.0
    return FixedGate(ones, "sum", normalised=False)


def _expert_weights(tensors: FolderTensors, semantics: str, given: Sequence[float] | Tensor | None) -> Tensor | None:
    if semantics not in _WEIGHTED:
        if given is not None:
            raise ConfigError(
                f"Expert weights belong to the semantics {', '.join(_WEIGHTED)}; the gate of {semantics!r} needs none."
            )
        return None
    count = tensors.num_experts
    if given is None:
        trained = list(tensors.trained) or list(range(count))
        weights = torch.zeros(count)
        weights[trained] = 1.0 / len(trained)
        batch = " Every sample is routed alone, padding left out (the release at batch size 1)."
        warnings.warn(
            f"{tensors.folder}: the gate of {semantics!r} depends on CLIP features of each sample, which are not at "
            f"hand. The {len(trained)} trained slots of {count} are weighted alike in their place; give expert weights "
            f"for the method's own gate.{batch if semantics == 'same' else ''}",
            stacklevel=4,
        )
        return weights
    weights = torch.as_tensor(given, dtype=torch.float32).flatten()
    if (
        len(weights) != count
        or not bool(torch.isfinite(weights).all())
        or bool((weights < 0).any())
        or weights.sum() <= 0
    ):
        raise ConfigError(
            f"Expert weights must be {count} numbers from 0 up, not all 0, one per slot of {tensors.folder}; found "
            f"{weights.tolist()}."
        )
    weights = weights / weights.sum()
    if semantics == "prism_hide":  # the last layer takes the nearest expert alone
        weights = torch.nn.functional.one_hot(weights.argmax(), count).float()
    return weights


def _base_layer(model: nn.Module, name: str, stored: str, site: SiteTensors, tensors: FolderTensors) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    base = module.base_layer if isinstance(module, ForeignLinear) else module
    if not isinstance(base, nn.Linear):
        found = "nothing" if base is None else f"a {type(base).__name__}"
        raise FormatError(
            f"{tensors.file} adapts {stored}; at {name} the model {type(model).__name__} has {found}, expected an "
            "nn.Linear. The checkpoint belongs to another base model: give the right one with --base."
        )
    d_in, d_out = site.a.shape[2], site.b.shape[1]
    if (base.in_features, base.out_features) != (d_in, d_out):
        raise FormatError(
            f"{tensors.file}: {stored} maps {d_in} to {d_out} features, but {name} of {type(model).__name__} maps "
            f"{base.in_features} to {base.out_features}. The checkpoint belongs to another base model: give the right "
            "one with --base."
        )
    return base


def _projector(model: nn.Module, folder: Path, state: ForeignState) -> dict[str, Tensor]:
    """Return the projector's parameters by name in ``model``; all of them or none."""
    if not state.projector:
        return {}
    prefix = next((name for name, _ in model.named_modules() if name.split(".")[-1] == "multi_modal_projector"), None)
    if prefix is None:
        warnings.warn(
            f"{folder}/non_lora_trainables.bin holds a trained mm_projector, and {type(model).__name__} takes no "
            "images: it was left out. Give a LLaVA base with --base to record samples with images.",
            stacklevel=4,
        )
        return {}
    wanted = {
        f"{number}.{kind}": f"{prefix}.{name}.{kind}"
        for number, name in _PROJECTOR.items()
        for kind in ("weight", "bias")
    }
    own = {name: tuple(parameter.shape) for name, parameter in model.get_submodule(prefix).named_parameters(prefix)}
    expected = {key: own.get(name) for key, name in wanted.items()}
    found = {key: tuple(value.shape) for key, value in state.projector.items()}
    if found != expected or set(own) != set(wanted.values()):
        raise FormatError(
            f"{folder}/non_lora_trainables.bin has mm_projector {found}, but the base model's projector has {own}. "
            "The checkpoint belongs to another base model, or is incomplete: give the right one with --base."
        )
    return {wanted[key]: value for key, value in state.projector.items()}


def _mask_reader(model: nn.Module, padding: Padding) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]:
    names = list(inspect.signature(model.forward).parameters)

    def read(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
        padding.mask = mask if isinstance(mask, Tensor) else None

    return read


def _swap_data(adapter: ForeignAdapter, parameter: nn.Parameter, value: Tensor) -> None:
    before = parameter.data
    parameter.data = value.to(before.device, before.dtype)

    def back() -> None:
        parameter.data = before.to(parameter.device)

    adapter._undo.append(back)


def _swap_module(adapter: ForeignAdapter, model: nn.Module, name: str, layer: ForeignLinear) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, layer)
    adapter._undo.append(lambda: setattr(owner, child, layer.base_layer))
