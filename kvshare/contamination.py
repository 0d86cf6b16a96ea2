"""Whether held-out text is held out: runs of tokens that it shares with text that was trained on.

In: rows of token ids. Out: how many held-out rows share a run. Never: forgives a repetition that the language makes natural; short
texts and text that a small model writes do share runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RUN = 32  # tokens
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Contamination:
    """How many of `rows` held-out rows share a run of `tokens` tokens with text that was trained on."""

    tokens: int
    rows: int
    shared_rows: int

    @property
    def fraction(self) -> float:
        """The share of held-out rows, between 0 and 1."""
        return self.shared_rows / self.rows

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for report.json."""
        return {"tokens": self.tokens, "rows": self.rows, "shared_rows": self.shared_rows, "fraction": self.fraction}


def contamination(held_out: Tensor, trained: Sequence[Tensor]) -> Contamination | None:
    """Hold held-out rows against the rows of calibration and healing; None where nothing was trained on.

    Args:
        held_out: token ids (rows, length).
        trained: token ids, each (rows, length) of its own length.
    """
    if not trained:
        return None
    run = min(RUN, held_out.shape[1], *(rows.shape[1] for rows in trained))
    known = torch.cat([_hashes(rows, run).flatten().unique() for rows in trained])
    shared = torch.isin(_hashes(held_out, run), known).any(1)
    return Contamination(run, len(held_out), int(shared.sum()))


def _hashes(rows: Tensor, run: int) -> Tensor:
    """One number of 64 bits for every run of tokens: (rows, length) -> (rows, length - run + 1)."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (run,), generator=generator) * 2 + 1  # sums and products wrap around
    pieces = [(piece.unfold(1, run, 1) * factors).sum(-1) for piece in (rows + 1).split(ROWS_AT_A_TIME)]
    return torch.cat(pieces)
