"""What is undefined, near uniform, tiny or hostile looks like it and harms nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from driftlens import figures
from driftlens.analysis import Run
from driftlens.figures.theme import (
    THEMES,
    ink_on,
    method_colour,
    ramp_colour,
    relative_luminance,
    task_style,
    theme_of,
)
from driftlens.metrics.undefined import Reason
from tests.figures.conftest import HOSTILE

ON_RUNS = [name for name in figures.FIGURES if figures.FIGURES.get(name).subject == "run"]


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data}


def test_undefined_cells_are_marked_and_not_zero(run: Run, changed: Callable[..., Any]) -> None:
    codrift = run.codrift.copy(deep=True)
    where = {"probe": 0, "checkpoint": 2, "site": 1}
    codrift["codrift_divergence"][where] = np.nan
    codrift["codrift_divergence_reason"][where] = int(Reason.NO_OUTPUT)
    figure = figures.codrift_map(changed(run, codrift=codrift), probe="digit")
    site = str(run.codrift["site"].to_numpy()[1])
    row = figures.depth_order(run)["site"].tolist().index(site)
    marks = traces(figure)["undefined"]
    assert (list(marks.x), list(marks.y)) == ([2], [row])
    z = np.array(figure.data[0].z, dtype=float)
    assert np.isnan(z[row, 1])
    assert np.isnan(z).sum() == 1
    hits = traces(figure)[figures.HIT_LAYER]
    hover = hits.hovertext[[list(data) for data in hits.customdata].index([row, 2])]
    assert "undefined: the experts give no output at either checkpoint (B = 0)" in hover
    mean = figures.codrift_table(changed(run, codrift=codrift))
    cell = mean[(mean["site"] == site) & (mean["checkpoint"] == 2)].iloc[0]
    assert np.isnan(cell["value"])
    assert cell["undefined"] == Reason.NO_OUTPUT.text
    assert cell["old_tasks"] == 0


def test_near_uniform_cells_are_struck_through(run: Run, uniform: Run) -> None:
    struck = traces(figures.codrift_map(uniform, probe="digit"))["gate nearly uniform"]
    assert len(struck.x) == 2 * 3
    hits = traces(figures.codrift_map(uniform))[figures.HIT_LAYER]
    assert all("it never routed" in text for text in hits.hovertext)
    assert figures.codrift_table(run)["near_uniform"].sum() == run.drift["near_uniform"].to_numpy().sum() == 0


@pytest.mark.parametrize("theme", sorted(THEMES))
@pytest.mark.parametrize("name", ON_RUNS)
def test_every_figure_draws_in_both_looks_even_for_one_task_and_one_expert(
    run: Run, lone: Run, name: str, theme: str
) -> None:
    for subject in (run, lone):
        figure = figures.FIGURES.get(name).draw(subject, theme=theme)
        look = THEMES[theme]
        assert figure.layout.template.layout.paper_bgcolor == look.background
        assert figure.layout.title.text
        assert figure.layout.meta["reading_aid"].endswith(".")
        assert figures.definition_of(figure.layout.meta["metric"]).formula
        assert isinstance(figures.FIGURES.get(name).rows(subject), pd.DataFrame)
        titled = [axis.title.text for axis in (*figure.select_xaxes(), *figure.select_yaxes()) if axis.title.text]
        assert titled


def test_comparison_bars_draw_the_frame_in_both_looks() -> None:
    frame = pd.DataFrame(
        {
            "run": ["a", "b", "<c>"],
            "method": ["pass-moe", "moe-lora", "moe-lora"],
            "AP": [0.7, 0.5, 0.6],
            "BWT_T": [-0.1, -0.3, np.nan],
            "router_js": [0.1, 0.2, 0.3],
            "router_js_low": [0.05, 0.15, 0.25],
            "router_js_high": [0.15, 0.25, 0.35],
            "codrift_divergence": [0.1, 0.2, 0.3],
        }
    )
    figure = figures.method_bars(frame)
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert [bar.x[0] for bar in bars[:2]] == [0.7, pytest.approx(0.55)]
    dots = [trace for trace in figure.data if trace.name == "moe-lora runs"]
    np.testing.assert_allclose(dots[2].error_x.array, [0.05, 0.05])
    assert "&lt;c&gt;" in dots[0].hovertext[1]
    assert bars[0].marker.color == method_colour(theme_of("light"), "pass-moe")
    assert figures.method_bars(frame, theme="dark").layout.template.layout.paper_bgcolor == THEMES["dark"].background


def texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for part in value.values() for text in texts(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts(part)]
    return []


@pytest.mark.parametrize("name", ON_RUNS)
def test_names_from_files_cannot_become_markup(hostile: Run, name: str) -> None:
    options = {"probe": HOSTILE[0]} if name in ("codrift_map", "routing_flow") else {}
    figure = figures.FIGURES.get(name).draw(hostile, **options)
    found = texts(figure.to_dict()["data"]) + texts(
        {k: v for k, v in figure.to_dict()["layout"].items() if k != "template"}
    )
    for text in found:
        assert "<img" not in text
        assert "<b>bold" not in text
        assert "%{x}" not in text
        assert "$a$" not in text
    assert any("&lt;b&gt;bold" in text for text in found)


def test_plain_text_survives_and_long_names_are_cut() -> None:
    assert figures.plain("digit 7") == "digit 7"
    assert figures.plain("a<b>&\x00\n") == "a&lt;b&gt;&amp;  "
    assert figures.plain("x" * 50, 10) == "x" * 9 + "…"
    assert [figures.number(v) for v in (0.12345, 0.0, 1e-8, -0.5, float("nan"))] == [
        "0.123",
        "0.000",
        "1.0e-08",
        "-0.500",
        "undefined",
    ]


def test_csv_holds_the_rows_and_no_formula(hostile: Run) -> None:
    rows = figures.accuracy_table(hostile).assign(task=["=cmd()", "@x", "+1", "-1", "\t=1", "fine"] * 2)
    text = figures.csv_text(rows)
    back = pd.read_csv(io.StringIO(text))
    assert list(back["task"][:6]) == ["'=cmd()", "'@x", "'+1", "'-1", "'\t=1", "fine"]
    np.testing.assert_allclose(back["value"], rows["value"])
    assert len(back) == len(rows)


@pytest.mark.parametrize("theme", sorted(THEMES))
def test_ramps_are_monotone_in_lightness_and_palettes_distinct(theme: str) -> None:
    look = THEMES[theme]
    for ramp in (look.scores, look.unlearned, look.drift):
        steps = np.diff([relative_luminance(colour) for colour in ramp])
        assert (steps < 0).all() or (steps > 0).all()
    half = len(look.signed) // 2
    for arm in (look.signed[: half + 1], look.signed[half:]):
        steps = np.diff([relative_luminance(colour) for colour in arm])
        assert (steps < 0).all() or (steps > 0).all()
    styles = {task_style(look, position) for position in range(45)}
    assert len(styles) == 45
    methods = ("pass-moe", "moe-lora", "moe-lora-topk", "seq-lora", "theirs", "other")
    assert len({method_colour(look, method, methods) for method in methods}) == 6


def test_words_on_cells_have_contrast() -> None:
    for look in THEMES.values():
        for ramp in (look.scores, look.unlearned, look.drift):
            for share in np.linspace(0, 1, 41):
                cell = relative_luminance(ramp_colour(ramp, float(share)))
                ink = relative_luminance(ink_on(ramp_colour(ramp, float(share))))
                assert (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05) >= 4.2
    assert ramp_colour(("#000000", "#ffffff"), 0.5) == "#808080"
    assert ramp_colour(("#000000", "#ff0000", "#ffffff"), 2.0) == "#ffffff"


def test_a_run_can_be_named_under_the_title(hostile: Run) -> None:
    plain, named = (figures.accuracy_matrix(hostile) for _ in range(2))
    figures.name_run(named, "<i>r")
    assert "&lt;i&gt;r" in named.layout.title.text
    assert named.layout.height - named.layout.margin.t == plain.layout.height - plain.layout.margin.t


def test_unknown_definition_names_the_nearest() -> None:
    with pytest.raises(figures_error(), match=r"measure 'router_jz'.*'router_js'"):
        figures.definition_of("router_jz")


def figures_error() -> type[Exception]:
    from driftlens.errors import UnknownNameError

    return UnknownNameError
