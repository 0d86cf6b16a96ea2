"""Tokens that do not follow one another are rotated by the positions that came with them, also where a cache is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import FAMILY_SOURCES, SOURCES, TEXT, TINY_FOLDER, in_turn
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.models.phimoe import modeling_phimoe

import kvshare
from kvshare.runtime.kvshare_positions import follow, key_positions, leave

# families without rope; those with experts differ from their like in nothing that counts here
WITHOUT = {"gpt2", "opt", "bloom", "falcon-alibi", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoehybrid"}
WITHOUT |= {
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "granitemoeshared",
    "hy_v3",
    "mellum",
    "minimax_m2",
    "phimoe",
    "solar_open",
}
KEYS = sorted({*SOURCES, *FAMILY_SOURCES} - WITHOUT)
IDS = torch.arange(100, 152).view(2, 26)
SIZES = [18, 1, 1, 1, 5]  # a prompt, tokens one by one, and several at once


def padded_right() -> tuple[Tensor, Tensor]:
    """The second prompt is shorter, and its positions go on behind the padding."""
    mask = torch.ones_like(IDS)
    mask[1, 11:18] = 0
    return mask.cumsum(1) - 1, mask


def padded_left() -> tuple[Tensor, Tensor]:
    """As `generate` does it: tokens follow one another."""
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 1), mask


def padded_in_the_middle() -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(IDS)
    mask[0, 4:9], mask[1, :3], mask[1, 6:8] = 0, 0, 0
    return (mask.cumsum(1) - 1).clamp(min=0), mask


def gaps() -> tuple[Tensor, Tensor]:
    """In the prompt, before a single token, and among several."""
    positions = torch.arange(26).repeat(2, 1)
    positions[0, 9:] += 40
    positions[:, 19:] += 13
    positions[1, 24:] += 5
    return positions, torch.ones_like(IDS)


def again() -> tuple[Tensor, Tensor]:
    """Positions begin anew, and so do those of several tokens that are tried beside one another."""
    positions = torch.arange(26).repeat(2, 1)
    positions[:, 6:] -= 6
    positions[:, 24:] -= 2
    return positions, torch.ones_like(IDS)


WAYS = {way.__name__: way for way in (padded_right, padded_left, padded_in_the_middle, gaps, again)}


def seen(positions: Tensor, mask: Tensor) -> Tensor:
    """Which logits count: those of tokens that are not padding."""
    return mask.bool() & (positions >= 0)


def whole(model: Any, positions: Tensor, mask: Tensor) -> Tensor:
    """Logits of one forward without a cache."""
    logits: Tensor = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[seen(positions, mask)]


def in_parts(model: Any, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
    parts, done = [], 0
    for size in SIZES:
        part, done = slice(done, done + size), done + size
        given = {"attention_mask": mask[:, :done], "position_ids": positions[:, part], "cache": cache}
        parts.append(model(IDS[:, part], **given).logits)
    return torch.cat(parts, 1)[seen(positions, mask)]


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_families_read_tokens_where_they_stand(model_of: Callable[..., Any], key: str) -> None:
    model = model_of(key)
    for positions, mask in (padded_right(), gaps()):
        got = in_parts(model, positions, mask, DynamicCache(config=model.config))
        torch.testing.assert_close(got, whole(model, positions, mask), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["llama-gqa", "mistral-window", "smollm3"])
@torch.no_grad()
def test_caches_and_kernels_read_tokens_where_they_stand(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, key: str, way: str
) -> None:
    """Kernels, which take it that tokens follow one another, are used where they do; a device is not asked in every step."""
    monkeypatch.setattr("kvshare.runtime.kvshare_attention.LONG", 1)
    model, (positions, mask) = model_of(key), WAYS[way]()
    for waits in (False, True):
        monkeypatch.setattr("kvshare.runtime.kvshare_positions._waits", lambda device, waits=waits: waits)
        if way == "gaps" and waits:  # what is not noticed there: a single token that jumps, when one before did not
            positions[:, 19:] -= 13
        expected = whole(model, positions, mask)
        for cache in (StaticCache(config=model.config, max_cache_len=40), DynamicCache(config=model.config)):
            torch.testing.assert_close(in_parts(model, positions, mask, cache), expected, atol=1e-4, rtol=1e-4)
            choice = model.get_decoder().kvshare_choice
            if way == "padded_left":
                assert choice.backend == "compiled"
            else:
                assert choice.reason == "positions of tokens do not follow one another"


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beam": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.filterwarnings("ignore:.*right-padding was detected")
@pytest.mark.parametrize("init", ["svd", "exact"])
@pytest.mark.parametrize(("mode", "holes"), in_turn(MODES, [True, False]))
def test_generation_equals_native(
    converted_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, init: str, mode: str, holes: bool
) -> None:
    monkeypatch.setattr("kvshare.runtime.kvshare_attention.LONG", 1)
    folder, sequences = converted_folder("tiny", "all", init), []
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER, padding_side="right")
    inputs = dict(tokenizer([TEXT[0], TEXT[1][:30]], return_tensors="pt", padding=True, return_token_type_ids=False))
    if holes:
        inputs["attention_mask"][0, 5:9] = 0
    for model in (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), kvshare.load(folder, dtype=torch.float32)):
        torch.manual_seed(2)
        sequences.append(model.generate(**inputs, max_new_tokens=12, **{"do_sample": False} | MODES[mode]))
    assert torch.equal(*sequences)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@torch.no_grad()
def test_a_tree_of_drafts(converted_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Two guesses beside one another, told apart by a mask; the cache goes on without them."""
    monkeypatch.setenv("KVSHARE_ATTENTION", backend)
    folder, found = converted_folder("tiny"), []
    parents = {20: [], 21: [20], 22: [20], 23: [20, 21], 24: [20, 22]}
    visible = torch.ones(1, 1, 5, 25, dtype=torch.bool)
    for place, parent in parents.items():
        visible[0, 0, place - 20, 20:] = False
        visible[0, 0, place - 20, [*parent, place]] = True
    positions = torch.tensor([[20, 21, 21, 22, 22]])
    for model in (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), kvshare.load(folder, dtype=torch.float32)):
        cache = DynamicCache(config=model.config)
        model(IDS[:1, :20], cache=cache)
        logits = [model(IDS[1:, :5], attention_mask=visible, position_ids=positions, cache=cache).logits]
        cache.crop(-4)
        logits += [model(IDS[1:, 5 + step : 6 + step], cache=cache).logits for step in range(3)]
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@torch.no_grad()
def test_tokens_that_are_taken_out_are_noticed(model_of: Callable[..., Any]) -> None:
    """As by hand to keep the first and the last ones, or the branch of a tree that was chosen."""
    model = model_of("llama-gqa")
    kept = torch.tensor([*range(4), *range(11, 20)])
    for positions in (torch.arange(20)[None], torch.tensor([[*range(17), 16, 17, 18]])):
        for in_place in (True, False):
            cache = DynamicCache(config=model.config)
            model(IDS[:1, :20], position_ids=positions, cache=cache)
            for layer in cache.layers:
                chosen = layer.keys[:, :, kept]
                if in_place:
                    layer.keys[:, :, :13].copy_(chosen)
                    chosen = layer.keys[:, :, :13]
                layer.keys, layer.values = chosen, layer.values[:, :, :13]
            with pytest.raises(ValueError, match=r"tokens were taken out of this cache|or tokens taken out"):
                model(IDS[:1, 20:21], position_ids=positions[:, -1:] + 1, cache=cache)
    # what is cropped goes on, also in another place
    cache = DynamicCache(config=model.config)
    model(IDS, cache=cache)
    cache = copy.deepcopy(cache)
    cache.crop(15 - IDS.shape[1])
    cache.batch_select_indices(torch.tensor([1]))
    expected = model(IDS[1:], use_cache=False).logits[:, 15:]
    torch.testing.assert_close(model(IDS[1:, 15:], cache=cache).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_rows_may_change_places(model_of: Callable[..., Any]) -> None:
    """Selected, repeated and copied; where their tokens do not follow one another, what comes must tell them apart."""
    model = model_of("llama-gqa")

    def filled(positions: Tensor, mask: Tensor) -> Any:
        cache = DynamicCache(config=model.config)
        for part in (slice(0, 18), slice(18, 19)):
            given = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            model(IDS[:, part], cache=cache, **given)
        return cache

    def behind(cache: Any, rows: list[int], positions: Tensor, mask: Tensor) -> Tensor:
        given = {"attention_mask": mask[rows], "position_ids": positions[rows, 19:]}
        logits: Tensor = model(IDS[rows, 19:], cache=cache, **given).logits
        return logits

    for way in ("padded_left", "padded_right"):
        positions, mask = WAYS[way]()
        expected = model(IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 19:]
        for rows in ([0, 1], [1, 0], [1], [0, 0, 1, 1]):
            cache = copy.deepcopy(filled(positions, mask))
            if rows == [0, 0, 1, 1]:
                cache.batch_repeat_interleave(2)
            else:
                cache.batch_select_indices(torch.tensor(rows))
            if way == "padded_left" or rows in ([0, 1], [0, 0, 1, 1]):
                torch.testing.assert_close(behind(cache, rows, positions, mask), expected[rows], atol=1e-4, rtol=0)
            else:
                with pytest.raises(ValueError, match="its rows were selected, reordered"):
                    behind(cache, rows, positions, mask)


@pytest.mark.usefixtures("compiling")
@torch.no_grad()
def test_what_is_compiled_refuses_them(model_of: Callable[..., Any]) -> None:
    """And sees no difference between caches of which other things are known."""
    model, graphs = model_of("llama-gqa"), CompileCounter()
    forward = torch.compile(model.forward, backend=graphs, fullgraph=True)
    for way, first, refused in (("padded_left", 18, False), ("padded_left", 16, False), ("padded_right", 18, True)):
        positions, mask = WAYS[way]()
        cache = StaticCache(config=model.config, max_cache_len=40)
        for part in (slice(0, first), slice(first, 19)):
            given = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            model(IDS[:, part], cache=cache, **given)
        given = {"attention_mask": mask[:, :20], "position_ids": positions[:, 19:20], "cache": cache}
        if refused:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="pad on the left"):
                forward(IDS[:, 19:20], **given)
        else:
            expected = model(IDS[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20], use_cache=False)
            torch.testing.assert_close(forward(IDS[:, 19:20], **given).logits[:, 0], expected.logits[:, -1], atol=1e-4, rtol=0)
            assert graphs.frame_count == 1


