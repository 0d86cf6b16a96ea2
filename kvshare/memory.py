"""How much memory a conversion takes, and whether it needs the source as a whole.

In: a recipe, the headers of a source. Out: bytes. Never: reads weights, measures anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvshare.mixture import uses_self
from kvshare.recipe import Recipe, calibrates, data_used
from kvshare.source import ITEM_BYTES, TensorSpec

LIBRARIES = 1_200_000_000  # torch and transformers, tokens, the parts of attention that moments are taken of
IN_MEMORY = 1 << 30  # bytes of hidden states beyond which they lie in a file
BATCH_TOKENS = 8_192  # tokens that pass through a layer at a time


def needs_whole(recipe: Recipe, writes: bool | None = None) -> bool:
    """Whether the source is held in memory as a whole at some time, and not layer by layer alone.

    Args:
        recipe: the settings.
        writes: whether it is to write text; None as the recipe says.
    """
    if writes is None:
        writes = any(uses_self(data) for data in data_used(recipe))
    return writes or recipe.heal.enabled or recipe.cache_budget is not None or recipe.evaluation.mode == "whole"


def peak_memory(recipe: Recipe, tensors: Sequence[TensorSpec], first_layer: str, layers: int, hidden: int) -> int:
    """An estimate of peak memory in bytes.

    As a whole, models count in float32: the source, and when healing the student. Otherwise one layer counts, as it was, as it
    becomes and while it is read, and the output embedding where logits are taken. Activations are hidden states of all
    calibration tokens: two streams and what they should give, each in a file where it is large; the inputs of one attention layer
    for `learned`; and what one batch needs within a layer. An exact conversion has none; it holds source, result and the maps of
    its layers, in float32 and float64, to measure one against the other, and the logits once more than others do.

    Args:
        recipe: the settings.
        tensors: of the source.
        first_layer: what the names of the first decoder layer's tensors begin with.
        layers: how many there are.
        hidden: hidden_size.
    """
    width = max((4 / ITEM_BYTES[tensor.dtype] for tensor in tensors), default=1.0)
    weights = int(sum(tensor.bytes for tensor in tensors) * width)
    if recipe.init == "exact" and recipe.evaluation.mode == "whole":
        return 2 * weights + layers * hidden**2 * 8 * 4 // 3 + 1_800_000_000
    states = 4 * hidden * (recipe.calibration.tokens if calibrates(recipe) else 0)
    streams = 3 * min(states, IN_MEMORY) + (states if recipe.init == "learned" else 0)
    if needs_whole(recipe):
        return weights * (2 if recipe.heal.enabled else 1) + streams + 1_500_000_000
    largest = max((tensor.bytes for tensor in tensors), default=0)
    if not calibrates(recipe) and recipe.evaluation.mode == "off":
        return largest * 10 + 500_000_000
    own = [tensor for tensor in tensors if tensor.name.startswith(first_layer)]
    layer = int(sum(tensor.bytes for tensor in own) * width)
    batch = 4 * 4 * BATCH_TOKENS * max((max(tensor.shape, default=0) for tensor in own), default=0)
    measured = 2 * 4 * hidden * recipe.evaluation.tokens if recipe.evaluation.mode == "layers" else 0
    return 3 * layer + int(2 * largest * width) + streams + measured + batch + LIBRARIES
