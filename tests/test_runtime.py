"""The shared and the exact form compute what the native form computes, with half the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import SOURCES, SQUARE, TEXT, in_turn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import kvshare
from kvshare.runtime.modeling_kvshare import shared_class
from kvshare.timing import cache_bytes
from kvshare.verification import verify_form

# the source, the init and the heads by layer of each form that is held against its native one; `mixed`: layers of all forms
FORMS = {key: (key, "svd", "all") for key in ("tiny", *SOURCES)}
FORMS |= {f"mixed {key}": (key, "svd", "mixed") for key in FORMS if key != "gpt2"}
FORMS |= {f"exact {key}": (key, "exact", "all") for key in ("tiny", "llama-mha", *SQUARE)}
EXACT = [form for form, (_, init, _) in FORMS.items() if init == "exact"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 50},
    "beam": {"num_beams": 3},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}
BY_KERNEL = {"greedy", "beam", "prompt lookup", "static cache"}  # modes of `test_tokens_equal_native` whose slots count as many


@pytest.fixture(scope="module")
def folder_of(converted_folder: Callable[..., Path], mixed_folder: Callable[[str], Path]) -> Callable[[str], Path]:
    """A converted checkpoint by its form."""

    def get(form: str) -> Path:
        key, init, heads = FORMS[form]
        return mixed_folder(key) if heads == "mixed" else converted_folder(key, heads, init)

    return get


@pytest.fixture(scope="module")
def pair(folder_of: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    """The native and the shared or exact form of a converted model, float32; loaded once, so no test may change them."""

    @cache
    def get(form: str) -> tuple[Any, Any]:
        folder = folder_of(form)
        native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return native, kvshare.load(folder, dtype=torch.float32)

    return get


def generate(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
    torch.manual_seed(3)
    config = GenerationConfig(max_new_tokens=12, pad_token_id=0, return_dict_in_generate=True, **settings)
    return model.generate(**inputs, generation_config=config)


def prompt(texts: list[str], padding_side: str = "left") -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(Path(kvshare.__file__).parent / "tiny", padding_side=padding_side)
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


def as_if_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have kernels read, and memory with room hold, any number of slots."""
    for module in ("kvshare_attention", "kvshare_cache"):
        monkeypatch.setattr(f"kvshare.runtime.{module}.LONG", 1)


def numbers_of_layers(cache: Any) -> list[int]:
    """How many numbers a cache holds per layer."""
    return [layer.keys.numel() + layer.values.numel() for layer in cache.layers]


def parts_kept(config: Any) -> list[Fraction]:
    """The part of the native form's cache that the shared form keeps per layer, from what the config says of it."""
    heads = dict(zip(config.kvshare["layers"], config.kvshare["kv_heads"], strict=True))
    full = 2 * getattr(config, "num_key_value_heads", config.kvshare["source"]["num_key_value_heads"])
    return [Fraction(heads.get(layer, full), full) for layer in range(config.num_hidden_layers)]


TRAINED = ("tiny", "mixed tiny", "exact tiny")
PAIRS = in_turn(FORMS, [*MODES], each=2, whole=TRAINED)
# transformers cannot crop a sliding-window cache, which prompt lookup needs, in the native form either
PAIRS = [pair for pair in PAIRS if not (pair[0].endswith("window") and pair[1] == "prompt lookup")]


