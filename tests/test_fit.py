"""The fit of one layer: it ends no worse than it began, on rows that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvshare.activations import LayerCall
from kvshare.families import family_of
from kvshare.fit import FitReport, fit_layer
from kvshare.layerwise import read_weights
from kvshare.loading import load_native
from kvshare.merge import AttentionWeights
from kvshare.merge.mean import merge_mean
from kvshare.sections import Fit


@pytest.fixture
def fitted(source_folder: Callable[[str], Path]) -> Callable[..., tuple[AttentionWeights, AttentionWeights, FitReport]]:
    """The first attention layer of the bundled model, fitted from its mean: start, result, report."""
    model = load_native(source_folder("tiny"), dtype=torch.float32)
    layer = model.model.layers[0]
    attention = layer.self_attn
    tokens = torch.randint(4096, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inputs = layer.input_layernorm(model.model.embed_tokens(tokens))
    positions = model.model.rotary_emb(inputs, torch.arange(32)[None])
    call = LayerCall({"position_embeddings": positions, "attention_mask": None})
    with torch.no_grad():
        wanted: Tensor = attention(inputs, **call.arguments)[0]
    start = merge_mean(read_weights(attention, family_of("llama"), 16), 8)

    def fit(rows: int = 8, **settings: float) -> tuple[AttentionWeights, AttentionWeights, FitReport]:
        chosen = Fit.model_validate({"batch_tokens": 128, **settings})
        result, report = fit_layer(
            attention, family_of("llama"), start, inputs[:rows], wanted[:rows], call, chosen, 0, lambda done, total: None
        )
        return start, result, report

    return fit


def test_fitting_lowers_the_error_of_rows_it_has_not_seen(
    fitted: Callable[..., tuple[AttentionWeights, AttentionWeights, FitReport]],
) -> None:
    _, result, report = fitted(steps=60, learning_rate=5e-2)  # a mean is far away
    assert report.held_out_after < 0.2 * report.held_out_before
    assert 0 < report.kept_step <= report.steps <= 60
    assert torch.equal(result.k, result.v)


def test_a_fit_that_diverges_stops_early_and_keeps_the_start(
    fitted: Callable[..., tuple[AttentionWeights, AttentionWeights, FitReport]],
) -> None:
    start, result, report = fitted(steps=60, learning_rate=50.0)
    assert report.kept_step == 0
    assert report.steps < 60
    assert report.held_out_after == report.held_out_before
    for name, value in result.tensors.items():
        torch.testing.assert_close(value, start.tensors[name].double(), rtol=1e-6, atol=0)


def test_one_row_is_enough(fitted: Callable[..., tuple[AttentionWeights, AttentionWeights, FitReport]]) -> None:
    _, _, report = fitted(rows=1, steps=30)
    assert report.held_out_after < report.held_out_before
