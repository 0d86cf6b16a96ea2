"""A conversion from the source to the published folder: quality, form, sameness, refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import QUICK, SOURCES, TEXT, TINY_FOLDER, edit_json, in_turn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvshare
from kvshare import conversion
from kvshare.checkpoint import sha256, work_folder
from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.families import Family, family_of
from kvshare.fit import FitReport, fit_layer
from kvshare.layout import pack, unpack
from kvshare.merge import AttentionWeights
from kvshare.recipe import Recipe
from kvshare.runtime import NAMES


@pytest.fixture(scope="module")
def measured(measured_folder: Callable[[str], Path]) -> Callable[[str], dict[str, float]]:
    """Reports of the bundled, really trained model."""

    def get(init: str) -> dict[str, float]:
        report: dict[str, float] = json.loads((measured_folder(init) / "report.json").read_text())
        return report

    return get


def test_the_closed_form_keeps_a_trained_model(measured: Callable[[str], dict[str, float]]) -> None:
    report = measured("svd")
    assert 0 < report["perplexity_increase"] < 0.05
    assert report["kl"] < 0.05
    assert report["token_agreement"] > 0.8
    assert report["cache_reduction"] == 0.5


def test_the_naive_mean_does_not(measured: Callable[[str], dict[str, float]]) -> None:
    assert measured("mean")["perplexity_increase"] > 20 * measured("svd")["perplexity_increase"]
    assert measured("mean")["kl"] > 20 * measured("svd")["kl"]


def test_learning_improves_on_the_closed_form(tmp_path: Path, own_text: tuple[str, str]) -> None:
    """On one that was searched for in short; benchmarks/quality.py measures what it brings after a whole search."""
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "fit": {"steps": 40, "batch_tokens": 1024, "learning_rate": 0.05},
                "kv_heads": 2,
                "merge": {"balance": [1.0], "grouping": "neighbours"},
                "heal": {"enabled": False},
                "calibration": {"data": own_text[0], "tokens": 4_096, "sequence_length": 128},
                "evaluation": {"data": own_text[1], "tokens": 2_048, "sequence_length": 128},
            }
        )
    )
    reports = {
        init: kvshare.convert("kvshare/tiny", tmp_path / init, recipe=recipe, init=init).report.to_dict()
        for init in ("svd", "learned")
    }
    assert reports["learned"]["kl"] < 0.9 * reports["svd"]["kl"]


@pytest.mark.parametrize("key", ["qwen3", "phi", "smollm3", "gpt2"])
def test_what_was_learned_is_what_is_written(
    tmp_path: Path, source_folder: Callable[[str], Path], text_file: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[AttentionWeights] = []

    def watched(*arguments: Any) -> tuple[AttentionWeights, FitReport]:
        weights, report = fit_layer(*arguments)
        learned.append(weights)
        return weights, report

    monkeypatch.setattr("kvshare.layerwise.fit_layer", watched)
    recipe = Recipe.model_validate(
        {
            "init": "learned",
            "fit": {"steps": 2},
            "merge": {"refit": False},
            "heal": {"enabled": False},
            "calibration": {"data": text_file, "tokens": 1024, "sequence_length": 64},
            "evaluation": {"data": text_file, "tokens": 512},
        }
    )
    family = kvshare.convert(source_folder(key), tmp_path / "out", recipe=recipe).plan.family
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer, weights in enumerate(learned):
        for name, value in pack(weights, family).items():
            torch.testing.assert_close(tensors[family.tensor(layer, name)], value.float())


@pytest.mark.parametrize(("key", "init"), in_turn(SOURCES, ["mean", "svd"]))
def test_output_is_native_and_tied(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], key: str, init: str
) -> None:
    family = family_of(SOURCES[key][0])
    heads = 2 if family.kv_heads else 8
    folder, source = converted_folder(key, 2 if family.kv_heads else "all", init), source_folder(key)
    config, origin = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    assert config["model_type"] == origin["model_type"]
    assert config["architectures"] == origin["architectures"]
    assert config.get("num_key_value_heads", 8) == heads
    tensors, before = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert tensors.keys() == before.keys()
    for layer in range(2):
        prefix = family.tensor(layer, "")
        attention = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        weights = unpack(attention, family, 8)
        assert torch.equal(weights.k, weights.v)
        assert weights.k.shape[0] == heads * 8
    untouched = [name for name in tensors if "attn" not in name]
    assert all(torch.equal(tensors[name], before[name]) for name in untouched)
    assert AutoTokenizer.from_pretrained(folder)(TEXT[0]) == AutoTokenizer.from_pretrained(source)(TEXT[0])


def tied(tensors: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """The tensors of a model with v made equal to k."""
    result = dict(tensors)
    for name, value in tensors.items():
        if family.fused and name.endswith(f".{family.k}.weight"):
            query, key, _ = value.chunk(3, 1)
            result[name] = torch.cat([query, key, key], 1)
        elif name.endswith(f".{family.k}.weight"):
            result[name.replace(family.k, family.v)] = value
    return result


@pytest.mark.parametrize("key", ["llama-mha", "llama-gqa", "qwen2", "qwen3", "smollm3", "phi", "gpt2"])
def test_a_model_that_shares_already_comes_back_the_same(
    tmp_path: Path, source_folder: Callable[[str], Path], text_file: str, key: str
) -> None:
    source = Path(shutil.copytree(source_folder(key), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    shared = tied(tensors, family_of(SOURCES[key][0]))
    save_file({name: value.clone() for name, value in shared.items()}, source / "model.safetensors", metadata={"format": "pt"})
    kvshare.convert(source, tmp_path / "out", calibration=text_file, calibration_tokens=2048, heal=False, eval_mode="off")
    ids = AutoTokenizer.from_pretrained(source)(TEXT[0], return_tensors="pt")["input_ids"]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (source, tmp_path / "out")
    )
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)


def test_the_same_command_gives_the_same_bytes(tmp_path: Path, source_folder: Callable[[str], Path], text_file: str) -> None:
    """Also where a program has made other dtypes and devices torch's defaults, which it finds as it left them."""
    try:
        for name in ("first", "second", "of other defaults"):
            if name == "of other defaults":
                torch.set_default_dtype(torch.bfloat16)
                torch.set_default_device("meta")
            texts = {"calibration": text_file, "heal_data": text_file, "eval_data": text_file}
            tokens = {"calibration_tokens": 2048, "heal_tokens": 512, "eval_tokens": 1024}
            kvshare.convert(source_folder("llama-gqa"), tmp_path / name, kv_heads=2, **texts, **tokens)
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.bfloat16, "meta")
        with pytest.raises(BadCheckpointError, match="there is no folder"):
            kvshare.load(tmp_path / "nothing")
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.bfloat16, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    first, *others = ({file.name: sha256(file) for file in folder.iterdir()} for folder in sorted(tmp_path.iterdir()))
    assert others == [first, first]


