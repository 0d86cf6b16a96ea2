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
"""Per layer: how many heads its shared projection has, None where K and V stay as they are, 0 where there are none."""


def divisors(heads: int) -> tuple[int, ...]:
    """The head counts that a layer of `heads` KV heads may share, the largest first."""
    return tuple(count for count in range(heads, 0, -1) if heads % count == 0)


def head_units(chosen: LayerHeads, source_heads: int) -> int:
    """What a choice caches per token, in heads of K or V."""
    return sum(2 * source_heads if heads is None else heads for heads in chosen)


def stored_heads(chosen: LayerHeads, source_heads: int) -> int:
    """The KV heads of the native form: of one model all layers have equally many, so those with fewer repeat them."""
    return math.lcm(*(source_heads if heads is None else heads for heads in chosen if heads != 0))


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
    best = _least_by_cost(costs, damages, budget)
    if not best:
        raise ValueError(f"no choice of options costs {budget} or less")
    return min((damage, spent, taken) for spent, (damage, taken) in best.items())[2]


def frontier(costs: Sequence[Sequence[int]], damages: Sequence[Sequence[float]]) -> list[tuple[int, float, tuple[int, ...]]]:
    """What `choose_budget` gives for all budgets: what is spent, the damage and the options, wherever the damage falls.

    Args:
        costs, damages: as for `choose_budget`.
    """
    best = _least_by_cost(costs, damages, sum(max(layer) for layer in costs))
    points: list[tuple[int, float, tuple[int, ...]]] = []
    for spent, (damage, taken) in sorted(best.items()):
        if not points or damage < points[-1][1]:
            points.append((spent, damage, taken))
    return points


def _least_by_cost(
    costs: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], budget: int
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """By what all layers spend together, within the budget: the least damage, and the option of each layer."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer_costs, layer_damages in zip(costs, damages, strict=True):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (damage, taken) in best.items():
            for option, (cost, more) in enumerate(zip(layer_costs, layer_damages, strict=True)):
                total = spent + cost
                if total <= budget and (total not in reached or damage + more < reached[total][0]):
                    reached[total] = (damage + more, (*taken, option))
        best = reached
    return best


def resolve_heads(wanted: int | str, source_heads: int, reasons: list[str]) -> int:
    """The number of KV heads that a recipe's `kv_heads` asks for; what was made of a fraction is added to `reasons`.

    Raises:
        UsageError: it does not divide the source's.
    """
    if wanted == "all":
        return source_heads
    if isinstance(wanted, str):
        divisor = int(wanted.partition("/")[2])
        if divisor > source_heads:
            reasons.append(f"kv_heads {wanted} of {source_heads} heads is less than one head: 1 is taken")
            return 1
        heads, rest = divmod(source_heads, divisor)
        reasons.append(f"kv_heads {wanted} of {source_heads} heads is {heads}")
        if not rest:
            return heads
    elif source_heads % wanted == 0:
        return wanted
    fitting = [str(count) for count in reversed(divisors(source_heads))]
    raise UsageError(
        f"{wanted} KV heads cannot be made of {source_heads}",
        "every output head takes in the same number of source heads",
        f"choose one of: {', '.join(fitting)}",
    )


def form_reasons(budget: float | None, chosen: LayerHeads | None, layers: int, source_heads: int, heads: int) -> list[str]:
    """What becomes of the layers, and why."""
    if chosen is None:
        options = " or ".join(str(count) for count in divisors(source_heads))
        return [
            f"cache budget {budget:g}: what each layer bears is measured on calibration text, then each is left "
            f"untouched or shares {options} heads, so that the least is lost within the budget; until then sizes are upper bounds",
            f"per-layer head counts are not native to this architecture: a layer of fewer heads is stored with its heads repeated, "
            f"stock transformers caches up to {source_heads} heads there and K and V apart, kvshare's runtime only what is chosen",
        ]
    without = [str(layer) for layer, count in enumerate(chosen) if count == 0]
    shared, layers = [count for count in chosen if count], layers - len(without)
    if without:
        return [
            f"layers {', '.join(without)} have no K and V and stay untouched; in the other {layers} these become one projection: "
            f"the cache keeps one tensor of {heads} heads instead of two of {source_heads}"
        ]
    if len(shared) == layers and len(set(shared)) == 1:
        return [
            f"K and V become one projection in all {layers} layers: the cache keeps one tensor of {heads} heads "
            f"instead of two of {source_heads}"
        ]
    reasons = [f"{layers - len(shared)} of {layers} layers stay untouched" + (", the others share K and V" if shared else "")]
    if set(shared) - {heads}:
        reasons.append(
            f"per-layer head counts are not native to this architecture: layers of fewer than {heads} heads are stored with "
            f"their heads repeated; stock transformers caches {heads} heads there, kvshare's runtime one of each"
        )
    return reasons
