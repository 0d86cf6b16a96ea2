# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""What a forward puts into a cache, and what it finds there.

In: what keys and values of new tokens share, before bias, norm and rope; any cache of transformers. Out: that of all tokens, as
numbers or as integers and scales. Never: computes attention, changes what a tensor holds that an earlier forward gave out.

Numbers, or integers, lie in the key slot. The value slot has a width of zero, or holds the scales of integers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .kvshare_bits import dequantise, quantise
from .kvshare_channels import channels_on
from .kvshare_classes import unknown

ROOM = 64  # a growing cache has memory for up to a 64th more tokens than it holds, so that few are copied when one comes
LONG = 256  # tokens from which on it is worth it
CACHE_NAMES = ("cache", "past_key_values", "layer_past")  # what forwards of transformers call their cache


def cache_of(given: Any, arguments: dict[str, Any]) -> Any:
    """The cache that a forward was given as past_key_values, or by another name among its arguments, from which it is taken:
    layer_past in some families, and since transformers 5.24 `cache`, as pages of continuous batching were called before; they stay.
    """
    for name in ("cache", "layer_past"):
        found = arguments.get(name)
        pages = found is not None and (not isinstance(found, Cache) or hasattr(found, "layer_to_allocator"))
        if name in arguments and not pages:
            del arguments[name]
            given = found if given is None else given
    return given


def cache_name(native: Any) -> str:
    """What the forward of a native class calls its cache.

    Raises:
        ImportError: nothing that is known, so that a cache would be lost on the way.
    """
    named = inspect.signature(native.forward).parameters
    found = next((name for name in CACHE_NAMES if name in named), None)
    if found is None:
        raise unknown(native, "takes its cache by a name")
    return found


