"""What a command has finished, on the disk, so that the same command goes on there after it was interrupted.

In: a work folder, the description of a job, results as they come. Out: the results of an earlier run of the same job.
Never: goes on with the work of another job, believes a line that was not written to its end.

Of several processes, each but the first keeps a journal of its own part; the first takes up what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kvshare import __version__
from kvshare.errors import BadCheckpointError, UnfinishedWorkError
from kvshare.parsing import is_file

JOURNAL = "journal.jsonl"
PART, PARTS = "journal-{}.jsonl", "journal-*.jsonl"  # of the other processes
JOB = "job"
RESTART = "pass --restart to begin again"
MISSING = "nothing"  # what a job without a field has there

Result = TypeVar("Result")


class Journal:
    """Results by name in the order in which they were finished, one JSON object per line; the first is the job."""

    def __init__(self, file: Path, entries: dict[str, Any]) -> None:
        self.file, self.entries = file, entries

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def record(self, name: str, value: Any = None) -> None:
        """Add what was finished; it is on the disk when this returns. `value` is JSON data; NaN and infinity may be in it."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, "value": value}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.entries[name] = value

    def result(self, name: str, kind: type[Result]) -> Result:
        """What was recorded under a name, as the dataclass that it was.

        Raises:
            BadCheckpointError: it is not of that kind.
        """
        try:
            adapter: TypeAdapter[Result] = _adapter(kind)  # type: ignore[arg-type]  # any class can be a key
            return adapter.validate_python(self.entries[name])
        except ValidationError as error:
            raise BadCheckpointError(
                f"the entry {name!r} of {self.file} cannot be used",
                str(error).splitlines()[0],
                RESTART,
            ) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """What makes a dataclass of JSON data; building it takes longer than anything that it is used for."""
    return TypeAdapter(kind)


def open_journal(work: Path, job: Mapping[str, Any], restart: bool, otherwise: str = RESTART) -> Journal:
    """The journal of a job in its work folder, with what an earlier run has finished.

    Args:
        work: the folder; its lock is held.
        job: what decides the output, as flat JSON data by dotted field.
        restart: forget what was finished.
        otherwise: what a user does who does not want the earlier job.

    Raises:
        UnfinishedWorkError: the folder holds unfinished work of another job; the first field that differs is named.
    """
    file = work / JOURNAL
    entries = {} if restart else read_journal(file)
    if JOB in entries:
        check_same(entries[JOB], job, work, otherwise)
        _cut(file)
        journal = Journal(file, entries)
        take_parts(journal)
        return journal
    file.unlink(missing_ok=True)
    for part in work.glob(PARTS):
        part.unlink()
    journal = Journal(file, {})
    journal.record(JOB, dict(job))
    return journal


def open_part(work: Path, job: Mapping[str, Any], rank: int) -> Journal:
    """The journal of another process than the first: what it records goes into a file of its own.

    Args:
        work: the folder; the first process has opened the journal of the job there and taken the parts of earlier runs.
        job: as for `open_journal`.
        rank: of the process, from 1.
    """
    entries = read_journal(work / JOURNAL)
    part = Journal(work / PART.format(rank), {})
    part.record(JOB, dict(job))
    part.entries |= entries
    return part


def take_parts(journal: Journal) -> None:
    """Take up what other processes, now or in an earlier run, have finished of the same job, and remove their journals."""
    for part in sorted(journal.file.parent.glob(PARTS)):
        entries = read_journal(part)
        if entries.get(JOB) == journal.entries[JOB]:
            for name, value in entries.items():
                if name not in journal:
                    journal.record(name, value)
        part.unlink()


def read_journal(file: Path) -> dict[str, Any]:
    """The entries of a journal by name; empty where there is none. What follows the first broken line does not count."""
    entries: dict[str, Any] = {}
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            entries[str(entry["name"])] = entry["value"]
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    return entries if isinstance(entries.get(JOB), dict) else {}


def _cut(file: Path) -> None:
    """Take away a last line that was not written to its end, so that the next one does not join it."""
    content = file.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


def check_same(earlier: Mapping[str, Any], job: Mapping[str, Any], work: Path, otherwise: str = RESTART) -> None:
    """Refuse to go on with another job.

    Raises:
        UnfinishedWorkError: a field differs; the first one is named.
    """
    for field in [*job, *(name for name in earlier if name not in job)]:
        before, now = earlier.get(field, MISSING), job.get(field, MISSING)
        if before != now:
            raise UnfinishedWorkError(
                f"{work} holds unfinished work of another run: {field} differs",
                f"it was {before!r} and is now {now!r}",
                f"repeat the earlier settings to go on with it, or {otherwise}",
            )


def versions() -> dict[str, str]:
    """The versions of what computes, which may decide bytes."""
    import torch
    import transformers

    return {"kvshare": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON data by dotted names: `{"heal": {"tokens": 1}}` gives `{"heal.tokens": 1}`."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def content_of(data: str) -> str:
    """What identifies a DATA argument: the SHA-256 of a local file, otherwise its name."""
    if not is_file(data):
        return data
    with Path(data).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
