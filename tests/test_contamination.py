"""Held-out rows that share a run of tokens with text that was trained on are counted, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import QUICK, Outcome

import kvshare
from kvshare.contamination import Contamination, contamination


def rows(seed: int, count: int = 20, length: int = 100) -> torch.Tensor:
    return torch.randint(4096, (count, length), generator=torch.Generator().manual_seed(seed))


def test_nothing_shared_is_nothing_found() -> None:
    assert contamination(rows(0), [rows(1), rows(2, 700, 64)]) == Contamination(32, 20, 0)
    assert contamination(rows(0), []) is None


@pytest.mark.parametrize(("length", "found"), [(31, 0), (32, 1), (60, 1)])
@pytest.mark.parametrize("start", [0, 17, 40])
def test_a_run_is_found_wherever_it_stands(length: int, found: int, start: int) -> None:
    held_out, trained = rows(0), rows(1, 600)
    trained[599, 40 : 40 + length] = held_out[7, start : start + length]
    result = contamination(held_out, [rows(2), trained])
    assert result == Contamination(32, 20, found)


def test_order_counts_and_every_row_counts_once() -> None:
    held_out = rows(0)
    assert contamination(held_out, [held_out.flip(1)]) == Contamination(32, 20, 0)
    same = contamination(held_out, [held_out[:5].repeat(3, 1)])
    assert same == Contamination(32, 20, 5)
    assert same.fraction == 0.25


def test_short_rows_take_shorter_runs() -> None:
    held_out = rows(0, 4, 16)
    assert contamination(held_out, [held_out[:1]]) == Contamination(16, 4, 1)


def test_it_is_reported_and_warned_of(
    run: Callable[..., Outcome], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    source, recipe = source_folder("llama-gqa"), tmp_path / "recipe.yaml"
    recipe.write_text("heal: {sequence_length: 64, batch_tokens: 128, lora_rank: 2, tokens: 256}")
    other = tmp_path / "other.txt"
    other.write_text(" ".join(str(7 * i) for i in range(2_000)))
    text = ("--calibration", text_file, "--calibration-tokens", "2048", "--eval-tokens", "1024", "--quiet")
    converted = ("convert", source, "--recipe", "quick", *text)
    dirty = run(*converted, "-o", tmp_path / "dirty", "--eval-data", text_file)
    assert "warning: 100.0% of the evaluation's rows share a run of 32 tokens" in dirty.err
    assert json.loads((tmp_path / "dirty" / "report.json").read_text())["contamination"]["fraction"] == 1
    healed = ("heal", tmp_path / "dirty", "--source", source, "--recipe", recipe, "--eval-tokens", "1024", "--quiet")
    clean = run(*healed, "-o", tmp_path / "clean", "--data", text_file, "--eval-data", other)
    assert (clean.code, clean.err) == (0, "")
    assert json.loads((tmp_path / "clean" / "report.json").read_text())["contamination"]["shared_rows"] == 0
    again = run(*healed, "-o", tmp_path / "again", "--data", f"{other}=1,{text_file}=1", "--eval-data", text_file, "--json")
    assert json.loads(again.out)["contamination"]["shared_rows"] == 2
    assert "warning" in again.err
    plain = kvshare.convert(source, tmp_path / "mean", init="mean", recipe=QUICK, eval_data=text_file, eval_tokens=512)
    assert plain.contamination is None