@pytest.mark.parametrize(("form", "mode"), PAIRS)
def test_tokens_equal_native(pair: Callable[[str], tuple[Any, Any]], form: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native, shared = pair(form)
    if mode in BY_KERNEL:
        as_if_long(monkeypatch)
    inputs = prompt(TEXT[:1])
    expected, got = generate(native, inputs, **MODES[mode]), generate(shared, inputs, **MODES[mode])
    assert torch.equal(expected.sequences, got.sequences)
    full, small = (numbers_of_layers(output.cache) for output in (expected, got))
    assert small == [count * part for count, part in zip(full, parts_kept(shared.config), strict=True)]


@pytest.mark.parametrize(("form", "mode"), in_turn(FORMS, ["greedy", "beam", "static cache"], whole=TRAINED))
def test_left_padded_batches(pair: Callable[[str], tuple[Any, Any]], form: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native, shared = pair(form)
    if mode != "greedy":
        as_if_long(monkeypatch)
    inputs = prompt([TEXT[0], TEXT[1][:20], TEXT[2][:50]])
    assert bool((inputs["attention_mask"] == 0).any())
    expected, got = generate(native, inputs, **MODES[mode]), generate(shared, inputs, **MODES[mode])
    assert torch.equal(expected.sequences, got.sequences)


@pytest.mark.parametrize(("form", "attention"), in_turn(FORMS, ["sdpa", "eager"], whole=TRAINED))
def test_logits_equal_native(
    folder_of: Callable[[str], Path], pair: Callable[[str], tuple[Any, Any]], form: str, attention: str
) -> None:
    if attention == "sdpa":
        native, shared = pair(form)
    else:
        native = AutoModelForCausalLM.from_pretrained(folder_of(form), dtype=torch.float32, attn_implementation=attention).eval()
        shared = kvshare.load(folder_of(form), dtype=torch.float32, attn_implementation=attention)
    assert {model.config._attn_implementation for model in (native, shared)} == {attention}
    inputs = prompt(TEXT, padding_side="right")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, got = native(**inputs).logits, shared(**inputs).logits
        # all but the first token read keys and values that were made of cached ones
        cache = transformers.DynamicCache(config=shared.config)
        mask, parts = inputs["attention_mask"], []
        for ids in (inputs["input_ids"][:, :1], inputs["input_ids"][:, 1:]):
            parts.append(shared(ids, attention_mask=mask[:, : cache.get_seq_length() + ids.shape[1]], cache=cache).logits)
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("form", ["tiny", "mixed tiny", *EXACT])
def test_chunks_and_continued_cache_equal_one_forward(pair: Callable[[str], tuple[Any, Any]], form: str, size: int) -> None:
    native, shared = pair(form)
    ids = prompt(TEXT[:1])["input_ids"]
    with torch.no_grad():
        whole = native(ids, use_cache=False).logits
        cache = transformers.DynamicCache(config=shared.config)
        parts = [shared(part, cache=cache, use_cache=True).logits for part in ids.split(size, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("init", "kv_heads"), [("mean", 8), ("mean", 4), ("mean", 2), ("mean", 1), ("exact", 8)])
def test_cache_of_a_generated_sequence(converted_folder: Callable[..., Path], init: str, kv_heads: int) -> None:
    source = AutoModelForCausalLM.from_pretrained(Path(kvshare.__file__).parent / "tiny", dtype=torch.float32).eval()
    shared = kvshare.load(converted_folder("tiny", "all" if kv_heads == 8 else kv_heads, init), dtype=torch.float32)
    inputs = prompt(TEXT[:1])
    full, small = (generate(model, inputs, min_new_tokens=12).cache for model in (source, shared))
    assert cache_bytes(full) == cache_bytes(small) * 16 // kv_heads


def test_one_storage_for_the_shared_projection(pair: Callable[[str], tuple[Any, Any]]) -> None:
    native, shared = pair("qwen2")
    names = dict(shared.named_parameters())
    assert not any(name.endswith("v_proj.weight") for name in names)
    assert sum(p.numel() for p in names.values()) < sum(p.numel() for p in native.parameters())


def test_one_of_every_repeated_head_is_kept_in_memory(pair: Callable[[str], tuple[Any, Any]]) -> None:
    native, shared = pair("mixed qwen2")
    assert [layer.self_attn.k_proj.weight.shape[0] for layer in native.model.layers] == [16, 16, 16, 16]
    assert [layer.self_attn.k_proj.weight.shape[0] for layer in shared.model.layers] == [16, 16, 8, 8]
    assert [len(layer.self_attn.k_proj.bias) for layer in shared.model.layers] == [16, 16, 8, 8]
    assert [len(layer.self_attn.v_proj.bias) for layer in shared.model.layers] == [16, 16, 8, 8]
    assert shared.model.layers[0].self_attn.v_proj.weight.shape[0] == 16  # an untouched layer


def same_logits(native: Any, shared: Any) -> None:
    with torch.no_grad():
        expected, got = (model(**prompt(TEXT[:1])).logits for model in (native, shared))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", ["llama-mha", "qwen2", "qwen3"])
def test_weights_with_their_repeats_compute_the_same(pair: Callable[[str], tuple[Any, Any]], key: str) -> None:
    native, _ = pair(f"mixed {key}")
    stored = shared_class(type(native))(native.config).eval()
    stored.load_state_dict(native.state_dict(), strict=False)
    weights = [model.model.layers[2].self_attn.k_proj.weight for model in (native, stored)]
    assert torch.equal(*weights)
    same_logits(native, stored)


@pytest.mark.parametrize("key", ["qwen3", "qwen2"])
def test_weights_on_the_disk_keep_their_repeats(mixed_folder: Callable[[str], Path], tmp_path: Path, key: str) -> None:
    native = AutoModelForCausalLM.from_pretrained(mixed_folder(key), dtype=torch.float32).eval()
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer == 2 else "cpu" for layer in range(4)}
    offloaded = shared_class(type(native)).from_pretrained(
        mixed_folder(key), dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert offloaded.model.layers[2].self_attn.k_proj.weight.is_meta
    same_logits(native, offloaded)


@pytest.mark.parametrize("form", ["qwen2", "mixed qwen2"])
def test_save_pretrained_writes_both_names(pair: Callable[[str], tuple[Any, Any]], tmp_path: Path, form: str) -> None:
    native, shared = pair(form)
    shared.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = native.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("key", ["qwen2", "phi", "gpt2"])
def test_what_was_trained_in_the_shared_form_is_saved_tied(converted_folder: Callable[..., Path], tmp_path: Path, key: str) -> None:
    shared = kvshare.load(converted_folder(key), dtype=torch.float32)
    ids = prompt(TEXT[:1])["input_ids"]
    shared(ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        for value in shared.parameters():
            if value.grad is not None:
                value -= 1e-2 * value.grad
        expected = shared(ids).logits
    shared.save_pretrained(tmp_path)
    assert verify_form(tmp_path) == 2
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected, atol=1e-4, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients(converted_folder: Callable[..., Path]) -> None:
    ids = prompt(TEXT[:2])["input_ids"]

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = kvshare.load(converted_folder("qwen3"), dtype=torch.float32).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: value.grad for name, value in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


REMOTE = """
import sys
sys.modules["kvshare"] = None  # as on a machine where it is not installed: importing it fails
import json, torch, transformers
from transformers import AutoModelForCausalLM
transformers.utils.logging.disable_progress_bar()
ids, again = torch.tensor([json.loads(sys.argv[1])]), sys.argv[2]

def run(folder, trust, saved=None):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
    if saved is not None:
        model.save_pretrained(saved)
    run = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0,
                         return_dict_in_generate=True)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in run.cache.layers)
    return {"tokens": run.sequences.tolist(), "cache": cache, "module": type(model).__module__}

def runs(folder):
    native = None if "rotated" in folder else run(folder, False)
    return {"native": native, "remote": run(folder, True, again), "again": run(again, True)}

print(json.dumps([runs(folder) for folder in sys.argv[3:]]))
"""


def test_remote_code_without_kvshare(
    folder_of: Callable[[str], Path], converted_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [folder_of(form) for form in ("qwen2", "mixed qwen2", "gpt2", "exact square-bias")]
    rotated = converted_folder("qwen2", form="rotated")  # which no class of transformers computes
    inputs = prompt(TEXT[:1])
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, json.dumps(inputs["input_ids"][0].tolist()), "again", *map(str, folders), str(rotated)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    results = json.loads(done.stdout.splitlines()[-1])
    for folder, result in zip(folders, results[:-1], strict=True):
        assert result["remote"]["tokens"] == result["native"]["tokens"]
        parts = parts_kept(AutoConfig.from_pretrained(folder))
        assert result["remote"]["cache"] == result["native"]["cache"] * sum(parts) / len(parts)
        assert result["native"]["module"].startswith("transformers.models")
    mine = kvshare.load(rotated, dtype=torch.float32).generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert results[-1]["remote"]["tokens"] == mine.tolist()
    for result in results:
        assert result["remote"]["module"].startswith("transformers_modules")
        assert (result["again"]["tokens"], result["again"]["cache"]) == (result["remote"]["tokens"], result["remote"]["cache"])
