"""How a layer attends, as the moments see it, is how the layer's own module attends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import FAMILY_SOURCES, SOURCES

from kvshare.activations import attending, enters, first_inputs, rotary_dim
from kvshare.families import family_of
from kvshare.layerwise import read_weights
from kvshare.layout import paired
from kvshare.loading import load_native
from kvshare.moments import MomentSums
from kvshare.passes import add_moments, attention_of, passed
from kvshare.runtime.modeling_kvshare import _normed

# ministral3 also scales queries by their position, which is not written out
KEYS = sorted({*SOURCES, *FAMILY_SOURCES} - {"ministral3"})


@pytest.mark.parametrize("key", KEYS)
def test_attention_written_out_is_the_attention_of_the_module(key: str, source_folder: Callable[[str], Path]) -> None:
    model = load_native(source_folder(key), dtype=torch.float32)
    family = family_of(model.config.model_type)
    rows = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    layers = getattr(model.get_decoder(), family.stack)
    hidden, calls = first_inputs(model, layers, rows, torch.device("cpu"))
    layer, call = layers[-1], calls[-1]  # of hybrid models, one that has attention
    attention = attention_of(layer, family)
    turned = rotary_dim(attention, family, call)
    w = read_weights(attention, family, 8, turned)
    inputs = enters(layer, attention, hidden, call)
    how = attending(attention, family, call, turned, inputs)
    given: list[torch.Tensor] = []
    output = getattr(attention, family.o)
    output.register_forward_pre_hook(lambda _module, positional: given.append(positional[0]))
    with torch.no_grad():
        layer(hidden, **call.of(2))

    def heads(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        states = torch.nn.functional.linear(inputs, weight, bias)
        if key == "olmo":
            states = states.clamp(-1.0, 1.0)
        return states.view(2, 24, -1, w.head_dim).transpose(1, 2)

    q, k, v = heads(w.q, w.q_bias), heads(w.k, w.k_bias), heads(w.v, w.v_bias)
    if family.query_norm is not None and family.key_norm is not None:
        q, k = (_normed(getattr(attention, name), states) for name, states in ((family.query_norm, q), (family.key_norm, k)))
    at = torch.arange(24)
    turned, keys = how.rotate(q, at), how.rotate(k, at)
    scale = model.get_decoder().rotary_emb.attention_scaling ** 2 if key == "gpt_oss" else 1.0  # of yarn's tables
    torch.testing.assert_close(how.unrotate(turned, at), q * scale)
    served = w.query_heads // w.kv_heads
    keys, values = keys.repeat_interleave(served, 1), v.repeat_interleave(served, 1)
    weights, _ = how.weights(turned @ keys.transpose(-1, -2) * how.scaling, slice(w.query_heads))
    written = (weights @ values).transpose(1, 2).reshape(2, 24, -1)
    torch.testing.assert_close(written, paired(given[0], family, w), atol=1e-5, rtol=1e-4)
    if key in ("mistral-window", "starcoder2", "llama-mha"):
        assert int(how.visible.sum(-1).max()) == (24 if key == "llama-mha" else 12)


@pytest.mark.parametrize("key", KEYS)
def test_moments_are_the_same_in_blocks_and_beside_the_layer_itself(
    key: str, source_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_native(source_folder(key), dtype=torch.float32)
    family = family_of(model.config.model_type)
    rows = torch.randint(1, 4096, (2, 70), generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    layers = getattr(model.get_decoder(), family.stack)
    hidden, calls = first_inputs(model, layers, rows, device)
    layer, call = layers[-1], calls[-1]
    attention = attention_of(layer, family)
    w = read_weights(attention, family, 8, rotary_dim(attention, family, call))
    heads = tuple(range(w.kv_heads))
    grouping = (heads[:2], heads[2:]) if len(heads) > 2 else (heads,)
    whole, parts = MomentSums(w, grouping), MomentSums(w, grouping)
    monkeypatch.setattr("kvshare.moments.BLOCK_TOKENS", 70)
    add_moments(whole, layer, family, hidden, call, device)
    behind = passed(layer, hidden, call, device)
    monkeypatch.setattr("kvshare.moments.BLOCK_TOKENS", 9)
    add_moments(parts, layer, family, hidden, call, device, advances=True)
    torch.testing.assert_close(hidden, behind)
    assert not attention._forward_pre_hooks
    wanted, found = whole.moments(), parts.moments()
    for field in ("keys", "values", "key_metric", "value_metric"):
        for one, other in zip(getattr(found, field), getattr(wanted, field), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=field)


@pytest.mark.parametrize(("key", "reused"), [("tiny", "qkv"), ("qwen3", "qkv"), ("qwen2", "q"), ("gpt2", ""), ("phi3", "")])
def test_what_a_layer_projects_is_used_where_it_is_what_moments_are_taken_of(
    key: str, reused: str, source_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_native(source_folder(key), dtype=torch.float32)
    family = family_of(model.config.model_type)
    layers = getattr(model.get_decoder(), family.stack)
    rows = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden, calls = first_inputs(model, layers, rows, torch.device("cpu"))
    attention = attention_of(layers[0], family)
    head_dim = 16 if key == "tiny" else 8
    w = read_weights(attention, family, head_dim, rotary_dim(attention, family, calls[0]))
    given: list[str] = []
    add = MomentSums.add

    def watched(self: MomentSums, inputs: torch.Tensor, how: Any, projected: Any = None) -> None:
        given.extend(projected)
        add(self, inputs, how, projected)

    monkeypatch.setattr(MomentSums, "add", watched)
    sums = MomentSums(w, (tuple(range(w.kv_heads)),))
    add_moments(sums, layers[0], family, hidden, calls[0], torch.device("cpu"), advances=True)
    assert "".join(sorted(given, key="qkv".index)) == reused
