# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Where the tokens of a cache stand: keys are rotated when they are read, by positions that no cache keeps.

In: a cache, and the positions and the mask of new tokens as a decoder gets them. Out: the position of every slot.
Never: changes what a cache holds; asks a GPU in every step of decoding.

As a rule tokens follow one another, each in the slot behind the one before, and the position of one tells all others. Where they do
not (gaps; trees of drafts; padding on the right, behind which positions go on) this is noticed, and the position of every token is
kept beside the cache from then on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NOWHERE = -(2**31)  # the offset of a row that has attended to nothing yet


class Seen(NamedTuple):
    """What is known of the tokens of a cache.

    tokens: how many there were behind the last forward; `held`, those of one layer, so that no others can lie in their place.
    offsets: of attended tokens, their position minus their slot, (batch or 1, 1), or NOWHERE.
    positions: of all tokens, (batch or 1, tokens), where they do not follow one another.
    settled: whether one token alone has come since several came, and had followed them.
    """

    tokens: int
    held: Tensor | None
    offsets: Tensor
    positions: Tensor | None
    settled: bool


def _traced(device: torch.device) -> bool:
    """Whether a forward is recorded, for other positions than those that it sees: it must make all of what it is given."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _waits(device: torch.device) -> bool:
    """Whether who looks at numbers waits until the device has made them."""
    return device.type != "cpu"


def _held(cache: Any, layer: int) -> Tensor | None:
    keys = getattr(cache.layers[layer], "keys", None) if layer < len(cache.layers) else None
    return keys if type(keys) is Tensor else None


def _untouched(seen: Seen, cache: Any, layer: int) -> bool:
    """Whether the rows of a cache are those that a forward left; selected or reordered ones lie elsewhere, cropped ones do not."""
    held = _held(cache, layer)
    return held is None if seen.held is None else held is not None and held.data_ptr() == seen.held.data_ptr()


def _attended(mask: Any, past: int, new: int) -> Tensor | None:
    """Which new tokens any token attends to, (batch, new tokens), as far as a mask tells; None: all."""
    if isinstance(mask, dict):  # by layer type
        mask = next((one for one in mask.values() if isinstance(one, Tensor)), None)
    if type(mask) is not Tensor or mask.shape[-1] < new:
        return None
    first = past if mask.shape[-1] >= past + new else mask.shape[-1] - new
    mask = mask[..., first : first + new]
    if mask.dim() == 4:
        return (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2).flatten(1, 2).any(1)
    return mask.bool()


def own_positions(given: Tensor | None, cache: Any, new: Tensor) -> Tensor:
    """Of new tokens (batch, new tokens, ...): as given, or the next ones behind what is cached, (batch or 1, new tokens)."""
    return (torch.arange(new.shape[1], device=new.device) + cache.get_seq_length())[None] if given is None else given


def follow(cache: Any, layer: int, position_ids: Tensor, mask: Any) -> bool:
    """Take note of where new tokens stand, before a forward puts them into the cache; `leave` has to come behind it.

    Args:
        cache: a transformers cache.
        layer: one that takes the tokens in.
        position_ids: (batch or 1, new tokens).
        mask: what the decoder was given as attention_mask.

    Returns:
        whether all tokens follow one another.

    Raises:
        ValueError: they do not, and the forward is compiled or captured; or rows of the cache were selected or reordered, and those
            that there are now cannot be told from the positions that come.
    """
    device = position_ids.device
    if _traced(device):
        seen = getattr(cache, "kvshare_seen", None)
        if seen is not None and seen.positions is not None:
            raise ValueError(
                "the tokens of this cache do not follow one another (padding on the right, gaps), and a forward that is compiled "
                "or captured takes it that they do: pad on the left, or run the forward as it is"
            )
        return True
    if type(position_ids) is not Tensor or device.type == "meta":  # there are no numbers to look at
        return True
    new, seen = position_ids.shape[1], getattr(cache, "kvshare_seen", None)
    if new == 1 and seen is not None and seen.settled and _waits(device) and _untouched(seen, cache, layer):
        cache.kvshare_seen = seen._replace(tokens=seen.tokens + 1)
        return True
    past = int(cache.get_seq_length(layer))
    offsets = position_ids - torch.arange(past, past + new, device=device)
    if not past or (seen is not None and seen.offsets.device != device):
        seen = None
    if seen is not None and seen.positions is not None:
        positions = torch.cat([_kept(seen, cache, layer, past, offsets), position_ids], 1)
        return _note(cache, past + new, offsets[:, -1:], positions, False)
    if seen is not None and past < seen.tokens and not _goes_on(seen, offsets):
        raise ValueError(
            "tokens were taken out of this cache, and positions go on as if they were there: where the others stand is not known, "
            "and a shared cache turns keys when it reads them; crop its end alone, or use the native form"
        )
    before = None if seen is None or seen.tokens != past else _before(seen, cache, layer, len(position_ids))
    attended = _attended(mask, past, new)
    if attended is None:
        highest, lowest = offsets.amax(1, keepdim=True), offsets.amin(1, keepdim=True)
    else:
        highest = offsets.where(attended, NOWHERE).amax(1, keepdim=True)
        lowest = offsets.where(attended, -NOWHERE).amin(1, keepdim=True)
    straight = lowest >= highest  # of a row that attends to nothing, too
    now = highest
    if before is not None:
        straight = straight & ((highest == before) | (highest == NOWHERE) | (before == NOWHERE))
        now = torch.where(highest == NOWHERE, before, highest)
    if bool(straight.all()):
        return _note(cache, past + new, now, None, new == 1)
    old = offsets[:, :1] if before is None else torch.where(before == NOWHERE, offsets[:, :1], before)
    positions = torch.cat([old + torch.arange(past, device=device), position_ids.expand(len(old), -1)], 1)
    return _note(cache, past + new, now, positions, False)


def _note(cache: Any, tokens: int, offsets: Tensor, positions: Tensor | None, settled: bool) -> bool:
    cache.kvshare_seen = Seen(tokens, None, offsets, positions, settled)
    return positions is None


def leave(cache: Any, layer: int) -> None:
    """Take note of the rows of a cache behind a forward."""
    seen = getattr(cache, "kvshare_seen", None)
    if seen is not None and not _traced(seen.offsets.device):
        cache.kvshare_seen = seen._replace(held=_held(cache, layer))


def _goes_on(seen: Seen, offsets: Tensor) -> bool:
    """Whether new tokens, whose first has these offsets, follow what is left of a cache's tokens as those that were there did."""
    return bool((torch.isin(offsets[:, :1], seen.offsets) | (seen.offsets == NOWHERE).any()).all())


