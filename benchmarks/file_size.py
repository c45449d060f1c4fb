"""How large a recording is against the arithmetic, and how fast the writer writes it.

The arithmetic: every array that the writer is given, in its stored type, compressed losslessly as a whole, by itself,
with no chunks, checksums, names or axes. Three compressors say what "losslessly" is worth: the file's own codec
(bitshuffle and lz4 over the whole array), zlib level 6 on shuffled bytes, and no compression. The writer's rate is raw
bytes over CPU time of this process, with and without the verification that reads the finished file again.

    python benchmarks/file_size.py [--out FILE] [--tokens 20000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import platform
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from driftlens.store import RecordingWriter, SiteInfo, estimate_bytes, open_recording, verify_recording
from driftlens.store.schema import stats_shapes, value_shapes

BAR = 1.2
SHAPES = {"built-in backbone": (30, 4, 8, 576), "wide": (60, 8, 16, 1024)}
PROBES = 6
BATCH = 512


def draw(n_sites: int, experts: int, rank: int, tokens: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values as a model gives them: softmax gates, pathways of differing scale, positive norms; and sums."""
    rng = np.random.default_rng(0)
    shapes = value_shapes(n_sites, tokens, experts, rank)
    scale = np.exp(rng.standard_normal((n_sites, 1, experts, rank)))
    logits = rng.standard_normal(shapes["gate"], dtype=np.float32)
    gate = np.exp(logits)
    pathway = (rng.standard_normal(shapes["pathway"], dtype=np.float32) * scale).astype(np.float32)
    values = {"gate": gate / gate.sum(axis=-1, keepdims=True), "pathway": pathway}
    values["expert_norm"] = np.linalg.norm(pathway, axis=-1)
    values["base_norm"] = np.abs(10 + rng.standard_normal(shapes["base_norm"], dtype=np.float32))
    stats = {name: rng.random(shape) for name, shape in stats_shapes(n_sites, PROBES, experts, rank).items()}
    stats["count"] = np.full(PROBES, float(tokens))
    stats["gate_sum"] = np.full((n_sites, PROBES, experts), tokens / experts)
    return values, stats


def write(path: Path, shape: tuple[int, int, int, int], tokens: int, given: Any) -> None:
    n_sites, experts, rank, width = shape
    values, stats = given
    rng = np.random.default_rng(1)
    sites = [
        SiteInfo(f"model.layers.{i}.mlp.down_proj", i, "down_proj", experts, rank, width, width, 2.0, "softmax")
        for i in range(n_sites)
    ]
    probes = [f"task-{i}" for i in range(PROBES)]
    ids = {probe: [f"{probe}/{i}" for i in range(64)] for probe in probes}
    bounds = np.linspace(0, tokens, PROBES + 1).astype(int)
    with RecordingWriter(path, sites=sites, probes=probes, sample_ids=ids, meta={}) as writer:
        for probe, low, high in zip(probes, bounds[:-1], bounds[1:], strict=True):
            for start in range(low, high, BATCH):
                part = slice(start, min(start + BATCH, high))
                n = part.stop - part.start
                columns = {"sample": np.arange(n) * 64 // n, "position": np.arange(n), "role": np.arange(n) % 3}
                columns["token_id"] = rng.integers(0, 49152, n)
                writer.append(probe, **columns, values=[{name: array[:, part] for name, array in values.items()}])
        writer.set_stats(0, stats)
        for site in range(n_sites):
            a, b = rng.standard_normal((experts, rank, width)), rng.standard_normal((experts, width, rank))
            writer.set_weights(site, a.astype(np.float32), b.astype(np.float32), a[:, 0].astype(np.float32))


def arrays(path: Path) -> list[np.ndarray]:
    """Every array of a recording in its stored type, names and axes left out."""
    with open_recording(path) as r:
        found = [np.asarray(getattr(g, name)) for g in r.groups for name in value_shapes(1, 1, 1, 1)]
        found += [array for group in r.groups for array in group.stats.values()]
        found += [array for site in range(len(r.sites)) for array in r.weights(site).values() if array is not None]
        return found + [column for probe in r.probes for column in r.tokens(probe).values()]


def own_codec(array: np.ndarray) -> int:
    """Bytes of the array in one chunk of bitshuffle and lz4."""
    with h5py.File(io.BytesIO(), "w") as file:
        options = hdf5plugin.Bitshuffle(cname="lz4")
        dataset = file.create_dataset("x", data=array.reshape(-1), chunks=(max(1, array.size),), **options)
        return int(dataset.id.get_storage_size())


def shuffled_zlib(array: np.ndarray) -> int:
    raw = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).T.tobytes()
    return len(zlib.compress(raw, 6))


def measure(shape: tuple[int, int, int, int], tokens: int, repeats: int) -> dict[str, Any]:
    given = draw(*shape[:3], tokens)
    whole, checked = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            path = Path(folder) / f"{number}.h5"
            start = time.process_time()
            write(path, shape, tokens, given)
            whole.append(time.process_time() - start)
            start = time.process_time()
            if verify_recording(path):
                raise SystemExit("The file does not verify.")
            checked.append(time.process_time() - start)
        with open_recording(path) as recording:
            raw = estimate_bytes(recording.sites, tokens, PROBES)
        found = arrays(path)
        row: dict[str, Any] = {"file": path.stat().st_size, "raw": raw}
        row |= {"own": sum(map(own_codec, found)), "zlib": sum(map(shuffled_zlib, found))}
    seconds = statistics.median(whole)
    row |= {"all": raw / seconds / 1e6, "write": raw / (seconds - statistics.median(checked)) / 1e6}
    return row


def report(rows: dict[str, dict[str, Any]], tokens: int) -> str:
    worst = max(row["file"] / row["own"] for row in rows.values())
    explanation = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    lines = [
        "# Size of a recording, speed of the writer",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()} with {os.cpu_count()} cores (shared "
        f"with other work), Python {platform.python_version()}, numpy {np.__version__}, h5py {h5py.__version__}, HDF5 "
        f"{h5py.version.hdf5_version}, hdf5plugin {hdf5plugin.version}.",
        "",
        f"{tokens:,} tokens, {PROBES} probes, weights stored. {explanation}",
        "",
        f"Bar: at most {BAR} times the arithmetic in the file's own codec. **{'met' if worst <= BAR else 'MISSED'}**: "
        f"{worst:.3f} times at worst.",
        "",
        "| recording | sites, E, r | file (bytes) | / own codec | / shuffle + zlib 6 | / uncompressed | "
        "writer (MB/s) | with verification (MB/s) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {', '.join(map(str, SHAPES[name][:3]))} | {r['file']:,} | **{r['file'] / r['own']:.3f}** | "
        f"{r['file'] / r['zlib']:.3f} | {r['file'] / r['raw']:.3f} | {r['write']:.0f} | {r['all']:.0f} |"
        for name, r in rows.items()
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes of a recording against the arithmetic; MB/s of the writer.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "file_size.md")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = {name: measure(shape, args.tokens, args.repeats) for name, shape in SHAPES.items()}
    text = report(rows, args.tokens)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
