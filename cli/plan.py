"""`kvshare plan`: what a conversion would do, without touching a weight."""

from __future__ import annotations

from kvshare.cli import options
from kvshare.cli.render import print_json, print_plan


def run(
    model: options.Model,
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
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show what a conversion would do: tensors, cache, disk, memory and time. Reads headers, no weights."""
    from kvshare import plan
    from kvshare.duration import estimate_seconds

    result = plan(
        model,
        init=init,
        form=form,
        kv_heads=kv_heads,
        cache_budget=cache_budget,
        recipe=recipe,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        statistics=statistics,
        heal=heal,
        heal_data=heal_data,
        heal_tokens=heal_tokens,
        eval_data=eval_data,
        eval_tokens=eval_tokens,
        eval_mode=eval_mode,
        max_perplexity_increase=max_perplexity_increase,
        mlx=mlx,
        seed=seed,
        max_shard_size=max_shard_size,
    )
    values = result.to_dict() | {"seconds": estimate_seconds(result)}
    if as_json:
        print_json(values)
        return
    print_plan(values)
