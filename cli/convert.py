"""`kvshare convert`: the one command."""

from __future__ import annotations

from typing import Any

import typer
from kvshare.cli import options
from kvshare.cli.comparison import print_reports
from kvshare.cli.render import print_choice, print_json, print_plan, shown_progress, warn_of_contamination


def run(
    model: options.Model,
    output: options.Output,
    init: options.Init = None,
    form: options.Form = None,
    kv_heads: options.KVHeads = None,
    cache_budget: options.CacheBudget = None,
    recipe: options.Recipe = None,
    calibration: options.Calibration = None,
    calibration_tokens: options.Tokens = None,
    statistics: options.Statistics = None,
    heal: options.Heal = None,
    heal_data: options.HealData = None,
    heal_tokens: options.Tokens = None,
    eval_data: options.EvalData = None,
    eval_tokens: options.Tokens = None,
    eval_mode: options.EvalMode = None,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    mlx: options.MLX = None,
    seed: options.Seed = None,
    max_shard_size: options.MaxShardSize = None,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Merge K and V, heal, measure, and write an ordinary checkpoint. The same command goes on where it was interrupted."""
    from kvshare import convert, plan, processes
    from kvshare.conversion import check_conversion
    from kvshare.duration import estimate_seconds

    settings: dict[str, Any] = {
        "init": init,
        "form": form,
        "kv_heads": kv_heads,
        "cache_budget": cache_budget,
        "recipe": recipe,
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "statistics": statistics,
        "heal": heal,
        "heal_data": heal_data,
        "heal_tokens": heal_tokens,
        "eval_data": eval_data,
        "eval_tokens": eval_tokens,
        "eval_mode": eval_mode,
        "max_perplexity_increase": max_perplexity_increase,
        "mlx": mlx,
        "seed": seed,
        "max_shard_size": max_shard_size,
    }
    if dry_run:
        planned = plan(model, **settings)
        check_conversion(planned, output, overwrite)
        values = planned.to_dict() | {"seconds": estimate_seconds(planned), "output": str(output)}
        if as_json:
            print_json(values)
            return
        print_plan(values)
        print(f"nothing was written; without --dry-run, {output} would be")
        return
    first = processes.is_first()
    try:
        with shown_progress(quiet or not first) as progress:
            result = convert(model, output, **settings, overwrite=overwrite, restart=restart, progress=progress)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here, --restart begins again", err=True)
        raise
    if not first:
        return
    warn_of_contamination(result.contamination)
    if as_json:
        print_json(result.to_dict() | {"output": str(result.output)})
        return
    if result.sensitivity is not None:
        print_choice(result.sensitivity)
    if result.report is not None:
        print_reports([("converted", result.report)])
    print(f"written to {result.output}; load it with kvshare.load({str(result.output)!r})")
