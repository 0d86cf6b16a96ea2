"""The data of single tensors of a checkpoint.

In: a folder and a `TensorSpec` of one of its files. Out: a tensor in the dtype it is stored in, read or mapped from the disk.
Never: reads more than that tensor, unpickles.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from torch import Tensor

from kvshare import processes
from kvshare.errors import BadCheckpointError, UnsupportedModelError
from kvshare.headers import TensorSpec

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# integers of the same bytes, and all bits of the exponent, which are set in NaN and infinity alone
EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000),
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}


def best_device() -> torch.device:
    """Where to compute if nothing else is said: the GPU, if there is one, and each of several processes its own."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda") if processes.count() == 1 else torch.device("cuda", processes.local_rank())


def is_finite(value: Tensor) -> bool:
    """Whether a tensor of floating-point numbers on the CPU holds neither NaN nor infinity.

    Reads exponents as integers, which takes a tenth of the time of `torch.isfinite`.
    """
    integers, mask = EXPONENTS[value.dtype]
    raw = value.contiguous().view(integers).numpy()
    return not raw.size or int((raw & raw.dtype.type(mask)).max()) != mask


def read_tensor(folder: Path, spec: TensorSpec) -> Tensor:
    """One tensor of a checkpoint in its own dtype.

    Raises:
        BadCheckpointError: the data holds NaN or infinity, or the file became shorter.
        UnsupportedModelError: it holds no floating-point numbers.
    """
    if spec.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"the tensor {spec.name} is stored as {spec.dtype}", f"kvshare reads {', '.join(DTYPES)}", "give the unquantised model"
        )
    raw = bytearray(spec.bytes)
    with (folder / spec.file).open("rb") as stream:
        stream.seek(spec.start)
        filled = stream.readinto(raw)
    if filled != spec.bytes:
        raise BadCheckpointError(
            f"the file {folder / spec.file} ends inside {spec.name}",
            "it became shorter while it was read",
            "download that file again",
        )
    dtype = DTYPES[spec.dtype]
    value = torch.frombuffer(raw, dtype=dtype).view(spec.shape) if raw else torch.empty(spec.shape, dtype=dtype)
    if not is_finite(value):
        raise BadCheckpointError(
            f"the tensor {spec.name} holds NaN or infinity", f"it stands so in {folder / spec.file}", "use an undamaged model"
        )
    return value


def map_tensor(folder: Path, spec: TensorSpec) -> Tensor:
    """One tensor whose data stays on the disk until it is looked at; for tables of which a few rows are needed."""
    if not spec.bytes:
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    # copy on write: torch wants memory that it may write to, and the file must stay as it is
    raw = numpy.memmap(folder / spec.file, dtype=numpy.uint8, mode="c", offset=spec.start, shape=(spec.bytes,))
    if spec.start % DTYPES[spec.dtype].itemsize:  # a header of odd length: such numbers cannot be used where they lie
        return torch.from_numpy(numpy.array(raw)).view(DTYPES[spec.dtype]).view(spec.shape)
    return torch.from_numpy(raw).view(DTYPES[spec.dtype]).view(spec.shape)
