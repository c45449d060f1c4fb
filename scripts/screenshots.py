"""Take the README's pictures of the dashboard: ``python scripts/screenshots.py [RUNS_FOLDER] [--out docs/images]``.

Starts the page on the runs (default sample_runs/), opens it in a headless Chromium and writes PNG files below 300 kB.
Needs the ``dev`` extra (playwright) and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300_000
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-quic", "--disable-component-update", "--disable-sync"]
PATIENCE = 300_000


@dataclass(frozen=True)
class Picture:
    """One picture: file name, address, look, size of the window, and what to show at its top ("" = start of page)."""

    name: str
    view: str
    look: str
    width: int
    height: int
    top: str = ""


PICTURES = (
    Picture("overview-light", "?run={first}", "light", 1440, 1060),
    Picture("overview-dark", "?run={first}", "dark", 1440, 1060),
    Picture("codrift-map", "?run={first}&task={task}&site={site}&checkpoint={last}", "light", 1440, 1000, "#drifted"),
    Picture("side-by-side", "?run={first}&beside={second}", "light", 1440, 1180, "#drifted"),
    Picture("phone-dark", "?run={first}", "dark", 390, 844),
)


@contextmanager
def serving(runs: Path) -> Iterator[str]:
    """Serve the page on a free port of this machine; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app" / "main.py"), "--server.port", str(port)]
    process = subprocess.Popen([*command, "--server.fileWatcherType", "none", "--", str(runs)], cwd=ROOT)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"The page ended with exit code {process.returncode} before it could be opened.")
            try:
                urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        yield f"http://localhost:{port}/"
    finally:
        process.kill()
        process.wait()


def open_page(browser: Browser, address: str, picture: Picture) -> Page:
    """Open ``address`` in the picture's look and size and wait until everything is drawn."""
    context = browser.new_context(
        viewport={"width": picture.width, "height": picture.height}, color_scheme=picture.look
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address, timeout=PATIENCE)
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning] h1")
    page.wait_for_function(
        "() => { const charts = [...document.querySelectorAll('[data-testid=stPlotlyChart]')];"
        " return charts.length > 1 && charts.every(chart => chart.querySelector('.js-plotly-plot .main-svg')); }"
    )
    page.wait_for_timeout(1500)
    if picture.top:
        page.evaluate("name => document.querySelector(name).scrollIntoView({block: 'start'})", picture.top)
        page.wait_for_timeout(500)
    return page


def squeeze(png: bytes) -> bytes:
    """Return the same picture in fewer bytes."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def places(runs: Path) -> dict[str, str]:
    """Return what the addresses name: two runs, and the cell where the first task drifted most."""
    sys.path.insert(0, str(ROOT))
    from driftlens.analysis import list_runs, open_run
    from driftlens.figures import codrift_table

    # The most telling method first, if it is there.
    found = sorted(list_runs(runs), key=lambda entry: (entry.method != "pass-moe", entry.name))
    names = [entry.path.relative_to(runs).as_posix() for entry in found]
    if not names:
        raise SystemExit(f"{runs} holds no run; make the sample runs first.")
    run = open_run(found[0].path)
    task = run.tasks[0]
    cells = codrift_table(run, "codrift_divergence", task)
    last = cells[cells["checkpoint"] == cells["checkpoint"].max()]
    site = last.loc[last["value"].idxmax(), "site"]
    return {
        "first": names[0],
        "second": names[1] if len(names) > 1 else "",
        "task": task,
        "site": str(site),
        "last": str(cells["checkpoint"].max()),
    }


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=Path, default=ROOT / "sample_runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    chromium = next(
        (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
    )
    names = places(options.runs)
    options.out.mkdir(parents=True, exist_ok=True)
    with serving(options.runs.resolve()) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        for picture in PICTURES:
            page = open_page(browser, address + picture.view.format(**names), picture)
            png = page.screenshot()
            page.context.close()
            if len(png) > LIMIT:
                raise SystemExit(
                    f"{picture.name}.png has {len(png):,} bytes, more than {LIMIT:,}: make its window smaller."
                )
            (options.out / f"{picture.name}.png").write_bytes(png)
            print(f"{options.out / picture.name}.png  {len(png):,} bytes")
        browser.close()


if __name__ == "__main__":
    main()
