"""What the teacher says of every token, kept on the disk, so that training can do without the teacher.

In: a teacher, rows of tokens, how many of its probabilities to keep. Out: log probabilities, read from the disk when used.
Never: holds more than a batch of logits, believes files that were not written to their end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare import processes
from kvshare.checkpoint import fresh_folder, sync
from kvshare.data import rows_per_forward
from kvshare.progress import Progress

TOKENS, PROBABILITIES = "tokens.int32", "log_probabilities.float32"


@dataclass(frozen=True)
class Targets:
    """The teacher's most probable tokens and what it makes of them.

    `tokens` (rows, length, k) are token ids; `log_probabilities` (rows, length, k + 1) are natural logarithms at the temperature of
    the recipe, the last one of all other tokens together.
    """

    tokens: Tensor
    log_probabilities: Tensor


def make_targets(folder: Path, teacher: Any, rows: Tensor, k: int, temperature: float, progress: Progress) -> Targets:
    """The targets of `rows`, token ids (rows, length), written into `folder` if they are not there yet.

    Of several processes the first writes. `k` is at most the vocabulary; the teacher computes where it is.
    """
    k = min(k, int(teacher.config.vocab_size))
    if processes.is_first() and not folder.is_dir():
        part = fresh_folder(folder.with_name(f"{folder.name}.part"))
        _write(part, teacher, rows, k, temperature, progress)
        os.rename(part, folder)
    processes.meet()
    return Targets(
        _mapped(folder / TOKENS, (*rows.shape, k), torch.int32),
        _mapped(folder / PROBABILITIES, (*rows.shape, k + 1), torch.float32),
    )


@torch.no_grad()
def _write(folder: Path, teacher: Any, rows: Tensor, k: int, temperature: float, progress: Progress) -> None:
    device, vocabulary = next(teacher.parameters()).device, int(teacher.config.vocab_size)
    done = 0
    with (folder / TOKENS).open("wb") as tokens, (folder / PROBABILITIES).open("wb") as probabilities:
        for batch in rows.split(rows_per_forward(rows.shape[1], vocabulary)):
            progress("asking the source", done, len(rows))
            logits = teacher(input_ids=batch.to(device), use_cache=False).logits
            known = torch.log_softmax(logits.float() / temperature, dim=-1)
            best, chosen = known.topk(k, dim=-1)
            others = known.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
            tokens.write(chosen.int().cpu().numpy().data)
            probabilities.write(torch.cat([best, others], -1).cpu().numpy().data)
            done += len(batch)
    for name in (TOKENS, PROBABILITIES):
        sync(folder / name)
    progress("asking the source", done, len(rows))


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.from_file(str(file), shared=False, size=count, dtype=dtype).view(shape)
