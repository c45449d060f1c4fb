"""Every value on a figure is the value of the analysis table it names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go
import pytest

from driftlens import figures
from driftlens.analysis import Run
from driftlens.errors import UnknownNameError

SITE = "model.layers.1.mlp.down_proj"


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data}


@pytest.mark.parametrize("scorer", list(figures.SCORERS))
def test_accuracy_matrix_shows_the_scores(run: Run, scorer: str) -> None:
    figure = figures.accuracy_matrix(run, scorer=scorer)
    expected = run.scores[scorer].transpose("task", "checkpoint")
    learned, before = (np.array(traces(figure)[name].z, dtype=float) for name in ("learned", "not learned yet"))
    trained = run.scores["task_index"].to_numpy()[:, None] <= run.scores["checkpoint"].to_numpy()[None]
    np.testing.assert_array_equal(np.where(trained, learned, before), expected.to_numpy())
    assert np.isnan(learned[~trained]).all()
    assert np.isnan(before[trained]).all()


def test_accuracy_matrix_prints_values_outlines_the_diagonal_and_greys_what_is_untrained(run: Run) -> None:
    figure = figures.accuracy_matrix(run)
    cells = traces(figure)
    words = cells["learned: values"]
    assert (words.x[0], words.y[0]) == (1, 1)
    assert words.text[0] == f"{100 * float(run.scores['strict'].sel(checkpoint=1, task='digit')):.0f}"
    assert len(words.text) == 3 + 2 + 1
    assert len(cells["not learned yet: values"].text) == 12 - 6
    outlined = {((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2) for s in figure.layout.shapes}
    assert outlined == {(1, 1), (2, 2), (3, 3)}
    assert cells["learned"].colorscale != cells["not learned yet"].colorscale
    assert (cells["learned"].zmin, cells["learned"].zmax) == (0, 1)


def test_accuracy_curves_show_the_scores_and_the_mean_of_learned_tasks(run: Run) -> None:
    lines = traces(figures.accuracy_curves(run))
    np.testing.assert_array_equal(lines["colour"].y, run.scores["strict"].sel(task="colour", checkpoint=[2, 3]))
    np.testing.assert_array_equal(lines["colour before"].x, [0, 1, 2])
    matrix = run.scores["strict"].to_numpy()
    np.testing.assert_allclose(
        lines["mean of learned tasks"].y, [matrix[t, :t].mean() for t in (1, 2, 3)], rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("metric", list(figures.MAP_METRICS))
def test_map_of_one_task_shows_the_table_from_the_anchor_on(run: Run, metric: str) -> None:
    heat = figures.codrift_map(run, metric=metric, probe="digit").data[0]
    table = (run.drift if metric == "router_js" else run.codrift)[metric].sel(probe="digit", checkpoint=[1, 2, 3])
    order = figures.depth_order(run)["site"].tolist()
    np.testing.assert_array_equal(np.array(heat.z, dtype=float), table.sel(site=order).transpose("site", "checkpoint"))
    assert list(heat.x) == [1, 2, 3]


def test_map_of_the_mean_averages_the_tasks_that_are_old(run: Run) -> None:
    heat = figures.codrift_map(run).data[0]
    order = figures.depth_order(run)["site"].tolist()
    for column, checkpoint in enumerate(heat.x):
        old = ["digit", "colour", "country"][: checkpoint - 1]
        loop = [
            np.mean([run.codrift["codrift_divergence"].sel(probe=p, checkpoint=checkpoint, site=s) for p in old])
            for s in order
        ]
        np.testing.assert_allclose(np.array(heat.z, dtype=float)[:, column], loop, rtol=0, atol=1e-15)
    assert list(heat.x) == [2, 3]


def test_signed_map_is_symmetric_around_zero_and_shares_a_range(run: Run) -> None:
    most = figures.map_range([run], "codrift_cross", "digit")
    heat = figures.codrift_map(run, metric="codrift_cross", probe="digit").data[0]
    assert heat.zmin == -heat.zmax == -most == -np.abs(np.array(heat.z, dtype=float)).max()
    assert figures.codrift_map(run, probe="digit", most=0.75).data[0].zmax == 0.75


def test_map_cells_can_be_selected_and_say_everything_on_hover(run: Run) -> None:
    figure = figures.codrift_map(run, probe="digit", selected=(SITE, 2))
    hits = traces(figure)[figures.HIT_LAYER]
    assert hits.marker.opacity == hits.selected.marker.opacity == hits.unselected.marker.opacity == 0
    assert len(hits.x) == 4 * 3
    row = figures.depth_order(run)["site"].tolist().index(SITE)
    place = [list(data) for data in hits.customdata].index([row, 2])
    cell = run.codrift.sel(probe="digit", site=SITE, checkpoint=2)
    hover = hits.hovertext[place]
    assert SITE in hover
    assert figures.number(float(cell["codrift_divergence"])) in hover
    low, high = (figures.number(float(cell[f"codrift_divergence_{end}"])) for end in ("low", "high"))
    assert f"[{low}, {high}]" in hover
    assert "noise floor" in hover
    assert f"specialisation {figures.number(float(run.drift['specialisation'].sel(checkpoint=2, site=SITE)))}" in hover
    outline = [s for s in figure.layout.shapes if s.name == "selected"]
    assert [(s.x0 + s.x1, s.y0 + s.y1) for s in outline] == [(4, 2 * row)]


def test_lines_show_the_summary_with_its_interval(run: Run) -> None:
    figure = figures.drift_lines(run, metric="router_js")
    lines = traces(figure)
    part = run.summary.sel(probe="digit", checkpoint=[1, 2, 3])
    np.testing.assert_array_equal(lines["digit"].y, part["router_js"])
    np.testing.assert_array_equal(lines["digit interval"].y[:3], part["router_js_high"])
    np.testing.assert_array_equal(lines["digit interval"].y[3:][::-1], part["router_js_low"])
    assert lines["noise floor"].y[0] == float(run.summary["router_js_noise"].max())


def test_lines_draw_chance_or_say_where_it_lies(run: Run) -> None:
    near = figures.drift_lines(run, metric="codrift_divergence", most=0.8)
    assert [shape.y0 for shape in near.layout.shapes] == [0.5]
    far = figures.drift_lines(run, metric="codrift_divergence", most=0.2)
    assert not far.layout.shapes
    assert "chance lies above: 0.50" in [note.text for note in far.layout.annotations]
    switch = traces(figures.drift_lines(run, metric="top1_switch", most=1.0))
    chance = run.summary["top1_switch_chance"].sel(probe="digit", checkpoint=[1, 2, 3])
    np.testing.assert_array_equal(switch["digit chance"].y, chance)


def test_routing_of_a_site_is_its_load_and_the_mean_sums_to_one(run: Run) -> None:
    areas = traces(figures.routing_flow(run, probe="colour", site=SITE))
    load = run.drift["load"].sel(probe="colour", site=SITE)
    for expert in range(4):
        np.testing.assert_array_equal(areas[f"expert {expert}"].y, load.sel(expert=expert))
    whole = figures.routing_table(run).groupby(["probe", "checkpoint"])["share"].sum()
    np.testing.assert_allclose(whole, 1.0, atol=1e-6)
    multiples = figures.routing_multiples(run)
    first = run.drift["load"].sel(probe="digit", expert=0).mean("site")
    np.testing.assert_allclose(multiples.data[0].y, first, rtol=0, atol=1e-12)


def test_cell_table_holds_one_value_per_old_task_and_quantity(run: Run) -> None:
    rows = figures.cell_table(run, 3, SITE)
    assert list(dict.fromkeys(rows["probe"])) == ["digit", "colour"]
    for row in rows.to_dict("records"):
        table = run.drift if row["metric"] in run.drift else run.codrift
        expected = float(table[row["metric"]].sel(probe=row["probe"], checkpoint=3, site=SITE))
        assert row["value"] == expected or (np.isnan(row["value"]) and np.isnan(expected) and row["undefined"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: figures.codrift_map(run, metric="router_jz"), r"map quantity 'router_jz'.*'router_js'"),
        (lambda run: figures.codrift_map(run, probe="digits"), r"task 'digits'.*'digit'"),
        (lambda run: figures.drift_lines(run, metric="impakt"), r"drift quantity 'impakt'.*'impact'"),
        (lambda run: figures.routing_flow(run, site="model.layers.9.mlp.up_proj"), r"Unknown site"),
        (lambda run: figures.accuracy_matrix(run, scorer="strickt"), r"scorer 'strickt'.*'strict'"),
        (lambda run: figures.accuracy_curves(run, theme="drak"), r"figure theme 'drak'.*'dark'"),
        (lambda run: figures.cell_table(run, 9, SITE), r"checkpoint '9'.*Known: 0, 1, 2, 3"),
    ],
)
def test_wrong_names_are_answered_with_the_right_ones(run: Run, call: Callable[[Run], object], words: str) -> None:
    with pytest.raises(UnknownNameError, match=words):
        call(run)