def test_what_no_page_cache_holds_is_taken_out_of_it_and_written_the_same(
    tmp_path: Path, source_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings = source_folder("qwen2"), {"init": "mean", "heal": False, "eval_mode": "off"}
    kvshare.convert(source, tmp_path / "a", **settings)  # type: ignore[arg-type]
    events: list[tuple[str, int]] = []
    advise, sync = os.posix_fadvise, os.fsync

    def advised(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        events.append(("forgotten", os.fstat(descriptor).st_ino))
        advise(descriptor, start, size, advice)

    def synced(descriptor: int) -> None:
        sync(descriptor)
        events.append(("synced", os.fstat(descriptor).st_ino))

    monkeypatch.setattr("kvshare.merged.fits_page_cache", lambda size: size < (source / "model.safetensors").stat().st_size)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(os, "fsync", synced)
    kvshare.convert(source, tmp_path / "b", **settings)  # type: ignore[arg-type]
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert [(tmp_path / "a" / name).read_bytes() for name in names] == [(tmp_path / "b" / name).read_bytes() for name in names]
    read, written = ((folder / "model.safetensors").stat().st_ino for folder in (source, tmp_path / "b"))
    assert ("forgotten", read) in events
    assert events.index(("synced", written)) < events.index(("forgotten", written))


def test_sharded_sources_give_the_tensors_of_single_files(
    tmp_path: Path, source_folder: Callable[[str], Path], text_file: str
) -> None:
    source = source_folder("qwen3")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(sharded, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, sharded / name)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    (sharded / "model-stale.safetensors").write_bytes(b"not weights at all")
    settings = {"recipe": QUICK, "calibration": text_file, "calibration_tokens": 2048, "eval_data": text_file, "eval_tokens": 512}
    kvshare.convert(source, tmp_path / "one", **settings)  # type: ignore[arg-type]
    kvshare.convert(sharded, tmp_path / "many", **settings)  # type: ignore[arg-type]
    one = load_file(tmp_path / "one" / "model.safetensors")
    many: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "many").glob("*.safetensors"):
        many |= load_file(file)
    assert one.keys() == many.keys()
    assert all(torch.equal(value, many[name]) for name, value in one.items())
    kvshare.verify(tmp_path / "many")


def test_tied_embeddings_stay_tied(converted_folder: Callable[..., Path]) -> None:
    folder = converted_folder("tiny")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = kvshare.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_kvshare_block_tells_what_was_done(converted_folder: Callable[..., Path]) -> None:
    block = json.loads((converted_folder("tiny", 2, "mean") / "config.json").read_text())["kvshare"]
    assert block["version"] == kvshare.__version__
    assert block["layers"] == [0, 1, 2, 3, 4, 5]
    assert block["source"]["name"] == "tiny"
    assert block["source"]["num_key_value_heads"] == 8
    assert block["recipe"]["kv_heads"] == 2
    assert block["seed"] == 0


def test_a_base_model_s_names_are_kept(tmp_path: Path, source_folder: Callable[[str], Path], text_file: str) -> None:
    """As in the first checkpoint of gpt2, which also stores its causal masks."""
    settings = {"recipe": QUICK, "calibration": text_file, "calibration_tokens": 1024, "eval_data": text_file, "eval_tokens": 512}
    source = Path(shutil.copytree(source_folder("gpt2"), tmp_path / "source"))
    kvshare.convert(source, tmp_path / "whole", **settings)  # type: ignore[arg-type]
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(source / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 512, 512).tril()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    kvshare.convert(source, tmp_path / "bare", **settings)  # type: ignore[arg-type]
    whole, bare = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "bare"))
    assert bare.keys() == tensors.keys()
    assert all(torch.equal(value, bare[name.removeprefix("transformer.")]) for name, value in whole.items())
    ids = AutoTokenizer.from_pretrained(source)(TEXT[0], return_tensors="pt")["input_ids"]
    native, shared = AutoModelForCausalLM.from_pretrained(tmp_path / "bare"), kvshare.load(tmp_path / "bare")
    torch.testing.assert_close(shared(ids).logits, native(ids).logits, atol=1e-4, rtol=0)
    recipe = Recipe.model_validate({"heal": {"batch_tokens": 256, "sequence_length": 64}})
    kvshare.heal(tmp_path / "bare", tmp_path / "healed", source, text_file, tokens=1_024, recipe=recipe)
    healed = load_file(tmp_path / "healed" / "model.safetensors")
    assert healed.keys() == tensors.keys()
    assert not torch.equal(healed["h.1.attn.c_attn.weight"], bare["h.1.attn.c_attn.weight"])
    kvshare.verify(tmp_path / "healed")


