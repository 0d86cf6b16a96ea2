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
    head_dim); biases and norms are None where the layer has none. `query_norm` and `key_norm` are the weights of an RMS norm
    before rope, of each head (head_dim) or of all heads as one (query heads * head_dim, kv heads * head_dim). Rope turns the
    first `rotary_dim` numbers of every head, in pairs (j, j + rotary_dim/2), and leaves the others alone; None is all of them,
    0 none (NoPE).
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
    rotary_dim: int | None = None

    @property
    def query_heads(self) -> int:
        """How many query heads there are."""
        return self.q.shape[0] // self.head_dim

    @property
    def kv_heads(self) -> int:
        """How many KV heads there are."""
        return self.k.shape[0] // self.head_dim

    @property
    def rotated(self) -> int:
        """How many numbers of a head rope turns."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

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

    def repeated(self, kv_heads: int) -> AttentionWeights:
        """The same function with `kv_heads` KV heads, a multiple of those there are: each stands several times in a row.

        The query heads of one KV head are neighbours, so theirs is still where they look for it.
        """
        tensors = {name: value for name, value in self.tensors.items() if name in ("k", "v", "k_bias", "v_bias")}
        return self.with_tensors({name: repeat_heads(value, self.head_dim, kv_heads) for name, value in tensors.items()})

    def unrepeated(self, kv_heads: int) -> AttentionWeights:
        """The inverse of `repeated`: the first of each run of equal heads, `kv_heads` in all."""
        tensors = {name: value for name, value in self.tensors.items() if name in ("k", "v", "k_bias", "v_bias")}
        size = self.kv_heads // kv_heads
        firsts = {name: value.unflatten(0, (kv_heads, size, self.head_dim))[:, 0].flatten(0, 1) for name, value in tensors.items()}
        return self.with_tensors(firsts)


def repeat_heads(rows: Tensor, head_dim: int, kv_heads: int) -> Tensor:
    """Rows of KV heads (any * head_dim, ...) with each head repeated in a row, so that there are `kv_heads`."""
    heads = rows.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(kv_heads // len(heads), 0).flatten(0, 1)


Grouping = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Moments:
    """What the closed form needs to know of a layer's activations (float64).

    `grouping` lists the source KV heads of each output head. Per group of g heads, u = (k_1, ..., k_g, v_1, ..., v_g) are its
    projections before biases, norm and rope, with a last entry that is constantly 1 where there are biases: n = 2 g head_dim
    numbers, or one more. `keys` are (g, n, n) or, shared by the heads, (1, n, n): E[u u^T], tokens weighted by what an
    error in a key does to the attention output. `values`, of the same shapes, are E[u u^T] of u averaged over tokens by the
    attention weights. `key_metric` (kv heads, head_dim, head_dim) is Lambda: what an error of a weighted token's key costs;
    `value_metric`, of the same shape, is M: what an error of an averaged value costs. `value_noise` (kv heads, head_dim), where
    values are to be read from rotated keys, is what rope adds to each number's variance, relative to that of its pair.
    """

    grouping: Grouping
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_metric: Tensor
    value_metric: Tensor
    value_noise: Tensor | None = None
