"""Adapter folders of CoIN, MCITlib and Prism: what the tensors say, before any configuration is asked.

Per adapted linear layer P: ``P.lora_A.loraA.{e}.weight`` [r, d_in] and ``P.lora_B.loraB.{e}.weight`` [d_out, r] for
every expert e, ``P.lora_router.weight`` [E, d_in] where there is a router, and for DISCO ``P.lora_AB.weight``, which
its forward overwrites. One tensor may occur under two names (``.weight`` and ``.mlp.weight``): the wrapper around an
expert binds both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from driftlens.errors import FormatError, NotFoundError
from driftlens.recording.factor_files import CONFIG_NAME, WEIGHT_NAMES, open_tensors

__all__ = ["FolderTensors", "SiteTensors", "looks_foreign", "plain_key", "read_folder", "read_tensors"]

_PREFIX = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")
_ALIAS = re.compile(r"\.mlp\.weight$")
_ALIASED = re.compile(r"\.(?:lora[AB]\.\d+|lora_router)\.mlp\.weight$")
_BUFFERS = ("prism.same.", "mcitbox.same.")
_FACTOR = re.compile(r"^(?P<site>.+)\.lora_(?P<part>[AB])\.lora(?P=part)\.(?P<expert>\d+)\.weight$")
_SIDE = re.compile(r"^(?P<site>.+)\.lora_(?P<part>router|AB)\.weight$")
_AGAIN = "Copy the checkpoint again, or save it anew."
_OTHER_METHODS = {
    "lora_vu_gate": "SMoLoRA",
    "lora_ins_gate": "SMoLoRA",
    "lora_fc_": "SMoLoRA",
    "task_prompts": "ModalPrompt",
    "prompt_transform": "ModalPrompt",
}


@dataclass(frozen=True)
class SiteTensors:
    """The factors of one adapted layer.

    Attributes:
        a: down-projections.
        b: up-projections.
        router: rows of the router; present and untrained in HiDe and O-LoRA.
        has_mixer: whether DISCO's ``lora_AB`` was there.
    """

    a: Float[Tensor, "E r d_in"]
    b: Float[Tensor, "E d_out r"]
    router: Float[Tensor, "E d_in"] | None
    has_mixer: bool


@dataclass(frozen=True)
class FolderTensors:
    """What an adapter folder holds.

    Attributes:
        folder: the folder.
        file: its file of weights.
        config: its ``adapter_config.json``.
        sites: factors by layer path as stored, without ``base_model.model.``; all have the same E.
        buffers: tensors under ``prism.same.`` by the rest of their name.
    """

    folder: Path
    file: Path
    config: Mapping[str, Any]
    sites: Mapping[str, SiteTensors]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """E, the number of experts of every site."""
        return len(next(iter(self.sites.values())).a)

    @property
    def trained(self) -> tuple[int, ...]:
        """Experts whose B is not zero everywhere: B starts at zero, so that the others were never trained."""
        used = torch.stack([site.b.flatten(1).abs().amax(1) > 0 for site in self.sites.values()]).any(0)
        return tuple(int(e) for e in used.nonzero().flatten())


def read_folder(folder: Path) -> FolderTensors:
    """Read an adapter folder.

    Raises:
        NotFoundError: no weights or no configuration in it.
        FormatError: damaged, incomplete or contradictory files, or a method whose forward is not known here.
    """
    file = weights_file(folder)
    raw = read_tensors(file)
    buffers = {key.split(".same.", 1)[1]: value for key, value in raw.items() if key.startswith(_BUFFERS)}
    plain = _normalised(file, {key: value for key, value in raw.items() if not key.startswith(_BUFFERS)})
    return FolderTensors(folder, file, _config(folder), _sites(file, plain), buffers)


def weights_file(folder: Path) -> Path:
    """Return the file of weights; safetensors first, and where there are two they must say the same.

    Raises:
        NotFoundError: there is none.
        FormatError: there are two that differ.
    """
    found = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    if not found:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise NotFoundError(f"{folder} holds neither {' nor '.join(WEIGHT_NAMES)} (found: {inside}). {_AGAIN}")
    if len(found) == 2:
        first, second = (
            _normalised(file, {k: v for k, v in read_tensors(file).items() if not k.startswith(_BUFFERS)})
            for file in found
        )
        differing = sorted(first.keys() ^ second.keys()) or [k for k in first if not _equal(first[k], second[k])]
        if differing:
            raise FormatError(
                f"{folder} holds {found[0].name} and {found[1].name}, and they differ (for example in {differing[0]}). "
                "Delete the one that is out of date."
            )
    return found[0]


def looks_foreign(folder: Path) -> bool:
    """Whether the weights in ``folder`` are in the layout of CoIN, MCITlib and Prism, whatever its configuration says.

    Raises:
        FormatError: the weights cannot be read.
    """
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            with open_tensors(folder / name) as tensors:
                keys = [key for key in tensors.shapes() if not key.startswith(_BUFFERS)]
            return any(".loraA." in key or ".loraB." in key or _method(key) for key in keys)
    return False


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a ``.safetensors`` or ``.bin`` file by name; a ``.bin`` file never runs code.

    Raises:
        FormatError: unreadable, or pickled objects that are no tensors.
    """
    with open_tensors(file) as tensors:
        return {name: tensors.get(name) for name in tensors.shapes()}


