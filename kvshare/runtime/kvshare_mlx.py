# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""The shared form in mlx-lm: its own model of the family, whose layers that share K and V cache them once.

In: a checkpoint that kvshare wrote, whose config.json names this file as its `model_file`, or is told so by the caller of
`mlx_lm.load`. Out: mlx-lm's model, with mlx-lm's own caches, whose values have no width.
Never: changes a weight or the name of one, computes another function than mlx-lm does without this file.

A cache holds values, which but for a difference of biases are keys before norm and rope. Keys are made of them when they are read.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import mlx.core as mx
from mlx_lm.utils import MODEL_REMAPPING

ATTENTIONS = ("self_attn", "attention", "attn")
NORMS = ("k_norm", "k_layernorm")
PROBE = (3, 5)  # tokens, and the position of the first, with which the native code is asked how it makes keys
DIFFERENCE = 0.02  # the most that keys may differ by, as a part of their size, where weights and activations have 16 bits
WITHOUT = ": take model_file out of config.json, and mlx-lm runs this checkpoint with a cache of full size"


class ModelArgs:
    """What mlx-lm's model of the family takes, the kvshare block of config.json, and the KV heads of the weights, if it says."""

    def __init__(self, module: Any, native: Any, block: dict[str, Any], stored: int | None) -> None:
        self.module, self.native, self.block, self.stored = module, native, block, stored

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """The arguments of a model from its config.json.

        Raises:
            ValueError: its kvshare block is missing or of another form, or mlx-lm has no such model.
        """
        block, name = config.get("kvshare"), config["model_type"]
        if not isinstance(block, dict) or block.get("form") != "shared":
            raise ValueError("mlx-lm runs the shared form of kvshare alone: take model_file out of config.json")
        try:
            module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(name, name)}")
        except ImportError as error:
            raise ValueError(f"mlx-lm has no model {name!r}") from error
        return cls(module, module.ModelArgs.from_dict(config), block, config.get("num_key_value_heads"))


