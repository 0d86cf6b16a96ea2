"""The naive initialisation: the plain average of K and V, and of the KV heads that end in one.

In: `AttentionWeights`. Out: `AttentionWeights` with k == v. Never: looks at activations.
It is the baseline that the others are held against.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kvshare.merge import AttentionWeights


def merge_mean(weights: AttentionWeights, kv_heads: int) -> AttentionWeights:
    """Average k with v and every run of neighbouring heads into one; q and o stay as they are.

    Args:
        weights: the source layer.
        kv_heads: KV heads of the result; divides the source's.
    """
    hidden = weights.k.shape[1]
    grouped = (kv_heads, weights.kv_heads // kv_heads, weights.head_dim)  # (output heads, merged heads, head_dim)
    shared = weights.k.to(torch.float64, copy=True).add_(weights.v).div_(2)  # in place: fresh memory takes longer than the sums
    if grouped[1] > 1:
        shared = shared.view(*grouped, hidden).mean(1).reshape(-1, hidden)
    biases = {
        name: bias.double().view(grouped).mean(1).flatten()
        for name in ("k_bias", "v_bias")
        if (bias := getattr(weights, name)) is not None
    }
    return replace(weights, k=shared, v=shared, **biases)
