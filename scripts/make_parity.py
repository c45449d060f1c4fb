"""Write docs/parity.md: for each site family, recorded values against the model's own forward.

Run ``python scripts/make_parity.py`` from the repository's folder; it takes a minute on a CPU.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from driftlens.store import open_recording
from tests.recording.families.suite import cases, parity, recorded

HEAD = """# Recorded values against the model's own forward

Made by `scripts/make_parity.py`; `tests/recording/test_families.py` holds every row to the bounds 1e-3 (gates,
pathways) and 2e-3 (outputs). Gates: largest absolute error. Pathways, and adapter outputs rebuilt from recorded gates,
pathways and stored weights: largest error over the largest value. What remains is float16, in which rows are stored
(2^-11 = 4.9e-4). A dash: the family has none, or no such output is defined.

| model | family | sites | gates | pathways | outputs |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Record every case and write the table."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases()):
            model, path = case.build(), Path(folder) / f"{number}.h5"
            recorded(model, path, batch_size=2)
            with open_recording(path) as recording:
                found = parity(case, model, recording)
            cells = ["-" if value is None else f"{value:.1e}" for value in (found.gate, found.pathway, found.output)]
            lines.append(f"| {case.name} | {case.family} | {found.sites} | {' | '.join(cells)} |")
            print(lines[-1])
    Path("docs/parity.md").write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