def test_licence_follows_the_weights(tmp_path: Path, text_file: str) -> None:
    source = Path(shutil.copytree(TINY_FOLDER, tmp_path / "source", ignore=shutil.ignore_patterns("__*")))
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: en\n---\n# A model\n")
    kvshare.convert(source, tmp_path / "out", init="mean", heal=False, eval_data=text_file, eval_tokens=512)
    matter = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert matter["license"] == "cc-by-4.0"
    assert matter["language"] == "en"
    assert "kvshare" in matter["tags"]


def test_foreign_code_is_neither_run_nor_copied(tmp_path: Path, text_file: str) -> None:
    source = Path(shutil.copytree(TINY_FOLDER, tmp_path / "source", ignore=shutil.ignore_patterns("__*")))
    canary = tmp_path / "canary"
    (source / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    edit_json(
        source / "config.json",
        lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}),
    )
    edit_json(source / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]}))
    kvshare.convert(source, tmp_path / "out", init="mean", heal=False, eval_data=text_file, eval_tokens=512)
    kvshare.load(tmp_path / "out")
    assert not canary.exists()
    assert {file.name for file in (tmp_path / "out").glob("*.py")} == {*NAMES}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {
        "AutoModelForCausalLM": "modeling_kvshare.LlamaForCausalLM"
    }


