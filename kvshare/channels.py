"""Middle and size of every channel that a shared cache holds, taken on text: what a cache in few bits is quantised by.

In: a checkpoint's folder, rows of text. Out: `kvshare_channels.json` in it. Never: changes a weight, holds more than one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kvshare.activations import LayerCall, batches, enters, first_inputs, rotary_dim
from kvshare.families import Family, family_of
from kvshare.geometry import geometry_of
from kvshare.layerwise import read_weights
from kvshare.layout import pair_order
from kvshare.passes import advance, attention_of
from kvshare.progress import Progress, silent
from kvshare.repeats import shapes_of
from kvshare.runtime.kvshare_channels import FILE, MOST, Channels, as_text
from kvshare.source import open_source, read_json
from kvshare.streaming import open_skeleton, read_layer

TOKENS = 8_192  # that they are taken on
BEYOND = 512  # of so many tokens, one may lie above the range of a channel, and one below: those that begin a text are often unlike
LEAST = 0.001  # of the root mean square size of a head's channels: what moves less is rounded as if it moved so much


@dataclass
class ChannelRanges:
    """The numbers of every channel that lie farthest out, one batch at a time: `count` of the largest, and of the smallest."""

    count: int
    largest: Tensor | None = None
    smallest: Tensor | None = None

    def add(self, states: Tensor) -> None:
        """Add a batch, (..., kv heads, head_dim)."""
        values = states.flatten(0, -3)
        self.largest, self.smallest = self._first(self.largest, values, True), self._first(self.smallest, values, False)

    def _first(self, kept: Tensor | None, values: Tensor, largest: bool) -> Tensor:
        """The outermost of those that are kept and new ones, (numbers, kv heads, head_dim)."""
        values = values if kept is None else torch.cat([kept, values])
        return values.topk(min(self.count, len(values)), 0, largest).values

    def channels(self) -> Channels:
        """Middles and sizes of the ranges between the last of the largest and of the smallest; a channel that never moved has a
        share of the size of its head, or 1 where none moved.
        """
        assert self.largest is not None
        assert self.smallest is not None
        upper, lower = self.largest[-1].double(), self.smallest[-1].double()
        size = (upper - lower) / 2
        size = torch.maximum(size, LEAST * size.square().mean(-1, keepdim=True).sqrt())
        size = torch.where(size > 1 / MOST**0.5, size, torch.ones_like(size))
        return Channels(*(value.float().cpu()[:, None] for value in ((upper + lower) / 2, size)))


def write_channels(folder: Path, rows: Tensor, device: torch.device, progress: Progress = silent) -> None:
    """Take the channels of a checkpoint that is being made and write them beside its weights; nothing where its form is not
    `shared`, no layer shares K and V, or its numbers are not finite.

    Args:
        folder: weights and config.json are complete.
        rows: token ids (rows, length), of which the first are taken.
        device: where a layer is computed.
        progress: called on the way.
    """
    block = read_json(folder / "config.json")["kvshare"]
    if block["form"] != "shared" or not block["layers"]:
        return
    found = take_channels(folder, rows, device, progress)
    if all(bool((value.abs() <= MOST).all()) for channels in found.values() for value in channels):
        (folder / FILE).write_text(as_text(found), encoding="utf-8")


@torch.no_grad()
def take_channels(folder: Path, rows: Tensor, device: torch.device, progress: Progress = silent) -> dict[int, Channels]:
    """The channels of every shared layer on the checkpoint's own hidden states, one layer in memory at a time; for the arguments
    see `write_channels`.
    """
    source = open_source(folder)
    family = family_of(source.model_type).located(source.tensors)
    geometry = geometry_of(source.config, family, str(folder))
    shapes = shapes_of(folder, source.config, geometry.kv_heads, geometry.head_dim)
    skeleton = open_skeleton(source, family, folder.parent)
    part = rows[: max(1, TOKENS // rows.shape[1])]
    hidden, calls = first_inputs(skeleton.model, skeleton.layers, part, device, skeleton.scratch)
    found = {}
    for index, call in enumerate(calls):
        progress("measuring channels", index, len(calls))
        layer = read_layer(skeleton, index, device)
        if index in shapes:
            found[index] = _layer_channels(layer, family, shapes[index], hidden, call, device)
        if index < len(calls) - 1:
            advance(layer, hidden, call, device)
        del layer  # or it would be in memory until the next one has been read
    progress("measuring channels", len(calls), len(calls))
    return found


def _layer_channels(
    layer: nn.Module, family: Family, shape: tuple[int, int], hidden: Tensor, call: LayerCall, device: torch.device
) -> Channels:
    """The channels of a layer in native form, of KV heads and head_dim `shape`, that hidden states (rows, length, hidden) enter."""
    attention, ranges = attention_of(layer, family), ChannelRanges(1 + hidden.shape[0] * hidden.shape[1] // BEYOND)
    weights = read_weights(attention, family, shape[1], rotary_dim(attention, family, call)).unrepeated(shape[0])
    for batch in batches(hidden):
        ranges.add((enters(layer, attention, batch.to(device), call) @ weights.k.T).unflatten(-1, shape))
    # where rope pairs lie side by side, weights are read in another order than the cache has
    order = pair_order(shape[1], weights.rotated).argsort() if family.interleaved else slice(None)
    return Channels(*(value[..., order] for value in ranges.channels()))
