"""Plotly figures from analysis tables: pure functions run -> figure, used by notebooks, report and app alike.

Every figure carries ``layout.meta`` with its name, the number it shows and a one-line reading aid;
`definition_of` gives the number's definition, and the registry `FIGURES` the rows that a figure draws.
"""

from driftlens.figures.accuracy_curves import accuracy_curves
from driftlens.figures.accuracy_matrix import accuracy_matrix
from driftlens.figures.codrift_map import HIT_LAYER, codrift_map, depth_order, map_range
from driftlens.figures.drift_lines import drift_lines, line_top
from driftlens.figures.method_bars import BAR_METRICS, method_bars
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.reroute_bars import reroute_bars, reroute_table
from driftlens.figures.routing_flow import routing_flow, routing_multiples
from driftlens.figures.routing_histogram import routing_histogram, routing_histogram_table
from driftlens.figures.sample_js_lines import sample_js_lines, sample_js_table
from driftlens.figures.tables import (
    LINE_METRICS,
    MAP_METRICS,
    SCORERS,
    accuracy_table,
    cell_table,
    codrift_table,
    csv_text,
    drift_table,
    routing_table,
)
from driftlens.figures.text import interval, name_run, number, plain
from driftlens.figures.theme import CONFIG, THEMES
from driftlens.figures.words import CAPTIONS, definition_of

__all__ = [
    "BAR_METRICS",
    "CAPTIONS",
    "CONFIG",
    "FIGURES",
    "HIT_LAYER",
    "LINE_METRICS",
    "MAP_METRICS",
    "SCORERS",
    "THEMES",
    "FigureKind",
    "accuracy_curves",
    "accuracy_matrix",
    "accuracy_table",
    "cell_table",
    "codrift_map",
    "codrift_table",
    "csv_text",
    "definition_of",
    "depth_order",
    "drift_lines",
    "drift_table",
    "interval",
    "line_top",
    "map_range",
    "method_bars",
    "name_run",
    "number",
    "plain",
    "reroute_bars",
    "reroute_table",
    "routing_flow",
    "routing_histogram",
    "routing_histogram_table",
    "routing_multiples",
    "routing_table",
    "sample_js_lines",
    "sample_js_table",
]