@pytest.mark.parametrize("init", ["mean", "svd"])
def test_sixteen_bits_are_rounded_once(init: str, tmp_path: Path, source_folder: Callable[[str], Path], text_file: str) -> None:
    """A source in bfloat16 gives what the same numbers in float32 give, cast at the end."""
    tensors = {name: value.bfloat16() for name, value in load_file(source_folder("llama-gqa") / "model.safetensors").items()}
    apart = QUICK.merge.model_copy(update={"sequential": False})  # layers do not see how those before them were rounded
    written = []
    for dtype in (torch.bfloat16, torch.float32):
        source = Path(shutil.copytree(source_folder("llama-gqa"), tmp_path / f"{dtype}"))
        save_file(
            {name: value.to(dtype) for name, value in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"}
        )
        edit_json(source / "config.json", lambda c, dtype=dtype: c.update(dtype=str(dtype).removeprefix("torch.")))
        recipe = QUICK.model_copy(update={"init": init, "merge": apart})
        text: dict[str, Any] = {} if init == "mean" else {"calibration": text_file, "calibration_tokens": 512}
        kvshare.convert(source, tmp_path / f"{dtype}-out", recipe=recipe, kv_heads=2, eval_mode="off", **text)
        written.append(load_file(tmp_path / f"{dtype}-out" / "model.safetensors"))
    assert {value.dtype for value in written[0].values()} == {torch.bfloat16}
    assert all(torch.equal(value, written[1][name].bfloat16()) for name, value in written[0].items())
    merged = [name for name in written[1] if "k_proj" in name]
    assert not any(torch.equal(written[1][name], written[1][name].bfloat16().float()) for name in merged)


@pytest.mark.parametrize("part", ["v_proj", "q_proj", "mlp.up_proj"])
def test_what_was_written_is_read_again_before_it_is_published(
    part: str, tmp_path: Path, source_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back other bytes, and a header that is not the planned one."""
    original = conversion.write_merged

    def damaged(staged: Path, *arguments: Any) -> Any:
        report = original(staged, *arguments)
        file = staged / "model.safetensors"
        tensors = load_file(file)
        name = f"model.layers.1.{'' if 'mlp' in part else 'self_attn.'}{part}.weight"
        if part == "v_proj":
            tensors[name][0, 0] += 1
        elif part == "q_proj":
            tensors[name] = tensors[name][:-1].contiguous()
        else:
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        return report

    monkeypatch.setattr(conversion, "write_merged", damaged)
    named = "K and V of layer 1 differ" if part == "v_proj" else rf"{part}\.weight was not written as planned"
    with pytest.raises(BadCheckpointError, match=named):
        kvshare.convert(source_folder("llama-gqa"), tmp_path / "out", init="mean", heal=False, eval_mode="off")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("generation_config.json", {"max_new_tokens": 0}),
        ("config.json", {"hidden_act": "nothing"}),
        ("config.json", {"pad_token_id": "x"}),
        ("config.json", {"dtype": True}),
        ("config.json", {"dtype": "int8"}),
    ],
    ids=["generation", "activation", "pad", "dtype", "whole numbers"],
)
def test_settings_that_no_model_can_have_are_refused_at_once(
    file: str, fields: dict[str, Any], tmp_path: Path, source_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(source_folder("llama-gqa"), tmp_path / "source"))
    edit_json(source / file, lambda values: values.update(fields))
    monkeypatch.setattr(conversion, "write_merged", None)
    with pytest.raises(BadCheckpointError, match=file.replace(".", r"\.")):
        kvshare.convert(source, tmp_path / "out", init="mean", heal=False, eval_mode="off")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_refusals_leave_nothing_behind(tmp_path: Path, source_folder: Callable[[str], Path], text_file: str) -> None:
    damaged = Path(shutil.copytree(source_folder("llama-gqa"), tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    silent = Path(shutil.copytree(source_folder("llama-gqa"), tmp_path / "silent"))
    edit_json(silent / "tokenizer_config.json", lambda c: [c.pop(key, None) for key in ("bos_token", "eos_token", "pad_token")])
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    cases = [
        (BadCheckpointError, damaged, {"init": "mean", "heal": False, "eval_data": text_file}),
        (UsageError, silent, {"heal": False}),
        (UsageError, TINY_FOLDER, {"calibration": str(empty), "heal": False}),
        (UsageError, TINY_FOLDER, {"calibration": str(tmp_path / "none.txt")}),
        (UsageError, TINY_FOLDER, {"kv_heads": 3}),
        (UnsupportedModelError, converted_unsupported(tmp_path), {}),
    ]
    output = tmp_path / "out"
    for error, source, settings in cases:
        with pytest.raises(error) as raised:
            kvshare.convert(source, output, **settings)  # type: ignore[arg-type]
        assert len(str(raised.value).splitlines()) == 3
        assert not output.exists()
        assert not work_folder(output).exists()


def converted_unsupported(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(TINY_FOLDER, tmp_path / "unknown", ignore=shutil.ignore_patterns("__*")))
    edit_json(folder / "config.json", lambda c: c.update(model_type="lama"))
    return folder
