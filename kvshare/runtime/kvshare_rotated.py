# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""The rotated form: what is cached is the rotated key, it is K and V of stock attention, and each output is turned back.

In: a checkpoint whose `kvshare` block names the form `rotated`. Out: a model of its own kind, which no native class computes:

    s_j = norm(W x_j + b)        cached: R(j) s_j        o_i = R(i)^-1 sum_j p_ij R(j) s_j = sum_j p_ij R(j - i) s_j

Its `model_type`, its `architectures` and the type of its rope are none that others know, so whatever does not run this file refuses
the checkpoint instead of computing something else. Never: imports kvshare, makes keys anew on a read.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

The rotated key lies in the key slot of any cache, its value slot holds a tensor of width zero. A bias of values is added to each
head's output: attention weights sum to one. Numbers that rope does not turn, and layers without rope, have nothing to turn back.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kvshare_attention import LOGGER, Plan, attend, choose, first_of
from .kvshare_bits import BITS, dequantise
from .kvshare_cache import admit, cache_name, cache_of, into_pages, passed_on, update
from .kvshare_classes import derived
from .kvshare_projections import SharedProjection, ValueBias, outer_bias
from .modeling_kvshare import (
    NORMS,
    Rotary,
    _attention,
    _by_stock,
    _normed,
    _rotated,
    _rotates,
    _standard,
    _stored_heads,
    _to_hidden,
    _unique,
    shared_class,
)

if TYPE_CHECKING:  # as in modeling_kvshare.py
    from .kvshare_c import SOURCE  # noqa: F401
    from .kvshare_channels import channels_on  # noqa: F401
    from .kvshare_cpu import TILE  # noqa: F401
    from .kvshare_kernels import attend_kernel  # noqa: F401
    from .kvshare_positions import follow  # noqa: F401
    from .kvshare_splits import join_kernel  # noqa: F401
    from .kvshare_tables import turn_queries  # noqa: F401
    from .kvshare_tiles import numbers  # noqa: F401
    from .kvshare_triton import attend_on_gpu  # noqa: F401

PREFIX, NAME = "kvshare_rotated_", "KVShareRotated"  # of model types and types of rope, and of the names of classes
ROPES = ("rope_parameters", "rope_scaling")  # where configs say what rope they mean
PLAIN_ROPES = ("default", "linear", "llama3")  # whose cosines and sines are of length one
KNOWN_ROPES = (*PLAIN_ROPES, "yarn")  # whose frequencies do not change with the length of the text


def rope_type(config: Any) -> str:
    """What kind of rope a config asks for; `default` where it says nothing, `several` where layers differ.

    Args:
        config: a transformers config, or the content of config.json.
    """
    values = config if isinstance(config, dict) else vars(config)
    asked: Any = next((values[name] for name in ROPES if isinstance(values.get(name), dict)), {})
    if any(isinstance(value, dict) for value in asked.values()):
        return "several"
    return str(asked.get("rope_type", asked.get("type", "default")))


