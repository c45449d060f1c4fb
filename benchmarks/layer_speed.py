"""Speed of the MoE-LoRA layer, as ratios inside one run.

Each number is the median, over pairs of runs A B A B ..., of the time of our layer over that of another layer on
the same input: a plain PEFT LoRA of rank E * r, or one module per expert in a loop, as published MoE-LoRA code has
it. "whole" times the layer with its base product; "adapter" replaces the base product by a constant, so that it
cannot hide what the adapter costs. Time is CPU time of this process: with one thread it equals the time on the clock
of an idle machine, and other work on the machine disturbs it far less.

    python benchmarks/layer_speed.py [--out FILE] [--tokens 256] [--seconds 0.25] [--threads 1]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from driftlens.adapters import MoELoraConfig, MoELoraLinear

EXPERTS, RANKS, WIDTHS, GATES = (6, 8), (8, 16), (1024, 2048, 4096), ("softmax", "topk", "energy")
BARS = {"forward": 1.10, "forward+backward": 1.20}
LOOP_BAR = 2.0


class ConstantLinear(nn.Linear):
    """A linear module whose product is already known: it costs nothing."""

    def __init__(self, base: nn.Linear, h: Tensor) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight = base.weight
        self.output = base(h).detach()

    def forward(self, h: Tensor) -> Tensor:
        return self.output


class LoopLinear(nn.Module):
    """One A, B and dropout module per expert and a loop over them; the same equation as ``MoELoraLinear``."""

    def __init__(self, base: nn.Linear, config: MoELoraConfig) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.r, self.gate = base, config.scaling, config.r, config.gate
        d_in, d_out, count = base.in_features, base.out_features, config.num_experts
        self.A = nn.ModuleList(nn.Linear(d_in, config.r, bias=False) for _ in range(count))
        self.B = nn.ModuleList(nn.Linear(config.r, d_out, bias=False) for _ in range(count))
        self.dropout = nn.ModuleList(nn.Identity() for _ in range(count))
        self.router = None if config.gate == "energy" else nn.Linear(d_in, count, bias=False)
        self.top_k = config.top_k if config.gate == "topk" else count

    def forward(self, h: Tensor) -> Tensor:
        result = self.base_layer(h)
        if self.router is None:
            scores = torch.stack([(A(h) ** 2).sum(-1) / self.r for A in self.A], dim=-1)
        else:
            scores = self.router(h)
        weights = torch.softmax(scores.float(), dim=-1)
        if self.top_k < len(self.A):
            best, index = weights.topk(self.top_k, dim=-1)
            weights = torch.zeros_like(weights).scatter(-1, index, best / best.sum(-1, keepdim=True))
        for e, (A, B, drop) in enumerate(zip(self.A, self.B, self.dropout, strict=True)):
            result = result + B(A(drop(h))) * self.scaling * weights[..., e : e + 1]
        return result


def seconds(layer: nn.Module, h: Tensor, grad: Tensor | None) -> float:
    """Return the CPU time of one forward (no graph), or of one forward and backward when ``grad`` is given."""
    start = time.process_time()
    if grad is None:
        with torch.no_grad():
            layer(h)
    else:
        layer(h).backward(grad)
    return time.process_time() - start


def median_ratio(ours: nn.Module, other: nn.Module, h: Tensor, grad: Tensor | None, budget: float) -> float:
    """Return the median of time(ours) / time(other) over interleaved pairs, after one warm-up of each.

    At least 3 pairs are run, and more until they have taken ``budget`` seconds.
    """
    for layer in (ours, other):
        seconds(layer, h, grad)
    ratios: list[float] = []
    spent = 0.0
    while len(ratios) < 3 or spent < budget:
        first, second = seconds(ours, h, grad), seconds(other, h, grad)
        ratios.append(first / second)
        spent += first + second
    return statistics.median(ratios)


def measure(d: int, num_experts: int, r: int, gate: str, tokens: int, budget: float) -> dict[str, float]:
    """Return the eight ratios of one configuration."""
    torch.manual_seed(0)
    config = MoELoraConfig(num_experts=num_experts, r=r, gate=gate, top_k=2)
    rank = num_experts * r
    lora_config = LoraConfig(r=rank, lora_alpha=config.scaling * rank)
    h = torch.randn(2, tokens // 2, d, requires_grad=True)
    base = nn.Linear(d, d, bias=False).requires_grad_(False)
    grad = torch.randn(2, tokens // 2, d)
    makers: dict[str, Callable[[nn.Linear], nn.Module]] = {
        "ours": lambda linear: MoELoraLinear(linear, "default", config),
        "lora": lambda linear: LoraLinear(linear, "default", lora_config, r=rank, lora_alpha=config.scaling * rank),
        "loop": lambda linear: LoopLinear(linear, config),
    }
    found = {}
    for part, linear in (("whole", base), ("adapter", ConstantLinear(base, h))):
        layers = {name: make(linear) for name, make in makers.items()}
        for mode, gradient in (("forward", None), ("forward+backward", grad)):
            for other in ("lora", "loop"):
                ratio = median_ratio(layers["ours"], layers[other], h, gradient, budget)
                found[f"{part} {mode} {other}"] = ratio if other == "lora" else 1 / ratio
    return found


def cpu_name() -> str:
    """Return the processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(rows: list[tuple[tuple[int, int, int, str], dict[str, float]]], part: str) -> list[str]:
    """Return the Markdown table of one part of the layer."""
    columns = [f"{part} {mode} {other}" for other in ("lora", "loop") for mode in BARS]
    lines = [
        "| d | E | r | gate | forward / LoRA | fwd+bwd / LoRA | loop / forward | loop / fwd+bwd |",
        "|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for (d, num_experts, r, gate), found in rows:
        cells = " | ".join(f"{found[column]:.2f}" for column in columns)
        lines.append(f"| {d} | {num_experts} | {r} | {gate} | {cells} |")
    summary = {column: [found[column] for _, found in rows] for column in columns}
    medians = " | ".join(f"{statistics.median(values):.2f}" for values in summary.values())
    worst = " | ".join(f"{(max if 'lora' in c else min)(v):.2f}" for c, v in summary.items())
    return [*lines, f"| | | | **median** | {medians} |", f"| | | | **worst** | {worst} |"]


def verdicts(rows: list[tuple[tuple[int, int, int, str], dict[str, float]]]) -> list[str]:
    """Return one line per bar: how many configurations meet it."""
    lines = []
    for part in ("whole", "adapter"):
        for mode, bar in BARS.items():
            values = [found[f"{part} {mode} lora"] for _, found in rows]
            met = sum(value <= bar for value in values)
            lines.append(f"- {part}, {mode}, at most {bar:.2f}x plain LoRA of rank E*r: {met} of {len(values)}")
        for mode in BARS:
            values = [found[f"{part} {mode} loop"] for _, found in rows]
            met = sum(value >= LOOP_BAR for value in values)
            lines.append(f"- {part}, {mode}, at least {LOOP_BAR:.0f}x faster than the loop: {met} of {len(values)}")
    return lines


READING = """\
The base product dominates the whole layer (2 d^2 operations per token against 4 d E r), so the whole layer cannot be
much faster than the loop, which shares that product; the 2x bar says something about the adapter alone. There the
loop loses by its E narrow products and 3 E passes over an output-sized tensor. Both run the same number of operations,
so at E r of 96 and above, where the products take most of the time, the gap closes from above 3x towards 2x. Against
plain LoRA the adapter alone pays for what LoRA does not have: a router is one more product with E rows (12 % of A's
operations at r = 8), and top-k adds a sort; the energy gate has neither."""


def main() -> None:
    """Run every configuration and write the table."""
    parser = argparse.ArgumentParser(description="Ratios of the MoE-LoRA layer's speed.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layer_speed.md")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per forward, in two samples")
    parser.add_argument("--seconds", type=float, default=0.25, help="time for each ratio; at least 3 pairs are run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.process_time()
    rows = []
    for d in WIDTHS:
        for num_experts in EXPERTS:
            for r in RANKS:
                for gate in GATES:
                    found = measure(d, num_experts, r, gate, options.tokens, options.seconds)
                    rows.append(((d, num_experts, r, gate), found))
                    print(d, num_experts, r, gate, {key: round(value, 2) for key, value in found.items()}, flush=True)
    took = time.process_time() - start
    text = [
        "# Speed of the MoE-LoRA layer",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}, {options.threads} thread(s), "
        f"float32, {options.tokens} tokens; "
        f"torch {torch.__version__}, peft {peft.__version__}, Python {platform.python_version()}; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {took:.0f} s. Made by `benchmarks/layer_speed.py`.",
        "",
        "Median of ratios of CPU time over interleaved pairs of runs. First two columns: our time over that of a plain "
        "PEFT LoRA `Linear` of rank E*r (lower is better). Last two: time of one module per expert in a loop over "
        "ours (higher is better). Backward: gradients of the input and of the adapter's parameters; the base weight "
        "is frozen.",
        "",
        *verdicts(rows),
        "",
        READING,
        "",
        "## The adapter alone (base product replaced by a constant)",
        "",
        *table(rows, "adapter"),
        "",
        "## The whole layer",
        "",
        *table(rows, "whole"),
        "",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(text))
    print("\n".join([*verdicts(rows), f"written: {options.out} ({took:.0f} s)"]))


if __name__ == "__main__":
    main()
