"""What fuzzing found once stays found: every input that broke the reader, replayed under the caps of the fuzzer."""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from scripts import fuzz_reader
from tests.store import _fuzz

CORPUS = Path(__file__).parent / "corpus"
ENTRIES = sorted(CORPUS.glob("*-*.json"))


@pytest.fixture(scope="module")
def seeds() -> dict[str, _fuzz.Seed]:
    return {seed.path.name: seed for seed in fuzz_reader.load_seeds(CORPUS)}


def sound(outcome: str, sealed: bool) -> bool:
    # A forger who repairs every checksum may change numbers; an accident may not.
    return outcome in ("refused", "equal", "unseen") or (sealed and outcome == "different")


@pytest.mark.parametrize("entry", ENTRIES, ids=[path.stem for path in ENTRIES])
def test_an_input_that_once_broke_the_reader_is_answered(
    seeds: dict[str, _fuzz.Seed], entry: Path, tmp_path: Path
) -> None:
    case = json.loads(entry.read_text())
    seed = seeds[case["seed"]]
    data = _fuzz.patched(seed.data, case["patch"])
    assert data != seed.data
    outcome = fuzz_reader.trial(seed, data, case["sealed"], tmp_path)
    assert sound(outcome, case["sealed"]), f"was {case['was']}, is {outcome}"


def test_the_corpus_is_small_and_holds_every_kind_of_failure() -> None:
    kinds = {json.loads(path.read_text())["was"].split(":")[0] for path in ENTRIES}
    assert kinds >= {"crash", "hang", "exception"}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 2 << 20


def test_new_inputs_find_nothing(seeds: dict[str, _fuzz.Seed], tmp_path: Path) -> None:
    tiny = [seeds["tiny-1.1.h5"]]
    outcomes = set()
    for number in range(40):
        seed, data, sealed = fuzz_reader.make_input(tiny, 1_000_000_000 + number)
        outcome = fuzz_reader.trial(seed, data, sealed, tmp_path)
        assert sound(outcome, sealed), f"input {number} (sealed: {sealed}): {outcome}"
        outcomes.add(outcome)
    assert {"refused", "equal"} <= outcomes


def test_inputs_depend_on_their_number_alone(seeds: dict[str, _fuzz.Seed]) -> None:
    given = list(seeds.values())
    first = [fuzz_reader.make_input(given, number)[1:] for number in range(30)]
    assert first == [fuzz_reader.make_input(given, number)[1:] for number in range(30)]
    assert len({data for data, _ in first}) > 25


def test_a_repaired_checksum_is_the_one_that_hdf5_computes(seeds: dict[str, _fuzz.Seed]) -> None:
    for seed in seeds.values():
        assert len(seed.blocks) > 60
        assert len(seed.chunks) > 20
        for start, length in seed.blocks:
            stored = int.from_bytes(seed.data[start + length : start + length + 4], "little")
            assert stored == _fuzz.lookup3(seed.data[start : start + length])
        for start, size in seed.chunks:
            stored = int.from_bytes(seed.data[start + size - 4 : start + size], "little")
            assert stored == _fuzz.fletcher32(seed.data[start : start + size - 4])


