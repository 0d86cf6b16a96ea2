"""A cache in few bits holds what it says, and is read as it was rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import TEXT
from torch import Tensor
from transformers import AutoTokenizer

import kvshare
from kvshare.errors import UsageError
from kvshare.quantised import quantised_bytes, round_trip, through_quantised_cache
from kvshare.runtime import kvshare_attention
from kvshare.runtime.kvshare_bits import BITS, dequantise, quantise
from kvshare.timing import cache_bytes

PROMPT = torch.tensor([AutoTokenizer.from_pretrained(Path(kvshare.__file__).parent / "tiny")(TEXT[0])["input_ids"]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


@pytest.mark.parametrize("bits", BITS)
def test_integers_hold_what_rounding_leaves(bits: int) -> None:
    x = torch.randn(2, 3, 5, 16) * torch.logspace(-6, 3, 5)[:, None]
    x[0, 0, 0] = 0
    numbers, scale = quantise(x, bits)
    assert torch.equal(dequantise(numbers, scale, x.dtype), round_trip(x, bits))
    assert numbers.nbytes + scale.nbytes == 2 * 3 * 5 * (16 * bits // 8 + 2)
    assert not dequantise(numbers, scale, x.dtype)[0, 0, 0].any()


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("key", ["tiny", "qwen3", "phi", "mistral-window", "gpt2"])
@torch.no_grad()
def test_a_model_reads_its_cache_as_it_was_rounded(
    converted_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, key: str, bits: int, backend: str
) -> None:
    monkeypatch.setenv(kvshare_attention.VARIABLE, backend)
    folder = converted_folder(key)
    model = kvshare.load(folder, dtype=torch.float32, cache_bits=bits)
    expected = through_quantised_cache(kvshare.load(folder, dtype=torch.float32), bits)(PROMPT)
    cache = transformers.DynamicCache(config=model.config)
    parts = [model(part, cache=cache).logits for part in PROMPT.split([9, *[1] * 8, PROMPT.shape[1] - 17], 1)]
    # the least difference in a hidden state may round a number of the next layer the other way
    assert float((torch.cat(parts, 1) - expected).square().mean()) < 1e-3 * float(expected.square().mean())
    kept = [layer.keys.shape[:3].numel() for layer in cache.layers]
    assert cache_bytes(cache) == sum(kept) * (model.config.hidden_size // model.config.num_attention_heads * bits // 8 + 2)


@torch.no_grad()
def test_caches_of_all_kinds_hold_integers(converted_folder: Callable[..., Path]) -> None:
    folder = converted_folder("tiny")
    model, whole = kvshare.load(folder, dtype=torch.float32, cache_bits=8), kvshare.load(folder, dtype=torch.float32)
    expected = model.generate(PROMPT, **SETTINGS)
    static = model.generate(PROMPT, cache_implementation="static", disable_compile=True, **SETTINGS)
    assert torch.equal(static.sequences, expected.sequences)
    assert {layer.keys.dtype for layer in static.cache.layers} == {torch.int8}
    assert {layer.values.dtype for layer in static.cache.layers} == {torch.float16}
    model.generate(PROMPT, num_beams=3, **SETTINGS)
    cache = expected.cache
    assert cache_bytes(cache) == quantised_bytes(whole.generate(PROMPT, **SETTINGS).cache, 8)


@torch.no_grad()
def test_what_does_not_go_together_is_refused(converted_folder: Callable[..., Path]) -> None:
    folder = converted_folder("tiny")
    eight, whole = kvshare.load(folder, cache_bits=8), kvshare.load(folder)
    filled: Tensor = eight(PROMPT).cache
    with pytest.raises(ValueError, match="filled with 8 bits, and the model keeps all"):
        whole(PROMPT[:, :1], cache=filled)
    with pytest.raises(ValueError, match="quantises by itself"):
        eight(PROMPT, cache=transformers.QuantizedCache("fp8", eight.config))
    with pytest.raises(UsageError, match="8 or 4"):
        kvshare.load(folder, cache_bits=5)
    with pytest.raises(UsageError, match="exact form"):
        kvshare.load(converted_folder("tiny", "all", "exact"), cache_bits=8)
