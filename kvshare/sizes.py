"""Sizes in bytes: read from text, and shared out among files.

In: such as `5GB`; sizes of tensors. Out: bytes; file names. Never: reads or writes files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvshare.errors import UsageError
from kvshare.parsing import shown
from kvshare.source import SINGLE

UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("kMGT", 1)},
    **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)},
}


def bytes_of(size: str | int, name: str) -> int:
    """Bytes of `8GB` (8e9), `8GiB` (8 x 2^30) or a number; `name` is the setting that it is given for.

    Raises:
        UsageError: it cannot be read, or is 0.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", str(size), re.ASCII)
    units = {unit.lower(): count for unit, count in UNITS.items()}
    if not found or found[2].lower() not in units or not float(found[1]):
        raise UsageError(f"{name} = {shown(size)} cannot be read", "it is a number with a unit", "for example: 8GB or 8GiB")
    return int(float(found[1]) * units[found[2].lower()])


def shard_files(sizes: Sequence[int], most: int) -> list[str]:
    """The weight file of each tensor, in their order, with at most `most` bytes of data in one, a single larger tensor apart."""
    numbers: list[int] = []
    number, filled = 1, 0
    for size in sizes:
        if filled and filled + size > most:
            number, filled = number + 1, 0
        numbers.append(number)
        filled += size
    if number == 1:
        return [SINGLE] * len(sizes)
    return [f"model-{place:05d}-of-{number:05d}.safetensors" for place in numbers]