def plain_key(key: str) -> str:
    """Return a stored name without PEFT's prefix, the adapter's name, and the alias of the experts' wrapper."""
    key = re.sub(r"\.default(?=\.|$)", "", _PREFIX.sub("", key))
    return _ALIAS.sub(".weight", key) if _ALIASED.search(key) else key


def _normalised(file: Path, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, value in raw.items():
        plain = plain_key(key)
        if plain in result and not _equal(result[plain], value):
            raise FormatError(
                f"{file} stores {plain} twice, as {origin[plain]} and as {key}, with different values. They are two "
                f"names of one parameter, so that the file is damaged or was put together from two. {_AGAIN}"
            )
        result.setdefault(plain, value)
        origin.setdefault(plain, key)
    return result


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)


def _method(key: str) -> str | None:
    return next((method for part, method in _OTHER_METHODS.items() if part in key), None)


def _sites(file: Path, plain: Mapping[str, Tensor]) -> dict[str, SiteTensors]:
    factors: dict[str, dict[str, dict[int, Tensor]]] = {}
    side: dict[tuple[str, str], Tensor] = {}
    for key, value in plain.items():
        factor, other = _FACTOR.match(key), _SIDE.match(key)
        if factor:
            experts = factors.setdefault(factor["site"], {"A": {}, "B": {}})[factor["part"]]
            experts[int(factor["expert"])] = value
        elif other:
            side[other["site"], other["part"]] = value
        else:
            method = _method(key)
            what = f"is of {method}, whose forward is not supported" if method else "is no known part of a MoE-LoRA"
            raise FormatError(f"{file} holds the tensor {key}, which {what}. Known are lora_A.loraA.N, lora_B.loraB.N, "
                              "lora_router and lora_AB below each adapted layer.")  # fmt: skip
    if not factors:
        raise FormatError(f"{file} holds no tensors lora_A.loraA.N; it is no MoE-LoRA checkpoint. {_AGAIN}")
    for site, part in side:
        if site not in factors:
            raise FormatError(f"{file} is incomplete: {site} has lora_{part} but no experts. {_AGAIN}")
    ordered = sorted(factors, key=lambda name: [int(t) if t.isdigit() else -1 for t in re.split(r"(\d+)", name)])
    sites = {
        site: _site(file, site, factors[site], side.get((site, "router")), (site, "AB") in side) for site in ordered
    }
    counts = {len(tensors.a) for tensors in sites.values()}
    if len(counts) > 1:
        few = min(sites, key=lambda name: len(sites[name].a))
        raise FormatError(
            f"{file} is incomplete: {few} has {min(counts)} experts, other layers have {max(counts)}. {_AGAIN}"
        )
    routed = [site for site, tensors in sites.items() if tensors.router is not None]
    if 0 < len(routed) < len(sites):
        bare = next(site for site in sites if site not in routed)
        raise FormatError(f"{file} is incomplete: {bare} has no lora_router, {routed[0]} has one. {_AGAIN}")
    return sites


def _site(
    file: Path, site: str, factors: Mapping[str, Mapping[int, Tensor]], router: Tensor | None, has_mixer: bool
) -> SiteTensors:
    def broken(what: str) -> FormatError:
        return FormatError(f"{file} is incomplete or mixed: at {site} {what}. {_AGAIN}")

    a, b = factors["A"], factors["B"]
    count = max([*a, *b]) + 1
    for part, found in factors.items():
        gaps = sorted(set(range(count)) - set(found))
        if gaps:
            raise broken(f"lora{part}.{gaps[0]} is missing (experts go up to {count - 1})")
    shapes = {(tuple(a[e].shape), tuple(b[e].shape)) for e in range(count)}
    if len(shapes) > 1:
        raise broken(f"experts differ in shape: {' and '.join(str(pair) for pair in sorted(shapes)[:2])}")
    first, second = next(iter(shapes))
    if len(first) != 2 or len(second) != 2 or first[0] != second[1] or not (first[0] and first[1] and second[0]):
        raise broken(f"A is {list(first)} and B is {list(second)}, expected [r, d_in] and [d_out, r]")
    if router is not None and tuple(router.shape) != (count, first[1]):
        raise broken(f"the router is {list(router.shape)}, expected {[count, first[1]]}")
    tensors = [*a.values(), *b.values(), *([] if router is None else [router])]
    if not all(tensor.is_floating_point() and bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise broken("values are not finite numbers")
    all_a, all_b = (torch.stack([part[e] for e in range(count)]) for part in (a, b))
    return SiteTensors(all_a, all_b, router, has_mixer)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(
            f"{folder} has no {CONFIG_NAME}, which says how the adapter is scaled (lora_alpha). {_AGAIN}"
        ) from None
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}. {_AGAIN}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold an object; found {type(config).__name__}. {_AGAIN}")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise FormatError(f"{path} has lora_alpha {alpha!r}, expected a number: it scales the adapter. {_AGAIN}")
    return config
