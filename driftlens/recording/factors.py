"""The LoRA factors of a checkpoint folder, read without the base model and without building any model.

Tensors come first, the configuration second: what a site is follows from the names and shapes of its tensors; the
configuration gives the scaling. Layouts:

* ours: ``P.moe_lora_A.weight`` [E r, d_in], ``P.moe_lora_B.weight`` [d_out, E r], expert-slowest, ``P.moe_lora_gate``;
* PEFT LoRA, rsLoRA, DoRA: ``P.lora_A.weight`` [r, d_in], ``P.lora_B.weight`` [d_out, r], ``P.lora_magnitude_vector``;
* PEFT LoRA on fused 3-D experts (``target_parameters``): A [E r, d_in] expert-slowest, B [d_out, r E] expert-fastest;
* CoIN, MCITlib, Prism: ``P.lora_A.loraA.{e}.weight`` [r, d_in], ``P.lora_B.loraB.{e}.weight``, ``P.lora_router``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from driftlens.analysis.weights import Factors
from driftlens.errors import FormatError
from driftlens.recording.factor_files import (
    CONFIG_NAME,
    WEIGHT_NAMES,
    Tensors,
    open_tensors,
    read_adapter_config,
    weights_file,
)
from driftlens.recording.foreign.tensors import plain_key
from driftlens.recording.sites import layer_index
from driftlens.store import SiteInfo

__all__ = ["FactorFolder"]

_IGNORED = ("prism.same.", "mcitbox.same.")
_NAME = r"(?:\.(?P<index>(?!weight$)[^.]+))?"
_PATTERNS = tuple(
    re.compile(rf"^(?P<site>.+)\.{pattern}$")
    for pattern in (
        r"(?P<layout>moe_lora)_(?P<part>A|B|gate)\.weight",
        r"(?P<layout>lora)_(?P<part>[AB])\.lora(?P=part)\.(?P<index>\d+)\.weight",
        r"(?P<layout>lora)_(?P<part>router)\.weight",
        rf"(?P<layout>lora)_(?P<part>[AB]){_NAME}\.weight",
        rf"(?P<layout>lora)_embedding_(?P<part>[AB]){_NAME}",
        rf"(?P<layout>lora)_(?P<part>magnitude)_vector{_NAME}(?:\.weight)?",
    )
)
_PRODUCT_OF_SUMS = ("MOE_LORA_SAME", "MOE_LORA_MOELORA")

Packing = Literal["experts", "expert_slowest", "expert_fastest"]


@dataclass
class _Parts:
    """Tensor names of one site by expert, and how they are packed."""

    a: dict[str, str] = field(default_factory=dict)
    b: dict[str, str] = field(default_factory=dict)
    router: str | None = None
    magnitude: str | None = None
    twins: list[tuple[str, str]] = field(default_factory=list)
    ours: bool = False
    packing: Packing = "experts"


class FactorFolder:
    """The factors of one adapter folder; only names and shapes are read until `read`.

    Attributes:
        path: the folder.
        name: what tables call it.
        config: its ``adapter_config.json``; empty where there is none.
        sites: the sites in the order of the model's layers; ``scaling`` is 1 where no configuration gives it.
        extras: of each site the rows of its router and the length of its magnitude vector.
        notes: sentences on what the folder holds that the factors do not tell.

    Raises:
        NotFoundError: no such folder, or no weights in it.
        FormatError: unreadable, no LoRA factors, or factors that are incomplete or do not fit together.
    """

    def __init__(self, path: Path | str, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self._file = weights_file(self.path)
        config = read_adapter_config(self.path)
        self.config: dict[str, Any] = config or {}
        self.has_scaling = config is not None and "lora_alpha" in config
        with open_tensors(self._file) as tensors:
            self._shapes = tensors.shapes()
        found, self._others = _sort_keys(self._shapes)
        if not found:
            sample = ", ".join(sorted(self._shapes)[:3]) or "nothing"
            raise FormatError(
                f"{self._file} holds no LoRA factors that are known (peft_type "
                f"{self.config.get('peft_type', 'not stated')!r}; tensors: {sample}). Weights-only mode reads "
                "moe_lora_A/B, lora_A/B, and lora_A.loraA.N/lora_B.loraB.N."
            )
        ordered = sorted(found, key=_natural)
        self._parts = [found[site] for site in ordered]
        self.sites = [self._info(site, parts) for site, parts in zip(ordered, self._parts, strict=True)]
        self.extras = [
            (self._rows(parts.router), math.prod(self._shapes[parts.magnitude]) if parts.magnitude else 0)
            for parts in self._parts
        ]
        self.notes = self._remarks()

    @property
    def base(self) -> str | None:
        """Name of the base model, as the configuration states it."""
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    def read(self, positions: Sequence[int]) -> Factors:
        """Read the factors of sites of equal shape, by position in ``sites``; float64 stays, all else is float32.

        Raises:
            FormatError: the file changed or cannot be read.
        """
        with open_tensors(self._file) as tensors:
            for position in positions:
                self._check_twins(tensors, position)
            a = np.stack([self._factor(tensors, position, "a") for position in positions])
            b = np.stack([self._factor(tensors, position, "b") for position in positions])
            side = []
            for names in ([self._parts[p].router for p in positions], [self._parts[p].magnitude for p in positions]):
                found = [_numpy(tensors, name) for name in names if name is not None]
                side.append(np.stack(found) if len(found) == len(positions) else None)
        magnitude = None if side[1] is None else side[1].reshape(len(positions), -1)
        scaling = np.array([self.sites[position].scaling for position in positions])
        return Factors(a, b, scaling, side[0], magnitude)

    def _factor(self, tensors: Tensors, position: int, part: Literal["a", "b"]) -> np.ndarray:
        """Return A as [E, r, d_in] or B as [E, d_out, r]."""
        site, parts = self.sites[position], self._parts[position]
        names = getattr(parts, part)
        if parts.packing == "experts":
            found = [_numpy(tensors, names[index]) for index in sorted(names, key=_natural)]
            return np.stack([array.reshape(array.shape[0], -1) for array in found])
        whole = _numpy(tensors, next(iter(names.values())))
        experts, rank = site.num_experts, site.rank
        if part == "a":
            return whole.reshape(experts, rank, -1)
        if parts.packing == "expert_slowest":
            return whole.reshape(-1, experts, rank).transpose(1, 0, 2)
        return whole.reshape(-1, rank, experts).transpose(2, 0, 1)

    def _check_twins(self, tensors: Tensors, position: int) -> None:
        for first, second in self._parts[position].twins:
            if self._shapes[first] != self._shapes[second] or not torch.equal(tensors.get(first), tensors.get(second)):
                site = self.sites[position].name
                raise self._broken(site, f"{first} and {second} are names of one parameter and hold different values")

    def _rows(self, name: str | None) -> int:
        return self._shapes[name][0] if name else 0

    def _info(self, site: str, parts: _Parts) -> SiteInfo:
        if parts.a.keys() != parts.b.keys():
            lone = sorted(parts.a.keys() ^ parts.b.keys(), key=_natural)[0]
            have, lack = ("A", "B") if lone in parts.a else ("B", "A")
            raise self._broken(site, f"{_expert(lone)} has {have} but no {lack}")
        indices = sorted(parts.a, key=_natural)
        if all(index.isdigit() for index in indices):
            gaps = sorted(set(range(max(map(int, indices)) + 1)) - set(map(int, indices)))
            if gaps:
                raise self._broken(site, f"expert {gaps[0]} of {int(indices[-1]) + 1} has no factors")
        shapes = Counter((self._flat(parts.a[i]), self._flat(parts.b[i])) for i in indices)
        if len(shapes) > 1:
            raise self._broken(site, f"its experts have factors of different shapes: {sorted(shapes)[:2]}")
        (rows, d_in), (d_out, columns) = next(iter(shapes))
        if rows != columns or not rows or not d_in or not d_out:
            raise self._broken(site, f"A is {rows} x {d_in} and B is {d_out} x {columns}; their ranks must agree")
        experts, rank = self._split(site, parts, rows, len(indices))
        router = self._rows(parts.router)
        if router and (router != experts or self._shapes[parts.router or ""][1:] != (d_in,)):
            raise self._broken(site, f"its router is {self._shapes[parts.router or '']}, expected {(experts, d_in)}")
        last = site.split(".")
        return SiteInfo(
            name=site,
            layer=layer_index(site),
            kind=".".join(last[-2:]) if last[-1] == "base_layer" else last[-1],
            num_experts=experts,
            rank=rank,
            d_in=d_in,
            d_out=d_out,
            scaling=self._scaling(site, parts, experts, rank),
            gate=str(self.config.get("gate") or ("router" if router else "none")),
            family="moe-lora" if parts.ours else "factors",
            semantics="product_of_sums" if self.config.get("peft_type") in _PRODUCT_OF_SUMS else "sum_gBA",
        )

    def _split(self, site: str, parts: _Parts, rows: int, found: int) -> tuple[int, int]:
        """Return (E, r) and note how several experts are packed into one tensor."""
        stated = _pattern(self.config.get("rank_pattern"), site, self.config.get("r"))
        if parts.ours:
            experts = self.config.get("num_experts") or self._rows(parts.router)
            if not isinstance(experts, int) or experts < 1 or rows % experts:
                raise self._broken(site, f"its {rows} pathways cannot be cut into num_experts={experts!r}")
            parts.packing = "expert_slowest"
            return experts, rows // experts
        if found == 1 and self.config.get("target_parameters") and isinstance(stated, int) and rows != stated:
            if stated < 1 or rows % stated:
                raise self._broken(site, f"its {rows} pathways are no multiple of the rank r={stated}")
            parts.packing = "expert_fastest"
            return rows // stated, stated
        return found, rows

    def _scaling(self, site: str, parts: _Parts, experts: int, rank: int) -> float:
        if not self.has_scaling:
            return 1.0
        alpha = _pattern(self.config.get("alpha_pattern"), site, self.config["lora_alpha"])
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise FormatError(f"{self.path / CONFIG_NAME} has lora_alpha {alpha!r}, expected a number.")
        # CoIN and its descendants divide by the rank of all experts together, everyone else by that of one.
        foreign = not parts.ours and parts.packing == "experts" and next(iter(parts.a)).isdigit()
        total = rank * experts if foreign else rank
        return float(alpha) / (math.sqrt(total) if self.config.get("use_rslora") else total)

    def _flat(self, name: str) -> tuple[int, int]:
        shape = self._shapes[name]
        return (shape[0], math.prod(shape[1:])) if len(shape) >= 2 else (0, 0)

    def _broken(self, site: str, what: str) -> FormatError:
        return FormatError(
            f"{self._file} is incomplete or mixed: at site {site} {what}. Copy the checkpoint again, or save it anew."
        )

    def _remarks(self) -> list[str]:
        notes = []
        if not self.has_scaling:
            notes.append(
                f"{self.name} states no lora_alpha ({CONFIG_NAME}): update norms are those of B_e A_e without the "
                "scaling. Overlaps, cosines and relative changes do not depend on it."
            )
        left = [name for name in WEIGHT_NAMES if name != self._file.name and (self.path / name).is_file()]
        if left:
            notes.append(
                f"{self.name} also holds {left[0]}, which was not read: {self._file.name} comes first, as in PEFT."
            )
        if any(parts.magnitude for parts in self._parts):
            notes.append(
                "DoRA rescales the adapted weight by its column norms, which need the base weight: update norms are "
                "those of s B A before that; magnitude_change is exact."
            )
        if self._others:
            inside = [key for key in self._others if ".lora_" in key]
            first = (inside or self._others)[0]
            notes.append(
                f"{self.name} also holds {len(self._others)} tensors that are no factors (for example {first}); "
                "what they do to the model is not in these numbers."
            )
        return notes


def _sort_keys(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, _Parts], list[str]]:
    """Sort tensor names into sites; the second list holds what belongs to none."""
    sites: dict[str, _Parts] = {}
    seen: dict[str, str] = {}
    others = []
    for key in sorted(shapes, key=_natural):
        if key.startswith(_IGNORED):
            continue
        plain = plain_key(key)
        match = next((found for pattern in _PATTERNS if (found := pattern.match(plain))), None)
        if match is None:
            others.append(key)
            continue
        parts = sites.setdefault(match["site"], _Parts())
        parts.ours = parts.ours or match["layout"] == "moe_lora"
        index = match.groupdict().get("index") or "0"
        if plain in seen:  # two names of one parameter, see `plain_key`; compared when they are read
            parts.twins.append((seen[plain], key))
            continue
        seen[plain] = key
        if match["part"] in ("A", "B"):
            getattr(parts, match["part"].lower())[index] = key
        elif match["part"] == "magnitude":
            parts.magnitude = key
        else:
            parts.router = key
    return sites, others


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key under which 10 comes after 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _expert(index: str) -> str:
    return f"expert {index}" if index.isdigit() else f"adapter {index!r}"


def _pattern(patterns: Any, site: str, default: Any) -> Any:
    """Return PEFT's per-module setting: the first pattern that matches the end of the module's path."""
    for pattern, value in (patterns or {}).items() if isinstance(patterns, dict) else ():
        if re.match(rf"(.*\.)?({pattern})$", site.removesuffix(".base_layer")):
            return value
    return default


def _numpy(tensors: Tensors, name: str) -> np.ndarray:
    tensor = tensors.get(name)
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    array: np.ndarray = wide.numpy()
    return array
