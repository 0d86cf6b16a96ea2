"""The settings of a conversion: every default lives here or in its sections, once.

In: YAML (one of the shipped recipes or a file) and the arguments that a caller gave. Out: a frozen, validated `Recipe`.
Never: ignores a key it does not know, reads a model.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError

from kvshare.errors import UsageError, closest
from kvshare.mlx import check_mlx
from kvshare.parsing import MAX_YAML, is_file, parse_yaml, read_bytes, shown
from kvshare.rotated import check_form
from kvshare.sections import Calibration, Evaluation, Fit, Form, Fraction, Heal, KVHeads, Merge, Natural, Positive, Section

DEFAULT_RECIPE = "half"
CALIBRATED = ("svd", "learned")  # initialisations that take text
INSPECTED_TOKENS = 8_192  # text that a model is looked at on before it is converted


class Recipe(Section):
    """All settings of one conversion."""

    init: Literal["mean", "svd", "learned", "exact"] = "svd"
    form: Form = "shared"
    """What the cache holds: `shared`, keys before rope, the family's function; `rotated`, keys behind rope, another one."""
    kv_heads: KVHeads = "all"
    """KV heads of the output: a number, a fraction of the source's (`1/4`) or `all` (as many as the source has)."""
    cache_budget: Fraction | None = None
    """The most of the source's cache that may be kept, such as 0.3; layers then keep K and V apart, share them, or share fewer
    heads, as they bear it (svd and learned). None: every layer shares `kv_heads` heads."""
    mlx: bool = False
    """Whether mlx-lm uses the smaller cache, too; its tools then ask to be told that they may run the code in the checkpoint."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """What all generators of random numbers take."""
    calibration: Calibration = Calibration()
    merge: Merge = Merge.model_validate({})
    fit: Fit = Fit()
    heal: Heal = Heal.model_validate({})
    evaluation: Evaluation = Evaluation()


class Probes(Section):
    """What an evaluation measures beyond its first figures: nothing unless it is asked for. No part of a recipe."""

    contexts: tuple[Annotated[int, Field(gt=1)], ...] = ()
    """Tokens that a window of sliding-window perplexity, or a passkey prompt, holds."""
    by_position: bool = False
    recall: Natural = 0
    """Questions per number of pairs."""
    passkey: Natural = 0
    """Keys per context and depth."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval tasks, or YAML files of one."""
    cache_bits: tuple[Annotated[int, Field(ge=2, le=8)], ...] = ()


class Bench(Section):
    """What is timed, and how often. No part of a recipe."""

    contexts: tuple[Positive, ...] = Field((128, 512), min_length=1)
    batch_sizes: tuple[Positive, ...] = Field((1, 4), min_length=1)
    repeats: Positive = 5
    new_tokens: Positive = 16
    seed: Natural = 0
    """Of the prompts' random tokens."""


Settings = TypeVar("Settings", Probes, Bench)


def settings_of(kind: type[Settings], **values: Any) -> Settings:
    """Validated settings of a measurement from the arguments that a caller gave; None means the default.

    Raises:
        UsageError: a value out of range.
    """
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise _explain(error, "the command") from None


def calibrates(recipe: Recipe) -> bool:
    """Whether the merge takes text."""
    return recipe.init in CALIBRATED and recipe.calibration.statistics is None