def Model(args: ModelArgs) -> Any:  # noqa: N802  mlx-lm looks for this name
    """mlx-lm's model of the family, without weights, whose layers of the kvshare block have shared attention."""
    model = args.module.Model(args.native)
    layers, heads = args.block["layers"], args.block["kv_heads"]
    for index, count in zip(layers, heads, strict=True):
        layer = model.layers[index]
        attention = next((getattr(layer, name) for name in ATTENTIONS if hasattr(layer, name)), None)
        if attention is None:
            raise ValueError(f"layer {index} of mlx-lm's {args.native.model_type} has no attention under a known name")
        attention.__class__ = _shared_class(type(attention))
        attention.kvshare_run, attention.kvshare_asked = max(1, (args.stored or count) // count), False  # equal heads in a row
    return model


def _shared_class(native: Any) -> Any:
    """The shared form of an attention class of mlx-lm."""
    names = [*inspect.signature(native.__call__).parameters][1:]  # hidden states, by whatever name, a mask, the cache, ...

    def attend(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As mlx-lm's own, with another view of its cache."""
        given = dict(zip(names, args, strict=False)) | kwargs
        if not self.kvshare_asked:
            _check_projections(self)
            self.kvshare_norm, self.kvshare_turns = _how_keys_are_made(self, native, names, given[names[0]])
            self.kvshare_asked = True
        if given.get("cache") is not None:
            given["cache"] = _Half(self, given["cache"])
        return native.__call__(self, **given)

    return type(f"Shared{native.__name__}", (native,), {"__call__": attend, "__doc__": native.__doc__})


class _Half:
    """What a shared attention module sees of its cache, which gets values alone."""

    def __init__(self, attention: Any, cache: Any) -> None:
        self.attention, self.cache = attention, cache

    def __getattr__(self, name: str) -> Any:
        if name == "bits":  # what is read is in full precision
            raise AttributeError(name)
        return getattr(self.cache, name)

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Keys and values of all tokens, (batch, kv heads, tokens, head_dim); the keys that come in are not looked at, and so never
        computed.
        """
        run = self.attention.kvshare_run
        held = values[:, ::run]
        stored, _ = self.cache.update_and_fetch(held, held[..., :0])
        if hasattr(self.cache, "bits"):
            stored = mx.dequantize(*stored, group_size=self.cache.group_size, bits=self.cache.bits)
        shared = _normed(self.attention, _with_key_bias(self.attention, stored, run), self.attention.kvshare_norm)
        return self._turned(shared) if self.attention.kvshare_turns else shared, stored

    def _turned(self, shared: Any) -> Any:
        """Keys behind rope. A cache with a window keeps its first `keep` tokens and writes over the others in turn: those before
        `_idx` are the newest.
        """
        rope, tokens, behind = self.attention.rope, shared.shape[2], self.cache.offset  # behind: the position of the next token
        keep = min(getattr(self.cache, "keep", 0), tokens)
        split = max(keep, min(getattr(self.cache, "_idx", tokens), tokens))
        parts = [
            (shared[:, :, :keep], 0),
            (shared[:, :, keep:split], behind - (split - keep)),
            (shared[:, :, split:], behind - (tokens - keep)),
        ]
        turned = [rope(part, offset=position) for part, position in parts if part.shape[2]]
        return turned[0] if len(turned) == 1 else mx.concatenate(turned, axis=2)


def _with_key_bias(attention: Any, values: Any, run: int) -> Any:
    """Values (batch, kv heads, tokens, head_dim) with the bias of keys in place of their own."""
    if "k_proj" not in attention:
        return values
    signed = ((1, attention.k_proj), (-1, attention.v_proj))
    biases = [sign * projection.bias for sign, projection in signed if "bias" in projection]
    if not biases:
        return values
    return values + sum(biases).reshape(-1, 1, values.shape[-1])[::run].astype(values.dtype)


def _normed(attention: Any, shared: Any, name: str | None) -> Any:
    """(batch, kv heads, tokens, head_dim), each head normed, or all heads of a token as one."""
    if name is None:
        return shared
    norm = getattr(attention, name)
    if norm.weight.shape[-1] == shared.shape[-1]:
        return norm(shared)
    flat = shared.transpose(0, 2, 1, 3).flatten(-2)
    return norm(flat).reshape(*flat.shape[:-1], *shared.shape[1::2]).transpose(0, 2, 1, 3)


class _AskedError(Exception):
    """Ends a forward whose keys have been seen."""

    def __init__(self, keys: Any, values: Any) -> None:
        self.keys, self.values = keys, values


class _Question:
    """In place of a cache: ends the forward with what was to go into it."""

    offset = PROBE[1]

    def update_and_fetch(self, keys: Any, values: Any) -> Any:
        raise _AskedError(keys, values)


def _how_keys_are_made(attention: Any, native: Any, names: list[str], hidden: Any) -> tuple[str | None, bool]:
    """The name of the norm that keys go through, None without one, and whether rope turns them, as the native code has it.

    Args:
        attention: the module.
        native: mlx-lm's class of it.
        names: what its calls take, hidden states first.
        hidden: hidden states (..., hidden) as it gets them.

    Raises:
        ValueError: it does something else.
    """
    probe = mx.random.normal((1, PROBE[0], hidden.shape[-1]), key=mx.random.key(0)).astype(hidden.dtype)
    try:
        native.__call__(attention, **dict.fromkeys(names) | {names[0]: probe, "cache": _Question()})
        raise ValueError(f"mlx-lm's {native.__name__} has not asked its cache for keys{WITHOUT}")
    except _AskedError as seen:
        keys, values = seen.keys, seen.values
    by_head = (1, PROBE[0], *values.shape[1::2])
    shared, own = (made.reshape(by_head).transpose(0, 2, 1, 3) for made in _project(attention, probe))
    for norm in (*(name for name in NORMS if hasattr(attention, name)), None):
        for turns in (True, False) if hasattr(attention, "rope") else (False,):
            made = _normed(attention, shared, norm)
            made = attention.rope(made, offset=PROBE[1]) if turns else made
            if _difference(made, keys) < DIFFERENCE and _difference(own, values) < DIFFERENCE:
                return norm, turns
    raise ValueError(f"mlx-lm's {native.__name__} makes keys or values in a way that kvshare does not know{WITHOUT}")


def _difference(made: Any, wanted: Any) -> float:
    """The root mean square of an error as a part of that of what is wanted."""
    made, wanted = made.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.sqrt(mx.mean(mx.square(made - wanted)) / mx.mean(mx.square(wanted))).item())


def _project(attention: Any, hidden: Any) -> list[Any]:
    """Keys and values before anything is done to them, both (batch, tokens, kv heads * head_dim)."""
    if "k_proj" in attention:
        return [attention.k_proj(hidden), attention.v_proj(hidden)]
    rows = attention.qkv_proj(hidden)
    return mx.split(rows[..., attention.n_heads * attention.head_dim :], 2, axis=-1)


def _check_projections(attention: Any) -> None:
    """Check that what is cached as values is what keys are made of.

    Raises:
        ValueError: the weights of K and V differ, or something has been put around them.
    """
    if "k_proj" in attention and "v_proj" in attention:
        parts = [attention.k_proj, attention.v_proj]
        rows = [slice(None), slice(None)]
    elif "qkv_proj" in attention and "bias" not in attention.qkv_proj:
        count = len(attention.qkv_proj.weight) - attention.n_heads * attention.head_dim
        parts = 2 * [attention.qkv_proj]
        rows = [slice(-count, -count // 2), slice(-count // 2, None)]
    else:
        raise ValueError(f"mlx-lm's {type(attention).__name__} has no k_proj of its own{WITHOUT}")
    if not all("weight" in part for part in parts):
        raise ValueError(f"an adapter lies around k_proj or v_proj, and K and V are one: train with kvshare heal or PEFT{WITHOUT}")
    if getattr(parts[0], "bits", None) != getattr(parts[1], "bits", None):
        return  # one tensor, rounded in two ways: keys are made of the one that values have
    for name in ("weight", "scales", "biases"):
        pair = [part.get(name) for part in parts]
        if pair[0] is not None and not mx.array_equal(pair[0][rows[0]], pair[1][rows[1]]):
            raise ValueError(
                f"the weights of K and V differ: this is not a checkpoint of kvshare, or it was trained since{WITHOUT}"
            )
