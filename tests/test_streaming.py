"""A model read from its files one layer at a time computes what the loaded model does, in the memory of one layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import QUICK, SOURCES, TINY_FOLDER, random_model
from safetensors.torch import load_file, save_file

import kvshare
from kvshare.activations import first_inputs
from kvshare.errors import BadCheckpointError, UsageError
from kvshare.families import family_of
from kvshare.loading import load_native
from kvshare.passes import passed
from kvshare.recipe import load_recipe
from kvshare.source import open_source
from kvshare.streaming import Skeleton, last_logits, open_skeleton, read_layer

CPU = torch.device("cpu")


def skeleton_of(folder: Path) -> Skeleton:
    source = open_source(folder)
    return open_skeleton(source, family_of(source.model_type).located(source.tensors))


def streamed_logits(skeleton: Skeleton, rows: torch.Tensor) -> torch.Tensor:
    hidden, calls = first_inputs(skeleton.model, skeleton.layers, rows, CPU)
    for index, call in enumerate(calls):
        hidden = passed(read_layer(skeleton, index, CPU), hidden, call, CPU)
    assert all(parameter.is_meta for parameter in skeleton.layers.parameters())
    return last_logits(skeleton, hidden, CPU)


@pytest.mark.parametrize("key", ["tiny", *SOURCES])
def test_layer_by_layer_is_the_whole_model(key: str, source_folder: Callable[[str], Path]) -> None:
    folder = source_folder(key)
    rows = torch.randint(1, 4096, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = load_native(folder, dtype=torch.float32)(rows, use_cache=False).logits
    torch.testing.assert_close(streamed_logits(skeleton_of(folder), rows), wanted, atol=2e-5, rtol=1e-5)


def test_a_base_model_s_names_are_found(tmp_path: Path, source_folder: Callable[[str], Path]) -> None:
    source = Path(shutil.copytree(source_folder("gpt2"), tmp_path / "source"))
    whole = streamed_logits(skeleton_of(source), torch.arange(1, 25)[None])
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 512, 512).tril()
    tensors.pop("lm_head.weight", None)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    bare = streamed_logits(skeleton_of(source), torch.arange(1, 25)[None])
    assert bare.shape == whole.shape
    with torch.no_grad():
        wanted = load_native(source, dtype=torch.float32)(torch.arange(1, 25)[None], use_cache=False).logits
    torch.testing.assert_close(bare, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path, source_folder: Callable[[str], Path]) -> None:
    source = Path(shutil.copytree(source_folder("llama-gqa"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpointError, match=name):
        streamed_logits(skeleton_of(source), torch.arange(1, 25)[None])


@pytest.mark.parametrize(("key", "init"), [("gpt2", "svd"), ("mistral", "mean"), ("qwen2", "learned")])
def test_measuring_by_layers_gives_the_figures_of_the_whole_models(
    key: str, init: str, tmp_path: Path, source_folder: Callable[[str], Path], text_file: str
) -> None:
    recipe = QUICK.model_copy(update={"fit": QUICK.fit.model_copy(update={"steps": 2})})
    modes = ("whole", "layers", "off") if init == "mean" else ("whole", "layers")
    results = {
        mode: kvshare.convert(
            source_folder(key),
            tmp_path / mode,
            recipe=recipe,
            init=init,
            calibration=text_file,
            calibration_tokens=1024,
            eval_data=text_file,
            eval_tokens=1024,
            eval_mode=mode,
        )
        for mode in modes
    }
    whole, layers = results["whole"].report, results["layers"].report
    assert whole is not None
    assert layers is not None
    assert layers.data == whole.data
    figures = [{name: value for name, value in report.to_dict().items() if name != "data"} for report in (layers, whole)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-6)
    weights = {(tmp_path / mode / "model.safetensors").read_bytes() for mode in modes}
    assert len(weights) == 1
    if "off" in modes:
        assert results["off"].report is None
        assert "have not been measured" in (tmp_path / "off" / "README.md").read_text()
        kvshare.verify(tmp_path / "off")


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"heal": True}, "heals"), ({"init": "exact", "heal": False}, "exact"), ({"eval_mode": "quick"}, "mode")],
)
def test_what_cannot_be_measured_by_layers_is_refused(settings: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named):
        kvshare.convert(TINY_FOLDER, tmp_path / "out", **{"eval_mode": "layers", **settings})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


MODES = {"mean": "off", "svd": "layers"}  # by the init that is converted with
PEAK = f"""
import re, sys
import kvshare, kvshare.card, kvshare.merge.svd
from kvshare.recipe import Recipe
kvshare.card.draw_plot, kvshare.merge.svd.ITERATIONS = lambda report: None, 0  # which take time, and no memory that grows
recipe, *sources = sys.argv[1:]
recipe, MODES = Recipe.model_validate_json(recipe), {MODES}
for init in MODES:
    for source in [sources[0], *sources]:  # once more at first: what stays of that is there before both
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        kvshare.convert(source, source + "-out", overwrite=True, recipe=recipe, init=init, eval_mode=MODES[init])
        print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))  # ru_maxrss begins with the parent's
"""


def test_memory_does_not_grow_with_depth(tmp_path: Path, text_file: str) -> None:
    sources = [tmp_path / f"{layers}" for layers in (4, 12)]  # of the first few, two are in memory at a time
    for source in sources:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        random_model(source, "llama", num_hidden_layers=int(source.name), hidden_size=256, intermediate_size=6144, **heads)
    text = {"data": text_file, "tokens": 64, "sequence_length": 64}
    recipe = load_recipe(
        QUICK, **{f"{part}__{name}": value for part in ("calibration", "evaluation") for name, value in text.items()}
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, recipe.model_dump_json(), *sources],
        # what is given back leaves the process: how much the allocator keeps for later is a matter of chance
        env=plain | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found, sizes = [int(peak) for peak in run.stdout.split()], [(path / "model.safetensors").stat().st_size for path in sources]
    assert sizes[1] - sizes[0] > 120_000_000
    for (init, mode), peaks in zip(MODES.items(), (found[1:3], found[4:]), strict=True):
        for source, peak in zip(sources, peaks, strict=True):
            assert peak < kvshare.plan(source, recipe=recipe, init=init, eval_mode=mode).memory_bytes
        assert peaks[1] - peaks[0] < 0.4 * (sizes[1] - sizes[0])
