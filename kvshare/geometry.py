"""How large the attention of a model is, and whether its tensors are.

In: a config, a family, tensor headers. Out: a `Geometry`, or the error that names the field or tensor that does not fit.
Never: reads weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvshare.errors import BadCheckpointError, UnsupportedModelError
from kvshare.families import PARTS, Family, Part
from kvshare.headers import FLOATS, TensorSpec

SHARED: tuple[Part, Part] = ("k", "v")


@dataclass(frozen=True)
class Geometry:
    """The counts and widths that the shapes of all projections follow from; `hidden` is hidden_size. `attention` are the layers
    that have K and V, of all `layers`; in a tied family, those in which one projection makes both, of which head_dim and KV heads
    are, and `apart` those with K and V in two.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    attention: Sequence[int]
    apart: Sequence[int] = ()

    @property
    def shapes(self) -> dict[Part, tuple[int, int]]:
        """The (out, in) shape of each projection."""
        queries, keys = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, queries),
        }


def geometry_of(config: Mapping[str, Any], family: Family, model: str) -> Geometry:
    """What a config says of the attention.

    Args:
        config: the content of config.json.
        family: of its model_type.
        model: what to call it.

    Raises:
        BadCheckpointError: a field that is missing, no whole number or contradicts others; NaN or infinity in any field.
        UnsupportedModelError: no layer has K and V, or, in a tied family, makes them by one projection.
    """
    values = []
    for key in (family.field(name, config) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")):
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise BadCheckpointError(
                f"config.json of {model} has no usable {key}", f"it holds {value!r}", "download the model again"
            )
        values.append(value)
    layers, query_heads, hidden = values
    attention: Sequence[int] = range(layers)  # not a list: the config may claim any number
    apart: Sequence[int] = ()
    kv_heads, head_dim = family.kv_heads_of(config, query_heads), config.get("head_dim") or hidden // query_heads
    if family.tied:
        attention, apart = _tied_layers(config, family, layers, model)
        kv_heads, head_dim = _tied_sizes(config, attention, model)
    if not (type(kv_heads) is type(head_dim) is int) or min(kv_heads, head_dim) < 1 or query_heads % kv_heads or head_dim % 2:
        raise BadCheckpointError(
            f"config.json of {model} contradicts itself",
            f"{query_heads} query heads, {kv_heads!r} KV heads and head_dim {head_dim!r} do not fit together",
            "download the model again",
        )
    for key, value in config.items():
        if not _finite(value):
            raise BadCheckpointError(
                f"config.json of {model} holds NaN or infinity", f"it stands in {key}", "download the model again"
            )
    if family.without:
        attention = [layer for layer in attention if family.attends(config, layer)]
        if not attention:
            raise UnsupportedModelError(
                f"{model} has no layer with K and V",
                f"all its layers are {' or '.join(family.without)} layers, which keep no keys and values of earlier tokens",
                "use it as it is: there is nothing to share",
            )
    return Geometry(layers, query_heads, kv_heads, head_dim, hidden, attention, apart)


def _tied_layers(config: Mapping[str, Any], family: Family, layers: int, model: str) -> tuple[list[int], list[int]]:
    """The layers in which one projection makes K and V, and those with one for each; others borrow from an earlier layer."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise BadCheckpointError(
            f"config.json of {model} has no usable layer_types", f"it must name {layers} layers", "download the model again"
        )
    tied = [layer for layer in range(layers) if family.attends(config, layer)]
    if not tied:
        raise UnsupportedModelError(
            f"{model} has no layer in which one projection makes K and V",
            f"kvshare halves the cache of such layers (attention_k_eq_v) of a {family.model_type} model; where K and V are apart, "
            "values have a norm of their own, which no closed form knows",
            "use it as it is, or choose a model of another family",
        )
    return tied, [layer for layer in range(layers) if layer not in tied and not family.borrows(config, layer)]


def _tied_sizes(config: Mapping[str, Any], attention: Sequence[int], model: str) -> tuple[Any, Any]:
    """KV heads and head_dim of the layers in which one projection makes K and V, whatever stands there, if it is no number."""
    usual = {name: config.get(name) for name in ("num_key_value_heads", "head_dim")}
    found = []
    for layer in attention:
        own, every = {"head_dim": config.get("global_head_dim", 512)}, config.get("per_layer_config")
        if isinstance(config.get("num_global_key_value_heads"), int):
            own["num_key_value_heads"] = config["num_global_key_value_heads"]
        if isinstance(every, dict):
            own = every.get(str(layer), {})
        found.append(usual | own if isinstance(own, dict) else usual)
    if any(sizes != found[0] for sizes in found):
        raise UnsupportedModelError(
            f"the layers of {model} in which one projection makes K and V differ in size",
            f"per_layer_config gives them {', '.join(str(sizes) for sizes in found[:3])}",
            "choose another model",
        )
    return found[0]["num_key_value_heads"], found[0]["head_dim"]


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)


def require_attention(tensors: Mapping[str, TensorSpec], family: Family, geometry: Geometry, model: str) -> None:
    """Check that the projections of every layer with K and V are there, as large as the geometry says, in floating-point numbers.

    Raises:
        BadCheckpointError: a tensor is missing or has another shape, or K and V have different dtypes.
        UnsupportedModelError: it holds other numbers.
    """
    for layer in geometry.attention:  # ends at the first that is missing, however many the config claims
        for part in PARTS:
            require_tensor(tensors, family.weight(layer, part), family.stored_shape(part, geometry.shapes), model)
        key, value = (tensors[family.weight(layer, part)] for part in SHARED)
        if key.dtype != value.dtype:
            raise BadCheckpointError(
                f"the tensors {key.name} and {value.name} are stored as {key.dtype} and {value.dtype}",
                "what K and V share has one dtype",
                "store the model in one dtype",
            )


def require_tensor(tensors: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...], model: str) -> None:
    """Check one tensor. Args and errors as for `require_attention`."""
    spec = tensors.get(name)
    if spec is None:
        raise BadCheckpointError(
            f"the tensor {name} is missing in {model}", "the family keeps its attention there", "download the model again"
        )
    if spec.shape != shape:
        raise BadCheckpointError(
            f"the tensor {name} has the shape {list(spec.shape)}", f"config.json asks for {list(shape)}", "download the model again"
        )
    if spec.dtype not in FLOATS:
        raise UnsupportedModelError(
            f"the tensor {name} is stored as {spec.dtype}", f"the merge reads {', '.join(FLOATS)}", "convert the unquantised model"
        )
