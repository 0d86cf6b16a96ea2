"""The merge, shared out among the processes of one launch: each copies files and merges layers in turn, the first goes on alone.

In: a plan whose layers are merged each by itself, a work folder on a disk that all processes see. Out: the weight files that one
process makes, in the same folder, and all that was finished in the first one's journal.
Never: lets two processes write one tensor, begins beside a process that an earlier launch has left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from kvshare import processes
from kvshare.errors import KVShareError, UsageError
from kvshare.journal import Journal, open_part, take_parts
from kvshare.merged import lay_out, sum_share, write_share
from kvshare.planning import Plan
from kvshare.progress import Progress

LOCK, LOCKS = "lock-{}", "lock-*"  # one of each process but the first, which holds that of the work folder


def merge_as_first(
    staged: Path, plan: Plan, rows: Tensor | None, device: torch.device, journal: Journal, progress: Progress
) -> None:
    """The first process's part of the merge; when this returns, that of the others is in its journal, too.

    Args:
        staged: where the merged checkpoint is made, in the work folder.
        plan: see `one_process_because`.
        rows: calibration tokens (rows, length); None for a merge without text.
        device: where a layer is computed.
        journal: of the job.
        progress: called on the way, of this process's layers.

    Raises:
        BadCheckpointError: see `write_merged`. The work is kept: other processes may be writing.
    """
    try:
        lay_out(staged, plan)
        processes.meet()  # there are a journal to read and files to write into
        _merge(staged, plan, rows, device, journal, progress)
    except KVShareError as error:
        error.keeps_work = True
        raise
    processes.meet()
    take_parts(journal)


def merge_as_other(
    work: Path, staged: Path, plan: Plan, rows: Tensor | None, device: torch.device, job: Mapping[str, Any], progress: Progress
) -> Journal:
    """Another process's part of the merge, and the journal of it; for the arguments see `merge_as_first`.

    Args:
        work: the work folder, whose lock the first process holds.
        job: what decides the output.
    """
    processes.meet()
    with _held(work / LOCK.format(processes.rank())):
        journal = open_part(work, job, processes.rank())
        _merge(staged, plan, rows, device, journal, progress)
    processes.meet()
    return journal


def _merge(staged: Path, plan: Plan, rows: Tensor | None, device: torch.device, journal: Journal, progress: Progress) -> None:
    write_share(staged, plan, rows, device, journal, progress)
    processes.meet()  # every file is complete
    sum_share(staged, plan, journal)


def check_left(work: Path) -> None:
    """Refuse to begin while a process of an earlier launch, whose first one has ended, is still writing its part.

    Raises:
        UsageError: there is one.
    """
    for lock in sorted(work.glob(LOCKS)):
        with _held(lock):
            pass


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    try:
        with FileLock(lock, blocking=False):
            yield
    except Timeout:
        raise UsageError(
            f"a process of an earlier run still writes in {lock.parent}",
            f"it holds {lock.name}; the process that led it has ended",
            "wait until it has finished its layer, or end it, and run the command again",
            keeps_work=True,
        ) from None
