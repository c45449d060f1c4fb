"""State, words and errors of the page, without a browser."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from driftlens.analysis import open_run
from tests.app.conftest import MAIN


@pytest.fixture
def page(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that opens the page on ``runs`` with a given address."""

    def open_page(folder: Path = runs, **address: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", [str(MAIN), str(folder)])
        app = AppTest.from_file(str(MAIN), default_timeout=60)
        for key, value in address.items():
            app.query_params[key] = value
        return app.run()

    return open_page


def figures_of(app: AppTest) -> dict[str, dict[str, Any]]:
    """Return the figures on the page by the name in their meta data."""
    found = {}
    for element in app.get("plotly_chart"):
        spec = json.loads(element.proto.spec)
        found[spec["layout"]["meta"]["figure"] + ":" + spec["layout"]["meta"]["metric"]] = spec
    return found


def words(app: AppTest) -> str:
    kinds = (app.title, app.header, app.markdown, app.caption, app.error, app.warning, app.info)
    return "\n".join(element.value for kind in kinds for element in kind)


def address(app: AppTest) -> dict[str, str]:
    return {key: value[0] if isinstance(value, list) else value for key, value in dict(app.query_params).items()}


def test_the_first_run_opens_with_all_its_figures(page: Any, runs: Path) -> None:
    app = page()
    assert not app.exception
    assert not app.error
    assert app.selectbox(key="run").value == "a-pass"
    assert set(figures_of(app)) == {
        "accuracy_matrix:accuracy",
        "accuracy_curves:accuracy",
        "codrift_map:codrift_divergence",
        "routing_multiples:load",
        "drift_lines:router_js",
        "drift_lines:codrift_divergence",
    }
    assert address(app) == {}
    run = open_run(runs / "a-pass")
    shown = {metric.label.replace("\\", ""): metric.value for metric in app.metric}
    assert shown["Final accuracy"] == f"{100 * float(run.stream['AP'].sel(scorer='strict')):.1f} %"
    last = run.trend.isel(checkpoint=-1)
    assert shown["Routing drift"] == f"{float(last['router_js']):.3f}"
    assert shown["Co-drift divergence"] == f"{float(last['codrift_divergence']):.3f}"
    assert f"[{float(last['router_js_low']):.3f}, {float(last['router_js_high']):.3f}]" in words(app).replace("\\", "")


def test_figures_hold_the_values_of_the_tables(page: Any, runs: Path) -> None:
    app = page(run="b-moe", task="digit", quantity="codrift_experts")
    run = open_run(runs / "b-moe")
    heat = figures_of(app)["codrift_map:codrift_experts"]["data"][0]
    table = run.codrift["codrift_experts"].sel(probe="digit", checkpoint=[1, 2, 3]).transpose("site", "checkpoint")
    np.testing.assert_allclose(np.array(heat["z"], dtype=float), table, rtol=0, atol=1e-15)


def test_an_address_opens_its_view_and_what_is_chosen_goes_to_the_address(page: Any) -> None:
    view = {
        "run": "b-moe",
        "beside": "a-pass",
        "scorer": "nll",
        "task": "colour",
        "quantity": "router_js",
        "site": "model.layers.0.mlp.down_proj",
        "checkpoint": "3",
        "at": "model.layers.0.mlp.up_proj",
    }
    app = page(**view)
    assert not app.exception
    assert not app.error
    assert address(app) == view
    assert app.selectbox(key="task").value == "colour"
    assert len(app.get("plotly_chart")) == 17
    app.selectbox(key="task").set_value("digit").run()
    app.selectbox(key="beside").set_value("").run()
    assert address(app) == {key: value for key, value in view.items() if key != "beside"} | {"task": "digit"}


def test_an_address_with_nonsense_falls_back(page: Any) -> None:
    app = page(
        run="../../etc",
        beside="nowhere",
        scorer="x",
        task="<b>",
        quantity="q",
        site="s",
        checkpoint="99",
        at="s",
        other="1",
    )
    assert not app.exception
    assert not app.error
    assert app.selectbox(key="run").value == "a-pass"
    assert address(app) == {"other": "1"}


def test_a_chosen_cell_shows_everything_measured_there(page: Any, runs: Path) -> None:
    app = page(task="digit", site="model.layers.1.mlp.up_proj", checkpoint="2")
    assert not app.exception
    table = app.dataframe[0].value
    run = open_run(runs / "a-pass")
    cell = run.codrift.sel(probe="digit", site="model.layers.1.mlp.up_proj", checkpoint=2)
    row = table[table["quantity"] == "Co-drift divergence"].iloc[0]
    assert row["value [95 %]"].startswith(f"{float(cell['codrift_divergence']):.3f} [")
    assert row["chance"] == "0.500"
    assert "routing_flow:load" in figures_of(app)


def test_a_damaged_recording_is_named_and_the_rest_is_shown(page: Any) -> None:
    app = page(run="c-damaged")
    assert not app.exception
    assert not app.error
    [warning] = [element.value.replace("\\", "") for element in app.warning]
    assert "02-colour.h5" in warning
    assert "3 of 4 checkpoints recorded" in words(app).replace("\\", "")
    assert "codrift_map:codrift_divergence" in figures_of(app)
    colour = page(run="c-damaged", task="colour")
    assert not colour.exception
    notes = figures_of(colour)["codrift_map:codrift_divergence"]["layout"]["annotations"]
    assert "no recorded anchor: not learned yet, or left out" in [note["text"] for note in notes]


def test_a_run_without_recordings_still_shows_its_scores(page: Any) -> None:
    app = page(run="d-unrecorded")
    assert not app.exception
    [error] = [element.value.replace("\\", "") for element in app.error]
    assert "No drift to show for d-unrecorded" in error
    assert "driftlens record --run" in error
    assert set(figures_of(app)) == {"accuracy_matrix:accuracy", "accuracy_curves:accuracy"}


def test_a_broken_run_says_so_in_its_place_and_its_neighbour_is_shown(page: Any) -> None:
    app = page(run="e-broken", beside="a-pass")
    assert not app.exception
    [error] = [element.value.replace("\\", "") for element in app.error]
    assert "e-broken cannot be read" in error
    assert "manifest.json" in error
    assert "codrift_map:codrift_divergence" in figures_of(app)


def test_a_deleted_recording_is_noticed_under_the_page(page: Any, tmp_path: Path) -> None:
    from tests.analysis.synthetic import make_run

    make_run(tmp_path / "one", sites=2, samples=3, tokens_per_sample=3)
    app = page(tmp_path)
    assert not app.warning
    (tmp_path / "one" / "recordings" / "03-country.h5").unlink()
    app.run()
    assert not app.exception
    assert "03-country.h5" in app.warning[0].value.replace("\\", "")


def test_an_empty_or_missing_folder_says_what_to_do(page: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        app = page(folder)
        assert not app.exception
        assert folder.name in app.info[0].value.replace("\\", "")
        assert "driftlens demo" in app.code[0].value


def test_names_from_files_are_shown_letter_by_letter(page: Any, tmp_path: Path) -> None:
    from app.parts import safe
    from tests.analysis.synthetic import make_run

    make_run(tmp_path / "x", tasks=("<b>[a](b)", "*red* $z$"), sites=2, samples=3, tokens_per_sample=3)
    app = page(tmp_path, task="<b>[a](b)")
    assert not app.exception
    assert safe("<b>[a](b)") == r"\<b\>\[a\]\(b\)"
    line = next(element.value for element in app.markdown if "on 2 tasks" in element.value)
    assert r"\<b\>\[a\]\(b\)" in line
    assert r"\*red\* \$z\$" in line
