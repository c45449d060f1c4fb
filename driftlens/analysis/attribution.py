"""What `driftlens attribute` found, as one labelled table (metrics.md section 4).

Attribution needs a model and writes one file per (current checkpoint, old task); reading them needs neither model nor
torch. All signs say what was lost: a positive entry raised the loss, a positive phi cost score.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.attribution_files import COMBINATIONS, SCORES, AttributedCell, read_cell
from driftlens.errors import ConfigError
from driftlens.metrics import (
    ALL_MEASURES,
    Interval,
    bootstrap_attribution,
    bootstrap_mean,
    forgetting_attribution,
)
from driftlens.metrics.arrays import FloatArray, divide

__all__ = [
    "ATTRIBUTION_REASONS",
    "attribution_rows",
    "open_attribution",
    "tabulate",
]

ATTRIBUTION_REASONS: Final = {
    0: "defined",
    1: "the task was not old at this checkpoint",
    2: "not attributed yet: run `driftlens attribute`",
    3: "left out when the task was attributed",
    4: "the anchor could not be run by itself",
    5: "the loss did not change",
}
"""Codes of the variables that end in ``_reason``."""

_LARGE_RESIDUAL: Final = 0.05
"""Share of the rise above which a remark says that the residual is large."""


# --- one table of many cells ------------------------------------------------------------------------------------------

_CELL: Final = ("task", "checkpoint")

_FURTHER: Final[dict[str, tuple[str, str]]] = {
    "ledger_site": ("Forgetting ledger by site", "sum of ledger over experts"),
    "ledger_part": ("Forgetting ledger, router and experts", "sum of ledger over sites and experts"),
    "rise": ("Rise of the answer NLL", "L(1) - L(0): the current model, minus it with the anchor's sites"),
    "residual_share": ("Residual as a share of the rise", "residual / rise"),
    "evaluations": ("Nodes of the path that were evaluated", "Gauss-Legendre nodes, those of refined panels included"),
    "samples": ("Samples", "number of test samples of the task, or of probe samples"),
    "forgetting": ("Measured forgetting", "score of the anchor itself - score now"),
    "disagreement": ("Ledger minus swaps", "ledger_part - phi_router or phi_experts of the NLL, on the same samples"),
    "depth_error": ("Forgetting by depth, standard error", "standard error of sampling orders, not of samples"),
    "gain": ("Gain from putting one site back", "answer NLL now - answer NLL with this site of the anchor"),
}
"""Title and formula of what has no entry of its own in `driftlens.metrics.ALL_MEASURES`."""

_COUNTS: Final = ("residual_share", "evaluations", "samples")
_BY_SCORE: Final = "1 (strict, lenient); nats (nll, sign turned so that larger is better)"


def tabulate(
    cells: Sequence[AttributedCell], tasks: Sequence[str], checkpoints: Mapping[int, str], *, draws: int = 1000
) -> xr.Dataset:
    """Put attributed cells into one labelled table.

    Args:
        cells: the files that were read.
        tasks: names of the tasks, in stream order.
        checkpoints: index -> name of the checkpoints.
        draws: bootstrap draws over samples.

    Returns:
        Dataset over (task, checkpoint, site, part, expert, score, depth): see ``definition`` of each variable. ``_low``
        and ``_high`` are 95 % bootstrap intervals over samples, the same draws for all variables of a cell. NaN where
        undefined, with the cause in ``reason`` (the whole cell), ``swaps_reason``, ``depth_reason``,
        ``restores_reason``, ``remainder_reason`` and ``residual_share_reason``: codes of `ATTRIBUTION_REASONS`.
    """
    sites = _first_seen(site for cell in cells for site in cell.tables["ledger"]["site"].to_numpy().tolist())
    depths = _first_seen(
        g for cell in cells if "depth" in cell.tables for g in cell.tables["depth"]["depth"].to_numpy()
    )
    experts = max((cell.tables["ledger"].sizes["expert"] for cell in cells), default=0)
    order = list(checkpoints)
    coords: dict[str, Any] = {
        "task": np.array(tasks, np.str_),
        "checkpoint": np.array(order, np.int64),
        "site": np.array(sites, np.str_),
        "part": np.array(["router", "experts"]),
        "expert": np.arange(experts),
        "score": np.array(SCORES),
        "restored": np.array(["router", "experts", "both"]),
        "depth": np.array(depths, np.str_),
    }
    stack = _Stack(coords)
    anchor = np.full((len(tasks), len(order)), -1)
    reason = np.full(anchor.shape, 2, np.uint8)
    for row, task in enumerate(tasks):
        old = [index > _own(task, checkpoints) for index in order]
        reason[row] = np.where(old, reason[row], 1)
    for cell in cells:
        at = (list(tasks).index(cell.about["task"]), order.index(int(cell.about["current_index"])))
        anchor[at], reason[at] = int(cell.about["anchor_index"]), 0
        for name, dims, values in _measure(cell, draws):
            stack.put(name, at, dims, values, cell)
    return _dataset(stack, coords, anchor, reason, cells, checkpoints)


def open_attribution(*paths: Path | str) -> xr.Dataset:
    """Read files of `driftlens attribute --anchor --current`, one per task, as one table; see `tabulate`.

    Raises:
        NotFoundError, FormatError: see `read_cell`.
        ConfigError: the files do not compare the same two checkpoints, or two are of one task.
    """
    cells = [read_cell(Path(path)) for path in paths]
    for cell in cells[1:]:
        for key in ("anchor_sha256", "current_sha256"):
            if cell.about[key] != cells[0].about[key]:
                raise ConfigError(
                    f"{cell.path} and {cells[0].path} compare other checkpoints ({key} differs); read them apart."
                )
    tasks = [str(cell.about["task"]) for cell in cells]
    if len(set(tasks)) < len(tasks):
        raise ConfigError(f"Two of the files are of one task (they are of {', '.join(tasks)}); give one per task.")
    names = {int(cell.about[f"{end}_index"]): str(cell.about[end]) for cell in cells for end in ("anchor", "current")}
    return tabulate(cells, tasks, dict(sorted(names.items())))


def _own(task: str, checkpoints: Mapping[int, str]) -> int:
    """Return the index of the checkpoint after ``task``; above all others where there is none."""
    found = [index for index, name in checkpoints.items() if index and name.split("-", 1)[-1] == task]
    return found[0] if found else max(checkpoints, default=0) + 1


def _first_seen(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(str(name) for name in names))


class _Stack:
    """Arrays over (task, checkpoint, ...), filled cell by cell."""

    def __init__(self, coords: Mapping[str, Any]) -> None:
        self._coords = coords
        self.arrays: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {}

    def put(
        self, name: str, at: tuple[int, int], dims: tuple[str, ...], values: NDArray[Any], cell: AttributedCell
    ) -> None:
        """Enter one cell's values; its sites and groups are placed by name, its experts are the first ones."""
        if name not in self.arrays:
            shape = [len(self._coords[dim]) for dim in (*_CELL, *dims)]
            self.arrays[name] = ((*_CELL, *dims), np.full(shape, np.nan))
        places = [self._places(dim, values.shape[axis], cell) for axis, dim in enumerate(dims)]
        index: Any = (*at, *np.ix_(*places))
        self.arrays[name][1][index] = values

    def _places(self, dim: str, count: int, cell: AttributedCell) -> NDArray[np.intp]:
        if dim not in ("site", "depth"):
            return np.arange(count)
        known = {label: number for number, label in enumerate(self._coords[dim].tolist())}
        table = cell.tables["ledger" if dim == "site" else "depth"]
        return np.array([known[str(label)] for label in table[dim].to_numpy()], np.intp)


