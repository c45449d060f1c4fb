"""A complete small run made of seeded random numbers: real files in the real layout, drift of known size.

One expert layer per site is simulated from its equation. After every task routers and experts take a step of length
``drift``; with ``drift=0`` all checkpoints from the first task on are the same function.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from driftlens.store import Manifest, RecordingWriter, SiteInfo

KINDS = ("up_proj", "down_proj")
SCALING = 2.0


@dataclass
class Parameters:
    """Factors of one site: A [E, r, d_in], B [E, d_out, r], router [E, d_in]."""

    A: np.ndarray
    B: np.ndarray
    router: np.ndarray


@dataclass
class Inputs:
    """Tokens of one probe: per site inputs h [S, n, d_in], base outputs [S, n], and the token table."""

    h: np.ndarray
    base: np.ndarray
    tokens: dict[str, np.ndarray]
    ids: list[str]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def forward(parameters: Parameters, h: np.ndarray, gate: str) -> dict[str, np.ndarray]:
    """Gate [n, E], pathway [n, E, r] and expert norms [n, E] of inputs h [n, d_in], from the layer's equation."""
    z = np.einsum("erd,nd->ner", parameters.A, h)
    if gate == "uniform":
        pi = np.full(z.shape[:2], 1 / z.shape[1])
    elif gate == "topk":
        logits = h @ parameters.router.T
        kept = np.argsort(-logits, axis=-1)[:, :2]
        masked = np.full_like(logits, -np.inf)
        np.put_along_axis(masked, kept, np.take_along_axis(logits, kept, -1), -1)
        pi = softmax(masked)
    elif gate == "energy":
        pi = softmax((z**2).mean(axis=-1))
    else:
        pi = softmax(h @ parameters.router.T)
    norm = np.linalg.norm(SCALING * np.einsum("eor,ner->neo", parameters.B, z), axis=-1)
    return {"gate": pi, "pathway": z, "expert_norm": norm}


