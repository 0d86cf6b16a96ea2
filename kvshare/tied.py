"""Models that make K and V by one projection natively: no weight changes, and the shared form caches that projection's output.

In: a recipe, a `Geometry`. Out: what of the recipe is left to do, and why. Never: reads weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvshare.errors import UnsupportedModelError, UsageError
from kvshare.families import Family
from kvshare.geometry import Geometry
from kvshare.recipe import Recipe


def tied_recipe(recipe: Recipe, model: str) -> Recipe:
    """What a recipe comes to where K and V are equal already: their mean is what they are, no text is taken, nothing is healed.

    Args:
        recipe: the settings.
        model: what to call it.

    Raises:
        UsageError: it asks for `exact`, a cache budget, other KV heads or an evaluation layer by layer.
    """
    asked = None
    if recipe.init == "exact":
        asked = ("init exact", "it makes values of keys by an inverse, and here they are made alike", "leave init out")
    elif recipe.cache_budget is not None:
        asked = ("a cache budget", "there is one form for its layers, and nothing to choose", "leave the budget out")
    elif recipe.kv_heads != "all":
        asked = ("fewer KV heads", "none of its weights changes", "take kv_heads all")
    elif recipe.evaluation.mode == "layers":
        asked = ("an evaluation layer by layer", "that goes along with a merge, and nothing is merged", "take mode whole or off")
    if asked is not None:
        raise UsageError(f"{model} makes K and V by one projection already, and cannot have {asked[0]}", asked[1], asked[2])
    return recipe.model_copy(update={"init": "mean", "heal": recipe.heal.model_copy(update={"enabled": False})})


def tied_reasons(geometry: Geometry) -> list[str]:
    """What becomes of the layers, and why."""
    reasons = [
        f"layers {_listed(geometry.attention)} make K and V by one projection already: the cache keeps one tensor of "
        f"{geometry.kv_heads} heads instead of two, no weight changes, no text is taken for it and nothing is healed"
    ]
    if geometry.apart:
        reasons.append(
            f"layers {_listed(geometry.apart)} stay untouched: their K and V are apart, and values have a norm of their own, "
            "which no closed form knows"
        )
    rest = sorted({*range(geometry.layers)} - {*geometry.attention, *geometry.apart})
    if rest:
        reasons.append(f"layers {_listed(rest)} read the keys and values of an earlier layer: they cache none, and stay untouched")
    return reasons


def require_apart(family: Family, model: str) -> None:
    """Refuse to look for what a merge would lose where there is none.

    Raises:
        UnsupportedModelError: the family makes K and V by one projection.
    """
    if family.tied:
        raise UnsupportedModelError(
            f"{model} has nothing to merge",
            "K and V of its layers are made by one projection already, or stay untouched",
            "convert it at once: that takes no text",
        )


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
