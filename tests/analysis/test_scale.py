"""What makes the analysis of large runs cheap changes no number: shortcuts, workers, blocks and lazy reading."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.linalg import subspace_angles
from scipy.special import rel_entr

from driftlens.analysis import Pass, Run, cache, inputs, open_run, threads
from driftlens.analysis.inputs import factor_grams, read_pass, site_blocks, site_union
from driftlens.analysis.state import angle_table
from driftlens.errors import ConfigError, FormatError, UnknownNameError
from driftlens.metrics import (
    codrift_from_grams,
    expert_grams,
    js_divergence,
    probe_mean,
    resampled_means,
)
from driftlens.metrics.codrift import codrift_from_products, expert_products
from driftlens.store.guard import LazyArray
from tests.analysis.synthetic import make_run

PARITY = 1e-9


def tokens_last(values: np.ndarray) -> np.ndarray:
    """The same array with tokens (axis 1) last in memory."""
    return np.moveaxis(np.moveaxis(values, 1, -1).copy(), -1, 1)


@pytest.mark.parametrize("layout", [np.array, tokens_last])
def test_products_of_expert_outputs_give_the_co_drift_of_the_gram_matrices(
    layout: Callable[[np.ndarray], np.ndarray],
) -> None:
    rng = np.random.default_rng(0)
    gates = [layout(rng.dirichlet(np.ones(4), (3, 20))) for _ in range(2)]
    paths = [layout(rng.normal(size=(3, 20, 4, 2))) for _ in range(2)]
    grams = expert_grams(*(rng.normal(size=(3, 4, 30, 2)) for _ in range(2)))
    wanted = codrift_from_grams(*gates, *paths, *grams)
    own0, own1 = expert_products(paths[0], paths[0], grams[0]), expert_products(paths[1], paths[1], grams[2])
    found = codrift_from_products(*gates, own0, expert_products(*paths, grams[1]), own1)
    for name in ("rr", "ee", "re", "u00_sq", "u11_sq"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=1e-9)
    # Against outputs themselves: <o_e, o'_f>, and the mirrored half of one pass's own products.
    factors = [rng.normal(size=(4, 30, 2)) for _ in range(2)]
    outputs = [np.einsum("edr,ner->ned", factor, path[0]) for factor, path in zip(factors, paths, strict=True)]
    old, between, _ = expert_grams(*factors)
    np.testing.assert_allclose(
        expert_products(paths[0][0], paths[1][0], between), outputs[0] @ outputs[1].swapaxes(1, 2)
    )
    np.testing.assert_allclose(expert_products(paths[0][0], paths[0][0], old), outputs[0] @ outputs[0].swapaxes(1, 2))


def test_products_refuse_a_gram_matrix_of_another_size() -> None:
    path = np.zeros((5, 2, 3))
    with pytest.raises(ConfigError, match=r"shape \(6, 4\); expected \[\.\.\., 6, 6\]"):
        expert_products(path, path, np.zeros((6, 4)))


def test_fast_divergence_is_that_of_scipy_down_to_zeros_and_broken_rows() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.dirichlet(np.full(5, 0.3), (2, 300))
    first[:50, 1], second[25:75, 1], first[100:150, :4], second[130:140, 1:] = 0, 0, 0, 0
    second[:10] = first[:10]
    first[290], second[295], first[298] = np.nan, np.nan, 0
    sums = [np.where(rows.sum(axis=1) == 0, 1, rows.sum(axis=1))[:, None] for rows in (first, second)]
    p, q = first / sums[0], second / sums[1]
    middle = (p + q) / 2
    wanted = (rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=1) / 2 / np.log(2)
    wanted[298] = 1.0  # nobody against somebody
    found = js_divergence(first, second)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-14)
    assert (found[:10] == 0).all()
    assert np.isnan(found[[290, 295]]).all()


def test_resampled_means_are_those_of_samples_drawn_again() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=(3, 2, 6))
    weights = rng.multinomial(6, np.full(6, 1 / 6), size=40).astype(float)
    for holes in (False, True):
        if holes:
            values[1, 0, 2] = np.nan
        found = resampled_means(values, weights)
        assert found.shape == (40, 3, 2)
        for draw, counts in enumerate(weights.astype(int)):
            drawn = np.repeat(values, counts, axis=-1)
            np.testing.assert_allclose(found[draw], np.nanmean(drawn, axis=-1), rtol=0, atol=1e-14)


def test_angles_of_all_checkpoints_at_once_are_scipys() -> None:
    factors = np.random.default_rng(3).normal(size=(3, 2, 4, 40)).astype(np.float32)
    angles, grams = angle_table(factors), factor_grams(factors)
    for anchor in range(3):
        for current in range(3):
            for expert in range(2):
                pair = factors[[anchor, current], expert].astype(np.float64)
                np.testing.assert_allclose(grams[anchor, current, expert], pair[0] @ pair[1].T, rtol=0, atol=1e-12)
                wanted = subspace_angles(pair[0].T, pair[1].T)[::-1]
                tolerance = 1e-6 if anchor == current else PARITY  # the Gram route resolves angles of 0 to 1e-7
                np.testing.assert_allclose(angles[anchor, current, expert], wanted, rtol=0, atol=tolerance)


def test_tables_do_not_depend_on_blocks_or_workers(master: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tables() -> dict[str, xr.Dataset]:
        return open_run(master).anchored({"digit": 1}).tables()  # anchored as by default, but not cached

    whole = tables()
    monkeypatch.setattr(inputs, "_PASS_BYTES", 1)  # every site is a block
    alone = tables()
    monkeypatch.setattr(threads, "worker_count", lambda: 3)
    together = tables()
    for name, table in whole.items():
        xr.testing.assert_identical(alone[name], together[name])
        xr.testing.assert_allclose(table, alone[name], rtol=0, atol=PARITY)


def test_what_a_pass_gives_alone_is_computed_once() -> None:
    calls: list[int] = []
    gate = np.ones((1, 2, 1))
    one = Pass(gate, None, None, gate, gate[..., 0])
    assert [one.once("family size", lambda: calls.append(1) or len(calls)) for _ in range(3)] == [1, 1, 1]


def test_a_pass_keeps_tokens_last_in_memory_and_reads_what_is_stored(run: Run) -> None:
    with run.recording(1) as recording:
        probe = recording.probes[0]
        block = next(site_blocks(site_union([recording]), 10, 1))
        found = read_pass(recording, probe, block)
        assert found.pathway is not None
        assert np.moveaxis(found.pathway, 1, -1).flags.c_contiguous
        for row, site in enumerate(block.sites):
            assert np.array_equal(found.pathway[row], recording.pathway(site.name, probe))
            assert np.array_equal(found.gate[row], recording.gate(site.name, probe))


def test_workers_keep_the_order_of_items_and_pass_on_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "worker_count", lambda: 3)
    second_begun = threading.Event()

    def slow_first(item: int) -> int:
        if item == 1:
            second_begun.set()
        elif item == 0:
            assert second_begun.wait(10)  # the first item ends after the second has begun
        return item * item

    assert list(threads.in_order(slow_first, range(7))) == [0, 1, 4, 9, 16, 25, 36]

    def fail(item: int) -> int:
        if item >= 2:
            raise ValueError(f"item {item}")
        return item

    found = threads.in_order(fail, range(6))
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(found)


def test_workers_take_one_blas_thread_each_and_give_the_others_back() -> None:
    library = threads._openblas()
    if library is None:
        pytest.skip("numpy has another library than OpenBLAS")
    get, put = library
    before = get()
    put(2)
    try:
        assert threads.worker_count() == 2
        assert set(threads.in_order(lambda _: get(), range(4))) == {1}
        assert get() == 2
        outer = threads.in_order(lambda _: list(threads.in_order(lambda _: get(), range(2))), range(2))
        assert list(outer) == [[1, 1], [1, 1]]
        assert get() == 2
    finally:
        put(before)


def test_another_process_that_takes_the_cache_away_costs_no_tables(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "analysis.h5").unlink()
    original = cache.write_table

    def removed(group: Any, table: xr.Dataset) -> None:
        original(group, table)
        (copy / "analysis.h5.partial").unlink(missing_ok=True)

    monkeypatch.setattr(cache, "write_table", removed)
    assert "router_js" in open_run(copy).drift
    assert not (copy / "analysis.h5").exists()


def test_opening_and_listing_runs_import_no_table_library(master: Path) -> None:
    program = (
        "import sys, driftlens as dl; from driftlens.analysis import list_runs\n"
        "text = repr(dl.open(sys.argv[1])), len(list_runs(sys.argv[1]))\n"
        "print(sorted({'xarray', 'pandas', 'scipy', 'torch', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(master)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- lazy reading --------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every read of token values: dataset and number of values."""
    found: list[tuple[str, int]] = []
    original = LazyArray.__getitem__

    def noted(self: LazyArray, index: Any) -> np.ndarray:
        values = original(self, index)
        if "/group_" in self.key and not self.key.endswith("/site"):
            found.append((self.key, values.size))
        return values

    monkeypatch.setattr(LazyArray, "__getitem__", noted)
    return found


