"""How long a conversion may take: its operations are those that torch counts, and more work takes longer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kvshare
from kvshare import duration, layerwise, sensitivity
from kvshare.duration import closed_form_steps, estimate_seconds, product_rate, stage_operations
from kvshare.loading import load_native
from kvshare.merge import regroup, svd
from kvshare.source import TINY, open_source

TEXT = {"calibration": "a.txt", "heal_data": "a.txt", "eval_data": "a.txt"}


def test_operations_are_those_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "POINTWISE", 0)
    recipe = kvshare.plan(TINY, **TEXT, heal_tokens=1024).recipe
    recipe = recipe.model_copy(update={"heal": recipe.heal.model_copy(update={"sequence_length": 64})})
    model = load_native(open_source(TINY).path, dtype=torch.float32)
    model.config._attn_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(16, 64, dtype=torch.long), use_cache=False)
    operations = stage_operations(kvshare.plan(TINY, recipe=recipe))["healing"] / duration.HEALING
    # torch counts the products of a token with those behind it
    assert operations == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert operations < counter.get_total_flops()


def test_more_work_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "product_rate", lambda hidden: 1e10 * hidden / 128)
    base = estimate_seconds(kvshare.plan(TINY, **TEXT, heal_tokens=10_000))
    assert base.keys() == {"starting", "copying", "merging", "healing", "measuring"}
    twice = estimate_seconds(kvshare.plan(TINY, **TEXT, heal_tokens=20_000))
    assert twice["healing"] == pytest.approx(2 * base["healing"])
    learned = estimate_seconds(kvshare.plan(TINY, **TEXT, init="learned", heal_tokens=10_000))
    assert learned["merging"] > 2 * base["merging"]
    assert "writing text" in estimate_seconds(kvshare.plan(TINY))
    bare = estimate_seconds(kvshare.plan(TINY, init="mean", heal=False, eval_mode="off"))
    assert bare.keys() == {"starting", "copying"}


def test_steps_of_the_closed_form() -> None:
    assert closed_form_steps(kvshare.plan(TINY, init="mean")) == {}
    assert closed_form_steps(kvshare.plan(TINY)) == {1: 8 * 60 * 3}
    assert closed_form_steps(kvshare.plan(TINY, kv_heads=2)) == {4: 2 * 60 * 3, 2: 28 * 20}
    assert closed_form_steps(kvshare.plan(TINY, kv_heads=4)) == {2: 4 * 60 * 3 + 28 * 20}


def test_the_speed_is_measured() -> None:
    assert 1e7 < product_rate(64) < 1e14


@pytest.mark.usefixtures("thorough")
def test_steps_are_those_that_are_taken() -> None:
    # duration knows them a second time, because the plan that shows them does without torch
    assert svd.ITERATIONS == duration.SEARCH_STEPS
    assert 3 * svd.RESTARTED_ITERATIONS == 2 * duration.SEARCH_STEPS
    assert regroup.PAIR_ITERATIONS == duration.PAIR_STEPS
    assert layerwise.STATISTICS_ITERATIONS == duration.STATISTICS_STEPS
    assert sensitivity.HELD_OUT_TOKENS == duration.CHOSEN_ON
