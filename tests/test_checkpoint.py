"""A checkpoint appears whole or not at all, is never written over, and says when it was changed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import edit_json
from safetensors.torch import load_file, save_file

import kvshare
from kvshare.checkpoint import MANIFEST, OutputTensor, WeightWriter, check_output, check_space, publish, work_folder, workspace
from kvshare.errors import BadCheckpointError, NoSpaceError, UsageError
from kvshare.tensors import DTYPES, is_finite
from kvshare.verification import verify, verify_form


def test_verify_accepts_what_convert_wrote(checkpoint: Path) -> None:
    result = verify(checkpoint)
    assert result.layers == 6
    assert result.files == len([file for file in checkpoint.iterdir() if file.name != MANIFEST])


def test_one_flipped_byte_is_found(checkpoint: Path) -> None:
    for name in json.loads((checkpoint / MANIFEST).read_text())["files"]:
        content = bytearray((checkpoint / name).read_bytes())
        content[-1] ^= 1
        (checkpoint / name).write_bytes(content)
        with pytest.raises(BadCheckpointError, match=name):
            verify(checkpoint)
        content[-1] ^= 1
        (checkpoint / name).write_bytes(content)
    verify(checkpoint)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    with pytest.raises(BadCheckpointError, match=r"generation_config\.json is missing"):
        verify(checkpoint)


def test_manifest_cannot_point_outside(checkpoint: Path) -> None:
    edit_json(checkpoint / MANIFEST, lambda m: m["files"].update({"../outside": {"size": 0, "sha256": ""}}))
    with pytest.raises(BadCheckpointError, match="outside"):
        verify(checkpoint)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_broken_tie_is_refused_on_load(checkpoint: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.self_attn.v_proj.weight"][0, 0] += 1

    change_weights(checkpoint, change)
    with pytest.raises(BadCheckpointError, match="layer 3 differ"):
        kvshare.load(checkpoint)


@pytest.mark.parametrize(("column", "fits"), [(0, True), (63, True), (64, False), (127, False), (128, False), (191, False)])
def test_the_tie_of_a_fused_tensor_is_that_of_its_parts(
    converted_folder: Callable[..., Path], tmp_path: Path, column: int, fits: bool
) -> None:
    folder = Path(shutil.copytree(converted_folder("gpt2"), tmp_path / "checkpoint"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.1.attn.c_attn.weight"][5, column] += 1  # (hidden, queries + keys + values), 64 of each

    change_weights(folder, change)
    if fits:
        assert verify_form(folder) == 2
        return
    with pytest.raises(BadCheckpointError, match="layer 1 differ"):
        kvshare.load(folder)


@pytest.mark.parametrize("parts", [("k_proj.weight", "v_proj.weight"), ("k_proj.bias",), ("v_proj.bias",)], ids=str)
def test_a_broken_repeat_is_refused(mixed_folder: Callable[[str], Path], tmp_path: Path, parts: tuple[str, ...]) -> None:
    folder = Path(shutil.copytree(mixed_folder("qwen2"), tmp_path / "checkpoint"))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in parts:  # one of two heads that should be equal, the same way in K and V
            tensors[f"model.layers.2.self_attn.{part}"][-1] += 1

    verify_form(folder)
    change_weights(folder, change)
    for check in (verify_form, kvshare.load):
        with pytest.raises(BadCheckpointError, match=rf"layers\.2\.self_attn\.{re.escape(parts[0])} does not hold .* 2 times"):
            check(folder)


@pytest.mark.parametrize("heads", [[2, 1], [2, 1, 3], [2, 1, 0], "2", [2, 1, "1"]], ids=str)
def test_heads_that_do_not_fit_are_refused(mixed_folder: Callable[[str], Path], tmp_path: Path, heads: Any) -> None:
    folder = Path(shutil.copytree(mixed_folder("qwen2"), tmp_path / "checkpoint"))
    edit_json(folder / "config.json", lambda config: config["kvshare"].update(kv_heads=heads))
    with pytest.raises(BadCheckpointError, match="kv_heads"):
        kvshare.load(folder)


def test_a_block_without_heads_repeats_none(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda config: config["kvshare"].pop("kv_heads"))
    assert verify_form(checkpoint) == 6
    assert kvshare.load(checkpoint).model.layers[0].self_attn.k_proj.weight.shape[0] == 128


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.v_proj.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_missing_tensor_is_fatal(checkpoint: Path, name: str) -> None:
    change_weights(checkpoint, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(BadCheckpointError, match=name.replace(".", r"\.")):
        kvshare.load(checkpoint)


def test_a_native_model_is_not_a_kvshare_checkpoint(source_folder: Callable[[str], Path]) -> None:
    for use in (verify, kvshare.load):
        with pytest.raises(BadCheckpointError, match="not a kvshare checkpoint"):
            use(source_folder("tiny"))


@pytest.mark.parametrize(("version", "cure"), [(99, "update kvshare"), (1, "convert the model again")])
def test_another_format_version_is_refused(checkpoint: Path, version: int, cure: str) -> None:
    edit_json(checkpoint / "config.json", lambda config: config["kvshare"].update(format_version=version))
    with pytest.raises(BadCheckpointError, match=str(version)) as refused:
        kvshare.load(checkpoint)
    assert refused.value.fix == cure


def test_output_never_overlaps_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    for output in (source, source / "inside", tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="overlap"):
            check_output(output, source, overwrite=True)


def test_existing_output_stays_untouched(checkpoint: Path, source_folder: Callable[[str], Path], text_file: str) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(UsageError, match="--overwrite"):
        kvshare.convert("kvshare/tiny", checkpoint, calibration=text_file, heal=False)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before


def test_overwrite_replaces_only_what_kvshare_wrote(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a kvshare checkpoint"):
        check_output(tmp_path / "thesis", tmp_path / "source", overwrite=True)


def test_too_little_space_is_told_before(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="too few"):
        check_space(tmp_path / "out", 10**18)


def small_writer(folder: Path, dtype: str = "F32") -> WeightWriter:
    folder.mkdir(exist_ok=True)
    return WeightWriter(
        folder, [OutputTensor("a", dtype, (2, 3), "model.safetensors"), OutputTensor("b", dtype, (4,), "model.safetensors")]
    )


def test_the_writer_writes_safetensors_in_any_order(tmp_path: Path) -> None:
    writer = small_writer(tmp_path)
    a, b = torch.randn(2, 3), torch.randn(4)
    writer.put("b", b)
    writer.put("a", a)
    writer.finish()
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read["a"], a)
    assert torch.equal(read["b"], b)


def test_a_forgotten_tensor_is_noticed(tmp_path: Path) -> None:
    writer = small_writer(tmp_path)
    writer.put("a", torch.zeros(2, 3))
    with pytest.raises(ValueError, match="never written: b"):
        writer.finish()


@pytest.mark.parametrize(("dtype", "value"), [("F32", float("nan")), ("BF16", float("inf")), ("F16", 7e4)])
def test_nan_and_overflow_never_leave(tmp_path: Path, dtype: str, value: float) -> None:
    with pytest.raises(BadCheckpointError, match="NaN or infinity"):
        small_writer(tmp_path, dtype).put("b", torch.full((4,), value))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_finite_is_what_torch_calls_finite(dtype: torch.dtype) -> None:
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    finite = torch.tensor([0.0, -0.0, largest, -largest, smallest, smallest / 2, 1.5], dtype=dtype)
    assert is_finite(finite)
    assert is_finite(finite[:0])
    assert is_finite(finite[0])
    for value in (math.nan, math.inf, -math.inf):
        for place in range(len(finite)):
            broken = finite.clone()
            broken[place] = value
            assert not is_finite(broken)
            assert is_finite(broken[place:][1:])
            assert not is_finite(broken[place])
    assert not is_finite(torch.full((4, 6), math.nan, dtype=dtype).T)


def test_a_full_disk_keeps_the_work_and_says_where(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch, source_folder: Callable[[str], Path]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(WeightWriter, "put", full)
    with pytest.raises(NoSpaceError, match="became full") as raised:
        kvshare.convert(source_folder("llama-gqa"), tmp_path / "out", init="mean", heal=False, eval_data=text_file)
    assert not (tmp_path / "out").exists()
    assert str(work_folder(tmp_path / "out")) in raised.value.fix


def test_two_runs_never_write_one_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with workspace(output) as work:
        (work / "half-done").write_text("of the first run")
        with pytest.raises(UsageError, match="another run"), workspace(output):
            pass
        assert (work / "half-done").exists()
    assert not work.exists()


def test_what_another_run_has_just_begun_is_left_alone(tmp_path: Path) -> None:
    output, source = tmp_path / "out", tmp_path / "source"
    source.mkdir()
    with workspace(output) as work:
        assert [entry.name for entry in work.iterdir()] == ["lock"]  # it writes text, and has no file yet
        check_output(output, source, False)
        assert (work / "lock").is_file()
        with pytest.raises(UsageError, match="another run is writing"), workspace(output):
            pass
    assert not work.exists()


def test_what_a_run_left_that_was_killed_while_it_cleared_up_goes(tmp_path: Path) -> None:
    output, source = tmp_path / "out", tmp_path / "source"
    source.mkdir()
    work_folder(output).mkdir()
    (work_folder(output) / "lock").touch()
    check_output(output, source, False)
    assert not work_folder(output).exists()
    work_folder(output).mkdir()
    (work_folder(output) / "healed").mkdir()
    check_output(output, source, False)
    assert (work_folder(output) / "healed").is_dir()


def test_publish_replaces_by_renaming(tmp_path: Path) -> None:
    for name, content in (("out", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    (tmp_path / "out" / "stale").write_text("of the old output")
    publish(tmp_path / "new", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"file", MANIFEST}
    assert (tmp_path / "out" / "file").read_text() == "new"
