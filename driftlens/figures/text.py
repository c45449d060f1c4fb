"""Words on figures: names from files made harmless, numbers made readable, titles that fit a phone.

Plotly draws every label as a small HTML dialect and swaps ``%{...}`` in hover templates, so text that comes from a file
(task, site and method names) passes through `plain` before it touches a figure.
"""

from __future__ import annotations

import html
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from driftlens.figures.theme import Theme, template

__all__ = ["finish", "interval", "name_run", "number", "percent", "plain", "short_site", "ticks"]

_TITLE_WIDTH, _LINE = 46, 20


def plain(name: object, limit: int = 36) -> str:
    """Return ``name`` as text that Plotly shows literally: escaped, without control characters, cut to ``limit``."""
    printable = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in str(name))
    if len(printable) > limit:
        printable = printable[: limit - 1].rstrip() + "…"
    # `$` would start a formula where MathJax is loaded; a numeric entity is shown as the sign itself.
    return html.escape(printable, quote=False).replace("$", "&#36;").replace("%{", "%&#123;")


def short_site(name: str, layer: int, kind: str) -> str:
    """Return a short escaped label of a site, for example ``L20 down_proj``; the name itself if it has no layer."""
    return plain(f"L{layer} {kind}", 24) if layer >= 0 else plain(name, 24)


def number(value: float, digits: int = 3) -> str:
    """Return ``value`` for people: fixed notation down to 0.001, else two digits; ``"undefined"`` for NaN."""
    if math.isnan(value):
        return "undefined"
    if value == 0 or abs(value) >= 10**-digits:
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def percent(value: float) -> str:
    """Return a share (0..1) as whole per cent; ``"undefined"`` for NaN."""
    return "undefined" if math.isnan(value) else f"{100 * value:.0f} %"


def interval(low: float, high: float) -> str:
    """Return ``"[low, high]"`` for people, or an empty string when there is no interval."""
    return "" if math.isnan(low) or math.isnan(high) else f"[{number(low)}, {number(high)}]"


def ticks(values: Sequence[float], labels: Sequence[str], most: int = 40) -> dict[str, Any]:
    """Return axis settings that put escaped ``labels`` at ``values``, thinned to at most ``most`` labels."""
    step = max(1, math.ceil(len(values) / most))
    return {"tickmode": "array", "tickvals": list(values)[::step], "ticktext": list(labels)[::step]}


def finish(
    figure: go.Figure,
    theme: Theme,
    *,
    name: str,
    title: str,
    reading_aid: str,
    metric: str,
    height: int,
    bottom: int,
    top: int = 0,
) -> go.Figure:
    """Give ``figure`` its template, title, size and meta data, and return it.

    Args:
        figure: a figure with traces and axes.
        theme: the look.
        name: the figure's name in the registry.
        title: one sentence part that says what one sees; escaped by the caller where it holds names. Wrapped here.
        reading_aid: one line that says how to read it (plain text).
        metric: name of the number shown, as in metrics.md (key of its definition).
        height: pixels of the plot area.
        bottom: pixels below the plot area (see `driftlens.figures.axes.bottom_room`).
        top: extra pixels between title and plot area, for labels that stand there.
    """
    lines = textwrap.wrap(title, _TITLE_WIDTH, break_long_words=False) or [""]
    above = 20 + _LINE * len(lines) + top
    figure.update_layout(
        template=template(theme),
        title={
            "text": "<br>".join(lines),
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 8 + _LINE * (len(lines) - 1), "l": 0},
        },
        margin={"l": 12, "r": 14, "t": above, "b": bottom},
        height=height + above + bottom,
        meta={"figure": name, "metric": metric, "reading_aid": reading_aid},
        separators=". ",
    )
    return figure


def name_run(figure: go.Figure, name: str) -> go.Figure:
    """Write a run's name under the title of a finished ``figure``, for several runs side by side; return it."""
    title, room = figure.layout.title, figure.layout.margin.t + _LINE
    colour = figure.layout.template.layout.xaxis.tickfont.color
    text = f'{title.text}<br><span style="font-size:13px;color:{colour}">{plain(name, 44)}</span>'
    figure.update_layout(title={"text": text, "pad": {"t": title.pad.t + _LINE}}, margin={"t": room})
    figure.update_layout(height=figure.layout.height + _LINE)
    return figure
