"""`kvshare convert`: the one command."""

from __future__ import annotations

from typing import Annotated

import typer
from kvshare.cli import options
from kvshare.cli.comparison import print_reports
from kvshare.cli.render import print_choice, print_json, shown_progress, warn_of_contamination


def run(
    model: options.Model,
    output: options.Output,
    init: options.Init = None,
    kv_heads: options.KVHeads = None,
    cache_budget: options.CacheBudget = None,
    recipe: options.Recipe = None,
    calibration: Annotated[str | None, typer.Option(help=f"Text for the merge. {options.DATA}.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    heal: Annotated[bool | None, typer.Option("--heal/--no-heal", help="Distil after the merge.")] = None,
    heal_data: Annotated[str | None, typer.Option(help="Text to distil on; the calibration's when only that is given.")] = None,
    heal_tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out text for the final measurement.")] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    eval_mode: Annotated[
        str | None,
        typer.Option(help="whole: both models in memory; layers: layer by layer, for models that do not fit; off: no measurement."),
    ] = None,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Merge K and V, heal, measure, and write an ordinary checkpoint."""
    from kvshare import convert

    with shown_progress(quiet) as progress:
        result = convert(
            model,
            output,
            init=init,
            kv_heads=kv_heads,
            cache_budget=cache_budget,
            recipe=recipe,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            heal=heal,
            heal_data=heal_data,
            heal_tokens=heal_tokens,
            eval_data=eval_data,
            eval_tokens=eval_tokens,
            eval_mode=eval_mode,
            max_perplexity_increase=max_perplexity_increase,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    warn_of_contamination(result.contamination)
    if as_json:
        print_json(result.to_dict() | {"output": str(result.output)})
        return
    if result.sensitivity is not None:
        print_choice(result.sensitivity)
    if result.report is not None:
        print_reports([("converted", result.report)])
    print(f"written to {result.output}; load it with kvshare.load({str(result.output)!r})")
