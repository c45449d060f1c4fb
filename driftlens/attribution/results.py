"""One attributed cell on disk: everything that was booked and scored for one old task at one current checkpoint.

A cell is one HDF5 file in the conventions of netCDF4, ``xarray.open_datatree(path, engine="h5netcdf")`` reads it:

    /          what was compared and how: checkpoints and their hashes, base, samples' hash, settings, versions
    /scores    scores [state, score, sample] of the anchor by itself and of the current checkpoint
    /ledger    entries [sample, site, part, expert] and answer NLL of every sample
    /tokens    the same entries by token, with id, position, role and sample of every token
    /swaps     scores [combination, score, sample]: router and experts of either checkpoint, and [score, sample] of
               the anchor by itself, scored beside them                                         (unless left out)
    /depth     Shapley values [depth, sample] of groups of sites, and their standard errors    (unless left out)
    /restores  answer NLL [site, restored, sample] with one site's part put back to the anchor's (when asked for)

All values are float64, so that sums over a file are the sums that are printed. `driftlens.analysis.attribution` reads
the files of a run as one table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.attribution_files import ATTRIBUTION_SCHEMA, COMBINATIONS, SCORES, read_cell
from driftlens.analysis.cache import write_table
from driftlens.attribution.depth import RESTORED, DepthShapley, Restores
from driftlens.attribution.ledger import PARTS, Ledger
from driftlens.backbones.encoding import ROLES
from driftlens.errors import StorageError
from driftlens.store import SiteInfo, atomic_file

__all__ = [
    "depth_table",
    "ledger_tables",
    "restores_table",
    "scores_table",
    "swaps_table",
    "write_cell",
]

_NATS: Final = {"units": "nats"}


def ledger_tables(ledger: Ledger, sites: Sequence[SiteInfo]) -> dict[str, xr.Dataset]:
    """Return the tables ``ledger`` and ``tokens``.

    Args:
        ledger: what was booked.
        sites: the sites, in the ledger's order.
    """
    table = xr.Dataset(
        {
            "entries": (
                ("sample", "site", "part", "expert"),
                ledger.entries,
                {"long_name": "rise of the sample's answer NLL booked here; experts a site lacks are 0", **_NATS},
            ),
            "nll_anchor": (("sample",), ledger.nll_anchor, {"long_name": "answer NLL, anchor's sites", **_NATS}),
            "nll_current": (("sample",), ledger.nll_current, {"long_name": "answer NLL now", **_NATS}),
        },
        coords={
            "sample": np.array(ledger.samples, np.str_),
            "site": np.array(ledger.sites, np.str_),
            "part": np.array(PARTS, np.str_),
            "expert": np.arange(ledger.entries.shape[-1]),
            "layer": ("site", np.array([info.layer for info in sites])),
            "kind": ("site", np.array([info.kind for info in sites], np.str_)),
            "num_experts": ("site", np.array([info.num_experts for info in sites])),
            "gate": ("site", np.array([info.gate for info in sites], np.str_)),
        },
        attrs={
            "nodes": ledger.nodes,
            "evaluations": ledger.evaluations,
            "panels": list(ledger.panels),
            "panel_residuals": list(ledger.panel_residuals),
        },
    )
    tokens = ledger.tokens
    by_token = xr.Dataset(
        {
            "entries": (("token", "part"), tokens.entries, {"long_name": "rise booked at this token", **_NATS}),
            "sample": (("token",), tokens.sample, {"long_name": "number of the sample in /ledger"}),
            "position": (("token",), tokens.position, {"long_name": "position in the sample"}),
            "token_id": (("token",), tokens.token_id),
            "role": (
                ("token",),
                tokens.role,
                {"flag_values": list(range(len(ROLES))), "flag_meanings": " ".join(ROLES)},
            ),
        },
        coords={"token": np.arange(len(tokens.sample)), "part": np.array(PARTS, np.str_)},
    )
    return {"ledger": table, "tokens": by_token}


def scores_table(
    samples: Sequence[str], anchor: NDArray[np.float64] | None, current: NDArray[np.float64] | None
) -> xr.Dataset:
    """Return the table ``scores``.

    Args:
        samples: ids.
        anchor: [strict, lenient, nll] x [samples] of the anchor by itself; None where it is not known.
        current: the same of the current checkpoint.
    """
    unknown = np.full((len(SCORES), len(samples)), np.nan)
    values = np.stack([unknown if scores is None else scores for scores in (anchor, current)])
    return xr.Dataset(
        {"scores": (("state", "score", "sample"), values, {"long_name": "strict and lenient: 0 or 1; nll: nats"})},
        coords={
            "state": np.array(["anchor", "current"]),
            "score": np.array(SCORES),
            "sample": np.array(samples, np.str_),
        },
    )


def swaps_table(
    samples: Sequence[str], scores: Mapping[str, NDArray[np.float64]], alone: NDArray[np.float64] | None
) -> xr.Dataset:
    """Return the table ``swaps``.

    Args:
        samples: ids.
        scores: [strict, lenient, nll] x [samples] by combination.
        alone: the same of the anchor by itself, scored beside them; None where it could not run.
    """
    values = np.stack([scores[key] for key in COMBINATIONS])
    own = np.full(values.shape[1:], np.nan) if alone is None else alone
    units = "strict and lenient: 0 or 1; nll: nats"
    return xr.Dataset(
        {
            "scores": (
                ("combination", "score", "sample"),
                values,
                {"long_name": "scores with router (first letter) and experts (second) of a or c", "units": units},
            ),
            "anchor_alone": (("score", "sample"), own, {"long_name": "scores of the anchor itself", "units": units}),
        },
        coords={
            "combination": np.array(COMBINATIONS),
            "score": np.array(SCORES),
            "sample": np.array(samples, np.str_),
        },
    )


def depth_table(depth: DepthShapley) -> xr.Dataset:
    """Return the table ``depth``."""
    players = depth.players
    return xr.Dataset(
        {
            "shapley": (("depth", "sample"), depth.value, {"long_name": "rise of the answer NLL due to it", **_NATS}),
            "error": (("depth",), depth.error, {"long_name": "standard error of sampling permutations", **_NATS}),
        },
        coords={
            "depth": np.array([player.name for player in players], np.str_),
            "first_layer": ("depth", np.array([player.first for player in players])),
            "last_layer": ("depth", np.array([player.last for player in players])),
            "depth_part": ("depth", np.array([player.part for player in players], np.str_)),
            "sample": np.array(depth.samples, np.str_),
        },
        attrs={"permutations": depth.permutations, "seed": depth.seed, "evaluations": depth.evaluations},
    )


def restores_table(restores: Restores) -> xr.Dataset:
    """Return the table ``restores``."""
    return xr.Dataset(
        {"nll": (("site", "restored", "sample"), restores.nll, {"long_name": "answer NLL", **_NATS})},
        coords={
            "site": np.array(restores.sites, np.str_),
            "restored": np.array(RESTORED),
            "sample": np.array(restores.samples, np.str_),
        },
    )


def write_cell(path: Path, tables: Mapping[str, xr.Dataset], about: Mapping[str, Any]) -> None:
    """Write a cell atomically: complete and read back, or not at all.

    Args:
        path: the file; an older one is replaced at the end.
        tables: by name, as listed above.
        about: what was compared and how. Numbers and text become attributes, anything else JSON text.

    Raises:
        StorageError: the disk refuses, or what was written cannot be read back.
    """
    with atomic_file(path) as partial:
        with h5py.File(partial, "x", libver=("v110", "v110"), locking=False) as file:
            for name, table in tables.items():
                write_table(file.create_group(name), table)
            file.attrs["driftlens_attribution"] = ATTRIBUTION_SCHEMA
            for key, value in about.items():
                plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
                file.attrs[key] = value if plain else json.dumps(value, sort_keys=True)
        read = read_cell(partial).tables
        if set(read) != set(tables) or not all(read[name].equals(table) for name, table in tables.items()):
            raise StorageError(f"{path} could not be read back as it was written. Check the disk, then start again.")
