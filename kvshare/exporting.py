"""A model in shared form as a program for devices: transformers' modules for export, with a cache of the shared form's size.

In: such a module, before it is exported. Out: the same, whose cache holds what keys and values share.
Never: exports; imports executorch, which transformers' modules do not need either.

    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM
    module = shared_cache(TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=2048))
    program = module.export(input_ids=..., cache_position=...)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from kvshare.errors import UnsupportedModelError, UsageError
from kvshare.runtime.kvshare_cache import update


def shared_cache(module: nn.Module) -> nn.Module:
    """Make the cache of a module for export anew, as small as the model's form allows; layers that share nothing keep theirs.

    Args:
        module: `TorchExportableModuleForDecoderOnlyLM`, or one of the modules with a static or hybrid cache that it chooses from,
            around a model as `kvshare.load` gives it.

    Returns:
        the module.

    Raises:
        UsageError: it holds no static cache.
        UnsupportedModelError: its model is neither in the shared nor in the exact or rotated form.
    """
    found = [(part, cache) for part in module.modules() for cache in vars(part).values() if isinstance(cache, StaticCache)]
    if len(found) != 1:
        raise UsageError(
            f"this {type(module).__name__} holds {len(found)} static caches",
            "one is made for a model that is to be exported",
            "give TorchExportableModuleForDecoderOnlyLM(model, batch_size, max_cache_len), before it is exported",
        )
    holder, cache = found[0]
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "kvshare_repeat")]
    attentions = {part.layer_idx: part for part in parts}
    if not attentions:
        raise UnsupportedModelError(
            "this model has no cache that could be smaller",
            "it is in its native form",
            "load the checkpoint by kvshare.load, or with trust_remote_code=True",
        )
    for index, attention in attentions.items():
        layer: Any = cache.layers[index]
        batch, device, dtype = layer.keys.shape[0], layer.keys.device, layer.keys.dtype
        layer.is_initialized = False
        update(
            cache, torch.empty(batch, attention.kvshare_heads, 0, attention.head_dim, dtype=dtype, device=device), index, attention
        )
        holder.register_buffer(f"key_cache_{index}", layer.keys, persistent=False)
        holder.register_buffer(f"value_cache_{index}", layer.values, persistent=False)
    return module
