"""What a writer accepts: every refusal names the file, the site and the probe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftlens.errors import FormatError, SiteError
from driftlens.store.encoding import is_finite
from driftlens.store.schema import GATE_SUM_TOLERANCE, TOKEN_COLUMNS, SiteInfo, value_shapes

__all__ = ["check_columns", "check_names", "check_shapes", "check_values", "check_weights"]


def check_names(path: Path, sites: Sequence[SiteInfo], probes: Sequence[str], given: Iterable[str]) -> None:
    """Raise FormatError if sites and probes are missing, repeated or impossible, or ``given`` are other probes."""
    if not sites or not probes:
        raise FormatError(f"{path}: a recording needs at least one site and one probe.")
    for what, names in (("site", [site.name for site in sites]), ("probe", list(probes))):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise FormatError(f"{path}: the {what} name {name!r} occurs twice; names must be unique.")
            seen.add(name)
    if set(given) != set(probes):
        raise FormatError(
            f"{path}: sample ids are given for {sorted(given)}, the probes are {sorted(probes)}; they must agree."
        )
    for site in sites:
        site.check()


def check_columns(path: Path, probe: str, n: int, arrays: Mapping[str, NDArray[np.int64]], samples: int) -> None:
    """Raise FormatError if a column of /tokens has another length than ``n`` or values outside its type."""
    limits = {name: np.iinfo(dtype).max for name, dtype in TOKEN_COLUMNS.items()} | {"sample": samples - 1}
    for name, array in arrays.items():
        if array.shape != (n,):
            raise FormatError(f"{path}: {name} has shape {list(array.shape)}, expected [{n}] like sample.")
        if n and not (array.min() >= 0 and array.max() <= limits[name]):
            raise FormatError(
                f"{path}: {name} of probe {probe!r} ranges from {array.min()} to {array.max()}; "
                f"allowed are 0 to {limits[name]}."
            )


def check_shapes(
    path: Path, group: int, given: Mapping[str, NDArray[Any]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise FormatError if names or shapes differ from ``expected``."""
    found = {name: tuple(np.shape(array)) for name, array in given.items()}
    if found != dict(expected):
        texts = [", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) for shapes in (found, expected)]
        raise FormatError(f"{path}: group {group} was given {texts[0]}; expected {texts[1]}.")


def check_values(
    path: Path,
    group: int,
    sites: Sequence[SiteInfo],
    probe: str,
    n: int,
    given: Mapping[str, NDArray[Any]],
    *,
    reference: bool = False,
) -> None:
    """Check the token values of one group's ``sites``.

    Raises:
        FormatError: names or shapes that do not fit.
        SiteError: a value that is not finite, or a gate row that does not sum to 1.
    """
    expected = value_shapes(len(sites), n, sites[0].num_experts, sites[0].rank, reference=reference)
    check_shapes(path, group, given, expected)
    for name in expected:
        if not is_finite(given[name]):
            bad = ~np.isfinite(given[name]).reshape(len(sites), -1).all(axis=1)
            raise SiteError(
                f"{name} of site {sites[int(np.argmax(bad))].name!r} is not finite everywhere on probe {probe!r}. "
                "The model overflows or is broken there; try float32 or bfloat16."
            )
    if (np.min(given["gate"], initial=0.0)) < 0:
        low = np.min(given["gate"].reshape(len(sites), -1), axis=1)
        raise SiteError(
            f"Site {sites[int(np.argmin(low))].name!r} has a gate weight of {low.min():.3g} on probe {probe!r}; gates "
            "are not negative. What was recorded may be logits: record the weights really used."
        )
    wrong = np.asarray(np.abs(np.sum(given["gate"], axis=-1, dtype=np.float64) - 1) > GATE_SUM_TOLERANCE)
    wrong &= np.array([site.normalised for site in sites])[:, None]
    if wrong.any():
        site = sites[int(np.argmax(wrong.any(axis=1)))]
        raise SiteError(
            f"{int(wrong.sum())} of {wrong.size} gate rows do not sum to 1 on probe {probe!r}, first at site "
            f"{site.name!r}. Record the weights really used."
        )


def check_weights(path: Path, site: SiteInfo, given: Mapping[str, NDArray[Any]], *, again: bool) -> None:
    """Check the parameters of one site; ``again`` says that the site's were stored before.

    Raises:
        FormatError: shapes that do not fit, or weights given twice.
        SiteError: values that are not finite.
    """
    experts, rank = site.num_experts, site.rank
    if (("A" in given), ("B" in given)) != (bool(rank), bool(rank)):
        raise FormatError(
            f"{path}: site {site.name!r} of rank {rank} was given {', '.join(given) or 'nothing'}; expected A and B "
            "exactly where the rank is above 0."
        )
    shapes = {"A": (experts, rank, site.d_in), "B": (experts, site.d_out, rank), "router": (experts, site.d_in)}
    for name, array in given.items():
        if np.shape(array) != shapes[name] or again:
            twice = " and were already stored" if again else ""
            raise FormatError(
                f"{path}: {name} of site {site.name!r} has shape {list(np.shape(array))}{twice}; "
                f"expected {list(shapes[name])}, once."
            )
        if not is_finite(array):
            raise SiteError(f"{name} of site {site.name!r} has values that are not finite. The checkpoint is broken.")
