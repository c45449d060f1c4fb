"""The list of figures. A new figure is one file with one `FIGURES.register` call; others come through entry points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from driftlens.registry import Registry

__all__ = ["FIGURES", "FigureKind"]


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure.

    Attributes:
        draw: takes the subject and keyword options (always ``theme``), returns the figure.
        rows: takes the subject and the same options without ``theme``; returns the frame that the figure draws.
        subject: ``"run"`` (a `driftlens.analysis.Run`), ``"runs"`` (a sequence of them) or ``"comparison"`` (a frame of
            `driftlens.compare`).
    """

    draw: Callable[..., go.Figure]
    rows: Callable[..., pd.DataFrame]
    subject: Literal["run", "runs", "comparison"] = "run"


FIGURES: Registry[FigureKind] = Registry("figure", "driftlens.figures")
"""Every figure by name."""
