"""What a model loses where: by position in a row, and by how far it may look back.

In: what was measured of every token; rows of tokens with a forward. Out: figures by position, losses by context length.
Never: loads a model, reads text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvshare.data import rows_per_forward
from kvshare.figures import Perplexities, mean_and_error
from kvshare.loading import Forward
from kvshare.progress import Progress, silent


@dataclass(frozen=True)
class PositionFigures:
    """Predictions that had `first` to `last` tokens before them: mean KL(source || model) in nats, and equal top tokens."""

    first: int
    last: int
    kl: float
    kl_error: float
    token_agreement: float
    token_agreement_error: float


@dataclass(frozen=True)
class ContextFigures(Perplexities):
    """Perplexities where windows of `context` tokens slide by half of it over `tokens` scored tokens."""

    context: int
    tokens: int


def by_position(kl: Tensor, agreement: Tensor) -> tuple[PositionFigures, ...]:
    """Figures of the predictions behind 1 token, 2 to 3, 4 to 7 and so on; kl and agreement (rows, predictions).

    Weighted by how many predictions each holds, they average to the means of all.
    """
    found, first = [], 1
    while first <= kl.shape[1]:
        last = min(2 * first - 1, kl.shape[1])
        here = slice(first - 1, last)
        figures = (*mean_and_error(kl[:, here].double().mean(1)), *mean_and_error(agreement[:, here].double().mean(1)))
        found.append(PositionFigures(first, last, *figures))
        first = last + 1
    return tuple(found)


@torch.no_grad()
def window_losses(
    forward: Forward, rows: Tensor, context: int, stride: int, vocabulary: int, device: torch.device, progress: Progress = silent
) -> tuple[Tensor, int]:
    """The mean loss of every row where windows of `context` tokens slide over it by `stride`.

    Each window scores what the one before it has not seen, but not its own first token, which it has nothing to predict from.
    With a stride below the context, every token but a row's first is scored once, whatever the context. The last window ends
    with the row.

    Args:
        forward: of the model.
        rows: token ids (rows, length), length >= context.
        context, stride: in tokens, stride <= context.
        vocabulary: how many logits a token has, which decides how many rows go in together.
        device: where the model is.
        progress: called on the way.

    Returns:
        losses (rows,) in nats per token, float64, on the CPU; how many tokens of a row are scored.
    """
    length = rows.shape[1]
    if not 0 < stride <= context <= length:
        raise ValueError(f"windows of {context} tokens cannot slide by {stride} over rows of {length}")
    starts = list(range(0, length - context + 1, stride))
    if starts[-1] < length - context:
        starts.append(length - context)
    losses, per_forward = [], rows_per_forward(context, vocabulary)
    for done, batch in enumerate(rows.split(per_forward)):
        progress(f"measuring windows of {context}", done * per_forward, len(rows))
        total, scored, seen = torch.zeros(len(batch), dtype=torch.float64), 0, 0
        for start in starts:
            ids = batch[:, start : start + context].to(device)
            new = max(seen - start, 1)  # the first token of the window to score
            predicted = torch.log_softmax(forward(ids)[:, new - 1 : -1].float(), dim=-1)
            total -= predicted.gather(-1, ids[:, new:, None]).double().sum((1, 2)).cpu()
            scored, seen = scored + context - new, start + context
        losses.append(total / scored)
    progress(f"measuring windows of {context}", len(rows), len(rows))
    return torch.cat(losses), scored
