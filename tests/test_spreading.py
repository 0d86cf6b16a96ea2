"""A conversion in several processes: the bytes of one, whoever dies on the way, and refusals where layers wait for each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepared
import pytest
from common import QUICK, TINY_FOLDER, Outcome, random_model
from filelock import FileLock
from killing import contents

import kvshare
from kvshare import layerwise, merged, processes
from kvshare.checkpoint import work_folder
from kvshare.errors import UsageError
from kvshare.journal import JOB, JOURNAL, PART, open_journal, open_part, read_journal, take_parts
from kvshare.recipe import Recipe, load_recipe
from kvshare.refusals import one_process_because
from kvshare.spreading import LOCK

APART = QUICK.model_copy(update={"merge": QUICK.merge.model_copy(update={"sequential": False})})
MEAN: dict[str, Any] = {"init": "mean", "heal": False, "eval_mode": "off"}


class Together:
    """Threads that take themselves for the processes of one launch. One at a time works while the others wait: making a model
    without weights changes torch for all threads.
    """

    def __init__(self, count: int, patch: pytest.MonkeyPatch) -> None:
        self.own, self.barrier, self.turn = threading.local(), threading.Barrier(count), threading.Lock()
        patch.setattr(processes, "count", lambda: count if self.rank() is not None else 1)
        patch.setattr(processes, "rank", lambda: self.rank() or 0)
        patch.setattr(processes, "meet", lambda: None if self.rank() is None else self.wait(self.barrier))

    def rank(self) -> int | None:
        return getattr(self.own, "rank", None)

    def wait(self, place: threading.Barrier | threading.Event) -> None:
        """Wait there, and let another thread work."""
        self.turn.release()
        try:
            place.wait(60)
        finally:
            self.turn.acquire()

    def run(self, job: Callable[[], Any]) -> list[Any]:
        """What the job returns or raises in each."""
        results: list[Any] = [None] * self.barrier.parties

        def work(rank: int) -> None:
            self.own.rank = rank
            with self.turn:
                try:
                    results[rank] = job()
                except BaseException as error:  # whatever it is, the others must not wait for this one
                    results[rank] = error
                    self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.barrier.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.barrier.reset()
        return results


@pytest.fixture(scope="session")
def statistics(once: Callable[[str, Callable[[Path], Any]], Path], source_folder: Callable[[str], Path], text_file: str) -> Path:
    def make(folder: Path) -> None:
        kvshare.calibrate(source_folder("llama-bias"), folder, kv_heads=2, recipe=QUICK, data=text_file, tokens=512)

    return once("spread-statistics", make)


@pytest.mark.parametrize(("kind", "count"), [("mean", 4), ("statistics", 2), ("svd", 2), ("learned", 3)])
def test_several_give_the_bytes_of_one(
    kind: str,
    count: int,
    source_folder: Callable[[str], Path],
    statistics: Path,
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = TINY_FOLDER if kind == "mean" else source_folder("llama-bias")
    text = {"calibration": text_file, "calibration_tokens": 512, "eval_data": text_file, "eval_tokens": 256, "eval_mode": "layers"}
    fitted = APART.model_copy(update={"fit": APART.fit.model_copy(update={"steps": 3, "batch_tokens": 64})})
    settings: dict[str, dict[str, Any]] = {
        "mean": MEAN | {"max_shard_size": "500kB"},
        "statistics": {"statistics": statistics, "kv_heads": 2, "recipe": QUICK, "eval_data": text_file, "eval_tokens": 256},
        "svd": text | {"kv_heads": 2, "recipe": APART},
        "learned": text | {"init": "learned", "recipe": fitted},
    }
    alone = kvshare.convert(model, tmp_path / "alone", **settings[kind])
    merged_by: dict[int, list[int]] = {}
    original = merged._keep_layer

    def keep(layer: int, *arguments: Any) -> None:
        merged_by[layer] = [*merged_by.get(layer, []), layer % count]
        original(layer, *arguments)

    monkeypatch.setattr(merged, "_keep_layer", keep)
    together = Together(count, monkeypatch)
    first, *others = together.run(lambda: kvshare.convert(model, tmp_path / "out", **settings[kind]))
    assert not [result for result in (first, *others) if isinstance(result, BaseException)]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert merged_by == {layer: [layer % count] for layer in range(alone.plan.layers)}  # each once
    assert first.layers == alone.layers
    assert repr(first.report) == repr(alone.report)
    assert all((other.output, other.report) == (tmp_path / "out", None) for other in others)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["alone", "out"]


class _InterruptedError(BaseException):
    """As a signal: no error that the code could know."""


@pytest.mark.parametrize("dies", [0, 1])
def test_what_each_has_finished_counts(dies: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two dies before its second layer; one process goes on, with the layers that neither had finished."""
    kvshare.convert(TINY_FOLDER, tmp_path / "alone", **MEAN)
    together, done = Together(2, monkeypatch), threading.Event()
    put, record = merged.WeightWriter.put, merged.Journal.record

    def die(writer: Any, name: str, value: Any) -> None:
        if together.rank() == dies and f".{2 + dies}." in name:
            together.wait(done)
            raise _InterruptedError
        put(writer, name, value)

    def recorded(journal: Any, name: str, value: Any = None) -> None:
        record(journal, name, value)
        if name == f"layer {5 - dies}":  # the last of the other one
            done.set()

    with monkeypatch.context() as patch:
        patch.setattr(merged.WeightWriter, "put", die)
        patch.setattr(merged.Journal, "record", recorded)
        results = together.run(lambda: kvshare.convert(TINY_FOLDER, tmp_path / "out", **MEAN))
    assert isinstance(results[dies], _InterruptedError)
    assert isinstance(results[1 - dies], threading.BrokenBarrierError)
    work = work_folder(tmp_path / "out")
    journals = [read_journal(work / JOURNAL), read_journal(work / PART.format(1))]
    finished = {name for journal in journals for name in journal if name.startswith("layer")}
    assert {f"layer {layer}" for layer in (1 - dies, 3 - dies, 5 - dies)} <= finished
    assert f"layer {2 + dies}" not in finished
    again: list[int] = []
    with monkeypatch.context() as patch:
        keep = merged._keep_layer
        patch.setattr(merged, "_keep_layer", lambda layer, *rest: (again.append(layer), keep(layer, *rest)))
        kvshare.convert(TINY_FOLDER, tmp_path / "out", **MEAN)
    assert again == [layer for layer in range(6) if f"layer {layer}" not in finished]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not work.exists()


