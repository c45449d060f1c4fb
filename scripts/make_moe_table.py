"""Write docs/moe_models.md: every MoE model type of transformers, and how its gate is defined.

Run ``python scripts/make_moe_table.py`` from the repository's folder; it takes seconds. Each row comes from a tiny
random model of that type; `tests/recording/test_native_moe.py` compares the page with what the code finds.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from driftlens.recording.families.native_gates import UNREADABLE
from driftlens.recording.families.native_moe import NativeMoEFamily, router_kind
from tests.recording.tiny_moe import MODELS, NOT_ROUTED, TinyMoE, build

HEAD = """# Mixture-of-experts models of transformers

Made by `scripts/make_moe_table.py` from one tiny random model per model type (transformers 5.23);
`tests/recording/test_native_moe.py` runs every one of them and holds the recorded gates to the weights that the experts
modules were handed in the same forward (1e-6), and the chosen experts to those that ran.

A router is found through the model class's own declaration of its recordable router outputs
(`_can_record_outputs["router_logits"]`) and read as `driftlens/recording/families/native_gates.py` says for its class.
A router class that is not in that table is reported with a warning and not recorded.

- **Gate** is what a site of this type says of itself (`SiteInfo.gate`). Groups, shared experts and factors are switched
  on in the tiny configuration where the model has them. *top-k, softmax* is a softmax over the chosen logits, which
  sums to 1; *by score + bias* is a bias that takes part in the choice and not in the weight.
- **Renormalised**: whether the chosen weights are divided by their sum; a name is the field of the configuration that
  decides. Where rows need not sum to 1 the site says so (`SiteInfo.normalised`).
- **Factor**: the model multiplies the routed sum by a constant. It is kept out of the gate, in `SiteInfo.scaling`.
- **Answers**: the gate can be computed for other inputs, as `--reference` needs. Not so where a router looks at more
  than its own input (token ids, the batch, the layer below).

Types that end in `_text` are the language models inside image-text models; any model that holds one of these as a
module is read the same way. Encoder-decoder models are read in both halves, but the recorder feeds decoder-only models.

| model type | gate | renormalised | factor | shared experts | answers |
|---|---|---|---|---|---|
"""

WITHOUT = """
## Not recorded

| model type or router | why |
|---|---|
"""


def row(tiny: TinyMoE) -> str:
    """Return the line of one model type; several gates in one model are separated by semicolons."""
    model = build(tiny)
    sites = list(NativeMoEFamily().find(model))
    kinds = [kind for kind in map(router_kind, model.modules()) if kind is not None]
    gates = dict.fromkeys(site.info.gate for site in sites)
    decides = dict.fromkeys(
        f"`{kind.renormalised}`"
        if isinstance(kind.renormalised, str)
        else "by configuration"
        if callable(kind.renormalised)
        else "yes"
        if kind.renormalised
        else "no"
        for kind in kinds
    )
    factor = "yes" if any(site.info.scaling != 1 for site in sites) else "-"
    shared = max(site.info.shared_experts for site in sites) or "-"
    answers = "yes" if all(site.respond is not None for site in sites) else "no"
    if any(site.respond is not None for site in sites) and answers == "no":
        answers = "in part"
    cells = [f"`{tiny.model_type}`", "; ".join(gates), "; ".join(decides), factor, shared, answers]
    return f"| {' | '.join(map(str, cells))} |"


def page() -> str:
    """Return the whole page."""
    lines = sorted(row(tiny) for tiny in MODELS)
    without = {f"`{name}`": reason for name, reason in (UNREADABLE | NOT_ROUTED).items()}
    rest = [f"| {name} | {reason} |" for name, reason in sorted(without.items())]
    return HEAD + "\n".join(lines) + "\n" + WITHOUT + "\n".join(rest) + "\n"


def main() -> None:
    """Write the page."""
    Path("docs/moe_models.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
