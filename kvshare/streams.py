"""Held-out text that passes through a source and its conversion layer by layer, while the merge does.

In: a skeleton, rows of held-out text, pairs of decoder layers in their order. Out: a `Report`, as a comparison of the whole models
would give it. Never: holds a layer, sees calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvshare.activations import LayerCall, first_inputs
from kvshare.data import rows_per_forward
from kvshare.evaluation import Report, report_of, token_figures
from kvshare.passes import passed
from kvshare.streaming import Skeleton, last_logits


@dataclass(frozen=True)
class Streams:
    """The hidden states of both models behind `done` layers, (rows, length, hidden), on the CPU."""

    skeleton: Skeleton
    rows: Tensor
    calls: tuple[LayerCall, ...]
    source: Tensor
    converted: Tensor
    device: torch.device
    done: int = 0

    def through(self, layer: nn.Module, converted: nn.Module) -> Streams:
        """Behind the next layer, the source's and its conversion."""
        call = self.calls[self.done]
        source = passed(layer, self.source, call, self.device)
        same = converted is layer and self.converted is self.source
        behind = source if same else passed(converted, self.converted, call, self.device)
        return replace(self, source=source, converted=behind, done=self.done + 1)

    def report(self, data: str, cache: float, source_cache: float) -> Report:
        """The comparison behind all layers; norm and output embedding are the same in both models.

        Args:
            data: what to call the text.
            cache, source_cache: bytes per token; nothing is generated here that they could be measured on.
        """
        assert self.done == len(self.calls)
        per_batch = rows_per_forward(self.rows.shape[1], int(self.skeleton.model.config.vocab_size))
        parts = zip(*(x.split(per_batch) for x in (self.converted, self.source, self.rows)), strict=True)
        figures = []
        for own, wanted, ids in parts:
            logits, source_logits = (last_logits(self.skeleton, states, self.device) for states in (own, wanted))
            figures.append(token_figures(logits, source_logits, ids.to(self.device)).cpu())
        return report_of(torch.cat(figures, dim=1), data, cache, source_cache)


def open_streams(skeleton: Skeleton, rows: Tensor, device: torch.device) -> Streams:
    """Both streams in front of the first layer.

    Args:
        skeleton: the source.
        rows: token ids (rows, length).
        device: where layers compute.
    """
    hidden, calls = first_inputs(skeleton.model, skeleton.layers, rows, device)
    return Streams(skeleton, rows, tuple(calls), hidden, hidden, device)