def test_a_measure_over_lazy_blocks_is_that_of_the_tables(run: Run, reads: list[tuple[str, int]]) -> None:
    pytest.importorskip("dask")
    with run.open_tokens(chunks={"site": 1, "token": 4}) as tokens:
        assert not reads
        divergence = xr.apply_ufunc(
            js_divergence,
            tokens.gate.sel(checkpoint=1),
            tokens.gate.sel(checkpoint=3),
            input_core_dims=[["expert"], ["expert"]],
            dask="parallelized",
            output_dtypes=[np.float64],
        )
        assert not reads
        divergence = divergence.compute()
        assert {key for key, _ in reads} == {"/group_0/gate"}
        assert max(size for _, size in reads) == 4 * tokens.sizes["expert"]
        chosen = divergence.sel(token=divergence.probe == "digit")
        lazy = probe_mean(chosen.values, chosen["sample"].values)
    wanted = run.drift["router_js"].sel(probe="digit", checkpoint=3)
    assert run.drift["anchor"].sel(probe="digit") == 1
    np.testing.assert_allclose(lazy, wanted.values, rtol=0, atol=1e-14)


def test_lazy_tokens_are_the_recordings(run: Run) -> None:
    pytest.importorskip("dask")
    with run.open_tokens(2, "01-digit") as tokens, run.recording(2) as recording:
        assert tokens["checkpoint"].values.tolist() == [1, 2]
        assert tokens["checkpoint_name"].values.tolist() == ["01-digit", "02-colour"]
        assert tokens.gate.dtype == np.float16
        for probe in recording.probes:
            part = tokens.sel(checkpoint=2).isel(token=(tokens.probe == probe).values)
            for name, column in recording.tokens(probe).items():
                assert np.array_equal(part[name], column)
            for site in recording.sites:
                assert np.array_equal(part.pathway.sel(site=site.name), recording.pathway(site.name, probe))
                assert part["layer"].sel(site=site.name) == site.layer


