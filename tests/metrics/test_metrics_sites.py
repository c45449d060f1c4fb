"""Sites are independent: one alone, in a batch, or beside a broken one gives the same numbers and reasons."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.errors import DriftLensError
from tests.metrics.test_metrics_shapes import FUNCTIONS, SITES, SPECIAL, call

CONSTANTS = (int, float, type(None))
ACROSS_SITES = {"match_profiles", "other_site_scores"}  # compare one site with another: no site is alone in them


def leaves(value: Any) -> Iterator[Any]:
    """Every array of a result, and what its methods make of it."""
    if isinstance(value, (np.ndarray, np.generic, *CONSTANTS)):
        yield value
        return
    parts = list(value) if isinstance(value, tuple) else []
    parts += list(getattr(value, "__dict__", {}).values())
    if isinstance(value, (m.CoDriftTokens, m.DriftOriginTokens, m.ResponsibilityTokens)):
        parts.append(value.reduce())
    if isinstance(value, m.SubspacePair):
        parts += [value.overlap(), value.adjusted(), value.angles(), value.distance()]
    assert parts or dataclasses.is_dataclass(value)
    for part in parts:
        yield from leaves(part)


def by_site(hint: Any, value: Any) -> bool:
    if isinstance(value, m.Basis):
        return True
    names = getattr(hint, "dim_str", "").split()
    return bool(names) and names[0].lstrip("*#") == "site" and value.ndim == len(names)


def outcome(name: str, arguments: dict[str, Any]) -> Any:
    try:
        with np.errstate(all="ignore"):
            return list(leaves(getattr(m, name)(**arguments)))
    except DriftLensError as error:
        return type(error)


def cut(arguments: dict[str, Any], sites: set[str], index: Any) -> dict[str, Any]:
    def part(value: Any) -> Any:
        return m.Basis(*(array[index] for array in value)) if isinstance(value, m.Basis) else value[index]

    return {name: part(value) if name in sites else value for name, value in arguments.items()}


def same(found: Any, wanted: Any, index: Any) -> None:
    assert isinstance(found, type) == isinstance(wanted, type)
    if isinstance(wanted, type):
        assert found is wanted
        return
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, CONSTANTS) and not isinstance(other, np.generic):
            assert one == other
        else:
            assert np.shape(one) == np.shape(other[index])
            assert np.asarray(one).dtype == other.dtype
            np.testing.assert_allclose(one, other[index], rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ACROSS_SITES])
def test_a_site_does_not_see_its_neighbours(name: str) -> None:
    arguments, _, hints = call(getattr(m, name), SPECIAL.get(name, {}))
    sites = {key for key, value in arguments.items() if by_site(hints[key], value)}
    broken = [(key, fill) for key in sorted(sites) for fill in (None, np.nan, 0.0, np.inf)]
    for key, fill in broken:
        changed = dict(arguments)
        if fill is not None:
            if isinstance(arguments[key], m.Basis) or not np.issubdtype(arguments[key].dtype, np.floating):
                continue
            changed[key] = arguments[key].copy()
            changed[key][1] = fill
        together = outcome(name, changed)
        same(outcome(name, cut(changed, sites, (slice(None), None))), together, (slice(None), None))
        if isinstance(together, type):
            continue
        for site in range(SITES):
            same(outcome(name, cut(changed, sites, site)), together, site)


def test_most_functions_are_held_to_it() -> None:
    free = [name for name in FUNCTIONS if not any(by_site(hint, _Any(hint)) for hint in _hints(name).values())]
    assert len(free) < len(FUNCTIONS) / 4, free


class _Any:
    """A value that has the axes of its annotation."""

    def __init__(self, hint: Any) -> None:
        self.ndim = len(getattr(hint, "dim_str", "").split())


def _hints(name: str) -> dict[str, Any]:
    return {key: hint for key, hint in typing.get_type_hints(getattr(m, name)).items() if key != "return"}
