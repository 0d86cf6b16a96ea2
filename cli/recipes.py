"""`kvshare recipes`: list, show and copy the recipes that come with kvshare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from kvshare.cli import options

from kvshare.errors import UsageError

app = typer.Typer(help="List, show and copy the shipped recipes.", no_args_is_help=True, rich_markup_mode="rich")
Name = Annotated[str, typer.Argument(help="A shipped recipe.")]


@app.command("list")
def list_recipes(quiet: options.Quiet = False) -> None:
    """Name every recipe with the first line of its description."""
    from kvshare.recipe import recipe_names, recipe_text

    for name in recipe_names():
        print(f"{name:10} {recipe_text(name).splitlines()[0].removeprefix('# ')}")


@app.command("show")
def show_recipe(name: Name, quiet: options.Quiet = False) -> None:
    """Print a recipe."""
    from kvshare.recipe import recipe_text

    typer.echo(recipe_text(name), nl=False)


@app.command("copy")
def copy_recipe(
    name: Name,
    file: Annotated[Path, typer.Argument(help="A new file.")],
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
) -> None:
    """Copy a recipe to a file, to change it there."""
    from kvshare.recipe import recipe_text

    text = recipe_text(name)
    if file.exists():
        raise UsageError(f"the file {file} exists", "nothing is ever overwritten unless asked", "choose another name")
    if dry_run:
        print(f"nothing was written; {file} would be the recipe {name}")
        return
    file.write_text(text, encoding="utf-8")
