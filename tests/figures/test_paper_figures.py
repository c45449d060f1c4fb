"""The figures after PASs-MoE and SAME show the numbers of the tables, and say where a flat line says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from driftlens import figures
from driftlens.analysis import Run, open_run
from driftlens.errors import ConfigError, FormatError, NotFoundError, UnknownNameError
from driftlens.figures.theme import THEMES
from driftlens.metrics import js_divergence, sample_means
from driftlens.store import Manifest
from tests.analysis.synthetic import make_run
from tests.figures.conftest import HOSTILE
from tests.figures.test_faults import texts


def traces(figure: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("seeds")
    runs = [open_run(make_run(folder / f"a{seed}", sites=2, seed=seed, noise=False)) for seed in (0, 1)]
    return [*runs, open_run(make_run(folder / "b0", sites=2, gate="uniform", method="flat", noise=False))]


def with_results(run: Run, values: dict[str, list[float]], checkpoint: str, anchor: str, task: str) -> Run:
    """Write a result of re-routing as ``driftlens reroute`` does."""
    path = run.path / "reroute" / checkpoint / f"{anchor}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"task": task, "settings": {"training": {"steps_per_task": 7}}, "samples": ["x", "y"]}
    states = {state: dict.fromkeys(("strict", "lenient", "nll"), scores) for state, scores in values.items()}
    path.write_text(json.dumps(content | {"values": states}))
    manifest = Manifest.load(run.path)
    manifest.add(path.relative_to(run.path))
    manifest.save()
    return open_run(run.path)


RESULT = {"anchor": [1, 1, 1, 0], "cc": [0, 0, 1, 0], "rerouted": [1, 0, 1, 0], "ac": [0, 0, 0, 0]}


@pytest.fixture(scope="module")
def rerouted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_run(make_run(tmp_path_factory.mktemp("rerouted") / "run", sites=1, noise=False))
    run = with_results(run, RESULT, "03-country", "01-digit", "digit")
    return with_results(run, RESULT, "02-colour", "01-digit", "digit")


def test_lines_show_the_mean_over_seeds_negated_on_the_left_and_their_range(seeds: list[Run]) -> None:
    found = traces(figures.sample_js_lines(seeds))
    final = np.array(
        [[run.summary["sample_js"].sel(checkpoint=3, probe=p) for p in ("digit", "colour")] for run in seeds]
    )
    assert list(found["moelora"].x) == [1, 2]
    np.testing.assert_allclose(found["moelora"].y, -final[:2].mean(axis=0))
    band = np.array(found["moelora range"].y).reshape(2, 2)
    np.testing.assert_allclose(np.sort([band[0], band[1][::-1]], axis=0), np.sort(-final[:2], axis=0))
    along = [
        np.mean([run.summary["sample_js"].sel(checkpoint=2, probe="digit") for run in seeds[:2]]),
        final[:2].mean(),
    ]
    np.testing.assert_allclose(found["moelora along the stream"].y, along)
    assert "flat range" not in found  # one seed has no range


def test_rows_are_what_the_paper_defines(seeds: list[Run]) -> None:
    row = figures.sample_js_table(seeds[:1]).query("probe == 'digit' and checkpoint == 3").iloc[0]
    per_site = []
    for site in seeds[0].drift["site"].to_numpy():
        with seeds[0].recording(1) as anchor, seeds[0].recording(3) as current:
            sample = anchor.tokens("digit")["sample"]
            first, second = (sample_means(rec.gate(str(site), "digit"), sample, axis=-2) for rec in (anchor, current))
        per_site.append(js_divergence(first, second, base=np.e).mean())
    assert row["value"] == pytest.approx(np.mean(per_site), rel=1e-3)
    assert row["value"] <= row["router_js"] * np.log(2)


def test_a_gate_that_never_routed_is_drawn_hollow(seeds: list[Run]) -> None:
    found = traces(figures.sample_js_lines(seeds))
    background = THEMES["light"].background
    assert set(found["flat"].marker.color) == {background}
    assert background not in found["moelora"].marker.color
    np.testing.assert_allclose(found["flat"].y, 0, atol=1e-9)
    assert "near-uniform gates 100 %" in found["flat"].hovertext[0]
    rows = figures.sample_js_table(seeds)
    assert rows.loc[rows["method"] == "flat", "routed"].isna().all()
    assert not any("sites that route" in name for name in found)  # there is none


def test_sites_that_route_are_drawn_apart(seeds: list[Run]) -> None:
    run = open_run(seeds[0].path)
    drift = run.drift.copy(deep=True)
    drift["near_uniform"][:, :, 0] = True
    summary = run.summary.assign(near_uniform_share=drift["near_uniform"].mean("site") + 0.1)
    run._tables |= {"drift": drift, "summary": summary}
    found = traces(figures.sample_js_lines([run]))
    expected = [-float(drift["sample_js"].sel(checkpoint=3, probe=p)[1]) for p in ("digit", "colour")]
    np.testing.assert_allclose(found["moelora, sites that route"].y, expected)


def test_one_expert_has_no_line_and_a_note(seeds: list[Run], lone: Run, tmp_path: Path) -> None:
    single = open_run(make_run(tmp_path / "one", num_experts=1, method="seq", noise=False))
    figure = figures.sample_js_lines([seeds[0], single])
    assert not any(name.startswith("seq") for name in traces(figure))
    assert any(note.text == "seq: one expert, nothing to route" for note in figure.layout.annotations)
    assert figures.sample_js_table([single])["undefined"].str.contains("one expert").all()
    assert len(figures.sample_js_lines([lone]).data) == 0  # one task: never old
    with pytest.raises(ConfigError, match="No run was given"):
        figures.sample_js_lines([])


def test_histogram_orders_experts_by_their_use_when_learned(run: Run) -> None:
    frame = figures.routing_histogram_table(run, probe="digit", groups=2)
    assert list(dict.fromkeys(frame["checkpoint"])) == [1, 2, 3]
    assert list(dict.fromkeys(frame["group"])) == ["layer 0", "layer 1"]
    load = run.drift["load"].sel(probe="digit").transpose("checkpoint", "site", "expert").to_numpy()
    for group, members in (("layer 0", [0, 1]), ("layer 1", [2, 3])):
        for checkpoint in (1, 3):
            part = frame[(frame["group"] == group) & (frame["checkpoint"] == checkpoint)]
            by_hand = np.mean([[load[checkpoint, s, e] for e in np.argsort(-load[1, s])] for s in members], axis=0)
            np.testing.assert_allclose(part["share"], by_hand)
            np.testing.assert_allclose(part["anchor_share"], np.mean(-np.sort(-load[1, members]), axis=0))
            cells = run.drift.sel(probe="digit", checkpoint=checkpoint).isel(site=members)
            for name in ("marginal_js", "router_js", "gate_entropy"):
                np.testing.assert_allclose(part[name], float(cells[name].mean()))
            assert part["share"].sum() == pytest.approx(1)
    figure = figures.routing_histogram(run, probe="digit", groups=2)
    bars = traces(figure)
    last = frame[(frame["group"] == "layer 1") & (frame["checkpoint"] == 3)]
    np.testing.assert_allclose(bars["layer 1, checkpoint 3"].y, last["share"])
    np.testing.assert_allclose(bars["layer 1, when learned"].y, last["anchor_share"])
    notes = [note.text for note in figure.layout.annotations]
    assert sum(note.startswith("marginal_js") for note in notes) == 6
    assert f"router_js {last['router_js'].iloc[0]:.3f}" in notes[-1]


def test_histogram_of_gates_that_hardly_route_is_grey_and_says_so(uniform: Run) -> None:
    figure = figures.routing_histogram(uniform)
    assert all(
        "100 % of the gates nearly uniform" in n.text for n in figure.layout.annotations if "router_js" in n.text
    )
    assert {bar.marker.color for bar in figure.data} == {"rgba(91,101,118,0.75)", "rgba(0,0,0,0)"}


def test_histogram_refuses_what_is_not_there(run: Run) -> None:
    with pytest.raises(UnknownNameError, match="task 'digits'"):
        figures.routing_histogram(run, probe="digits")
    with pytest.raises(UnknownNameError, match="checkpoint from the anchor of country on '1'"):
        figures.routing_histogram(run, probe="country", checkpoints=[3, 1])
    chosen = figures.routing_histogram_table(run, probe="colour", checkpoints=[3])
    assert set(chosen["checkpoint"]) == {3}


def test_reroute_bars_show_the_last_checkpoint(rerouted: Run, seeds: list[Run]) -> None:
    rows = figures.reroute_table([rerouted, seeds[0]])
    assert rows["checkpoint"].tolist() == [2, 3]
    last = rows.iloc[1]
    assert (last["anchor"], last["current"], last["rerouted"], last["old_router"]) == (0.75, 0.25, 0.5, 0.0)
    assert last["rerouted_low"] <= 0.5 <= last["rerouted_high"]
    assert (last["task"], last["task_index"], last["steps"], last["samples"]) == ("digit", 1, 7, 4)
    figure = figures.reroute_bars([rerouted, seeds[2]])
    found = traces(figure)
    heights = {name: list(trace.y) for name, trace in found.items()}
    assert heights == {
        "when learned": [0.75],
        "now": [0.25],
        "now, routers retrained on it": [0.5],
        "old routers put back": [0.0],
    }
    assert found["now"].error_y.array[0] == pytest.approx(last["current_high"] - 0.25)
    assert "(not: flat)" in figure.layout.title.text


def test_reroute_bars_refuse_what_is_not_there(seeds: list[Run], rerouted: Run, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="driftlens reroute RUN"):
        figures.reroute_bars(seeds)
    with pytest.raises(UnknownNameError, match="measure of re-routing 'acc'"):
        figures.reroute_bars([rerouted], measure="acc")  # type: ignore[arg-type]
    broken = open_run(make_run(tmp_path / "broken", sites=1, noise=False))
    broken = with_results(broken, {"anchor": [1.0]}, "03-country", "01-digit", "digit")
    with pytest.raises(FormatError, match=r"01-digit.json is not a result of re-routing.*--fresh"):
        figures.reroute_bars([broken])


@pytest.mark.parametrize("theme", sorted(THEMES))
def test_figures_of_several_runs_draw_in_both_looks_and_show_names_literally(
    seeds: list[Run], rerouted: Run, hostile: Run, theme: str, tmp_path: Path
) -> None:
    nasty = open_run(make_run(tmp_path / "nasty", tasks=HOSTILE, sites=1, method="<img src=x>", noise=False))
    nasty = with_results(nasty, RESULT, nasty.checkpoints[-1].name, nasty.checkpoints[1].name, HOSTILE[0])
    for figure in (
        figures.sample_js_lines([*seeds, nasty], theme=theme),
        figures.reroute_bars([rerouted, nasty], theme=theme),
    ):
        assert figure.layout.template.layout.paper_bgcolor == THEMES[theme].background
        assert figure.layout.meta["reading_aid"].endswith(".")
        assert figures.definition_of(figure.layout.meta["metric"]).formula
        shown = texts(figure.to_dict()["data"]) + texts(
            {k: v for k, v in figure.to_dict()["layout"].items() if k != "template"}
        )
        assert not any("<img" in text for text in shown)
        assert any("&lt;img" in text for text in shown)
