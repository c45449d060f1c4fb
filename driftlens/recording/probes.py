"""Probe sets: the fixed inputs of every task that each checkpoint is recorded on."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from driftlens.backbones.encoding import ROLES, Encoded, Encoder
from driftlens.errors import ProbeError, UnknownNameError
from driftlens.streams import Sample, Stream

__all__ = ["ProbeSample", "ProbeSet", "token_subset"]

Message = Mapping[str, object]


@dataclass(frozen=True)
class ProbeSample:
    """One fixed input. Exactly one of ``prompt``, ``messages`` and ``input_ids`` is set.

    Attributes:
        id: unique within its task.
        answer: the reference answer as text (None only beside ``answer_ids``).
        prompt: the question without any template; the encoder adds its own.
        messages: a conversation in chat form, rendered by the tokenizer's chat template.
        input_ids: tokens of the whole prompt, image placeholders included; no tokenizer is needed.
        answer_ids: tokens of the answer with its end token; only beside ``input_ids``.
        image: an encoded image file, or None.
    """

    id: str
    answer: str | None = None
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    input_ids: tuple[int, ...] | None = None
    answer_ids: tuple[int, ...] | None = None
    image: bytes | None = None

    def as_json(self) -> dict[str, object]:
        """Return the fields that are set, without the image, in JSON form."""
        fields: dict[str, object] = {"id": self.id}
        for name in ("prompt", "messages", "input_ids", "answer", "answer_ids"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = list(value) if isinstance(value, tuple) else value
        return fields


@dataclass(frozen=True)
class ProbeSet:
    """The probes of all tasks, and how they are recorded.

    Attributes:
        samples: task name -> its samples, tasks in stream order.
        roles: which tokens are recorded, a subset of ``("image", "prompt", "answer")``.
        tokens_per_sample: how many tokens of a sample keep their rows (None: all). Sums always cover all tokens.
        seed: decides which tokens those are.
        licence: licence of the inputs.
    """

    samples: Mapping[str, tuple[ProbeSample, ...]]
    roles: tuple[str, ...] = ROLES
    tokens_per_sample: int | None = None
    seed: int = 0
    licence: str = ""

    def __post_init__(self) -> None:
        problems = [f"unknown role {role!r} (allowed: {', '.join(ROLES)})" for role in self.roles if role not in ROLES]
        if not self.roles:
            problems.append("`roles` is empty: name at least one of " + ", ".join(ROLES))
        if not self.samples:
            problems.append("it has no task")
        problems += [f"task {task!r} has no sample" for task, rows in self.samples.items() if not rows]
        if self.tokens_per_sample is not None and self.tokens_per_sample < 1:
            problems.append(f"tokens_per_sample is {self.tokens_per_sample}; it must be at least 1, or null for all")
        if problems:
            raise ProbeError("The probe set cannot be used: " + "; ".join(problems) + ".")

    @classmethod
    def from_stream(cls, stream: Stream, *, tokens_per_sample: int | None = None, seed: int = 0) -> ProbeSet:
        """Return the probe split of every task of ``stream``."""
        samples = {
            task.name: tuple(ProbeSample(s.id, s.answer, prompt=s.prompt, image=s.image) for s in task.probe)
            for task in stream
        }
        licence = "; ".join(f"{task.name}: {task.licence}" for task in stream)
        return cls(samples, tokens_per_sample=tokens_per_sample, seed=seed, licence=licence)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in order."""
        return tuple(self.samples)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.samples.values())

    def task(self, name: str) -> tuple[ProbeSample, ...]:
        """Return the samples of one task.

        Raises:
            UnknownNameError: the set has no such task; the message lists what it has.
        """
        if name not in self.samples:
            raise UnknownNameError("probe task", name, self.samples)
        return self.samples[name]

    def select(self, tasks: Sequence[str]) -> ProbeSet:
        """Return the set with these tasks only, in this order."""
        return replace(self, samples={name: self.task(name) for name in tasks})

    @cached_property
    def sha256(self) -> str:
        """Hash of all inputs in order and of what decides which tokens are stored (licence left out)."""
        digest = hashlib.sha256()
        head = {"roles": list(self.roles), "tokens_per_sample": self.tokens_per_sample, "seed": self.seed}
        lines: list[object] = [head]
        for task, rows in self.samples.items():
            for row in rows:
                image = None if row.image is None else hashlib.sha256(row.image).hexdigest()
                lines.append([task, row.as_json(), image])
        for line in lines:
            digest.update(json.dumps(line, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def encode(self, encoder: Encoder | None) -> dict[str, list[Encoded]]:
        """Return every sample as tokens, prompt and answer, by task.

        Args:
            encoder: tokenizer and image processor of the base model; None if all samples hold token ids.

        Raises:
            ProbeError: a sample needs a tokenizer, a chat template or an image processor that is not there.
        """
        return {task: [_encode(task, row, encoder) for row in rows] for task, rows in self.samples.items()}

    def check_fits(self, model: nn.Module, encoder: Encoder | None) -> dict[str, list[Encoded]]:
        """Check that ``model`` can read every sample, and return the samples as tokens.

        Raises:
            ProbeError: images for a text-only model, token ids outside the vocabulary, sequences longer than
                the model's context, or a wrong number of image placeholders; all problems in one message.
        """
        problems: list[str] = []
        encoded: dict[str, list[Encoded]] = {}
        with_image = [task for task, rows in self.samples.items() if any(row.image is not None for row in rows)]
        if with_image and not _reads_images(model, encoder):
            problems.append(
                f"the tasks {', '.join(with_image)} have images, and the model {type(model).__name__} reads text only: "
                "choose a model with an image encoder, or leave these tasks out"
            )
        else:
            encoded = self.encode(encoder)
            problems += _misfits(encoded, self.roles, model, encoder)
        if problems:
            shown = "\n  - ".join(problems[:8])
            more = f"\n  ({len(problems) - 8} more)" if len(problems) > 8 else ""
            raise ProbeError(f"The probe set does not fit the model:\n  - {shown}{more}")
        return encoded


def token_subset(
    roles: NDArray[np.uint8], keep: NDArray[np.bool_], limit: int | None, seed: int, sample_id: str
) -> NDArray[np.int64]:
    """Return the positions of one sample whose rows are stored, ascending.

    The draw depends on ``seed`` and ``sample_id`` only, so batches, padding and the order of samples cannot
    change it. One token of every role comes first (even if that exceeds ``limit``), the rest is uniform.

    Args:
        roles: [n] role index of every token.
        keep: [n] bool, tokens that are recorded at all.
        limit: how many to choose; None for all.
        seed: seed of the draw.
        sample_id: the sample's id.
    """
    positions = np.flatnonzero(keep)
    if limit is None or len(positions) <= limit:
        return positions
    entropy = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")
    shuffled = np.random.default_rng([seed, entropy]).permutation(positions)
    _, first_of_role = np.unique(roles[shuffled], return_index=True)
    order = np.concatenate([np.sort(first_of_role), np.setdiff1d(np.arange(len(shuffled)), first_of_role)])
    return np.sort(shuffled[order[: max(limit, len(first_of_role))]])


def _reads_images(model: nn.Module, encoder: Encoder | None) -> bool:
    if encoder is not None and encoder.image_token_id is None:
        return False
    return "pixel_values" in inspect.signature(model.forward).parameters


def _encode(task: str, row: ProbeSample, encoder: Encoder | None) -> Encoded:
    where = f"Sample {row.id!r} of probe task {task!r}"
    if row.input_ids is not None and row.answer_ids is not None and row.image is None:
        return _from_ids(row.id, row.input_ids, row.answer_ids, encoder)
    if encoder is None:
        raise ProbeError(
            f"{where} needs a tokenizer (or, for an image, an image processor), and none was given. "
            "Give an encoder, or give `input_ids` with `answer_ids` and no image."
        )
    sample = Sample(row.id, task, row.prompt or "", row.answer or "", row.image)
    if row.prompt is not None:
        return encoder.encode(sample)
    plain = encoder.encode(sample)  # the encoder's own answer tokens and pixels, whatever the prompt looks like
    answer = row.answer_ids if row.answer_ids is not None else tuple(int(i) for i in plain.input_ids[plain.n_prompt :])
    prompt = row.input_ids if row.input_ids is not None else _render(where, row, encoder)
    return replace(_from_ids(row.id, prompt, answer, encoder), pixel_values=plain.pixel_values)


def _render(where: str, row: ProbeSample, encoder: Encoder) -> tuple[int, ...]:
    tokenizer = encoder.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise ProbeError(
            f"{where} is in chat form (`messages`), and the tokenizer has no chat template. "
            "Give it as `prompt`, or use a tokenizer with a chat template."
        )
    rendered: Any = tokenizer.apply_chat_template(
        [dict(message) for message in row.messages or ()],  # type: ignore[arg-type]  # contents may also be lists of parts
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
    )
    ids = tuple(int(i) for i in rendered)
    if row.image is not None and encoder.image_token_id not in ids:
        ids = (int(encoder.image_token_id or 0),) * encoder.image_seq_length + ids
    return ids


def _from_ids(sample_id: str, prompt: Sequence[int], answer: Sequence[int], encoder: Encoder | None) -> Encoded:
    ids = np.asarray([*prompt, *answer], dtype=np.int64)
    roles = np.full(len(ids), ROLES.index("prompt"), dtype=np.uint8)
    if encoder is not None and encoder.image_token_id is not None:
        roles[ids == encoder.image_token_id] = ROLES.index("image")
    roles[len(prompt) :] = ROLES.index("answer")
    return Encoded(sample_id, ids, roles, len(prompt), None)


def _misfits(
    encoded: Mapping[str, Sequence[Encoded]], roles: Sequence[str], model: nn.Module, encoder: Encoder | None
) -> list[str]:
    problems = []
    get_embeddings = getattr(model, "get_input_embeddings", None)
    vocabulary = get_embeddings().num_embeddings if callable(get_embeddings) else None
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None) or config
    context = getattr(text_config, "max_position_embeddings", None)
    for task, rows in encoded.items():
        if not any(ROLES[role] in roles for row in rows for role in np.unique(row.roles)):
            problems.append(f"task {task!r} has no token with the roles to record ({', '.join(roles)})")
        for row in rows:
            where = f"sample {row.sample_id!r} of task {task!r}"
            largest, smallest = int(row.input_ids.max(initial=0)), int(row.input_ids.min(initial=0))
            if vocabulary is not None and (largest >= vocabulary or smallest < 0):
                wrong = largest if largest >= vocabulary else smallest
                problems.append(f"{where} has token id {wrong}; the model's vocabulary has ids 0 to {vocabulary - 1}")
            if context is not None and len(row.input_ids) > context:
                problems.append(f"{where} has {len(row.input_ids)} tokens; the model's context holds {context}")
            if row.pixel_values is not None and encoder is not None:
                found = int((row.roles == ROLES.index("image")).sum())
                if found != encoder.image_seq_length:
                    problems.append(
                        f"{where} has {found} image placeholders (token id {encoder.image_token_id}); "
                        f"the model needs {encoder.image_seq_length}"
                    )
    return problems
