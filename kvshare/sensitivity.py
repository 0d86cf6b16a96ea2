"""The damage of converting each layer alone, measured and predicted, and the choice that a cache budget makes by it.

In: a loaded source model, calibration rows, a plan whose choice is open. Out: a `Sensitivity` with the chosen heads per layer.
Never: changes the model, writes files, keeps more than one layer's activations beside the hidden states.

Every layer is merged alone, on the source's own hidden states, once for each number of heads. Measured: KL(source || source
with that layer merged) on rows that the merge has not seen; only the layers behind it run again. Predicted: the squared error
of the layer's attention output that the closed form expects (method.md, section 2), relative to the hidden state it is added
to, because the norms that follow divide by that; nothing runs behind the layer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.activations import bypassed, first_inputs
from kvshare.budget import UNTOUCHED, LayerHeads, budget_units, choose_budget, divisors, head_units
from kvshare.data import rows_per_forward
from kvshare.errors import UsageError
from kvshare.layerwise import merge_alone
from kvshare.passes import passed, source_pass
from kvshare.planning import Plan
from kvshare.progress import Progress

STATISTICS = 0.25  # part of the calibration rows that a layer is merged on: enough to tell layers apart
HELD_OUT = 0.125  # part of them that damage is measured on
HELD_OUT_TOKENS = 8_192  # and the most of it


@dataclass(frozen=True)
class Damage:
    """What one option does to one layer: K and V share `heads` heads, or stay untouched where that is None.

    `units` is what the layer then caches per token, in heads of K or V; `predicted` a relative squared error; `measured` a KL
    in nats per token. Where nothing is touched there is no damage.
    """

    heads: int | None
    units: int
    predicted: float
    measured: float

    @property
    def name(self) -> str:
        """What the option is called: its number of heads, or untouched."""
        return UNTOUCHED if self.heads is None else str(self.heads)


@dataclass(frozen=True)
class Agreement:
    """How well the predicted damage agrees with the measured one, over all layers and numbers of heads.

    `spearman` is the rank correlation, `log_pearson` the correlation of the logarithms; `spearman_of_layers` the rank
    correlation among layers of equally many heads, averaged over the numbers of heads. NaN where there is nothing to correlate.
    """

    spearman: float
    log_pearson: float
    spearman_of_layers: float


@dataclass(frozen=True)
class Sensitivity:
    """The damage of every option of every layer, and what the budget chose among them.

    `layers` holds the options per layer, `chosen` the heads per layer; `units` is what they cache per token together, of
    the `budget_units` allowed; `tokens` how many the damage was measured on.
    """

    layers: tuple[tuple[Damage, ...], ...]
    chosen: LayerHeads
    units: int
    budget_units: int
    agreement: Agreement
    tokens: int

    @property
    def choice(self) -> tuple[Damage, ...]:
        """The chosen option of each layer."""
        return tuple(
            next(option for option in options if option.heads == heads)
            for options, heads in zip(self.layers, self.chosen, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for report.json; NaN becomes null."""
        return {
            "layers": [
                {"layer": index, "chosen": choice.name, "options": {option.name: _figures(option) for option in options}}
                for index, (options, choice) in enumerate(zip(self.layers, self.choice, strict=True))
            ],
            "units": self.units,
            "budget_units": self.budget_units,
            "agreement": {name: None if math.isnan(value) else value for name, value in asdict(self.agreement).items()},
            "tokens": self.tokens,
        }


def _figures(option: Damage) -> dict[str, float]:
    return {"units": option.units, "predicted": option.predicted, "measured": option.measured}


