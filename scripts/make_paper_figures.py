"""Draw the figures of PASs-MoE and SAME on recorded runs: ``python scripts/make_paper_figures.py RUN...``.

Writes PNG (below 150 kB) and SVG files, 1000 px wide, and a page with the numbers and their caveats. Several seeds of a
method become one line with its range. Runs are only read, except that each keeps its own analysis as usual; bars of
re-routing are drawn where ``driftlens reroute`` has been run. Needs the ``dev`` extra (playwright) and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from types import TracebackType

import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

from driftlens.analysis import Run, open_run
from driftlens.errors import NotFoundError
from driftlens.figures import (
    reroute_bars,
    reroute_table,
    routing_histogram,
    routing_histogram_table,
    sample_js_lines,
    sample_js_table,
)

ROOT = Path(__file__).resolve().parent.parent
WIDTH, EDGE, LIMIT = 1000, 10, 150_000
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


class Pictures:
    """A headless browser that turns figures into pictures; nothing is loaded from the network."""

    def __enter__(self) -> Pictures:
        chromium = next(
            (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
        )
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        self._page = self._browser.new_page(viewport={"width": WIDTH, "height": 800})
        self._page.set_content(
            f"<html><body style='margin:0 {EDGE}px;background:#fff'><div id='figure'></div></body></html>"
        )
        self._page.add_script_tag(content=get_plotlyjs())
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._browser.close()
        self._playwright.stop()

    def render(self, figure: go.Figure) -> tuple[bytes, str]:
        """Return ``figure`` as PNG and as SVG, `WIDTH` pixels wide and as high as it says."""
        self._page.evaluate(
            "async ([json, width]) => { const spec = JSON.parse(json); spec.layout.width = width;"
            " await Plotly.newPlot('figure', spec.data, spec.layout, {staticPlot: true}); await document.fonts.ready }",
            [figure.to_json(), WIDTH - 2 * EDGE],
        )
        png = self._page.screenshot(
            clip={"x": 0, "y": 0, "width": WIDTH, "height": figure.layout.height}, full_page=True
        )
        svg = self._page.evaluate(
            "async ([width, height]) => decodeURIComponent((await Plotly.toImage('figure', {format: 'svg', width,"
            " height})).replace(/^data:image\\/svg\\+xml,/, ''))",
            [WIDTH, figure.layout.height],
        )
        return squeeze(png), str(svg)


def squeeze(png: bytes) -> bytes:
    """Return the same picture in fewer bytes."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, "PNG", optimize=True)
    return out.getvalue()


def span(values: pd.Series[float], digits: int = 4) -> str:
    """Return the mean and the range of some numbers, ``"n/a"`` for none."""
    known = values.dropna()
    if not len(known):
        return "n/a"
    mean = f"{known.mean():.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ({known.min():.{digits}f} to {known.max():.{digits}f})"


def markdown(rows: list[list[str]]) -> list[str]:
    """Return a table; the first row is its head."""
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def flagged(runs: list[Run]) -> list[str]:
    """Count the cells (old task, checkpoint, site) whose gate is nearly uniform, by method."""
    rows = [["method", "runs", "near-uniform cells", "share", "by kind of site", "gate entropy", "specialisation"]]
    for method in dict.fromkeys(run.method for run in runs):
        chosen = [run for run in runs if run.method == method]
        cells = pd.concat([_old_cells(run) for run in chosen])
        frame = sample_js_table(chosen)
        context = [span(frame.groupby("run")[name].mean(), 3) for name in ("gate_entropy", "specialisation")]
        if cells.empty:
            rows.append([method, str(len(chosen)), "none: one expert", "", "", *context])
            continue
        kinds = cells.groupby("kind")["near_uniform"].mean()
        by_kind = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in kinds.items())
        count, share = f"{cells['near_uniform'].sum()} of {len(cells)}", f"{100 * cells['near_uniform'].mean():.0f} %"
        rows.append([method, str(len(chosen)), count, share, by_kind, *context])
    return markdown(rows)


def _old_cells(run: Run) -> pd.DataFrame:
    cells = run.drift[["near_uniform", "sample_js"]].to_dataframe().reset_index()
    return cells[(cells["anchor"] >= 0) & (cells["checkpoint"] > cells["anchor"]) & (cells["num_experts"] > 1)]