def _before(seen: Seen, cache: Any, layer: int, rows: int) -> Tensor | None:
    """Offsets of the rows that a cache has now; None where that is not known: they may have been selected or reordered since."""
    if _untouched(seen, cache, layer) and len(seen.offsets) in (1, rows):
        return seen.offsets
    first = seen.offsets[:1]
    return first if bool((seen.offsets == first).all()) else None


def _kept(seen: Seen, cache: Any, layer: int, past: int, offsets: Tensor) -> Tensor:
    """The positions that are kept of the tokens that a cache has now, (batch, past)."""
    positions: Any = seen.positions
    rows = len(offsets)
    if past <= seen.tokens:
        positions = positions[:, :past]
        if past == seen.tokens and len(positions) in (1, rows) and (len(positions) == 1 or _untouched(seen, cache, layer)):
            return positions.expand(rows, -1)
        if rows % len(positions) == 0:
            positions = positions.repeat_interleave(rows // len(positions), 0)
            if bool((positions[:, -1:] + 1 == offsets[:, :1] + past).all()):  # so are those of a cache that was cropped
                return positions
    raise ValueError(
        "the tokens of this cache do not follow one another (padding on the right, gaps), and its rows were selected, reordered or "
        "filled by other forwards since, or tokens taken out: where they stand is not known; pad on the left, or fill a new cache"
    )


def key_positions(cache: Any, layer: int, position_ids: Tensor) -> Tensor:
    """The position of every slot that attention will read in `layer`, before the cache takes the new tokens in.

    Where tokens follow one another, any that is attended to tells those of all. Padding does not: `generate` gives it any position.

    Args:
        cache: a transformers cache; where `follow` has not seen it, the last query is taken for such a token.
        layer: a layer of the kind whose slots are wanted.
        position_ids: (batch or 1, new tokens).

    Returns:
        (batch or 1, slots); slots of padding hold any number, attention masks them.
    """
    new = position_ids.shape[-1]
    slots, offset = cache.get_mask_sizes(new, layer)
    if slots == new:
        return position_ids
    seen = None if _traced(position_ids.device) else getattr(cache, "kvshare_seen", None)
    # The empty tail of a static cache lies beyond the last token; scaled ropes must not see such positions.
    if seen is not None and seen.positions is not None:
        positions = seen.positions[:, offset : offset + slots]
        return torch.cat([positions, positions[:, -1:].expand(-1, slots - positions.shape[1])], 1)
    steps = torch.arange(slots, device=position_ids.device) + offset
    if seen is not None:
        return torch.minimum(seen.offsets + steps, position_ids.max())
    past = cache.get_query_offset(layer) if hasattr(cache, "get_query_offset") else cache.get_seq_length(layer)
    return torch.minimum(position_ids[:, -1:] + steps - past - (new - 1), position_ids.max())
