"""What recording costs on the built-in backbone, as ratios inside one run.

Each number is the median over pairs (bare forward, recorded forward) of the same batch, alternating which comes first;
"recorded" includes hooks, sums over all tokens, stored rows and the copy to the host. "whole model" is the plain
forward; "adapted layers" starts from cached lower layers, as ``record_run`` does, so that the frozen layers cannot hide
the cost. The last column adds the file: compression, checksums and the verification that reads it again, over all bare
forwards of the recording. Time is CPU time of this process, which other work on the machine disturbs little.

    python benchmarks/recording_overhead.py [--out FILE] [--batch-size 16] [--tasks 6] [--repeats 3] [--threads 1]
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

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model

from driftlens.adapters import MoELoraConfig, iter_sites
from driftlens.backbones import Backbone, Encoded, load_backbone
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.recording import ProbePrefix, ProbeSet, find_sites, record
from driftlens.recording.batches import Plan
from driftlens.recording.observer import Observer
from driftlens.recording.overhead import paired_ratios
from driftlens.recording.recorder import inference
from driftlens.streams import load_stream

BAR_PERCENT = 10.0
LAYERS = range(20, 30)
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
def ready(model: PeftModel, prefix: ProbePrefix | None) -> Iterator[None]:
    with (
        inference(model.get_base_model(), torch.device("cpu")),
        nullcontext() if prefix is None else prefix.prefix.skipping(),
    ):
        yield


def measure(gate: str, tasks: int, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    backbone, model = build(gate)
    root, encoder = model.get_base_model(), backbone.encoder
    stream = load_stream("builtin").subset(tasks, samples={"probe": batch_size})
    probes = ProbeSet.from_stream(stream)
    encoded = probes.encode(encoder)
    prefix = FrozenPrefix(model, LAYERS[0], encoder.pad_token_id)
    states = {task: prefix.compute(rows, batch_size, "cpu") for task, rows in encoded.items()}
    rows = []
    for label, cached in (("whole model", None), ("adapted layers", ProbePrefix(prefix, states))):
        plan = make_plan(probes, encoded, batch_size, encoder.pad_token_id, cached)
        batches = list(plan.batches())
        with ready(model, cached):
            ratios = paired_ratios(root, Observer(find_sites(model)), batches, repeats, time.process_time)
            start = time.process_time()
            for batch in batches:
                root(**batch.inputs)
            bare = time.process_time() - start
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            record(
                model,
                probes,
                Path(folder) / "x.h5",
                encoder=encoder,
                checkpoint_meta={},
                batch_size=batch_size,
                prefix=cached,
            )
            complete = time.process_time() - start
            size = (Path(folder) / "x.h5").stat().st_size
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "gate": gate,
                "forward": label,
                "batches": len(batches),
                "tokens": plan.tokens,
                "pairs": len(ratios),
                "overhead": 100 * (statistics.median(ratios) - 1),
                "low": 100 * (quartiles[0] - 1),
                "high": 100 * (quartiles[2] - 1),
                "bare": 1000 * bare / len(batches),
                "file": 100 * (complete / bare - 1),
                "mb": size / 1e6,
            }
        )
    return rows


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
        "Built-in backbone, 30 sites (gate/up/down of layers 20 to 29), E = 4, r = 8, every token's row stored, "
        f"batches of {arguments.batch_size} probes. {explanation}",
        "",
        f"Bar: at most {BAR_PERCENT:.0f} % over the bare forward on a CPU. **{verdict}**: {worst:.1f} % at worst.",
        "",
        "| gate | forward | pairs | bare forward (CPU ms per batch) | overhead % (median) | quartiles | "
        "with file and verification % | file MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['gate']} | {r['forward']} | {r['pairs']} | {r['bare']:.0f} | **{r['overhead']:.1f}** | "
        f"{r['low']:.1f} to {r['high']:.1f} | {r['file']:.0f} | {r['mb']:.2f} |"
        for r in rows
    ]
    lines += ["", f"Tokens recorded: {rows[0]['tokens']} in {rows[0]['batches']} batches (one per task).", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recorded forward against bare forward.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recording_overhead.md")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=6, help="one batch of each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gates", nargs="+", default=["softmax", "energy"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for gate in arguments.gates:
        rows += measure(gate, arguments.tasks, arguments.batch_size, arguments.repeats)
    text = report(rows, arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
