"""The shared and the exact form compute what the native form computes, with half the cache."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SOURCES, SQUARE, TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import kvshare
from kvshare.evaluation import cached_numbers
from kvshare.verification import verify_form

# the source and the init of each form that is held against its native one
FORMS = {key: (key, "svd") for key in ("tiny", *SOURCES)} | {
    f"exact {key}": (key, "exact") for key in ("tiny", "llama-mha", *SQUARE)
}
EXACT = [form for form, (_, init) in FORMS.items() if init == "exact"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 50},
    "beam": {"num_beams": 3},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.fixture(scope="module")
def pair(converted_folder: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    """The native and the shared or exact form of a converted model, float32."""

    def get(form: str, kv_heads: int | str = "all") -> tuple[Any, Any]:
        key, init = FORMS[form]
        folder = converted_folder(key, kv_heads, init)
        native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return native, kvshare.load(folder, dtype=torch.float32)

    return get


def generate(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
    torch.manual_seed(3)
    config = GenerationConfig(max_new_tokens=24, pad_token_id=0, return_dict_in_generate=True, **settings)
    return model.generate(**inputs, generation_config=config)


def prompt(texts: list[str], padding_side: str = "left") -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(Path(kvshare.__file__).parent / "tiny", padding_side=padding_side)
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


# transformers cannot crop a sliding-window cache, which prompt lookup needs, in the native form either
PAIRS = [(form, mode) for form in FORMS for mode in MODES if not (form.endswith("window") and mode == "prompt lookup")]


@pytest.mark.parametrize(("form", "mode"), PAIRS)
def test_tokens_equal_native(pair: Callable[..., tuple[Any, Any]], form: str, mode: str) -> None:
    native, shared = pair(form)
    inputs = prompt(TEXT[:1])
    expected, got = generate(native, inputs, **MODES[mode]), generate(shared, inputs, **MODES[mode])
    assert torch.equal(expected.sequences, got.sequences)
    assert cached_numbers(got.past_key_values) * 2 == cached_numbers(expected.past_key_values)


@pytest.mark.parametrize("mode", ["greedy", "beam", "static cache"])
@pytest.mark.parametrize("form", FORMS)
def test_left_padded_batches(pair: Callable[..., tuple[Any, Any]], form: str, mode: str) -> None:
    native, shared = pair(form)
    inputs = prompt([TEXT[0], TEXT[1][:20], TEXT[2][:50]])
    assert bool((inputs["attention_mask"] == 0).any())
    expected, got = generate(native, inputs, **MODES[mode]), generate(shared, inputs, **MODES[mode])
    assert torch.equal(expected.sequences, got.sequences)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_native(converted_folder: Callable[..., Path], form: str, attention: str) -> None:
    key, init = FORMS[form]
    folder = converted_folder(key, init=init)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    shared = kvshare.load(folder, dtype=torch.float32, attn_implementation=attention)
    inputs = prompt(TEXT, padding_side="right")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, got = native(**inputs).logits, shared(**inputs).logits
        # all but the first token read keys and values that were made of cached ones
        cache = transformers.DynamicCache(config=shared.config)
        mask, parts = inputs["attention_mask"], []
        for ids in (inputs["input_ids"][:, :1], inputs["input_ids"][:, 1:]):
            parts.append(shared(ids, attention_mask=mask[:, : cache.get_seq_length() + ids.shape[1]], past_key_values=cache).logits)
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("form", ["tiny", *EXACT])
def test_chunks_and_continued_cache_equal_one_forward(pair: Callable[..., tuple[Any, Any]], form: str, size: int) -> None:
    native, shared = pair(form)
    ids = prompt(TEXT[:1])["input_ids"]
    with torch.no_grad():
        whole = native(ids, use_cache=False).logits
        cache = transformers.DynamicCache(config=shared.config)
        parts = [shared(part, past_key_values=cache, use_cache=True).logits for part in ids.split(size, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("form", "kv_heads"), [("tiny", 8), ("tiny", 4), ("tiny", 2), ("tiny", 1), ("exact tiny", 8)])
def test_cache_of_a_generated_sequence(pair: Callable[..., tuple[Any, Any]], form: str, kv_heads: int) -> None:
    source = AutoModelForCausalLM.from_pretrained(Path(kvshare.__file__).parent / "tiny", dtype=torch.float32).eval()
    _, shared = pair(form, kv_heads)
    inputs = prompt(TEXT[:1])
    full, small = (generate(model, inputs, min_new_tokens=24).past_key_values for model in (source, shared))

    def measured(cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert measured(full) == measured(small) * 16 // kv_heads


def test_one_storage_for_the_shared_projection(pair: Callable[..., tuple[Any, Any]]) -> None:
    native, shared = pair("qwen2")
    names = dict(shared.named_parameters())
    assert not any(name.endswith("v_proj.weight") for name in names)
    assert sum(p.numel() for p in names.values()) < sum(p.numel() for p in native.parameters())


def test_save_pretrained_writes_both_names(pair: Callable[..., tuple[Any, Any]], tmp_path: Path) -> None:
    native, shared = pair("qwen2")
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
folder, ids = sys.argv[1], torch.tensor([json.loads(sys.argv[2])])
out = {}
for trust in (False, True):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
    run = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0,
                         return_dict_in_generate=True)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in run.past_key_values.layers)
    out[str(trust)] = {"tokens": run.sequences.tolist(), "cache": cache, "module": type(model).__module__}
print(json.dumps(out))
"""


@pytest.mark.parametrize("form", ["qwen2", "gpt2", "exact square-bias"])
def test_remote_code_without_kvshare(converted_folder: Callable[..., Path], tmp_path: Path, form: str) -> None:
    key, init = FORMS[form]
    ids = prompt(TEXT[:1])["input_ids"][0].tolist()
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(converted_folder(key, init=init)), json.dumps(ids)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["True"]["tokens"] == result["False"]["tokens"]
    assert result["True"]["cache"] * 2 == result["False"]["cache"]
    assert result["True"]["module"].startswith("transformers_modules")
    assert result["False"]["module"].startswith("transformers.models")
