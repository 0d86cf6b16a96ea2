"""An interrupted conversion goes on where it was, to the same bytes; work of another job is never mixed in and never lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from common import BRIEF, QUICK, TINY_FOLDER, Outcome, in_turn, random_model
from killing import contents, jobs
from safetensors.torch import load_file

import kvshare
from kvshare import layerwise
from kvshare.checkpoint import REPLACED, WeightWriter, work_folder
from kvshare.errors import NoSpaceError, QualityError, UnfinishedWorkError, UsageError
from kvshare.journal import JOURNAL, flat, open_journal, read_journal


@pytest.fixture(scope="session")
def sources(once: Callable[[str, Callable[[Path], Any]], Path], text_file: str) -> Path:
    """What the jobs of killing.py read: a model with random weights, text, and a conversion to heal."""

    def make(folder: Path) -> None:
        random_model(folder / "model", "llama")
        (folder / "text.txt").write_bytes(Path(text_file).read_bytes())
        jobs(folder)["svd"](folder / "converted")(False)

    return once("killing", make)


def test_killed_at_a_write_it_goes_on_to_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    """At a few of the places; benchmarks/convert.py kills at all of them."""
    points = {"mean": 5, "svd": 3, "budget": 3, "healed": 3, "heal": 3}
    asked = [f"{name}={count}" for name, count in points.items()]
    done = prepared.run(prepared.KILLING, sources, tmp_path, *asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: {"killed": count, "wrong": {}} for name, count in points.items()}


class _InterruptedError(BaseException):
    """As a keyboard interrupt: no error that the code could know."""


def interrupt_at(monkeypatch: pytest.MonkeyPatch, layer: int | None) -> list[int]:
    """Interrupt a merge before this layer; the layers that are merged are listed."""
    merged: list[int] = []
    original = layerwise._merge_layer

    def merge(*arguments: Any) -> Any:
        index = arguments[4]
        if index == layer:
            raise _InterruptedError
        merged.append(index)
        return original(*arguments)

    monkeypatch.setattr(layerwise, "_merge_layer", merge)
    return merged


@pytest.mark.parametrize(("key", "mode"), in_turn(["qwen3", "gpt2", "qwen2"], ["layers", "off"]))
def test_finished_layers_are_not_merged_again(
    key: str, mode: str, source_folder: Callable[[str], Path], tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(output: Path) -> kvshare.Conversion:
        settings: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 1024, "seed": 3}
        return kvshare.convert(
            source_folder(key), output, recipe=BRIEF, eval_mode=mode, eval_data=text_file, eval_tokens=512, **settings
        )

    whole = convert(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(_InterruptedError):
            convert(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        merged = interrupt_at(patch, None)
        resumed = convert(tmp_path / "out")
    assert merged == [1]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert resumed.layers == whole.layers
    assert repr(resumed.report) == repr(whole.report)  # NaN is not itself
    assert not work_folder(tmp_path / "out").exists()


def test_a_budget_s_measurement_is_not_repeated(tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert() -> kvshare.Conversion:
        settings: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 1024, "eval_mode": "off", "heal": False}
        return kvshare.convert(random, tmp_path / "out", recipe=QUICK, cache_budget=0.4, **settings)

    random = random_model(tmp_path / "source", "llama")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(_InterruptedError):
            convert()
    monkeypatch.setattr("kvshare.conversion.measure_sensitivity", None)
    result = convert()
    assert result.sensitivity is not None
    assert [entry["chosen"] for entry in result.sensitivity.to_dict()["layers"]] == [
        "untouched" if heads is None else str(heads) for heads in result.plan.layer_heads or ()
    ]


@pytest.fixture
def interrupted(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a conversion to `tmp_path / "out"` whose work is unfinished."""
    own = Path(shutil.copyfile(sources / "text.txt", tmp_path / "own.txt"))
    settings: dict[str, Any] = {"calibration": str(own), "calibration_tokens": 512, "eval_mode": "off", "recipe": QUICK}
    arguments = {"model": sources / "model", "output": tmp_path / "out", **settings}
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(_InterruptedError):
            kvshare.convert(**arguments)
    return arguments


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, r"recipe\.seed differs\n.*was 0 and is now 1"),
        ({"kv_heads": 2}, r"recipe\.kv_heads differs"),
        ({"init": "mean"}, r"recipe\.init differs"),
        ({"max_shard_size": "100kB"}, "files differs"),
        ({"recipe": QUICK.model_copy(update={"merge": QUICK.merge.model_copy(update={"refit": False})})}, r"recipe\.merge\.refit"),
    ],
    ids=str,
)
def test_another_job_is_refused_by_its_field(changes: dict[str, Any], field: str, interrupted: dict[str, Any]) -> None:
    work = work_folder(interrupted["output"])
    before = contents(work)
    with pytest.raises(UnfinishedWorkError, match=field):
        kvshare.convert(**interrupted | changes)
    assert contents(work) == before
    kvshare.convert(**interrupted)
    kvshare.verify(interrupted["output"])


