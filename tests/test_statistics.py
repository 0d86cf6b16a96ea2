"""Statistics stand for the text they were taken of: the same weights, without it; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import QUICK, TINY_FOLDER, Outcome, at_times, edit_json
from safetensors.torch import load_file, save_file

import kvshare
from kvshare import activations
from kvshare.activations import room
from kvshare.errors import BadCheckpointError, UsageError
from kvshare.layerwise import FIXED_BALANCE, STATISTICS_ITERATIONS
from kvshare.recipe import Recipe

BARE: dict[str, Any] = {"heal": False, "eval_mode": "off"}


@pytest.fixture(scope="session")
def taken(
    once: Callable[[str, Callable[[Path], Any]], Path], source_folder: Callable[[str], Path], text_file: str
) -> Callable[..., Path]:
    """Statistics of a source, made once."""

    def get(key: str, kv_heads: int | str = "all") -> Path:
        return once(
            f"statistics-{key}-{kv_heads}",
            lambda folder: kvshare.calibrate(source_folder(key), folder, kv_heads=kv_heads, data=text_file, tokens=2048),
        )

    return get


@pytest.mark.parametrize(("key", "kv_heads"), [("qwen3", "all"), ("qwen2", 2), ("gpt2", "all"), *at_times(("tiny", "all"))])
def test_statistics_give_the_weights_that_their_text_gives(
    key: str,
    kv_heads: int | str,
    taken: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = source_folder(key)
    without = kvshare.convert(source, tmp_path / "a", statistics=taken(key, kv_heads), kv_heads=kv_heads, **BARE)
    # all that text alone allows for is left out
    monkeypatch.setattr("kvshare.merge.svd.ITERATIONS", STATISTICS_ITERATIONS)
    settings = {"balance": [FIXED_BALANCE], "refit": False, "sequential": False}
    recipe = Recipe.model_validate({"merge": settings})
    text: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 2048}
    kvshare.convert(source, tmp_path / "b", recipe=recipe, kv_heads=kv_heads, **text, **BARE)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    assert [layer.error for layer in without.layers] == [None] * without.plan.layers
    assert {layer.balance for layer in without.layers} == {FIXED_BALANCE}


@pytest.mark.usefixtures("thorough")
def test_statistics_beat_the_mean(taken: Callable[..., Path], tmp_path: Path, text_file: str) -> None:
    settings: dict[str, Any] = {"heal": False, "eval_data": text_file, "eval_tokens": 2048}
    closed = kvshare.convert(TINY_FOLDER, tmp_path / "a", statistics=taken("tiny"), **settings).report
    mean = kvshare.convert(TINY_FOLDER, tmp_path / "b", init="mean", **settings).report
    assert closed is not None
    assert mean is not None
    assert closed.kl < mean.kl / 10


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_heads": 2}, "are for 8 KV heads"),
        ({"init": "learned"}, "learned"),
        ({"init": "mean"}, "mean"),
        ({"cache_budget": 0.4}, "budget"),
    ],
)
def test_what_statistics_cannot_serve_is_refused(
    settings: dict[str, Any], named: str, taken: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=named):
        kvshare.convert(TINY_FOLDER, tmp_path / "out", statistics=taken("tiny"), **settings, **BARE)
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_model_are_refused(
    taken: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="of another model"):
        kvshare.convert(source_folder("qwen3"), tmp_path / "out", statistics=taken("tiny"), **BARE)


def _lacking(folder: Path) -> None:
    file = folder / "layer-00003.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "key_metric"}, file)


def _endless(folder: Path) -> None:
    file = folder / "layer-00003.safetensors"
    tensors = load_file(file)
    tensors["key_metric"][0, 0, 0] = torch.inf
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "layer-00003.safetensors").unlink(), r"layer-00003\.safetensors is missing"),
        (_lacking, "lacks 'key_metric'"),
        (_endless, "holds NaN or infinity"),
        (lambda folder: edit_json(folder / "statistics.json", lambda s: s.update(format_version=99)), "format version 99"),
        (lambda folder: edit_json(folder / "statistics.json", lambda s: s.pop("groupings")), "cannot be used"),
        (lambda folder: (folder / "statistics.json").write_text("{"), r"statistics\.json"),
    ],
)
def test_damaged_statistics_are_named(
    damage: Callable[[Path], object], named: str, taken: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(taken("tiny"), tmp_path / "statistics"))
    damage(folder)
    with pytest.raises(BadCheckpointError, match=named):
        kvshare.convert(TINY_FOLDER, tmp_path / "out", statistics=folder, **BARE)
    assert not (tmp_path / "out").exists()


def test_large_states_lie_in_files_and_are_the_same(
    source_folder: Callable[[str], Path], tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_folder("qwen3")
    settings: dict[str, Any] = {"recipe": QUICK, "calibration": text_file, "calibration_tokens": 2048, "init": "svd", **BARE}
    kvshare.convert(source, tmp_path / "a", **settings)
    mapped = []

    def counted(shape: Any, scratch: Path | None = None) -> torch.Tensor:
        found = room(shape, scratch)
        mapped.append(scratch is not None)
        return found

    monkeypatch.setattr(activations, "IN_MEMORY", 0)
    monkeypatch.setattr(activations, "room", counted)
    kvshare.convert(source, tmp_path / "b", **settings)
    assert mapped
    assert all(mapped)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_room_in_a_file_is_zero_where_nothing_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "IN_MEMORY", 100)
    values = room((5, 7), tmp_path)
    values[2] = 1.5
    assert values.sum() == 7 * 1.5
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_calibrate_says_what_it_would_write(
    run: Callable[..., Outcome], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    source = source_folder("llama-mha")
    words = ("calibrate", source, "-o", tmp_path / "out", "--data", text_file, "--tokens", "2048", "--kv-heads", "4")
    result = run(*words, "--dry-run", "--json")
    assert (result.code, result.err) == (0, "")
    planned = json.loads(result.out)
    assert list(tmp_path.iterdir()) == []
    assert (planned["layers"], planned["kv_heads"]) == (2, 4)
    result = run(*words, "--json", "--quiet")
    assert result.code == 0, result.err
    assert json.loads(result.out) == {"output": str(tmp_path / "out"), "tokens": 2048, "layers": 2}
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("layer-*"))
    assert 0.9 * planned["disk_bytes"] < written <= 1.01 * planned["disk_bytes"]
    assert run(*words, "--json").code == 2  # exists
