"""A cache in few bits: what rounding costs on top of sharing, and what it saves.

In: a model. Out: a forward that reads keys and values through the rounding, what is shared as the runtime rounds it; the bytes that
such a cache takes.
Never: changes a model, claims speed: numbers are rounded as a quantised cache would, and stay in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from kvshare.loading import Forward
from kvshare.runtime.kvshare_bits import in_steps, restored
from kvshare.runtime.kvshare_cache import cache_name
from kvshare.runtime.kvshare_channels import Channels, channels_on
from kvshare.timing import cached_tensors

SCALE_BYTES = 2  # a float16 for every token and head, of keys and of values


def round_trip(x: Tensor, bits: int, channels: Channels | None = None) -> Tensor:
    """Numbers x (batch, heads, tokens, width) through integers of `bits` bits, with one scale per token and head.

    q = round(x / s) within +-(2^(bits - 1) - 1), s = max |x| / (2^(bits - 1) - 1) in float16 over the width; the result is s q.
    With channels, numbers are made alike first, see `in_steps`.
    """
    if x.shape[-1] == 0:
        return x
    whole, step = in_steps(x, bits, channels)
    return restored(whole * step.float(), channels).to(x.dtype)


class QuantisedCache(DynamicCache):
    """A cache whose content has passed through `bits` bits, each token once, when it comes in; `attentions` are the modules of
    shared layers by their index, whose channels are made alike first.
    """

    def __init__(self, bits: int, config: Any, attentions: Mapping[int, Any]) -> None:
        super().__init__(config=config)
        self.bits, self.attentions = bits, attentions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, after rounding."""
        shared = self.attentions.get(layer_idx)
        channels = None if shared is None else channels_on(shared, key_states.device)
        key_states, value_states = round_trip(key_states, self.bits, channels), round_trip(value_states, self.bits)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def through_quantised_cache(model: Any, bits: int) -> Forward:
    """A forward, (rows, tokens) to logits, that reads every key and value through a `QuantisedCache`, a token's own included."""
    shared = {module.layer_idx: module for module in model.modules() if getattr(module, "kvshare_channels", None) is not None}
    name = cache_name(type(model))
    return lambda ids: model(input_ids=ids, use_cache=True, **{name: QuantisedCache(bits, model.config, shared)}).logits


def quantised_bytes(cache: Any, bits: int) -> int:
    """What a transformers cache would take in `bits` bits, its scales included, counted on the shapes of its tensors."""
    tensors = [tensor for tensor in cached_tensors(cache) if tensor.shape[-1]]
    return sum(tensor.shape[:-1].numel() * (-(-tensor.shape[-1] * bits // 8) + SCALE_BYTES) for tensor in tensors)
