"""Models that are refused from their config and headers alone, and conversions that one process does by itself.

In: a `Source`; a recipe. Out: its family, or the error that says why it cannot be converted. Never: reads weights.
"""

from __future__ import annotations

from kvshare.errors import UnsupportedModelError, UsageError
from kvshare.families import Family, family_of
from kvshare.geometry import Geometry
from kvshare.mixture import uses_self
from kvshare.parsing import shown
from kvshare.recipe import Recipe, calibrates
from kvshare.source import Source


def convertible_family(source: Source) -> Family:
    """The family of a model that can be converted.

    Raises:
        UnsupportedModelError: an unknown `model_type`, quantised weights, a checkpoint that is converted already, or no causal
            language model.
    """
    config = source.config
    if "kvshare" in config:
        raise UnsupportedModelError(
            f"{source.name} is a kvshare checkpoint already",
            "its cache is half as large already",
            "convert the model it came from, with the settings you want",
        )
    family = family_of(source.model_type).located(source.tensors)
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            f"{source.name} is quantised",
            "the merge needs the projections as floating-point numbers",
            "convert the unquantised model and quantise the result",
        )
    for name, value in family.only.items():
        if (config.get(name, value) or False) != value:  # null is false
            raise UnsupportedModelError(
                f"{source.name} has {name} = {shown(config[name])}",
                f"of {family.model_type}, kvshare knows the models with {value!r}",
                "choose another model",
            )
    architecture, stem = config.get("architectures"), family.model_type.removesuffix("_text").replace("_", "")
    fitting = [f"{stem}{ending}".lower() for ending in ("ForCausalLM", "LMHeadModel")]
    if not (isinstance(architecture, list) and len(architecture) == 1 and str(architecture[0]).lower().replace("_", "") in fitting):
        raise UnsupportedModelError(
            f"{source.name} is not a causal language model",
            f"config.json names the architectures {shown(architecture)}, which is none of {family.model_type} that predicts tokens",
            "give a model whose architecture ends in ForCausalLM or LMHeadModel",
        )
    return family


def require_exact(source: Source, family: Family, geometry: Geometry, heads: int) -> None:
    """Refuse what has no exact form.

    Raises:
        UnsupportedModelError: W_K is not square, or part of a fused tensor; or a layer has no K and V.
        UsageError: heads are to be merged.
    """
    source_heads, head_dim, hidden = geometry.kv_heads, geometry.head_dim, geometry.hidden
    if len(geometry.attention) < geometry.layers:
        raise UnsupportedModelError(
            f"{source.name} has no exact form",
            f"the exact form does not know the attention of {family.model_type} models",
            "use init svd, or learned",
        )
    if family.fused:
        raise UnsupportedModelError(
            f"{source.name} has no exact form",
            f"a {family.model_type} model keeps K and V in one tensor, which the exact form does not read apart",
            "use init svd, or learned",
        )
    if source_heads * head_dim != hidden:
        raise UnsupportedModelError(
            f"{source.name} has no exact form",
            f"its keys have {source_heads} x {head_dim} = {source_heads * head_dim} numbers per token and hidden states {hidden}: "
            "values are a function of keys where these are equal",
            "use init svd, or learned",
        )
    if source.config.get("clip_qkv") is not None:
        raise UnsupportedModelError(
            f"{source.name} has no exact form",
            f"it clips keys and values (clip_qkv = {source.config['clip_qkv']}): values that were clipped are not made of keys",
            "use init svd, or learned",
        )
    if heads != source_heads:
        raise UsageError(
            f"init exact cannot make {heads} KV heads of {source_heads}",
            "it keeps every head as it is; merging heads loses something",
            "leave kv_heads out, or use init svd",
        )


def one_process_because(recipe: Recipe) -> tuple[str, str] | None:
    """Why the layers of a conversion cannot be shared out among processes to the same bytes, and what to do; None where they
    can.
    """
    if recipe.init == "exact":
        return "init exact merges no layer, so there is nothing to share out", "start it in one process"
    if recipe.heal.enabled:
        return (
            "healing follows in the same run, and is shared out by rows of text, not by layers",
            "convert with --no-heal, and heal with `kvshare heal`, which runs in several processes",
        )
    if recipe.cache_budget is not None:
        return "a cache budget rests on forwards through the whole model", "start it in one process, or give kv_heads"
    if not calibrates(recipe):
        return None
    if recipe.merge.sequential:
        return (
            "each layer is merged on what the converted layers before it give, so it waits for them",
            "take statistics once with `kvshare calibrate` and give --statistics, or set merge.sequential: false in a recipe",
        )
    if uses_self(recipe.calibration.data):
        return "every process would write the text of calibration for itself", "give text with --calibration"
    return None