Values = tuple[str, tuple[str, ...], FloatArray]


def _measure(cell: AttributedCell, draws: int) -> list[Values]:
    return [*_ledger(cell, draws), *_scores(cell, draws), *_optional(cell, draws)]


def _interval(name: str, dims: tuple[str, ...], found: Interval) -> list[Values]:
    return [(f"{name}{end}", dims, bound) for end, bound in zip(("", "_low", "_high"), found, strict=True)]


def _ledger(cell: AttributedCell, draws: int) -> list[Values]:
    table = cell.tables["ledger"]
    entries = table["entries"].transpose("sample", "site", "part", "expert").to_numpy()
    there = np.arange(entries.shape[-1]) < table["num_experts"].to_numpy()[:, None]
    booked = np.where(there[:, None], entries.mean(axis=0), np.nan)
    rise = table["nll_current"].to_numpy() - table["nll_anchor"].to_numpy()
    by_site, by_part = entries.sum(axis=-1), entries.sum(axis=(1, 3))
    left = rise - entries.sum(axis=(1, 2, 3))
    share = divide(left.mean(), rise.mean())
    return [
        ("ledger", ("site", "part", "expert"), booked),
        *_interval("ledger_site", ("site", "part"), bootstrap_mean(np.moveaxis(by_site, 0, -1), draws=draws)),
        *_interval("ledger_part", ("part",), bootstrap_mean(by_part.T, draws=draws)),
        *_interval("rise", (), bootstrap_mean(rise, draws=draws)),
        *_interval("residual", (), bootstrap_mean(left, draws=draws)),
        ("residual_share", (), share),
        ("evaluations", (), np.asarray(float(table.attrs["evaluations"]))),
        ("samples", (), np.asarray(float(len(rise)))),
    ]


