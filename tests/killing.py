"""Kill a run at one of its writes, or after a while, and run it again: what the tests and benchmarks of resuming share.

In: a job that writes one output. Out: what the output's files hold. Never: collected as tests.

Each run is a fork of a process that has everything imported, so that hundreds of kills take minutes.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}

# how long the closed form is searched for where only results are compared with each other, by the full names of the settings
SEARCH = {
    "kvshare.merge.svd.ITERATIONS": 3,
    "kvshare.merge.svd.RESTARTED_ITERATIONS": 2,
    "kvshare.merge.svd.SETTLING": 2,
    "kvshare.merge.regroup.PAIR_ITERATIONS": 2,
    "kvshare.layerwise.ALONE_ITERATIONS": 2,
}

Job = Callable[[bool], Any]
"""Called with whether an earlier run has broken off."""


class Counter:
    """How many changes were made so far."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self) -> int:
        self.seen += 1
        return self.seen


def _watch(root: Path, kill_at: int, count: Counter) -> None:
    """Kill this process at the `kill_at`-th change of the file system below `root`, before it happens; 0 never."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, flags = arguments[0], arguments[2] or 0
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(str(root)) and count() == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_forked(job: Job, again: bool, root: Path, kill_at: int = 0, seconds: float | None = None) -> tuple[int, int]:
    """Run a job in a fork; returns its exit status, negative for a signal, and how many changes it made below `root`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count, status = Counter(), 70
        try:
            os.close(reader)
            _watch(root, kill_at, count)
            job(again)
            status = 0
        except BaseException as error:  # whatever it is, the fork must not return into the caller's code
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os.write(writer, str(count.seen).encode())
            os._exit(status)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as stream:
        said = stream.read()
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code), int(said or 0)


def search_briefly() -> None:
    """Set what `SEARCH` says in this process."""
    for name, steps in SEARCH.items():
        module, _, setting = name.rpartition(".")
        setattr(importlib.import_module(module), setting, steps)


def no_plot(report: dict[str, Any]) -> bytes:
    """In place of a figure that is drawn: other bytes for another report."""
    return json.dumps(report, sort_keys=True, default=str).encode()


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def survives(job: Job, root: Path, output: Path, wanted: dict[str, str], kill_at: int = 0, seconds: float | None = None) -> str:
    """Kill a job, run it again and compare; returns what is wrong, or nothing.

    Args:
        job: writes `output`, which lies in `root`.
        root: an empty folder.
        output: what the job writes.
        wanted: the contents that an undisturbed run gives.
        kill_at: the change at which it is killed; 0 where it is killed by time.
        seconds: after which it is killed.
    """
    status, _ = run_forked(job, False, root, kill_at, seconds)
    if status == 0 and kill_at:
        return "it was not killed"
    if status not in (0, -signal.SIGKILL):
        return f"it failed before it was killed ({status})"
    if output.exists() and contents(output) != wanted:
        return "a half-written output appeared"
    if status:
        status, _ = run_forked(job, True, root)
        # an output that is complete may be refused as such: nothing is ever overwritten unless asked
        if status and not output.exists():
            return f"the second run failed ({status})"
    if contents(output) != wanted:
        return f"the files differ: {sorted(set(contents(output).items()) ^ set(wanted.items()))}"
    stray = sorted(entry.name for entry in root.iterdir() if entry != output)
    return f"stray files: {stray}" if stray else ""


def jobs(sources: Path) -> dict[str, Callable[[Path], Job]]:
    """The commands that are killed, by name, each for an output; they need `sources/model` and `sources/text.txt`.

    `mean` measures nothing; `svd` measures layer by layer; `budget` chooses the heads of each layer; `healed` converts, heals and
    measures; `heal` heals `sources/converted`.
    """
    import kvshare
    from kvshare.checkpoint import work_folder
    from kvshare.journal import JOURNAL, read_journal
    from kvshare.recipe import Recipe

    model, text, converted = sources / "model", str(sources / "text.txt"), sources / "converted"
    length = {"sequence_length": 64}
    recipe = Recipe.model_validate(
        {
            "merge": {"balance": [1.0], "grouping": "neighbours"},
            "calibration": {"tokens": 512, "data": text, **length},
            "heal": {"tokens": 1536, "batch_tokens": 256, "save_steps": 2, "data": text, **length},
            "evaluation": {"tokens": 256, "data": text, **length},
        }
    )

    def healing(output: Path, again: bool) -> None:
        # before its journal there is nothing that could be resumed
        began = bool(read_journal(work_folder(output) / JOURNAL))
        kvshare.heal(converted, output, model, text, tokens=1536, recipe=recipe, resume=again and began)

    return {
        "mean": lambda out: lambda _: kvshare.convert(model, out, init="mean", heal=False, eval_mode="off"),
        "svd": lambda out: lambda _: kvshare.convert(model, out, recipe=recipe, heal=False, eval_mode="layers"),
        "budget": lambda out: lambda _: kvshare.convert(model, out, recipe=recipe, heal=False, cache_budget=0.4),
        "healed": lambda out: lambda _: kvshare.convert(model, out, recipe=recipe, kv_heads=2),
        "heal": lambda out: lambda again: healing(out, again),
    }


