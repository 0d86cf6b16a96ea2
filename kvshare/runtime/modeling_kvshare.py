# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""The shared-cache form of a native transformers model. This file is shipped inside every kvshare checkpoint.

In: a native checkpoint whose k_proj and v_proj weights are equal, with a `kvshare` block in its config. Out: the same
function, with one tensor per token in the cache where the native class keeps two. Needs transformers and torch alone.
Never: imports kvshare, changes what the weights compute.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

The cache's key slot holds the shared projection before norm and rope, its value slot a tensor of width zero. Keys are
made from it on every read, so any cache that takes keys and values of different widths works unchanged.

Layers may differ: those that the block does not name stay native, and one with fewer heads than the config says is stored
with each head repeated, which the native class computes as it is; here one of each is computed, kept and cached.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Rotary = tuple[Tensor, Tensor]  # cos and sin, (batch, tokens, rotated width)


class SharedProjection(nn.Linear):
    """k_proj without its bias: what keys and values have in common. Its bias stays a parameter and is added to keys."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., hidden) -> (..., kv heads * head_dim)."""
        return nn.functional.linear(input, self.weight)


class ValueBias(nn.Module):
    """What is left of v_proj: its bias, under the name it has in the checkpoint."""

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias


def _unique(x: Tensor, repeat: int) -> Tensor:
    """One of every `repeat` equal heads: (..., stored heads, head_dim) -> (..., stored heads / repeat, head_dim)."""
    return x if repeat == 1 else x[..., ::repeat, :]


def key_positions(cache: Any, layer: int, position_ids: Tensor) -> Tensor:
    """The position of every slot that attention will read in `layer`, before the cache takes the new tokens in.

    Counted back from the last query: `generate` gives left padding the position 0, so the first one tells nothing.

    Args:
        cache: a transformers cache.
        layer: a layer of the kind whose slots are wanted.
        position_ids: (batch or 1, new tokens).

    Returns:
        (batch or 1, slots); slots of padding hold any number, attention masks them.
    """
    new = position_ids.shape[-1]
    slots, offset = cache.get_mask_sizes(new, layer)
    if slots == new:
        return position_ids
    past = cache.get_query_offset(layer) if hasattr(cache, "get_query_offset") else cache.get_seq_length(layer)
    steps = torch.arange(slots, device=position_ids.device) + offset - past - (new - 1)
    # The empty tail of a static cache lies beyond the last token; scaled ropes must not see such positions.
    return torch.minimum(position_ids[:, -1:] + steps, position_ids.max())


