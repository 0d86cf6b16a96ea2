"""Progressive sharing: at first attention is the source's, in the end the student's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_healing import small

import kvshare
from kvshare.annealing import annealed, passage
from kvshare.errors import UsageError
from kvshare.families import family_of
from kvshare.loading import load, load_native
from kvshare.training import attention_pairs


def test_the_passage_is_a_straight_line() -> None:
    assert [passage(step, 10, 0.4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert passage(0, 10, 0.0) == 1.0


@pytest.mark.parametrize("key", ["qwen3", "gpt2", "llama-gqa"])
def test_attention_passes_from_the_source_s_to_the_student_s(
    key: str, converted_folder: Callable[..., Path], source_folder: Callable[[str], Path]
) -> None:
    student = load(converted_folder(key), dtype=torch.float32)
    teacher = load_native(source_folder(key), dtype=torch.float32)
    layers = attention_pairs(student, teacher, family_of(student.config.model_type))
    ids = torch.arange(1, 25).view(1, -1)
    at = 0.0

    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits

    wanted, own = logits(teacher), logits(student)
    teacher.requires_grad_(False)
    with annealed(layers, lambda: at):
        mixed = logits(student)
        torch.testing.assert_close(mixed, wanted, rtol=1e-4, atol=1e-4)
        at = 0.5
        half = logits(student)
        half.square().sum().backward()
        at = 1.0
        assert torch.equal(logits(student), own)
    assert not torch.allclose(half, wanted, atol=1e-3)
    assert not torch.allclose(half, own, atol=1e-3)
    assert all(
        value.grad is not None for name, value in student.named_parameters() if "k_proj.weight" in name or "c_attn.weight" in name
    )
    assert torch.equal(logits(student), own)


def test_healing_passes_and_does_not_take_that_for_divergence(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    folder, source = converted_folder("llama-gqa"), source_folder("llama-gqa")
    recipe = small(tmp_path, progressive=0.5, divergence_factor=1.001)
    result = kvshare.heal(folder, tmp_path / "out", source, text_file, recipe=recipe)
    losses = [loss for _, loss in result.losses]
    assert losses[0] == pytest.approx(0.0, abs=1e-5)  # the source against itself
    assert losses[1] < losses[2] < losses[3]
    plain = kvshare.heal(folder, tmp_path / "plain", source, text_file, recipe=small(tmp_path))
    assert losses[4] > 0.5 * plain.losses[4][1]
    kvshare.verify(tmp_path / "out")


@pytest.mark.parametrize("other", [{"teacher_top_k": 4}, {"compile": True}], ids=str)
def test_what_the_passage_does_not_go_with(
    other: dict[str, Any],
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
) -> None:
    recipe = small(tmp_path, progressive=0.5, **other)
    with pytest.raises(UsageError, match=f"heal.progressive does not go with heal.{next(iter(other))}"):
        kvshare.heal(converted_folder("llama-gqa"), tmp_path / "out", source_folder("llama-gqa"), text_file, recipe=recipe)
