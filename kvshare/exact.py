"""Whether a source has an exact form, and what its cache does: values made of keys by the inverse of the key projection.

In: a plan whose init is `exact`; a model in exact form. Out: an `ExactLayer` per layer; a forward through a cache to measure.
Never: changes a weight, holds the weights of more than one layer of the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvshare.errors import UnsupportedModelError
from kvshare.headers import ITEM_BYTES
from kvshare.planning import Plan
from kvshare.progress import Progress
from kvshare.runtime.kvshare_attention import ATTENTIONS, first_of, layers_of
from kvshare.runtime.kvshare_cache import cache_name
from kvshare.runtime.modeling_kvshare import VALUE_ERROR, exact_maps, round_keys
from kvshare.tensors import DTYPES, best_device, read_tensor


@dataclass(frozen=True)
class ExactLayer:
    """One layer of the exact form: `condition`, the condition number of W_K (2-norm); `value_error`, by how much of their size
    values made of cached keys are off, root mean square, with inputs of equal variance in all directions.
    """

    layer: int
    condition: float
    value_error: float


def check_layers(plan: Plan, progress: Progress) -> tuple[ExactLayer, ...]:
    """Read W_K and W_V layer by layer and hold what values lose against what they may.

    Raises:
        UnsupportedModelError: a W_K that is singular, or so nearly that values would lose more than `VALUE_ERROR`.
        BadCheckpointError: NaN or infinity in a projection.
    """
    reports = []
    for layer in range(plan.layers):
        progress("checking layers", layer, plan.layers)
        specs = [plan.source.tensors[plan.family.weight(layer, part)] for part in ("k", "v")]
        key, value = (read_tensor(plan.source.path, spec) for spec in specs)
        report = check_layer(key, value, layer, DTYPES[specs[0].dtype])
        if not report.value_error <= VALUE_ERROR:
            raise _near_singular(plan, report, specs[0].dtype)
        reports.append(report)
    progress("checking layers", plan.layers, plan.layers)
    return tuple(reports)


def _near_singular(plan: Plan, report: ExactLayer, dtype: str) -> UnsupportedModelError:
    lost = (
        f"be off by {report.value_error:.1%}" if math.isfinite(report.value_error) else "be off without bound, there is no inverse"
    )
    store = "; or store the source in float32, which bears larger condition numbers" if ITEM_BYTES[dtype] == 2 else ""
    return UnsupportedModelError(
        f"W_K of layer {report.layer} of {plan.source.name} is near-singular: its condition number is {report.condition:.3g}",
        f"values made of keys that are cached in {dtype} would {lost}; the limit is {VALUE_ERROR:.0%} of their size",
        f"use init svd, which inverts nothing{store}",
    )


def check_layer(key: Tensor, value: Tensor, layer: int, dtype: torch.dtype) -> ExactLayer:
    """What making values of keys does to one layer.

    Args:
        key, value: W_K and W_V, both (hidden, hidden).
        layer: its index.
        dtype: what the cache holds.
    """
    device = best_device()
    key, value = key.to(device, torch.float64), value.to(device, torch.float64)
    return ExactLayer(layer, float(torch.linalg.cond(key)), exact_maps(key, value, dtype).error)


def through_cache(model: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A forward of a model in exact form, (batch, tokens) to logits, that reads keys and values from a cache in `dtype`.

    The first token goes in alone, so that all others read values made of cached keys: of tokens that come in together with
    nothing before them, the model knows the values natively.
    """
    from transformers import DynamicCache

    attentions = [first_of(layer, ATTENTIONS) for layer in layers_of(model.get_decoder())]
    maps = [exact_maps(attention.k_proj.weight, attention.v_proj.weight, dtype) for attention in attentions]

    class Rounding(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys = key_states.transpose(1, 2)  # (batch, new tokens, kv heads, head_dim)
            rounded = round_keys(maps[layer_idx], keys.flatten(2).to(maps[layer_idx].values.dtype), dtype)
            rounded = rounded.to(keys.dtype).view(keys.shape).transpose(1, 2)
            return super().update(rounded, value_states, layer_idx, *args, **kwargs)

    name = cache_name(type(model))

    def forward(ids: Tensor) -> Tensor:
        cache = Rounding(config=model.config)
        return torch.cat([model(input_ids=part, **{name: cache}).logits for part in (ids[:, :1], ids[:, 1:])], dim=1)

    return forward