@functools.cache
def _attention_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of an attention class with q_proj, k_proj, v_proj and o_proj."""
    module = sys.modules[native.__module__]
    rotate, eager = module.apply_rotary_pos_emb, module.eager_attention_forward

    def bias_of(self: Any, projection: Any) -> Tensor:
        """(kv heads, 1, head_dim)."""
        return _unique(projection.bias.view(-1, self.head_dim), self.kvshare_repeat)[:, None]

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        key_position_embeddings: dict[str, Rotary] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads)  # (batch, new tokens, query heads, head_dim)
        if hasattr(self, "q_norm"):
            query = self.q_norm(query)
        query = query.transpose(1, 2)  # (batch, query heads, new tokens, head_dim)
        shared = _unique(self.k_proj(hidden_states).view(heads), self.kvshare_repeat)
        shared = shared.transpose(1, 2)  # (batch, kv heads, new tokens, head_dim)
        if past_key_values is not None:
            shared, _ = past_key_values.update(shared, shared[..., :0], self.layer_idx)  # (batch, kv heads, slots, head_dim)

        key = shared
        if self.k_proj.bias is not None:
            key = key + bias_of(self, self.k_proj)
        if hasattr(self, "k_norm"):
            key = self.k_norm(key)
        if key_position_embeddings is None:
            query, key = rotate(query, key, *position_embeddings)
        else:
            query, _ = rotate(query, key[:, :0, : query.shape[2]], *position_embeddings)
            _, key = rotate(query[:, :0, :1], key, *key_position_embeddings[self.kvshare_layer_type])
        value = shared if not hasattr(self, "v_proj") else shared + bias_of(self, self.v_proj)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        # Mistral reads its window from the config, others keep one per layer (None where attention is full).
        window = self.sliding_window if hasattr(self, "sliding_window") else getattr(self.config, "sliding_window", None)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return type(native.__name__, (native,), {"forward": forward, "__module__": __name__})


@functools.cache
def _untouched_class(native: type[nn.Module]) -> type[nn.Module]:
    """An attention class as it is, for layers beside shared ones."""

    def forward(self: Any, *args: Any, key_position_embeddings: dict[str, Rotary] | None = None, **kwargs: Any) -> Any:
        return native.forward(self, *args, **kwargs)

    return type(native.__name__, (native,), {"forward": forward, "__module__": __name__})


@functools.cache
def _decoder_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of a decoder: it rotates once per forward for all layers of a kind."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and self.training and getattr(self, "gradient_checkpointing", False):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            new = inputs_embeds.shape[1]
            if position_ids is None:
                position_ids = (torch.arange(new, device=inputs_embeds.device) + past_key_values.get_seq_length())[None]
            positions = {kind: key_positions(past_key_values, layer, position_ids) for kind, layer in self.kvshare_kinds.items()}
            if any(slots is not position_ids for slots in positions.values()):
                kwargs["key_position_embeddings"] = {
                    kind: self.rotary_emb(inputs_embeds, position_ids=slots) for kind, slots in positions.items()
                }
        return native.forward(
            self,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    return type(native.__name__, (native,), {"forward": forward, "__module__": __name__})


@functools.cache
def shared_class(native: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The shared form of a causal language model class; it keeps the native name, so `architectures` stays native."""

    def initialise(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, config, *args, **kwargs)
        _share(self)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; of repeated heads, one is kept in memory."""
        loaded = native.from_pretrained.__func__(cls, *args, **kwargs)
        _forget_repeats(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self: Any, save_directory: Any, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Write the checkpoint as the native class expects it: heads repeated, the shared projection under both names."""
        state = dict(self.state_dict() if state_dict is None else state_dict)
        for prefix, attention in _shared_attention(self):
            rows = self.config.num_key_value_heads * attention.head_dim
            for name in (f"{prefix}.{tensor}" for tensor in ("k_proj.weight", "k_proj.bias", "v_proj.bias")):
                if name in state and len(state[name]) < rows:
                    heads = state[name].unflatten(0, (-1, attention.head_dim))
                    state[name] = heads.repeat_interleave(rows // len(state[name]), 0).flatten(0, 1)
        for name in [name for name in state if name.endswith(".k_proj.weight")]:
            state.setdefault(name.replace(".k_proj.", ".v_proj."), state[name].clone())
        native.save_pretrained(self, save_directory, state_dict=state, **kwargs)

    members = {
        "__init__": initialise,
        "from_pretrained": classmethod(from_pretrained),
        "save_pretrained": save_pretrained,
        "__module__": __name__,
        "__doc__": f"{native.__name__} with one cached tensor per token and layer where K and V are shared.",
        "config_class": native.config_class,
        "_keys_to_ignore_on_load_unexpected": [*(native._keys_to_ignore_on_load_unexpected or ()), r"\.v_proj\.weight$"],
    }
    return type(native.__name__, (native,), members)


def _share(model: Any) -> None:
    """Give the layers that the config's kvshare block names their shared attention."""
    block = getattr(model.config, "kvshare", None)
    if not isinstance(block, dict) or "layers" not in block:
        raise ValueError("this config has no kvshare block: load the model with its native class, or convert it first")
    decoder = model.get_decoder()
    kinds: dict[str, int] = {}
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    stored = model.config.num_key_value_heads
    for layer, heads in zip(block["layers"], block.get("kv_heads") or [stored] * len(block["layers"]), strict=True):
        attention = decoder.layers[layer].self_attn
        value_bias = attention.v_proj.bias
        del attention.v_proj
        if value_bias is not None:
            attention.v_proj = ValueBias(value_bias)
        attention.k_proj.__class__ = SharedProjection
        native: Any = type(attention)
        attention.__class__ = _attention_class(native)
        attention.kvshare_layer_type = layer_types[layer]
        attention.kvshare_repeat = stored // heads  # equal heads in a row of what the projection gives
        attention.num_key_value_groups *= attention.kvshare_repeat
        kinds.setdefault(layer_types[layer], layer)
    for layer in set(range(len(decoder.layers))) - set(block["layers"]):
        attention = decoder.layers[layer].self_attn
        untouched: Any = type(attention)
        attention.__class__ = _untouched_class(untouched)
    native_decoder: Any = type(decoder)
    decoder.__class__ = _decoder_class(native_decoder)
    decoder.kvshare_kinds = kinds


def _shared_attention(model: Any) -> list[tuple[str, Any]]:
    """The shared attention modules of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "kvshare_repeat")]


def _forget_repeats(model: Any) -> None:
    """Keep one of every run of equal heads. Weights that are not whole and plain in memory (offloaded, distributed) stay."""
    stored = model.config.num_key_value_heads
    for _, attention in _shared_attention(model):
        projections = [attention.k_proj, *([attention.v_proj] if hasattr(attention, "v_proj") else [])]
        held = [(projection, name, value) for projection in projections for name, value in projection.named_parameters()]
        plain = all(type(value.data) is Tensor and value.device.type != "meta" for _, _, value in held)
        whole = all(len(value) == stored * attention.head_dim for _, _, value in held)
        if attention.kvshare_repeat == 1 or not (plain and whole) or type(attention.k_proj) is not SharedProjection:
            continue
        for projection, name, value in held:
            heads = value.detach().unflatten(0, (-1, attention.kvshare_repeat, attention.head_dim))
            kept = heads[:, 0].flatten(0, 1).clone()
            setattr(projection, name, nn.Parameter(kept, requires_grad=value.requires_grad))
        attention.k_proj.out_features = len(attention.k_proj.weight)
        attention.kvshare_repeat = 1


def __getattr__(name: str) -> Any:
    """The shared form of any native causal language model class, under the native name."""
    if name.endswith("ForCausalLM"):
        return shared_class(getattr(transformers, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
