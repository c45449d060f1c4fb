"""Write docs/measures.md, docs/measure_functions.md and docs/measure_tests.md from definitions, docstrings and tests.

Run ``python scripts/make_metric_docs.py`` from the repository's folder; ``tests/metrics/test_metrics_docs.py`` fails
when a committed page is not what this script makes.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from driftlens import metrics  # noqa: E402
from driftlens.metrics import ALL_MEASURES, COMPUTED_BY, Definition  # noqa: E402
from tests.metrics.forms import CLOSED_FORMS, OTHER_INVARIANCES  # noqa: E402
from tests.metrics.scene import TRANSFORMATIONS, VERDICTS, Verdict  # noqa: E402

MADE_BY = "Made by `scripts/make_metric_docs.py`; do not edit."

SECTIONS = {
    "1": "Routing",
    "2": "Pathways, subspaces and weights",
    "3a": "Co-drift",
    "3b": "Responsibility",
    "4a": "Attribution by swaps",
    "4b": "The forgetting ledger",
    "5": "Performance over the stream",
    "6": "Nulls and matching",
}

HEAD = """# Measures

{made_by}

The text is that of `driftlens.metrics.ALL_MEASURES`; symbols and conventions are those of
[metrics.md](metrics.md), which this page follows section by section. Every function with its docstring:
[measure_functions.md](measure_functions.md). Which test holds which measure: [measure_tests.md](measure_tests.md).

An undefined number is NaN, never 0. *Gauge*: unchanged when an expert's (A, B) becomes (G A, B G^-1), the same function
in another basis. What is not is meaningful within one run only. Shapes: `*site` stands for any number of leading axes.
"""

FUNCTIONS_HEAD = """# Functions of `driftlens.metrics`

{made_by}

What a measure means: [measures.md](measures.md). Shapes are jaxtyping's: `*site` stands for any number of
leading axes, equal names within a signature for equal lengths.
"""

TESTS_HEAD = """# Which tests hold which measure

{made_by}

