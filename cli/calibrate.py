"""`kvshare calibrate`: statistics that conversions without text start from."""

from __future__ import annotations

from typing import Annotated

import typer
from kvshare.cli import options
from kvshare.cli.render import print_json, shown_progress, size


def run(
    model: options.Model,
    output: options.Output,
    kv_heads: options.KVHeads = None,
    recipe: options.Recipe = None,
    data: Annotated[str | None, typer.Option(help=f"Text. {options.DATA}, the default.")] = None,
    tokens: options.Tokens = None,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Pass text through a model, a layer at a time, and keep what the closed form needs to know of it."""
    from kvshare import calibrate
    from kvshare.hub import describe
    from kvshare.planning import make_plan
    from kvshare.statistics import calibration_recipe, check_calibration, statistics_bytes

    if dry_run:
        planned = make_plan(describe(model), calibration_recipe(recipe, kv_heads, data, tokens, seed))
        check_calibration(planned, output, overwrite)
        needed = statistics_bytes(planned)
        if as_json:
            print_json({"output": str(output), "kv_heads": planned.kv_heads, "layers": planned.layers, "disk_bytes": needed})
            return
        print(f"nothing was written; {output} would hold {planned.layers} layers for {planned.kv_heads} KV heads, {size(needed)}")
        return
    with shown_progress(quiet) as progress:
        result = calibrate(
            model,
            output,
            kv_heads=kv_heads,
            recipe=recipe,
            data=data,
            tokens=tokens,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json({"output": str(output), "tokens": result.tokens, "layers": len(result.groupings)})
        return
    print(f"{result.tokens:,} tokens of {result.data}; convert with --statistics {output}")
