"""The plain baselines: sequential LoRA and MoELoRA with a dense or a top-k softmax router."""

from __future__ import annotations

from driftlens.adapters import MoELoraConfig
from driftlens.methods.base import METHODS, AdapterOptions, Method

__all__ = ["MoELora", "MoELoraTopK", "SequentialLora"]


class SequentialLora(Method):
    """One LoRA, trained on every task in turn, with nothing kept: the lower bound.

    It has the same number of adapter parameters as the mixtures: one expert of rank ``num_experts * r``. The
    scaling alpha / r is kept, so that the update of a freshly initialised site has the mixtures' step size.
    """

    name = "seq-lora"
    title = "Sequential LoRA"
    source = "Hu et al. 2022, arXiv 2106.09685, trained task after task"
    summary = "One LoRA of rank E*r, no router, nothing kept."
    gate = "energy"  # one expert has gate 1 under any softmax; this kind owns no router

    def adapter_config(self, adapter: AdapterOptions) -> MoELoraConfig:
        """Return one expert that holds the whole rank budget."""
        rank = adapter.num_experts * adapter.r
        single = adapter.model_copy(
            update={
                "num_experts": 1,
                "r": rank,
                "lora_alpha": adapter.lora_alpha / adapter.r * rank,
                "top_k": 1,
                "load_balance_coef": 0.0,
            }
        )
        return super().adapter_config(single)


class MoELora(Method):
    """MoELoRA as in CoIN: E experts behind one linear softmax router per site, all trained, nothing kept."""

    name = "moe-lora"
    title = "MoELoRA (softmax)"
    source = "Chen et al. 2024 (CoIN), arXiv 2403.08350"
    summary = "Dense softmax router per site; every expert acts on every token."
    gate = "softmax"


class MoELoraTopK(Method):
    """MoELoRA whose router keeps the ``top_k`` best experts of each token, renormalised."""

    name = "moe-lora-topk"
    title = "MoELoRA (top-k)"
    source = "Chen et al. 2024 (CoIN), arXiv 2403.08350; top-k baseline of PASs-MoE, arXiv 2601.13020"
    summary = "Softmax router per site; only the k best experts of a token act."
    gate = "topk"


for _method in (SequentialLora, MoELora, MoELoraTopK):
    METHODS.register(_method.name, _method)
