"""The probe set in the repository is the probe split of the built-in stream."""

from __future__ import annotations

from pathlib import Path

from driftlens.recording import ProbeSet, load_probes
from driftlens.streams import load_stream

PROBES = Path(__file__).resolve().parents[2] / "probes" / "builtin"


def test_shipped_probes_are_the_streams_own():
    stream = load_stream("builtin", probe=16)
    shipped = load_probes(PROBES)
    assert dict(shipped.samples) == dict(ProbeSet.from_stream(stream).samples)
    assert tuple(shipped.samples) == stream.names
    assert {len(rows) for rows in shipped.samples.values()} == {16}
    for task in stream:
        assert task.licence in shipped.licence
