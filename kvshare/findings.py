"""What an inspection found: the figures of every layer and head, and what they say of the model.

In: figures of heads, the predicted damage of each layer's options, the shape of the cache. Out: an `Inspection`, as data.
Never: computes a figure of a head, draws, does IO.

A unit of cache is one head of K or of V, cached for one token in one layer, as in `kvshare.budget`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvshare.budget import UNTOUCHED, LayerHeads, divisors, frontier, head_units
from kvshare.spectra import HeadFigures

SCALE_BITS = 16  # of the scale that a quantised cache holds for the head_dim numbers of one token and head
QUANTISED_BITS = (8, 4)
BUDGETS = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)  # parts of the cache for which the choice of each layer is listed


@dataclass(frozen=True)
class LayerOption:
    """K and V of a layer sharing `heads` heads: `units` of cache, and the damage that the closed form predicts of it alone, the
    squared error of the attention output relative to the hidden state that it is added to.
    """

    heads: int
    units: int
    predicted: float


@dataclass(frozen=True)
class LayerFigures:
    """One layer: `rotary_dim` numbers of each head are turned by rope; `spectrum` are the shares of the directions of [K;V]
    in its energy, the largest first, averaged over heads (2 head_dim). A layer that cannot be converted says why in
    `refused`; it has no other figures.
    """

    layer: int
    rotary_dim: int
    heads: tuple[HeadFigures, ...]
    spectrum: tuple[float, ...]
    options: tuple[LayerOption, ...]
    refused: str | None = None

    def mean(self, name: str) -> float:
        """A figure averaged over heads."""
        return statistics.fmean(getattr(head, name) for head in self.heads)

    @property
    def dropped(self) -> float:
        """The largest part of its energy that a head loses."""
        return max(head.dropped for head in self.heads)


@dataclass(frozen=True)
class CacheForm:
    """One way to hold the cache: K and V `shared` or apart, `heads` KV heads per layer (fewer than the source's is GQA, one MQA),
    numbers of `bits`, below the stored ones with a 16-bit scale for each token and head. `saved` is a fraction of the source's.
    """

    shared: bool
    heads: int
    bits: int
    bytes_per_token: float
    saved: float


@dataclass(frozen=True)
class BudgetPoint:
    """The least predicted damage that `units` of cache allow, which are the part `kept` of the source's; `heads` says how: per
    layer the shared heads, None for an untouched layer. `predicted` is the sum of the layers' damages alone.
    """

    units: int
    kept: float
    predicted: float
    heads: LayerHeads


@dataclass(frozen=True)
class Inspection:
    """The low-rank regime of a model, drawn before anything is converted. Figures were taken on `tokens` tokens of `data`."""

    output: Path
    model: str
    commit: str | None
    model_type: str
    kv_heads: int
    query_heads: int
    head_dim: int
    hidden_size: int
    stored_bits: int
    merges_heads: bool
    data: str
    tokens: int
    seed: int
    layers: tuple[LayerFigures, ...]

    @property
    def text(self) -> str:
        """What to call the text."""
        return "text that it wrote itself" if self.data == "self" else self.data

    @property
    def convertible(self) -> tuple[LayerFigures, ...]:
        """The layers that have figures."""
        return tuple(layer for layer in self.layers if layer.refused is None)

    @property
    def source_units(self) -> int:
        """What the source caches per token, in heads of K or V."""
        return head_units((None,) * len(self.layers), self.kv_heads)

    @property
    def bytes_per_token(self) -> float:
        """What the source caches per token, in the dtype that it is stored in."""
        return self.source_units * self.head_dim * self.stored_bits / 8

    def uniform(self, heads: int) -> LayerHeads:
        """Every layer that can be converted sharing as many heads."""
        return tuple(None if layer.refused else heads for layer in self.layers)

    @property
    def cache(self) -> tuple[CacheForm, ...]:
        """What the cache takes in every form: K and V apart and shared, all numbers of heads, all widths, and their products."""
        narrow = tuple(bits for bits in QUANTISED_BITS if bits < self.stored_bits)
        forms = []
        for shared in (False, True):
            for heads in divisors(self.kv_heads) if self.merges_heads else (self.kv_heads,):
                units = head_units(self.uniform(heads), self.kv_heads) if shared else 2 * heads * len(self.layers)
                for bits in (self.stored_bits, *narrow):
                    per_unit = (self.head_dim * bits + SCALE_BITS * (bits != self.stored_bits)) / 8
                    size = units * per_unit
                    forms.append(CacheForm(shared, heads, bits, size, 1 - size / self.bytes_per_token))
        return tuple(forms)

    @property
    def even(self) -> tuple[BudgetPoint, ...]:
        """The predicted damage with equally many shared heads in every layer, the most first."""
        counts = [option.heads for option in self.convertible[0].options] if self.convertible else []
        points = []
        for place, heads in enumerate(counts):
            damage = sum(layer.options[place].predicted for layer in self.convertible)
            points.append(self._point(self.uniform(heads), damage))
        return tuple(points)

    def frontier(self) -> tuple[BudgetPoint, ...]:
        """The least predicted damage for every budget, as `--cache-budget` chooses, the smallest budget first."""
        options = [(UNTOUCHED_OPTION, *layer.options) for layer in self.layers]
        costs = [[option.units or 2 * self.kv_heads for option in choices] for choices in options]
        damages = [[option.predicted for option in choices] for choices in options]
        return tuple(
            self._point(tuple(choices[place].heads or None for choices, place in zip(options, taken, strict=True)), damage)
            for _, damage, taken in frontier(costs, damages)
        )

    def _point(self, heads: LayerHeads, damage: float) -> BudgetPoint:
        units = head_units(heads, self.kv_heads)
        return BudgetPoint(units, units / self.source_units, damage, heads)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, without the output folder: inspection.json."""
        points = self.frontier()
        return {
            **{name: getattr(self, name) for name in NAMED},
            "layers": [asdict(layer) for layer in self.layers],
            "cache": [asdict(form) for form in self.cache],
            "budget": {
                "curve": [{"kept": point.kept, "predicted": point.predicted} for point in points],
                "equal_heads": [_figures(point) for point in self.even],
                "choices": [{"cache_budget": budget, **_figures(point)} for budget, point in listed(points)],
            },
        }


NAMED = (
    *("model", "commit", "model_type", "kv_heads", "query_heads", "head_dim", "hidden_size", "stored_bits", "merges_heads"),
    *("data", "tokens", "seed", "bytes_per_token"),
)
UNTOUCHED_OPTION = LayerOption(0, 0, 0.0)


def _figures(point: BudgetPoint) -> dict[str, Any]:
    return asdict(replace(point, heads=())) | {"heads": [heads or UNTOUCHED for heads in point.heads]}


def listed(points: Sequence[BudgetPoint]) -> list[tuple[float, BudgetPoint]]:
    """The best point of a frontier within each of `BUDGETS` that can be met."""
    found = []
    for budget in BUDGETS:
        within = [point for point in points if point.kept <= budget + 1e-9]
        if within:
            found.append((budget, within[-1]))
    return found


def notes(inspection: Inspection) -> list[str]:
    """What holds for some layers and not for others, in plain words, with the layers named."""
    words = []
    none = [layer.layer for layer in inspection.layers if not layer.rotary_dim]
    part = [layer.layer for layer in inspection.layers if 0 < layer.rotary_dim < inspection.head_dim]
    if none:
        words.append(
            f"rope turns no keys in {_layers(none, inspection)}: there are no rope pairs, and keys may be read in any basis"
        )
    if part:
        width = inspection.layers[part[0]].rotary_dim
        words.append(f"rope turns {width} of {inspection.head_dim} numbers of each key in {_layers(part, inspection)}")
    if not inspection.merges_heads:
        words.append("heads of this family cannot be merged: its config has no number of KV heads")
    words.extend(f"layer {layer.layer} cannot be converted: {layer.refused}" for layer in inspection.layers if layer.refused)
    return words


def _layers(indices: Sequence[int], inspection: Inspection) -> str:
    if len(indices) == len(inspection.layers):
        return "all layers"
    return f"layer{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
