"""The page in a real browser: clicks, selection, links, both looks; nothing leaves the machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from driftlens.analysis import open_run
from driftlens.figures import HIT_LAYER, THEMES, definition_of, depth_order
from tests.app.conftest import MAIN

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 120_000  # milliseconds until a busy machine has drawn the page
FIGURES = """() => Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(gd => [
  gd.layout.meta.figure + ':' + gd.layout.meta.metric,
  {traces: Object.fromEntries(gd.data.map(t => [t.name, {
      x: Array.from(t.x || []), y: Array.from(t.y || []), z: Array.from(t.z || [], row => Array.from(row)) }])),
   background: gd._fullLayout.paper_bgcolor, drawn: !!gd.querySelector('.main-svg')}]))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(runs: Path, browser: Browser) -> Iterator[str]:
    """Serve the page on a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(MAIN), "--server.port", str(port)]
    command += ["--server.fileWatcherType", "none", "--", str(runs)]
    log = runs / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=MAIN.parents[1],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        yield f"http://localhost:{port}/"
    finally:
        process.kill()  # it holds nothing that a clean end would save
        process.wait(60)


class Tab:
    """An opened page that remembers what went wrong in it."""

    def __init__(self, browser: Browser, address: str, *, look: str = "light", width: int = 1440) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=look)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.faults: list[str] = []
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._only_here)
        self.page.goto(address, timeout=PATIENCE)
        self.settle()

    def _only_here(self, request: Any) -> None:
        if urlsplit(request.url).hostname not in ("localhost", None):
            self.faults.append(f"asked {request.url}")

    def settle(self) -> None:
        """Wait until the script has run and every chart is drawn."""
        self.page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning] h1")
        self.page.wait_for_function(
            "() => !document.querySelector('[data-stale=true], [data-testid=stSkeleton]') && "
            "[...document.querySelectorAll('[data-testid=stPlotlyChart]')]"
            ".every(chart => chart.querySelector('.js-plotly-plot .main-svg'))"
        )

    def wait_for(self, figure: str) -> None:
        """Wait for a figure by ``NAME:METRIC``: on a busy machine a page may be quiet before its charts are mounted."""
        self.page.wait_for_function(f"name => name in ({FIGURES})()", arg=figure)
        self.settle()

    def choose(self, label: str, option: str, **address: str | None) -> None:
        """Pick an option and wait for the address that tells of it, which the script writes last."""
        box = self.page.get_by_test_id("stSelectbox").filter(has_text=label)
        box.scroll_into_view_if_needed()
        self.page.wait_for_timeout(400)  # the list closes when the page still scrolls under it
        box.locator("input").click()
        self.page.get_by_role("option", name=option, exact=True).click()
        for key, value in address.items():
            self.page.wait_for_function(
                "([key, value]) => new URLSearchParams(location.search).get(key) === value", arg=[key, value]
            )
        self.settle()

    def figures(self) -> dict[str, Any]:
        return dict(self.page.evaluate(FIGURES))

    def state(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.page.url).query).items()}

    def close(self) -> None:
        exceptions = self.page.get_by_test_id("stException").count()
        self.context.close()
        assert exceptions == 0
        assert self.faults == []


def test_clicking_through_the_page(browser: Browser, server: str, runs: Path) -> None:
    tab = Tab(browser, server)
    assert tab.state() == {}
    tab.choose("Run", "b-moe · moe-lora · seed 0", run="b-moe")
    tab.choose("Old task", "digit", task="digit")
    tab.choose("Quantity", "Router part", quantity="codrift_router")
    run = open_run(runs / "b-moe")
    order = depth_order(run)["site"].tolist()
    table = run.codrift["codrift_router"].sel(probe="digit", checkpoint=[1, 2, 3], site=order)
    heat = tab.figures()["codrift_map:codrift_router"]["traces"]["codrift_router"]
    np.testing.assert_allclose(np.array(heat["z"], dtype=float), table.transpose("site", "checkpoint"), atol=1e-12)

    site, checkpoint = order[1], 3
    spot = tab.page.evaluate(
        """([x, y]) => { const gd = [...document.querySelectorAll('.js-plotly-plot')]
             .find(g => g.layout.meta.figure === 'codrift_map');
           gd.scrollIntoView({block: 'center'});
           const box = gd.getBoundingClientRect(), l = gd._fullLayout, [h, v] = [l.xaxis, l.yaxis];
           return [box.left + h._offset + h.l2p(x) + 9, box.top + v._offset + v.l2p(y) + 3]; }""",
        [checkpoint, 1],
    )
    tab.page.mouse.move(*spot)
    tab.page.wait_for_selector(".hoverlayer .hovertext")
    assert site in "".join(tab.page.locator(".hovertext").all_text_contents())
    tab.page.mouse.click(*spot)
    tab.page.wait_for_url("**checkpoint=3**")
    tab.settle()
    assert tab.state() == {
        "run": "b-moe",
        "task": "digit",
        "quantity": "codrift_router",
        "site": site,
        "checkpoint": "3",
    }
    tab.page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length === 8")
    cell = tab.page.locator("[class*=st-key-cell_routing]").locator(".js-plotly-plot")
    shown = cell.evaluate("gd => gd.data.map(t => Array.from(t.y))")
    load = run.drift["load"].sel(probe="digit", site=site).transpose("expert", "checkpoint")
    np.testing.assert_allclose(np.array(shown, dtype=float), load, atol=1e-12)

    tab.page.get_by_role("button", name="Definition").first.click()
    tab.page.get_by_text(definition_of("accuracy").formula).wait_for()
    link = tab.page.url
    tab.close()

    other = Tab(browser, link)
    assert other.state() == {key: values[0] for key, values in parse_qs(urlsplit(link).query).items()}
    other.page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length === 8")
    outline = other.page.evaluate(
        """() => [...document.querySelectorAll('.js-plotly-plot')].find(g => g.layout.meta.figure === 'codrift_map')
             .layout.shapes.filter(s => s.name === 'selected').map(s => [s.x0 + s.x1, s.y0 + s.y1])"""
    )
    assert outline == [[6, 2]]
    assert HIT_LAYER in other.figures()["codrift_map:codrift_router"]["traces"]
    other.close()


@pytest.mark.parametrize(("look", "width"), [("dark", 390), ("light", 390)])
def test_two_runs_side_by_side_fit_a_phone_in_both_looks(browser: Browser, server: str, look: str, width: int) -> None:
    tab = Tab(browser, f"{server}?run=a-pass&beside=b-moe", look=look, width=width)
    red, green, blue = (int(THEMES[look].background[i : i + 2], 16) for i in (1, 3, 5))
    tab.wait_for("method_bars:AP")
    found = tab.figures()
    for figure in found.values():
        assert figure["drawn"]
        assert figure["background"].lower() in (THEMES[look].background, f"rgb({red}, {green}, {blue})")
    wider = tab.page.evaluate("() => document.querySelector('[data-testid=stMain]').scrollWidth - window.innerWidth")
    assert wider <= 0
    tab.close()


def test_a_run_with_faults_leaves_the_others_alone(browser: Browser, server: str) -> None:
    tab = Tab(browser, f"{server}?run=c-damaged&beside=e-broken")
    tab.wait_for("codrift_map:codrift_divergence")
    alerts = " ".join(tab.page.get_by_test_id("stAlert").all_inner_texts())
    assert "02-colour.h5" in alerts
    assert "e-broken cannot be read" in alerts
    tab.choose("Run", "a-pass · pass-moe · seed 0", run=None)
    tab.choose("Compare with", "– none –", beside=None)
    assert tab.page.get_by_test_id("stAlert").count() == 1  # the hint to choose a cell
    tab.page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length === 6")
    tab.close()
