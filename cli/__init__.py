"""The command line: one file per verb, each a thin call of the library.

In: arguments; an option that is not given is None and means "as the recipe says". Out: text, tables or JSON, and an exit code.
Never: computes, imports torch before a verb runs.
"""

from __future__ import annotations

import io
import sys

import typer
from kvshare.cli import bench, calibrate, convert, evaluate, heal, inspect, plan, push, recipes, verify

from kvshare import __version__
from kvshare.errors import KVShareError

app = typer.Typer(
    name="kvshare",
    help="Give a pretrained model back with half the KV cache or less.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("inspect")(inspect.run)
app.command("plan")(plan.run)
app.command("calibrate")(calibrate.run)
app.command("convert")(convert.run)
app.command("heal")(heal.run)
app.command("eval")(evaluate.run)
app.command("bench")(bench.run)
app.command("verify")(verify.run)
app.command("push")(push.run)
app.add_typer(recipes.app, name="recipes")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
) -> None:
    """Options of every verb."""


def main() -> None:
    """Run the command line; a refusal prints what, why and what to do, and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a log file may be unable to hold a sign such as ±; that is no reason to fail
    try:
        app()
    except KVShareError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
