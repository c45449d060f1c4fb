"""Which drift measures predict forgetting, on a folder of finished runs.

    python scripts/make_validity.py [--runs runs/table] [--out docs/results/validity] [--draws 2000]

OUT.csv holds every measure and target, OUT_rows.csv the rows behind it, OUT_search.csv every variant of co-drift and
impact by seed and by method, OUT.md the tables of all that: variants are chosen on the first seed and looked at on the
others, then chosen on all but the last and looked at on it. A minute on a free core; the runs are read only (their
analysis is cached in them, as by any command).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from driftlens.analysis import Validity, open_run
from driftlens.analysis.ranks import rank_correlation
from driftlens.analysis.simple import SIMPLE
from driftlens.analysis.study import ATTRIBUTED, validity_rows
from driftlens.analysis.validity import correlate
from driftlens.analysis.variants import VARIANTS, variant_names
from driftlens.store import write_bytes

TARGETS = {"lost_strict": "accuracy lost", "nll_rise": "rise in NLL"}
SHORT = {"lost_strict": "strict", "nll_rise": "nll"}
FOLLOWED = ["impact_scored", "impact", "codrift_divergence", "codrift_cross", "codrift_divergence_late"]
"""Shown wherever they rank."""


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/validity"))
    parser.add_argument("--draws", type=int, default=2000)
    args = parser.parse_args()
    folders = sorted({path.parents[1] for path in args.runs.glob("*/recordings/*.noise.h5")})
    if not folders:
        raise SystemExit(f"{args.runs} holds no finished run; make them with scripts/run_table.py.")
    names = variant_names()
    rows, undefined = read_rows(folders, names)
    shown = rows[[name for name in rows.columns if is_shown(str(name), names)]]
    study = correlate(shown, draws=args.draws, undefined=undefined)
    search = search_table(rows, names)
    out = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = study.table.round(4)
    write_bytes(out.with_suffix(".csv"), numbers.to_csv(index=False).encode())
    kept = shown[[name for name in shown.columns if not str(name).endswith("_noise")]]
    write_bytes(out.with_name(f"{out.name}_rows.csv"), kept.to_csv(index=False, float_format="%.6g").encode())
    write_bytes(out.with_name(f"{out.name}_search.csv"), search.round(4).to_csv(index=False).encode())
    text = page(rows, study, search, args.draws)
    write_bytes(out.with_suffix(".md"), text.encode())


def read_rows(folders: list[Path], variants: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the rows of all runs, and why measures are undefined in some of them."""
    parts: list[pd.DataFrame] = []
    undefined: dict[str, str] = {}
    for folder in folders:
        frame, facts = validity_rows(open_run(folder), variants)
        parts.append(frame)
        for name, fact in facts.items():
            undefined[name] = f"{undefined[name]}; {folder.name}" if name in undefined else f"{fact}: {folder.name}"
    return pd.concat(parts, ignore_index=True), undefined


def is_shown(column: str, variants: list[str]) -> bool:
    """Whether a column belongs to the main table: all but the variants that only the search looks at."""
    measure = column.removesuffix("_noise")
    tables = {"codrift_divergence", "codrift_experts", "codrift_cross", "router_js", *SIMPLE}
    tables |= {"impact", "impact_experts", "impact_router", "impact_cross"}
    return measure not in variants or measure in VARIANTS or measure in tables


def search_table(rows: pd.DataFrame, variants: list[str]) -> pd.DataFrame:
    """Return rho of every variant and simple measure over all rows, by seed, by method and without each method."""
    simple = [str(name) for name in rows.columns if str(name) in SIMPLE]
    parts = {"all": rows} | {f"seed{seed}": rows[rows["seed"] == seed] for seed in sorted(rows["seed"].unique())}
    for method in sorted(rows["method"].unique()):
        parts[method] = rows[rows["method"] == method]
        parts[f"without_{method}"] = rows[rows["method"] != method]
    result = []
    for measure in [*variants, *(name for name in simple if name not in variants)]:
        entry: dict[str, object] = {"measure": measure, "simple": measure in SIMPLE}
        for name, part in parts.items():
            entry |= {f"{short}_{name}": spearman(part, measure, target) for target, short in SHORT.items()}
        result.append(entry)
    return pd.DataFrame(result).sort_values("strict_all", ascending=False, kind="stable").reset_index(drop=True)


def criterion(rows: pd.DataFrame, measures: list[str]) -> pd.Series:
    """Return the lower of the two correlations of every measure, highest first."""
    lower = {name: min(spearman(rows, name, target) for target in TARGETS) for name in measures}
    return pd.Series(lower).sort_values(ascending=False, kind="stable")


def spearman(rows: pd.DataFrame, measure: str, target: str) -> float:
    """Return Spearman's correlation over the rows that have both; NaN where a side is constant."""
    return float(rank_correlation(rows[measure], rows[target])[0])


