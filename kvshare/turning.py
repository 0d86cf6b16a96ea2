"""What rope does to values that are read from rotated keys: how much of each rope pair is left, and how much becomes noise.

In: the attention weights of one layer, how it rotates. Out: for each number of a head, noise relative to its pair's own variance.
Never: sees keys or values, keeps anything but sums.

In the rotated form a query i reads s_j turned by the angle (j - i) w_m of each rope pair m. Let r_m be the mean of the turn
exp(sqrt(-1) (j - i) w_m) over queries and tokens, weighted by p_ij^2, which is what independent tokens add to the variance of an
average over p. Of a pair's variance, |r_m|^2 is left as signal that a linear reader can use; 1 - |r_m|^2 goes in all directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvshare.merge import AttentionWeights

# What the noise counts. By itself it would be 1; but pairs that turn alike are not independent, and part of it is a mean that the
# reader knows. Chosen on books that were not calibrated on: perplexity +5.2 % at 0.12, +4.6 % at 0.4, +5.0 % at 1, +24 % without.
COUNTS = 0.4
MOST_NOISE = 1e3  # relative to the signal: pairs that turn so fast carry nothing, and more would only disturb the search


class TurnSums:
    """Running sums of the turns of rope pairs between queries and the tokens that they read, one batch at a time.

    Args:
        weights: the source layer; rope turns some of its numbers.
    """

    def __init__(self, weights: AttentionWeights) -> None:
        self.rotary_dim, self.width, self.heads = weights.rotated, weights.head_dim, weights.kv_heads
        shape = (weights.kv_heads, weights.query_heads // weights.kv_heads, self.rotary_dim // 2)
        self.sums = torch.zeros(shape, dtype=torch.complex128, device=weights.q.device)
        self.total = torch.zeros(shape[:2], dtype=torch.float64, device=weights.q.device)

    def add(self, attention: Tensor, head: int, rotate: Callable[[Tensor, Tensor], Tensor], queries: Tensor, keys: Tensor) -> None:
        """Add the attention weights of the query heads of one KV head.

        Args:
            attention: (rows, queries, i, j).
            head: the KV head.
            rotate: as `Attending` has it.
            queries, keys: the positions i and j.
        """
        half = self.rotary_dim // 2

        def angles(positions: Tensor) -> Tensor:
            ones = torch.zeros(1, 1, len(positions), self.width, device=attention.device)
            ones[..., :half] = 1
            turned = rotate(ones, positions)[0, 0]  # cosines, then sines, of each position
            found = torch.complex(turned[:, :half], turned[:, half : self.rotary_dim])
            return found / found.abs()  # yarn multiplies both

        squares, at = attention.square(), angles(keys)
        read = torch.complex(squares @ at.real, squares @ at.imag)  # (rows, queries, i, pairs)
        self.sums[head] += (read * angles(queries).conj()).sum((0, 2))
        self.total[head] += squares.sum((0, 2, 3)).double()

    def noise(self) -> Tensor:
        """Noise of each number of a head, relative to the signal of its pair: COUNTS (1 - |r|^2) / |r|^2, (kv heads, head_dim)."""
        left = (self.sums / self.total.clamp_min(1e-30)[..., None]).abs().square().mean(1)  # (kv heads, pairs)
        noise = COUNTS * ((1 - left).clamp_min(0) / left.clamp_min(1 / MOST_NOISE)).clamp(max=MOST_NOISE)
        rest = noise.new_zeros(self.heads, self.width - self.rotary_dim)
        return torch.cat([noise, noise, rest], -1)
