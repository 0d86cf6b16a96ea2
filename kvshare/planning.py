"""What will happen to every tensor, with sizes, before any weight is touched.

In: a `Source`, a `Recipe`. Out: a `Plan`, which is printed, drives the writer and is what memory and disk are checked against.
Never: reads weights, writes anything.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvshare.budget import UNTOUCHED, LayerHeads, budget_units, form_reasons, head_units, resolve_heads, stored_heads
from kvshare.errors import UsageError
from kvshare.families import PARTS, Family
from kvshare.geometry import geometry_of, require_attention, require_tensor
from kvshare.headers import ITEM_BYTES, TensorSpec, data_bytes
from kvshare.hub import describe
from kvshare.memory import kept_bytes, peak_memory
from kvshare.mlx import mlx_config
from kvshare.recipe import CALIBRATED, Recipe, conversion_recipe
from kvshare.refusals import convertible_family, one_process_because, require_exact
from kvshare.rotated import require_rotated, rotated_config, rotated_reasons
from kvshare.sizes import bytes_of, shard_files
from kvshare.source import Source
from kvshare.tied import tied_reasons, tied_recipe

Action = Literal["copy", "merge"]


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor: `copy` keeps the source's bytes, `merge` computes it anew in `shape` and the source's dtype. It goes into
    the weight file `file`.
    """

    name: str
    action: Action
    dtype: str
    shape: tuple[int, ...]
    source: TensorSpec
    file: str

    @property
    def bytes(self) -> int:
        """The size of the output tensor in bytes."""
        return data_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Plan:
    """Everything a conversion will do.

    `config` is the output's config.json without the kvshare block; cache figures are bytes per token and sequence in the
    source's dtype; `reasons` says why each automatic choice was made. `kv_heads` are those that the config names and the
    weights are stored with; `layer_heads` those that each layer has. While a cache budget's choice is open it is None, and
    tensors and cache figures are the most that any choice needs.
    """

    source: Source
    family: Family
    recipe: Recipe
    config: dict[str, Any]
    layers: int
    source_kv_heads: int
    kv_heads: int
    layer_heads: LayerHeads | None
    head_dim: int
    tensors: tuple[TensorPlan, ...]
    source_cache_bytes_per_token: int
    cache_bytes_per_token: int
    reasons: tuple[str, ...]
    max_shard_bytes: int | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files of the output: those of the source, or as many as `max_shard_bytes` asks for."""
        return tuple(sorted({tensor.file for tensor in self.tensors}))

    @property
    def bytes_read(self) -> int:
        """Weight bytes that are read."""
        return sum(tensor.source.bytes for tensor in self.tensors)

    @property
    def bytes_written(self) -> int:
        """Weight bytes that are written, once."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def disk_bytes(self) -> int:
        """The most that lies on the disk at one time: the merged weights and, when healing, the healed ones beside them and what
        is kept of the source's probabilities.
        """
        if not self.recipe.heal.enabled:
            return self.bytes_written
        return 2 * self.bytes_written + kept_bytes(self.recipe.heal, self.config)

    @property
    def memory_bytes(self) -> int:
        """An estimate of peak memory, see `peak_memory`."""
        hidden = self.family.number("hidden_size", self.config)
        prefix = self.family.attention.partition("{layer}")[0] + "0."
        return peak_memory(self.recipe, [tensor.source for tensor in self.tensors], prefix, self.layers, hidden)

    @property
    def map_bytes(self) -> int:
        """The memory of what the exact form keeps beside the weights at run time; 0 in the shared form.

        Per layer W_V W_K^-1 and a third as much for rounding, in float32 where weights have 16 bits, else in float64.
        """
        if self.recipe.init != "exact":
            return 0
        width = 4 if ITEM_BYTES[self.source.tensors[self.family.weight(0, "k")].dtype] == 2 else 8
        return self.layers * self.family.number("hidden_size", self.config) ** 2 * width * 4 // 3

    @property
    def decode_multiply_adds(self) -> int:
        """Multiply-adds of one decoded token for every cached token, beyond native attention's; 0 in the shared form.

        Each query head averages the keys of all KV heads, hidden_size numbers, where natively it averages head_dim values.
        """
        if self.recipe.init != "exact":
            return 0
        query_heads, hidden = (self.family.number(name, self.config) for name in ("num_attention_heads", "hidden_size"))
        return self.layers * query_heads * (hidden - self.head_dim)

    @property
    def decode_overhead(self) -> float:
        """`decode_multiply_adds` relative to native attention's: head_dim each for score and value of every query head."""
        query_heads = self.family.number("num_attention_heads", self.config)
        return self.decode_multiply_adds / (2 * self.layers * query_heads * self.head_dim)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data, as `kvshare plan --json` prints it."""
        merged = [tensor for tensor in self.tensors if tensor.action == "merge"]
        alone = one_process_because(self.recipe)
        return {
            "model": self.source.name,
            "commit": self.source.commit,
            "model_type": self.family.model_type,
            "init": self.recipe.init,
            "form": self.recipe.form,
            "layers": self.layers,
            "source_kv_heads": self.source_kv_heads,
            "kv_heads": self.kv_heads,
            "layer_heads": None if self.layer_heads is None else [heads or UNTOUCHED for heads in self.layer_heads],
            "cache_budget": self.recipe.cache_budget,
            "head_dim": self.head_dim,
            "source_cache_bytes_per_token": self.source_cache_bytes_per_token,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "cache_reduction": 1 - self.cache_bytes_per_token / self.source_cache_bytes_per_token,
            "decode_multiply_adds_per_cached_token": self.decode_multiply_adds,
            "decode_overhead": self.decode_overhead,
            "map_bytes": self.map_bytes,
            "tensors_copied": len(self.tensors) - len(merged),
            "tensors_merged": len(merged),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "heals": self.recipe.heal.enabled,
            "heal_tokens": self.recipe.heal.tokens if self.recipe.heal.enabled else 0,
            "one_process_because": None if alone is None else "; ".join(alone),
            "reasons": list(self.reasons),
            "recipe": self.recipe.model_dump(mode="json"),
            "tensors": [
                {
                    "name": t.name,
                    "action": t.action,
                    "file": t.file,
                    "dtype": t.dtype,
                    "source_shape": list(t.source.shape),
                    "shape": list(t.shape),
                }
                for t in self.tensors
            ],
        }


def plan(
    model: str | Path,
    *,
    init: str | None = None,
    form: str | None = None,
    kv_heads: int | str | None = None,
    cache_budget: float | None = None,
    recipe: str | Path | Recipe | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    statistics: str | Path | None = None,
    heal: bool | None = None,
    heal_data: str | None = None,
    heal_tokens: int | None = None,
    eval_data: str | None = None,
    eval_tokens: int | None = None,
    eval_mode: str | None = None,
    max_perplexity_increase: float | None = None,
    mlx: bool | None = None,
    seed: int | None = None,
    max_shard_size: int | str | None = None,
) -> Plan:
    """What a conversion of `model` would do, from its config and its tensor headers alone.

    Args: those of `convert`, which see. A Hub model's weights are not downloaded.

    Raises:
        UsageError, UnsupportedModelError, BadCheckpointError: see the modules `recipe`, `families` and `source`.
    """
    settings = conversion_recipe(
        recipe,
        init,
        form,
        kv_heads,
        cache_budget,
        calibration,
        calibration_tokens,
        statistics,
        heal,
        heal_data,
        heal_tokens,
        eval_data,
        eval_tokens,
        eval_mode,
        seed,
        max_perplexity_increase,
        mlx,
    )
    most = None if max_shard_size is None else bytes_of(max_shard_size, "max_shard_size")
    return make_plan(describe(model), settings, max_shard_bytes=most)


def make_plan(source: Source, recipe: Recipe, chosen: LayerHeads | None = None, max_shard_bytes: int | None = None) -> Plan:
    """Lay a recipe over a source.

    Args:
        source: the model's config and headers.
        recipe: the settings.
        chosen: what a cache budget's search chose for each layer; None before it, and without a budget.
        max_shard_bytes: the most data that a weight file holds, a single larger tensor apart; None keeps the source's files.

    Raises:
        UnsupportedModelError: an unknown `model_type`, quantised weights, a checkpoint that is converted already, or init
            `exact` where W_K is not square.
        BadCheckpointError: tensors that are missing or do not have the shape that the config gives them.
        UsageError: `kv_heads` does not divide the source's, no choice meets `cache_budget`, or init `exact` is to merge heads.
    """
    config, family = source.config, convertible_family(source)
    geometry = geometry_of(config, family, source.name)
    layers, source_heads, head_dim, hidden = geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.hidden
    require_attention(source.tensors, family, geometry, source.name)
    reasons: list[str] = []
    if source.whole is not None:
        reasons.append(f"only the text model of this {source.whole} is converted: the output takes no images, audio or video")
    if recipe.form == "rotated":
        require_rotated(source, family)
    if family.tied:
        recipe = tied_recipe(recipe, source.name)
    if recipe.cache_budget is None:
        heads = resolve_heads(recipe.kv_heads, source_heads, reasons)
        without = {layer: None if layer in geometry.apart else 0 for layer in range(layers) if layer not in geometry.attention}
        chosen = tuple(without.get(layer, heads) for layer in range(layers))
    elif len(geometry.attention) < layers:
        raise UsageError(
            f"{source.name} cannot have a cache budget",
            f"{layers - len(geometry.attention)} of its {layers} layers have no K and V, and a budget is divided among all layers",
            "take kv_heads: every layer that has K and V gets the same number of heads",
        )
    # a head of K or V is one unit of cache
    units = budget_units(recipe.cache_budget or 1.0, layers, source_heads) if chosen is None else head_units(chosen, source_heads)
    heads = source_heads if chosen is None else stored_heads(chosen, source_heads)
    if not family.merges_heads(config) and (heads != source_heads or recipe.cache_budget is not None):
        wanted = f"{heads} KV heads" if recipe.cache_budget is None else "a cache budget"
        alone = "like this one has no number of KV heads in its config that could be another"
        raise UsageError(
            f"{source.name} cannot have {wanted}",
            f"a {family.model_type} model {'norms the keys of all heads as one' if family.wide_norm else alone}",
            "take kv_heads all: K and V become one projection, which is half the cache",
        )
    if recipe.init == "exact":
        require_exact(source, family, geometry, heads)
        if recipe.heal.enabled:
            recipe = recipe.model_copy(update={"heal": recipe.heal.model_copy(update={"enabled": False})})
            reasons.append("nothing is healed: init exact loses nothing that healing could bring back")
    shapes = geometry.shapes
    merged: dict[str, tuple[int, ...]] = {}
    for layer in geometry.attention:
        untouched = family.tied or (chosen is not None and chosen[layer] is None)
        for part in PARTS:
            changes = not untouched and recipe.init != "exact" and (part in "kv" or recipe.init in CALIBRATED)
            after = shapes | {"k": (heads * head_dim, hidden), "v": (heads * head_dim, hidden)}
            if changes:
                merged[family.weight(layer, part)] = family.stored_shape(part, after)
            bias = family.bias(layer, part)
            if bias in source.tensors and part != "o" and changes:
                require_tensor(source.tensors, bias, family.stored_shape(part, shapes, bias=True), source.name)
                merged[bias] = family.stored_shape(part, after, bias=True)
        if recipe.init == "learned" and not untouched:  # which trains the norms, too
            norms = [family.tensor(layer, f"{norm}.weight") for norm in (family.query_norm, family.key_norm)]
            merged |= {name: source.tensors[name].shape for name in norms if name in source.tensors}
    specs = sorted(source.tensors.values(), key=lambda spec: (spec.file, spec.start))
    stored = [merged.get(spec.name, spec.shape) for spec in specs]
    files = [spec.file for spec in specs]
    if max_shard_bytes is not None:
        files = shard_files([data_bytes(spec.dtype, shape) for spec, shape in zip(specs, stored, strict=True)], max_shard_bytes)
    tensors = tuple(
        TensorPlan(spec.name, "merge" if spec.name in merged else "copy", spec.dtype, shape, spec, file)
        for spec, shape, file in zip(specs, stored, files, strict=True)
    )
    key = source.tensors[family.weight(geometry.attention[0], "k")]
    per_head = head_dim * ITEM_BYTES[key.dtype]
    output_config = copy.deepcopy(config)
    if family.kv_heads == "num_key_value_heads":
        output_config |= {family.kv_heads: heads, "head_dim": head_dim}
    elif family.kv_heads and family.merges_heads(config):
        output_config[family.kv_heads] = heads
    for name in ("auto_map", "model_file"):  # code of the source
        output_config.pop(name, None)
    if recipe.mlx:
        output_config |= mlx_config(source)
        reasons.append("mlx: mlx-lm uses the smaller cache; it then takes the output with --trust-remote-code alone")
    if recipe.form == "rotated":
        output_config = rotated_config(output_config)
        reasons.extend(rotated_reasons(family.model_type))
    apart = 0  # bytes of layers that keep K and V in two
    for spec in (source.tensors.get(family.weight(layer, "k")) for layer in geometry.apart):
        apart += 0 if spec is None else 2 * spec.shape[0] * ITEM_BYTES[spec.dtype]
    if family.tied:
        units = heads * len(geometry.attention)
        reasons.extend(tied_reasons(geometry))
    elif recipe.init != "exact":
        reasons.extend(form_reasons(recipe.cache_budget, chosen, layers, source_heads, heads))
    if recipe.init == "mean" and not family.tied:
        reasons.append("init mean is the naive baseline; svd costs one pass over a little text and loses far less")
    plan = Plan(
        source,
        family,
        recipe,
        output_config,
        layers,
        source_heads,
        heads,
        chosen,
        head_dim,
        tensors,
        2 * source_heads * len(geometry.attention) * per_head + apart,
        units * per_head + apart,
        tuple(reasons),
        max_shard_bytes,
    )
    return replace(plan, reasons=(*reasons, *_exact_reasons(plan))) if recipe.init == "exact" else plan


def _exact_reasons(plan: Plan) -> tuple[str, str]:
    return (
        f"no weight changes: the cache keeps the keys of all {plan.kv_heads} heads before bias, norm and rope, and values are "
        "made of them by W_V W_K^-1; a near-singular W_K is refused when the weights are read",
        f"a decoded token takes {plan.decode_multiply_adds:,} multiply-adds more per cached token, {plan.decode_overhead:g} times "
        f"what attention takes natively, and {plan.map_bytes:,} bytes of maps lie in memory beside the weights",
    )
