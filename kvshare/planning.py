"""What will happen to every tensor, with sizes, before any weight is touched.

In: a `Source`, a `Recipe`. Out: a `Plan`, which is printed, drives the writer and is what memory and disk are checked against.
Never: reads weights, writes anything.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvshare.budget import UNTOUCHED, LayerHeads, budget_units, divisors, head_units, stored_heads
from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.families import PARTS, Family, family_of
from kvshare.hub import describe
from kvshare.recipe import Recipe, load_recipe
from kvshare.source import FLOATS, ITEM_BYTES, Source, TensorSpec

Action = Literal["copy", "merge"]
CALIBRATED = ("svd", "learned")


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor: `copy` keeps the source's bytes, `merge` computes it anew in `shape` and the source's dtype."""

    name: str
    action: Action
    dtype: str
    shape: tuple[int, ...]
    source: TensorSpec

    @property
    def bytes(self) -> int:
        """The size of the output tensor in bytes."""
        size = ITEM_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


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

    @property
    def files(self) -> tuple[str, ...]:
        """The weight files of the output, the same as the source's."""
        return tuple(sorted({tensor.source.file for tensor in self.tensors}))

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
        """The most that lies on the disk at one time: the merged and, when healing, the healed weights beside them."""
        return self.bytes_written * (2 if self.recipe.heal.enabled else 1)

    @property
    def memory_bytes(self) -> int:
        """An estimate of peak memory: weights in float32 (source and, when healing, student), activations, libraries.

        Activations are hidden states of all calibration tokens: two streams, what they should give, what comes next, and
        the inputs of one attention layer.
        """
        source = self.bytes_read
        if self.recipe.init == "mean" and not self.recipe.heal.enabled:
            return max(tensor.bytes for tensor in self.tensors) * 10 + 500_000_000
        hidden = int(self.config["hidden_size"])
        calibration = 5 * 4 * hidden * self.recipe.calibration.tokens
        copies = 2 if self.recipe.heal.enabled else 1
        width = max((4 / ITEM_BYTES[tensor.dtype] for tensor in self.tensors), default=1.0)
        return int(source * width * copies + calibration) + 1_500_000_000

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data, as `kvshare plan --json` prints it."""
        merged = [tensor for tensor in self.tensors if tensor.action == "merge"]
        return {
            "model": self.source.name,
            "commit": self.source.commit,
            "model_type": self.family.model_type,
            "init": self.recipe.init,
            "layers": self.layers,
            "source_kv_heads": self.source_kv_heads,
            "kv_heads": self.kv_heads,
            "layer_heads": None if self.layer_heads is None else [heads or UNTOUCHED for heads in self.layer_heads],
            "cache_budget": self.recipe.cache_budget,
            "head_dim": self.head_dim,
            "source_cache_bytes_per_token": self.source_cache_bytes_per_token,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "cache_reduction": 1 - self.cache_bytes_per_token / self.source_cache_bytes_per_token,
            "tensors_copied": len(self.tensors) - len(merged),
            "tensors_merged": len(merged),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "heals": self.recipe.heal.enabled,
            "heal_tokens": self.recipe.heal.tokens if self.recipe.heal.enabled else 0,
            "reasons": list(self.reasons),
            "recipe": self.recipe.model_dump(mode="json"),
            "tensors": [
                {
                    "name": t.name,
                    "action": t.action,
                    "file": t.source.file,
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
    kv_heads: int | str | None = None,
    cache_budget: float | None = None,
    recipe: str | Path | Recipe | None = None,
) -> Plan:
    """What a conversion of `model` would do, from its config and its tensor headers alone.

    Args:
        model: a Hub id (with `@revision`), a local folder, or `kvshare/tiny`.
        init: `mean`, `svd` or `learned`; None as the recipe says.
        kv_heads: KV heads of the output, a divisor of the source's, or a fraction such as `1/4`; None as the recipe says.
        cache_budget: the most of the source's cache to keep, in place of `kv_heads`; None as the recipe says.
        recipe: a shipped recipe's name, a YAML file or a `Recipe`; None for the default.

    Raises:
        UsageError, UnsupportedModelError, BadCheckpointError: see the modules `recipe`, `families` and `source`.
    """
    return make_plan(describe(model), load_recipe(recipe, init=init, kv_heads=kv_heads, cache_budget=cache_budget))


def make_plan(source: Source, recipe: Recipe, chosen: LayerHeads | None = None) -> Plan:
    """Lay a recipe over a source.

    Args:
        source: the model's config and headers.
        recipe: the settings.
        chosen: what a cache budget's search chose for each layer; None before it, and without a budget.

    Raises:
        UnsupportedModelError: an unknown `model_type`, quantised weights, or a checkpoint that is already shared.
        BadCheckpointError: tensors that are missing or do not have the shape that the config gives them.
        UsageError: `kv_heads` does not divide the source's, or no choice meets `cache_budget`.
    """
    config = source.config
    if "kvshare" in config:
        raise UnsupportedModelError(
            f"{source.name} is a kvshare checkpoint already",
            "its K and V are one projection",
            "convert the model it came from, with the settings you want",
        )
    family = family_of(source.model_type)
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{source.name} is quantised",
            "the merge needs the projections as floating-point numbers",
            "convert the unquantised model and quantise the result",
        )
    architecture = config.get("architectures")
    if not (isinstance(architecture, list) and len(architecture) == 1 and str(architecture[0]).endswith("ForCausalLM")):
        raise UnsupportedModelError(
            f"{source.name} is not a causal language model",
            f"config.json names the architectures {architecture!r}",
            "give a model whose architecture ends in ForCausalLM",
        )
    layers, query_heads, source_heads, head_dim, hidden = _geometry(source)
    reasons: list[str] = []
    if recipe.cache_budget is None:
        chosen = (_resolve_heads(recipe.kv_heads, source_heads, query_heads, reasons),) * layers
    # a head of K or V is one unit of cache
    units = budget_units(recipe.cache_budget or 1.0, layers, source_heads) if chosen is None else head_units(chosen, source_heads)
    heads = source_heads if chosen is None else stored_heads(chosen, source_heads)
    shapes = {
        "q": (query_heads * head_dim, hidden),
        "k": (source_heads * head_dim, hidden),
        "v": (source_heads * head_dim, hidden),
        "o": (hidden, query_heads * head_dim),
    }
    merged: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        untouched = chosen is not None and chosen[layer] is None
        for part in PARTS:
            expected = shapes[part]
            _require(source, family.weight(layer, part), expected)
            changes = not untouched and (part in "kv" or recipe.init in CALIBRATED)
            rows = heads * head_dim if part in "kv" else expected[0]
            if changes:
                merged[family.weight(layer, part)] = (rows, expected[1])
            bias = family.bias(layer, part)
            if bias in source.tensors and part != "o" and changes:
                _require(source, bias, expected[:1])
                merged[bias] = (rows,)
    tensors = tuple(
        TensorPlan(spec.name, "merge" if spec.name in merged else "copy", spec.dtype, merged.get(spec.name, spec.shape), spec)
        for spec in sorted(source.tensors.values(), key=lambda spec: (spec.file, spec.start))
    )
    key = source.tensors[family.weight(0, "k")]
    per_head = head_dim * ITEM_BYTES[key.dtype]
    output_config = copy.deepcopy(config) | {"num_key_value_heads": heads, "head_dim": head_dim}
    output_config.pop("auto_map", None)
    reasons.extend(_form(recipe, chosen, layers, source_heads, heads))
    if recipe.init == "mean":
        reasons.append("init mean is the naive baseline; svd costs one pass over a little text and loses far less")
    return Plan(
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
        2 * source_heads * layers * per_head,
        units * per_head,
        tuple(reasons),
    )


def _geometry(source: Source) -> tuple[int, int, int, int, int]:
    """Layers, query heads, KV heads, head_dim and hidden_size of a config."""
    config = source.config
    values = []
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise BadCheckpointError(
                f"config.json of {source.name} has no usable {key}", f"it holds {value!r}", "download the model again"
            )
        values.append(value)
    layers, query_heads, hidden = values
    kv_heads = config.get("num_key_value_heads") or query_heads
    head_dim = config.get("head_dim") or hidden // query_heads
    if type(kv_heads) is not int or type(head_dim) is not int or kv_heads < 1 or query_heads % kv_heads or head_dim % 2:
        raise BadCheckpointError(
            f"config.json of {source.name} contradicts itself",
            f"{query_heads} query heads, {kv_heads!r} KV heads and head_dim {head_dim!r} do not fit together",
            "download the model again",
        )
    return layers, query_heads, kv_heads, head_dim, hidden


def _resolve_heads(wanted: int | str, source_heads: int, query_heads: int, reasons: list[str]) -> int:
    if wanted == "all":
        return source_heads
    if isinstance(wanted, str):
        divisor = int(wanted.partition("/")[2])
        if divisor > source_heads:
            reasons.append(f"kv_heads {wanted} of {source_heads} heads is less than one head: 1 is taken")
            return 1
        heads, rest = divmod(source_heads, divisor)
        reasons.append(f"kv_heads {wanted} of {source_heads} heads is {heads}")
        if not rest:
            return heads
    elif source_heads % wanted == 0:
        return wanted
    fitting = [str(count) for count in reversed(divisors(source_heads))]
    raise UsageError(
        f"{wanted} KV heads cannot be made of {source_heads}",
        "every output head takes in the same number of source heads",
        f"choose one of: {', '.join(fitting)}",
    )


def _form(recipe: Recipe, chosen: LayerHeads | None, layers: int, source_heads: int, heads: int) -> list[str]:
    """What becomes of the layers, and why."""
    if chosen is None:
        options = " or ".join(str(count) for count in divisors(source_heads))
        return [
            f"cache budget {recipe.cache_budget:g}: what each layer bears is measured on calibration text, then each is left "
            f"untouched or shares {options} heads, so that the least is lost within the budget; until then sizes are upper bounds",
            f"per-layer head counts are not native to this architecture: a layer of fewer heads is stored with its heads repeated, "
            f"stock transformers caches up to {source_heads} heads there and K and V apart, kvshare's runtime only what is chosen",
        ]
    shared = [count for count in chosen if count is not None]
    if len(shared) == layers and len(set(shared)) == 1:
        return [
            f"K and V become one projection in all {layers} layers: the cache keeps one tensor of {heads} heads "
            f"instead of two of {source_heads}"
        ]
    reasons = [f"{layers - len(shared)} of {layers} layers stay untouched" + (", the others share K and V" if shared else "")]
    if set(shared) - {heads}:
        reasons.append(
            f"per-layer head counts are not native to this architecture: layers of fewer than {heads} heads are stored with "
            f"their heads repeated; stock transformers caches {heads} heads there, kvshare's runtime one of each"
        )
    return reasons


def _require(source: Source, name: str, shape: tuple[int, ...]) -> None:
    spec = source.tensors.get(name)
    if spec is None:
        raise BadCheckpointError(
            f"the tensor {name} is missing in {source.name}", "the family keeps its attention there", "download the model again"
        )
    if spec.shape != shape:
        raise BadCheckpointError(
            f"the tensor {name} has the shape {list(spec.shape)}", f"config.json asks for {list(shape)}", "download the model again"
        )
    if spec.dtype not in FLOATS:
        raise UnsupportedModelError(
            f"the tensor {name} is stored as {spec.dtype}", f"the merge reads {', '.join(FLOATS)}", "convert the unquantised model"
        )
