"""Mixtures: several texts with weights as one DATA argument.

In: a DATA argument, one text or a mixture `a.jsonl=3,org/name:train=1,self=1`. Out: its parts with their shares, and the order in
which rows of the parts follow each other. Never: reads a text, draws at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvshare.errors import UsageError
from kvshare.parsing import is_file
from kvshare.sections import SELF

ENDINGS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Part:
    """One text of a mixture, and its share of all rows, between 0 and 1."""

    data: str
    share: float


def parts_of(data: str) -> tuple[Part, ...]:
    """The texts of a DATA argument; one with the share 1 where it is no mixture.

    Raises:
        UsageError: a part without a weight, a weight that is no positive number, or a text that occurs twice.
    """
    if "=" not in data or is_file(data):
        return (Part(data, 1.0),)
    weights: dict[str, float] = {}
    for word in data.split(","):
        name, equals, number = word.strip().rpartition("=")
        weight = _number(number)
        if not equals or not name or weight is None:
            raise _refusal(data, f"{word.strip()!r} is not a text, '=' and a positive number")
        if name in weights:
            raise _refusal(data, f"{name} occurs twice")
        weights[name] = weight
    total = sum(weights.values())
    return tuple(Part(name, weight / total) for name, weight in weights.items())


def uses_self(data: str) -> bool:
    """Whether the source model is to write some of this text."""
    return data == SELF or ("=" in data and any(part.data == SELF for part in parts_of(data)))


def share_of_self(data: str) -> float:
    """How much of this text the source model is to write, between 0 and 1."""
    return sum(part.share for part in parts_of(data) if part.data == SELF)


def named(data: str) -> str:
    """A DATA argument for others to read: files without the folders that they lie in."""
    parts = parts_of(data)
    if len(parts) == 1 and parts[0].data == data:
        return _file_name(data)
    return ",".join("=".join((_file_name(word.rpartition("=")[0].strip()), word.rpartition("=")[2])) for word in data.split(","))


def turns(shares: Sequence[float], rows: int) -> list[int]:
    """Which part each row comes from: always the one that is furthest behind its share, the first of several.

    So healing sees the same mixture at every step, and fewer rows are the beginning of more.
    """
    taken = [0] * len(shares)
    order = []
    for row in range(1, rows + 1):
        turn = max(range(len(shares)), key=lambda part: shares[part] * row - taken[part])
        taken[turn] += 1
        order.append(turn)
    return order


def _file_name(data: str) -> str:
    return Path(data).name if data.endswith(ENDINGS) or is_file(data) else data


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _refusal(data: str, why: str) -> UsageError:
    return UsageError(f"the mixture {data!r} cannot be read", why, "write for example: mine.jsonl=3,org/name:train=1")
