"""Benchmarks still run: what they call has not changed under them. Their figures here are of next to no text and mean nothing."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a benchmark's `main` with these arguments."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # what they set comes back
    threads = torch.get_num_threads()

    def call(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(name).main()

    yield call
    torch.set_num_threads(threads)


def test_quality_and_healing_measure(
    run: Any, source_folder: Callable[[str], Path], text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--train-data", text_file, "--eval-data", text_file, "--eval-tokens", "1024", "--heal-tokens", "1024"]
    given += ["--model", str(source_folder("llama-gqa")), "--out", str(tmp_path), "--seeds", "1", "--heads", "4"]
    run("quality", *given, "--only", "^(mean 4 seed 0|int8 cache|budget 0.5 seed 0)$")
    measured = json.loads((tmp_path / "quality.json").read_text())
    assert set(measured) == {"mean 4 seed 0", "int8 cache", "budget 0.5 seed 0"}
    named = ("more training", "svd 4")
    run("healing", *given, "--speed-tokens", "4096", "--curve-rows", "1", "--only", f"^(({'|'.join(named)}) seed 0|speed)$")
    measured = json.loads((tmp_path / "healing.json").read_text())
    assert set(measured) == {*(f"{name} seed 0" for name in named), "speed"}
    assert measured["more training seed 0"]["learning_rate"] > 0
    rounded = measured["svd 4 seed 0"]["cache in 8 bits"]
    assert rounded["cache_reduction"] > measured["svd 4 seed 0"]["cache_reduction"]
    assert rounded["perplexity"] == pytest.approx(measured["svd 4 seed 0"]["perplexity"], rel=0.01)
    capsys.readouterr()
    run("healing", *given, "--table")
    table = capsys.readouterr().out
    assert all(f"| {name} | " in table for name in named)
    assert (tmp_path / "healing.svg").stat().st_size > 1000


def test_seeds_are_tabled_without_a_source_trained_as_long(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"perplexity": 54.0, "perplexity_increase": 0.01, "kl": 0.02, "cache_reduction": 0.5, "curve": []}
    entries = {f"{way} 8 seed {seed}": dict(entry) for way in ("kl", "mixed") for seed in (0, 1)}
    entries["kl 8 seed 1"] |= {"cache in 8 bits": entry | {"cache_reduction": 0.75}}
    entries |= {f"more mixed training seed {seed}": entry | {"perplexity": 53.0 + seed} for seed in (0, 1)}
    (tmp_path / "healing.json").write_text(json.dumps(entries))
    run("healing", "--train-data", "x", "--eval-data", "x", "--out", str(tmp_path), "--heads", "4", "--table")
    shown = capsys.readouterr().out
    assert "| kl 8 | 50.00% | +1.00% ± 0.00% | – | +1.00% ± 0.00% | 0.0200 ± 0.0000 | – |" in shown
    assert "| kl 8, cache in 8 bits | 75.00% | +1.00% | – |" in shown
    assert "| mixed 8 | 50.00% | +1.00% ± 0.00% | – | +0.93% ± 0.00% | 0.0200 ± 0.0000 | – |" in shown


def test_decoding_steps_are_timed(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--contexts", "64", "--batch-sizes", "1", "--dtypes", "bfloat16", "--threads", "1"]
    run("decode", *given, "--pairs", "2", "--bits", "16", "8", "--shapes", "Qwen3-4B")
    assert capsys.readouterr().out.count("| Qwen3-4B |") == 2
    run("decode", *given, "--pairs", "2", "--shapes", "Qwen2.5-7B", "--new-tokens", "2")
    *_, error, _, _ = capsys.readouterr().out.splitlines()[-1].split("|")
    assert 0 < float(error) < 1e-2
    run("rotated", *given, "--rounds", "2")
    assert "| 64 |" in capsys.readouterr().out
