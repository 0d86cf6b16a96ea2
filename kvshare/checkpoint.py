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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from kvshare import processes
from kvshare.errors import BadCheckpointError, KVShareError, NoSpaceError, UnfinishedWorkError, UsageError
from kvshare.headers import TensorSpec, data_bytes
from kvshare.journal import JOURNAL, Journal
from kvshare.source import INDEX, SINGLE
from kvshare.tensors import DTYPES, is_finite

MANIFEST = "kvshare_manifest.json"
MODELING = "modeling_kvshare.py"
FORMAT_VERSION = 2
PUBLISHED = "published"  # the entry of a journal that comes before the renames
REPLACED = "replaced"  # where, in the work folder, an output waits that is being replaced
PIECE = 64 << 20  # bytes moved at a time


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
    """Writes safetensors files of a known layout into a folder, tensors in any order, each where its header says.

    Files of that layout that an earlier run has begun are gone on with; which of their tensors are written, the caller knows.
    What is copied stays in the page cache only if it is `cached`.
    """

    def __init__(self, folder: Path, tensors: list[OutputTensor], cached: bool = True) -> None:
        self.folder, self.cached = folder, cached
        self.pending = {tensor.name: tensor for tensor in tensors}
        self.files = {tensor.name: tensor.file for tensor in tensors}
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
        begin, size = struct.pack("<Q", len(raw)) + raw, 8 + len(raw) + position
        if (self.folder / file).is_file() and (self.folder / file).stat().st_size == size:
            with (self.folder / file).open("rb") as stream:
                if stream.read(len(begin)) == begin:
                    return
        with (self.folder / file).open("wb") as stream:
            stream.write(begin)
            stream.truncate(size)

    def put(self, name: str, value: Tensor) -> None:
        """Write a computed tensor; it is cast once, to its planned dtype.

        Raises:
            BadCheckpointError: NaN or infinity, before or after the cast.
        """
        tensor = self.pending[name]
        cast = value.detach().cpu().to(DTYPES[tensor.dtype]).contiguous()
        if tuple(cast.shape) != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(cast.shape)}, and {tensor.shape} was planned")
        if not is_finite(cast):
            raise BadCheckpointError(
                f"the new {name} holds NaN or infinity",
                f"its values do not fit {tensor.dtype} or the source already holds such values",
                "check the source model; a float16 source may need to be stored as bfloat16 first",
            )
        with (self.folder / tensor.file).open("r+b") as stream:
            stream.seek(self.offsets[name])
            stream.write(cast.flatten().view(torch.uint8).numpy().data)
        del self.pending[name]

    def keep(self, name: str) -> None:
        """Leave a tensor as an earlier run has written it."""
        del self.pending[name]

    def sync(self, names: Iterable[str]) -> None:
        """Return when what was written of these tensors is on the disk."""
        for file in sorted({self.files[name] for name in names}):
            sync(self.folder / file)

    def complete(self) -> set[str]:
        """The files that no tensor is missing in any more; a tensor is until its last byte is written."""
        missing = {tensor.file for tensor in list(self.pending.values())}
        return {*self.files.values()} - missing

    def copy(self, spec: TensorSpec, folder: Path) -> None:
        """Copy a tensor byte for byte from a file of another checkpoint."""
        tensor = self.pending[spec.name]
        with (folder / spec.file).open("rb") as source, (self.folder / tensor.file).open("r+b") as stream:
            source.seek(spec.start)
            stream.seek(self.offsets[spec.name])
            left = spec.bytes
            while left:
                moved = _move(source, stream, min(PIECE, left))
                if not moved:
                    raise BadCheckpointError(
                        f"the file {folder / spec.file} ends inside {spec.name}",
                        "it became shorter while it was read",
                        "download that file again",
                    )
                left -= moved
            if not self.cached:
                forget(source.fileno(), spec.start, spec.bytes)
        del self.pending[spec.name]

    def finish(self) -> None:
        """Check that every planned tensor was written."""
        if self.pending:
            raise ValueError(f"these tensors were planned and never written: {', '.join(sorted(self.pending))}")


