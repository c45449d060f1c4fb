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


def line(name: str, points: tuple[int, int], pairs: list[tuple[Run, Run]], draws: int) -> str:
    """Return one line of the table."""
    table = np.array([measure(a, b, *points, draws) for a, b in pairs])
    score, places, _, others, beyond, own = table.mean(axis=0)
    cells = [name, str(len(pairs)), f"{points[0]}, {points[1]}", f"{score:.2f}", f"{places:.2f}"]
    cells += [f"{table[:, 2].max():.3f}", f"{others:.2f}", f"{100 * beyond:.0f} %", f"{100 * own:.0f} %"]
    return f"| {' | '.join(cells)} |"


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
    last, lines = min(run.recorded[-1] for run in runs), []
    for method in dict.fromkeys(run.method for run in runs):
        same = [(run, run) for run in runs if run.method == method]
        lines += [line(f"{method}, one run", (point, last), same, options.draws) for point in (last - 1, 1)]
    for name, pairs in groups(runs).items():
        lines += [line(name, (point, point), pairs, options.draws) for point in (1, last)]
    options.page.write_text(text + "\n".join(lines) + "\n")
    print(options.page.read_text())


if __name__ == "__main__":
    main()
