"""A recipe is read whole or refused: every key is known, every value checked, and the caller's values lie over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvshare.errors import UsageError
from kvshare.recipe import DEFAULT_RECIPE, Recipe, load_recipe, recipe_names, recipe_text


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(recipe: Any, *named: str, **overrides: Any) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe, **overrides)
    text = str(caught.value)
    assert [line[:7] for line in text.splitlines()[1:]] == ["  why: ", "  do:  "], text
    for name in named:
        assert name in text, text


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_described(name: str, tmp_path: Path) -> None:
    text = recipe_text(name)
    first = text.splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert "\n# Cost: " in text
    assert "\n# Measured on " in text
    recipe = load_recipe(name)
    for key, value in yaml.safe_load(text).items():
        section = getattr(recipe, key)
        for field, wanted in value.items() if isinstance(value, dict) else [(None, value)]:
            assert (getattr(section, field) if field else section) == wanted
    assert load_recipe(write(tmp_path, text)) == recipe


def test_the_recipes_are_listed() -> None:
    assert recipe_names() == ["edge", "eighth", "exact", "full", "half", "quick"]
    assert load_recipe() == load_recipe(DEFAULT_RECIPE) == load_recipe("half")
    assert not load_recipe("quick").heal.enabled
    assert load_recipe("edge").kv_heads == 1


def test_no_recipe_of_that_name() -> None:
    refusal("halff", "'halff'", "did you mean 'half'", "edge, eighth, exact, full, half, quick")
    with pytest.raises(UsageError, match="no recipe is called"):
        recipe_text("../half")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("int: svd", ("'int'", "did you mean 'init'")),
        ("heal: {token: 5}", ("'heal.token'", "did you mean 'tokens'")),
        ("calibration: {lenght: 5}", ("'calibration.lenght'", "use one of: data, sequence_length, statistics, tokens")),
        ("merge: {refitt: true}", ("'merge.refitt'", "did you mean 'refit'")),
        ("fit: {step: 5}", ("did you mean 'steps'",)),
        ("evaluation: {date: self}", ("did you mean 'data'",)),
    ],
)
def test_an_unknown_key_names_the_closest(tmp_path: Path, text: str, named: tuple[str, ...]) -> None:
    refusal(write(tmp_path, text), "mine.yaml", "unknown key", *named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("init: best", "init = 'best'"),
        ("seed: -1", "seed = -1"),
        ("kv_heads: 0", "kv_heads"),
        ("cache_budget: 0", "cache_budget"),
        ("cache_budget: 1.5", "cache_budget = 1.5"),
        ("cache_budget: .nan", "cache_budget"),
        ("kv_heads: 1/0", "kv_heads"),
        ("kv_heads: 3/4", "kv_heads"),
        ("kv_heads: ¼", "kv_heads"),
        ("kv_heads: 1/²", "kv_heads"),
        ("kv_heads: ²", "kv_heads"),
        ("kv_heads: some", "kv_heads"),
        ("kv_heads: [4]", "kv_heads"),
        ("heal: 5", "heal = 5"),
        ("heal: {tokens: 0}", "heal.tokens = 0"),
        ("heal: {learning_rate: -1}", "heal.learning_rate = -1"),
        ("heal: {learning_rate: .nan}", "heal.learning_rate = nan"),
        ("heal: {learning_rate: .inf}", "heal.learning_rate = inf"),
        ("heal: {lora_targets: []}", "heal.lora_targets"),
        ("merge: {balance: []}", "merge.balance"),
        ("merge: {balance: [0]}", "merge.balance"),
        ("merge: {balance: [-1]}", "merge.balance"),
        ("calibration: {tokens: many}", "calibration.tokens = 'many'"),
        ("evaluation: null", "evaluation = None"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, text: str, named: str) -> None:
    refusal(write(tmp_path, text), "mine.yaml", named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [", "is not YAML"),
        ("- a", "not a mapping"),
        ("3", "not a mapping"),
        ("1: 2", "not a mapping"),
        ("a: b: c", "is not YAML"),
        ("seed: 2001-99-99", "is not YAML"),
        ("heal: &a {tokens: 5, data: *a}", "aliases are not read"),
        ("seed: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("[" * 5_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, named: str) -> None:
    refusal(write(tmp_path, text), "mine.yaml", named)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere.yaml", "nowhere.yaml", "cannot be read")
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\xfa")
    refusal(tmp_path / "bytes.yml", "bytes.yml")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "# nothing yet")) == Recipe()


@pytest.mark.parametrize(("given", "kept"), [("all", "all"), (4, 4), ("4", 4), ("1/4", "1/4"), ("1/1", "1/1")])
def test_numbers_of_heads(given: int | str, kept: int | str) -> None:
    assert load_recipe(None, kv_heads=given).kv_heads == kept


def test_what_the_caller_gives_lies_over_the_recipe(tmp_path: Path) -> None:
    file = write(tmp_path, "init: mean\nseed: 3\nheal: {tokens: 100, lora_rank: 4}")
    recipe = load_recipe(file, init="learned", seed=None, heal__tokens=200, heal__enabled=False, evaluation__data="a.txt")
    assert (recipe.init, recipe.seed) == ("learned", 3)
    assert (recipe.heal.tokens, recipe.heal.lora_rank, recipe.heal.enabled) == (200, 4, False)
    assert recipe.evaluation.data == "a.txt"
    again = load_recipe(recipe, heal__tokens=300)
    assert (again.init, again.heal.tokens, again.heal.lora_rank) == ("learned", 300, 4)
    assert recipe.heal.tokens == 200
    refusal(file, "heal.tokens = 0", heal__tokens=0)
    refusal(recipe, "init = 'best'", init="best")


def test_a_recipe_is_frozen() -> None:
    recipe = load_recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 5  # type: ignore[misc]
    assert load_recipe(recipe) == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


KEYS = st.sampled_from([*Recipe.model_fields, *Recipe().heal.model_dump(), "data", "tokens", "balance"]) | st.text(max_size=5)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["svd", "1/4", "all", "self"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6)


def outcome(file: Path, **overrides: Any) -> Recipe | UsageError:
    try:
        return load_recipe(file, **overrides)
    except UsageError as error:
        return error


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | VALUES.map(lambda value: yaml.safe_dump(value, allow_unicode=True)))
def test_any_text_is_a_recipe_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert outcome(file)


@settings(max_examples=150, deadline=None)
@given(values=st.dictionaries(st.sampled_from(list(Recipe.model_fields)), VALUES, max_size=3))
def test_any_values_are_a_recipe_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "values.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    result = outcome(file, heal__tokens=5)
    if isinstance(result, Recipe):
        assert result.heal.tokens == 5
