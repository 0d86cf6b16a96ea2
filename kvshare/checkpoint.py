"""The only writer: a checkpoint appears whole, or not at all.

In: a layout of tensors, their values one at a time, the small files. Out: a folder with weights, config, manifest.
Never: overwrites, mixes old and new files, reads a file that the index or the manifest does not name.

Work happens in `<output>.kvshare-work` beside the output; one rename publishes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from kvshare.errors import BadCheckpointError, KVShareError, NoSpaceError, UsageError
from kvshare.source import INDEX, SINGLE, TensorSpec, data_bytes
from kvshare.tensors import DTYPES

MANIFEST = "kvshare_manifest.json"
MODELING = "modeling_kvshare.py"
FORMAT_VERSION = 2
PIECE = 16 << 20  # bytes moved at a time


@dataclass(frozen=True)
class OutputTensor:
    """Where a tensor goes: `file` within the checkpoint, `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def bytes(self) -> int:
        """The size of the data in bytes."""
        return data_bytes(self.dtype, self.shape)


class WeightWriter:
    """Writes safetensors files of a known layout into a folder, tensors in any order, each where its header says."""

    def __init__(self, folder: Path, tensors: list[OutputTensor]) -> None:
        self.folder = folder
        self.pending = {tensor.name: tensor for tensor in tensors}
        self.offsets: dict[str, int] = {}
        for file in sorted({tensor.file for tensor in tensors}):
            self._begin(file, sorted((t for t in tensors if t.file == file), key=lambda t: t.name))
        if {tensor.file for tensor in tensors} != {SINGLE}:
            write_json(
                folder / INDEX,
                {
                    "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
                    "weight_map": {tensor.name: tensor.file for tensor in sorted(tensors, key=lambda t: t.name)},
                },
            )

    def _begin(self, file: str, tensors: list[OutputTensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.bytes],
            }
            position += tensor.bytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        for tensor in tensors:
            self.offsets[tensor.name] = 8 + len(raw) + header[tensor.name]["data_offsets"][0]
        with (self.folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            stream.truncate(8 + len(raw) + position)

    def put(self, name: str, value: Tensor) -> None:
        """Write a computed tensor; it is cast once, to its planned dtype.

        Raises:
            BadCheckpointError: NaN or infinity, before or after the cast.
        """
        tensor = self.pending.pop(name)
        cast = value.detach().cpu().to(DTYPES[tensor.dtype]).contiguous()
        if tuple(cast.shape) != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(cast.shape)}, and {tensor.shape} was planned")
        if not bool(torch.isfinite(cast).all()):
            raise BadCheckpointError(
                f"the new {name} holds NaN or infinity",
                f"its values do not fit {tensor.dtype} or the source already holds such values",
                "check the source model; a float16 source may need to be stored as bfloat16 first",
            )
        with (self.folder / tensor.file).open("r+b") as stream:
            stream.seek(self.offsets[name])
            stream.write(cast.flatten().view(torch.uint8).numpy().data)

    def copy(self, spec: TensorSpec, folder: Path) -> None:
        """Copy a tensor byte for byte from a file of another checkpoint."""
        tensor = self.pending.pop(spec.name)
        with (folder / spec.file).open("rb") as source, (self.folder / tensor.file).open("r+b") as stream:
            source.seek(spec.start)
            stream.seek(self.offsets[spec.name])
            left = spec.bytes
            while left:
                piece = source.read(min(PIECE, left))
                if not piece:
                    raise BadCheckpointError(
                        f"the file {folder / spec.file} ends inside {spec.name}",
                        "it became shorter while it was read",
                        "download that file again",
                    )
                stream.write(piece)
                left -= len(piece)

    def finish(self) -> None:
        """Check that every planned tensor was written."""
        if self.pending:
            raise ValueError(f"these tensors were planned and never written: {', '.join(sorted(self.pending))}")


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        UsageError: the output exists, or is, holds or lies in the source.
    """
    target, origin = output.resolve(), source.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise UsageError(
            f"the output {output} and the source {source} overlap",
            "the source would be written over while it is read",
            "choose another folder",
        )
    if output.is_symlink() or (output.exists() and not overwrite):
        raise UsageError(
            f"the output {output} exists",
            "nothing is ever overwritten unless asked, and no link is followed",
            "choose another folder, or pass --overwrite",
        )
    if output.exists() and not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"the output {output} is not a kvshare checkpoint",
            "--overwrite replaces only what kvshare wrote",
            "choose another folder, or remove that one yourself",
        )


def check_space(output: Path, needed: int) -> None:
    """Hold the planned bytes against the free ones.

    Raises:
        NoSpaceError: too little is free.
    """
    parent = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise NoSpaceError(
            f"the output needs {needed:,} bytes at {parent}",
            f"{free:,} are free, {needed - free:,} too few",
            "free space, or choose an output on another disk",
        )


def work_folder(output: Path) -> Path:
    """The folder beside the output in which it is made."""
    return output.parent / f"{output.name}.kvshare-work"


@contextmanager
def workspace(output: Path, keep_on_error: bool = False) -> Iterator[Path]:
    """An empty work folder; it goes when the work is done or, unless `keep_on_error`, has failed.

    An error that a user is to act on keeps it only if it says so (`keeps_work`).

    Raises:
        UsageError: another run writes the same output.
        NoSpaceError: the disk became full; the folder stays and the message says where it is.
    """
    work = work_folder(output)
    work.mkdir(parents=True, exist_ok=True)
    keep = False
    lock = FileLock(work / "lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another run is writing {output}",
            f"it holds {work / 'lock'}",
            "wait until it ends, or choose another output",
        ) from None
    try:
        yield work
    except OSError as error:
        if error.errno != errno.ENOSPC:
            keep = keep_on_error
            raise
        keep = True
        raise NoSpaceError(
            f"the disk became full while {output} was written",
            str(error),
            f"free space and run the command again; unfinished work lies in {work}",
        ) from error
    except BaseException as error:
        keep = keep_on_error and (not isinstance(error, KVShareError) or error.keeps_work)
        raise
    finally:
        lock.release()
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def fresh_folder(folder: Path) -> Path:
    """An empty folder, whatever an earlier, broken run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_files(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Write small files by name; where there is no content, a file of that name, carried from other weights, goes."""
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_bytes(content)


def publish(staged: Path, output: Path) -> None:
    """Write the manifest last, sync everything to disk and rename the folder to its final name."""
    files = sorted(file for file in staged.iterdir() if file.name != MANIFEST)
    write_json(
        staged / MANIFEST,
        {"version": FORMAT_VERSION, "files": {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}},
    )
    for file in staged.iterdir():
        _sync(file)
    _sync(staged)
    if output.exists():
        aside = fresh_folder(work_folder(output) / "replaced")
        os.rename(output, aside / output.name)
    os.rename(staged, output)
    _sync(output.resolve().parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