def test_another_text_of_the_same_name_is_refused(interrupted: dict[str, Any]) -> None:
    with Path(interrupted["calibration"]).open("a") as stream:
        stream.write(" And more.")
    with pytest.raises(UnfinishedWorkError, match="text"):
        kvshare.convert(**interrupted)
    result = kvshare.convert(**interrupted, restart=True)
    assert len(result.layers) == 2
    assert not work_folder(interrupted["output"]).exists()


def test_other_commands_keep_off_unfinished_work(interrupted: dict[str, Any]) -> None:
    output = interrupted["output"]
    before = contents(work_folder(output))
    with pytest.raises(UnfinishedWorkError, match="unfinished work"):
        kvshare.inspect(interrupted["model"], output, data=interrupted["calibration"], tokens=256)
    assert contents(work_folder(output)) == before


def test_a_full_disk_is_gone_on_from(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch, source_folder: Callable[[str], Path]
) -> None:
    def convert(output: Path) -> None:
        kvshare.convert(source_folder("llama-gqa"), output, init="mean", heal=False, eval_data=text_file, eval_tokens=256)

    original, left = WeightWriter.put, 3

    def put(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(WeightWriter, "put", put)
        with pytest.raises(NoSpaceError, match="became full"):
            convert(tmp_path / "out")
    done = read_journal(work_folder(tmp_path / "out") / JOURNAL)
    assert [name for name in done if name.startswith("layer")] == ["layer 0"]
    convert(tmp_path / "out")
    convert(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_replacement_that_broke_off_leaves_the_old_output(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"init": "mean", "heal": False, "eval_mode": "off"}
    kvshare.convert(TINY_FOLDER, tmp_path / "out", **settings)
    old = contents(tmp_path / "out")
    # as a run leaves it that is killed between its two renames
    aside = work_folder(tmp_path / "out") / REPLACED
    aside.mkdir(parents=True)
    (tmp_path / "out").rename(aside / "out")
    with pytest.raises(UsageError, match="no such"):
        kvshare.convert(TINY_FOLDER, tmp_path / "out", recipe="no such", **settings)
    with pytest.raises(UsageError):
        kvshare.convert(TINY_FOLDER, tmp_path / "out", kv_heads=3, **settings)
    kvshare.convert(TINY_FOLDER, tmp_path / "out", kv_heads=4, overwrite=True, **settings)
    assert contents(tmp_path / "out") != old
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_a_result_that_does_not_pass_the_limit_stays(
    mode: str, source_folder: Callable[[str], Path], tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"init": "mean", "heal": False, "eval_mode": mode, "eval_data": text_file, "eval_tokens": 512}

    def convert(name: str, **more: Any) -> kvshare.Conversion:
        return kvshare.convert(source_folder("llama-gqa"), tmp_path / name, **{**settings, **more})

    with pytest.raises(QualityError) as caught:
        convert("out", max_perplexity_increase=0.0)
    work = work_folder(tmp_path / "out")
    assert caught.value.exit_code == 6
    assert all(named in str(caught.value) for named in (str(work), "higher limit", "--restart"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnfinishedWorkError, match="kv_heads differs"):
        convert("out", kv_heads=2)
    with pytest.raises(QualityError):
        convert("out", max_perplexity_increase=0.01)
    with monkeypatch.context() as patch:
        patch.setattr("kvshare.conversion.write_merged", None)
        patch.setattr("kvshare.conversion.measure", None)
        passed = convert("out", max_perplexity_increase=1e9)
    assert passed.report is not None
    assert f"{passed.report.perplexity_increase:+.2%}" in str(caught.value)
    assert not work.exists()
    convert("whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, {"a": 1}, False)
    journal.record("first", {"value": float("nan")})
    journal.record("second", [1, 2])
    file = tmp_path / JOURNAL
    whole = file.read_bytes()
    for end in range(whole.index(b"second") - 10, len(whole)):
        file.write_bytes(whole[:end])
        again = open_journal(tmp_path, {"a": 1}, False)
        assert "first" in again
        assert "second" not in again
        again.record("third")
        assert list(read_journal(file)) == ["job", "first", "third"]
    file.write_bytes(whole[: whole.index(b"\n")])  # not even the job was written to its end
    assert list(open_journal(tmp_path, {"a": 2}, False).entries) == ["job"]


def test_healing_keeps_off_the_work_of_a_conversion(
    interrupted: dict[str, Any], converted_folder: Callable[..., Path], source_folder: Callable[[str], Path]
) -> None:
    output, before = interrupted["output"], contents(work_folder(interrupted["output"]))
    for resume in (False, True):
        with pytest.raises(UnfinishedWorkError, match="command differs"):
            kvshare.heal(
                converted_folder("llama-gqa"),
                output,
                source_folder("llama-gqa"),
                interrupted["calibration"],
                tokens=512,
                resume=resume,
            )
    assert contents(work_folder(output)) == before


def test_fields_are_flat() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}


def test_an_interrupt_says_how_to_go_on(run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--init", "mean", "--no-heal", "--eval-mode", "off", "-q"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvshare.merged.merge_mean", stop)
        outcome = run("convert", "kvshare/tiny", "-o", tmp_path / "out", *options)
    assert outcome.code != 0
    assert "the same command goes on" in outcome.err
    assert run("convert", "kvshare/tiny", "-o", tmp_path / "out", *options).code == 0
    kvshare.verify(tmp_path / "out")


def test_a_dry_run_checks_all_and_writes_nothing(run: Callable[..., Outcome], tmp_path: Path, text_file: str) -> None:
    options = ["--init", "mean", "--no-heal", "--eval-data", text_file, "--max-shard-size", "1MB", "--dry-run"]
    said = run("convert", "kvshare/tiny", "-o", tmp_path / "out", *options)
    assert said.code == 0
    assert "nothing was written" in said.out
    planned = json.loads(run("convert", "kvshare/tiny", "-o", tmp_path / "out", *options, "--json").out)
    assert len({tensor["file"] for tensor in planned["tensors"]}) > 3
    assert not any(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    refused = run("convert", "kvshare/tiny", "-o", tmp_path / "out", *options)
    assert refused.code == 2
    assert "exists" in refused.err


def test_shards_hold_no_more_than_asked(tmp_path: Path, text_file: str) -> None:
    settings: dict[str, Any] = {"init": "mean", "heal": False, "eval_mode": "off"}
    kvshare.convert(TINY_FOLDER, tmp_path / "one", **settings)
    kvshare.convert(TINY_FOLDER, tmp_path / "many", max_shard_size="300kB", **settings)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 300_000
        tensors |= held
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert tensors.keys() == one.keys()
    assert all(torch.equal(value, one[name]) for name, value in tensors.items())
    kvshare.verify(tmp_path / "many")
    kvshare.load(tmp_path / "many")
    kvshare.convert(tmp_path_of_shards(tmp_path), tmp_path / "joined", max_shard_size="1GB", **settings)
    assert [file.name for file in (tmp_path / "joined").glob("*.safetensors*")] == ["model.safetensors"]
    with pytest.raises(UsageError, match="cannot be read"):
        kvshare.convert(TINY_FOLDER, tmp_path / "none", max_shard_size="much", **settings)


def tmp_path_of_shards(tmp_path: Path) -> Path:
    """The bundled model in several shards."""
    kvshare.loading.load_native(TINY_FOLDER).save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / name).write_bytes((TINY_FOLDER / name).read_bytes())
    return tmp_path / "sharded"
