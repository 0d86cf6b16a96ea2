"""How an attention module's tensors hold its projections.

In: `AttentionWeights`, or tensors by their name below the attention module. Out: the other. Never: touches modules, does IO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvshare.families import PARTS, Family
from kvshare.merge import AttentionWeights

NORMS = ("query_norm", "key_norm")


def pack(weights: AttentionWeights, family: Family) -> dict[str, Tensor]:
    """The tensors by name (`q_proj.weight`); the output projection's bias, which no merge touches, is not among them."""
    fields = _fields(family)
    groups: dict[str, list[Tensor]] = {}
    order = pair_order(weights.head_dim, weights.rotated).argsort()
    for field, value in weights.tensors.items():  # in the order q, k, v, which is that of the rows of a fused tensor
        if field in fields:
            plain = _reordered(field, value, weights.head_dim, order) if family.interleaved else value
            groups.setdefault(fields[field], []).append(plain - family.norm_offset if field in NORMS else plain)
    heads = (weights.query_heads, weights.kv_heads)
    whole = {name: fused_rows(parts, heads, family) if len(parts) > 1 else parts[0] for name, parts in groups.items()}
    return {name: value.T if family.transposed and value.dim() == 2 else value for name, value in whole.items()}


def unpack(tensors: Mapping[str, Tensor], family: Family, head_dim: int, rotary_dim: int | None = None) -> AttentionWeights:
    """The inverse of `pack`; tensors of other names are left out.

    Args:
        tensors: by their name below the attention module.
        family: of the layer.
        head_dim: numbers of a head.
        rotary_dim: how many of them rope turns, the first ones; None is all of them. In an interleaved family it says which
            numbers change places.
    """
    found: dict[str, Any] = {}
    fields = _fields(family)
    order = pair_order(head_dim, head_dim if rotary_dim is None else rotary_dim)
    for field, name in fields.items():
        if name in tensors:
            value = tensors[name].T if family.transposed and tensors[name].dim() == 2 else tensors[name]
            if family.fused and field[0] in "qkv" and field not in NORMS:
                queries = tensors[fields["o"]].shape[0 if family.transposed else 1] // head_dim
                heads = (queries, (len(value) // head_dim - queries) // 2)
                value = fused_parts(value, heads, family)["qkv".index(field[0])]
            if field in NORMS and family.norm_offset:
                value = value.double() + family.norm_offset  # the sum has more digits than what is stored
            found[field] = _reordered(field, value, head_dim, order) if family.interleaved else value
    return AttentionWeights(head_dim=head_dim, rotary_dim=rotary_dim, **found)


def pair_order(head_dim: int, rotary_dim: int) -> Tensor:
    """Which number of a head with rope pairs side by side stands at each place of one with pairs half of them apart."""
    turned = torch.arange(rotary_dim).view(-1, 2).T.flatten()
    return torch.cat([turned, torch.arange(rotary_dim, head_dim)])


def paired(states: Tensor, family: Family, weights: AttentionWeights) -> Tensor:
    """What the heads of a module give, (..., heads * head_dim), in the order of the columns of `weights.o`."""
    if not family.interleaved:
        return states
    order = pair_order(weights.head_dim, weights.rotated).to(states.device)
    return states.unflatten(-1, (-1, weights.head_dim))[..., order].flatten(-2)


def fused_parts(fused: Tensor, heads: tuple[int, int], family: Family) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of q, of k and of v in a tensor that holds all three.

    Args:
        fused: (rows of q, k and v, ...).
        heads: query heads and KV heads.
        family: says where the rows lie.
    """
    queries, keys = heads
    width = len(fused) // (queries + 2 * keys)
    if family.grouped_rows:
        groups = fused.unflatten(0, (keys, -1, width))
        return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
    query, key, value = fused.split([queries * width, keys * width, keys * width])
    return query, key, value


def fused_rows(parts: Sequence[Tensor], heads: tuple[int, int], family: Family) -> Tensor:
    """The inverse of `fused_parts`."""
    if not family.grouped_rows:
        return torch.cat(list(parts))
    width = len(parts[0]) // heads[0]
    return torch.cat([part.unflatten(0, (heads[1], -1, width)) for part in parts], 1).flatten(0, 2)


def _reordered(field: str, value: Tensor, head_dim: int, order: Tensor) -> Tensor:
    """A tensor of `AttentionWeights` with the numbers of each head in another order: columns of `o`, rows of the others."""
    dim = 1 if field == "o" else 0
    return value.unflatten(dim, (-1, head_dim)).index_select(dim + 1, order.to(value.device)).flatten(dim, dim + 1)


def names(family: Family) -> frozenset[str]:
    """The names that `pack` may give."""
    return frozenset(_fields(family).values())


def _fields(family: Family) -> dict[str, str]:
    """Names of tensors by the fields of `AttentionWeights`."""
    names = {part: f"{getattr(family, part)}.weight" for part in PARTS}
    biases = {f"{part}_bias": f"{getattr(family, part)}.bias" for part in PARTS if part != "o"}
    norms = dict(zip(NORMS, (family.query_norm, family.key_norm), strict=True))
    return names | biases | {field: f"{norm}.weight" for field, norm in norms.items() if norm is not None}
