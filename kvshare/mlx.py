"""Which checkpoints mlx-lm runs with the smaller cache, before a weight is touched.

In: a source, a recipe. Out: what config.json says to mlx-lm, or the error that says why it would not help.
Never: imports mlx, reads weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvshare.errors import UnsupportedModelError, UsageError
from kvshare.runtime import MLX
from kvshare.source import Source

# model types whose attention in mlx-lm was held against its own, with the cache of full size
KNOWN = (
    *("apertus", "cohere", "cohere2", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "gemma"),
    *("gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt_oss", "gptj", "granite", "granitemoe", "helium"),
    *("lfm2", "lfm2_moe", "llama", "mellum", "minimax_m2", "ministral3", "mistral", "mixtral", "nemotron", "olmo2"),
    *("olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
    *("solar_open", "stablelm", "starcoder2"),
)
# those of them that read `rope_parameters` there
READ_ROPE = ("exaone_moe", "lfm2", "lfm2_moe", "mellum", "ministral3", "qwen3")


def check_mlx(form: str, init: str, origin: str) -> None:
    """Refuse settings under which mlx-lm has no smaller cache.

    Args:
        form, init: of the recipe.
        origin: what to call the recipe.

    Raises:
        UsageError: another form than the shared one.
    """
    if form == "shared" and init != "exact":
        return
    raise UsageError(
        f"{origin} has mlx with {'init exact' if init == 'exact' else f'form {form}'}",
        "in mlx-lm, kvshare has the shared form alone",
        "leave one of them out",
    )


def mlx_config(source: Source) -> dict[str, Any]:
    """What config.json says beside the rest, so that mlx-lm has the smaller cache.

    Raises:
        UnsupportedModelError: mlx-lm has no such model, or its attention is not known to compute what it should.
    """
    if source.model_type not in KNOWN:
        raise UnsupportedModelError(
            f"mlx-lm cannot run {source.name} with the smaller cache",
            f"it has no model of the type {source.model_type}, or one whose attention kvshare does not know; "
            f"known are: {', '.join(KNOWN)}",
            "leave --mlx out: what mlx-lm can run, it then runs with a cache of full size",
        )
    return {"model_file": MLX, **older_rope(source.config)}


def older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope in fields of its own, where a config.json has it in `rope_parameters` alone, as transformers 5 writes it.

    Most of mlx-lm's models read those fields only, and would turn keys by their own defaults without a word.
    """
    rope = None if config.get("model_type") in READ_ROPE else config.get("rope_parameters")
    full = rope.get("full_attention", rope) if isinstance(rope, dict) else None
    if not isinstance(rope, dict) or not isinstance(full, dict):
        return {}
    local = rope.get("sliding_attention")
    found = {
        "rope_theta": full.get("rope_theta"),
        "rope_local_base_freq": local.get("rope_theta") if isinstance(local, dict) else None,
        "partial_rotary_factor": full.get("partial_rotary_factor"),
        "rope_scaling": full if full.get("rope_type", "default") != "default" else None,
    }
    return {name: value for name, value in found.items() if value is not None and name not in config}
