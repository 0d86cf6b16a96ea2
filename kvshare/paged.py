"""Continuous batching with pages that hold what keys and values share: half the bytes per token.

In: nothing. Out: a context in which transformers' continuous batching makes such pages for models in the shared form.
Never: changes a model; outside the context, pages hold keys and values, which the shared form fills correctly, too.

    with shared_pages():
        model.generate_batch(prompts, generation_config=...)
"""

from __future__ import annotations

from collections.abc import Iterator
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

    def __init__(self, *args: Any, config: Any, layer_indices: list[int], num_key_value_heads: int, **kwargs: Any) -> None:
        block = getattr(config, "kvshare", None) or {"form": None, "layers": [], "kv_heads": []}
        heads = dict(zip(block["layers"], block["kv_heads"], strict=True))
        if block["form"] != "shared" or any(heads.get(layer) != num_key_value_heads for layer in layer_indices):
            raise UnsupportedModelError(
                "this model cannot have pages of what keys and values share",
                f"not all of its layers share {num_key_value_heads} heads: pages are alike in all layers",
                "generate without shared_pages(), which is correct and takes full-size pages",
            )
        self._rows: dict[int, Tensor] = {}
        super().__init__(*args, config=config, layer_indices=layer_indices, num_key_value_heads=num_key_value_heads, **kwargs)

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
def shared_pages() -> Iterator[None]:
    """Within, continuous batching of models in the shared form keeps one tensor per token in layers of full attention.

    Layers with a sliding window keep keys and values.

    Raises:
        UnsupportedModelError: when continuous batching starts, of a model whose layers do not all share as many heads.
    """
    before = paged.ATTN_TYPE_TO_ALLOCATOR
    paged.ATTN_TYPE_TO_ALLOCATOR = before | {FULL_ATTENTION: SharedAllocator}
    try:
        yield
    finally:
        paged.ATTN_TYPE_TO_ALLOCATOR = before
