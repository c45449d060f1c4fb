"""What it costs to analyse a run of a 7B model, to open and list runs, and to draw the first chart.

A run is made of seeded random numbers by the ordinary writer: every linear module of a 7B LLaMA (32 layers of q, k, v,
o, gate, up and down; widths 4096 and 11008), 8 experts of rank 16, 8 checkpoints of 8 probes, 64 samples of 16 stored
tokens in each, and a second recording of the last checkpoint for the noise floor. The numbers come from no forward
pass: what they are does not matter for the time, how many they are does. Files are made in a temporary folder and
removed at the end.

"Analysis" is what ``driftlens analyze`` does in a fresh process: every file is compared with the SHA-256 of the
manifest, every table is computed with 1000 bootstrap draws, and the cache is written. Peak memory is the largest
resident set of that process. "Subspaces" compares all pairs (anchor, checkpoint) of a layer's experts, once with the
code of the analysis from the factors in memory, once in a loop over ``scipy.linalg.subspace_angles``, interleaved, in
CPU time of one thread. Every other row is the median of fresh processes.

    python benchmarks/analysis_speed.py [--out FILE] [--folder DIR] [--keep DIR] [--layers 32] [--repeats 5]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy
import scipy.linalg
import xarray as xr
import yaml

from driftlens.analysis.state import angle_table
from driftlens.store import Manifest, RecordingWriter, SiteInfo
from driftlens.store.manifest import FileEntry
from driftlens.store.schema import stats_shapes

EXPERTS, RANK, CHECKPOINTS, SAMPLES, TOKENS = 8, 16, 8, 64, 16
WIDTHS = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)}
WIDTHS |= {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
TASKS = [f"task-{number}" for number in range(1, CHECKPOINTS + 1)]
NAMES = [f"{number:02d}-{task}" for number, task in enumerate(TASKS, start=1)]
BARS = {"seconds": 60.0, "MB": 2000.0, "ratio": 20.0, "open": (1.0, 200.0), "list": 2.0, "chart": 2.0}
PRELUDE = """
import json, sys, time
def peak():
    # Of this program alone; getrusage would also count the process that started it.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
def report(imported, base, **more):
    now = time.perf_counter()
    found = {"import": imported - begin, "wall": now - imported, "cpu": time.process_time(), "base": base}
    print(json.dumps(found | {"peak": peak()} | more))
