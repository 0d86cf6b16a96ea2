"""How an attention module's tensors hold its projections.

In: `AttentionWeights`, or tensors by their name below the attention module. Out: the other. Never: touches modules, does IO.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvshare.families import PARTS, Family
from kvshare.merge import AttentionWeights


def pack(weights: AttentionWeights, family: Family) -> dict[str, Tensor]:
    """The tensors by name (`q_proj.weight`); the output projection's bias, which no merge touches, is not among them."""
    fields = _fields(family)
    groups: dict[str, list[Tensor]] = {}
    for field, value in weights.tensors.items():  # in the order q, k, v, which is that of the rows of a fused tensor
        if field in fields:
            groups.setdefault(fields[field], []).append(value)
    whole = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in groups.items()}
    return {name: value.T if family.transposed and value.dim() == 2 else value for name, value in whole.items()}


def unpack(tensors: Mapping[str, Tensor], family: Family, head_dim: int, rotary_dim: int | None = None) -> AttentionWeights:
    """The inverse of `pack`; tensors of other names are left out."""
    found: dict[str, Any] = {}
    for field, name in _fields(family).items():
        if name in tensors:
            value = tensors[name].T if family.transposed and tensors[name].dim() == 2 else tensors[name]
            found[field] = value.chunk(3)["qkv".index(field[0])] if family.fused and field[0] in "qkv" else value
    return AttentionWeights(head_dim=head_dim, rotary_dim=rotary_dim, **found)


def tied(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors, by full names, with v made equal to k wherever k is among them."""
    result = dict(tensors)
    for name, value in tensors.items():
        prefix, found, _ = name.rpartition(f".{family.k}.weight")
        if found and family.fused:
            columns = 1 if family.transposed else 0
            query, key, _ = value.chunk(3, columns)
            result[name] = torch.cat([query, key, key], columns)
        elif found:
            result[f"{prefix}.{family.v}.weight"] = value
    return result


def names(family: Family) -> frozenset[str]:
    """The names that `pack` may give."""
    return frozenset(_fields(family).values())


def _fields(family: Family) -> dict[str, str]:
    """Names of tensors by the fields of `AttentionWeights`."""
    names = {part: f"{getattr(family, part)}.weight" for part in PARTS}
    biases = {f"{part}_bias": f"{getattr(family, part)}.bias" for part in PARTS if part != "o"}
    norms = {"query_norm": family.query_norm, "key_norm": family.key_norm}
    return names | biases | {field: f"{norm}.weight" for field, norm in norms.items() if norm is not None}