def marked(config: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json with a type of rope that no native class computes; the rest of it as it is."""
    name = next((name for name in ROPES if isinstance(config.get(name), dict)), ROPES[0])
    rope = {key: value for key, value in (config.get(name) or {}).items() if key != "type"}
    return config | {name: rope | {"rope_type": PREFIX + rope_type(config).removeprefix(PREFIX)}}


def unmarked(rope: Any) -> Any:
    """The rope of a config whose type `marked` has changed, as the native class knows it."""
    if not isinstance(rope, dict) or "rope_type" not in rope:
        return rope
    return rope | {"rope_type": str(rope["rope_type"]).removeprefix(PREFIX)}


def turning_back(tables: Rotary, plain: bool) -> Rotary:
    """The tables that undo the rotation of these.

    Args:
        tables: cosines and sines, (batch or 1, tokens, width).
        plain: whether they are of length one; yarn multiplies both by a factor.
    """
    cosine, sine = tables
    if plain:
        return cosine, -sine
    size = cosine.float().square() + sine.float().square()
    return (cosine.float() / size).to(cosine.dtype), (-sine.float() / size).to(sine.dtype)


@functools.cache
def _attention_class(native: type[nn.Module]) -> type[nn.Module]:
    """The rotated form of an attention class with q_proj, k_proj, v_proj and an output projection."""
    module = sys.modules[native.__module__]
    rotate, eager = module.apply_rotary_pos_emb, module.eager_attention_forward
    cache = cache_name(native)

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Rotary = (),
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        kvshare_backend: str = "eager",
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        past_key_values = cache_of(past_key_values, kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (batch, query heads, new tokens, head_dim)
        made = self.k_proj(hidden_states)
        shared = _unique(made.view(heads), self.kvshare_repeat)
        shared = shared.transpose(1, 2)  # (batch, kv heads, new tokens, head_dim)
        query_norm, key_norm = (first_of(self, names) for names in NORMS)
        if query_norm is not None:
            query, shared = _normed(query_norm, query), _normed(key_norm, shared)
        if self.kvshare_rotates:
            width = position_embeddings[0].shape[-1]
            query, shared = (_rotated(rotate, states, position_embeddings, width) for states in (query, shared))
        scales: Tensor | None = None
        if past_key_values is not None:  # (batch, kv heads, slots, head_dim)
            shared, scales = update(past_key_values, shared, self.layer_idx, self)
        weights: Tensor | None = None
        if kvshare_backend != "eager" and past_key_values is not None:
            none = query.new_empty(0, dtype=torch.float32)
            output = attend(self, query, shared, scales, (kvshare_backend, none, none), attention_mask, None, None, {})
        else:
            if scales is not None:
                shared = dequantise(shared, scales, query.dtype)
            stock = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
            key, value = into_pages(cache, shared, shared, self.layer_idx, kwargs)
            output, weights = _by_stock(self, stock, query, key, value, attention_mask, kwargs)
        if self.kvshare_rotates:
            back = turning_back(position_embeddings, self.kvshare_plain_rope)
            output = _rotated(rotate, output.transpose(1, 2), back, width).transpose(1, 2)
        value_bias = outer_bias(self.v_proj, made)
        if value_bias is not None:  # (kv heads, head_dim) -> that of each query head
            each = _unique(value_bias.view(-1, self.head_dim), self.kvshare_repeat)
            output = output + each.repeat_interleave(output.shape[2] // len(each), 0)
        return _to_hidden(self, output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return derived(_attention_class, native, {"forward": forward})


def _layer_type(attention: Any) -> str:
    """The kind of layer that an attention module is of, as the config names it."""
    kinds = getattr(attention.config, "layer_types", None)
    return str(kinds[attention.layer_idx]) if kinds else "full_attention"


def rotate_attention(attention: Any, repeat: int = 1, bits: int | None = None) -> None:
    """Have an attention module compute the rotated form; its projections stay as they are.

    Args:
        attention: of a family of the rotated form.
        repeat: equal heads in a row of what its k_proj gives.
        bits: of the cache, see `kvshare_bits`.
    """
    native: Any = type(attention)
    attention.kvshare_repeat, attention.kvshare_bits = repeat, bits
    attention.kvshare_pairs = attention.kvshare_norm = None  # what a kernel is to do to keys: nothing
    attention.kvshare_channels = None  # a rotated channel has no mean of its own
    attention.kvshare_rotates = _rotates(attention, _layer_type(attention))
    attention.kvshare_plain_rope = rope_type(attention.config) in PLAIN_ROPES
    attention.__class__ = _attention_class(native)


@functools.cache
def _decoder_class(native: type[nn.Module]) -> type[nn.Module]:
    """The rotated form of a decoder: it chooses once per forward what attends to the cache."""
    cache = cache_name(native)

    def forward(self: Any, input_ids: Any = None, *, past_key_values: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        past_key_values = cache_of(past_key_values, kwargs)
        if past_key_values is not None:
            admit(self, past_key_values)
        if past_key_values is not None and not torch.compiler.is_compiling():  # which sees a whole forward in eager attention
            new = inputs_embeds.shape[1]
            slots = [past_key_values.get_mask_sizes(new, layer)[0] for layer in self.kvshare_kinds.values()]
            choice = choose(self, inputs_embeds, max(slots, default=0), kwargs)
            if self.kvshare_choice != choice:
                LOGGER.debug("%s attention: %s", *choice)
            self.kvshare_choice = choice
            if choice.backend != "eager":
                kwargs["kvshare_backend"] = choice.backend
        return native.forward(self, inputs_embeds=inputs_embeds, **passed_on(cache, past_key_values, kwargs))

    return derived(_decoder_class, native, {"forward": forward, "is_custom_code": _standard})


def _rotate(model: Any) -> None:
    """Give the layers that the config's kvshare block names their rotated attention."""
    block = getattr(model.config, "kvshare", None)
    if not isinstance(block, dict) or block.get("form") != "rotated" or "layers" not in block:
        raise ValueError("this config has no kvshare block of the form 'rotated': convert the model with --form rotated")
    if (rope := rope_type(model.config)) not in KNOWN_ROPES:
        raise ValueError(f"a rope of the type {rope!r} cannot be turned back: the rotated form knows {', '.join(KNOWN_ROPES)}")
    bits = block.get("cache_bits")
    if bits not in (None, *BITS):
        raise ValueError(f"cache_bits is {bits!r}: it is 8 or 4, or not there")
    decoder = model.get_decoder()
    kinds: dict[str, int] = {}
    made: set[tuple[int, int, bool]] = set()
    for layer, heads in zip(block["layers"], block.get("kv_heads") or [None] * len(block["layers"]), strict=True):
        attention = _attention(decoder.layers[layer])
        attention.kvshare_stored = stored = _stored_heads(attention, model.config.num_attention_heads)
        attention.kvshare_heads = heads or stored
        rotate_attention(attention, stored // attention.kvshare_heads, bits)
        attention.v_proj = ValueBias(attention.v_proj)
        attention.k_proj.__class__ = SharedProjection
        attention.k_proj.kvshare_biased = True
        kinds.setdefault(_layer_type(attention), layer)
        made.add((attention.head_dim, 0, False))
    native: Any = type(decoder)
    decoder.kvshare_kinds, decoder.kvshare_bits, decoder.kvshare_choice = kinds, bits, None
    decoder.kvshare_plan = Plan(None, tuple(sorted(made)), {})
    decoder.kvshare_tried = None
    decoder.__class__ = _decoder_class(native)


@functools.cache
def rotated_config(native: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class of the rotated form of a family: that of the family under another `model_type`."""

    def complete(self: Any, **kwargs: Any) -> None:
        self.rope_parameters = unmarked(vars(self).get(ROPES[0]))
        native.__post_init__(self, **{name: unmarked(value) if name in ROPES else value for name, value in kwargs.items()})

    def to_dict(self: Any) -> dict[str, Any]:
        return marked(native.to_dict(self))

    members = {
        "model_type": f"{PREFIX}{native.model_type}",
        "__post_init__": complete,
        "to_dict": to_dict,
        "__module__": __name__,
        "__doc__": f"{native.__name__} of the rotated form.",
    }
    return type(f"{NAME}{native.__name__}", (native,), members)


@functools.cache
def rotated_class(native: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The rotated form of a causal language model class, under a name of its own: what reads `architectures` must not take it for
    the native one.
    """
    shared: Any = shared_class(native)  # type: ignore[arg-type]

    def initialise(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, config, *args, **kwargs)
        _rotate(self)

    members = {
        "__init__": initialise,
        "config_class": rotated_config(native.config_class),
        "__module__": __name__,
        "__doc__": f"{native.__name__} whose cache holds rotated keys, which are its values, too.",
    }
    return type(f"{NAME}{native.__name__}", (shared,), members)


def __getattr__(name: str) -> Any:
    """The rotated form of any native config or causal language model class: `KVShareRotatedLlamaConfig`."""
    native: Any = getattr(transformers, name.removeprefix(NAME), None) if name.startswith(NAME) else None
    if native is not None and name.endswith("Config"):
        return rotated_config(native)
    if native is not None and name.endswith("ForCausalLM"):
        return rotated_class(native)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