def test_a_cache_that_nobody_followed_has_tokens_in_order() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 0), 0)
    assert key_positions(cache, 0, torch.tensor([[5, 6], [3, 4]])).tolist() == [[*range(7)], [*range(-2, 5)]]


def test_what_is_recorded_is_made_of_the_positions_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of a step is replayed for others, by writing their positions where those of the first one were."""
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 0), 0)
    follow(cache, 0, torch.tensor([[5], [3]]), None)
    seen = cache.kvshare_seen
    assert key_positions(cache, 0, torch.tensor([[8], [3]])).tolist() == [[*range(6)], [*range(-2, 4)]]
    monkeypatch.setattr("kvshare.runtime.kvshare_positions._traced", lambda device: True)
    follow(cache, 0, torch.tensor([[8], [3]]), None)
    assert key_positions(cache, 0, torch.tensor([[8], [3]])).tolist() == [[*range(3, 9)], [*range(-2, 4)]]
    leave(cache, 0)
    assert cache.kvshare_seen is seen


def test_tables_that_are_all_alike_are_asked_for_without_a_kind_of_layer(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """phimoe's in transformers 5.4 take a kind of layer and know none."""
    native = modeling_phimoe.PhimoeRotaryEmbedding.forward

    def forward(self: Any, x: Any, position_ids: Any, layer_type: Any = None) -> Any:
        assert layer_type is None
        return native(self, x, position_ids)

    monkeypatch.setattr(modeling_phimoe.PhimoeRotaryEmbedding, "forward", forward)
    model, ids = model_of("phimoe"), torch.arange(100, 120)[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = torch.cat([model(part, cache=cache).logits for part in ids.split([17, 1, 2], 1)], 1)
        torch.testing.assert_close(parts, model(ids, use_cache=False).logits, atol=1e-4, rtol=0)
