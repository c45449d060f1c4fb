"""Make the shipped probe set ``probes/builtin`` from the probe splits of the built-in stream.

    python scripts/make_probes.py [--samples 16] [--out probes/builtin]

The folder must not exist yet; the same data give the same bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from driftlens.recording import ProbeSet, write_probes
from driftlens.streams import load_stream

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write the probe set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="samples per task")
    parser.add_argument("--out", type=Path, default=ROOT / "probes" / "builtin")
    args = parser.parse_args()
    stream = load_stream("builtin", probe=args.samples)
    licences = "; ".join(f"{task.name}: {task.licence} ({task.source})" for task in stream)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    probes = replace(ProbeSet.from_stream(stream), licence=licences)
    print(write_probes(probes, args.out), probes.sha256)


if __name__ == "__main__":
    main()
