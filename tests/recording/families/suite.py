"""What every site family must show: a case says how to build a model and what its own forward does."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tests.recording.families as package
from driftlens.recording import ProbeSample, ProbeSet, RecordingSummary, record
from driftlens.store import Recording

Truth = Mapping[str, Mapping[str, Tensor]]

VOCABULARY = 64


@dataclass(frozen=True)
class FamilyCase:
    """One kind of model.

    Attributes:
        name: row of the parity table.
        family: name of the site family.
        build: a seeded tiny model in evaluation mode with a vocabulary of at least 64.
        truth: by site what the model's own forward does with ``input_ids [1, T]``, found without the recorder:
            ``gate`` [T, E], ``pathway`` [T, E, r] where there are any, ``output`` [T, d_out], what the adapter adds
            to the base module's output, where that is defined.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    truth: Callable[[nn.Module, Tensor], Truth]


@dataclass(frozen=True)
class Parity:
    """Largest errors of a case: gates absolute, pathways and outputs relative to the site's largest value."""

    sites: int
    gate: float
    pathway: float | None
    output: float | None


def cases() -> list[FamilyCase]:
    """Return the cases of all families."""
    modules = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.name != "suite")
    return [case for name in modules for case in importlib.import_module(f"{package.__name__}.{name}").CASES]


def probes() -> ProbeSet:
    """Two tasks of token ids, samples of different lengths."""
    rng = np.random.default_rng(5)

    def sample(name: str, length: int) -> ProbeSample:
        ids = [int(i) for i in rng.integers(3, VOCABULARY, length)]
        return ProbeSample(name, input_ids=tuple(ids[:-2]), answer_ids=tuple(ids[-2:]))

    return ProbeSet({task: tuple(sample(str(n), n) for n in (7, 4, 9)) for task in ("first", "second")})


def token_ids(row: ProbeSample) -> Tensor:
    return torch.tensor([[*(row.input_ids or ()), *(row.answer_ids or ())]])


def recorded(model: nn.Module, out: Path, **options: object) -> RecordingSummary:
    return record(model, probes(), out, encoder=None, checkpoint_meta={"checkpoint": out.stem}, **options)  # type: ignore[arg-type]


def truths(case: FamilyCase, model: nn.Module, task: str) -> dict[str, dict[str, np.ndarray]]:
    """The truth of every site on all samples of a task, one sample at a time, so that nothing is padded."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for row in probes().task(task):
        with torch.no_grad():
            for site, values in case.truth(model, token_ids(row)).items():
                for name, value in values.items():
                    parts = found.setdefault(site, {}).setdefault(name, [])
                    parts.append(value.detach().double().numpy())
    return {site: {name: np.concatenate(parts) for name, parts in values.items()} for site, values in found.items()}


def rebuilt(recording: Recording, site: str, task: str) -> np.ndarray:
    """What the adapter adds, [T, d_out], from recorded rows and weights alone."""
    info = recording.sites[recording.site_number(site)]
    gate, z = (np.asarray(part(site, task), dtype=np.float64) for part in (recording.gate, recording.pathway))
    b = recording.weights(site)["B"]
    assert b is not None
    if info.semantics == "product_of_sums":
        z = np.broadcast_to(np.einsum("ne,nek->nk", gate, z)[:, None], z.shape)
    out: np.ndarray = info.scaling * np.einsum("ne,nek,edk->nd", gate, z, b)
    return out


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def parity(case: FamilyCase, model: nn.Module, recording: Recording) -> Parity:
    """Compare a recording of ``model`` on `probes` with the truth of ``case``."""
    gate, pathway, output = [], [], []
    sites = {info.name: info for info in recording.sites if info.family == case.family}
    for task in recording.probes:
        truth = truths(case, model, task)
        assert truth.keys() == sites.keys()
        for site, values in truth.items():
            found = recording.gate(site, task)
            assert found.shape == values["gate"].shape, (site, found.shape, values["gate"].shape)
            gate.append(float(np.abs(found - values["gate"]).max()))
            if sites[site].rank:
                pathway.append(_relative(recording.pathway(site, task), values["pathway"]))
            if "output" in values:
                output.append(_relative(rebuilt(recording, site, task), values["output"]))
    return Parity(len(sites), max(gate), max(pathway, default=None), max(output, default=None))
