"""Ways of generating, and kinds of rope, beside those of test_runtime: the shared form against the native form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import TEXT, at_times, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import kvshare
from kvshare.timing import cache_bytes

TINY = Path(kvshare.__file__).parent / "tiny"
SETTINGS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
PROMPT = torch.tensor([AutoTokenizer.from_pretrained(TINY)(TEXT[0])["input_ids"]])


def pair(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), kvshare.load(folder, dtype=dtype)


def assisted(model: Any) -> Any:
    return model.generate(PROMPT, assistant_model=AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), **SETTINGS)


def continued(model: Any) -> Any:
    """A second question into the cache of the first."""
    cache = DynamicCache(config=model.config)
    first = model.generate(PROMPT, cache=cache, **SETTINGS).sequences
    return model.generate(torch.cat([first, PROMPT[:, :7]], 1), cache=cache, **SETTINGS)


def embedded(model: Any) -> Any:
    return model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT).detach(), **SETTINGS)


MODES: dict[str, Callable[[Any], Any]] = {
    "assisted": assisted,
    "chunked prefill": lambda model: model.generate(PROMPT, prefill_chunk_size=5, **SETTINGS),
    "chunked prefill into a static cache": lambda model: model.generate(
        PROMPT, prefill_chunk_size=5, cache_implementation="static", disable_compile=True, **SETTINGS
    ),
    "continued conversation": continued,
    "inputs_embeds": embedded,
    "several samples": lambda model: model.generate(PROMPT, **SETTINGS | {"do_sample": True, "num_return_sequences": 3}),
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_native(converted_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr("kvshare.runtime.kvshare_cache.LONG", 1)
    found = []
    for model in pair(converted_folder("tiny")):
        torch.manual_seed(3)
        found.append(MODES[mode](model))
    native, shared = found
    assert torch.equal(native.sequences, shared.sequences)
    assert 2 * cache_bytes(shared.cache) == cache_bytes(native.cache)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("key", ["llama-gqa", "mistral-window", *at_times("tiny")])
@torch.no_grad()
def test_one_graph_with_a_static_cache(converted_folder: Callable[..., Path], key: str) -> None:
    native, shared = pair(converted_folder(key))
    tokens = []
    for model, forward in ((native, native.forward), (shared, torch.compile(shared.forward, backend="eager", fullgraph=True))):
        cache, ids, given = StaticCache(config=model.config, max_cache_len=40), PROMPT, []
        for _ in range(8):
            ids = forward(input_ids=ids, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
            given.append(int(ids))
        tokens.append(given)
    assert tokens[0] == tokens[1]


@torch.no_grad()
def test_bfloat16(converted_folder: Callable[..., Path]) -> None:
    native, shared = pair(converted_folder("tiny"), torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(converted_folder("tiny"), dtype=torch.float32)(PROMPT).logits
    errors = [float((model(PROMPT).logits.float() - exact).square().mean()) for model in (native, shared)]
    assert errors[1] < 1.5 * errors[0]
    expected, given = (model.generate(PROMPT, **SETTINGS).cache for model in (native, shared))
    assert 2 * cache_bytes(given) == cache_bytes(expected)


class InHalves(QuantizedLayer):
    """A backend that rounds to float16, by groups; empty tensors it cannot take, as the real ones."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        scale = tensor.abs().amax()
        return (tensor / scale).half(), scale

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        return q_tensor[0].float() * q_tensor[1]


@pytest.mark.parametrize("backend", ["fp8", "groups"])
@torch.no_grad()
def test_quantised_caches(converted_folder: Callable[..., Path], backend: str) -> None:
    stored = []
    for model in pair(converted_folder("tiny")):
        cache = QuantizedCache("fp8", model.config)
        if backend == "groups":
            cache.layers = [InHalves(residual_length=4) for _ in cache.layers]
        logits = torch.cat([model(part, cache=cache).logits for part in PROMPT.split(3, dim=1)], 1)
        whole = model(PROMPT, use_cache=False).logits
        assert float((logits - whole).square().mean()) < 0.02 * float(whole.square().mean())
        parts = [part for layer in cache.layers for part in (layer._quantized_keys, layer._quantized_values)]
        stored.append(sum(part[0].nbytes if isinstance(part, tuple) else part.nbytes for part in parts))
    assert 2 * stored[1] == stored[0]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft's own name for it
def test_a_cache_with_values_is_refused(converted_folder: Callable[..., Path]) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    native, shared = pair(converted_folder("tiny"))
    with pytest.raises(ValueError, match="prefix tuning"):
        get_peft_model(shared, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))(PROMPT)
    filled = native(PROMPT, use_cache=True).cache
    with pytest.raises(ValueError, match="the native class has filled"):
        shared(PROMPT[:, :1], cache=filled)


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
        "factor": 32.0,
    },
}
CROSSING = ("dynamic", "longrope")  # their frequencies change where a sequence grows beyond a length


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_ropes(tmp_path: Path, rope: str) -> None:
    fields = {"num_hidden_layers": 1 if rope in CROSSING else 2, "max_position_embeddings": 16 if rope == "dynamic" else 512}
    fields |= {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = random_model(
        tmp_path / "source", "llama", rope_parameters={"rope_theta": 1e4, "rope_type": "default", **ROPES[rope]}, **fields
    )
    kvshare.convert(source, tmp_path / "out", init="mean", heal=False, eval_mode="off")
    native, shared = pair(tmp_path / "out")
    ids = torch.arange(100, 124)[None]
    whole = native(ids, use_cache=False).logits
    torch.testing.assert_close(shared(ids).logits, whole, atol=1e-4, rtol=0)

    def by_steps(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        return torch.cat([model(part, cache=cache).logits for part in ids.split([9, 1, 14], 1)], 1)

    # shared, cached keys are rotated as the forward without a cache does it; natively, they keep the frequencies they came in with.
    # (What deeper layers cached of earlier tokens was computed with the old frequencies in both forms: hence one layer.)
    torch.testing.assert_close(by_steps(shared)[:, -14:], whole[:, -14:], atol=1e-4, rtol=0)
    off = float((by_steps(native)[:, -14:] - whole[:, -14:]).abs().max())
    assert (off > 1e-2) if rope in CROSSING else (off < 1e-4)
