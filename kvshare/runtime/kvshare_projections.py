# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Projections of the shared form: what keys and values share is computed once, and biases are added behind the cache.

In: hidden states; modules of a native class whose weights hold K = V. Out: queries, and what keys and values share.
Never: changes names or shapes of parameters, which are those of the checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def first_of_runs(heads: Tensor, repeat: int) -> Tensor:
    """Heads (kv heads, ...), each run of `repeat` made of its first."""
    return heads[::repeat].repeat_interleave(repeat, 0)


class SharedProjection(nn.Linear):
    """k_proj without its bias: what keys and values have in common. Its bias stays a parameter and is added to keys."""

    kvshare_biased = False  # whether it adds the bias all the same

    def forward(self, input: Tensor) -> Tensor:
        """(..., hidden) -> (..., kv heads * head_dim)."""
        return nn.functional.linear(input, self.weight, self.bias if self.kvshare_biased else None)


class FusedProjection(Conv1D):
    """c_attn, of which only the part of queries and that of keys is computed; its last third equals the second."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(..., hidden) -> queries, and what keys and values have in common before their biases, both (..., hidden)."""
        width = self.weight.shape[1] // 3
        query, shared = (input @ self.weight[:, : 2 * width]).split(width, -1)
        return query + self.bias[:width], shared

    def stored(self, held: Tensor) -> Tensor:
        """The weight (hidden, 3 * hidden), or the bias, as the native class needs it: the last third of a weight as the second."""
        return held if held.dim() == 1 else torch.cat([*held.chunk(3, 1)[:2], held.chunk(3, 1)[1]], 1)


class RowsProjection(nn.Linear):
    """qkv_proj, of which only the rows of queries and of keys are computed; those of values equal those of keys. It has no bias."""

    kvshare_queries: int  # how many rows are of queries
    kvshare_width: int  # head_dim
    kvshare_run: int  # equal KV heads in a row, of which the first is used

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(..., hidden) -> queries, and what keys and values have in common: (..., query or kv heads * head_dim)."""
        rows = (self.out_features - self.kvshare_queries) // 2
        query, shared = nn.functional.linear(input, self.weight[:-rows]).split([self.kvshare_queries, rows], -1)
        return query, shared

    def stored(self, held: Tensor) -> Tensor:
        """The weight (rows, hidden) as the native class needs it: keys as they are used, and values alike."""
        rows = (self.out_features - self.kvshare_queries) // 2
        heads = held[self.kvshare_queries : -rows].unflatten(0, (-1, self.kvshare_width))
        shared = first_of_runs(heads, self.kvshare_run).flatten(0, 1)
        return torch.cat([held[: self.kvshare_queries], shared, shared])


class GroupedProjection(nn.Linear):
    """query_key_value, whose rows stand by KV heads: those of its query heads, of keys, of values. The last are not computed."""

    kvshare_width: int  # head_dim
    kvshare_heads: int  # KV heads
    kvshare_run: int  # equal ones in a row, of which the first is used

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(..., hidden) -> queries, and what keys and values have in common before biases: (..., query or kv heads * head_dim)."""
        rows = self.weight.unflatten(0, (self.kvshare_heads, -1))[:, : -self.kvshare_width]  # (kv heads, rows of each, hidden)
        flat = input.reshape(1, -1, input.shape[-1]).expand(self.kvshare_heads, -1, -1)
        made = torch.bmm(flat, rows.transpose(1, 2)).transpose(0, 1)  # (tokens, kv heads, rows of each)
        made = made.reshape(*input.shape[:-1], self.kvshare_heads, -1, self.kvshare_width)
        query, shared = made[..., :-1, :], made[..., -1, :]
        if self.bias is not None:
            query = query + self.parts(self.bias)[:, :-2]
        return query.flatten(-3), shared.flatten(-2)

    def parts(self, rows: Tensor) -> Tensor:
        """(rows, ...) -> (kv heads, query heads of each + 2, head_dim, ...)."""
        return rows.unflatten(0, (self.kvshare_heads, -1, self.kvshare_width))

    def stored(self, held: Tensor) -> Tensor:
        """The weight (rows, hidden), or the bias, as the native class needs it: what stands behind queries as it is used, and in a
        weight values as keys.
        """
        parts = self.parts(held)
        keys, values = (first_of_runs(parts[:, place], self.kvshare_run) for place in (-2, -1 if held.dim() == 1 else -2))
        return torch.cat([parts[:, :-2], keys[:, None], values[:, None]], 1).flatten(0, 2)