@torch.no_grad()
def measure_sensitivity(model: Any, plan: Plan, rows: Tensor, device: torch.device, progress: Progress) -> Sensitivity:
    """Merge every layer alone in every way, measure what that does, and choose within the plan's cache budget.

    Args:
        model: the source model, native, in float32, on `device`.
        plan: its recipe has a `cache_budget`.
        rows: calibration tokens (rows, length); one part is merged on, another measured on.
        device: where to compute.
        progress: called on the way.

    Raises:
        UsageError: a single row, which cannot be divided.
    """
    budget = plan.recipe.cache_budget
    assert budget is not None
    if len(rows) < 2:
        raise UsageError(
            "there is too little calibration text for a cache budget",
            "what a layer bears is measured on rows that it was not merged on, and there is one row",
            "raise calibration.tokens, or lower calibration.sequence_length",
        )
    layers = getattr(model.get_decoder(), plan.family.stack)
    held = max(1, min(int(HELD_OUT * len(rows)), HELD_OUT_TOKENS // rows.shape[1]))
    seen = max(1, min(int(STATISTICS * len(rows)), len(rows) - held))
    states, calls = first_inputs(model, layers, rows[: held + seen], device)
    entering, hidden = states[:held], states[held:]
    behind = list(zip(layers, calls, strict=True))
    final = _through(behind, entering, device)
    heads = plan.source_kv_heads
    shared = divisors(heads)
    found = []
    progress("measuring sensitivity", 0, len(layers) * len(shared))
    for index, (layer, call) in enumerate(behind):
        wanted, leaving = source_pass(layer, plan.family, hidden, call, device)
        relative = per_energy(hidden + wanted)
        options = [Damage(None, head_units((None,), heads), 0.0, 0.0)]
        for count, (merged, error) in zip(shared, merge_alone(layer, plan, call, hidden, wanted, shared, device), strict=True):
            given = _through(behind[index + 1 :], passed(merged, entering, call, device), device)
            measured = _divergence(model, layers, given, final, device)
            options.append(Damage(count, head_units((count,), heads), error * relative, measured))
            progress("measuring sensitivity", index * len(shared) + len(options) - 1, len(layers) * len(shared))
        found.append(tuple(options))
        entering, hidden = passed(layer, entering, call, device), leaving
    limit = budget_units(budget, len(layers), heads)
    costs, damages = ([[getattr(option, name) for option in options] for options in found] for name in ("units", "measured"))
    taken = choose_budget(costs, damages, limit)
    chosen = tuple(options[option].heads for options, option in zip(found, taken, strict=True))
    return Sensitivity(tuple(found), chosen, head_units(chosen, heads), limit, agreement(found), held * rows.shape[1])


def _through(layers: Sequence[tuple[Any, Any]], hidden: Tensor, device: torch.device) -> Tensor:
    """The hidden states behind some layers, each with its call; (rows, length, hidden) in and out, on the CPU."""
    for layer, call in layers:
        hidden = passed(layer, hidden, call, device)
    return hidden


def per_energy(hidden: Tensor) -> float:
    """E[1 / |x|^2] over tokens: what norms make of squared errors. A token of huge energy, as some models have, counts little."""
    return float(torch.linalg.vector_norm(hidden, dim=-1).double().clamp_min(1e-15).pow(-2).mean())


def _divergence(model: Any, layers: nn.ModuleList, given: Tensor, wanted: Tensor, device: torch.device) -> float:
    """Mean KL in nats per token between the predictions from two last hidden states (rows, length, hidden)."""
    per_batch = rows_per_forward(given.shape[1], int(model.config.vocab_size))
    total = 0.0
    for pair in zip(given.split(per_batch), wanted.split(per_batch), strict=True):
        other, own = (torch.log_softmax(_logits(model, layers, hidden.to(device)).float(), dim=-1) for hidden in pair)
        total += float((own.exp() * (own - other)).sum())
    return max(0.0, total / given[..., 0].numel())


def _logits(model: Any, layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    """What a model predicts from last hidden states (rows, length, hidden), with all that the family does behind its layers."""
    with bypassed(model, layers, lambda _: hidden):
        return model(inputs_embeds=torch.zeros_like(hidden), use_cache=False).logits


def agreement(layers: Sequence[Sequence[Damage]]) -> Agreement:
    """Correlations of the predicted with the measured damage of all options that touch a layer."""
    points = [option for options in layers for option in options if option.heads is not None]
    positive = [point for point in points if point.predicted > 0 and point.measured > 0]
    logs = [[math.log(point.predicted) for point in positive], [math.log(point.measured) for point in positive]]
    of_layers = []
    for heads in {point.heads for point in points}:
        alike = [point for point in points if point.heads == heads]
        of_layers.append(_spearman([point.predicted for point in alike], [point.measured for point in alike]))
    known = [value for value in of_layers if not math.isnan(value)]
    return Agreement(
        _spearman([point.predicted for point in points], [point.measured for point in points]),
        _pearson(*logs),
        statistics.mean(known) if known else math.nan,
    )


def _pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of two lists; NaN where one of them is constant or has fewer than two entries."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return statistics.correlation(first, second)


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of the ranks of two lists."""
    return _pearson(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of every value; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