begin = time.perf_counter()
"""
ANALYSE = """
import driftlens as dl
start = time.perf_counter(), peak()
tables = dl.open(sys.argv[1]).tables()
report(*start, bytes=sum(table.nbytes for table in tables.values()))
"""
OPEN = """
import driftlens as dl
start = time.perf_counter(), peak()
text = repr(dl.open(sys.argv[1]))
report(*start)
"""
LIST = """
from driftlens.analysis import list_runs
start = time.perf_counter(), peak()
report(*start, runs=len(list_runs(sys.argv[1])))
"""
SUBSPACES = """
sys.path.insert(0, sys.argv[1])
import analysis_speed
print(json.dumps(analysis_speed.subspace_ratio(analysis_speed.sites(1), 3)))
"""
CHART = """
import driftlens as dl
from driftlens import figures
start = time.perf_counter(), peak()
text = figures.codrift_map(dl.open(sys.argv[1])).to_json()
report(*start)
"""


def sites(layers: int) -> list[SiteInfo]:
    return [
        SiteInfo(f"model.layers.{layer}.{kind}", layer, kind, EXPERTS, RANK, *widths, 2.0, "softmax")
        for layer in range(layers)
        for kind, widths in WIDTHS.items()
    ]


def factors(site: int, info: SiteInfo, checkpoint: int) -> list[np.ndarray]:
    """A, B and router of one site: a common start and a step of its own for every checkpoint."""
    shapes = (EXPERTS, RANK, info.d_in), (EXPERTS, info.d_out, RANK), (EXPERTS, info.d_in)
    start, step = np.random.default_rng([site, 0]), np.random.default_rng([site, checkpoint])
    return [
        0.02 * (start.standard_normal(shape, dtype=np.float32) + 0.3 * step.standard_normal(shape, dtype=np.float32))
        for shape in shapes
    ]


def token_values(number: int, probe: int, checkpoint: int, noise: float) -> dict[str, np.ndarray]:
    """Token values of all sites on one probe: the same tokens at every checkpoint, moved a little."""
    start, step = np.random.default_rng([probe, 0]), np.random.default_rng([probe, checkpoint])
    again = np.random.default_rng(1)
    shape = (number, SAMPLES * TOKENS, EXPERTS)

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        values = start.standard_normal(shape, dtype=np.float32)
        values += scale * step.standard_normal(shape, dtype=np.float32)
        if noise:
            values += noise * again.standard_normal(shape, dtype=np.float32)
        return values

    gate = np.exp(draw(shape, 0.3))
    gate /= gate.sum(axis=-1, keepdims=True)
    values = {"gate": gate, "pathway": draw((*shape, RANK), 0.3), "expert_norm": np.abs(draw(shape, 0.3))}
    values["base_norm"] = 10 + np.abs(draw(shape[:2], 0.1))
    return {name: array.astype(np.float16) for name, array in values.items()}


def sums(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over the stored tokens of one probe, as if they were all tokens, [S, ...]."""
    gate, path = values["gate"].astype(np.float32), values["pathway"].astype(np.float32)
    across = np.swapaxes(path, 1, 2)
    return {
        "gate_sum": gate.sum(axis=1, dtype=np.float64),
        "gate_outer": np.swapaxes(gate, 1, 2) @ gate,
        "gated_energy": np.einsum("sne,sner->ser", gate, path**2),
        "second_moment": np.swapaxes(across, -1, -2) @ across,
        "entropy": -(gate * np.log(np.maximum(gate, 1e-30))).sum(axis=(1, 2)),
        "energy": np.einsum("sner,sner->se", path, path),
        "expert_sq": (values["expert_norm"].astype(np.float32) ** 2).sum(axis=1),
        "base_sq": (values["base_norm"].astype(np.float32) ** 2).sum(axis=1),
    }


def record(path: Path, infos: list[SiteInfo], checkpoint: int, noise: float = 0.0) -> None:
    ids = {task: [f"{task}-{number}" for number in range(SAMPLES)] for task in TASKS}
    meta = {"checkpoint": NAMES[checkpoint - 1], "probes_sha256": "9" * 64, "base": "synthetic 7B"}
    tokens = {"sample": np.repeat(np.arange(SAMPLES), TOKENS), "position": np.tile(np.arange(TOKENS), SAMPLES)}
    tokens |= {"token_id": np.arange(SAMPLES * TOKENS), "role": np.ones(SAMPLES * TOKENS)}
    with RecordingWriter(path, sites=infos, probes=TASKS, sample_ids=ids, meta=meta) as writer:
        found: dict[str, list[np.ndarray]] = {}
        for probe, task in enumerate(TASKS, start=1):
            values = token_values(len(infos), probe, checkpoint, noise)
            writer.append(task, **tokens, values=[values])
            for name, array in sums(values).items():
                found.setdefault(name, []).append(array)
        stats = {name: np.stack(arrays, axis=1) for name, arrays in found.items()}
        stats["count"] = np.full(CHECKPOINTS, float(SAMPLES * TOKENS))
        shapes = stats_shapes(len(infos), CHECKPOINTS, EXPERTS, RANK)
        writer.set_stats(0, {name: stats[name].reshape(shape) for name, shape in shapes.items()})
        for site, info in enumerate(infos):
            writer.set_weights(site, *factors(site, info, checkpoint))


