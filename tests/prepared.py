"""Processes of their own, as `subprocess` gives, without the seconds in which each would import torch and transformers.

In: Python code as for `python -c`, its arguments, an environment. Out: exit status and what was printed. Never: collected as tests.

They are forks of Python's fork server, a fresh process that has everything imported and does nothing else. A test that is about the
start of a process, the installed script or what is not imported starts one by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

IMPORTED = ("datasets", "peft", "transformers.trainer", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp")
OWN = ("kvshare.cli", "kvshare.conversion", "kvshare.healing", "kvshare.inspection", "kvshare.runtime.modeling_kvshare")
KILLING = "import killing; killing.main()"
COMMAND = "from kvshare.cli import main; main()"


@cache
def _context() -> Any:
    """One server for each process that runs tests; it ends with that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, *OWN])
    return context


def _execute(code: str, arguments: list[str], environment: dict[str, str], files: tuple[Path, Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, descriptor, file in zip((sys.stdout, sys.stderr), (1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING", "utf-8"), line_buffering=True)
    sys.argv = arguments
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})


@contextmanager
def started(
    code: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[multiprocessing.Process, Path, Path]]:
    """A process that runs, and the files in which lies what it prints and what it says of errors; it is killed at the end.

    Args:
        code: in its own `__main__`.
        arguments: `sys.argv` holds them behind the name `kvshare`.
        environment: None takes that of the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "out"), Path(folder, "err")
        for file in files:
            file.touch()
        given = dict(os.environ if environment is None else environment)
        process = _context().Process(target=_execute, args=(code, ["kvshare", *map(str, arguments)], given, files))
        process.start()
        try:
            yield process, *files
        finally:
            process.kill()
            process.join()


def run(code: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run code to its end; for the arguments see `started`."""
    with started(code, *arguments, environment=environment) as (process, *files):
        process.join()
        return subprocess.CompletedProcess([*arguments], process.exitcode, *(file.read_text("utf-8") for file in files))