def _scores(cell: AttributedCell, draws: int) -> list[Values]:
    """Measured forgetting, remainder, and what exact swaps say."""
    own = _signed(cell.tables["scores"]["scores"].transpose("state", "score", "sample").to_numpy())
    found = _interval("forgetting", ("score",), bootstrap_mean(own[0] - own[1], draws=draws))
    if "swaps" not in cell.tables:
        return found
    swaps = (
        cell.tables["swaps"]["scores"].transpose("combination", "score", "sample").sel(combination=list(COMBINATIONS))
    )
    scores, alone = _signed(swaps.to_numpy()), _signed(cell.tables["swaps"]["anchor_alone"].to_numpy())
    parts = bootstrap_attribution(*scores, draws=draws)
    exact = forgetting_attribution(*scores[:, SCORES.index("nll")])
    by_part = (
        cell.tables["ledger"]["entries"].transpose("sample", "site", "part", "expert").to_numpy().sum(axis=(1, 3)).T
    )
    return [
        *found,
        *_interval("swap_forgetting", ("score",), parts.forgetting),
        *_interval("remainder", ("score",), bootstrap_mean(alone - scores[0], draws=draws)),
        *_interval("phi_router", ("score",), parts.phi_router),
        *_interval("phi_experts", ("score",), parts.phi_experts),
        *_interval("interaction", ("score",), parts.interaction),
        *_interval("disagreement", ("part",), bootstrap_mean(by_part - np.stack(exact[:2]), draws=draws)),
    ]


def _signed(scores: FloatArray) -> FloatArray:
    """Turn the sign of the NLL in [..., score, sample], so that larger is better everywhere."""
    sign = np.array([-1.0 if name == "nll" else 1.0 for name in SCORES])
    signed: FloatArray = scores * sign[:, None]
    return signed


def _optional(cell: AttributedCell, draws: int) -> list[Values]:
    found: list[Values] = []
    if "depth" in cell.tables:
        depth = cell.tables["depth"]
        shapley = depth["shapley"].transpose("depth", "sample").to_numpy()
        found += _interval("depth_shapley", ("depth",), bootstrap_mean(shapley, draws=draws))
        found.append(("depth_error", ("depth",), depth["error"].to_numpy()))
    if "restores" in cell.tables:
        now = cell.tables["ledger"]["nll_current"].to_numpy()
        restored = cell.tables["restores"]["nll"].transpose("site", "restored", "sample").to_numpy()
        found += _interval("gain", ("site", "restored"), bootstrap_mean(now - restored, draws=draws))
    return found


