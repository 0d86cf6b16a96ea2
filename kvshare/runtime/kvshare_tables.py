# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Rope as kernels take it: how a family turns its heads, and tables for keys in the cache and for new queries.

In: a family's rotary embedding and positions. Out: cosines and sines; turned queries.
Never: changes what the family's own rope computes, up to rounding.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kvshare_classes import unknown
from .kvshare_cpu import TILE

ROPES = ("rotary_emb", "pos_emb")  # what decoders call their tables of rope


class Pairs(NamedTuple):
    """How a family rotates: the width that it rotates, whether the two of a pair lie side by side, and the column of the family's
    tables that holds the angle of each pair.
    """

    width: int
    adjacent: bool
    columns: tuple[int, ...]


def rotation_of(native: Any) -> Any:
    """What turns queries and keys, both (batch, heads, tokens, width), by cosines and sines in the module of a native class; None
    where nothing does. gptj turns one of them at a time, (batch, tokens, heads, width), by sines and cosines.

    Raises:
        ImportError: this version of transformers turns them in another way.
    """
    rotate = getattr(sys.modules[native.__module__], "apply_rotary_pos_emb", None)
    taken = [] if rotate is None else list(inspect.signature(rotate).parameters)
    if rotate is None or taken[:4] == ["q", "k", "cos", "sin"]:
        return rotate
    if taken != ["tensor", "sin", "cos"]:
        raise unknown(native, "rotates in a way")

    def both(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        turned = (rotate(states.transpose(1, 2), sines, cosines).transpose(1, 2) for states in (query, key))
        return next(turned), next(turned)

    return both


def rope_of(decoder: Any) -> Any:
    """What makes a decoder's tables of cosines and sines; None where it has none.

    Raises:
        ImportError: it has a name that is not known, and keys would stay as they are.
    """
    found = next((decoder._modules[name] for name in ROPES if name in decoder._modules), None)
    if found is None and any("Rotary" in type(part).__name__ for part in decoder.children()):
        raise unknown(type(decoder), "makes tables of rope under a name")
    return found


def pairs_of(rotate: Any, sample: Tensor, width: int) -> Pairs | None:
    """What a family's rope does to the first `width` numbers of a head, seen on vectors that tell; None: something else than rope.

    Args:
        rotate: as `rotation_of` gives it.
        sample: the family's sines at a position, (table width): they tell which columns are of the same angle.
        width: how many numbers it rotates.
    """
    if width % 2:
        return None
    sample = sample.cpu()
    columns, numbers = (torch.arange(1, size + 1, device="cpu").float() for size in (len(sample), width))
    columns, numbers = columns[None, None], numbers[None, None, None]
    none, one = torch.zeros_like(columns), torch.ones_like(numbers)

    def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return rotate(x, x[:, :0], cosine, sine)[0].flatten()

    cosines, sines = turned(one, columns, none), turned(one, none, columns)
    moved, flat = turned(numbers, none, none + 1), numbers.flatten()
    half = width // 2
    for adjacent, first, second in ((False, slice(half), slice(half, None)), (True, slice(0, None, 2), slice(1, None, 2))):
        if torch.equal(moved[first], -flat[second]) and torch.equal(moved[second], flat[first]):
            used = [found.long() - 1 for found in (cosines[first], cosines[second], -sines[first], sines[second])]
            if all(torch.equal(sample[found], sample[used[0]]) for found in used):
                return Pairs(width, adjacent, tuple(used[0].tolist()))
    return None


def _columns(table: Tensor, columns: tuple[int, ...]) -> Tensor:
    """These columns of a table; without a copy of the numbers to the device where they lie evenly."""
    even = slice(columns[0], columns[-1] + 1, max(1, columns[-1] - columns[0]) // max(1, len(columns) - 1) or 1)
    return table[..., even if [*range(*even.indices(table.shape[-1]))] == [*columns] else list(columns)]


def slot_tables(rotary: Any, inputs: Tensor, slots: Tensor, pairs: Pairs, kind: list[str]) -> Tensor:
    """Rope of every slot, (batch or 1, slots, 2, pairs): cosines and sines, float32; arguments as for `by_tiles`."""
    return torch.stack([_columns(table, pairs.columns) for table in rotary(inputs[..., :1].float(), slots, *kind)], 2)


class Tables(NamedTuple):
    """Rope for a kernel: of keys in the cache, and of the queries of new tokens.

    `first` and `second`: of where each tile of the cache begins, (batch or 1, tiles, 2, pairs), and within one, (TILE, 2, pairs),
    which together give every slot's; or of each slot, (batch or 1, slots, 2, pairs), and nothing. Cosines and sines, float32; by
    number, they are twice as wide. `query`: see `turn_queries`; nothing where nothing rotates.
    """

    first: Tensor
    second: Tensor
    query: tuple[Tensor, ...] = ()


def no_tables(inputs: Tensor) -> Tables:
    """Of layers that do not rotate."""
    return Tables(*(inputs.new_empty(0, dtype=torch.float32),) * 2)


def every_slot(rotary: Any, inputs: Tensor, slots: Tensor, new: Tensor, pairs: Pairs, kind: list[str]) -> Tables:
    """Of each slot, where many tokens are new: their positions may be any. Arguments as for `by_tiles`."""
    tables = slot_tables(rotary, inputs, slots, pairs, kind)
    return Tables(tables, tables.new_empty(0), _of_queries(slot_tables(rotary, inputs, new, pairs, kind), pairs, inputs.dtype))


def by_tiles(rotary: Any, inputs: Tensor, slots: Tensor, new: Tensor, pairs: Pairs, kind: list[str], by_number: bool) -> Tables:
    """Of where each tile of the cache begins, and within a tile.

    Rope of a sum of positions is the product of their rotations, so no table has to be as long as the cache. What cosines are
    multiplied by (yarn, longrope) stays in the first of the two.

    Args:
        rotary: the decoder's rotary embedding; it sees the last position, by which some change their frequencies.
        inputs: of the forward; their device and dtype count.
        slots: positions of consecutive slots, (batch or 1, slots).
        new: positions of new tokens, (batch or 1, new tokens); none of slots is later.
        pairs: how the family rotates.
        kind: the layer type, where the rotary embedding wants it.
        by_number: whether tables have a column for each number that is rotated, sines with the sign of their term.
    """
    begins = slots[:, :1] + torch.arange(0, slots.shape[1], TILE, device=slots.device)
    begins = torch.minimum(begins, new.amax())  # beyond the last token lies the empty tail of a static cache
    # backwards from 0: positions beyond the last would change frequencies
    within = -torch.arange(TILE, device=slots.device).expand(len(slots), TILE)
    every = torch.cat([begins, within, new], 1)
    first, within, own = slot_tables(rotary, inputs, every, pairs, kind).split([begins.shape[1], TILE, new.shape[1]], 1)
    second = within[0] / within[0, :1, :1]  # by the cosine of position 0
    second = torch.stack([second[:, 0], -second[:, 1]], 1)
    if by_number:
        first, second = (torch.stack([torch.stack([x[..., 0, :], -x[..., 1, :]], -2), x], -1).flatten(-2) for x in (first, second))
    return Tables(first.contiguous(), second.contiguous(), _of_queries(own, pairs, inputs.dtype))


def _of_queries(tables: Tensor, pairs: Pairs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `turn_queries` takes, of what `slot_tables` gives."""
    cosine, sine = tables.to(dtype).unsqueeze(1).unbind(3)  # (batch or 1, 1, new tokens, pairs)
    if pairs.adjacent:
        return cosine.repeat_interleave(2, -1), torch.stack([-sine, sine], -1).flatten(-2)
    return torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)


def turn_queries(states: Tensor, pairs: Pairs, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rope on the first numbers of each head, in a quarter of the operations that families take for queries and keys together.

    Args:
        states: (batch, heads, new tokens, head_dim).
        pairs: how the family rotates.
        cosine, sine: by number, sines with the sign of their term, (batch or 1, 1, new tokens, width); in the same dtype.
    """
    first = states[..., : pairs.width]
    other = first.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if pairs.adjacent else first.roll(pairs.width // 2, -1)
    first = torch.addcmul(first * cosine, other, sine)
    return first if pairs.width == states.shape[-1] else torch.cat([first, states[..., pairs.width :]], -1)