def test_a_crash_a_hang_and_a_flood_of_memory_are_told_apart(
    seeds: dict[str, _fuzz.Seed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = seeds["tiny-1.1.h5"]

    def spin(*_: object, **__: object) -> str:
        while True:
            pass

    def crash(*_: object, **__: object) -> str:
        faulthandler.disable()
        raise SystemExit(fuzz_reader.os.kill(fuzz_reader.os.getpid(), fuzz_reader.signal.SIGSEGV))

    def flood(*_: object, **__: object) -> str:
        return str(len(bytearray(2 * fuzz_reader.MEMORY)))

    monkeypatch.setattr(fuzz_reader, "CPU_SECONDS", 0.2)
    expected = {spin: "hang", crash: "crash:SIGSEGV", flood: "exception:MemoryError:?"}
    for judge, outcome in expected.items():
        monkeypatch.setattr(_fuzz, "judge", judge)
        assert fuzz_reader.trial(seed, seed.data, False, tmp_path) == outcome


def test_silent_changes_count_as_failures_unless_forged(
    seeds: dict[str, _fuzz.Seed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fuzz, "judge", lambda *_, **__: "different")
    seed = seeds["tiny-1.1.h5"]
    assert fuzz_reader.trial(seed, seed.data, False, tmp_path) == "exception:silent"
    assert fuzz_reader.trial(seed, seed.data, True, tmp_path) == "different"


def test_a_patch_turns_one_file_into_the_other(seeds: dict[str, _fuzz.Seed]) -> None:
    seed = seeds["tiny-1.1.h5"]
    for number in range(40):
        data, _ = _fuzz.mutate(seed, random.Random(number))
        assert _fuzz.patched(seed.data, _fuzz.difference(seed.data, data)) == data


def test_workers_share_the_numbers_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, folder = tmp_path / "corpus", tmp_path / "work"
    (corpus / "seeds").mkdir(parents=True)
    folder.mkdir()
    shutil.copy(CORPUS / "seeds" / "plain-1.0.h5", corpus / "seeds")
    section = {"first": 100, "inputs": 5, "seconds": 1.0, "cpu_seconds": 1.0, "outcomes": {"refused": 5}}
    counter = corpus / "COUNTER.json"
    counter.write_text(json.dumps({"inputs": 105, "sections": [{"first": 0, "inputs": 100}, section]}))
    seen = tmp_path / "seen"

    seeds = fuzz_reader.load_seeds(corpus)
    fatal = fuzz_reader.make_input(seeds, 107)[1]

    def judge(path: Path, *_: object, **__: object) -> str:
        data = path.read_bytes()
        with seen.open("ab") as file:
            file.write(hashlib.sha256(data).digest())
        if data == fatal:
            faulthandler.disable()
            fuzz_reader.os.kill(fuzz_reader.os.getpid(), fuzz_reader.signal.SIGSEGV)
        return "refused"

    monkeypatch.setattr(_fuzz, "judge", judge)
    monkeypatch.setattr(fuzz_reader, "keep", lambda *_: None)
    for total in (112, 117):
        arguments = argparse.Namespace(corpus=corpus, inputs=total, seconds=60.0, workers=2, batch=4)
        fuzz_reader.run(arguments, folder)
        assert json.loads(counter.read_text())["inputs"] == total
    last = json.loads(counter.read_text())["sections"][-1]
    assert (last["inputs"], last["outcomes"]) == (17, {"crash": 1, "refused": 16})
    raw = seen.read_bytes()
    found = {raw[at : at + 32] for at in range(0, len(raw), 32)}
    assert found == {hashlib.sha256(fuzz_reader.make_input(seeds, n)[1]).digest() for n in range(105, 117)}


def test_what_the_checksum_cannot_see_is_told_from_what_was_overlooked(
    seeds: dict[str, _fuzz.Seed], tmp_path: Path
) -> None:
    seed = seeds["plain-1.0.h5"]
    sizes = dict(seed.chunks)
    start, size = next((at, sizes[at]) for at, name in seed.owners if name == "tokens/position" and at in sizes)
    at = next(i for i in range(start + 12, start + size - 4, 2) if seed.data[i : i + 2] == bytes(2))
    data = bytearray(seed.data)
    data[at : at + 2] = b"\xff\xff"
    assert fuzz_reader.trial(seed, bytes(data), False, tmp_path) == "unseen"
    data[at] = 0
    assert fuzz_reader.trial(seed, bytes(data), False, tmp_path) == "refused"


def test_a_change_is_traced_to_its_dataset(seeds: dict[str, _fuzz.Seed]) -> None:
    seed = seeds["plain-1.0.h5"]
    places = [start for start, name in seed.owners if name == "tokens/role"]
    assert sorted(seed.data[start : start + 4] == b"OHDR" for start in places) == [False, True]
    for start in places:
        data = bytearray(seed.data)
        data[start + 4] ^= 1
        assert seed.owner(bytes(data)) == "tokens/role"
    assert _fuzz.everything(seed.path, "tokens/role") == seed.content
