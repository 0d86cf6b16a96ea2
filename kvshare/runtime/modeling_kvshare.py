# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""The shared-cache form of a native transformers model. This file is shipped inside every kvshare checkpoint.

In: a native checkpoint with a `kvshare` block in its config. Out: the same function, with one tensor per token in the cache
where the native class keeps two. Needs transformers and torch alone. Never: imports kvshare, changes what the weights compute.

    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

The cache's key slot holds k_proj's output before bias, norm and rope, its value slot a tensor of width zero; with `cache_bits` in
the block, integers and their scales. Keys are made from it on every read, so any cache that takes keys and values of different
widths works unchanged. Values are, by the form that the block names,

- `shared`: that very tensor; the weights of k_proj and v_proj are equal.
- `exact`: W_V W_K^-1 times the cached keys of all heads together; W_K is square and well-conditioned, no weight was changed.

Layers may differ: those that the block does not name stay native, and one with fewer heads than the config says is stored
with each head repeated, which the native class computes as it is; here one of each is computed, kept and cached.
"""

from __future__ import annotations

import functools
import inspect
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kvshare_attention import ATTENTIONS, KEY_NORMS, SOFTCAPPED, attend, cached_tables, first_of, layers_of
from .kvshare_bits import BITS, dequantise
from .kvshare_cache import (
    admit,
    cache_name,
    cache_of,
    into_pages,
    page_positions,
    pages_of,
    passed_on,
    read,
    through_pages,
    update,
)
from .kvshare_channels import channels_on, give_channels, save_channels
from .kvshare_classes import derived, unknown
from .kvshare_positions import follow, key_positions, leave, own_positions
from .kvshare_projections import (
    FusedProjection,
    GroupedProjection,
    RepeatedProjection,
    RowsProjection,
    SharedProjection,
    ValueBias,
    as_native,
    outer_bias,
    project,
    unreplaced,
)
from .kvshare_tables import rope_of, rotation_of, turn_queries

if TYPE_CHECKING:  # older versions of transformers copy the files that this one names, and none that those name in turn
    from .kvshare_c import SOURCE  # noqa: F401
    from .kvshare_cpu import TILE  # noqa: F401
    from .kvshare_kernels import attend_kernel  # noqa: F401
    from .kvshare_splits import join_kernel  # noqa: F401
    from .kvshare_tiles import numbers  # noqa: F401
    from .kvshare_triton import attend_on_gpu  # noqa: F401

FORMS = ("shared", "exact")
VALUE_ERROR = 0.02  # of their size: what values made of cached keys may be off by
Rotary = tuple[Tensor, ...]  # cos and sin, (batch, tokens, rotated width); once more of the cached keys, where there are any
# what some families hand to the attention function beside the usual: its name there, and of which attribute
ARGUMENTS = {**{family: {"softcap": "attn_logit_softcapping"} for family in SOFTCAPPED}, "gpt_oss": {"s_aux": "sinks"}}
ROTATE_WINDOWS_ALONE = ("cohere2", "exaone4", "exaone_moe")  # where layers have a window, those without one do not rotate
OUTPUTS = ("o_proj", "dense", "out_proj")  # what output projections are called
NORMS = (("q_norm", "q_layernorm"), KEY_NORMS)  # what norms of queries and of keys are called
HALF_TABLES = ("gpt_oss", "gptj")  # tables hold a number for each rope pair, not for each number that is rotated
SINES_FIRST = ("gptj",)  # their tables are sines and cosines, in this order


def _unique(x: Tensor, repeat: int) -> Tensor:
    """One of every `repeat` equal heads: (..., stored heads, head_dim) -> (..., stored heads / repeat, head_dim)."""
    return x if repeat == 1 else x[..., ::repeat, :]


def _rotated(rotate: Any, states: Tensor, tables: Rotary, width: int) -> Tensor:
    """Rope on the first `width` numbers of each head; states (batch, heads, tokens, head_dim)."""
    turned, _ = rotate(states[..., :width], states[:, :0, :, :width], *tables)
    return turned if width == states.shape[-1] else torch.cat([turned, states[..., width:]], -1)


def _normed(norm: nn.Module, states: Tensor) -> Tensor:
    """A norm of each head, or of all heads as one; states (batch, heads, tokens, head_dim)."""
    if norm.weight.shape == states.shape[-1:]:
        return norm(states)
    by_token = states.transpose(1, 2)
    return norm(by_token.flatten(2)).view(by_token.shape).transpose(1, 2)


class ExactMaps(NamedTuple):
    """What the exact form needs of one layer beside its weights; n = hidden_size = kv heads * head_dim, all in `wider` dtype.

    `values` (n, n) is W_V W_K^-1, which makes all values of a token of all its keys before bias, norm and rope. `order` (n)
    and `feedback` say how these keys are rounded, see `round_keys`. `error`: by how much of their size values are off, root
    mean square.
    """

    values: Tensor
    order: Tensor
    feedback: tuple[Tensor, ...]
    error: float


def wider(dtype: torch.dtype) -> torch.dtype:
    """In what the exact form computes: small errors of keys are large ones of values where W_K nearly shrinks to nothing."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def exact_maps(key: Tensor, value: Tensor, dtype: torch.dtype) -> ExactMaps:
    """The maps of a layer for a cache that holds `dtype`; they and their error are not finite where W_K is singular.

    With inputs of equal variance in all directions, an error e of the cached numbers costs e^T C e with
    C = I / |W_K|^2 + M^T M / |W_V|^2, M = W_V W_K^-1: the squared errors of keys and values, each relative to its size. Half of
    the numbers are rounded first, those that cost most (C_ii |W_K[i]|^2). The others can make up for what that did: given the
    errors e_d of the numbers done, those left (l) are best moved by -C_ll^-1 C_ld e_d before half of them is rounded, and so on.
    Errors of a step then cost as the Schur complement of C on it. This is Babai's nearest plane, in log2(n) steps.

    `error` adds what rounding to `dtype` costs so, at eps / 12^1/2 of each number's size, to what the arithmetic of this
    machine leaves of M W_K = W_V (a matmul that rounds its inputs shows here).

    Args:
        key, value: the weights of k_proj and v_proj, both (n, n).
        dtype: of the cache.
    """
    key, value, wide = key.detach().double(), value.detach().double(), wider(dtype)
    values = torch.linalg.solve_ex(key, value, left=False).result
    size = key.square().sum(1)  # of every cached number, squared
    cost = torch.eye(len(key), dtype=key.dtype, device=key.device) / size.sum() + values.T @ values / value.square().sum()
    order = (cost.diagonal() * size).argsort(descending=True)
    cost, size = cost[order][:, order], size[order]
    feedback, squared, done = [], size.new_zeros(()), 0
    while done < len(size):
        step = slice(done, done + max(1, (len(size) - done) // 2))
        left = torch.linalg.inv_ex(cost[done:, done:]).inverse[: step.stop - done]
        feedback.append((-left @ cost[done:, :done]).to(wide))  # (numbers of the step, numbers done)
        complement = torch.linalg.inv_ex(left[:, : len(left)]).inverse
        squared, done = squared + complement.diagonal() @ size[step], step.stop
    values = values.to(wide)
    computed = float((values @ key.to(wide) - value).norm() / value.norm())
    rounding = float(squared.sqrt()) * torch.finfo(dtype).eps / 12**0.5
    return ExactMaps(values, order, tuple(feedback), (rounding**2 + computed**2) ** 0.5)


def round_keys(maps: ExactMaps, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys before bias, norm and rope, (..., n) in `wider` dtype, rounded so that the values made of them suffer least."""
    keys = keys[..., maps.order]
    rounded = keys[..., :0]
    for feedback in maps.feedback:
        done = rounded.shape[-1]
        moved = keys[..., done : done + len(feedback)] + (rounded - keys[..., :done]) @ feedback.T
        rounded = torch.cat([rounded, moved.to(dtype).to(keys.dtype)], dim=-1)
    return rounded[..., maps.order.argsort()].to(dtype)


def _maps(attention: Any, dtype: torch.dtype) -> ExactMaps:
    """The maps of an attention module, made when they are first needed and again when a weight has changed.

    They lie beside the weights and not in their place: those stay bit for bit what they were, for saving and for training, and
    tokens whose hidden states are at hand have values as exact as natively. The price is 4/3 n^2 numbers of memory per layer.
    """
    key, value = attention.k_proj, attention.v_proj
    if not (isinstance(key, nn.Linear) and isinstance(value, nn.Linear)) or key.weight.is_meta:
        raise ValueError("the exact form computes with the weights of k_proj and v_proj: merge adapters, do not offload layers")
    kept = attention.kvshare_maps
    if torch.compiler.is_compiling() and kept is not None:  # made by an earlier forward, as `generate` runs for the prompt
        return kept[1]
    state = [dtype, *((w.data_ptr(), 0 if w.is_inference() else w._version) for w in (key.weight, value.weight))]
    if kept is None or kept[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            kept = (state, exact_maps(key.weight, value.weight, dtype))
        if not kept[1].error <= VALUE_ERROR:
            raise ValueError(
                f"values of layer {attention.layer_idx} would be off by {kept[1].error:.1%} with a cache in {dtype}, and the limit "
                f"is {VALUE_ERROR:.0%}: load the model in float32, or do without TF32 and autocast"
            )
        attention.kvshare_maps = kept
    return kept[1]


def _keys_to_cache(attention: Any, hidden: Tensor) -> tuple[Tensor, Any]:
    """k_proj's output before bias as the cache keeps it, (batch, new tokens, n); and its bias."""
    maps = _maps(attention, hidden.dtype)
    keys = nn.functional.linear(hidden.to(maps.values.dtype), attention.k_proj.weight.to(maps.values.dtype))
    rounded = round_keys(maps, keys.detach(), hidden.dtype)
    kept = (keys + (rounded.to(keys.dtype) - keys.detach())).to(hidden.dtype)  # rounding does not stop gradients
    return kept, attention.k_proj.bias


def _values_from_keys(attention: Any, shared: Tensor) -> Tensor:
    """The values of every cached token, (batch, kv heads, slots, head_dim) in and out."""
    values, bias = _maps(attention, shared.dtype).values, attention.v_proj.bias
    every = shared.transpose(1, 2).flatten(2).to(values.dtype)  # (batch, slots, n)
    value = nn.functional.linear(every, values, None if bias is None else bias.to(values.dtype))
    return value.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).to(shared.dtype)


def _averages_first(attention: Any, query: Tensor, mask: Any) -> bool:
    """Whether to average the cached keys by the attention weights and make values of the averages alone.

    With q queries, s slots and H heads it takes q * s * n multiply-adds per head to average and q * n^2 in all to make values
    of the averages; to make the values of all slots takes s * n^2. The first is less while q * H < n, as in decoding. It needs
    the attention weights, which these two implementations define by mask and softmax alone; without a mask, several queries
    would rely on the implementation's own causal one.
    """
    few = query.shape[1] * query.shape[2] < attention.k_proj.weight.shape[0]
    masked = mask is not None or query.shape[2] == 1
    return few and masked and not attention.training and attention.config._attn_implementation in ("eager", "sdpa")


def _attend_to_averages(attention: Any, eager: Any, query: Tensor, key: Tensor, shared: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """Attention whose values are made after the average: sum_j p_j W_V x_j = (W_V W_K^-1) sum_j p_j W_K x_j.

    Args:
        attention: the module.
        eager: its family's attention, for the weights p.
        query: rotated, (batch, query heads, new tokens, head_dim).
        key: rotated, (batch, kv heads, slots, head_dim).
        shared: as cached, (batch, kv heads, slots, head_dim).
        mask: (batch or 1, 1, new tokens, slots), boolean or added to the scores; or None.

    Returns:
        (batch, new tokens, query heads * head_dim) and the attention weights.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    _, weights = eager(attention, query, key, shared[..., :0], mask, scaling=attention.scaling, **_arguments(attention))
    values, bias = _maps(attention, shared.dtype).values, attention.v_proj.bias
    heads = (shared.shape[1], attention.head_dim)
    by_head = weights.flatten(1, 2).unsqueeze(1).to(values.dtype)  # (batch, 1, query heads * new tokens, slots)
    averages = by_head @ shared.to(values.dtype)  # (batch, kv heads, query heads * new tokens, head_dim)
    averages = averages.transpose(1, 2).flatten(2).unflatten(1, (heads[0], -1))  # (batch, kv heads, queries of each, n)
    value = torch.einsum("bkqn,kdn->bkqd", averages, values.unflatten(0, heads))
    if bias is not None:
        value = value + bias.view(1, heads[0], 1, heads[1])
    return value.reshape(query.shape).transpose(1, 2).flatten(2).to(query.dtype), weights


def _arguments(attention: Any) -> dict[str, Any]:
    """What the family hands to the attention function beside the usual."""
    return {name: getattr(attention, attribute) for name, attribute in attention.kvshare_arguments.items()}


def _rotates(attention: Any, layer_type: str) -> bool:
    """Whether rope turns queries and keys of a layer."""
    config = attention.config
    if getattr(config, "alibi", False):
        return False
    if config.model_type in ROTATE_WINDOWS_ALONE:
        return config.sliding_window is None or layer_type == "sliding_attention"
    return bool(getattr(attention, "use_rope", True))


def _by_stock(attention: Any, stock: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, arguments: dict[str, Any]) -> Any:
    """What an attention function of transformers makes of rotated queries, keys and values, as the family calls it."""
    # Mistral reads its window from the config, others keep one per layer (None where attention is full).
    window = attention.sliding_window if hasattr(attention, "sliding_window") else getattr(attention.config, "sliding_window", None)
    dropout = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    own = {"dropout": dropout if attention.training else 0.0, "scaling": attention.scaling}
    own["sliding_window"] = window if getattr(attention, "is_sliding", True) else None
    groups = query.shape[1] // key.shape[1]
    if getattr(attention, "num_key_value_groups", groups) != groups:  # a process may have a part of one head's copies alone
        attention.num_key_value_groups = groups
    return stock(attention, query, key, value, mask, **own, **arguments)


def _to_hidden(attention: Any, output: Tensor) -> Tensor:
    """(batch, new tokens, query heads * head_dim) -> (batch, new tokens, hidden)."""
    output = first_of(attention, OUTPUTS)(output)
    if hasattr(attention, "resid_dropout"):
        return attention.resid_dropout(output)
    return nn.functional.dropout(output, getattr(attention, "residual_dropout", 0.0)) if attention.training else output


@functools.cache
def _attention_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of an attention class with q_proj, k_proj and v_proj, or one projection for all, and an output projection."""
    module = sys.modules[native.__module__]
    rotate, eager = rotation_of(native), getattr(module, "eager_attention_forward", None)
    if eager is None:  # gptj before transformers 5.24
        raise unknown(native, "attends in a way")
    query_scale = getattr(module, "get_llama_4_attn_scale", None)
    cache = cache_name(native)

    def bias_of(self: Any, bias: Tensor) -> Tensor:
        """(kv heads, 1, head_dim)."""
        return _unique(bias.reshape(-1, self.head_dim), self.kvshare_repeat)[:, None]

    def scaled(self: Any, query: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Queries as they are, or by the position as Llama 4 scales them."""
        if query_scale is None:
            return query
        rope = self.config.rope_parameters
        scale = (rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings"))
        return query * query_scale(arguments["position_ids"], *scale).to(query.dtype)

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Rotary = (),
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        past_key_values = cache_of(past_key_values, kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        shared: Any = None
        key_bias: Any = None
        value_bias: Any = None
        if "qkv_proj" in self._modules:
            query, shared = unreplaced(self.qkv_proj)(hidden_states)
        elif "query_key_value" in self._modules:
            query, shared = unreplaced(self.query_key_value)(hidden_states)
            bias = outer_bias(self.query_key_value, hidden_states)
            if bias is not None:
                key_bias, value_bias = self.query_key_value.parts(bias)[:, -2:].unbind(1)
        else:
            query = self.q_proj(hidden_states)
        query = query.view(heads).transpose(1, 2)  # (batch, query heads, new tokens, head_dim)
        query_norm, key_norm = (first_of(self, names) for names in NORMS)
        if query_norm is not None:
            query = _normed(query_norm, query)
        # while weights are trained, maps would be made anew in every step for a cache that is read by no other forward
        rounds = self.kvshare_exact and past_key_values is not None and not (self.training and torch.is_grad_enabled())
        if shared is None:
            shared, key_bias = _keys_to_cache(self, hidden_states) if rounds else project(self.k_proj, hidden_states)
            value_bias = outer_bias(self.v_proj, shared)
        shared = _unique(shared.view(heads), self.kvshare_repeat)
        shared = shared.transpose(1, 2)  # (batch, kv heads, new tokens, head_dim)
        scales: Tensor | None = None
        pages = None if past_key_values is not None else pages_of(kwargs.get("cache"), self.layer_idx)
        if past_key_values is not None:  # (batch, kv heads, slots, head_dim)
            shared, scales = update(past_key_values, shared, self.layer_idx, self)
        elif pages is not None:
            shared, kwargs = through_pages(shared, self.layer_idx, kwargs)
        if len(position_embeddings or ()) > 4:  # a kernel makes keys of them where it reads them
            if self.kvshare_rotates:
                query = turn_queries(query, self.kvshare_pairs, *position_embeddings[5:])
            query = scaled(self, query, kwargs)
            output = attend(
                self,
                query,
                shared,
                scales,
                position_embeddings[2:5],
                attention_mask,
                None if key_bias is None else bias_of(self, key_bias),
                None if value_bias is None else bias_of(self, value_bias),
                _arguments(self),
            )
            return _to_hidden(self, output.flatten(2)), None
        if scales is not None:
            shared = dequantise(shared, scales, query.dtype, channels_on(self, query.device))

        key, value = shared, None  # type: Any, Any
        if key_bias is not None:
            key = key + bias_of(self, key_bias)
        if key_norm is not None:
            key = _normed(key_norm, key)
        if not self.kvshare_exact:
            value = shared if value_bias is None else shared + bias_of(self, value_bias)
        elif shared.shape[2] == hidden_states.shape[1]:  # nothing was cached before: these tokens' own inputs are at hand
            value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        clip = getattr(self.config, "clip_qkv", None)
        if clip is not None:
            query, key, value = (states.clamp(min=-clip, max=clip) for states in (query, key, value))
        if self.kvshare_rotates:
            own, cached = position_embeddings[:2], position_embeddings[-2:]
            width = own[0].shape[-1] * self.kvshare_table_repeat
            query, key = _rotated(rotate, query, own, width), _rotated(rotate, key, cached, width)
        query = scaled(self, query, kwargs)
        if value is None and _averages_first(self, query, attention_mask):
            output, weights = _attend_to_averages(self, eager, query, key, shared, attention_mask)
            return _to_hidden(self, output), weights
        if value is None:
            value = _values_from_keys(self, shared)

        key, value = into_pages(cache, key, value, self.layer_idx, kwargs)
        # behind pages, the paged attention of transformers would take the new tokens in
        implementation = self.config._attn_implementation.removeprefix("" if pages is None else "paged|")
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        output, weights = _by_stock(self, stock, query, key, value, attention_mask, {**_arguments(self), **kwargs})
        return _to_hidden(self, output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def apply(self: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the weights; what was made of them is made again when it is needed."""
        self.kvshare_maps = None
        return native._apply(self, function, *args, **kwargs)

    return derived(_attention_class, native, {"forward": forward, "_apply": apply})


@functools.cache
def _layer_class(native: type[nn.Module]) -> type[nn.Module]:
    """A decoder layer that hands its attention the tables of cached keys beside those of new tokens: in some families nothing
    but `position_embeddings` comes through.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: Any = None,
        key_position_embeddings: dict[str, Rotary] | None = None,
        **kwargs: Any,
    ) -> Any:
        kind = getattr(_attention(self), "kvshare_layer_type", None)  # None in a layer that is not shared, or has no attention
        if key_position_embeddings is not None and kind is not None:
            position_embeddings = (*position_embeddings, *key_position_embeddings[kind])
        return native.forward(self, hidden_states, *args, position_embeddings=position_embeddings, **kwargs)

    return derived(_layer_class, native, {"forward": forward})


@functools.cache
def _fused_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of an attention class with c_attn and c_proj, which does not rotate."""
    eager_attention = sys.modules[native.__module__].eager_attention_forward
    cache = cache_name(native)

    def forward(
        self: Any,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        past_key_values = cache_of(past_key_values, kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        # (batch, heads, new tokens, head_dim)
        query, shared = (states.view(heads).transpose(1, 2) for states in unreplaced(self.c_attn)(hidden_states))
        if past_key_values is not None:
            shared = read(past_key_values, shared, self.layer_idx, self)  # (batch, heads, slots, head_dim)
        _, key_bias, value_bias = outer_bias(self.c_attn, hidden_states).view(3, -1, 1, self.head_dim)
        key, value = into_pages(cache, shared + key_bias, shared + value_bias, self.layer_idx, kwargs)

        implementation = self.config._attn_implementation
        if implementation == "eager" and self.reorder_and_upcast_attn:
            output, weights = self._upcast_and_reordered_attn(query, key, value, attention_mask)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
            dropout = self.attn_dropout.p if self.training else 0.0
            output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.resid_dropout(self.c_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())), weights

    return derived(_fused_class, native, {"forward": forward})


class _View(NamedTuple):
    """What attention that computes all by itself is given in place of the cache: it takes in what keys and values share, which that
    attention hands it as values, and gives keys and values back.
    """

    attention: Any
    cache: Any
    rotate: Any
    tables: Rotary | None

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Both (batch, kv heads, new tokens, head_dim), or each head repeated; so are the keys and values of all slots."""
        own, projection = self.attention, unreplaced(self.attention.query_key_value)
        repeat = value.shape[1] // projection.kvshare_heads * own.kvshare_repeat
        shared = value[:, ::repeat]
        if self.cache is not None:
            shared = read(self.cache, shared, layer, own)
        key, value = shared, shared
        bias = outer_bias(projection, shared)
        if bias is not None:
            biases = projection.parts(bias)[:: own.kvshare_repeat, -2:, None]  # (kv heads, 2, 1, head_dim)
            key, value = shared + biases[:, 0], shared + biases[:, 1]
        if self.tables is not None:
            key = _rotated(self.rotate, key, self.tables, key.shape[-1])
        return key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)


@functools.cache
def _viewing_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of an attention class with query_key_value whose own forward is right but for the cache (falcon, bloom)."""
    rotate, cache = rotation_of(native), cache_name(native)

    def forward(
        self: Any, hidden_states: Tensor, *args: Any, past_key_values: Any = None, position_embeddings: Any = None, **kwargs: Any
    ) -> Any:
        tables = None
        if position_embeddings is not None:  # of cached keys and, behind them, of new tokens, where these are not the same
            new = hidden_states.shape[1]
            tables = tuple(table[:, :-new] if table.shape[1] > new else table for table in position_embeddings)
            kwargs["position_embeddings"] = tuple(table[:, -new:] for table in position_embeddings)
        view = _View(self, cache_of(past_key_values, kwargs), rotate, tables if self.kvshare_rotates else None)
        return native.forward(self, hidden_states, *args, **{cache: view}, **kwargs)

    return derived(_viewing_class, native, {"forward": forward})


class _TiedView(NamedTuple):
    """What attention that makes K and V by one projection is given in place of the cache: it hands over what both are made of as
    values, because its norm of values is taken out, and is given keys and values of all slots.
    """

    attention: Any
    cache: Any
    rotate: Any
    tables: Rotary

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Both (batch, kv heads, new tokens, head_dim); so are the keys and values of all slots."""
        own, shared = self.attention, value
        if self.cache is not None:
            shared = read(self.cache, shared, layer, own)
        return self.rotate(own.k_norm(shared), *self.tables), own.kvshare_value_norm(shared)


@functools.cache
def _tied_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of an attention class that makes K and V by one projection itself, and norms both (gemma4)."""
    rotate = sys.modules[native.__module__].apply_rotary_pos_emb
    cache = cache_name(native)

    def forward(
        self: Any, hidden_states: Tensor, position_embeddings: Rotary, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        view = _TiedView(self, cache_of(past_key_values, kwargs), rotate, position_embeddings[-2:])
        return native.forward(self, hidden_states, position_embeddings[:2], *args, **{cache: view}, **kwargs)

    return derived(_tied_class, native, {"forward": forward})


@functools.cache
def _cosines_first(native: type[nn.Module]) -> type[nn.Module]:
    """A rotary embedding that gives cosines before sines and knows positions before the first, where the native one looks sines and
    cosines up in a table.
    """

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Rotary:
        sines, cosines = native.forward(self, x, position_ids.abs())
        return cosines, torch.where(position_ids[..., None] < 0, -sines, sines)

    return derived(_cosines_first, native, {"forward": forward})


@functools.cache
def _plain_decoder_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of a decoder whose layers make their own keys; falcon's is given the positions of cached keys before those of
    new tokens, and makes one table of all.
    """
    cache = cache_name(native)

    def forward(self: Any, input_ids: Any = None, *, past_key_values: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        past_key_values = cache_of(past_key_values, kwargs)
        if past_key_values is not None:
            admit(self, past_key_values)
        turns = past_key_values is not None and self.kvshare_turns
        if turns:
            given = kwargs["inputs_embeds"] if input_ids is None else input_ids
            position_ids = own_positions(position_ids, past_key_values, given)
            first = self.kvshare_first
            follow(past_key_values, first, position_ids, kwargs.get("attention_mask"))
            if rope_of(self) is not None:
                slots = key_positions(past_key_values, first, position_ids)
                if slots is not position_ids:
                    position_ids = torch.cat([slots, position_ids.expand(len(slots), -1)], 1)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        output = native.forward(self, input_ids, **passed_on(cache, past_key_values, kwargs))
        if turns:
            leave(past_key_values, first)
        return output

    return derived(_plain_decoder_class, native, {"forward": forward, "is_custom_code": _standard})


@functools.cache
def _decoder_class(native: type[nn.Module]) -> type[nn.Module]:
    """The shared form of a decoder: it rotates once per forward for all layers of a kind."""
    cache = cache_name(native)

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
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if getattr(self, "hidden_size_per_layer_input", 0) and kwargs.get("per_layer_inputs") is None:
                # of embeddings alone, the decoder would look for the tokens that have them
                kwargs["per_layer_inputs"] = self.get_per_layer_inputs(input_ids)
        past_key_values = cache_of(past_key_values, kwargs)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and self.training and getattr(self, "gradient_checkpointing", False):
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        positions: dict[str, Any] = {}
        in_order, first = True, self.kvshare_first
        if past_key_values is not None:
            admit(self, past_key_values)
            position_ids = own_positions(position_ids, past_key_values, inputs_embeds)
            in_order = follow(past_key_values, first, position_ids, attention_mask)
            positions = {kind: key_positions(past_key_values, layer, position_ids) for kind, layer in self.kvshare_kinds.items()}
        elif kwargs.get("cache") is not None and position_ids is not None:
            positions = {kind: page_positions(layer, kwargs, position_ids) for kind, layer in self.kvshare_kinds.items()}
        tables = cached_tables(self, inputs_embeds, positions, position_ids, in_order, kwargs)
        if tables:
            kwargs["key_position_embeddings"] = tables
        output = native.forward(
            self,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **passed_on(cache, past_key_values, kwargs),
        )
        if past_key_values is not None:
            leave(past_key_values, first)
        return output

    return derived(_decoder_class, native, {"forward": forward, "is_custom_code": _standard})


@classmethod  # type: ignore[misc]
def _standard(cls: Any) -> bool:
    """Names of tensors in files are those of the native class: transformers converts them only where code is its own."""
    return False


@functools.cache
def shared_class(native: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The shared form of a causal language model class; it keeps the native name, so `architectures` stays native."""

    def initialise(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        native.__init__(self, config, *args, **kwargs)
        _share(self)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; of repeated heads, one is kept in memory, and what is known of channels is read."""
        loaded = native.from_pretrained.__func__(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _forget_repeats(model)
        if model.config.kvshare["form"] == "shared":
            named = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            give_channels([attention for _, attention in _shared_attention(model)], named, kwargs)
        return loaded

    def save_pretrained(self: Any, save_directory: Any, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Write the checkpoint as the native class expects it: heads repeated, the shared projection under both names; and this
        file, which its config names.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory) / f"{__name__.rpartition('.')[2]}.py")
        for file in Path(__file__).parent.glob("kvshare_*.py"):
            shutil.copyfile(file, Path(save_directory) / file.name)
        mlx = Path(save_directory, "kvshare_mlx.py")
        if getattr(self.config, "model_file", None) == mlx.name and not mlx.exists():  # remote code comes without it
            if Path(self.config._name_or_path, mlx.name).is_file():
                shutil.copyfile(Path(self.config._name_or_path, mlx.name), mlx)
            else:
                del self.config.model_file
        save_channels([attention for _, attention in _shared_attention(self)], Path(save_directory))
        state = dict(self.state_dict() if state_dict is None else state_dict)
        for prefix, attention in _shared_attention(self):
            rows = attention.kvshare_stored * attention.head_dim
            for name in (f"{prefix}.{tensor}" for tensor in ("k_proj.weight", "k_proj.bias", "v_proj.bias")):
                if name in state and len(state[name]) < rows:
                    heads = state[name].unflatten(0, (-1, attention.head_dim))
                    state[name] = heads.repeat_interleave(rows // len(state[name]), 0).flatten(0, 1)
        tied = {f"{name}.k_proj.weight" for name, attention in _shared_attention(self) if hasattr(attention, "kvshare_value_norm")}
        for name in [name for name in state if name.endswith(".k_proj.weight") and name not in tied]:
            state.setdefault(name.replace(".k_proj.", ".v_proj."), state[name].clone())
        state |= as_native(self, state)
        native.save_pretrained(self, save_directory, state_dict=state, **kwargs)

    members = {
        "__init__": initialise,
        "_get_static_cache_init_shape": lambda self: None,  # keys and values of equal width
        "from_pretrained": classmethod(from_pretrained),
        "save_pretrained": save_pretrained,
        "__doc__": f"{native.__name__} with one cached tensor per token and layer where K and V are shared.",
        "config_class": native.config_class,
        "is_custom_code": _standard,
        "_keys_to_ignore_on_load_unexpected": [*(native._keys_to_ignore_on_load_unexpected or ()), r"\.v_proj\.weight$"],
    }
    return derived(shared_class, native, members)


def _share(model: Any) -> None:
    """Give the layers that the config's kvshare block names their shared attention."""
    block = getattr(model.config, "kvshare", None)
    if not isinstance(block, dict) or "layers" not in block:
        raise ValueError("this config has no kvshare block: load the model with its native class, or convert it first")
    if block.get("form") not in FORMS:
        raise ValueError(f"the kvshare block names the form {block.get('form')!r}; this file knows: {', '.join(FORMS)}")
    exact, bits = block["form"] == "exact", block.get("cache_bits")
    if bits not in (None, *(() if exact else BITS)):
        raise ValueError(
            f"cache_bits is {bits!r}: it is 8 or 4, or not there, as in exact form, whose values need all bits of keys"
        )
    decoder = model.get_decoder()
    layers = layers_of(decoder)
    rope = rope_of(decoder)
    kinds: dict[str, int] = {}
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers)
    for layer, heads in zip(block["layers"], block.get("kv_heads") or [None] * len(block["layers"]), strict=True):
        attention = _attention(layers[layer])
        if not hasattr(attention, "head_dim"):
            attention.head_dim = attention.head_size
        attention.kvshare_stored = stored = _stored_heads(attention, model.config.num_attention_heads)
        native: Any = type(attention)
        attention.kvshare_exact, attention.kvshare_bits, attention.kvshare_heads = exact, bits, heads or stored
        attention.kvshare_maps = attention.kvshare_channels = None
        attention.kvshare_layer_type = layer_types[layer]
        attention.kvshare_arguments = ARGUMENTS.get(model.config.model_type, {})
        attention.kvshare_table_repeat = 2 if model.config.model_type in HALF_TABLES else 1
        attention.kvshare_rotates = rope is not None and _rotates(attention, layer_types[layer])
        attention.kvshare_repeat = stored // (heads or stored)  # equal heads in a row of what the projection gives
        attention.__class__ = _share_projection(attention, model.config.num_attention_heads)(native)
        kinds.setdefault(layer_types[layer], layer)
    if not all(isinstance(getattr(attention, "v_proj", None), ValueBias) for _, attention in _shared_attention(model)):
        # nothing but rows of k_proj can be shared out: otherwise every process of tensor parallelism computes all attention
        plan = getattr(model, "_tp_plan", None) or {}
        model._tp_plan = {name: style for name, style in plan.items() if not {*name.split(".")} & {*ATTENTIONS}}
    native_decoder: Any = type(decoder)
    decoder.kvshare_kinds, decoder.kvshare_bits, decoder.kvshare_plan, decoder.kvshare_tried = kinds, bits, None, None
    decoder.kvshare_turns = bool(kinds) and rope is not None
    decoder.kvshare_first = next(iter(kinds.values()), 0)  # the first layer of those that share
    if model.config.model_type in SINES_FIRST:
        native_rope: Any = type(rope)
        rope.__class__ = _cosines_first(native_rope)
    # what the layers cache has no position, or they rotate it themselves
    if rope is None or model.config.model_type == "falcon":
        decoder.__class__ = _plain_decoder_class(native_decoder)
        return
    for layer in layers:
        native_layer: Any = type(layer)
        layer.__class__ = _layer_class(native_layer)
    decoder.__class__ = _decoder_class(native_decoder)
    takes_kind = "layer_type" in inspect.signature(type(rope).forward).parameters
    decoder.kvshare_tables_by_kind = takes_kind and not isinstance(getattr(rope, "rope_type", None), str)  # phimoe has one for all


def _share_projection(attention: Any, query_heads: int) -> Any:
    """Have an attention module's projections compute once what K and V share; returns what makes its class that of the shared form.

    Args:
        attention: the module.
        query_heads: how many its weights have.
    """
    if hasattr(attention, "c_attn"):
        attention.c_attn.__class__ = FusedProjection
        return _fused_class
    if hasattr(attention, "qkv_proj"):
        attention.qkv_proj.__class__ = RowsProjection
        attention.qkv_proj.kvshare_queries = query_heads * attention.head_dim
        attention.qkv_proj.kvshare_width, attention.qkv_proj.kvshare_run = attention.head_dim, attention.kvshare_repeat
        return _attention_class
    if hasattr(attention, "query_key_value"):
        own = not hasattr(sys.modules[type(attention).__module__], "eager_attention_forward")
        attention.query_key_value.__class__ = RepeatedProjection if own else GroupedProjection
        attention.query_key_value.kvshare_width = attention.head_dim
        attention.query_key_value.kvshare_heads = attention.kvshare_stored
        attention.query_key_value.kvshare_run = attention.kvshare_repeat
        return _viewing_class if own else _attention_class
    if attention.v_proj is None:
        attention.kvshare_value_norm, attention.v_norm = attention.v_norm, nn.Identity()
        return _tied_class
    if not attention.kvshare_exact:
        attention.v_proj = ValueBias(attention.v_proj)
    attention.k_proj.__class__ = SharedProjection
    return _attention_class


def _attention(layer: Any) -> Any:
    """The attention module of a decoder layer; None where it has none."""
    return first_of(layer, ATTENTIONS)


def _stored_heads(attention: Any, query_heads: int) -> int:
    """How many KV heads the weights of an attention module have as they are in the checkpoint."""
    if hasattr(attention, "k_proj"):
        return attention.k_proj.weight.shape[0] // attention.head_dim
    if hasattr(attention, "c_attn"):
        return query_heads
    fused = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.query_key_value
    return (fused.weight.shape[0] // attention.head_dim - query_heads) // 2


def _shared_attention(model: Any) -> list[tuple[str, Any]]:
    """The shared attention modules of a model with their names."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "kvshare_repeat")]


def _forget_repeats(model: Any) -> None:
    """Keep one of every run of equal heads. Weights that are not whole and plain in memory (offloaded, distributed) stay."""
    for _, attention in _shared_attention(model):
        if not hasattr(attention, "k_proj") or hasattr(attention, "kvshare_value_norm"):
            continue
        held = [
            (projection, name, value)
            for projection in (attention.k_proj, attention.v_proj)
            for name, value in projection.named_parameters()
        ]
        plain = all(type(value.data) is Tensor and value.device.type != "meta" for _, _, value in held)
        rows = attention.kvshare_stored * attention.head_dim
        whole = all(len(value) == rows for _, _, value in held)
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
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return shared_class(getattr(transformers, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