def test_no_text_passes_when_all_layers_are_merged(
    source_folder: Callable[[str], Path], tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 512, "eval_mode": "off", "recipe": QUICK}

    def stop(*_: Any) -> None:
        raise _InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(merged.WeightWriter, "finish", stop)
        with pytest.raises(_InterruptedError):
            kvshare.convert(source_folder("qwen3"), tmp_path / "out", **settings)
    monkeypatch.setattr(layerwise, "first_inputs", None)
    assert len(kvshare.convert(source_folder("qwen3"), tmp_path / "out", **settings).layers) == 2


def test_a_process_that_was_left_behind_is_waited_for(tmp_path: Path) -> None:
    work = work_folder(tmp_path / "out")
    work.mkdir()
    with FileLock(work / LOCK.format(1)), pytest.raises(UsageError, match="a process of an earlier run still writes"):
        kvshare.convert(TINY_FOLDER, tmp_path / "out", **MEAN)
    assert work.exists()
    kvshare.convert(TINY_FOLDER, tmp_path / "out", **MEAN)
    assert not work.exists()


def test_parts_of_another_job_are_not_taken(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, {"seed": 0}, False)
    part = open_part(tmp_path, {"seed": 0}, 1)
    part.record("layer 1", {"lost": 0.5})
    open_part(tmp_path, {"seed": 1}, 2).record("layer 2")
    with (tmp_path / PART.format(1)).open("a") as stream:
        stream.write('{"name": "layer 3", "va')  # as a process leaves it that is killed while it writes
    take_parts(journal)
    assert journal.entries == {JOB: {"seed": 0}, "layer 1": {"lost": 0.5}} == read_journal(tmp_path / JOURNAL)
    assert [file.name for file in tmp_path.iterdir()] == [JOURNAL]
    open_part(tmp_path, {"seed": 0}, 1).record("layer 5")
    assert "layer 5" in open_journal(tmp_path, {"seed": 0}, False)
    open_part(tmp_path, {"seed": 0}, 1).record("layer 7")
    assert open_journal(tmp_path, {"seed": 0}, True).entries == {JOB: {"seed": 0}}  # begun again, all is forgotten


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init": "mean"}, "healing follows"),
        ({"heal__enabled": False}, "waits for them"),
        ({"heal__enabled": False, "merge__sequential": False}, "would write the text of calibration for itself"),
        ({"heal__enabled": False, "cache_budget": 0.5}, "cache budget"),
        ({"init": "exact"}, "merges no layer"),
        ({"heal__enabled": False, "merge__sequential": False, "calibration__data": "a.txt"}, None),
        ({"heal__enabled": False, "calibration__statistics": "folder"}, None),
        ({"heal__enabled": False, "init": "mean"}, None),
    ],
    ids=str,
)
def test_what_waits_for_others_takes_one_process(
    settings: dict[str, Any], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(Recipe(), **settings)
    found = one_process_because(recipe)
    assert (found is None) == (reason is None)
    if reason is None:
        return
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="was started in 2 processes, and takes one") as caught:
        kvshare.convert("kvshare/tiny", tmp_path / "out", recipe=recipe)
    assert found is not None
    assert reason in caught.value.why
    assert caught.value.fix == found[1]
    assert not any(tmp_path.iterdir())


def test_the_plan_says_who_can_share_it(run: Callable[..., Outcome]) -> None:
    options = ("plan", "kvshare/tiny", "--no-heal", "--eval-mode", "off")
    assert "- one process, because each layer is merged on what" in run(*options).out
    said = run(*options, "--init", "mean").out
    assert "any number" in said
    assert "one process" not in said


@pytest.mark.usefixtures("thorough")
def test_processes_of_a_launch_give_the_bytes_of_one(tmp_path: Path) -> None:
    """The command itself, in two processes that accelerate has started."""
    source = random_model(tmp_path / "source", "llama")
    kvshare.convert(source, tmp_path / "alone", **MEAN)
    script = tmp_path / "convert.py"
    script.write_text("import sys; from kvshare.cli import main; sys.argv[0] = 'kvshare'; main()")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0", "--cpu"]
    words = ["convert", source, "-o", tmp_path / "out", "--init", "mean", "--no-heal", "--eval-mode", "off", "--json"]
    done = subprocess.run(
        [*launch, str(script), *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "out")  # one process prints
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert not work_folder(tmp_path / "out").exists()


def test_killed_processes_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    random_model(tmp_path / "model", "llama")
    done = prepared.run(prepared.KILLING, tmp_path, tmp_path / "root", "together=2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"together": {"killed": 4, "wrong": {}}}
