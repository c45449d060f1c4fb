"""``driftlens``: the entry point, its commands and their exit codes."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from driftlens import __version__
from driftlens.cli.common import console, printable
from driftlens.errors import DriftLensError

__all__ = ["app", "main"]

_EPILOG = (
    "Exit codes: 0 done, 1 other error, 2 wrong command line or configuration, 3 something does not exist, "
    "4 corrupt or foreign file, 5 probes do not fit, 6 locked by another writer, 7 disk refuses, "
    "8 nothing to observe in the model, 130 interrupted."
)

_INTERRUPTED = 130

app = typer.Typer(
    name="driftlens",
    help="Where and why a continually trained mixture-of-experts LoRA model forgets.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console().print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Where and why a continually trained mixture-of-experts LoRA model forgets."""


def _register() -> None:
    # Each module only declares a function; what it needs is imported when it is called.
    from driftlens.cli import (
        analyze,
        assets,
        attribute,
        collect,
        compare,
        demo,
        export,
        listing,
        record,
        repair,
        reroute,
        sites,
        train,
        validate,
        verify,
        weights,
    )

    app.command("demo")(demo.demo)
    app.command("assets")(assets.assets)
    app.command("train")(train.train)
    app.command("record")(record.record)
    app.command("collect")(collect.collect)
    app.command("analyze")(analyze.analyze)
    app.command("attribute")(attribute.attribute)
    app.command("reroute")(reroute.reroute)
    app.command("compare")(compare.compare)
    app.command("validate")(validate.validate)
    app.command("sites")(sites.sites)
    app.command("methods")(listing.methods)
    app.command("streams")(listing.streams)
    app.command("ls")(listing.ls)
    app.command("verify")(verify.verify)
    app.command("weights")(weights.weights)
    app.command("repair")(repair.repair)
    app.command("export")(export.export)


_register()


def main() -> None:
    """Run the command line; a known error is one message on stderr and its documented exit code."""
    # Deprecations inside the libraries are for their authors, not for those who run a command.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.showwarning = _show
    try:
        app()
    except DriftLensError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"The operating system refused: {error.strerror or error}{where}.", 7)
    except SystemExit as done:
        if done.code == _INTERRUPTED:
            _fail(
                "Interrupted. What was finished is kept; run the same command again (training: with --resume).",
                _INTERRUPTED,
            )
        raise


def _show(message: Warning | str, *_where: object, **_options: object) -> None:
    """Print a warning as one remark: whoever runs a command has no use for the line of code that gave it."""
    console(stderr=True).print(f"Warning: {printable(str(message))}", style="yellow", markup=False)


def _fail(message: str, code: int) -> None:
    console(stderr=True).print(f"Error: {printable(message)}", style="red", markup=False)
    sys.exit(code)
