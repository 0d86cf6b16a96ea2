"""`kvshare plan`: what a conversion would do, without touching a weight."""

from __future__ import annotations

from kvshare.cli import options
from kvshare.cli.render import print_json, print_table, size


def run(
    model: options.Model,
    init: options.Init = None,
    kv_heads: options.KVHeads = None,
    cache_budget: options.CacheBudget = None,
    recipe: options.Recipe = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show what a conversion would do: tensors, cache, disk and memory. Reads headers, no weights."""
    from kvshare import plan

    result = plan(model, init=init, kv_heads=kv_heads, cache_budget=cache_budget, recipe=recipe)
    values = result.to_dict()
    if as_json:
        print_json(values)
        return
    open_choice = values["layer_heads"] is None
    bound = "at most " if open_choice else ""
    print_table(
        f"{values['model']} ({values['model_type']}, {values['layers']} layers)",
        [
            ("KV heads", str(values["source_kv_heads"]), "by layer" if open_choice else str(values["kv_heads"])),
            ("KV cache per token", size(values["source_cache_bytes_per_token"]), bound + size(values["cache_bytes_per_token"])),
            ("KV cache saved", "", f"{'at least ' if open_choice else ''}{values['cache_reduction']:.2%}"),
            ("weights", size(values["bytes_read"]), size(values["bytes_written"])),
            ("tensors merged / copied", "", f"{values['tensors_merged']} / {values['tensors_copied']}"),
            ("init", "", values["init"]),
            ("healing", "", f"{values['heal_tokens']:,} tokens" if values["heals"] else "none"),
            ("disk needed", "", size(values["disk_bytes"])),
            ("memory needed, about", "", size(values["memory_bytes"])),
        ],
        ("", "source", "converted"),
    )
    for reason in values["reasons"]:
        print(f"- {reason}")