def _dataset(
    stack: _Stack,
    coords: dict[str, Any],
    anchor: NDArray[np.int64],
    reason: NDArray[np.uint8],
    cells: Sequence[AttributedCell],
    checkpoints: Mapping[int, str],
) -> xr.Dataset:
    variables: dict[str, Any] = {
        name: (dims, array, _about(name, "score" in dims)) for name, (dims, array) in stack.arrays.items()
    }
    flags = {"flag_values": list(ATTRIBUTION_REASONS), "flag_meanings": "; ".join(ATTRIBUTION_REASONS.values())}
    reasons = {"reason": reason}
    for name, probe, code in (
        ("swaps_reason", "phi_router", 3),
        ("depth_reason", "depth_shapley", 3),
        ("restores_reason", "gain", 3),
        ("remainder_reason", "remainder", 4),
        ("residual_share_reason", "residual_share", 5),
    ):
        values = stack.arrays[probe][1] if probe in stack.arrays else np.full((*reason.shape, 1), np.nan)
        undefined = np.isnan(values).reshape(*reason.shape, -1).all(axis=-1)
        reasons[name] = np.where(reason > 0, reason, np.where(undefined, code, 0)).astype(np.uint8)
    missing = reasons["swaps_reason"] == 3
    reasons["remainder_reason"] = np.where(missing, 3, reasons["remainder_reason"]).astype(np.uint8)
    for name, codes in reasons.items():
        variables[name] = (_CELL, codes, {"long_name": "why undefined", **flags})
    first = cells[0].tables["ledger"] if cells else None
    by_site: dict[str, Any] = {"layer": {}, "kind": {}, "num_experts": {}, "gate": {}}
    for cell in cells:
        table = cell.tables["ledger"]
        for name, known in by_site.items():
            known.update(zip(table["site"].to_numpy().tolist(), table[name].to_numpy().tolist(), strict=True))
    labels = {
        name: ("site", np.array([known[site] for site in coords["site"].tolist()])) for name, known in by_site.items()
    }
    names = np.array([checkpoints[index] for index in coords["checkpoint"].tolist()], np.str_)
    attributes = {"section": "4", "settings": json.dumps(cells[0].about["settings"], sort_keys=True)} if first else {}
    return xr.Dataset(
        variables, coords | labels | {"checkpoint_name": ("checkpoint", names), "anchor": (_CELL, anchor)}, attributes
    )


def _about(name: str, by_score: bool) -> dict[str, str]:
    stem = next((name.removesuffix(end) for end in ("_low", "_high") if name.endswith(end)), name)
    end = {"_low": ", lower end of the interval", "_high": ", upper end of the interval"}.get(name[len(stem) :], "")
    units = _BY_SCORE if by_score else "1" if stem in _COUNTS else "nats"
    if stem in _FURTHER:
        title, formula = _FURTHER[stem]
        return {"long_name": title + end, "units": units, "definition": formula, "section": "4"}
    entry = ALL_MEASURES[stem]
    about = {"long_name": entry.title + end, "units": units, "definition": entry.formula, "section": entry.section}
    return about | ({"caveat": entry.caveat} if entry.caveat else {})


# --- rows for the command line ----------------------------------------------------------------------------------------


def attribution_rows(table: xr.Dataset) -> list[dict[str, Any]]:
    """Return one row per attributed task and checkpoint.

    Args:
        table: as `tabulate` returns it.

    Returns:
        ``task``, ``anchor``, ``checkpoint``, ``checkpoint_name``, ``samples``; ``forgetting_SCORE``, ``rise``,
        ``ledger_router``, ``ledger_experts``, ``residual``, ``residual_share``, ``evaluations``, and with swaps
        ``phi_router_SCORE``, ``phi_experts_SCORE``, ``interaction_SCORE``, ``remainder_SCORE``, with ``_low`` and
        ``_high``; ``depth``: groups of layers with their Shapley value and its standard error; ``largest``: the three
        sites with the largest entries; ``notes``: where the two accounts disagree, and where the residual is large.
        NaN stands for what is undefined.
    """
    rows = []
    for row, column in np.argwhere(table["reason"].to_numpy() == 0):
        cell = table.isel(task=int(row), checkpoint=int(column))
        rows.append(
            {
                "task": str(cell["task"].item()),
                "anchor": int(cell["anchor"]),
                "checkpoint": int(cell["checkpoint"]),
                "checkpoint_name": str(cell["checkpoint_name"].item()),
                "samples": int(cell["samples"]),
                **_flat(cell, "forgetting", "score"),
                **_flat(cell, "rise"),
                **{key.replace("ledger_part_", "ledger_"): v for key, v in _flat(cell, "ledger_part", "part").items()},
                **_flat(cell, "residual"),
                "residual_share": float(cell["residual_share"]),
                "evaluations": int(cell["evaluations"]),
                **{
                    key: value
                    for name in ("phi_router", "phi_experts", "interaction", "remainder")
                    if name in cell
                    for key, value in _flat(cell, name, "score").items()
                },
                "depth": _depths(cell),
                "largest": _largest(cell),
                "notes": _notes(cell),
            }
        )
    return rows