def make_run(
    folder: Path | str,
    *,
    tasks: tuple[str, ...] = ("digit", "colour", "country"),
    samples: int = 6,
    tokens_per_sample: int = 5,
    sites: int = 4,
    num_experts: int = 4,
    rank: int = 3,
    d_in: int = 24,
    d_out: int = 20,
    gate: str = "softmax",
    drift: float = 0.5,
    grow: int = 0,
    seed: int = 0,
    method: str = "moelora",
    noise: bool = True,
    recordings: bool = True,
    probe_seed: int = 7,
    stream_sha256: str = "5" * 64,
) -> Path:
    """Write a run and return its folder.

    Args:
        folder: where; created.
        tasks: tasks of the stream; each is a probe.
        samples: samples per probe; their numbers of tokens differ by one so that averages by sample matter.
        tokens_per_sample: tokens of the shorter samples.
        sites: number of sites; kinds alternate.
        num_experts: E.
        rank: r.
        d_in: width of inputs.
        d_out: width of outputs.
        gate: "softmax", "topk" (two experts), "energy" or "uniform".
        drift: length of the step after every task, relative to the parameters.
        grow: experts that every site gains at the last task.
        seed: seed of parameters and scores.
        method: name of the method in the configuration.
        noise: also write a second recording of the last checkpoint with inputs off by 1e-4.
        recordings: False leaves the recordings out.
        probe_seed: seed of the probes: runs with the same one saw the same tokens.
        stream_sha256: hash of the stream in the manifest.
    """
    root = Path(folder)
    root.mkdir(parents=True)
    names = ["00-start", *(f"{number:02d}-{task}" for number, task in enumerate(tasks, start=1))]
    rng = np.random.default_rng(seed)
    config = {
        "name": root.name,
        "base": "synthetic",
        "method": {"name": method},
        "stream": {"name": "synthetic", "tasks": list(tasks)},
        "adapter": {"num_experts": num_experts, "r": rank},
        "training": {"seed": seed},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    _write_checkpoints(root, names, rank)
    _write_scores(root, names, tasks, samples, rng)
    infos = [
        SiteInfo(
            name=f"model.layers.{number // 2}.mlp.{KINDS[number % 2]}",
            layer=number // 2,
            kind=KINDS[number % 2],
            num_experts=num_experts,
            rank=rank,
            d_in=d_in + number % 2,
            d_out=d_out,
            scaling=SCALING,
            gate=gate,
            top_k=2 if gate == "topk" else 0,
        )
        for number in range(sites)
    ]
    if recordings:
        (root / "recordings").mkdir()
        probes = {task: _inputs(task, infos, samples, tokens_per_sample, probe_seed) for task in tasks}
        states = _trajectory(infos, len(names), drift, rng)
        states[-1] = [_grown(parameters, grow, rng) for parameters in states[-1]]
        for name, state in zip(names, states, strict=True):
            _record(root / "recordings" / f"{name}.h5", name, infos, state, probes, gate)
        if noise:
            _record(root / "recordings" / f"{names[-1]}.noise.h5", names[-1], infos, states[-1], probes, gate, off=1e-4)
    manifest = Manifest(
        root, config_hash="c" * 64, stream_sha256=stream_sha256, probes_sha256="9" * 64, seed=seed, complete=True
    )
    for path in sorted(root.iterdir()):
        manifest.add(path.name)
    manifest.save()
    return root


def _trajectory(infos: list[SiteInfo], length: int, drift: float, rng: np.random.Generator) -> list[list[Parameters]]:
    states = [
        [
            Parameters(
                rng.normal(0, 0.2, (info.num_experts, info.rank, info.d_in)),
                np.zeros((info.num_experts, info.d_out, info.rank)),
                rng.normal(0, 0.6, (info.num_experts, info.d_in)),
            )
            for info in infos
        ]
    ]
    for number in range(1, length):
        following = []
        for info, old in zip(infos, states[-1], strict=True):
            step = drift if number > 1 else 1.0
            first = rng.normal(0, 0.2, old.B.shape) if number == 1 else old.B + step * rng.normal(0, 0.2, old.B.shape)
            following.append(
                Parameters(
                    old.A + step * rng.normal(0, 0.2, old.A.shape),
                    first,
                    old.router + step * rng.normal(0, 0.6, (info.num_experts, info.d_in)),
                )
            )
        states.append(following)
    return states


def _grown(parameters: Parameters, experts: int, rng: np.random.Generator) -> Parameters:
    def longer(old: np.ndarray, scale: float) -> np.ndarray:
        return np.concatenate([old, rng.normal(0, scale, (experts, *old.shape[1:]))])

    return Parameters(longer(parameters.A, 0.2), longer(parameters.B, 0.2), longer(parameters.router, 0.6))


def _inputs(task: str, infos: list[SiteInfo], samples: int, tokens: int, seed: int) -> Inputs:
    rng = np.random.default_rng([seed, *task.encode()])
    counts = [tokens + number % 2 for number in range(samples)]
    sample = np.repeat(np.arange(samples), counts)
    centre = rng.normal(0, 1, (len(infos), 1, max(info.d_in for info in infos)))
    h = centre + rng.normal(0, 1, (len(infos), sample.size, centre.shape[-1]))
    table = {
        "sample": sample,
        "position": np.concatenate([np.arange(count) for count in counts]),
        "token_id": rng.integers(0, 1000, sample.size),
        "role": rng.integers(0, 3, sample.size),
    }
    return Inputs(
        h, rng.uniform(1, 2, (len(infos), sample.size)), table, [f"{task}-{number}" for number in range(samples)]
    )


def _record(
    path: Path,
    name: str,
    infos: list[SiteInfo],
    state: list[Parameters],
    probes: dict[str, Inputs],
    gate: str,
    off: float = 0.0,
) -> None:
    meta = {"checkpoint": name, "probes_sha256": "9" * 64, "base": "synthetic", "dtype": "float32", "device": "cpu"}
    infos = [replace(info, num_experts=len(part.A)) for info, part in zip(infos, state, strict=True)]
    sums: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng(1)
    with RecordingWriter(
        path, sites=infos, probes=list(probes), sample_ids={p: i.ids for p, i in probes.items()}, meta=meta
    ) as writer:
        for probe, inputs in probes.items():
            values = []
            for number, (info, parameters) in enumerate(zip(infos, state, strict=True)):
                h = inputs.h[number, :, : info.d_in]
                values.append(forward(parameters, h * (1 + off * rng.normal(size=h.shape)), gate))
            stacked = {key: np.stack([value[key] for value in values]) for key in values[0]}
            stacked["base_norm"] = inputs.base
            writer.append(probe, **inputs.tokens, values=[{k: v.astype(np.float16) for k, v in stacked.items()}])
            for key, value in statistics(stacked).items():
                sums.setdefault(key, []).append(value)
        stats = {key: np.stack(values, axis=1) for key, values in sums.items()}
        stats["count"] = np.array([len(inputs.tokens["sample"]) for inputs in probes.values()], dtype=np.float64)
        writer.set_stats(0, stats)
        for number, parameters in enumerate(state):
            writer.set_weights(
                number, *(part.astype(np.float32) for part in (parameters.A, parameters.B, parameters.router))
            )


def statistics(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Exact sums over the tokens of one probe, by site, from unrounded values."""
    pi, z = values["gate"], values["pathway"]
    safe = np.where(pi > 0, pi, 1.0)
    return {
        "gate_sum": pi.sum(axis=1),
        "gate_outer": np.einsum("sne,snf->sef", pi, pi),
        "gated_energy": np.einsum("sne,sner->ser", pi, z**2),
        "second_moment": np.einsum("sner,snek->serk", z, z),
        "entropy": -(pi * np.log(safe)).sum(axis=(1, 2)),
        "energy": (z**2).sum(axis=(1, 3)),
        "expert_sq": (values["expert_norm"] ** 2).sum(axis=1),
        "base_sq": (values["base_norm"] ** 2).sum(axis=1),
    }


def _write_checkpoints(root: Path, names: list[str], rank: int) -> None:
    for name in names:
        folder = root / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "MOE_LORA", "r": rank}))
        (folder / "adapter_model.safetensors").write_bytes(b"weights" * 64)


def _write_scores(root: Path, names: list[str], tasks: tuple[str, ...], samples: int, rng: np.random.Generator) -> None:
    rows = []
    for checkpoint, name in enumerate(names):
        for index, task in enumerate(tasks, start=1):
            age = checkpoint - index
            chance = 0.1 if age < 0 else max(0.9 - 0.3 * age, 0.1)
            for sample in range(samples):
                strict = bool(rng.random() < chance)
                rows.append(
                    {
                        "checkpoint": checkpoint,
                        "checkpoint_name": name,
                        "task": task,
                        "task_index": index,
                        "sample": f"{task}-{sample}",
                        "prediction": "yes" if strict else "Yes.",
                        "reference": "yes",
                        "strict": strict,
                        "lenient": strict or bool(rng.random() < 0.3),
                        "nll": float(rng.gamma(2.0, 0.2) + (1 - chance)),
                    }
                )
    pd.DataFrame(rows).to_parquet(root / "scores.parquet", index=False)
    log = [
        {
            "task_index": index,
            "task": task,
            "step": step,
            "loss": 2.0 / step,
            "task_loss": 2.0 / step,
            "penalty": 0.0,
            "gate_entropy": 0.5,
            "learning_rate": 1e-3,
        }
        for index, task in enumerate(tasks, start=1)
        for step in range(1, 4)
    ]
    pd.DataFrame(log).to_parquet(root / "train_log.parquet", index=False)
