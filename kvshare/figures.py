"""Means with their standard errors.

In: what was measured, row by row or answer by answer. Out: figures. Never: runs a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Perplexities:
    """The perplexity of a model and of its source on the same tokens; the error of the increase is that of paired rows."""

    perplexity: float
    perplexity_error: float
    source_perplexity: float
    source_perplexity_error: float
    perplexity_increase: float
    perplexity_increase_error: float


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of (rows,) and its standard error, std / rows^1/2; the error of a single row is unknown, NaN."""
    values = values.double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def share_and_error(right: Tensor) -> tuple[float, float]:
    """The share of right answers (answers,), and its binomial standard error, (p (1 - p) / answers)^1/2."""
    share = float(right.double().mean())
    return share, math.sqrt(share * (1 - share) / len(right))


def perplexities(loss: Tensor, source_loss: Tensor) -> Perplexities:
    """Perplexities from the mean losses of equally long rows, (rows,) each; errors by the delta method, d exp(x) = exp(x) dx."""
    mean, error = mean_and_error(loss)
    source_mean, source_error = mean_and_error(source_loss)
    ratio = math.exp(mean - source_mean)
    _, paired = mean_and_error(loss.double() - source_loss.double())
    return Perplexities(
        math.exp(mean),
        math.exp(mean) * error,
        math.exp(source_mean),
        math.exp(source_mean) * source_error,
        ratio - 1,
        ratio * paired,
    )


def as_json(value: Any) -> Any:
    """Dataclasses and tuples as JSON data; a number that is not finite, which JSON does not know, becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