def made_by(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a result, as JSON data: all but the limit that it is held against afterwards."""
    return recipe.model_dump(mode="json", exclude={"evaluation": {"max_perplexity_increase"}})


def data_used(recipe: Recipe) -> list[str]:
    """The DATA arguments of all text that a conversion reads."""
    used = [] if recipe.evaluation.mode == "off" else [recipe.evaluation.data]
    if calibrates(recipe):
        used.append(recipe.calibration.data)
    if recipe.heal.enabled:
        used.append(recipe.heal.data)
    return used


def recipe_names() -> list[str]:
    """The names of the recipes that come with kvshare."""
    files = resources.files("kvshare.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe, comments included.

    Raises:
        UsageError: no recipe has this name.
    """
    if name not in recipe_names():
        raise UsageError(
            f"no recipe is called {name!r}",
            f"kvshare ships: {', '.join(recipe_names())}",
            f"{closest(name, recipe_names())}, or give the path of a .yaml file",
        )
    return (resources.files("kvshare.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def load_recipe(recipe: str | Path | Recipe | None = None, **overrides: Any) -> Recipe:
    """A validated recipe, with the values that the caller gave laid over it.

    Args:
        recipe: a shipped recipe's name, the path of a YAML file, a `Recipe`, or None for the default recipe.
        overrides: values by field; a nested field joins its section by two underscores (`heal__tokens=1000`).
            None means "as the recipe says".

    Raises:
        UsageError: unreadable YAML, an unknown key (with the closest known one), a value out of range, or values that
            contradict each other.
    """
    if isinstance(recipe, Recipe):
        origin, values = "the recipe", recipe.model_dump()
    else:
        origin, values = _read(recipe or DEFAULT_RECIPE)
    for field, value in overrides.items():
        if value is None:
            continue
        section, _, key = field.rpartition("__")
        target = values if not section else values.setdefault(section, {})
        if isinstance(target, dict):
            target[key] = value
    try:
        settings = Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origin) from None
    _check_budget(settings, origin)
    _check_statistics(settings, origin)
    check_form(settings.form, settings.init, settings.calibration.statistics, origin)
    if settings.mlx:
        check_mlx(settings.form, settings.init, origin)
    _check_healing(settings.heal, origin)
    _check_evaluation(settings, origin)
    return settings


def conversion_recipe(
    recipe: str | Path | Recipe | None,
    init: str | None,
    form: str | None,
    kv_heads: int | str | None,
    cache_budget: float | None,
    calibration: str | None,
    calibration_tokens: int | None,
    statistics: str | Path | None,
    heal: bool | None,
    heal_data: str | None,
    heal_tokens: int | None,
    eval_data: str | None,
    eval_tokens: int | None,
    eval_mode: str | None,
    seed: int | None,
    max_perplexity_increase: float | None = None,
    mlx: bool | None = None,
) -> Recipe:
    """The recipe of a conversion from the arguments of `convert`, which see.

    Raises:
        UsageError: see `load_recipe`; or an exact conversion that is to be healed.
    """
    settings = load_recipe(
        recipe,
        init=init,
        form=form,
        kv_heads=kv_heads,
        cache_budget=cache_budget,
        mlx=mlx,
        seed=seed,
        calibration__data=calibration,
        calibration__tokens=calibration_tokens,
        calibration__statistics=None if statistics is None else str(statistics),
        heal__enabled=heal,
        heal__data=heal_data or calibration,
        heal__tokens=heal_tokens,
        evaluation__data=eval_data,
        evaluation__tokens=eval_tokens,
        evaluation__mode=eval_mode,
        evaluation__max_perplexity_increase=max_perplexity_increase,
    )
    if heal and settings.init == "exact":
        raise UsageError(
            "an exact conversion cannot be healed", "its weights are the source's own: nothing was lost", "leave --heal out"
        )
    return settings


def _check_evaluation(recipe: Recipe, origin: str) -> None:
    """Refuse an evaluation layer by layer where the merge is not all that happens, and a gate where nothing is measured.

    Raises:
        UsageError: `evaluation.mode` is `layers` together with healing or with init exact, or `off` with a quality gate.
    """
    limit = recipe.evaluation.max_perplexity_increase
    if limit is not None and recipe.evaluation.mode == "off":
        raise UsageError(
            f"{origin} has max_perplexity_increase = {limit} with evaluation mode off",
            "what is not measured cannot be held against a limit",
            "take evaluation mode whole or layers, or leave the limit out",
        )
    if recipe.evaluation.mode != "layers" or not (recipe.heal.enabled or recipe.init == "exact"):
        return
    healing = recipe.heal.enabled and recipe.init != "exact"
    raise UsageError(
        f"{origin} measures layer by layer " + ("and heals" if healing else "with init exact"),
        "healing needs both models in memory as it is" if healing else "what the exact form loses shows in its cache alone",
        "turn healing off, or take evaluation mode whole" if healing else "take evaluation mode whole or off",
    )


def _check_healing(heal: Heal, origin: str) -> None:
    """Refuse kept probabilities of the teacher beside a term that needs more of it, and a loss without terms.

    Raises:
        UsageError: `heal.teacher_top_k` together with `heal.attention_matching`, or no weight above 0.
    """
    if not heal.kl + heal.cross_entropy + heal.attention_matching:
        raise UsageError(
            f"{origin} leaves healing nothing to minimise",
            "heal.kl, heal.cross_entropy and heal.attention_matching are all 0",
            "give one of them a weight; heal.kl is 1 by default",
        )
    if heal.teacher_top_k is not None and heal.attention_matching > 0:
        raise UsageError(
            f"{origin} has both heal.teacher_top_k and heal.attention_matching",
            "the teacher's probabilities are kept on the disk, its attention outputs are not",
            "leave one of them out",
        )


def _check_statistics(recipe: Recipe, origin: str) -> None:
    """Refuse statistics where they would not be used, or not be enough.

    Raises:
        UsageError: an init other than svd, or a cache budget.
    """
    if recipe.calibration.statistics is None or (recipe.init == "svd" and recipe.cache_budget is None):
        return
    given = "a cache budget" if recipe.cache_budget is not None else f"init {recipe.init}"
    needs = "takes no statistics" if recipe.init in ("mean", "exact") else "needs what layers do on text"
    raise UsageError(
        f"{origin} has both statistics and {given}", f"{given} {needs}", "leave one of them out; init svd starts from statistics"
    )


def _check_budget(recipe: Recipe, origin: str) -> None:
    """Refuse a budget beside settings that leave it no choice.

    Raises:
        UsageError: `cache_budget` together with `kv_heads`, or with an init that takes no calibration.
    """
    if recipe.cache_budget is None:
        return
    if recipe.kv_heads != "all":
        raise UsageError(
            f"{origin} has both cache_budget = {recipe.cache_budget} and kv_heads = {recipe.kv_heads}",
            "a budget chooses the KV heads of every layer itself",
            "leave one of them out; kv_heads 'all' leaves the choice to the budget",
        )
    if recipe.init == "mean":
        raise UsageError(
            f"{origin} has cache_budget = {recipe.cache_budget} with init mean",
            "the choice rests on what layers do on calibration text, which mean does without",
            "use init svd or learned",
        )


def _read(recipe: str | Path) -> tuple[str, dict[str, Any]]:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or is_file(path):
        try:
            text = read_bytes(path, MAX_YAML)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the recipe {path} cannot be read", str(error), "give a YAML file or a shipped recipe's name"
            ) from None
    else:
        text = recipe_text(str(recipe)).encode()
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"the recipe {recipe} is not YAML", str(error), "correct that line") from None
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(
            f"the recipe {recipe} is not a mapping",
            f"its top level is a {type(values).__name__}",
            "write one 'key: value' per line; `kvshare recipes show half` is an example",
        )
    return f"the recipe {recipe}", values


def _explain(error: ValidationError, origin: str) -> UsageError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_of(first["loc"][:-1])
        return UsageError(
            f"{origin} has an unknown key {where!r}",
            "a key that nothing reads would be ignored in silence",
            closest(str(first["loc"][-1]), known),
        )
    return UsageError(
        f"{origin} has a value that cannot be used: {where} = {shown(first['input'])}",
        first["msg"],
        "correct it, or leave it out to keep the default",
    )


def _fields_of(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if get_origin(annotation) is Union:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)
