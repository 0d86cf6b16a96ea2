"""How much memory a conversion takes, whether it needs the source as a whole, and what healing keeps on the disk.

In: a recipe, the headers of a source. Out: bytes. Never: reads weights, measures anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvshare.headers import ITEM_BYTES, TensorSpec
from kvshare.mixture import uses_self
from kvshare.recipe import Recipe, calibrates, data_used
from kvshare.sections import Heal

LIBRARIES = 1_200_000_000  # torch and transformers, tokens, the parts of attention that moments are taken of
LOGITS = 1 << 30  # of one forward, see `rows_per_forward`
IN_MEMORY = 1 << 30  # bytes of hidden states beyond which they lie in a file
BATCH_TOKENS = 2_048  # tokens that pass through a layer at a time
BATCH_STATES = 16  # numbers of the layer's widest tensor that one of these tokens takes, there and where it is measured


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
    batch = 4 * BATCH_STATES * BATCH_TOKENS * max((max(tensor.shape, default=0) for tensor in own), default=0)
    measured = 2 * 4 * hidden * recipe.evaluation.tokens if recipe.evaluation.mode == "layers" else 0
    return 3 * layer + int(2 * largest * width) + streams + measured + batch + LIBRARIES


def kept_bytes(heal: Heal, config: Mapping[str, Any]) -> int:
    """What `heal.teacher_top_k` keeps of the teacher's probabilities on the disk: per token so many token ids and log
    probabilities, of 4 bytes each, and one log probability for all other tokens. `config` is the source's.
    """
    if heal.teacher_top_k is None:
        return 0
    rows, vocabulary = max(1, heal.tokens // heal.sequence_length), config.get("vocab_size")
    kept = min(heal.teacher_top_k, vocabulary) if isinstance(vocabulary, int) else heal.teacher_top_k
    return rows * heal.sequence_length * 4 * (2 * kept + 1)


def healing_memory(weights: int, trained: int) -> int:
    """An estimate of the peak memory of a process that heals, in bytes: source and student in float32, of what is trained value,
    gradient and the optimizer's two means, and the logits of a forward.

    Args:
        weights: numbers that one of the models has.
        trained: of these and its adapters, how many are trained.
    """
    return 4 * (2 * weights + 4 * trained) + LOGITS + LIBRARIES
