"""Scoring: greedy answers and the negative log-likelihood of the reference answers.

Both come from one pass over the prompt. The reference is scored by feeding its tokens after the prompt's
key-value cache; the cache is then cut back to the prompt, and the answer is generated from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from driftlens.backbones import Encoded, Encoder, collate
from driftlens.backbones.prefix import FrozenPrefix, KeyValues
from driftlens.streams import Sample, lenient_match, strict_match
from driftlens.training.data import last_positions

__all__ = ["ScoredAnswer", "TaskScorer"]


@dataclass(frozen=True)
class ScoredAnswer:
    """One sample's outcome: the generated text, whether it is right, and the reference's mean token NLL in nats."""

    sample: str
    prediction: str
    reference: str
    strict: bool
    lenient: bool
    nll: float


@dataclass(frozen=True)
class _Batch:
    """Padded prompts with what was computed of them once: prefix states and the skipped layers' keys and values."""

    samples: Sequence[Sample]
    prompt: dict[str, Any]
    answer: Int[Tensor, "batch m"]
    answer_mask: Int[Tensor, "batch m"]
    hidden: Float[Tensor, "batch n d_model"] | None
    lower: KeyValues | None


class TaskScorer:
    """Scores a model on one task's samples, again and again over the stream.

    Args:
        samples: the task's test samples.
        encoder: the backbone's encoder.
        prefix: the frozen prefix whose states are kept between calls, or None to run the whole model each time.
        batch_size: prompts per forward.
        max_new_tokens: longest generated answer.
        device: where the model lives.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        *,
        prefix: FrozenPrefix | None,
        batch_size: int,
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        self.encoder, self.prefix, self.max_new_tokens, self.device = encoder, prefix, max_new_tokens, device
        # Samples of like length share a batch; results are returned in the given order.
        encoded = [encoder.encode(sample) for sample in samples]
        self._order = sorted(range(len(samples)), key=lambda i: encoded[i].n_prompt)
        chunks = [self._order[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        self._batches = [self._prepare([samples[i] for i in chunk], [encoded[i] for i in chunk]) for chunk in chunks]

    def _prepare(self, samples: Sequence[Sample], encoded: Sequence[Encoded]) -> _Batch:
        prompts = [prompt_only(sample) for sample in encoded]
        prompt = collate(prompts, pad_token_id=self.encoder.pad_token_id, device=self.device)
        answers = [torch.from_numpy(sample.input_ids[sample.n_prompt :]) for sample in encoded]
        answer = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=self.encoder.pad_token_id)
        lengths = torch.tensor([len(tokens) for tokens in answers])
        mask = (torch.arange(answer.shape[1])[None, :] < lengths[:, None]).long()
        hidden, lower = (None, None) if self.prefix is None else self.prefix.key_values(prompt)
        return _Batch(samples, prompt, answer.to(self.device), mask.to(self.device), hidden, lower)

    @torch.inference_mode()
    def score(self, model: nn.Module) -> list[ScoredAnswer]:
        """Return one outcome per sample, in the order in which the samples were given."""
        was_training = model.training
        model.eval()
        try:
            flat = [outcome for batch in self._batches for outcome in self._score(model, batch)]
        finally:
            model.train(was_training)
        ordered: list[ScoredAnswer] = [flat[0]] * len(flat)
        for position, index in enumerate(self._order):
            ordered[index] = flat[position]
        return ordered

    def _score(self, model: nn.Module, batch: _Batch) -> list[ScoredAnswer]:
        cache = DynamicCache()
        first = self._prefill(model, batch, cache)
        nll = self._reference_nll(model, batch, cache, first)
        tokens = self._generate(model, batch, cache, first)
        texts = [self.encoder.decode(row) for row in tokens.tolist()]
        return [
            ScoredAnswer(
                sample.id,
                text,
                sample.answer,
                strict_match(text, sample.answer, sample.aliases),
                lenient_match(text, sample.answer, sample.aliases),
                value,
            )
            for sample, text, value in zip(batch.samples, texts, nll.tolist(), strict=True)
        ]

    def _prefill(self, model: nn.Module, batch: _Batch, cache: DynamicCache) -> Float[Tensor, "batch vocabulary"]:
        """Fill ``cache`` with the prompts and return the logits of the first answer token."""
        masks = {key: batch.prompt[key] for key in ("attention_mask", "position_ids")}
        inputs: dict[str, Tensor]
        context: AbstractContextManager[None]
        if self.prefix is None or batch.hidden is None:
            inputs = {key: batch.prompt[key] for key in ("input_ids", "pixel_values") if key in batch.prompt}
            context = nullcontext()
        else:
            inputs, context = {"inputs_embeds": batch.hidden}, self.prefix.skipping()
        with context:
            keep = last_positions(masks["attention_mask"].shape[1], 1).to(self.device)
            output = model(**inputs, **masks, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        if batch.lower is not None:
            batch.lower.fill(cache)
        logits: Tensor = output.logits[:, -1]
        return logits.float()

    def _continue(
        self, model: nn.Module, batch: _Batch, cache: DynamicCache, tokens: Tensor, mask: Tensor, done: int
    ) -> Float[Tensor, "batch m vocabulary"]:
        """Feed ``tokens`` [B, m] after the prompt and ``done`` earlier tokens; ``mask`` covers all tokens after it."""
        prompt_mask = batch.prompt["attention_mask"]
        start = prompt_mask.sum(dim=1, keepdim=True) + done
        positions = start + torch.arange(tokens.shape[1], device=tokens.device)
        output = model(
            input_ids=tokens,
            attention_mask=torch.cat([prompt_mask, mask], dim=1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = output.logits
        return logits.float()

    def _reference_nll(
        self, model: nn.Module, batch: _Batch, cache: DynamicCache, first: Tensor
    ) -> Float[Tensor, " batch"]:
        """Return the mean NLL of the reference tokens (end token included); the cache is left as it was."""
        logits = self._continue(model, batch, cache, batch.answer, batch.answer_mask, 0)
        cache.crop(-batch.answer.shape[1])
        predicted = torch.cat([first[:, None], logits[:, :-1]], dim=1)
        losses = nn.functional.cross_entropy(predicted.transpose(1, 2), batch.answer, reduction="none")
        return (losses * batch.answer_mask).sum(dim=1).double() / batch.answer_mask.sum(dim=1)

    def _generate(self, model: nn.Module, batch: _Batch, cache: DynamicCache, first: Tensor) -> Int[Tensor, "batch m"]:
        """Return greedy tokens, the end token and what follows it replaced by padding."""
        token = first.argmax(dim=-1)
        finished = token == self.encoder.end_token_id
        produced = [token]
        # A finished row goes on being fed (its output is discarded): no row depends on its neighbours.
        for done in range(self.max_new_tokens - 1):
            if bool(finished.all()):
                break
            mask = torch.ones(len(token), done + 1, dtype=torch.long, device=token.device)
            token = self._continue(model, batch, cache, token[:, None], mask, done)[:, -1].argmax(dim=-1)
            produced.append(token)
            finished |= token == self.encoder.end_token_id
        tokens = torch.stack(produced, dim=1)
        ended = (tokens == self.encoder.end_token_id).cumsum(dim=1) > 0
        return tokens.masked_fill(ended, self.encoder.pad_token_id)


def prompt_only(sample: Encoded) -> Encoded:
    """Return the sample without its answer."""
    return Encoded(
        sample.sample_id,
        sample.input_ids[: sample.n_prompt],
        sample.roles[: sample.n_prompt],
        sample.n_prompt,
        sample.pixel_values,
    )