*Closed form*: cases whose value is known without the code (`test_metrics_closed_forms.py`). *Left alone by* and
*changed by*: what random passes are put through, tested both ways (`test_metrics_invariances.py`); *either*: depends
on the pass. *Also in*: files of `tests/metrics` that are named after its module: further cases, brute force, and other
libraries' results. Definitions: [measures.md](measures.md). What random passes are put through:
"""


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"{path}: {len(text.splitlines())} lines")


def pages() -> dict[str, str]:
    """Return the text of every page by its path in the repository."""
    return {
        "docs/measures.md": measures_page(),
        "docs/measure_functions.md": functions_page(),
        "docs/measure_tests.md": tests_page(),
    }


# --- definitions ---------------------------------------------------------------------------------------------------


def measures_page() -> str:
    """Return the page of definitions, by section of metrics.md."""
    lines = [HEAD.format(made_by=MADE_BY)]
    for section, title in SECTIONS.items():
        entries = [entry for entry in ALL_MEASURES.values() if entry.section == section]
        lines.append(f"- Section {section}, {title}: " + ", ".join(f"`{entry.name}`" for entry in entries))
    for section, title in SECTIONS.items():
        lines.append(f"\n## {section}. {title}\n")
        lines.append("\n\n".join(_entry(entry) for entry in ALL_MEASURES.values() if entry.section == section))
    return "\n".join(lines) + "\n"


def _entry(entry: Definition) -> str:
    invariance = {"gauge": "gauge", "none": "not gauge-invariant"}[entry.invariance]
    facts = {
        "Definition": f"`{entry.formula}`",
        "Range": entry.range + (f"; chance {entry.chance}" if entry.chance else ""),
        "Invariance": invariance + (": compare within one run only" if entry.within_run else ""),
        "Source": entry.source,
        "Undefined": entry.undefined,
        "Caveat": entry.caveat,
        "Computed by": _computed_by(entry.name),
    }
    body = "\n".join(f"- {name}: {text}" for name, text in facts.items() if text)
    return f"### `{entry.name}`: {entry.title}\n\n{body}"


def _computed_by(name: str) -> str:
    if name not in COMPUTED_BY:
        return "`driftlens attribute` (it needs a model)"
    return f"`{signature(COMPUTED_BY[name], found(COMPUTED_BY[name]))}`"


def found(path: str) -> Callable[..., Any]:
    """Return a function or method of ``driftlens.metrics`` by its dotted name."""
    item: Any = metrics
    for part in path.split("."):
        item = getattr(item, part)
    return typing.cast("Callable[..., Any]", item)


# --- signatures ----------------------------------------------------------------------------------------------------


def signature(name: str, function: Callable[..., Any]) -> str:
    """Return ``name(argument: shape, ...) -> result`` with shapes in place of aliases."""
    hints = typing.get_type_hints(function)
    parts, keyword = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            parts.append("*")
        keyword = keyword or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        text = f"{star}{parameter.name}: {_shape(hints[parameter.name], parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        parts.append(text)
    annotation = inspect.signature(function).return_annotation
    return f"{name}({', '.join(parts)}) -> {_shape(hints['return'], annotation)}"


def _shape(hint: Any, annotation: Any) -> str:
    """Shapes as ``Float[*site token]``; a named tuple with its fields; anything else as it is written."""
    if hasattr(hint, "dim_str"):
        return f"{str(hint).split('[')[0].split('.')[-1]}[{hint.dim_str.strip()}]"
    if typing.get_origin(hint) is types.UnionType:
        return " | ".join(_shape(option, getattr(option, "__name__", str(option))) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"({', '.join(_shape(option, str(option)) for option in typing.get_args(hint))})"
    if inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return f"{hint.__name__}({', '.join(hint._fields)})"
    if hint is type(None):
        return "None"
    return str(annotation)


# --- functions -----------------------------------------------------------------------------------------------------


def functions_page() -> str:
    """Return every public function and class of the package with its docstring, by module."""
    lines = [FUNCTIONS_HEAD.format(made_by=MADE_BY)]
    public = set(metrics.__all__)
    for info in sorted(pkgutil.iter_modules(metrics.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"driftlens.metrics.{info.name}")
        own = [(name, getattr(module, name)) for name in getattr(module, "__all__", ()) if name in public]
        items = [(name, item) for name, item in own if callable(item) and item.__module__ == module.__name__]
        if items:
            lines.append(f"\n## `driftlens.metrics.{info.name}`\n\n{(module.__doc__ or '').strip()}\n")
            lines.extend(block for name, item in items for block in _blocks(name, item))
    return "\n".join(lines) + "\n"


def _blocks(name: str, item: Any) -> Iterator[str]:
    if not inspect.isclass(item):
        yield f"### `{name}`\n\n```text\n{signature(name, item)}\n\n{inspect.cleandoc(item.__doc__ or '')}\n```\n"
        return
    body = [inspect.cleandoc(item.__doc__ or "")]
    for method, function in vars(item).items():
        if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
            body.append(f".{signature(method, function)}\n\n{_indented(function.__doc__)}")
    joined = "\n\n".join(body)
    yield f"### `{name}`\n\n```text\n{joined}\n```\n"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in inspect.cleandoc(text).splitlines())


# --- tests ---------------------------------------------------------------------------------------------------------


def tests_page() -> str:
    """Return the table of measures and what holds them."""
    lines = [TESTS_HEAD.format(made_by=MADE_BY)]
    lines += [f"- *{key}*: {text}" for key, (text, _) in TRANSFORMATIONS.items()]
    for section, title in SECTIONS.items():
        rows = [name for name, entry in ALL_MEASURES.items() if entry.section == section]
        lines += [f"\n## {section}. {title}\n", "| measure | closed form | left alone by | changed by | also in |"]
        lines += ["|---|---|---|---|---|", *map(_row, rows)]
    return "\n".join(lines) + "\n"


def _row(name: str) -> str:
    if name not in COMPUTED_BY:
        return f"| `{name}` | | | | `tests/attribution` |"
    forms = "; ".join(form.text for form in CLOSED_FORMS[name])
    verdicts = VERDICTS.get(name, {})
    changed, open_ = (
        [key for key, verdict in verdicts.items() if verdict is wanted] for wanted in (Verdict.CHANGES, Verdict.EITHER)
    )
    same = [pair.text for pair in OTHER_INVARIANCES.get(name, ())]
    if verdicts:
        same = ["all" + (" others" if changed or open_ else "") + (f"; {', '.join(open_)}: either" if open_ else "")]
    module = getattr(metrics, COMPUTED_BY[name].split(".")[0]).__module__.rpartition(".")[2]
    files = sorted((ROOT / "tests" / "metrics").glob(f"test_metrics_{module}*.py"))
    also = ", ".join(f"`{path.stem.removeprefix('test_metrics_')}`" for path in files)
    return f"| `{name}` | {forms} | {', '.join(same)} | {', '.join(changed)} | {also} |"


if __name__ == "__main__":
    main()
