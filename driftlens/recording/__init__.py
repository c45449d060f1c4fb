"""Recording: observing gates and pathways of a model on fixed probes, one file per checkpoint.

``record`` observes a model that is already there, on probes or in the caller's own forwards, ``RecordCallback`` one
that `transformers.Trainer` trains, ``record_checkpoint`` loads an adapter folder first, and ``record_run`` works
through all checkpoints of a run. What can be observed is decided by site families (``SITE_FAMILIES``), what it is
observed on by a ``ProbeSet``.
"""

from driftlens.recording.accumulators import ProbeSums, batch_sums
from driftlens.recording.batches import ProbePrefix
from driftlens.recording.callback import RecordCallback
from driftlens.recording.checkpoints import LoadedCheckpoint, load_checkpoint
from driftlens.recording.families import MoELoraFamily
from driftlens.recording.hooks import HookPoint, Hooks, count_hooks
from driftlens.recording.live import LiveRecording, record
from driftlens.recording.probe_files import load_probes, write_probes
from driftlens.recording.probes import ProbeSample, ProbeSet
from driftlens.recording.recorder import Progress, RecordingSummary
from driftlens.recording.reference import Reference, load_reference
from driftlens.recording.run import estimate_checkpoint, estimate_run, record_checkpoint, record_run
from driftlens.recording.sites import SITE_FAMILIES, Site, SiteFamily, SiteWeights, find_sites

__all__ = [
    "SITE_FAMILIES",
    "HookPoint",
    "Hooks",
    "LiveRecording",
    "LoadedCheckpoint",
    "MoELoraFamily",
    "ProbePrefix",
    "ProbeSample",
    "ProbeSet",
    "ProbeSums",
    "Progress",
    "RecordCallback",
    "RecordingSummary",
    "Reference",
    "Site",
    "SiteFamily",
    "SiteWeights",
    "batch_sums",
    "count_hooks",
    "estimate_checkpoint",
    "estimate_run",
    "find_sites",
    "load_checkpoint",
    "load_probes",
    "load_reference",
    "record",
    "record_checkpoint",
    "record_run",
    "write_probes",
]