def _move(source: BufferedReader, target: BufferedRandom, most: int) -> int:
    """Copy up to `most` bytes from where one file stands to where the other does, within the kernel where that can be done.

    Returns:
        how many bytes were copied; 0 at the end of the source.
    """
    if hasattr(os, "sendfile"):
        start = source.tell()
        target.flush()
        with suppress(OSError):  # not between files on this system
            moved = os.sendfile(target.fileno(), source.fileno(), start, most)
            source.seek(start + moved)
            return moved
    return target.write(source.read(most))


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        UsageError: the output exists, or is, holds or lies in the source.
    """
    target, origin = output.resolve(), source.resolve()
    _sweep(work_folder(output))
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
    """Hold the planned bytes against the free ones and those that unfinished work of this output takes already.

    Raises:
        NoSpaceError: too little is free.
    """
    needed -= sum(file.stat().st_blocks * 512 for file in work_folder(output).rglob("*") if file.is_file())
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
def workspace(output: Path, resumable: bool = False) -> Iterator[Path]:
    """The work folder of an output; it goes when the work is done or was refused.

    Args:
        output: what is made in it.
        resumable: whether the work of a run that breaks off stays, for the same command to go on with.

    An error that a user is to act on keeps it only if it says so (`keeps_work`).

    Raises:
        UsageError: another run writes the same output.
        UnfinishedWorkError: there is resumable work in the folder, and this command is not.
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
        _undo_replacing(work, output)
        if not resumable and (work / JOURNAL).exists():
            raise UnfinishedWorkError(
                f"{work} holds unfinished work",
                f"a run that was to write {output} broke off",
                "repeat its command to finish it, remove that folder, or choose another output",
            )
        yield work
    except OSError as error:
        if error.errno != errno.ENOSPC:
            keep = resumable
            raise
        keep = True
        raise NoSpaceError(
            f"the disk became full while {output} was written",
            str(error),
            f"free space and run the command again; unfinished work lies in {work}",
        ) from error
    except UnfinishedWorkError:
        keep = True
        raise
    except BaseException as error:
        keep = resumable and (not isinstance(error, KVShareError) or error.keeps_work)
        raise
    finally:
        if not keep:
            _clear(work)
        lock.release()


def _clear(work: Path) -> None:
    """Remove a work folder whose lock is held; the journal, which says what is done, goes when nothing else is left."""
    last = (JOURNAL, "lock")
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in last:
            entry.unlink()
    for name in last:
        (work / name).unlink(missing_ok=True)
    with suppress(OSError):  # another run has begun here
        work.rmdir()


def _sweep(work: Path) -> None:
    """Remove the work folder of a run that was killed while it cleared up: nothing is left but its lock, and none holds that."""
    if not (work.is_dir() and processes.is_first()):
        return
    with suppress(Timeout), FileLock(work / "lock", blocking=False):
        if {entry.name for entry in work.iterdir()} <= {"lock"}:
            _clear(work)


def _undo_replacing(work: Path, output: Path) -> None:
    """Put back what an earlier run had moved aside and then did not replace."""
    aside = work / REPLACED / output.name
    if aside.exists() and not output.exists():
        os.rename(aside, output)


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


def publish(staged: Path, output: Path, journal: Journal | None = None, sums: Mapping[str, str] | None = None) -> None:
    """Write the manifest last, sync everything to disk and rename the folder to its final name.

    What it replaces waits in the work folder until that has happened. The journal of resumable work gets the manifest's SHA-256
    before the renames, see `is_published`. `sums` are SHA-256 of files that are known already.
    """
    known = sums or {}
    files = sorted(file for file in staged.iterdir() if file.name != MANIFEST)
    entries = {file.name: {"size": file.stat().st_size, "sha256": known.get(file.name) or sha256(file)} for file in files}
    write_json(staged / MANIFEST, {"version": FORMAT_VERSION, "files": entries})
    sync_folder(staged)
    if journal is not None:
        journal.record(PUBLISHED, sha256(staged / MANIFEST))
    if output.exists():
        aside = fresh_folder(work_folder(output) / REPLACED)
        os.rename(output, aside / output.name)
    os.rename(staged, output)
    sync(output.resolve().parent)


def is_published(output: Path, entries: Mapping[str, Any]) -> bool:
    """Whether an output is what the run whose journal has these entries has published: all that is left is to clear up."""
    manifest = output / MANIFEST
    return PUBLISHED in entries and manifest.is_file() and sha256(manifest) == entries[PUBLISHED]


def sync_folder(folder: Path) -> None:
    """Return when a folder and the files in it are on the disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def sync(path: Path) -> None:
    """Return when what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget(descriptor: int, start: int = 0, size: int = 0) -> None:
    """Take `size` bytes of a file from `start` on, or all, out of the page cache, as far as they are on the disk: memory that is
    used again costs less than other memory, and what else is cached stays.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def fits_page_cache(size: int) -> bool:
    """Whether so many bytes of files could stay in memory."""
    return "SC_PHYS_PAGES" not in os.sysconf_names or size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write_json(file: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
