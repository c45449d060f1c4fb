"""What a recording will take, said before it is made. Nothing is written, and nothing is refused."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from driftlens.backbones.encoding import Encoder
from driftlens.recording.batches import PaddingSide
from driftlens.recording.hooks import Hooks
from driftlens.recording.observer import Observer
from driftlens.recording.probes import ProbeSet
from driftlens.recording.queue import DEPTH
from driftlens.recording.recorder import inference, make_plan, recording_settings
from driftlens.recording.reference import Reference
from driftlens.recording.sites import base_module, find_sites, forward_context
from driftlens.recording.transfer import batch_bytes
from driftlens.store import estimate_bytes

__all__ = ["RecordingEstimate", "estimate_probes"]


@dataclass(frozen=True)
class RecordingEstimate:
    """What one recording will take; None where the model would have to be loaded to know, and cannot be.

    Attributes:
        path: the file.
        checkpoint: name of the checkpoint.
        sites: number of sites.
        samples: number of samples.
        tokens: tokens that go into the sums.
        stored_tokens: tokens whose rows are stored.
        batches: number of forwards.
        file_bytes: size of the arrays before compression: the file is smaller.
        buffer_bytes: recorded values that are in memory at once, at most.
        seconds: time of the forwards, from one batch that was timed; loading and the file are not in it.
        note: what else is to be said, for example why something is not known.
    """

    path: Path
    checkpoint: str
    sites: int | None = None
    samples: int | None = None
    tokens: int | None = None
    stored_tokens: int | None = None
    batches: int | None = None
    file_bytes: int | None = None
    buffer_bytes: int | None = None
    seconds: float | None = None
    note: str = ""

    def row(self) -> dict[str, object]:
        """Return the estimate as plain values for tables and JSON."""
        return asdict(self) | {"path": str(self.path)}


def estimate_probes(
    model: nn.Module,
    probes: ProbeSet,
    out: Path | str,
    *,
    encoder: Encoder | None,
    checkpoint: str,
    batch_size: int = 16,
    padding_side: PaddingSide = "left",
    tokens_per_sample: int | None = None,
    reference: Reference | None = None,
    note: str = "",
) -> RecordingEstimate:
    """Say what `record_probes` would take with these arguments; one batch is run twice and timed the second time.

    Raises:
        ProbeError, SiteError, ConfigError: what cannot be recorded cannot be estimated either; see `record_probes`.
    """
    root, sites = base_module(model), find_sites(model)
    settings = recording_settings(probes, batch_size, padding_side, tokens_per_sample)
    encoded = probes.check_fits(root, encoder)
    device = next(root.parameters()).device
    plan = make_plan(root, probes, encoded, encoder, settings, device=device)
    observer = Observer(sites, reference)
    infos = [site.info for site in sites]
    cells = [len(samples) * max(len(encoded[task][i].input_ids) for i in samples) for task, samples in plan.cuts]
    with inference(model, device), forward_context(model):
        batch = next(plan.batches())
        with Hooks(root, observer.points, observer.on_fire, observer.on_pass):
            for _ in range(2):  # the first one only warms up
                start = time.perf_counter()
                observer.expect(batch.tokens, batch.stored)
                root(**batch.inputs)
                observer.take()
                seconds = time.perf_counter() - start
    return RecordingEstimate(
        path=Path(out),
        checkpoint=checkpoint,
        sites=len(sites),
        samples=len(probes),
        tokens=plan.tokens,
        stored_tokens=plan.stored_tokens,
        batches=len(plan.cuts),
        file_bytes=estimate_bytes(infos, plan.stored_tokens, len(probes.tasks), reference=reference is not None),
        # what waits, what is being written, and what is being handed over
        buffer_bytes=min(len(plan.cuts), DEPTH + 2) * batch_bytes(infos, plan.largest, reference is not None),
        seconds=seconds * sum(cells) / cells[0],
        note=note or ("the file is there already" if Path(out).exists() else ""),
    )
