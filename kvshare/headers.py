"""Headers of safetensors files.

In: a file. Out: one `TensorSpec` per tensor, checked against the file's size. Never: reads weights, unpickles.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvshare.errors import BadCheckpointError
from kvshare.parsing import parse_json, shown

MAX_HEADER = 100_000_000  # bytes; the limit that the safetensors format itself sets
MAX_EXTENT = 1 << 63  # of a dimension or an offset; none is stored in more bits
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
FLOATS = ("F64", "F32", "F16", "BF16")


def data_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The size of a tensor's data in bytes; `dtype` in safetensors' spelling."""
    return ITEM_BYTES[dtype] * math.prod(shape)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor as a safetensors header describes it; `start` and `end` are byte offsets in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """The size of the tensor's data in bytes."""
        return self.end - self.start


def read_header(file: Path) -> list[TensorSpec]:
    """The tensors of one safetensors file in the order of their data; every offset is checked against the file's size.

    Raises:
        BadCheckpointError: the header is damaged, or the data it describes does not fill the file exactly.
    """

    def bad(why: str) -> BadCheckpointError:
        return BadCheckpointError(f"the file {file} is damaged", why, "download that file again")

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise bad(f"its header length of {length} bytes does not fit its {size} bytes")
            raw = stream.read(length)
    except OSError as error:
        raise bad(str(error)) from None
    try:
        header = parse_json(raw, unique=True)
    except ValueError as error:
        raise bad(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if raw[:1] != b"{" or not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise bad("its header is not that of a safetensors file")  # which the library that reads the data would refuse
    specs = [tensor_spec(name, entry, file.name, 8 + length, bad) for name, entry in header.items()]
    specs.sort(key=lambda spec: (spec.start, spec.end))
    position = 8 + length
    for spec in specs:
        if spec.start != position:
            raise bad(f"the data of {spec.name} starts at byte {spec.start}, where {position} was expected")
        position = spec.end
    if position != size:
        raise bad(f"it has {size} bytes, and its header describes {position}")
    return specs


def tensor_spec(name: str, entry: Any, file: str, base: int, bad: Callable[[str], BadCheckpointError]) -> TensorSpec:
    """One entry of a safetensors header, checked.

    Args:
        name: of the tensor.
        entry: its dtype, shape and data_offsets, as they were read.
        file: the name of the file.
        base: where the file's data starts.
        bad: makes the error for a reason.
    """
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        count = 1
        for extent in shape:
            if type(extent) is not int or not 0 <= extent < MAX_EXTENT:
                raise ValueError("a shape must hold whole numbers")
            count *= extent
            if count >= MAX_EXTENT:
                raise ValueError("no file is as large as its shape")
        if not all(type(offset) is int and 0 <= offset < MAX_EXTENT for offset in (start, end)):
            raise ValueError("offsets must be whole numbers")
        expected = count * ITEM_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise bad(f"the entry of {name} cannot be read ({error})") from None
    if end - start != expected:
        raise bad(f"{name} takes {end - start} bytes, and its shape {shown(list(shape))} of {dtype} needs {expected}")
    return TensorSpec(name, dtype, shape, file, base + start, base + end)
