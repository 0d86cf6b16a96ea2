# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""A decoding step of shared attention on the CPU: every tile of the cache is read once, rotated in registers, used as K and V.

In: rotated queries and what is cached. Out: the attention output. It is C, compiled when it is first needed for what the model is
made of (head_dim, rope, dtype), by the C compiler of the machine (`CC`, cc, gcc or clang), and kept in the user's cache folder.
Never: needs a compiler to be installed or loaded, changes what it is given.

Scores of a tile of T tokens that begins at position a are (R(a)^-1 q)^T R(o) k, o = 0 .. T - 1: queries are turned back once for
each tile, keys by a table of T rows that stays in the first cache. The softmax runs along: its maximum and its sum go with the
tiles, and splits of the cached length are put together at the end.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kvshare_c import SOURCE

TILE = 32  # tokens
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
FLAGS = [
    "-O3",
    "-fPIC",
    "-w",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-freciprocal-math",
]
NATIVE: tuple[list[str], ...] = (["-march=native"], ["-mcpu=native"], [])  # what compilers call the instructions of this machine
PART = 1024  # slots that are worth a split of their own


class UnavailableError(RuntimeError):
    """There is no such kernel on this machine; its text is the reason."""


class _Step(ctypes.Structure):
    """`struct step` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "shared", "scale", "base", "offset", "mask", "key_bias")),
        *((name, ctypes.c_void_p) for name in ("norm", "sizes", "value_bias", "sinks", "out", "partial")),
        ("shared_stride", ctypes.c_int64 * 3),
        ("scale_stride", ctypes.c_int64 * 3),
        ("mask_stride", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("base_stride", "batch", "heads", "rows", "queries", "slots", "splits")),
        *((name, ctypes.c_int64) for name in ("mask_kind", "threads")),
        ("eps", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Made(NamedTuple):
    """What the source is compiled for: head_dim, the width that rotates, whether rope pairs lie side by side, kind of numbers."""

    head_dim: int
    width: int
    adjacent: bool
    kind: int

    def lanes(self) -> int:
        """The most numbers of 16 that part heads and rope evenly; a vector holds as many, or what the machine's vectors hold."""
        whole = [self.head_dim // 2 if self.kind == 3 else self.head_dim, self.width if self.adjacent else self.width // 2]
        return next(lanes for lanes in (16, 8, 4, 2, 1) if not any(width % lanes for width in whole))


@functools.cache
def compiler() -> str:
    """The C compiler.

    Raises:
        UnavailableError: there is none.
    """
    found = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if found is None:
        raise UnavailableError("there is no C compiler (CC, cc, gcc, clang)")
    return found


def _folder() -> Path:
    """Where compiled files are kept: the user's own, or for this process alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvshare"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if (not hasattr(os, "getuid") or state.st_uid == os.getuid()) and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="kvshare-"))


@functools.cache
def _machine() -> str:
    """What compiled files depend on beside their source."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))] if info.is_file() else []
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    return "\n".join([platform.machine(), platform.processor(), version, *flags[:1]])


def _build(made: Made, target: Path) -> str:
    """Compile, with threads where torch brings them; empty, or what went wrong."""
    defined = [f"-D{name}={value}" for name, value in zip("DR", made, strict=False)]
    defined += [f"-DT={TILE}", f"-DLANES={made.lanes()}", f"-DSWAP={int(made.adjacent)}", f"-DKIND={made.kind}"]
    problem = ""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, compiled, linked = (Path(folder) / name for name in ("step.c", "step.o", "step.so"))
        source.write_text(SOURCE, encoding="utf-8")
        for threads in (["-fopenmp"], []):
            for native in NATIVE:
                # linked without a library for threads: they are those of torch, which is loaded
                for command in (
                    [compiler(), *FLAGS, *native, *threads, *defined, "-c", str(source), "-o", str(compiled)],
                    [compiler(), "-shared", str(compiled), "-o", str(linked), "-lm"],
                ):
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        problem = (done.stderr.strip().splitlines() or ["no message"])[0]
                        break
                else:
                    try:
                        ctypes.CDLL(str(linked))
                    except OSError as error:
                        problem = str(error)
                        continue
                    os.replace(linked, target)
                    return ""
    return f"the C compiler {compiler()} fails: {problem}"


@functools.cache
def kernel(made: Made) -> Any:
    """The compiled step.

    Raises:
        UnavailableError: it cannot be compiled here.
    """
    name = hashlib.sha256("\n".join([SOURCE, _machine(), *FLAGS, repr(made), str(TILE)]).encode()).hexdigest()
    try:
        target = _folder() / f"{name}.so"
        if target.is_file():
            with suppress(OSError):  # a file that was damaged is made anew
                return ctypes.CDLL(str(target)).step
        problem = _build(made, target)
        if not problem:
            return ctypes.CDLL(str(target)).step
    except OSError as error:
        problem = str(error)
    raise UnavailableError(problem)


@functools.cache
def missing(made: Made) -> str | None:
    """Why there is no such kernel, or None."""
    try:
        kernel(made)
    except UnavailableError as error:
        return str(error)
    return None


def in_rows(x: Tensor) -> Tensor:
    """The tensor as kernels read it: the numbers of its last dimension lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def decode_on_cpu(
    query: Tensor,
    shared: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    *,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    scaling: float,
    adjacent: bool,
    mask: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    norm_offset: float = 0.0,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One step of attention of few queries over what is cached.

    Args:
        query: rotated, (batch, query heads, new tokens, head_dim).
        shared: as cached, (batch, kv heads, slots, head_dim), float32 or bfloat16; or integers, see `kvshare_bits.quantise`.
        tables: cosines and sines of where tiles begin, (batch or 1, tiles, 2, width), and of the tokens of a tile,
            (TILE, 2, width), float32: `kvshare_tables.Tables`, by number where pairs lie side by side. None: keys do not rotate.
        scales: of integers, (batch, kv heads, slots), float16.
        sizes: of channels, by which integers are multiplied, too, (kv heads, head_dim), float32; their middles are in the biases.
        scaling: of scores.
        adjacent: how rope pairs lie.
        mask: (batch or 1, 1, new tokens, slots), boolean (whether to attend) or added to scores.
        key_bias, value_bias: (kv heads, head_dim), of any dtype.
        norm: weights of the norm of keys, (head_dim), of any dtype; `norm_offset` is added to them.
        eps: of the norm.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: a score for each query head that takes weight and gives no value, (query heads), of any dtype.

    Returns:
        (batch, new tokens, query heads, head_dim), float32; 0 where a query attends to nothing.

    Raises:
        UnavailableError: it cannot be compiled here.
    """
    batch, heads, slots = shared.shape[:3]
    head_dim, new, rows = query.shape[-1], query.shape[2], query.shape[1] * query.shape[2] // heads
    width = 0 if tables is None else tables[1].shape[-1] * (1 if adjacent else 2)
    step = kernel(Made(head_dim, width, adjacent, KINDS[shared.dtype]))
    shared = in_rows(shared)
    threads = torch.get_num_threads()
    splits = min(-(-4 * threads // (batch * heads)), -(-slots // PART))
    out = torch.empty(batch, query.shape[1], new, head_dim, dtype=torch.float32, device=shared.device)
    partial = torch.empty(batch * heads * splits * rows * (head_dim + 2), dtype=torch.float32, device=shared.device)
    if mask is not None:
        mask = in_rows((mask if mask.dtype == torch.bool else mask.float()).expand(batch, 1, new, slots))
    weight = None if norm is None else norm.float() + norm_offset
    given = [
        None if x is None else x.float().contiguous()
        for x in (query.float() * scaling, *(tables or (None, None)), key_bias, weight, sizes, value_bias, sinks)
    ]
    names = ("query", "base", "offset", "key_bias", "norm", "sizes", "value_bias", "sinks")
    step(
        ctypes.byref(
            _Step(
                **{name: None if x is None else x.data_ptr() for name, x in zip(names, given, strict=True)},
                shared=shared.data_ptr(),
                scale=None if scales is None else scales.data_ptr(),
                scale_stride=(0, 0, 0) if scales is None else scales.stride(),
                mask=None if mask is None else mask.data_ptr(),
                out=out.data_ptr(),
                partial=partial.data_ptr(),
                shared_stride=(ctypes.c_int64 * 3)(*(stride * shared.element_size() for stride in shared.stride()[:3])),
                mask_stride=(0, 0) if mask is None else (mask.stride(0), mask.stride(2)),
                base_stride=0 if given[1] is None or len(given[1]) == 1 else given[1].stride(0),
                batch=batch,
                heads=heads,
                rows=rows,
                queries=new,
                slots=slots,
                splits=splits,
                mask_kind=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
                threads=threads,
                eps=eps,
                softcap=softcap or 0.0,
            )
        )
    )
    return out.transpose(1, 2)
