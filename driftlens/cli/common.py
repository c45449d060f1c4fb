"""What every command shares: output as table or JSON, progress, and errors as exit codes."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["JsonOption", "QuietOption", "console", "emit", "note", "plain", "printable", "progress_bar"]


class Step(Protocol):
    """What long computations report: a message, and units done out of all."""

    @property
    def message(self) -> str:
        """What is being done."""

    @property
    def done(self) -> float:
        """Units done."""

    @property
    def total(self) -> float:
        """All units."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON (an array, one object per row) on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print results only: no progress, no notes.")]


def console(*, stderr: bool = False) -> Console:
    """Return a console for stdout or stderr (made on each call, so that redirected streams are honoured)."""
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def note(message: str, quiet: bool = False) -> None:
    """Print a remark on stderr unless ``quiet``."""
    if not quiet:
        console(stderr=True).print(escape(printable(message)))


def printable(text: str) -> str:
    """Return ``text`` with control and direction characters spelled out: names from files must not steer a terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else ascii(c)[1:-1] for c in text)


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: NumPy scalars become Python's, undefined numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def emit(rows: Sequence[Mapping[Any, Any]], *, as_json: bool, columns: Sequence[str] | None = None) -> None:
    """Print rows as an aligned table, or as a JSON array with one object per row.

    Args:
        rows: the rows; all keys are printed as JSON.
        as_json: JSON instead of a table.
        columns: the columns of the table (default: the keys of the first row).
    """
    if as_json:
        lines = ",\n".join(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) for row in rows)
        sys.stdout.write(f"[{lines}]\n")
        return
    if not rows:
        console().print("nothing to show")
        return
    shown = list(columns) if columns is not None else list(rows[0])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        numeric = all(isinstance(plain(row.get(column)), (int, float, type(None))) for row in rows)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(_cell(plain(row.get(column))))) for column in shown))
    # A table that is piped into a file must not be folded to the width of a terminal that is not there.
    out = console()
    if not out.is_terminal:
        out = Console(width=max(80, 40 * len(shown)), highlight=False)
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return str(value)


@contextmanager
def progress_bar(quiet: bool, prefix: str = "") -> Iterator[Callable[[Step], None]]:
    """Show message, share done, elapsed time and ETA on stderr; yields the function to report to.

    Where stderr is no terminal (a log file), a line is printed whenever another tenth is done.
    """
    err = console(stderr=True)
    if quiet or not err.is_terminal:
        yield _by_tenths(quiet, prefix)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(escape(f"{prefix}starting"), total=None)

        def report(step: Step) -> None:
            bar.update(task, description=escape(prefix + step.message), completed=step.done, total=step.total)

        yield report


def _by_tenths(quiet: bool, prefix: str) -> Callable[[Step], None]:
    last = 0

    def report(step: Step) -> None:
        nonlocal last
        tenth = int(10 * step.done / step.total) if step.total else 10
        if tenth > last:
            last = tenth
            note(f"{prefix}{10 * tenth:3d} %  {step.message}", quiet)

    return report
