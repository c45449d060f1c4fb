"""What lies beside a foreign adapter: task prototypes, SAME's statistics, and the trained projector.

Prototypes are running means of CLIP features per task. At test a method compares a sample's features with them:

* HiDe: w = softmax(((cos_image + cos_text) / 2) / 0.1) over the slots;
* SAME: m = softmax(28 (0.2 cos_image + 0.8 cos_text)), the text alone where there is no image;
* DISCO: w = softmax(cos_text / 0.05).

A recorder has no CLIP features. Who has them gets the weights from `prototype_weights`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from driftlens.errors import ConfigError, FormatError, UnknownNameError
from driftlens.recording.factor_files import load_pickled
from driftlens.recording.foreign.tensors import plain_key

__all__ = ["STATE_FILES", "ForeignState", "prototype_weights", "read_state"]

TRAINED_FILE: Final = "non_lora_trainables.bin"
STATE_FILES: Final = (TRAINED_FILE, "same_state.bin", "hide_state.pt", "disco_state.pt")
"""Files beside an adapter that change what it computes."""

_PROJECTOR = re.compile(r"^(?:model\.)?mm_projector\.(\d+)\.(weight|bias)$")
_LISTED = re.compile(
    r"^(?:model\.)?(?P<part>image_anchors|text_anchors|image_boundary|text_boundary|global_image_feature|"
    r"global_text_feature|global_image_boundary|global_text_boundary|_prior_expert_vec|_last_routing)\.(?P<slot>\d+)$"
)
_IMAGE, _TEXT = ("image_anchors", "global_image_feature"), ("text_anchors", "global_text_feature")
_AGAIN = "Copy the checkpoint again, or save it anew."


@dataclass(frozen=True)
class ForeignState:
    """State of a checkpoint outside the experts.

    Attributes:
        image: prototypes of the tasks' images, one row per slot (untrained slots are random).
        text: prototypes of the tasks' texts.
        projector: parameters of LLaVA's ``mm_projector`` by ``0.weight`` and the like.
        buffers: SAME's statistics, and whatever else lies in a state file, by plain name; no forward uses them.
    """

    image: Float[Tensor, "K d"] | None = None
    text: Float[Tensor, "K d"] | None = None
    projector: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


def read_state(folder: Path, copies: Mapping[str, Tensor] | None = None) -> ForeignState:
    """Read what lies beside the adapter in ``folder``.

    Args:
        folder: the adapter folder.
        copies: tensors of the adapter file under ``prism.same.``, by the rest of their names.

    Raises:
        FormatError: a file that cannot be read, runs code, holds parts that are not known, or that contradicts the
            copies of its content in the adapter file.
    """
    values: dict[str, Tensor] = {}
    trained: set[str] = set()
    for name in STATE_FILES:
        if (folder / name).is_file():
            found = _flat(load_pickled(folder / name))
            values |= found
            trained |= found.keys() if name == TRAINED_FILE else set()
    own = {_copied(key): value for key, value in (copies or {}).items()}
    for key in values.keys() & own.keys():
        if values[key].shape != own[key].shape or not torch.equal(values[key].float(), own[key].float()):
            raise FormatError(
                f"{folder} stores {key} in same_state.bin and in the adapter file with different values. The folder "
                f"mixes two checkpoints. {_AGAIN}"
            )
    values = own | values
    projector: dict[str, Tensor] = {}
    listed: dict[str, dict[int, Tensor]] = {}
    buffers: dict[str, Tensor] = {}
    for key, value in values.items():
        layer, item = _PROJECTOR.match(key), _LISTED.match(key)
        if layer:
            projector[f"{layer[1]}.{layer[2]}"] = value
        elif item:
            listed.setdefault(item["part"], {})[int(item["slot"])] = value
        elif key not in trained:
            buffers[key] = value
        else:
            raise FormatError(
                f"{folder / TRAINED_FILE} holds the tensor {key}, which is not understood; without it outputs would be "
                "wrong. Known are mm_projector and prototypes (image_anchors, text_anchors, global_image_feature, "
                "global_text_feature)."
            )
    return ForeignState(_rows(folder, listed, _IMAGE), _rows(folder, listed, _TEXT), projector, buffers)


def prototype_weights(
    state: ForeignState,
    semantics: str,
    num_experts: int,
    *,
    image: Float[Tensor, " d"] | None = None,
    text: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, " E"]:
    """Return the weights of the experts for a sample with the given CLIP features.

    Args:
        state: the checkpoint's state.
        semantics: ``same``, ``hide``, ``prism_hide`` or ``disco``.
        num_experts: E; the first E prototypes take part, as in the releases' evaluation.
        image: CLIP feature of the sample's image.
        text: CLIP feature of its text.

    Raises:
        UnknownNameError: the semantics uses no prototypes.
        ConfigError: a feature or a prototype that is needed is missing.
    """
    methods = ("same", "hide", "prism_hide", "disco")
    if semantics not in methods:
        raise UnknownNameError("semantics with prototypes", semantics, methods)

    def near(what: str, feature: Tensor | None, rows: Tensor | None) -> Tensor:
        if feature is None or rows is None or len(rows) < num_experts or feature.shape != rows.shape[1:]:
            have = "none" if rows is None else str(list(rows.shape))
            raise ConfigError(
                f"{semantics!r} compares the {what} feature of a sample with {num_experts} prototypes; found "
                f"prototypes {have} and a feature {'none' if feature is None else list(feature.shape)}. Give one CLIP "
                "feature of the width of the checkpoint's prototypes."
            )
        return cosine_similarity(feature.float()[None], rows[:num_experts].float(), dim=-1)

    by_text = near("text", text, state.text)
    if semantics == "disco":
        return torch.softmax(by_text / 0.05, dim=-1)
    if semantics == "same":
        if image is None:
            return torch.softmax(28 * by_text, dim=-1)
        return torch.softmax(28 * (0.2 * near("image", image, state.image) + 0.8 * by_text), dim=-1)
    return torch.softmax((near("image", image, state.image) + by_text) / 2 / 0.1, dim=-1)


def _flat(loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return tensors by plain name, with lists and dictionaries of tensors as NAME.INDEX."""
    result: dict[str, Tensor] = {}
    for key, value in loaded.items():
        name = plain_key(key)
        if isinstance(value, Tensor):
            result[name] = value
        elif isinstance(value, list | tuple):
            result |= {f"{name}.{i}": part for i, part in enumerate(value) if isinstance(part, Tensor)}
        elif isinstance(value, Mapping):
            result |= {f"{name}.{i}": part for i, part in value.items() if isinstance(part, Tensor)}
    return result


def _copied(key: str) -> str:
    return plain_key(key.removeprefix("buf.").replace("__DOT__", "."))


def _rows(folder: Path, listed: Mapping[str, Mapping[int, Tensor]], names: tuple[str, ...]) -> Tensor | None:
    for name in names:
        slots = listed.get(name)
        if not slots:
            continue
        shapes = {value.numel() for value in slots.values()}
        if set(slots) != set(range(len(slots))) or len(shapes) > 1:
            raise FormatError(f"{folder}: the prototypes {name} have gaps or differ in length. {_AGAIN}")
        return torch.stack([slots[i].flatten() for i in range(len(slots))])
    return None
