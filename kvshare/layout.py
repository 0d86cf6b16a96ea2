"""How an attention module's tensors hold its projections.

In: `AttentionWeights`, or tensors by their name below the attention module. Out: the other. Never: touches modules, does IO.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvshare.families import PARTS, Family
from kvshare.merge import AttentionWeights


def pack(weights: AttentionWeights, family: Family) -> dict[str, Tensor]:
    """The tensors by name (`q_proj.weight`); the output projection's bias, which no merge touches, is not among them."""
    fields = _fields(family)
    return {fields[field]: value for field, value in weights.tensors.items() if field in fields}


def unpack(tensors: Mapping[str, Tensor], family: Family, head_dim: int, rotary_dim: int | None = None) -> AttentionWeights:
    """The inverse of `pack`; tensors of other names are left out."""
    found: dict[str, Any] = {field: tensors[name] for field, name in _fields(family).items() if name in tensors}
    return AttentionWeights(head_dim=head_dim, rotary_dim=rotary_dim, **found)


def names(family: Family) -> frozenset[str]:
    """The names that `pack` may give."""
    return frozenset(_fields(family).values())


def _fields(family: Family) -> dict[str, str]:
    """Names of tensors by the fields of `AttentionWeights`."""
    names = {part: f"{getattr(family, part)}.weight" for part in PARTS}
    biases = {f"{part}_bias": f"{getattr(family, part)}.bias" for part in PARTS if part != "o"}
    norms = {"query_norm": family.query_norm, "key_norm": family.key_norm}
    return names | biases | {field: f"{norm}.weight" for field, norm in norms.items() if norm is not None}