def drift_numbers(runs: list[Run]) -> list[str]:
    """Return the numbers of the left panel: the last checkpoint, by method and old task."""
    frame = sample_js_table(runs)
    last = frame["checkpoint"].max()
    frame = frame[(frame["checkpoint"] == last) & frame["undefined"].isna()]
    # Like for like: the kinds of sites at which every method routes, most of the time.
    cells = pd.concat([_old_cells(run).assign(method=run.method, run=run.name) for run in runs])
    idle = cells.groupby(["kind", "method"])["near_uniform"].mean().groupby("kind").max()
    kinds = idle.index[idle < 0.5].tolist()
    same = cells[(cells["checkpoint"] == last) & cells["kind"].isin(kinds)]
    alike = same.groupby(["method", "probe", "run"])["sample_js"].mean()
    where = f"all methods at {', '.join(kinds)}" if kinds else "no kind routes in all methods"
    rows = [
        ["method", "old task", "sample_js (nats)", "sites that route", where, "router_js (bits)", "near-uniform gates"]
    ]
    for (method, _, task), part in frame.groupby(["method", "probe_index", "probe"], sort=False):
        values = [span(part["value"]), span(part["routed"])]
        values += [span(alike.loc[method, task]) if kinds else "n/a", span(part["router_js"])]
        rows.append([method, task, *values, f"{100 * part['near_uniform_share'].mean():.0f} %"])
    said = ["Mean over old tasks and runs (nats):", ""]
    for method, part in frame.groupby("method", sort=False):
        values = f"{part['value'].mean():.4f} over all sites"
        values += f", {alike.loc[method].mean():.4f} at {', '.join(kinds)}" if kinds else ""
        said.append(f"- {method}: {values}")
    noise = f"The noise floor (the last checkpoint recorded twice) is {frame['noise_floor'].max():.1e} nats at most."
    return [*markdown(rows), "", *said, "", noise]


def histogram_numbers(runs: list[Run]) -> list[str]:
    """Return marginal and token-level divergence of the first task at the last checkpoint, by method and depth."""
    rows = [["method", "sites", "marginal_js (bits)", "router_js (bits)", "near-uniform gates"]]
    for method in dict.fromkeys(run.method for run in runs):
        tables = [routing_histogram_table(run) for run in runs if run.method == method]
        frame = pd.concat(tables).query("rank == 0")
        frame = frame[frame["checkpoint"] == frame["checkpoint"].max()]
        for group, part in frame.groupby("group", sort=False):
            uniform = f"{100 * part['near_uniform_share'].mean():.0f} %"
            rows.append([method, str(group), span(part["marginal_js"]), span(part["router_js"]), uniform])
    return markdown(rows)


def reroute_numbers(frame: pd.DataFrame) -> list[str]:
    """Return the bars of re-routing."""
    head = ["method", "runs", "old task", "when learned", "now", "routers retrained", "old routers put back"]
    rows = [head]
    frame = frame[frame["checkpoint"] == frame["checkpoint"].max()]
    names = ["anchor", "current", "rerouted", "old_router"]
    for (method, _, task), part in frame.groupby(["method", "task_index", "task"], sort=False):
        rows.append([method, str(len(part)), task, *(span(part[name], 3) for name in names)])
    said = []
    for method, part in frame.groupby("method", sort=False):
        mean = part[names].mean()
        rows.append([str(method), str(part["run"].nunique()), "mean", *(f"{mean[name]:.3f}" for name in names)])
        lost, retrained, swapped = mean["anchor"] - mean["current"], mean["rerouted"], mean["old_router"]
        said.append(
            f"- {method}: of {100 * lost:.0f} points lost per old task, retrained routers give back "
            f"{100 * (retrained - mean['current']):.0f}, the old routers {100 * (swapped - mean['current']):.0f}."
        )
    return [*markdown(rows), "", "In points of accuracy, mean over old tasks and runs:", "", *said]


