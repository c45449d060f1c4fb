"""What recording costs on the built-in backbone, and on a small random Mixtral, as ratios inside one run.

Each number is the median over pairs (bare forward, recorded forward) of the same batch, alternating which comes first;
"recorded" includes hooks, sums over all tokens, stored rows and the copy to the host. "whole model" is the plain
forward; "adapted layers" starts from cached lower layers, as ``record_run`` does, so that the frozen layers cannot hide
the cost. The last column adds the file: compression, checksums and the verification that reads it again, over all bare
forwards of the recording. Time is CPU time of this process, which other work on the machine disturbs little.

    python benchmarks/recording_overhead.py [--models builtin mixtral] [--out FILE] [--batch-size 16] [--tasks 6]
        [--repeats 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from driftlens.adapters import MoELoraConfig, iter_sites
from driftlens.backbones import Backbone, Encoded, Encoder, load_backbone
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.recording import ProbePrefix, ProbeSample, ProbeSet, find_sites, record
from driftlens.recording.batches import Plan
from driftlens.recording.observer import Observer
from driftlens.recording.overhead import paired_ratios
from driftlens.recording.recorder import inference
from driftlens.recording.sites import base_module
from driftlens.store import estimate_bytes
from driftlens.streams import load_stream

BAR_PERCENT = 10.0
LAYERS = range(20, 30)
DESCRIPTIONS = {
    "builtin": "Built-in backbone, 30 sites (gate/up/down of layers 20 to 29), E = 4, r = 8.",
    "mixtral": "Random Mixtral: 8 layers (8 sites), 8 experts, top-2, width 256, experts 512 wide, 64 tokens each.",
}
TARGETS = ["gate_proj", "up_proj", "down_proj"]


def build(gate: str) -> tuple[Backbone, PeftModel]:
    """The built-in backbone with 30 sites of 4 experts of rank 8, all of which do something."""
    backbone = load_backbone("builtin")
    torch.manual_seed(0)
    config = MoELoraConfig(
        num_experts=4, r=8, gate=gate, target_modules=TARGETS, layers_to_transform=list(LAYERS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(backbone.model, config)
    with torch.no_grad():
        for _, layer in iter_sites(model):
            layer.moe_lora_B["default"].weight.normal_(0, 0.01)
    return backbone, model


@contextmanager
def ready(root: nn.Module, prefix: ProbePrefix | None) -> Iterator[None]:
    with (
        inference(root, torch.device("cpu")),
        nullcontext() if prefix is None else prefix.prefix.skipping(),
    ):
        yield


def measure(gate: str, tasks: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    backbone, model = build(gate)
    encoder = backbone.need_encoder()
    stream = load_stream("builtin").subset(tasks, samples={"probe": batch_size})
    probes = ProbeSet.from_stream(stream)
    encoded = probes.encode(encoder)
    prefix = FrozenPrefix(model, LAYERS[0], encoder.pad_token_id)
    states = {task: prefix.compute(rows, batch_size, "cpu") for task, rows in encoded.items()}
    return [
        timed(model, probes, encoded, encoder, cached, batch_size, repeats) | {"gate": gate, "forward": label}
        for label, cached in (("whole model", None), ("adapted layers", ProbePrefix(prefix, states)))
    ]


def timed(
    model: nn.Module,
    probes: ProbeSet,
    encoded: Mapping[str, list[Encoded]],
    encoder: Encoder | None,
    cached: ProbePrefix | None,
    batch_size: int,
    repeats: int,
) -> dict[str, Any]:
    """Pairs of bare and recorded forwards, then a whole recording with its file."""
    root = base_module(model)
    plan = make_plan(probes, encoded, batch_size, 0 if encoder is None else encoder.pad_token_id, cached)
    batches = list(plan.batches())
    observer = Observer(find_sites(model))
    with ready(root, cached):
        ratios = paired_ratios(root, observer, batches, repeats, time.process_time)
        start = time.process_time()
        for batch in batches:
            root(**batch.inputs)
        bare = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        start = time.process_time()
        record(model, probes, path, encoder=encoder, checkpoint_meta={}, batch_size=batch_size, prefix=cached)
        complete = time.process_time() - start
        size = path.stat().st_size
    infos = [site.info for site in observer.sites]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "sites": len(infos),
        "batches": len(batches),
        "tokens": plan.tokens,
        "pairs": len(ratios),
        "overhead": 100 * (statistics.median(ratios) - 1),
        "low": 100 * (quartiles[0] - 1),
        "high": 100 * (quartiles[2] - 1),
        "bare": 1000 * bare / len(batches),
        "file": 100 * (complete / bare - 1),
        "mb": size / 1e6,
        "arithmetic": estimate_bytes(infos, plan.stored_tokens, len(probes.tasks)) / 1e6,
    }


def build_mixtral() -> MixtralForCausalLM:
    """Eight layers of eight experts, top-2, random: large enough that a forward is not all Python."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    return MixtralForCausalLM(config).eval()


