"""Attribution: who forgot an old task, router or experts, and where.

Needs the model: both checkpoints' adapters live in one loaded model, and an old task is run through it with parts of
the sites exchanged. `attribute_run` and `attribute_pair` write what they find to files that `dl.open(run).attribution`
reads without torch. Names are loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driftlens.attribution.depth import depth_shapley, single_restores
    from driftlens.attribution.estimate import AttributionEstimate
    from driftlens.attribution.intervene import Switchboard
    from driftlens.attribution.ledger import AnswerBatches, Ledger, book_ledger
    from driftlens.attribution.options import AttributionOptions
    from driftlens.attribution.pairs import LoadedPair, load_pair
    from driftlens.attribution.reroute import Rerouted, estimate_reroute, reroute_run
    from driftlens.attribution.runs import attribute_pair, attribute_run, estimate_pair, estimate_run_attribution
    from driftlens.attribution.swaps import swap_scores
    from driftlens.attribution.worker import CellSummary

__all__ = [
    "AnswerBatches",
    "AttributionEstimate",
    "AttributionOptions",
    "CellSummary",
    "Ledger",
    "LoadedPair",
    "Rerouted",
    "Switchboard",
    "attribute_pair",
    "attribute_run",
    "book_ledger",
    "depth_shapley",
    "estimate_pair",
    "estimate_reroute",
    "estimate_run_attribution",
    "load_pair",
    "reroute_run",
    "single_restores",
    "swap_scores",
]

_HOMES = {
    "AnswerBatches": "ledger",
    "AttributionEstimate": "estimate",
    "AttributionOptions": "options",
    "CellSummary": "worker",
    "Ledger": "ledger",
    "LoadedPair": "pairs",
    "Rerouted": "reroute",
    "Switchboard": "intervene",
    "attribute_pair": "runs",
    "attribute_run": "runs",
    "book_ledger": "ledger",
    "depth_shapley": "depth",
    "estimate_pair": "runs",
    "estimate_reroute": "reroute",
    "estimate_run_attribution": "runs",
    "load_pair": "pairs",
    "reroute_run": "reroute",
    "single_restores": "depth",
    "swap_scores": "swaps",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
