"""Continuous batching with pages that hold what keys and values share: half the bytes per token.

In: a model. Out: a context in which transformers' continuous batching makes such pages for it.
Never: changes a model; outside the context, pages hold keys and values, which the shared form fills correctly, too.

    with shared_pages(model):
        model.generate_batch(prompts, generation_config=...)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching import cache as paged
from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION, FullAttentionCacheAllocator

from kvshare.errors import UnsupportedModelError


class SharedAllocator(FullAttentionCacheAllocator):
    """Pages of full attention with one row per token and layer; `kvshare_shared` tells the shared form that it may fill them."""

    rows_per_token = 1
    supports_block_table = False  # its kernel takes keys and values apart
    kvshare_shared = True
    _rows: Mapping[int, Tensor] = {}  # by layer

    @classmethod
    def get_bytes_per_page(cls, num_key_value_heads: int, head_dim: int, cache_dtype: torch.dtype, page_size: int) -> int:
        """Bytes of a page of `page_size` tokens in one layer."""
        whole: int = super().get_bytes_per_page(num_key_value_heads, head_dim, cache_dtype, page_size)
        return whole // 2

    def register_cache_tensor(self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: Any) -> None:
        """Lay the pages over the memory that all allocators share; the arguments are transformers' own."""
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        tokens = (non_trash_bytes + 2 * bytes_per_sector) // self.bytes_per_page * self.tokens_per_page
        shape = (tokens, self.num_key_value_heads, self.head_dim)
        rows = cache_tensor.view(self.cache_dtype)[: torch.Size(shape).numel()].view(shape)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, rows, pool)
        self._rows = {layer: rows[place * self.tokens_per_page :] for place, layer in enumerate(self.layer_indices)}

    def update_shared(self, shared: Tensor, layer: int, read_index: Tensor, write_index: Tensor) -> Tensor:
        """Write the new tokens of a layer and read all that attention needs: (new tokens or slots, kv heads, head_dim).

        Args:
            shared: what keys and values of the new tokens share.
            layer: its index.
            read_index, write_index: places of slots to read, none if there are only new tokens, and of new tokens.
        """
        self._rows[layer].index_copy_(0, write_index, shared)
        return self._rows[layer].index_select(0, read_index) if read_index.numel() else shared


@contextmanager
def shared_pages(model: Any) -> Iterator[None]:
    """Within, continuous batching of this model keeps one tensor per token in layers of full attention.

    Layers with a sliding window keep keys and values. Other models are not to be batched meanwhile.

    Args:
        model: in the shared form.

    Raises:
        UnsupportedModelError: it is not in the shared form, its attention is not computed by transformers' functions for pages, or
            not rightly, or its layers do not all share as many heads as its config names.
    """
    block, decoder = getattr(model.config, "kvshare", None), model.get_decoder()
    why = None
    if not block or block["form"] != "shared" or not hasattr(decoder, "kvshare_kinds"):
        why = "it is not a model in the shared form"
    elif not hasattr(decoder, "kvshare_tables_by_kind") or any(hasattr(part, "kvshare_value_norm") for part in decoder.modules()):
        why = f"the attention of {model.config.model_type} models knows of no pages, or has no rope"
    elif {*zip(block["layers"], block["kv_heads"], strict=True)} != {
        (layer, getattr(model.config, "num_key_value_heads", model.config.num_attention_heads))
        for layer in range(model.config.num_hidden_layers)
    }:
        why = "its layers do not all share as many heads as its config names, and pages are alike in all layers"
    elif getattr(model.config, "attn_logit_softcapping", None) is not None:
        why = "transformers' continuous batching leaves out its softcap: with any pages, it computes another function"
    if why is not None:
        raise UnsupportedModelError(
            "this model cannot have pages of what keys and values share",
            why,
            "generate without shared_pages, which takes pages of full size",
        )
    before = paged.ATTN_TYPE_TO_ALLOCATOR
    paged.ATTN_TYPE_TO_ALLOCATOR = before | {FULL_ATTENTION: SharedAllocator}
    try:
        yield
    finally:
        paged.ATTN_TYPE_TO_ALLOCATOR = before