def passed_on(name: str, given: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a native forward with the cache under the name that it has there; where these hold pages, as they are."""
    return arguments if "cache" in arguments else {**arguments, name: given}


def into_pages(name: str, key: Tensor, value: Tensor, layer: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Put keys and values into pages of full size, where attention does that: since transformers 5.24, to which these are a cache.

    Args:
        name: what the native attention calls its cache.
        key, value: of new tokens, (1, kv heads, new tokens, head_dim).
        layer: its index.
        arguments: for what computes attention; pages that were filled are taken out, and what is to be known of them is put in.

    Returns:
        of all slots, where pages were filled; otherwise key and value.
    """
    if name != "cache" or arguments.get("cache") is None:
        return key, value
    return arguments.pop("cache").update(key, value, layer, kwargs=arguments)


def appended(held: Tensor, new: Tensor) -> Tensor:
    """`held` with `new` behind it, in memory that has room for more: both (batch, kv heads, tokens, n), alike but for their tokens.

    Where `held` is what an earlier call gave, and nothing was put behind it since, its memory is used on, and nothing is copied but
    `new`. What calls gave stays as it was: a copy of a cache, or one that was cropped, gets memory of its own.
    """
    tokens = held.shape[-2]
    total = tokens + new.shape[-2]
    memory, used = getattr(held, "kvshare_memory", (held, [0]))
    fits = used[0] == tokens and total <= memory.shape[-2]
    if not fits or memory.is_inference() != torch.is_inference_mode_enabled():
        memory, used = held.new_empty(*held.shape[:-2], total + total // ROOM, held.shape[-1]), [tokens]
        memory.narrow(-2, 0, tokens).copy_(held)
    memory.narrow(-2, tokens, total - tokens).copy_(new)
    used[0] = total
    grown: Any = memory.narrow(-2, 0, total)
    grown.kvshare_memory = memory, used
    return grown


def _grows(cache: Any, layer: int, new: Tensor) -> bool:
    """Whether a layer's tensors may grow where they lie: nothing else than its own update would do is asked of it, and no gradient
    needs what it held before.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(cache) is not DynamicCache or cache.offloading:
        return False
    held: Any = cache.layers[layer] if layer < len(cache.layers) else None
    if type(held) is not DynamicLayer or not held.is_initialized or held.keys.dim() != 4 or held.keys.shape[-2] < LONG:
        return False
    keys = held.keys
    same = keys.shape[:2] == new.shape[:2] and keys.shape[-1] == new.shape[-1] and keys.dtype == new.dtype
    return same and type(new) is Tensor and type(keys) is Tensor and keys.device == new.device


def _put(cache: Any, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """As `cache.update(keys, values, layer)`, by `appended` where that can be."""
    if not _grows(cache, layer, keys):
        return cache.update(keys, values, layer)
    held = cache.layers[layer]
    held.keys = appended(held.keys, keys)
    held.values = appended(held.values, values) if values.shape[-1] else torch.cat([held.values, values], -2)
    return held.keys, held.values


def update(cache: Any, shared: Tensor, layer: int, attention: Any) -> tuple[Tensor, Tensor | None]:
    """Put new tokens into a cache and take out what is there.

    Args:
        cache: a transformers cache.
        shared: of the new tokens, (batch, kv heads, new tokens, head_dim).
        layer: of the cache.
        attention: the module, whose `kvshare_bits` are 8, 4, or None for the numbers as they are; `kvshare_channels` are moved to
            the device of `shared`.

    Returns:
        all slots as they are cached, and their scales, if there are any: see `quantise`.
    """
    if attention.kvshare_bits is None:
        return _put(cache, shared, shared[..., :0], layer)[0], None
    numbers, scale = quantise(shared, attention.kvshare_bits, channels_on(attention, shared.device))
    held: Any = cache.layers[layer] if layer < len(cache.layers) else None
    if hasattr(held, "max_cache_len") and not held.is_initialized:  # a static layer gives both slots the dtype of keys
        held.lazy_initialization(numbers, scale)
        held.values = held.values.to(scale.dtype)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(held.values)
    return _put(cache, numbers, scale, layer)


def read(cache: Any, shared: Tensor, layer: int, attention: Any) -> Tensor:
    """As `update`, all slots as numbers in the dtype of `shared`."""
    numbers, scale = update(cache, shared, layer, attention)
    return numbers if scale is None else dequantise(numbers, scale, shared.dtype, channels_on(attention, shared.device))


def _refuse(cache: Any, layer: int, bits: int | None) -> None:
    """Refuse a cache whose layer holds something else than a shared cache of so many bits puts there.

    Raises:
        ValueError: it holds values of its own, is quantised in another way, or not at all.
    """
    held: Any = cache.layers[layer] if layer < len(cache.layers) else None
    if bits is not None and hasattr(held, "_quantize"):
        raise ValueError(f"this cache quantises by itself, and the model keeps {bits} bits: use another cache, or no cache_bits")
    values = getattr(held, "values", None) if getattr(held, "is_initialized", False) else None
    if values is None or values.dim() != 4:
        return
    found = {torch.int8: 8, torch.uint8: 4}.get(held.keys.dtype) if values.shape[-1] == 1 else None
    if found is None and values.shape[-1]:
        raise ValueError(
            f"layer {layer} of this cache holds values, and a shared cache makes them of its keys: prefix tuning, and a cache that "
            "the native class has filled, need the native class; load without trust_remote_code, or start with an empty cache"
        )
    if found != bits and held.keys.numel():
        raise ValueError(
            f"this cache was filled with {found or 'all'} bits, and the model keeps {bits or 'all'}: start with an empty one"
        )


def pages_of(cache: Any, layer: int) -> Any:
    """What allocates the pages of a layer in continuous batching, if they are to hold what keys and values share; else None."""
    allocator = getattr(cache, "layer_to_allocator", {}).get(layer)
    return allocator if getattr(allocator, "kvshare_shared", False) else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def through_pages(shared: Tensor, layer: int, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Write new tokens into pages, and read the slots of all requests, one after the other.

    Args:
        shared: of the new tokens of all requests, (1, kv heads, new tokens, head_dim).
        layer: its index.
        kwargs: what continuous batching hands to attention.

    Returns:
        (1, kv heads, slots, head_dim), and what is left to hand to an attention function that knows of no pages.
    """
    allocator = pages_of(kwargs["cache"], layer)
    places = (kwargs[name][allocator.index] for name in ("read_index", "write_index"))
    rows = allocator.update_shared(shared[0].transpose(0, 1), layer, *places)
    left = {name: value for name, value in kwargs.items() if name not in ("cache", "read_index", "write_index", "block_table")}
    lengths = {name: kwargs[name][allocator.layer_type] for name in ("cu_seq_lens_k", "max_length_k")}
    return rows.transpose(0, 1)[None], left | lengths


def page_positions(layer: int, kwargs: dict[str, Any], position_ids: Tensor) -> Tensor:
    """The position of every slot that attention reads from pages, (1, slots); of new tokens alone, where no others are read."""
    allocator = pages_of(kwargs["cache"], layer)
    slots = 0 if allocator is None else kwargs["read_index"][allocator.index].numel()
    if not slots:
        return position_ids
    ends = kwargs["cu_seq_lens_k"][allocator.layer_type].long()  # 0, and where each request ends
    steps = torch.arange(slots, device=position_ids.device)
    request = torch.searchsorted(ends[1:], steps, right=True).clamp(max=len(ends) - 2)
    return (steps - ends[request])[None]


def _accept_empty(cache: Any) -> None:
    """Have a quantised cache pass on the tensor of width zero in the value slot: it would look for its largest number."""
    for layer in cache.layers:
        if hasattr(layer, "_quantize") and "_quantize" not in vars(layer):
            quantize, dequantize = layer._quantize, layer._dequantize
            by_scale = "scale" in inspect.signature(quantize).parameters  # float8, which unpacks numbers and their scale

            def store(x: Tensor, *args: Any, quantize: Any = quantize, by_scale: bool = by_scale, **kwargs: Any) -> Any:
                if x.shape[-1]:
                    return quantize(x, *args, **kwargs)
                return quantize(x, scale=x.new_ones(())) if by_scale else x

            def read(x: Any, dequantize: Any = dequantize) -> Tensor:
                return x if isinstance(x, Tensor) and not x.shape[-1] else dequantize(x)

            layer._quantize, layer._dequantize = store, read


def admit(decoder: Any, cache: Any) -> None:
    """Make a cache ready for what a decoder's layers put into it, or refuse it.

    Raises:
        ValueError: see `_refuse`.
    """
    for layer in decoder.kvshare_kinds.values():
        _refuse(cache, layer, decoder.kvshare_bits)
    _accept_empty(cache)
