"""CSV that is safe to open in a spreadsheet."""

from __future__ import annotations

import pandas as pd

__all__ = ["csv_text"]


def csv_text(frame: pd.DataFrame) -> str:
    """Return ``frame`` as CSV in which no text cell can run as a spreadsheet formula.

    Text that starts with one of ``= + - @``, a tab or a line break gets a leading apostrophe, which spreadsheets hide.
    """

    def tame(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r\n" and value else value

    safe = frame.copy()
    for column in safe.columns:
        if not pd.api.types.is_numeric_dtype(safe[column]):
            safe[column] = pd.Series([tame(value) for value in safe[column]], index=safe.index, dtype=object)
    safe.columns = [tame(str(column)) for column in safe.columns]
    return safe.to_csv(index=False)