def test_lazy_arrays_are_read_by_other_processes(run: Run) -> None:
    dask = pytest.importorskip("dask")
    import pickle

    with run.open_tokens(1) as tokens:
        again = pickle.loads(pickle.dumps(tokens.gate.data))
        assert np.array_equal(again.compute(scheduler="sync"), tokens.gate.data.compute(scheduler="sync"))
    assert dask.__version__


def test_lazy_tokens_refuse_what_is_no_one_array(tmp_path: Path, run: Run) -> None:
    pytest.importorskip("dask")
    grown = open_run(make_run(tmp_path / "grown", sites=2, samples=2, tokens_per_sample=2, grow=1))
    with pytest.raises(FormatError, match=r"Group 0 of 03-country has 2 sites .* of E = 5, r = 3, of 00-start it has"):
        grown.open_tokens()
    with grown.open_tokens(0, 1) as tokens:
        assert tokens.sizes["expert"] == 4
    with pytest.raises(UnknownNameError, match="group"):
        run.open_tokens(group=7)
    with pytest.raises(ConfigError, match="'site' and 'token'"):
        run.open_tokens(chunks={"expert": 1})


def test_the_files_themselves_open_lazily_with_xarray(run: Run) -> None:
    pytest.importorskip("dask")
    path = run.path / "recordings" / "01-digit.h5"
    with xr.open_datatree(path, engine="h5netcdf", chunks={}) as tree, run.recording(1) as recording:
        pathway = tree["group_0"]["pathway"]
        assert pathway.chunks is not None
        assert np.array_equal(pathway[0].compute(), recording.groups[0].pathway[0])
