"""Checkpoints of CoIN, MCITlib and Prism: reading the folders, and computing each codebase's evaluation forward."""

from driftlens.recording.foreign.layers import ForeignLinear
from driftlens.recording.foreign.load import ForeignAdapter, apply_foreign, build_layers
from driftlens.recording.foreign.semantics import FOREIGN_SEMANTICS
from driftlens.recording.foreign.state import STATE_FILES, ForeignState, prototype_weights, read_state
from driftlens.recording.foreign.tensors import FolderTensors, looks_foreign, read_folder

__all__ = [
    "FOREIGN_SEMANTICS",
    "STATE_FILES",
    "FolderTensors",
    "ForeignAdapter",
    "ForeignLinear",
    "ForeignState",
    "apply_foreign",
    "build_layers",
    "looks_foreign",
    "prototype_weights",
    "read_folder",
    "read_state",
]