def kill_everywhere(job: Callable[[Path], Job], root: Path, points: int | None) -> tuple[int, dict[str, str]]:
    """Kill a job at its changes of the file system; returns how many there are and, by place, what went wrong.

    Args:
        job: for an output.
        root: an existing folder to work in.
        points: how many changes to kill at, evenly spread, the first and the last among them; None takes all.
    """
    base, count = root / "undisturbed", Counter()
    base.mkdir()
    _watch(base, 0, count)
    job(base / "out")(False)  # imports everything that it needs, so that the forks have it
    gc.freeze()  # nor need they look through it for garbage
    wanted, changes = contents(base / "out"), count.seen
    chosen = range(1, changes + 1)
    if points is not None and points < changes:
        chosen = sorted({1 + round(place * (changes - 1) / (points - 1)) for place in range(points)})
    wrong = {}
    for place in chosen:
        folder = root / f"killed-{place}"
        folder.mkdir()
        if said := survives(job(folder / "out"), folder, folder / "out", wanted, place):
            wrong[str(place)] = said
        shutil.rmtree(folder)
    return len(chosen), wrong


def run_together(job: Job, root: Path, kill: tuple[int, int] | None = None) -> tuple[list[int], list[int]]:
    """Run a job in two forks that take themselves for the processes of one launch, as a launcher does: where one fails, it ends
    the other. Returns exit statuses and how many changes each made below `root`.

    Args:
        job: what both do.
        root: as for `_watch`.
        kill: which of them is killed, and at which change.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, readers = [], []
    for rank in (0, 1):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            count, status = Counter(), 70
            try:
                os.close(reader)
                os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                _watch(root, kill[1] if kill is not None and kill[0] == rank else 0, count)
                job(False)
                status = 0
            except BaseException as error:  # as in `run_forked`
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            finally:
                os.write(writer, str(count.seen).encode())
                os._exit(status)
        os.close(writer)
        children.append(child)
        readers.append(reader)
    statuses = {}
    while len(statuses) < len(children):
        child, code = os.waitpid(-1, 0)
        statuses[child] = os.waitstatus_to_exitcode(code)
        if statuses[child]:
            for other in children:
                if other not in statuses:
                    os.kill(other, signal.SIGKILL)
    counts = []
    for reader in readers:
        with os.fdopen(reader) as stream:
            counts.append(int(stream.read() or 0))
    return [statuses[child] for child in children], counts


def kill_together(job: Callable[[Path], Job], root: Path, points: int) -> tuple[int, dict[str, str]]:
    """As `kill_everywhere`, in two processes, of which each is killed in turn at so many of its changes."""
    base = root / "undisturbed"
    base.mkdir()
    job(base / "alone")(False)  # imports everything that it needs, and says what is wanted
    gc.freeze()
    wanted, wrong, kills = contents(base / "alone"), {}, []

    def wait(_: bool) -> None:
        from kvshare import processes

        if processes.is_first():
            time.sleep(1)
            (base / "here").touch()
        processes.meet()
        if not (base / "here").exists():
            raise RuntimeError("the other one was not waited for")

    statuses, _ = run_together(wait, base)
    if statuses != [0, 0]:
        return 0, {"waiting": f"{statuses}"}
    statuses, counts = run_together(job(base / "out"), base)
    if statuses != [0, 0] or contents(base / "out") != wanted:
        return 0, {"undisturbed": f"{statuses}"}
    for rank, count in enumerate(counts):
        kills += sorted({(rank, 1 + round((place + 0.5) * (count - 1) / points)) for place in range(points)})
    for kill in kills:
        folder = root / f"killed-{kill[0]}-{kill[1]}"
        folder.mkdir()
        statuses, _ = run_together(job(folder / "out"), folder, kill)
        if statuses[kill[0]] != -signal.SIGKILL:
            wrong[str(kill)] = f"it was not killed: {statuses}"
        elif not (folder / "out").exists():
            statuses, _ = run_together(job(folder / "out"), folder)
            if statuses != [0, 0] or contents(folder / "out") != wanted:
                wrong[str(kill)] = f"the second run differs: {statuses}"
            elif stray := sorted(entry.name for entry in folder.iterdir() if entry.name != "out"):
                wrong[str(kill)] = f"stray files: {stray}"
        elif contents(folder / "out") != wanted:
            wrong[str(kill)] = "a half-written output appeared"
    return len(kills), wrong


def main() -> None:
    """`killing.py SOURCES ROOT JOB=POINTS...`: kill each job at so many points (0: all), and print what went wrong as JSON.

    The job `together` is `mean` in two processes, each of which is killed at so many points.
    """
    from kvshare import card

    search_briefly()
    card.draw_plot = no_plot
    sources, root = Path(sys.argv[1]), Path(sys.argv[2])
    known, result = jobs(sources), {}
    for name, _, said in (word.partition("=") for word in sys.argv[3:]):
        points = int(said)
        folder = root / name
        folder.mkdir(parents=True)
        if name == "together":
            count, wrong = kill_together(known["mean"], folder, points)
        else:
            count, wrong = kill_everywhere(known[name], folder, points or None)
        result[name] = {"killed": count, "wrong": wrong}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
