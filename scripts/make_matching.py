"""Say how well experts of recorded runs can be matched: ``python scripts/make_matching.py RUN... [--page ...]``.

Three questions on real runs: are experts recognised where the answer is known (two checkpoints of one run), across
methods that started from the same weights, and across seeds?
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

from driftlens.analysis import Run, match_experts, open_run

ROOT = Path(__file__).resolve().parent.parent
INTRO = """# Matching of experts

Made by `scripts/make_matching.py` from {count} runs on the built-in stream ({sites} sites, {experts} experts each,
{tokens} stored tokens). `driftlens.match_experts` pairs the experts of a site in two runs so that the correlation of
their responsibility profiles, token by token, is as high as it can be. *score* is the mean correlation over pairs and
sites. It stands beside two nulls:

- *places*: the same search after whole probes, and samples within them, changed places in one run; *p* counts the
  draws that reach the score (the largest of the pairs).
- *other sites*: the same site against the other sites of the second run, on the very same tokens. No expert there can
  be a counterpart. *beyond other sites*: share of sites whose score at most 5 % of the other sites reach;
  {beyond:.0f} % by chance.

*own label*: share of experts paired with the expert of the same number, {chance:.0f} % by chance. Within one run this
is the known answer. Runs of one seed started from the same weights, so there it says how much of the start is left.
Numbers are means over the pairs of runs.

| pairs | n | checkpoints | score | places | p | other sites | beyond other sites | own label |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def measure(first: Run, second: Run, point: int, other: int, draws: int) -> list[float]:
    """Return the numbers of one pair: score, places, p, other sites, beyond other sites, own label."""
    found = match_experts(first, second, point, checkpoint_b=other, draws=draws)
    names = ("overall_score", "overall_null_mean", "overall_p", "other_mean")
    numbers = [float(found[name].mean()) for name in names]
    return [*numbers, float((found["other_p"] <= 0.05).mean()), float((found["partner"] == found["expert"]).mean())]


def line(name: str, points: tuple[int, int], table: np.ndarray) -> str:
    """Return one line of the page from the numbers of its pairs [pairs, 6]."""
    score, places, _, others, beyond, own = table.mean(axis=0)
    cells = [name, str(len(table)), f"{points[0]}, {points[1]}", f"{score:.2f}", f"{places:.2f}"]
    cells += [f"{table[:, 2].max():.3f}", f"{others:.2f}", f"{100 * beyond:.0f} %", f"{100 * own:.0f} %"]
    return f"| {' | '.join(cells)} |"


def summary(tables: dict[tuple[str, tuple[int, int]], np.ndarray], draws: int) -> str:
    """Say what the table says of the two nulls."""
    pairs = np.concatenate(list(tables.values()))
    at_floor = int((pairs[:, 2] <= 1 / (1 + draws) + 1e-12).sum())

    def spread(ending: str, column: int) -> str:
        values = [100 * table[:, column].mean() for (name, _), table in tables.items() if name.endswith(ending)]
        return f"{min(values):.0f} to {max(values):.0f} %" if values else "(no such pair)"

    return f"""
*p* is at its floor for {at_floor} of {len(pairs)} pairs, those included whose own labels are at chance: two routers
that treat one word alike wherever it stands are more alike than any change of places. It does not tell counterparts
from habits, so `align_experts` asks for both nulls. *beyond other sites* does: {spread("one run", 4)} of sites within
one run, {spread("two seeds", 4)} between seeds (*own label*: {spread("one run", 5)} and {spread("two seeds", 5)}).
At the other sites no expert of one run can be said to play the part of one in the other.
"""


def groups(runs: list[Run]) -> dict[str, list[tuple[Run, Run]]]:
    """Sort the pairs of runs by what the two have in common; pairs that share neither method nor seed are left out."""
    found: dict[str, list[tuple[Run, Run]]] = {}
    for a, b in itertools.combinations(runs, 2):
        if a.method == b.method:
            found.setdefault(f"{a.method}, two seeds", []).append((a, b))
        elif a.seed == b.seed:
            found.setdefault(f"{a.method} and {b.method}, one seed", []).append((a, b))
    return found


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "matching.md")
    parser.add_argument("--draws", type=int, default=999)
    options = parser.parse_args()
    runs = [open_run(path) for path in options.runs]
    with runs[0].recording(runs[0].recorded[-1]) as recording:
        sites, experts = len(recording.sites), recording.sites[0].num_experts
        beyond = 100 * int(0.05 * sites) / sites  # p-values are multiples of 1/sites
        text = INTRO.format(
            count=len(runs),
            sites=sites,
            experts=experts,
            tokens=recording.n_tokens,
            chance=100 / experts,
            beyond=beyond,
        )
    last = min(run.recorded[-1] for run in runs)
    wanted: dict[tuple[str, tuple[int, int]], list[tuple[Run, Run]]] = {}
    for method in dict.fromkeys(run.method for run in runs):
        same = [(run, run) for run in runs if run.method == method]
        wanted |= {(f"{method}, one run", (point, last)): same for point in (last - 1, 1)}
    for name, pairs in groups(runs).items():
        wanted |= {(name, (point, point)): pairs for point in (1, last)}
    tables = {
        (name, points): np.array([measure(a, b, *points, options.draws) for a, b in pairs])
        for (name, points), pairs in wanted.items()
    }
    lines = [line(*key, table) for key, table in tables.items()]
    options.page.write_text(text + "\n".join(lines) + "\n" + summary(tables, options.draws))
    print(options.page.read_text())


if __name__ == "__main__":
    main()