def _flat(cell: xr.Dataset, name: str, dim: str | None = None) -> dict[str, float]:
    """Return a variable with its interval as columns, one set per label of ``dim``."""
    ends = [end for end in ("", "_low", "_high") if f"{name}{end}" in cell]
    if dim is None:
        return {f"{name}{end}": float(cell[f"{name}{end}"]) for end in ends}
    return {
        f"{name}_{label}{end}": float(cell[f"{name}{end}"].sel({dim: label}))
        for label in cell[dim].to_numpy().tolist()
        for end in ends
    }


def _depths(cell: xr.Dataset) -> list[dict[str, Any]]:
    """Return the groups of layers that this cell has, lowest first."""
    if "depth_shapley" not in cell:
        return []
    columns = [f"depth_shapley{end}" for end in ("", "_low", "_high")] + ["depth_error"]
    values = np.stack([cell[name].to_numpy() for name in columns])
    keys = ("value", "low", "high", "error")
    return [
        {"layers": str(name), **dict(zip(keys, values[:, place].tolist(), strict=True))}
        for place, name in enumerate(cell["depth"].to_numpy().tolist())
        if np.isfinite(values[0, place])
    ]


def _largest(cell: xr.Dataset, count: int = 3) -> list[dict[str, Any]]:
    """Return the sites with the largest entries of either sign, largest first."""
    booked = cell["ledger_site"].transpose("site", "part").to_numpy()
    total = np.nan_to_num(booked.sum(axis=1))
    order = np.argsort(-np.abs(total), kind="stable")[:count]
    names = cell["site"].to_numpy()
    return [
        {"site": str(names[i]), "ledger": total[i], "router": booked[i, 0], "experts": booked[i, 1]}
        for i in order.tolist()
    ]


def _notes(cell: xr.Dataset) -> list[str]:
    """Say where the residual is large, and where ledger and swaps of one part have intervals that do not meet."""
    notes = []
    share = float(cell["residual_share"])
    if abs(share) > _LARGE_RESIDUAL:
        notes.append(
            f"the residual is {100 * share:.0f} % of the rise; book it finer with --tolerance 0.01 (a top-k gate that "
            "jumps leaves some whatever the nodes)"
        )
    if "phi_router" not in cell or not np.isfinite(float(cell["phi_router"].sel(score="nll"))):
        return notes
    together = float(cell["interaction"].sel(score="nll"))
    for part, name in (("router", "phi_router"), ("experts", "phi_experts")):
        ledger = [float(cell[f"ledger_part{end}"].sel(part=part)) for end in ("", "_low", "_high")]
        swaps = [float(cell[f"{name}{end}"].sel(score="nll")) for end in ("", "_low", "_high")]
        if ledger[1] > swaps[2] or swaps[1] > ledger[2]:
            notes.append(
                f"ledger and swaps disagree on the {part}: {ledger[0]:.3f} [{ledger[1]:.3f}, {ledger[2]:.3f}] against "
                f"{swaps[0]:.3f} [{swaps[1]:.3f}, {swaps[2]:.3f}] nats; the path and the average over two orders "
                f"divide differently what router and experts only do together (interaction {together:+.3f})"
            )
    return notes
