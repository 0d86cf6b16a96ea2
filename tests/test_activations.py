"""How a layer attends, as the moments see it, is how the layer's own module attends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SOURCES

from kvshare.activations import attending, enters, first_inputs, rotary_dim
from kvshare.families import family_of
from kvshare.layerwise import read_weights
from kvshare.loading import load_native
from kvshare.passes import attention_of


@pytest.mark.parametrize("key", SOURCES)
def test_attention_written_out_is_the_attention_of_the_module(key: str, source_folder: Callable[[str], Path]) -> None:
    model = load_native(source_folder(key), dtype=torch.float32)
    family = family_of(model.config.model_type)
    rows = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    layers = getattr(model.get_decoder(), family.stack)
    hidden, calls = first_inputs(model, layers, rows, torch.device("cpu"))
    attention = attention_of(layers[0], family)
    turned = rotary_dim(attention, family, calls[0])
    how = attending(attention, calls[0], turned)
    w = read_weights(attention, family, 8, turned)
    inputs = enters(layers[0], attention, hidden, calls[0])
    given: list[torch.Tensor] = []
    output = getattr(attention, family.o)
    output.register_forward_pre_hook(lambda _module, positional: given.append(positional[0]))
    with torch.no_grad():
        layers[0](hidden, **calls[0].arguments)

    def heads(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        states = torch.nn.functional.linear(inputs, weight, bias)
        return states.view(2, 24, -1, w.head_dim).transpose(1, 2)

    q, k, v = heads(w.q, w.q_bias), heads(w.k, w.k_bias), heads(w.v, w.v_bias)
    if w.query_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)  # type: ignore[operator]
    at = torch.arange(24)
    turned, keys = how.rotate(q, at), how.rotate(k, at)
    torch.testing.assert_close(how.unrotate(turned, at), q)
    served = w.query_heads // w.kv_heads
    keys, values = keys.repeat_interleave(served, 1), v.repeat_interleave(served, 1)
    scores = (turned @ keys.transpose(-1, -2) * how.scaling).masked_fill(~how.visible, -torch.inf)
    written = (scores.softmax(-1) @ values).transpose(1, 2).reshape(2, 24, -1)
    torch.testing.assert_close(written, given[0], atol=1e-5, rtol=1e-4)
    assert int(how.visible.sum(-1).max()) == (12 if key == "mistral-window" else 24)
