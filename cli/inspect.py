"""`kvshare inspect`: the low-rank regime of a model, before anything is converted."""

from __future__ import annotations

from typing import Annotated

import typer
from kvshare.cli import options
from kvshare.cli.render import print_inspection, print_json, shown_progress


def run(
    model: options.Model,
    output: options.Output,
    data: Annotated[str | None, typer.Option(help=f"Text to look at the model on. {options.DATA}. The default is self.")] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show how low the rank of K and V is, layer by layer, and what sharing would drop: a page, JSON and plots."""
    from kvshare import inspect
    from kvshare.hub import describe
    from kvshare.inspection import check_inspection, inspection_plan

    if dry_run:
        planned = inspection_plan(describe(model), data, tokens, seed)
        check_inspection(planned, output, overwrite)
        settings = planned.recipe.calibration
        if as_json:
            print_json({"output": str(output), "layers": planned.layers, "data": settings.data, "tokens": settings.tokens})
            return
        print(f"nothing was written; {output} would show {planned.layers} layers on {settings.tokens:,} tokens of {settings.data}")
        return
    with shown_progress(quiet) as progress:
        result = inspect(model, output, data=data, tokens=tokens, seed=seed, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(result.to_dict() | {"output": str(result.output)})
        return
    print_inspection(result)
    print(f"written to {result.output}; open {result.output / 'index.html'} in a browser")
