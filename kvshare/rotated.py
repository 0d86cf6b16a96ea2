"""The rotated form before a weight is touched: which models can have it, and what their config becomes.

In: a source, its family, a recipe. Out: the config of a checkpoint in rotated form, what to say of it, or the error that says why
there is none. Never: reads weights.
"""

from __future__ import annotations

from typing import Any

from kvshare.errors import UnsupportedModelError, UsageError
from kvshare.families import FAMILIES, Family
from kvshare.runtime import ROTATED, ROTATED_CLASS
from kvshare.source import Source


def require_rotated(source: Source, family: Family) -> None:
    """Refuse what has no rotated form.

    Raises:
        UnsupportedModelError: the family's attention is not known in this form, or its rope changes with the length of the text.
    """
    if not family.rotated_form:
        known = ", ".join(sorted(name for name, other in FAMILIES.items() if other.rotated_form))
        raise UnsupportedModelError(
            f"{source.name} has no rotated form",
            f"of {family.model_type} models it is not known to compute what it should; it is of: {known}",
            "leave --form out: the shared form, which keeps the family's own function",
        )
    from kvshare.runtime.kvshare_rotated import KNOWN_ROPES, rope_type

    rope = rope_type(source.config)
    if rope not in KNOWN_ROPES:
        raise UnsupportedModelError(
            f"{source.name} has no rotated form",
            f"its rope is of the type {rope}: keys that were cached by other frequencies, or with a factor of their own, cannot be "
            f"turned back by the query's; known are {', '.join(KNOWN_ROPES)}",
            "leave --form out: the shared form rotates on every read",
        )


def check_form(form: str, init: str, statistics: str | None, origin: str) -> None:
    """Refuse settings that contradict the rotated form.

    Args:
        form, init: of the recipe.
        statistics: its `calibration.statistics`.
        origin: what to call the recipe.

    Raises:
        UsageError: init `exact`, or statistics in place of text.
    """
    if form != "rotated":
        return
    if init == "exact":
        raise UsageError(
            f"{origin} has form rotated with init exact",
            "the exact form makes values of keys by an inverse, in the rotated form they are the keys: no weight would stay right",
            "leave one of them out; init svd or learned makes weights for the rotated form",
        )
    if statistics is not None:
        raise UsageError(
            f"{origin} has both statistics and form rotated",
            "statistics hold moments of the source; what the rotated form gives shows in its own outputs, to which the output "
            "projection is fitted on text",
            "leave one of them out",
        )


def rotated_config(config: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json in the rotated form: no native class must compute it, by whatever of these it is chosen."""
    from kvshare.runtime.kvshare_rotated import marked

    return marked(config) | {
        "model_type": f"{ROTATED}{config['model_type']}",
        "architectures": [f"{ROTATED_CLASS}{name}" for name in config["architectures"]],
    }


def says_rotated(config: dict[str, Any]) -> list[bool]:
    """Whether model_type and rope of a config are those of the rotated form, one after the other."""
    ropes = [config[name] for name in ("rope_parameters", "rope_scaling") if isinstance(config.get(name), dict)]
    return [
        str(config.get("model_type", "")).startswith(ROTATED),
        any(str(rope.get("rope_type", "")).startswith(ROTATED) for rope in ropes),
    ]


def rotated_reasons(model_type: str) -> list[str]:
    """What the rotated form means for the result."""
    return [
        "form rotated: rotated keys are cached and are the values, too; each head's output is turned back by the query's rotation. "
        "It is another function than the source's, fitted to it",
        f"model_type {ROTATED}{model_type}: stock transformers asks for trust_remote_code=True, other runtimes refuse it",
    ]
