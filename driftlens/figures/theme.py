"""One look for every figure: the same colour for the same thing everywhere, in a light and a dark variant.

Categorical colours come from palettes that stay apart under the common colour-vision deficiencies (Okabe and Ito for
experts, Paul Tol's schemes for tasks and methods); colours repeat only together with another dash and marker.
The ramps change monotonically in lightness, so they also survive a grey print.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go

from driftlens.errors import UnknownNameError

__all__ = [
    "CONFIG",
    "DASHES",
    "SYMBOLS",
    "THEMES",
    "Theme",
    "ThemeName",
    "expert_colour",
    "ink_on",
    "method_colour",
    "ramp_colour",
    "relative_luminance",
    "task_style",
    "template",
    "theme_of",
    "with_alpha",
]

ThemeName = Literal["light", "dark"]

_DARK_INK = "#10151d"
_FONT = '"Source Sans", "Source Sans 3", "Segoe UI", "Helvetica Neue", Arial, sans-serif'


@dataclass(frozen=True)
class Theme:
    """Colours of one look.

    Attributes:
        name: ``"light"`` or ``"dark"``.
        background: page and plot background.
        ink: titles and marks; ``muted``: tick labels and notes; ``grid``: grid lines.
        void: fill of cells that hold no number.
        scores: ramp of accuracies (low to high); unlearned: the same ramp in grey, for tasks not learned yet.
        drift: ramp of quantities that grow from 0; signed: diverging ramp around 0.
        tasks, experts, methods: categorical palettes.
    """

    name: ThemeName
    background: str
    ink: str
    muted: str
    grid: str
    void: str
    scores: tuple[str, ...]
    unlearned: tuple[str, ...]
    drift: tuple[str, ...]
    signed: tuple[str, ...]
    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    methods: tuple[str, ...]


_LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1c2330",
    muted="#5b6576",
    grid="#e6e9ef",
    void="#f1f3f7",
    scores=("#f2f7fb", "#d5e6f1", "#a9cde3", "#6fadcf", "#3a86b4", "#1d5f91", "#0e3b66"),
    unlearned=("#fafafa", "#efeff0", "#dfe0e3", "#cbccd1", "#b4b6bd", "#9b9ea7", "#848894"),
    drift=("#fdf6ee", "#fbe0c3", "#f7bd8b", "#ee8f5c", "#d95f4b", "#ab3755", "#6d1f5a"),
    signed=("#1b4f8a", "#5a8fc4", "#abc9e4", "#f5f5f3", "#f3c49a", "#d9803f", "#9a4a10"),
    tasks=("#332288", "#117733", "#cc6677", "#44aa99", "#aa4499", "#b8952f", "#4a9fd4", "#882255", "#7d7d1f"),
    experts=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b9ab1e", "#6b7280"),
    methods=("#0077bb", "#ee7733", "#009988", "#cc3311", "#ee3377", "#33bbee", "#7a7a7a"),
)
_DARK = Theme(
    name="dark",
    background="#0f131a",
    ink="#eef1f6",
    muted="#a3adbd",
    grid="#262d3a",
    void="#1a202b",
    scores=("#15202c", "#17364f", "#1c5175", "#2a719b", "#4795bd", "#78bbd8", "#bfe4f2"),
    unlearned=("#191e27", "#222832", "#2d343f", "#39414d", "#47505d", "#56606e", "#687280"),
    drift=("#1f1820", "#43203b", "#702a4c", "#a33d52", "#d35f4e", "#f0945c", "#fcd39b"),
    signed=("#8fc1f0", "#4f8ac2", "#2a5079", "#1d222b", "#7a4a22", "#c37a35", "#f6bd80"),
    tasks=("#9d92f0", "#55b877", "#e88a98", "#5fcfbb", "#d67fc8", "#ddc168", "#7cc4f2", "#cf6a9d", "#b5b54f"),
    experts=("#3d9bd8", "#f0b429", "#1fbf92", "#dd93bd", "#84cbf5", "#f0783a", "#d9cc4b", "#9aa3b2"),
    methods=("#3a9fe0", "#f79a5e", "#2fbfae", "#f0664a", "#f7739d", "#74d1f5", "#a8a8a8"),
)
THEMES: dict[str, Theme] = {"light": _LIGHT, "dark": _DARK}

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "pentagon", "hexagon")

# Methods that ship with DriftLens keep their colour whatever else is shown beside them.
_METHOD_SLOTS = {"pass-moe": 0, "moe-lora": 1, "moe-lora-topk": 2, "seq-lora": 6}

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "responsive": True,
    "scrollZoom": False,
    # Nothing leaves the machine: no cloud button, whatever the bundled plotly.js offers.
    "modeBarButtonsToRemove": [
        "select2d",
        "lasso2d",
        "autoScale2d",
        "zoomIn2d",
        "zoomOut2d",
        "sendDataToCloud",
        "sendChartToCloud",
    ],
}


def theme_of(name: str) -> Theme:
    """Return the theme called ``name``.

    Raises:
        UnknownNameError: neither ``"light"`` nor ``"dark"``.
    """
    try:
        return THEMES[name]
    except KeyError:
        raise UnknownNameError("figure theme", name, THEMES) from None


def template(theme: Theme) -> go.layout.Template:
    """Return the Plotly template of ``theme`` (fonts, axes, legend, hover box, default palette)."""
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.grid,
        "zeroline": False,
        # Transparent ticks keep the labels of both axes apart where they meet.
        "ticks": "outside",
        "ticklen": 5,
        "tickcolor": "rgba(0,0,0,0)",
        "ticklabeloverflow": "allow",
        "tickfont": {"color": theme.muted, "size": 12},
        "title": {"font": {"color": theme.muted, "size": 12.5}, "standoff": 10},
        "automargin": True,
    }
    return go.layout.Template(
        layout={
            "font": {"family": _FONT, "size": 13, "color": theme.ink},
            "paper_bgcolor": theme.background,
            "plot_bgcolor": theme.background,
            "colorway": list(theme.tasks),
            "title": {"font": {"size": 15.5, "color": theme.ink}, "x": 0, "xref": "container", "xanchor": "left"},
            "hoverlabel": {
                "bgcolor": theme.void,
                "bordercolor": theme.grid,
                "align": "left",
                "font": {"family": _FONT, "color": theme.ink, "size": 12.5},
            },
            "legend": {"font": {"size": 12, "color": theme.ink}, "bgcolor": "rgba(0,0,0,0)", "borderwidth": 0},
            "xaxis": axis,
            "yaxis": axis,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme.muted, "activecolor": theme.ink},
        }
    )


def with_alpha(colour: str, alpha: float) -> str:
    """Return the hex ``colour`` as an ``rgba()`` string with opacity ``alpha`` (0..1)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def ramp_colour(ramp: Sequence[str], share: float) -> str:
    """Return the hex colour at ``share`` (0..1, clipped) of ``ramp``, interpolated as Plotly does."""
    place = min(max(share, 0.0), 1.0) * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    pairs = ((int(ramp[low][i : i + 2], 16), int(ramp[low + 1][i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in pairs)


def relative_luminance(colour: str) -> float:
    """Return the WCAG relative luminance (0 black .. 1 white) of a hex colour."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink_on(colour: str) -> str:
    """Return white or near-black, whichever can be read better on ``colour``."""
    luminance = relative_luminance(colour)
    return (
        "#ffffff"
        if 1.05 / (luminance + 0.05) > (luminance + 0.05) / (relative_luminance(_DARK_INK) + 0.05)
        else _DARK_INK
    )


def task_style(theme: Theme, position: int) -> tuple[str, str, str]:
    """Return (colour, dash, marker symbol) of the task at stream ``position`` (0-based); unique for 45 tasks."""
    turn, slot = divmod(position, len(theme.tasks))
    return theme.tasks[slot], DASHES[turn % len(DASHES)], SYMBOLS[position % len(SYMBOLS)]


def expert_colour(theme: Theme, expert: int) -> str:
    """Return the colour of expert number ``expert`` (0-based); beyond eight experts colours repeat, lighter."""
    turn, slot = divmod(expert, len(theme.experts))
    return theme.experts[slot] if turn == 0 else with_alpha(theme.experts[slot], 0.75 / turn)


def method_colour(theme: Theme, method: str, shown: Sequence[str] = ()) -> str:
    """Return the colour of ``method``: fixed for built-in methods, else a stable slot from its name.

    Args:
        theme: the look.
        method: the method's name.
        shown: all methods of the figure; two unknown ones that fall on the same slot are told apart by their order.
    """
    slots = dict(_METHOD_SLOTS)
    for name in sorted({*shown, method} - set(slots)):
        start = hashlib.sha256(name.encode()).digest()[0]
        free = [slot for slot in range(len(theme.methods)) if slot not in slots.values()]
        slots[name] = free[start % len(free)] if free else start % len(theme.methods)
    return theme.methods[slots[method]]
