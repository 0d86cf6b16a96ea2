"""Time and memory beside the source: what is counted is exact, what is timed is paired, a result appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvshare
from kvshare.benching import fit
from kvshare.errors import UsageError
from kvshare.loading import load_native
from kvshare.sizes import bytes_of
from kvshare.timing import Pass, Run, Spread, Timing, held_bytes, measure_pair, peak_above, spread

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"contexts": [16, 32], "batch_sizes": [2], "repeats": 2, "new_tokens": 3, "device": "cpu"}
FLAT = Timing(Spread(1, 1, 1), Spread(1, 1, 1), Spread(1, 1, 1))


def test_the_peak_is_what_is_held_at_one_time(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.ones(250_000)

    def work() -> torch.Tensor:
        first = torch.ones(250_000)  # a million bytes
        second = first + before
        del first
        return second + before

    assert peak_above(work, CPU) == 2_000_000
    assert peak_above(lambda: None, CPU) == 0
    assert capfd.readouterr() == ("", "")  # torch's profiler would tell of its stages


def test_weights_that_share_memory_count_once() -> None:
    net = torch.nn.Linear(10, 20, bias=False)
    net.again = net.weight
    net.register_buffer("more", torch.zeros(3, dtype=torch.float64))
    assert held_bytes(net) == 800 + 24


def test_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0)


def test_models_run_in_turns_and_ratios_are_paired(monkeypatch: pytest.MonkeyPatch, source_folder: Callable[[str], Path]) -> None:
    model, source = (load_native(source_folder("llama-gqa")) for _ in range(2))
    cache = model(input_ids=torch.zeros(2, 10, dtype=torch.int64), use_cache=True).cache
    order: list[str] = []

    def timed(one: Any, *_: Any) -> Pass:
        order.append("m" if one is model else "s")
        slow = len(order)  # the machine slows down all the time; what is compared ran side by side
        return Pass(8.0 * slow if one is model else 4.0 * slow, 2.0 * slow, cache)

    monkeypatch.setattr("kvshare.timing.run_once", timed)
    run = measure_pair(model, source, 2, 8, 2, 3, 0)
    assert "".join(order) == "mmss" + "ms" + "sm" + "ms"
    ratios = [(8 * 5) / (4 * 6), (8 * 8) / (4 * 7), (8 * 9) / (4 * 10)]
    assert run.prefill.ratio == spread(ratios)
    assert run.prefill.seconds == spread([5.0, 8.0, 9.0])  # over 8 tokens of context
    assert run.decode.source_seconds == spread([6.0, 7.0, 10.0])
    assert run.cache_bytes == run.source_cache_bytes == 2 * 2 * 4 * 8 * 4 * 2 * 10
    assert run.cache_bytes_per_token == 2 * 2 * 4 * 8 * 4


def test_what_fits_is_arithmetic() -> None:
    run = Run(2, 100, 0, 0, 10.0, 20.0, 0, 0, FLAT, FLAT)
    found = fit(run, 5_000, 1_000, 1_000)
    assert (found.largest_batch, found.source_largest_batch) == (4, 2)
    assert (found.longest_context, found.source_longest_context) == (200, 100)
    assert fit(run, 900, 1_000, 1_000).largest_batch == 0
    assert [bytes_of(m, "memory") for m in ("8GB", "8GiB", "1.5 kB", 77)] == [8 * 10**9, 8 * 2**30, 1500, 77]
    for bad in ("8 gigs", "", "-1GB", "0GB"):
        with pytest.raises(UsageError, match="for example: 8GB"):
            bytes_of(bad, "memory")


@pytest.mark.parametrize("form", ["shared", "exact", "mixed"])
def test_every_form_is_measured(
    converted_folder: Callable[..., Path],
    mixed_folder: Callable[[str], Path],
    source_folder: Callable[[str], Path],
    form: str,
) -> None:
    key = "llama-mha" if form == "exact" else "llama-gqa"
    folder, source = source_folder(key), source_folder(key)
    if form == "mixed":
        folder = mixed_folder(key)
        source = folder.parent / "source"
    else:
        folder = converted_folder(key, "all", "exact" if form == "exact" else "svd")
    result = kvshare.bench(folder, source, memory="1MB", **SHORT)
    config = json.loads((source / "config.json").read_text())
    heads = [2 * config["num_key_value_heads"]] * config["num_hidden_layers"]
    kept = {"shared": [4, 4], "exact": [8, 8], "mixed": [2 * 4, 4, 2, 1]}[form]
    for run in result.runs:
        assert run.source_cache_bytes == sum(heads) * 8 * 4 * 2 * (run.context + 3)
        assert run.cache_bytes == sum(kept) * 8 * 4 * 2 * (run.context + 3)
        assert run.cache_bytes < run.peak_bytes - result.weight_bytes
        assert run.source_cache_bytes < run.source_peak_bytes - result.source_weight_bytes
        for timing in (run.prefill, run.decode):
            assert 0 < timing.ratio.lower_quartile <= timing.ratio.median <= timing.ratio.upper_quartile
    native = held_bytes(load_native(source))
    assert result.source_weight_bytes == native
    if form == "exact":  # W_V W_K^-1, its feedback of n^2/3 and an order, in float64 beside weights of float32
        assert result.weight_bytes > native + 2 * 64 * 64 * 8
    else:
        assert result.weight_bytes < native
    assert [f.context for f in result.fits] == [16, 32]
    assert result.device.startswith("CPU")
    assert any("a GPU" in line for line in result.not_measured)


def test_a_result_appears_whole_or_not_at_all(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, source = converted_folder("llama-gqa"), source_folder("llama-gqa")

    def broken(runs: Any, title: str, file: Path) -> None:
        file.write_bytes(b"half a picture")
        raise RuntimeError("no more ink")

    with monkeypatch.context() as patch:
        patch.setattr("kvshare.benching.draw_runs", broken)
        with pytest.raises(RuntimeError, match="no more ink"):
            kvshare.bench(folder, source, output=tmp_path / "out", **SHORT)
    assert list(tmp_path.iterdir()) == []
    result = kvshare.bench(folder, source, output=tmp_path / "out", **SHORT)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"bench.json", "bench.png", "kvshare_manifest.json"}
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result.to_dict()
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="exists"):
        kvshare.bench(folder, source, output=tmp_path / "out", **SHORT)
    with pytest.raises(UsageError, match="overlap"):
        kvshare.bench(folder, source, output=folder / "bench", **SHORT)
    with pytest.raises(UsageError, match="is not a benchmark"):
        kvshare.bench(folder, source, output=converted_folder("llama-gqa", 2), overwrite=True, **SHORT)
    again = kvshare.bench(folder, source, output=tmp_path / "out", overwrite=True, **(SHORT | {"contexts": [16]}))
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == again.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"contexts": [510]}, "give --contexts up to 509"),
        ({"repeats": 0}, "repeats = 0"),
        ({"batch_sizes": []}, "batch_sizes"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"device": "cuda"}, "'cuda' cannot be used"),
        ({"memory": "much"}, "memory = 'much'"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], asked: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        kvshare.bench(converted_folder("llama-gqa"), source_folder("llama-gqa"), **(SHORT | asked))