class RepeatedProjection(GroupedProjection):
    """As `GroupedProjection`, for attention that takes rows apart itself: what is shared stands there twice, without biases."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """(..., hidden) -> (..., rows)."""
        query, shared = super().forward(input)
        by_head = (self.kvshare_heads, -1, self.kvshare_width)
        shared = shared.unflatten(-1, by_head)
        return torch.cat([query.unflatten(-1, by_head), shared, shared], -2).flatten(-3)


class ValueBias(nn.Module):
    """What is left of v_proj: its bias, where it has one, under the name in the checkpoint. Adapters for v_proj find it here, and
    tensor parallelism the `out_features` of the layer that it was.
    """

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.bias, self.out_features = projection.bias, projection.out_features

    def extra_repr(self) -> str:
        """What is said to those who look for v_proj."""
        return "k_proj makes keys and values"


def as_native(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors that hold q, k and v, and their biases, those that are among `tensors`, by full names, as the native class needs
    them: rows that the shared form does not use are made of those that it does.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (FusedProjection, RowsProjection, GroupedProjection)):
            held = [f"{name}.{kind}" for kind in ("weight", "bias") if f"{name}.{kind}" in tensors]
            found |= {full: module.stored(tensors[full]) for full in held}
    return found


def outer_bias(module: Any, like: Tensor) -> Any:
    """A bias that is added outside its module's forward, None where there is none; from the disk, where it waits there.

    Args:
        module: the projection.
        like: what the projection gives, without the bias; where processes have shared its rows out, that of this one.
    """
    bias = module.bias
    if bias is None:
        return None
    if bias.is_meta and hasattr(module, "_hf_hook"):
        return module._hf_hook.weights_map["bias"].to(like.device, like.dtype)
    if not hasattr(bias, "to_local"):
        return bias
    own = bias.to_local()
    return own if len(own) == like.shape[-1] else bias.full_tensor()


def project(projection: Any, hidden: Tensor) -> tuple[Tensor, Any]:
    """What k_proj gives without its bias, (..., kv heads * head_dim), and the bias, (kv heads * head_dim) or None.

    An adapter around it may have a bias of its own, add that of its base, scale it or turn it. All that is affine: what becomes of
    zeros is the bias.
    """
    base = getattr(projection, "base_layer", projection)
    if base.bias is None or _passes_biases(projection, base):
        shared = projection(hidden)
        return shared, outer_bias(projection, shared)
    name = "bias" if base is projection else "base_layer.bias"
    without = {name: hidden.new_zeros(base.bias.shape)}
    shared = torch.func.functional_call(projection, without, (hidden,))
    if base is projection:  # weights in few bits, which bring a class of their own
        return shared, outer_bias(projection, shared)
    zeros = hidden.new_zeros(1, hidden.shape[-1])
    own = [part for part in projection.modules() if isinstance(part, SharedProjection)]
    for part in own:
        part.kvshare_biased = True
    try:
        bias = projection(zeros)[0]
    finally:
        for part in own:
            part.kvshare_biased = False
    return shared - torch.func.functional_call(projection, without, (zeros,)), bias


def _passes_biases(projection: Any, base: Any) -> bool:
    """Whether a projection leaves out its base's bias and does nothing else about biases, so that the base's is all there is."""
    if not _holds(base, (SharedProjection,)):
        return False
    plain = hasattr(projection, "lora_A") and not len(getattr(projection, "lora_magnitude_vector", ()))
    return base is projection or (plain and not any(getattr(projection, "lora_bias", {}).values()))


def _holds(module: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether a module is of one of these classes, or was wrapped around one to train it in full."""
    return isinstance(module, classes) or any(isinstance(part, classes) for part in module.modules())


def unreplaced(projection: Any) -> Any:
    """A projection that makes queries, keys and values, if it is one of this file.

    Raises:
        ValueError: another class has taken its place.
    """
    known = (FusedProjection, RowsProjection, GroupedProjection)
    if isinstance(projection, known) or (not hasattr(projection, "base_layer") and _holds(projection, known)):
        return projection
    raise ValueError(
        f"a {type(projection).__name__} has taken the place of a projection that makes queries, keys and values: the shared form "
        "has to leave out the values itself; name it among the modules to be left as they are when weights are quantised "
        "(llm_int8_skip_modules, modules_to_not_convert), and put adapters elsewhere"
    )
