"""The merge mathematics: pure functions from the tensors of one attention layer to the tensors of its shared form.

In: `AttentionWeights` of a source layer and the `Moments` of its activations. Out: `AttentionWeights` with k == v.
Never: does IO, reads a config, knows a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one attention layer, all in the (out, in) layout.

    Shapes: `q` (query heads * head_dim, hidden), `k` and `v` (kv heads * head_dim, hidden), `o` (hidden, query heads *
    head_dim); biases and norms are None where the layer has none. `query_norm` and `key_norm` (head_dim) are the weights
    of a per-head RMS norm before rope.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    head_dim: int
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None

    @property
    def query_heads(self) -> int:
        """How many query heads there are."""
        return self.q.shape[0] // self.head_dim

    @property
    def kv_heads(self) -> int:
        """How many KV heads there are."""
        return self.k.shape[0] // self.head_dim

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        fields = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "query_norm", "key_norm")
        return {name: value for name in fields if (value := getattr(self, name)) is not None}

    def to(self, dtype: torch.dtype) -> AttentionWeights:
        """The same weights in another dtype."""
        return self.with_tensors({name: value.to(dtype) for name, value in self.tensors.items()})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> AttentionWeights:
        """The same layer with other tensors, by field name."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)


@dataclass(frozen=True)
class Moments:
    """What the closed form needs to know of a layer's activations (float64).

    `second` (2, kv heads, head_dim, 2, kv heads, head_dim) is E[u u^T] of u = (keys, values) before norm and rope, about
    the mean where the projections have biases; `mean` (2, kv heads, head_dim) is that mean, zero without biases, and
    `projected_mean` the mean of the projections without their biases. `queries` (query heads, head_dim / 2) is
    E|q_j|^2 / 2 of each rope pair, after the query norm. With a key norm, tokens weigh 1/|k|^2 (method.md, section 2).
    """

    second: Tensor
    mean: Tensor
    projected_mean: Tensor
    queries: Tensor
