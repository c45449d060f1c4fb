"""Recordings of every schema ever written stay readable, with the content that was given to their writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driftlens.store import SiteInfo, open_recording, verify_recording
from driftlens.store.schema import SCHEMA_VERSION, SITE_DEFAULTS

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*/*.h5"))
LABELS = [f"{path.parent.name}/{path.stem}" for path in FILES]
SINCE_1_1 = ("family", "semantics", "normalised")


def expected(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(path.with_suffix(".npz")) as arrays:
        found = dict(arrays)
    return json.loads(str(found.pop("head"))), found


def test_every_schema_has_its_files() -> None:
    of_1_0 = {"softmax", "two_groups", "rank_0", "thinned"}
    found = {folder.name: {path.stem for path in folder.glob("*.h5")} for folder in GOLDEN.iterdir()}
    assert found == {"schema-1.0": of_1_0, "schema-1.1": of_1_0 | {"families"}}
    assert f"schema-{SCHEMA_VERSION}" in found, "run scripts/make_golden.py and commit the new folder"


@pytest.mark.parametrize("path", FILES, ids=LABELS)
def test_a_golden_file_verifies(path: Path) -> None:
    assert verify_recording(path) == []


@pytest.mark.parametrize("path", FILES, ids=LABELS)
def test_a_golden_file_has_the_head_that_was_given(path: Path) -> None:
    head, _ = expected(path)
    with open_recording(path) as recording:
        assert f"schema-{recording.schema}" == path.parent.name
        assert recording.sites == [SiteInfo(**site) for site in head["sites"]]
        assert recording.probes == head["probes"]
        assert recording.meta == head["meta"]
        for probe in recording.probes:
            assert recording.sample_ids(probe) == head["sample_ids"][probe]


@pytest.mark.parametrize("path", FILES, ids=LABELS)
def test_a_golden_file_has_the_numbers_that_were_given(path: Path) -> None:
    _, arrays = expected(path)
    with open_recording(path) as recording:
        for key, wanted in arrays.items():
            kind, *names = key.split("/")
            if kind == "tokens":
                found = recording.tokens(names[0])[names[1]]
            elif kind == "values":
                group = recording.groups[int(names[0])]
                if names[1] == "expert_norm" and not group.rank:
                    # Schema 1.0 stored it although single outputs had not been observed; it is not given out any more.
                    assert np.isnan(group.read("expert_norm", names[2])).all()
                    continue
                found = group.read(names[1], names[2])
            elif kind == "stats":
                found = recording.groups[int(names[0])].stats[names[1]]
                if found.shape != wanted.shape or np.isnan(found).any():
                    assert recording.groups[int(names[0])].rank == 0
                    assert names[1] in ("energy", "expert_sq")
                    continue
            elif kind == "weights":
                found = recording.weights(int(names[0]))[names[1]]
            else:
                found = recording.grams(names[0])[int(names[1])][names[2]]
                np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
                continue
            np.testing.assert_array_equal(found, wanted, err_msg=key)


def test_nothing_in_a_golden_file_is_left_unread() -> None:
    for path in FILES:
        _, arrays = expected(path)
        with open_recording(path) as recording:
            probes, groups = recording.probes, recording.groups
            wanted = {f"tokens/{p}/{c}" for p in probes for c in ("sample", "position", "token_id", "role")}
            for group in groups:
                names = ("gate", "base_norm", *(("pathway", "expert_norm") if group.rank else ()))
                wanted |= {f"values/{group.index}/{name}/{p}" for name in names for p in probes}
                wanted |= {f"stats/{group.index}/{name}" for name in ("count", "gate_sum", "gate_outer", "base_sq")}
            if recording.has_weights:
                for index, site in enumerate(recording.sites):
                    names = ("A", "B", "router") if site.rank else ("router",)
                    wanted |= {f"weights/{index}/{name}" for name in names}
            for anchor in recording.gram_checkpoints:
                wanted |= {f"grams/{anchor}/0/{name}" for name in ("a_gram", "b_gram")}
        assert wanted <= arrays.keys(), path


def test_what_schema_1_0_did_not_say_gets_what_was_true() -> None:
    with open_recording(GOLDEN / "schema-1.0" / "two_groups.h5") as recording:
        for site in recording.sites:
            assert {name: getattr(site, name) for name in SINCE_1_1} == SITE_DEFAULTS


def test_schema_1_1_keeps_families_semantics_and_gates_that_are_used_as_they_are() -> None:
    with open_recording(GOLDEN / "schema-1.1" / "families.h5") as recording:
        assert [tuple(getattr(site, name) for name in SINCE_1_1) for site in recording.sites] == [
            ("peft-lora", "sum_gBA", False),
            ("foreign", "product_of_sums", True),
            ("transformers-moe", "sum_gBA", True),
        ]
        np.testing.assert_array_equal(recording.gate(0, "first"), 1.0)
