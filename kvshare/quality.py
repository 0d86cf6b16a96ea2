"""The measurement of a result before it is published, and the quality gate.

In: an unpublished checkpoint, its source, held-out text, a limit. Out: a `Report`, or a refusal.
Never: publishes, removes anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.errors import QualityError
from kvshare.evaluation import Report, compare, forward_of, stored_bytes
from kvshare.loading import load
from kvshare.mixture import named
from kvshare.progress import Progress
from kvshare.sections import SELF, Evaluation


def named_text(data: str) -> str:
    """What a report calls its text: a file's name without its folder."""
    if data == SELF:
        return "text written by the source"
    return named(data)


def measure(folder: Path, teacher: Any, rows: Tensor, data: str, progress: Progress) -> Report:
    """A checkpoint that is not published yet against its source in memory, on rows (rows, length) of the text `data`."""
    model = load(folder, dtype=torch.float32).to(next(teacher.parameters()).device)
    return compare(model, teacher, rows, named_text(data), stored_bytes(folder), progress, forward_of(folder, model))


def check_quality(report: Report, settings: Evaluation, work: str, fix: str, keeps_work: bool = False) -> None:
    """The quality gate: refuse a result that is worse than what was asked for.

    Args:
        report: what was measured.
        settings: with the limit; None lets everything pass.
        work: where the unpublished work lies, or that it is gone.
        fix: what may help.
        keeps_work: whether it lies somewhere.

    Raises:
        QualityError: the perplexity rose by more than the limit, or is no number.
    """
    limit = settings.max_perplexity_increase
    if limit is None or report.perplexity_increase <= limit:  # NaN is not
        return
    raise QualityError(
        f"the result is not good enough: its perplexity is {report.perplexity_increase:+.2%} above the source's",
        f"at most {limit:+.2%} was asked for, on {report.tokens:,} tokens of {report.data}; nothing was published, {work}",
        fix,
        keeps_work,
    )