def token_probes(tasks: int, samples: int, length: int = 64) -> ProbeSet:
    """Random token ids, so that no tokenizer is needed."""
    g = np.random.default_rng(0)

    def sample(number: int) -> ProbeSample:
        ids = [int(i) for i in g.integers(3, 512, length)]
        return ProbeSample(str(number), input_ids=tuple(ids[:-2]), answer_ids=tuple(ids[-2:]))

    return ProbeSet({f"task-{t}": tuple(sample(n) for n in range(samples)) for t in range(tasks)})


def measure_mixtral(tasks: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    model, probes = build_mixtral(), token_probes(tasks, batch_size)
    encoded = probes.check_fits(model, None)
    return [
        timed(model, probes, encoded, None, None, batch_size, repeats)
        | {"gate": "Mixtral, top-2", "forward": "whole model"}
    ]


def make_plan(
    probes: ProbeSet, encoded: Mapping[str, list[Encoded]], size: int, pad: int, cached: ProbePrefix | None
) -> Plan:
    return Plan(
        probes,
        encoded,
        limit=None,
        seed=0,
        batch_size=size,
        padding_side="left",
        pad_token_id=pad,
        device=torch.device("cpu"),
        dtype=torch.float32,
        prefix=cached,
        options={"use_cache": False, "logits_to_keep": 1},
    )


def report(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    worst = max(row["overhead"] for row in rows if row["forward"] == "whole model")
    explanation = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    verdict = "met" if worst <= BAR_PERCENT else "MISSED"
    lines = [
        "# Recording overhead",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()} with {os.cpu_count()} cores, "
        f"{arguments.threads} thread(s), Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, "
        f"peft {peft.__version__}, float32.",
        "",
        *(DESCRIPTIONS[name] for name in arguments.models),
        f"Every token's row is stored; batches of {arguments.batch_size} probes. {explanation}",
        "",
        f"Bar: at most {BAR_PERCENT:.0f} % over the bare forward on a CPU. **{verdict}**: {worst:.1f} % at worst.",
        "",
        "| gate | forward | pairs | bare forward (CPU ms per batch) | overhead % (median) | quartiles | "
        "with file and verification % | file MB | arithmetic MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['gate']} | {r['forward']} | {r['pairs']} | {r['bare']:.0f} | **{r['overhead']:.1f}** | "
        f"{r['low']:.1f} to {r['high']:.1f} | {r['file']:.0f} | {r['mb']:.2f} | {r['arithmetic']:.2f} |"
        for r in rows
    ]
    lines += ["", "Arithmetic: bytes of the arrays before compression.", ""]
    lines += [f"Tokens recorded, {r['gate']}: {r['tokens']} in {r['batches']} batches (one per task)." for r in rows]
    lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recorded forward against bare forward.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recording_overhead.md")
    parser.add_argument("--models", nargs="+", choices=list(DESCRIPTIONS), default=list(DESCRIPTIONS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=6, help="one batch of each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gates", nargs="+", default=["softmax", "energy"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for gate in arguments.gates if "builtin" in arguments.models else []:
        rows += measure(gate, arguments.tasks, arguments.batch_size, arguments.repeats)
    if "mixtral" in arguments.models:
        rows += measure_mixtral(arguments.tasks, arguments.batch_size, arguments.repeats)
    text = report(rows, arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
