"""What each layer bears is measured as it says, and a budget chooses the least damage that fits."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import TINY_FOLDER, convert_layers, mixed_layers, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kvshare
from kvshare.activations import first_inputs
from kvshare.budget import budget_units, choose_budget, divisors, frontier, head_units, stored_heads
from kvshare.errors import UsageError
from kvshare.layerwise import merge_alone
from kvshare.loading import load_native
from kvshare.losses import distillation_loss
from kvshare.passes import passed, source_pass
from kvshare.planning import plan
from kvshare.progress import silent
from kvshare.recipe import Recipe, load_recipe
from kvshare.sensitivity import Damage, agreement, measure_sensitivity
from kvshare.source import TINY

OPTIONS = st.lists(st.tuples(st.integers(1, 9), st.floats(0, 5)), min_size=1, max_size=4)


def least(costs: list[list[int]], damages: list[list[float]], budget: int) -> float:
    """The least damage of all choices that fit, by trying each; infinite where none does."""
    fitting = [math.inf]
    for choice in product(*(range(len(layer)) for layer in costs)):
        if sum(costs[layer][option] for layer, option in enumerate(choice)) <= budget:
            fitting.append(sum(damages[layer][option] for layer, option in enumerate(choice)))
    return min(fitting)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(1, 45))
@settings(max_examples=200, deadline=None)
def test_the_choice_is_the_best_of_all(layers: list[list[tuple[int, float]]], budget: int) -> None:
    costs, damages = [[cost for cost, _ in layer] for layer in layers], [[damage for _, damage in layer] for layer in layers]
    best = least(costs, damages, budget)
    if math.isinf(best):
        with pytest.raises(ValueError, match="no choice"):
            choose_budget(costs, damages, budget)
        return
    taken = choose_budget(costs, damages, budget)
    assert sum(costs[layer][option] for layer, option in enumerate(taken)) <= budget
    assert sum(damages[layer][option] for layer, option in enumerate(taken)) == pytest.approx(best)


@given(st.lists(OPTIONS, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_frontier_is_the_best_choice_of_every_budget(layers: list[list[tuple[int, float]]]) -> None:
    costs, damages = [[cost for cost, _ in layer] for layer in layers], [[damage for _, damage in layer] for layer in layers]
    points = frontier(costs, damages)
    for budget in range(sum(max(layer) for layer in costs) + 1):
        within = [damage for spent, damage, _ in points if spent <= budget]
        assert (within[-1] if within else math.inf) == pytest.approx(least(costs, damages, budget))
    for spent, damage, taken in points:
        assert sum(costs[layer][option] for layer, option in enumerate(taken)) == spent
        assert sum(damages[layer][option] for layer, option in enumerate(taken)) == pytest.approx(damage)


def test_of_equal_damages_the_cheapest_is_taken() -> None:
    assert choose_budget([[8, 4, 2], [8, 4, 2]], [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 16) == (2, 1)
    assert choose_budget([[16, 8]] * 3, [[0.0, 5.0], [0.0, 1.0], [0.0, 2.0]], 32) == (0, 1, 1)


def test_many_layers_are_chosen_for_quickly() -> None:
    generator = torch.Generator().manual_seed(0)
    damages = [sorted(torch.rand(5, generator=generator).tolist()) for _ in range(100)]
    taken = choose_budget([[16, 8, 4, 2, 1]] * 100, damages, 480)
    assert sum([16, 8, 4, 2, 1][option] for option in taken) <= 480


def test_the_arithmetic_of_heads() -> None:
    assert divisors(12) == (12, 6, 4, 3, 2, 1)
    assert head_units((None, 8, 2), 8) == 16 + 8 + 2
    assert stored_heads((4, 2, 1), 8) == 4
    assert stored_heads((6, 4), 12) == 12
    assert stored_heads((2, None), 8) == 8
    assert budget_units(0.5, 6, 8) == 48
    assert budget_units(1 / 3, 3, 8) == 16
    assert budget_units(0.1, 10, 5) == 10  # 0.1 is less than a tenth in floating point, and meant as one


@pytest.mark.parametrize(("budget", "least_possible"), [(0.06, "0.0625"), (1e-9, "0.0625")])
def test_a_budget_below_one_head_per_layer_is_refused(budget: float, least_possible: str) -> None:
    with pytest.raises(UsageError, match="cannot be met") as caught:
        plan(TINY, cache_budget=budget)
    assert least_possible in caught.value.fix
    assert plan(TINY, cache_budget=0.0625).cache_bytes_per_token == 6 * 16 * 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kv_heads": 4}, "kv_heads = 4"),
        ({"recipe": "eighth"}, "kv_heads = 1/4"),
        ({"init": "mean"}, "init mean"),
        ({"cache_budget": 1.5}, "cache_budget = 1.5"),
        ({"cache_budget": 0}, "cache_budget = 0"),
    ],
    ids=str,
)
def test_what_leaves_no_choice_is_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    for verb in (lambda **given: plan(TINY, **given), lambda **given: kvshare.convert(TINY, tmp_path / "out", **given)):
        with pytest.raises(UsageError, match=named):
            verb(**{"cache_budget": 0.5, **settings})
    assert list(tmp_path.iterdir()) == []


def test_a_single_row_is_refused(tmp_path: Path, text_file: str) -> None:
    with pytest.raises(UsageError, match="too little calibration text"):
        kvshare.convert(
            TINY, tmp_path / "out", cache_budget=0.5, calibration=text_file, calibration_tokens=512, heal=False, eval_mode="off"
        )
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_what_is_open_and_why() -> None:
    open_plan = plan(TINY, cache_budget=0.3)
    assert open_plan.layer_heads is None
    assert open_plan.cache_bytes_per_token == 28 * 16 * 2  # of 96 heads at 16 numbers of 2 bytes
    reasons = " ".join(open_plan.reasons)
    assert "per-layer head counts are not native to this architecture" in reasons
    assert "measured" in reasons
    assert all(tensor.shape == tensor.source.shape for tensor in open_plan.tensors)
    assert plan(TINY, kv_heads=4).layer_heads == (4,) * 6
    assert not any("not native" in reason for reason in plan(TINY, kv_heads=4).reasons)


def test_agreement_is_correlation() -> None:
    def layers(*pairs: tuple[float, float]) -> list[list[Damage]]:
        return [[Damage(None, 16, 0.0, 0.0), Damage(8, 8, *pair)] for pair in pairs]

    monotone = agreement(layers((1.0, 1.0), (2.0, 8.0), (4.0, 64.0)))
    assert monotone.spearman == pytest.approx(1)
    assert monotone.spearman_of_layers == pytest.approx(1)
    assert monotone.log_pearson == pytest.approx(1)  # a power law
    assert agreement(layers((1.0, 3.0), (2.0, 2.0), (3.0, 1.0))).spearman == pytest.approx(-1)
    # by hand: ranks 0, 1.5, 1.5, 3 against 0, 1, 3, 2
    tied = agreement(layers((1.0, 1.0), (2.0, 2.0), (2.0, 9.0), (3.0, 4.0)))
    assert tied.spearman == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert math.isnan(agreement(layers((1.0, 1.0))).spearman)


@pytest.mark.parametrize("key", ["qwen2", "qwen3-window"])
def test_damage_is_the_divergence_of_the_model_with_that_layer_merged(source_folder: Callable[[str], Path], key: str) -> None:
    settings = Recipe.model_validate({"cache_budget": 0.5, "merge": {"balance": [1.0]}})
    planned = plan(source_folder(key), recipe=settings)
    model = load_native(planned.source.path, dtype=torch.float32)
    rows = torch.randint(1, 4096, (16, 48), generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    found = measure_sensitivity(model, planned, rows, device, silent)
    held, seen = rows[:2], rows[2:6]  # an eighth and a quarter
    layers = model.get_decoder().layers
    hidden, calls = first_inputs(model, layers, seen, device)
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        wanted, _ = source_pass(layer, planned.family, hidden, call, device)
        shared = [option for option in found.layers[index] if option.heads is not None]
        assert [option.heads for option in shared] == list(divisors(planned.source_kv_heads))
        options = [option.heads for option in shared if option.heads is not None]
        alone = merge_alone(layer, planned, call, hidden, wanted, options, device)
        for option, (merged, error) in zip(shared, alone, strict=True):
            changed = copy.deepcopy(model)
            changed.get_decoder().layers[index] = merged
            with torch.no_grad():
                kl = distillation_loss(changed(held, use_cache=False).logits, model(held, use_cache=False).logits, 1.0)
            assert option.measured == pytest.approx(float(kl), rel=1e-3)
            per_energy = (hidden + wanted).double().square().sum(-1).reciprocal().mean()
            assert option.predicted == pytest.approx(error * float(per_energy), rel=1e-6)
        untouched = found.layers[index][0]
        assert (untouched.heads, untouched.predicted, untouched.measured) == (None, 0.0, 0.0)
        hidden = passed(layer, hidden, call, device)
    assert found.tokens == 96
    assert found.units == head_units(found.chosen, planned.source_kv_heads) <= found.budget_units


def test_layers_of_all_forms_are_one_native_checkpoint(mixed_folder: Callable[[str], Path]) -> None:
    folder = mixed_folder("tiny")
    config = json.loads((folder / "config.json").read_text())
    chosen = mixed_layers("tiny", 8)
    assert config["num_key_value_heads"] == 8
    assert config["kvshare"]["layers"] == [layer for layer, heads in enumerate(chosen) if heads is not None]
    assert config["kvshare"]["kv_heads"] == [heads for heads in chosen if heads is not None]
    assert kvshare.verify(folder).layers == 4
    tensors, source = load_file(folder / "model.safetensors"), load_file(TINY_FOLDER / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {name: value.shape for name, value in source.items()}
    for layer, heads in enumerate(chosen):
        own = [name for name in tensors if f"layers.{layer}.self_attn" in name]
        assert len(own) == 4
        if heads is None:
            assert all(torch.equal(tensors[name], source[name]) for name in own)
            continue
        assert not any(torch.equal(tensors[name], source[name]) for name in own if "q_proj" not in name)
        rows = tensors[f"model.layers.{layer}.self_attn.k_proj.weight"].view(heads, 8 // heads, 16, 128)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert len({part.numpy(force=True).tobytes() for part in rows[:, 0].float()}) == heads
    report = json.loads((folder / "report.json").read_text())
    assert report["cache_bytes_per_token"] == head_units(chosen, 8) * 16 * 2
    assert [layer["layer"] for layer in report["layers"]] == config["kvshare"]["layers"]
    assert "4 of 6 layers" in (folder / "README.md").read_text()


def test_heads_are_repeated_only_as_often_as_layers_differ(tmp_path: Path, text_file: str) -> None:
    source = random_model(tmp_path / "source", "qwen2", num_key_value_heads=4)
    convert_layers(source, tmp_path / "out", (2, 1), text_file)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 2
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensors[f"model.layers.{layer}.self_attn.{part}_proj.bias"].shape for layer in range(2) for part in "kv"} == {(16,)}
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        shared = kvshare.load(tmp_path / "out", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(shared, native, atol=1e-4, rtol=0)


def test_a_budget_of_everything_touches_nothing(tmp_path: Path, text_file: str) -> None:
    source = random_model(tmp_path / "source", "llama", num_key_value_heads=2)
    kvshare.convert(
        source,
        tmp_path / "out",
        cache_budget=1,
        calibration=text_file,
        calibration_tokens=1024,
        heal=False,
        eval_data=text_file,
        eval_tokens=1024,
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["cache_reduction"] == 0
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert kvshare.verify(tmp_path / "out").layers == 0


@pytest.fixture(scope="module")
def budgeted(once: Callable[[str, Callable[[Path], Any]], Path], own_text: tuple[str, str]) -> dict[str, Any]:
    """The report of the bundled model under a budget, calibrated on text that it wrote itself."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(
                {
                    "cache_budget": 0.3,
                    "calibration": {"data": own_text[0], "tokens": 4_096, "sequence_length": 128},
                    "merge": {"balance": [1.0], "grouping": "neighbours"},
                    "heal": {"enabled": False},
                    "evaluation": {"data": own_text[1], "tokens": 2_048},
                }
            )
        )
        assert load_recipe(folder / "recipe.yaml").cache_budget == 0.3
        kvshare.convert(TINY, folder / "out", recipe=folder / "recipe.yaml")

    report: dict[str, Any] = json.loads((once("budgeted", make) / "out" / "report.json").read_text())
    return report


def test_the_budget_is_met_with_the_least_measured_damage(budgeted: dict[str, Any]) -> None:
    found = budgeted["sensitivity"]
    assert found["budget_units"] == 28
    assert budgeted["cache_bytes_per_token"] == found["units"] * 16 * 2 <= 0.3 * budgeted["source_cache_bytes_per_token"]
    options = [layer["options"] for layer in found["layers"]]
    chosen = [layer["options"][layer["chosen"]] for layer in found["layers"]]
    assert found["units"] == sum(option["units"] for option in chosen)
    costs, damages = ([[option[name] for option in layer.values()] for layer in options] for name in ("units", "measured"))
    assert sum(option["measured"] for option in chosen) == pytest.approx(least(costs, damages, 28))
    assert all(set(layer) == {"untouched", "8", "4", "2", "1"} for layer in options)


def test_the_prediction_agrees_with_the_measurement(budgeted: dict[str, Any]) -> None:
    found = budgeted["sensitivity"]
    assert found["agreement"]["spearman"] > 0.8
    assert found["agreement"]["log_pearson"] > 0.8
    for layer in found["layers"]:
        measured = [layer["options"][heads]["measured"] for heads in ("untouched", "8", "2", "1")]
        assert measured == sorted(measured)