INTRO = """# PASs-MoE's Figure 3 and SAME's Figure 1, on the built-in stream

Made by `scripts/make_paper_figures.py` from {count} runs
({listing}).
Numbers are means over seeds, with the range over seeds in brackets. The figures are `sample_js_lines`,
`routing_histogram` and `reroute_bars` of `driftlens.figures`, and draw any recorded run. Both papers show one seed,
other models and other data: what is reproduced is the form, not the height of a line.

## Which gates route at all

A gate that never routed cannot drift. A cell (old task, checkpoint, site) counts as nearly uniform where its normalised
gate entropy is above 0.99:
"""
FIGURE_3 = """## PASs-MoE, Figure 3: routing drift of old tasks by method

![Routing drift of old tasks]({images}/paper-pass-moe-figure-3.png)

Left, as in the paper: how far the gates of each old task moved between the checkpoint that learned it and the end of
the stream, negated. Gates are averaged over the tokens of a sample before the divergence (`sample_js`, nats). Right:
the mean of the tasks that are old at each checkpoint. Bands: range over seeds.

How to read it:

- **A near-uniform gate gives a flat zero.** Hollow marks are methods most of whose gates are nearly uniform: their line
  near 0 says that they hardly route, not that the routing of old tasks was kept. The dotted line beside it is the same
  mean over the sites that do route, and the table has it for all methods at the same kinds of sites.
- Averaging before the divergence can only lower it. `router_js` compares token by token (bits; times 0.69 for nats).
- An older task had more time to drift: lines that rise to the right show age, not tasks that are easier to keep.
- A method with one expert has nothing to route and no line.
"""
FIGURE_1 = """## SAME, Figure 1a-c: the histogram of the first task's routing

{images}

Pictures are of the first seed. Experts of each site are ordered by their use when the task was learned, since labels
mean nothing across sites; outline: as it was then. That order alone makes the outline fall to the right, and a little
of what moves back is chance.

- **Equal bars do not mean equal routing.** `marginal_js` compares the two histograms, `router_js` the gates of the same
  token, which can only be more: tokens that swap experts leave the bars where they were.
- Grey bars: most gates of the group are nearly uniform; bars at the level of chance (dotted) say nothing about drift.
"""
REROUTE = """## SAME, Figure 1d: only the routers trained again

![Old tasks re-routed]({images}/paper-same-figure-1d.png)

`driftlens reroute` freezes the experts of the last checkpoint, trains its routers on the old task's training data for
as many steps as the task once had, and scores the task's test samples.

- What comes back is what *some* router can still get out of these experts, not what the drift of the router had cost:
  a retrained router may do more than the old one ever did. The open mark is the exact question, without training: the
  task's own old routers before the current experts (the swap of `driftlens attribute`).
- Methods whose gates follow from A have no router that could be trained apart from the experts, and methods with one
  expert have none at all: they are refused, and left out here.
- A short training is a lower bound, and an accuracy on {samples} test samples is known to about {error:.0%} either way.
"""


def main() -> None:
    """Draw the pictures and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "paper_figures.md")
    options = parser.parse_args()
    runs = sorted((open_run(path) for path in options.runs), key=lambda run: (run.method, run.seed or 0))
    routed = [run for run in runs if int(run.drift["num_experts"].max()) > 1]
    methods = list(dict.fromkeys(run.method for run in routed))
    pictures = {"paper-pass-moe-figure-3": sample_js_lines(runs)}
    for method in methods:
        first = next(run for run in routed if run.method == method)
        pictures[f"paper-same-figure-1-{method}"] = routing_histogram(first)
    try:
        bars: pd.DataFrame | None = reroute_table(runs)
        pictures["paper-same-figure-1d"] = reroute_bars(runs)
    except NotFoundError as missing:
        print(missing)
        bars = None
    options.images.mkdir(parents=True, exist_ok=True)
    with Pictures() as camera:
        for name, figure in pictures.items():
            png, svg = camera.render(figure)
            if len(png) > LIMIT:
                raise SystemExit(f"{name}.png has {len(png):,} bytes, more than {LIMIT:,}: draw less.")
            (options.images / f"{name}.png").write_bytes(png)
            (options.images / f"{name}.svg").write_text(svg)
            print(f"{name}.png {len(png):,} bytes, .svg {len(svg):,} bytes")
    listing = ", ".join(
        f"{sum(run.method == method for run in runs)} {method}" for method in dict.fromkeys(r.method for r in runs)
    )
    folder = options.images.name
    shown = "\n\n".join(f"**{m}**\n\n![{m}]({folder}/paper-same-figure-1-{m}.png)" for m in methods)
    text = [INTRO.format(count=len(runs), listing=listing), *flagged(runs), "", FIGURE_3.format(images=folder)]
    text += [*drift_numbers(runs), "", FIGURE_1.format(images=shown), *histogram_numbers(routed), ""]
    if bars is not None:
        samples = int(bars["samples"].min())
        text += [
            REROUTE.format(images=folder, samples=samples, error=1.96 * 0.5 / samples**0.5),
            *reroute_numbers(bars),
        ]
    options.page.write_text("\n".join(text).rstrip() + "\n")
    print(options.page)


if __name__ == "__main__":
    main()
