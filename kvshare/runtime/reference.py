"""What a step of shared attention is, in float64 and in the plainest way: what the kernels are held against.

In: rotated queries, what is cached, positions. Out: the attention output. Never: is fast, ships inside checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, angles: Tensor, adjacent: bool, scale: float = 1.0) -> Tensor:
    """Rope on the first 2 * angles.shape[-1] numbers of x (..., tokens, head_dim), angles (..., tokens, rope pairs).

    Args:
        x: what is rotated.
        angles: of each token and pair, in radians.
        adjacent: whether a pair is (2 p, 2 p + 1); otherwise it is (p, p + pairs).
        scale: what cosines and sines are multiplied by, as yarn and longrope do.
    """
    pairs = angles.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    cosine, sine = angles.cos() * scale, angles.sin() * scale
    first, second = (turned[..., 0::2], turned[..., 1::2]) if adjacent else (turned[..., :pairs], turned[..., pairs:])
    parts = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat([torch.stack(parts, -1).flatten(-2) if adjacent else torch.cat(parts, -1), rest], -1)


def shared_attention(
    query: Tensor,
    shared: Tensor,
    angles: Tensor,
    *,
    scaling: float,
    adjacent: bool = False,
    rope_scale: float = 1.0,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention whose keys are made of what is cached, which is also its values: all of it in float64.

    Args:
        query: rotated, (batch, query heads, new tokens, head_dim).
        shared: as cached, (batch, kv heads, slots, head_dim).
        angles: of each slot and rope pair, (batch or 1, slots, pairs); no pairs: keys do not rotate.
        scaling: of scores.
        adjacent, rope_scale: see `rotated`.
        mask: (batch or 1, 1, new tokens, slots), boolean (whether to attend) or added to scores; every query attends to one.
        key_bias, value_bias: (kv heads, head_dim).
        norm: what the root mean square norm of keys multiplies by, (head_dim).
        eps: of the norm.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: a score for each query head that takes weight and gives no value, (query heads).

    Returns:
        (batch, new tokens, query heads, head_dim).
    """
    query, shared = query.double(), shared.double()
    groups = query.shape[1] // shared.shape[1]
    key = shared if key_bias is None else shared + key_bias.double()[:, None]
    if norm is not None:
        key = key * (key.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.double()
    key = rotated(key, angles.double()[:, None], adjacent, rope_scale)
    value = shared if value_bias is None else shared + value_bias.double()[:, None]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


def rotated_attention(
    query: Tensor,
    shared: Tensor,
    query_angles: Tensor,
    angles: Tensor,
    *,
    scaling: float,
    adjacent: bool = False,
    rope_scale: float = 1.0,
    mask: Tensor | None = None,
    value_bias: Tensor | None = None,
) -> Tensor:
    """The rotated form's attention by its definition, o_i = sum_j p_ij R(j - i) s_j + b, in float64: nothing is turned twice.

    Args:
        query: before rope, (batch, query heads, new tokens, head_dim).
        shared: keys before rope, behind bias and norm, (batch, kv heads, slots, head_dim).
        query_angles, angles: of each new token and of each slot, (batch or 1, tokens, pairs); see `rotated`.
        scaling: of scores.
        adjacent, rope_scale: see `rotated`; it is in queries and in keys, and not in values.
        mask: (batch or 1, 1, new tokens, slots), boolean (whether to attend).
        value_bias: (kv heads, head_dim).

    Returns:
        (batch, new tokens, query heads, head_dim).
    """
    query, shared = query.double(), shared.double()
    groups = query.shape[1] // shared.shape[1]
    every = shared[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
    turned = rotated(every, (angles[:, None] - query_angles[:, :, None]).double()[:, None], adjacent)
    turned = turned.repeat_interleave(groups, 1)  # R(j - i) s_j: (batch, query heads, new tokens, slots, head_dim)
    scores = (turned @ query[..., None])[..., 0] * scaling * rope_scale**2
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    output = (scores.softmax(-1)[..., None, :] @ turned)[..., 0, :]
    if value_bias is not None:
        output = output + value_bias.double().repeat_interleave(groups, 0)[:, None]
    return output.transpose(1, 2)
