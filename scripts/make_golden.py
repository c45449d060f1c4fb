"""Make the golden recordings of the current schema: files that every later version must still read, with their content.

    python scripts/make_golden.py [--out tests/store/golden]

Writes OUT/schema-X.Y/NAME.h5 and NAME.npz; the second holds what the writer was given, as plain arrays that never pass
through the reader. Run it once when the schema's minor version rises, commit the new folder, never remake an old one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from driftlens.store import RecordingWriter, SiteInfo, gram_matrices, group_sites, open_recording, thin_recording
from driftlens.store.schema import SCHEMA_VERSION, stats_shapes, value_shapes

Arrays = dict[str, Any]
PROBES = ("first", "empty", "last")
TOKENS = (6, 0, 4)
SAMPLES = 2


def site(index: int, experts: int = 3, rank: int = 2, **fields: Any) -> SiteInfo:
    """A small site; fields that this version of the schema does not know are left out."""
    known = {field.name for field in dataclasses.fields(SiteInfo)}
    return SiteInfo(
        name=f"model.layers.{index}.mlp.down_proj", layer=index, kind="down_proj", num_experts=experts, rank=rank,
        d_in=5, d_out=4, scaling=2.0, **{"gate": "softmax"} | {key: fields[key] for key in fields if key in known},
    )  # fmt: skip


def recordings() -> dict[str, list[SiteInfo]]:
    """The sites of every golden file."""
    native = {"gate": "topk", "top_k": 2, "shared_experts": 1, "family": "transformers-moe"}
    found = {
        "softmax": [site(0), site(1)],
        "two_groups": [site(0), site(1, 4, 1), site(2)],
        "rank_0": [site(0, 4, 0, **native), site(1)],
    }
    if {"family", "semantics", "normalised"} <= {field.name for field in dataclasses.fields(SiteInfo)}:
        product = {"family": "foreign", "semantics": "product_of_sums"}
        plain = {"family": "peft-lora", "gate": "constant", "normalised": False}
        found["families"] = [site(0, 2, 2, **plain), site(1, 2, 2, **product), site(2, 3, 0, **native)]
    return found


def draw(sites: list[SiteInfo], rng: np.random.Generator) -> Arrays:
    """Everything that a writer is given, under flat names."""
    out: Arrays = {}
    for probe, n in zip(PROBES, TOKENS, strict=True):
        columns = {"position": rng.integers(0, 50, n), "token_id": rng.integers(0, 49152, n)}
        columns |= {"sample": np.sort(rng.integers(0, SAMPLES, n)), "role": rng.integers(0, 3, n)}
        out |= {f"tokens/{probe}/{name}": column for name, column in columns.items()}
    for index, members in enumerate(group_sites(sites)):
        first = sites[members[0]]
        extent = (first.num_experts, first.rank)
        for probe, n in zip(PROBES, TOKENS, strict=True):
            for name, shape in value_shapes(len(members), n, *extent).items():
                values = 4 * rng.random(shape) if name != "pathway" else rng.standard_normal(shape)
                if name == "gate":
                    values = rng.dirichlet(np.ones(extent[0]), size=shape[:2])
                    plain = [not getattr(sites[member], "normalised", True) for member in members]
                    values[plain] = 1.0
                out[f"values/{index}/{name}/{probe}"] = values.astype(np.float16)
        shapes = stats_shapes(len(members), len(PROBES), *extent)
        stats = {name: rng.random(shape) for name, shape in shapes.items()}
        stats["count"] = 10.0 + np.array(TOKENS)
        weight = rng.dirichlet(np.ones(extent[0]), size=(len(members), len(PROBES)))
        stats["gate_sum"] = weight * stats["count"][:, None]
        out |= {f"stats/{index}/{name}": array for name, array in stats.items()}
    for index, info in enumerate(sites):
        experts, rank = info.num_experts, info.rank
        shapes = {"A": (experts, rank, info.d_in), "B": (experts, info.d_out, rank), "router": (experts, info.d_in)}
        for name, shape in shapes.items():
            if 0 not in shape:
                out[f"weights/{index}/{name}"] = rng.standard_normal(shape).astype(np.float32)
    return out


def write(path: Path, sites: list[SiteInfo], arrays: Arrays, meta: dict[str, Any]) -> None:
    """Write one recording of ``arrays``."""
    ids = {probe: [f"{probe}/{number}" for number in range(SAMPLES)] for probe in PROBES}
    groups = group_sites(sites)
    with RecordingWriter(path, sites=sites, probes=PROBES, sample_ids=ids, meta=meta) as writer:
        for probe in PROBES:
            values = [
                {key.split("/")[2]: array for key, array in arrays.items() if key.startswith(f"values/{index}/")
                 and key.endswith(f"/{probe}")}
                for index in range(len(groups))
            ]  # fmt: skip
            columns = {name: arrays[f"tokens/{probe}/{name}"] for name in ("sample", "position", "token_id", "role")}
            writer.append(probe, **columns, values=values)
        for index in range(len(groups)):
            prefix = f"stats/{index}/"
            found = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            writer.set_stats(index, found)
        for index, info in enumerate(sites):
            a, b, router = (arrays.get(f"weights/{index}/{name}") for name in ("A", "B", "router"))
            if SCHEMA_VERSION == "1.0" and a is None:  # schema 1.0 stored empty arrays
                a = np.zeros((info.num_experts, 0, info.d_in), dtype=np.float32)
                b = np.zeros((info.num_experts, info.d_out, 0), dtype=np.float32)
            writer.set_weights(index, a, b, router)


def head(sites: list[SiteInfo], meta: dict[str, Any]) -> Arrays:
    """What is not an array, as JSON text."""
    ids = {probe: [f"{probe}/{number}" for number in range(SAMPLES)] for probe in PROBES}
    content = {"sites": [dataclasses.asdict(info) for info in sites], "probes": PROBES, "sample_ids": ids, "meta": meta}
    return {"head": json.dumps(content)}


def make(folder: Path) -> None:
    """Write every golden file of the current schema into ``folder``."""
    folder.mkdir(parents=True)
    drawn: dict[str, Arrays] = {}
    for number, (name, sites) in enumerate(recordings().items()):
        meta = {
            "checkpoint": f"{number:02d}-{name}",
            "seed": number,
            "overhead_percent": 3.5,
            "versions": {"torch": "2"},
        }
        meta |= {"reference": None}
        drawn[name] = draw(sites, np.random.default_rng(number))
        write(folder / f"{name}.h5", sites, drawn[name], meta)
        np.savez_compressed(folder / f"{name}.npz", **drawn[name], **head(sites, meta))
    make_thinned(folder, drawn["softmax"])


def make_thinned(folder: Path, current: Arrays) -> None:
    """A thinned copy of ``softmax`` with Gram matrices, expected values from the equations of `Grams`."""
    sites = recordings()["softmax"]
    anchor = draw(sites, np.random.default_rng(100))
    write(folder / "anchor.h5", sites, anchor, {})
    keep = np.arange(sum(TOKENS)) % 2 == 0
    with open_recording(folder / "anchor.h5") as a, open_recording(folder / "softmax.h5") as c:
        grams, meta = gram_matrices(c, [("00-start", a)], name="01-now"), c.meta
    thin_recording(folder / "softmax.h5", folder / "thinned.h5", keep_tokens=keep, grams=grams)
    (folder / "anchor.h5").unlink()
    expected = {key: array for key, array in current.items() if not key.startswith("weights/")}
    for probe, start in zip(PROBES, (0, TOKENS[0], TOKENS[0] + TOKENS[1]), strict=True):
        for key in [key for key in expected if key.startswith(("tokens/", "values/")) and f"/{probe}" in key]:
            axis = 0 if key.startswith("tokens/") else 1
            n = expected[key].shape[axis]
            expected[key] = np.compress(keep[start : start + n], expected[key], axis=axis)
    for old, label in ((anchor, "00-start"), (current, "01-now")):
        a0, a1, b0, b1 = (
            np.stack([arrays[f"weights/{index}/{name}"] for index in range(len(sites))]).astype(np.float64)
            for name in ("A", "B") for arrays in (old, current)
        )  # fmt: skip
        flat = sites[0].num_experts * sites[0].rank
        expected[f"grams/{label}/0/a_gram"] = np.einsum("sekd,seld->sekl", a0, a1)
        expected[f"grams/{label}/0/b_gram"] = np.einsum("seok,sfol->sekfl", b0, b1).reshape(len(sites), flat, flat)
    np.savez_compressed(folder / "thinned.npz", **expected, **head(sites, meta | {"thinned": True}))
    for lock in folder.glob(".*.lock"):
        lock.unlink()


def main() -> None:
    """Write the folder of the current schema; an existing one is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/store/golden"))
    args = parser.parse_args()
    folder = args.out / f"schema-{SCHEMA_VERSION}"
    make(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