def make_run(root: Path, infos: list[SiteInfo]) -> None:
    (root / "recordings").mkdir(parents=True)
    config = {"name": root.name, "method": {"name": "moe-lora"}, "stream": {"name": "synthetic", "tasks": TASKS}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    for checkpoint, name in enumerate(NAMES, start=1):
        record(root / "recordings" / f"{name}.h5", infos, checkpoint)
    record(root / "recordings" / f"{NAMES[-1]}.noise.h5", infos, CHECKPOINTS, noise=1e-3)
    manifest = Manifest(root, complete=True)
    for path in sorted(root.iterdir()):
        manifest.add(path.name)
    manifest.save()


def make_large(root: Path, size: int) -> None:
    """Make a run of ``size`` bytes: files of the listed sizes without content, which opening must not look for."""
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump({"method": "moe-lora", "stream": {"tasks": TASKS}}))
    manifest = Manifest(root, complete=True)
    manifest.add("config.yaml")
    paths = [f"checkpoints/{name}/{file}" for name in NAMES for file in ("adapter_model.safetensors", "state.bin")]
    paths += [f"recordings/{name}.h5" for name in NAMES]
    for name in paths:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size // len(paths))
        manifest.files[name] = FileEntry(size // len(paths), "0" * 64)
    manifest.save()


def make_many(root: Path, count: int) -> None:
    """Make ``count`` runs as they lie on disk: configurations of some sixty lines, manifests of a hundred files."""
    files = {f"checkpoints/{name}/part-{part}.bin": FileEntry(1000, "0" * 64) for name in NAMES for part in range(12)}
    files |= {f"recordings/{name}.h5": FileEntry(1000, "0" * 64) for name in NAMES}
    for number in range(count):
        folder = root / f"sweep-{number % 10}" / f"run-{number:04d}"
        folder.mkdir(parents=True)
        config = {"name": folder.name, "method": {"name": "moe-lora"}, "training": {"seed": number}}
        config |= {"stream": {"tasks": TASKS}, "adapter": {f"option_{key}": key for key in range(40)}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        Manifest(folder, seed=number, complete=True, files=dict(files)).save()


def fresh(program: str, target: Path, repeats: int = 1, **variables: str) -> dict[str, float]:
    """The medians over fresh processes with these environment variables."""
    command = [sys.executable, "-c", PRELUDE + program, str(target)]
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
        if done.returncode:
            raise SystemExit(done.stderr)
        found.append(json.loads(done.stdout))
    return {name: statistics.median(row[name] for row in found) for name in found[0]}


def pairs() -> Iterator[tuple[int, int]]:
    return ((anchor, current) for anchor in range(CHECKPOINTS) for current in range(CHECKPOINTS))


def loop_angles(factor: np.ndarray) -> np.ndarray:
    """Angles of [C, E, r, d] between all pairs of checkpoints, one pair of matrices at a time: [C, C, E, r]."""
    result = np.empty((CHECKPOINTS, CHECKPOINTS, EXPERTS, RANK))
    for anchor, current in pairs():
        for expert in range(EXPERTS):
            angles = scipy.linalg.subspace_angles(factor[anchor, expert].T, factor[current, expert].T)
            result[anchor, current, expert] = angles[::-1]
    return result


def subspace_ratio(infos: list[SiteInfo], rounds: int) -> dict[str, float]:
    """CPU time of the subspaces of one layer's sites, both ways."""
    stacks = []
    for site, info in enumerate(infos):
        parts = [factors(site, info, number)[0] for number in range(1, CHECKPOINTS + 1)]
        stacks.append(np.stack(parts).astype(np.float64))  # scipy would compute in the precision that it is given
    times: dict[str, list[float]] = {"ours": [], "loop": []}
    for _ in range(rounds):
        start = time.process_time()
        ours = [angle_table(stack) for stack in stacks]
        times["ours"].append(time.process_time() - start)
        start = time.process_time()
        loop = [loop_angles(stack) for stack in stacks]
        times["loop"].append(time.process_time() - start)
    moved = ~np.eye(CHECKPOINTS, dtype=np.bool_)  # angles of 0, of a checkpoint with itself, are resolved to 1e-7 only
    worst = max(float(np.abs(a - b)[moved].max()) for a, b in zip(ours, loop, strict=True))
    ratios = [slow / fast for fast, slow in zip(times["ours"], times["loop"], strict=True)]
    found = {name: statistics.median(values) for name, values in times.items()}
    return found | {"ratio": statistics.median(ratios), "worst": worst, "pairs": len(stacks) * EXPERTS * CHECKPOINTS**2}


def report(rows: dict[str, dict[str, float]], facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    analysis, angles = rows["analysis"], rows["subspaces"]

    def met(*comparisons: bool) -> str:
        return "met" if all(comparisons) else "MISSED"

    def line(what: str, bar: str, found: str, verdict: str) -> str:
        return f"| {what} | {bar} | {found} | **{verdict}** |"

    quick = {
        "opening a run of 50 GB": ("open", *BARS["open"]),
        "listing 1,000 runs": ("list", BARS["list"], np.inf),
        "first chart of an analysed run": ("chart", BARS["chart"], np.inf),
    }
    lines = [
        "# Analysis of a 7B-sized run",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()} with {facts['cores']} cores"
        f"{facts['load']}, Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}, "
        f"h5py {h5py.__version__}, xarray {xr.__version__}.",
        "",
        "\n\n".join(paragraph.replace("\n", " ") for paragraph in (__doc__ or "").split("\n\n")[1:3]),
        "",
        f"{facts['sites']} sites, {CHECKPOINTS} checkpoints + 1 second recording, {len(TASKS)} probes of {SAMPLES} x "
        f"{TOKENS} = {SAMPLES * TOKENS:,} stored tokens: {facts['bytes']:,} bytes on disk, of which "
        f"{facts['weights']:,} are factors and routers (float32).",
        "",
        "| what | bar | found | |",
        "|---|---|---|---|",
        line(
            "analysis, all tables",
            f"< {BARS['seconds']:.0f} s, < {BARS['MB'] / 1000:.0f} GB",
            f"{analysis['wall']:.1f} s on the clock, {analysis['cpu']:.1f} s of CPU time; "
            f"peak {analysis['peak']:.0f} MB",
            met(analysis["wall"] < BARS["seconds"], analysis["peak"] < BARS["MB"]),
        ),
        line(
            f"subspaces, {angles['pairs']:,.0f} pairs of one layer",
            f">= {BARS['ratio']:.0f}x",
            f"{angles['ratio']:.1f}x ({1000 * angles['ours']:.0f} ms, loop {1000 * angles['loop']:.0f} ms); largest "
            f"difference of angles {angles['worst']:.0e} rad",
            met(angles["ratio"] >= BARS["ratio"]),
        ),
    ]
    for what, (key, seconds, size) in quick.items():
        row = rows[key]
        bar = f"< {seconds:.0f} s" + (f", < {size:.0f} MB" if np.isfinite(size) else "")
        found = (
            f"{row['wall']:.2f} s, with the import {row['import'] + row['wall']:.2f} s on the clock and "
            f"{row['cpu']:.2f} s of CPU time; peak {row['peak']:.0f} MB"
        )
        lines.append(line(what, bar, found, met(row["import"] + row["wall"] < seconds, row["peak"] < size)))
    lines += ["", f"The tables hold {analysis['bytes']:,.0f} bytes. {facts['note']}".rstrip()]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Analyse a run of a 7B model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "analysis_speed.md")
    parser.add_argument("--folder", type=Path, default=None, help="where runs are made; they are deleted at the end")
    parser.add_argument("--keep", type=Path, default=None, help="make the 7B run here if it is not there, and keep it")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--busy", action="store_true", help="say that other work shared the machine")
    parser.add_argument("--note", default="", help="a sentence at the end of the results")
    args = parser.parse_args()
    infos = sites(args.layers)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = args.keep or Path(folder) / "synthetic-7b"
        if not (run / "manifest.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            make_run(run, infos)
        (run / "analysis.h5").unlink(missing_ok=True)
        make_large(Path(folder) / "large", 50_000_000_000)
        make_many(Path(folder) / "many", 1000)
        rows = {"analysis": fresh(ANALYSE, run)}
        rows["chart"] = fresh(CHART, run, args.repeats)
        rows["open"] = fresh(OPEN, Path(folder) / "large", args.repeats)
        rows["list"] = fresh(LIST, Path(folder) / "many", args.repeats)
        rows["subspaces"] = fresh(SUBSPACES, Path(__file__).parent, OMP_NUM_THREADS="1")
        facts: dict[str, Any] = {"sites": len(infos), "cores": os.cpu_count(), "note": args.note}
        facts["bytes"] = sum(path.stat().st_size for path in run.rglob("*") if path.name != "analysis.h5")
        one = sum(EXPERTS * (RANK + 1) * info.d_in + EXPERTS * RANK * info.d_out for info in infos)
        facts["weights"] = 4 * one * (CHECKPOINTS + 1)
        facts["load"] = " (shared with other work)" if args.busy else ""
    text = report(rows, facts)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