def page(rows: pd.DataFrame, study: Validity, search: pd.DataFrame, draws: int) -> str:
    """Return OUT.md."""
    seeds = sorted(rows["seed"].unique().tolist())
    lines = [
        "# Which drift measures predict forgetting, on the built-in stream",
        "",
        f"Written by `scripts/make_validity.py`. {len(rows)} rows (old task at a later checkpoint) of "
        f"{rows['run'].nunique()} runs: {', '.join(sorted(rows['method'].unique()))}; seeds "
        f"{', '.join(map(str, seeds))}. Spearman's rank correlation over all rows; 95 % intervals from drawing whole "
        f"runs again ({draws} draws). Partial: given the task's learned accuracy, its NLL before training and the "
        "tasks since. Within run: mean of the correlations inside single runs. Beats: simple measures that it beats "
        "with a paired interval above 0. What the numbers say: [../validity.md](../validity.md).",
        "",
        "| measure | kind | accuracy lost | rise in NLL | partial, accuracy | within method | within run | beats "
        "| rows |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_target = {target: study.table[study.table["target"] == target].set_index("measure") for target in TARGETS}
    for measure in by_target["lost_strict"].index.to_list():
        row = by_target["lost_strict"].loc[measure]
        predicts = any(table["predicts"][measure] for table in by_target.values())
        cells = [measure + ("" if predicts else " (does not predict)"), row["kind"]]
        cells += [with_interval(table, measure) for table in by_target.values()] + [number(row["partial"])]
        cells += [number(row["within_method"]), number(row["within_run"]), f"{row['beats']} of {row['of_simple']}"]
        lines.append(f"| {' | '.join([*cells, str(row['rows'])])} |")
    if any(name in study.table["measure"].unique() for name in ATTRIBUTED):
        lines += ["", "Attribution needs the model; its parts sum to the rise of the NLL by construction."]
    variants = search.loc[~search["simple"], "measure"].to_list()
    for count in dict.fromkeys((1, len(seeds) - 1)):
        if 0 < count < len(seeds):
            lines += chosen_section(rows, variants, seeds[:count], seeds[count:], draws)
    return "\n".join([*lines, *method_section(search)]) + "\n"


def chosen_section(
    rows: pd.DataFrame, variants: list[str], select: list[int], held: list[int], draws: int
) -> list[str]:
    """Return the part on choosing on some seeds and looking at the others."""
    chosen, kept = rows[rows["seed"].isin(select)], rows[rows["seed"].isin(held)]
    ranked = criterion(chosen, variants)
    followed = list(dict.fromkeys([*ranked.index[:6], *FOLLOWED]))
    columns = [name for name in kept.columns if name not in set(variants) - set(followed)]
    study = correlate(kept[[name for name in columns if not str(name).endswith("_noise")]], draws=draws)
    names = ["seed" + "s" * (len(part) > 1) + " " + ", ".join(map(str, part)) for part in (select, held)]
    lines = [
        "",
        f"## Chosen on {names[0]}, looked at on {names[1]}",
        "",
        f"{len(variants)} variants of co-drift and impact were tried (quantity x tokens x sites); the criterion is the "
        f"lower of the two correlations on {names[0]}. Best there: `{ranked.index[0]}`. Beats: simple measures beaten "
        "on the held-out rows with a paired interval above 0.",
        "",
        "| measure | rank | chosen: accuracy lost | chosen: rise in NLL | held out: accuracy lost "
        "| held out: rise in NLL | beats, accuracy | beats, NLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measure in [*followed, *(name for name in SIMPLE if name in kept)]:
        place = str(ranked.index.to_list().index(measure) + 1) if measure in ranked.index else "-"
        cells = [measure, place, *(number(spearman(chosen, measure, target)) for target in TARGETS)]
        own = study.table[study.table["measure"] == measure].set_index("target")
        beaten = [f"{own.loc[target, 'beats']} of {own.loc[target, 'of_simple']}" for target in TARGETS]
        lines.append(f"| {' | '.join([*cells, *(with_interval(own, target) for target in TARGETS), *beaten])} |")
    return lines


def method_section(search: pd.DataFrame) -> list[str]:
    """Return the part on leaving one method out when choosing."""
    methods = [name.removeprefix("strict_without_") for name in search.columns if name.startswith("strict_without_")]
    variants = search[~search["simple"]].set_index("measure")
    lines = [
        "",
        "## Chosen without one method, looked at on that method (all seeds)",
        "",
        "| left out | best without it | its accuracy lost | its rise in NLL "
        "| impact_scored: accuracy lost | rise in NLL | codrift_divergence: accuracy lost | rise in NLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        best = str(variants[[f"strict_without_{method}", f"nll_without_{method}"]].min(axis=1).idxmax())
        cells = [method, f"`{best}`"]
        for measure in (best, "impact_scored", "codrift_divergence"):
            cells += [number(variants[f"{short}_{method}"][measure]) for short in SHORT.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(value: float) -> str:
    """Return two digits, or a dash."""
    return "-" if pd.isna(value) else f"{value:.2f}"


def with_interval(table: pd.DataFrame, row: str) -> str:
    """Return rho with its interval."""
    return f"{number(table['rho'][row])} [{number(table['low'][row])}, {number(table['high'][row])}]"


if __name__ == "__main__":
    main()
