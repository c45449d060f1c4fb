"""What opening a recording of 10 GB costs a fresh process.

A recording of one chunk of tokens is written by the ordinary writer; its stored chunks are then repeated, byte for
byte, until the file has the wanted size. The result is a complete recording, which `verify` reads from end to end. Each
row is the median of fresh processes that open it, look at every site and read the gates of one site on one probe (the
probe that has all the tokens, so that this read is as large as it can be). "After import" is the memory that the
interpreter and the libraries take before the file is touched. Before a cold row the system is asked to forget the
file's pages.

    python benchmarks/open_large.py [--out FILE] [--gb 10] [--folder DIR] [--repeats 5] [--no-verify]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from driftlens.store import RecordingWriter, SiteInfo, verify_recording
from driftlens.store.encoding import FILE_FORMAT
from driftlens.store.schema import TOKEN_COLUMNS, VALUES, stats_shapes, value_shapes

SITES, EXPERTS, RANK, WIDTH = 60, 8, 16, 64
CHUNK = 1024  # tokens of one chunk at this E and r (blocks.block_length)
BAR_SECONDS, BAR_MB = 1.0, 200.0
FRESH = """
import json, sys, time
from driftlens.store import open_recording
def peak():
    # Of this program alone; getrusage would also count the process that started it.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
base, start = peak(), time.perf_counter()
recording = open_recording(sys.argv[1])
opened = time.perf_counter() - start
sites = [(site.name, site.num_experts, site.rank) for site in recording.sites]
after, start = peak(), time.perf_counter()
gate = recording.gate(sites[-1][0], recording.probes[-1])
read = time.perf_counter() - start
print(json.dumps({"open": opened, "read": read, "base": base, "opened": after, "peak": peak(), "rows": len(gate)}))
"""


def write_large(path: Path, size: int) -> int:
    """Write a recording of about ``size`` bytes; returns its number of token rows."""
    rng = np.random.default_rng(0)
    sites = [
        SiteInfo(f"model.layers.{i}.mlp.down_proj", i, "down_proj", EXPERTS, RANK, WIDTH, WIDTH, 2.0, "softmax")
        for i in range(SITES)
    ]
    probes = [f"task-{i}" for i in range(8)]
    shapes = value_shapes(SITES, CHUNK, EXPERTS, RANK)
    values = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    weight = np.exp(values["gate"])
    values["gate"] = weight / weight.sum(axis=-1, keepdims=True)
    ids = {probe: ["a"] for probe in probes}
    columns = {"sample": np.zeros(CHUNK), "role": np.zeros(CHUNK)}
    columns |= {"position": np.arange(CHUNK), "token_id": rng.integers(0, 49152, CHUNK)}
    with RecordingWriter(path, sites=sites, probes=probes, sample_ids=ids, meta={"checkpoint": "large"}) as writer:
        writer.append(probes[-1], **columns, values=[values])
        stats = {name: rng.random(shape) for name, shape in stats_shapes(SITES, 8, EXPERTS, RANK).items()}
        stats["count"] = np.full(8, 1e9)
        stats["gate_sum"] = np.full((SITES, 8, EXPERTS), 1e9 / EXPERTS)
        writer.set_stats(0, stats)
        for site in range(SITES):
            a, b = rng.standard_normal((EXPERTS, RANK, WIDTH)), rng.standard_normal((EXPERTS, WIDTH, RANK))
            writer.set_weights(site, a.astype(np.float32), b.astype(np.float32), a[:, 0].astype(np.float32))
    with h5py.File(path, "r+", libver=FILE_FORMAT) as file:
        repeats = max(1, round(size / sum(file[f"group_0/{name}"].id.get_storage_size() for name in VALUES)))
        for key in (*(f"tokens/{name}" for name in TOKEN_COLUMNS), *(f"group_0/{name}" for name in VALUES)):
            repeat(file[key], repeats)
        file["token"].resize((repeats * CHUNK,))
        file["token"][...] = np.arange(repeats * CHUNK)
    return repeats * CHUNK


def repeat(dataset: h5py.Dataset, times: int) -> None:
    """Repeat the stored chunks of ``dataset`` along its token axis, without decoding them."""
    axis = 0 if dataset.ndim == 1 else 1
    rows = 1 if dataset.ndim == 1 else dataset.shape[0]
    dataset.resize(times * CHUNK, axis=axis)
    for row in range(rows):
        corner = [0] * dataset.ndim
        corner[0] = row if axis else 0
        mask, raw = dataset.id.read_direct_chunk(tuple(corner))
        for number in range(1, times):
            corner[axis] = number * CHUNK
            dataset.id.write_direct_chunk(tuple(corner), raw, filter_mask=mask)


def fresh(path: Path, repeats: int, *, cold: bool) -> dict[str, float]:
    """The medians over fresh processes."""
    found = []
    for _ in range(repeats):
        if cold:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        command = [sys.executable, "-c", FRESH, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return {name: statistics.median(row[name] for row in found) for name in found[0]}


def report(rows: dict[str, dict[str, float]], facts: dict[str, Any]) -> str:
    """The table as Markdown."""
    worst = max(row["open"] + row["read"] for row in rows.values()), max(row["peak"] for row in rows.values())
    met = "met" if worst[0] < BAR_SECONDS and worst[1] < BAR_MB else "MISSED"
    explanation = (__doc__ or "").split("\n\n")[1].replace("\n", " ")
    lines = [
        "# Opening a large recording",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.machine()} with {os.cpu_count()} cores (shared "
        f"with other work), Python {platform.python_version()}, numpy {np.__version__}, h5py {h5py.__version__}, HDF5 "
        f"{h5py.version.hdf5_version}, hdf5plugin {hdf5plugin.version}.",
        "",
        f"{facts['size']:,} bytes: {SITES} sites of E = {EXPERTS}, r = {RANK}, {facts['tokens']:,} tokens, "
        f"{facts['chunks']:,} stored chunks of token values. {explanation}",
        "",
        f"Bar: open, sites and one read of gates in less than {BAR_SECONDS:.0f} s and {BAR_MB:.0f} MB. **{met}**: "
        f"{worst[0]:.2f} s and {worst[1]:.0f} MB at worst.",
        "",
        "| pages | open (ms) | read one site's gates (ms) | rows | after import (MB) | after open (MB) | peak (MB) |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | **{1000 * r['open']:.0f}** | {1000 * r['read']:.0f} | {r['rows']:,.0f} | {r['base']:.0f} | "
        f"{r['opened']:.0f} | **{r['peak']:.0f}** |"
        for name, r in rows.items()
    ]
    if facts["verified"] is not None:
        rate = facts["size"] / facts["verified"] / 1e6
        lines += ["", f"`verify` of the whole file: no problems, {facts['verified']:.0f} s, {rate:.0f} MB/s."]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Open a recording of 10 GB in a fresh process.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "open_large.md")
    parser.add_argument("--gb", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=None, help="where the file is made; it is deleted at the end")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-verify", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "large.h5"
        tokens = write_large(path, int(args.gb * 1e9))
        rows = {label: fresh(path, args.repeats, cold=label == "cold") for label in ("cold", "warm")}
        verified = None
        if not args.no_verify:
            start = time.perf_counter()
            problems = verify_recording(path)
            verified = time.perf_counter() - start
            if problems:
                raise SystemExit(f"The file does not verify: {problems[0]}")
        facts = {"size": path.stat().st_size, "tokens": tokens, "verified": verified}
        facts["chunks"] = len(VALUES) * SITES * tokens // CHUNK
    text = report(rows, facts)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
