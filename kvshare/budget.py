"""The arithmetic of a cache budget: what each layer may become, what that costs, and the choice of least damage.

In: head counts, a budget, the damage of every option. Out: the option of each layer. Never: measures damage, reads a model.

Costs are counted in heads: one unit is one head of K or of V, cached for one token in one layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvshare.errors import UsageError

UNTOUCHED = "untouched"  # what a layer without shared heads is called
LayerHeads = tuple[int | None, ...]
"""Per layer: how many heads its shared projection has, or None where K and V stay as they are."""


def divisors(heads: int) -> tuple[int, ...]:
    """The head counts that a layer of `heads` KV heads may share, the largest first."""
    return tuple(count for count in range(heads, 0, -1) if heads % count == 0)


def head_units(chosen: LayerHeads, source_heads: int) -> int:
    """What a choice caches per token, in heads of K or V."""
    return sum(2 * source_heads if heads is None else heads for heads in chosen)


def stored_heads(chosen: LayerHeads, source_heads: int) -> int:
    """The KV heads of the native form: of one model all layers have equally many, so those with fewer repeat them."""
    return math.lcm(*(heads or source_heads for heads in chosen))


def budget_units(budget: float, layers: int, source_heads: int) -> int:
    """What a cache budget, a fraction of the source's, lets the layers cache per token together, in heads of K or V.

    Raises:
        UsageError: less than one head per layer.
    """
    whole = 2 * source_heads * layers
    units = math.floor(budget * whole + 1e-6)
    if units < layers:
        raise UsageError(
            f"a cache budget of {budget:g} cannot be met",
            f"one shared head in each of {layers} layers is {layers / whole:.4%} of the source's {whole} heads of K and V",
            f"give at least {math.ceil(layers / whole * 1e4) / 1e4:g}",
        )
    return units


def choose_budget(costs: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], budget: int) -> tuple[int, ...]:
    """The option of each layer whose damages add up to the least, of those whose costs do not exceed the budget together.

    Exact, by dynamic programming over what the layers so far cost; of equal damages the cheaper one is taken.

    Args:
        costs: of every option, per layer, in whole units.
        damages: of every option, per layer; no NaN.
        budget: what all layers may cost together.

    Returns:
        the index of the chosen option per layer.

    Raises:
        ValueError: even the cheapest options cost more than the budget.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by what is spent: damage so far, options taken
    for layer_costs, layer_damages in zip(costs, damages, strict=True):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (damage, taken) in best.items():
            for option, (cost, more) in enumerate(zip(layer_costs, layer_damages, strict=True)):
                total = spent + cost
                if total <= budget and (total not in reached or damage + more < reached[total][0]):
                    reached[total] = (damage + more, (*taken, option))
        best = reached
    if not best:
        raise ValueError(f"no choice of options costs {budget} or less")
    return min((damage, spent, taken) for spent, (damage, taken) in best.items())[2]
