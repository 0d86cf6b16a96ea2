"""A cache that grows where it lies holds what one that is copied in every step would hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvshare
from kvshare.runtime.kvshare_cache import CACHE_NAMES, ROOM, appended, cache_of, into_pages, passed_on

IDS = torch.arange(100, 770)[None]  # of so many tokens, memory has room for ten more
BITS = (None, 8, 4)


@pytest.fixture
def model_with(converted_folder: Callable[..., Path]) -> Callable[..., Any]:
    return lambda bits: kvshare.load(converted_folder("tiny"), dtype=torch.float32, cache_bits=bits)


@torch.no_grad()
def test_what_is_appended_lies_behind_what_was_there() -> None:
    held = torch.randn(2, 3, 640, 4)
    whole, given, begins = held, [held], set()
    for new in (1, 1, 1, 5, 1, 1, 1, 1, 40, 1, 1):
        piece = torch.randn(2, 3, new, 4)
        held, whole = appended(held, piece), torch.cat([whole, piece], -2)
        assert torch.equal(held, whole)
        assert held.untyped_storage().nbytes() <= whole.nbytes * (1 + 1 / ROOM)
        given.append(held)
        begins.add(held.data_ptr())
    assert len(begins) == 3  # memory was taken for the first token, behind the tenth and for the forty
    for earlier in given:
        assert torch.equal(earlier, whole[:, :, : earlier.shape[2]])


@torch.no_grad()
def test_whoever_comes_second_gets_memory_of_its_own() -> None:
    first = appended(torch.randn(1, 2, 640, 4), torch.randn(1, 2, 1, 4))
    pieces = [torch.full((1, 2, 1, 4), float(number)) for number in range(3)]
    grown = [appended(start, piece) for start, piece in zip((first, first, first[:, :, :-1]), pieces, strict=True)]
    for start, piece, held in zip((first, first, first[:, :, :-1]), pieces, grown, strict=True):
        assert torch.equal(held, torch.cat([start, piece], -2))
    assert len({held.data_ptr() for held in grown}) == 3
    copied = copy.deepcopy(grown[0])
    assert appended(copied, pieces[1]).data_ptr() == copied.data_ptr() != grown[0].data_ptr()
    assert torch.equal(grown[0], torch.cat([first, pieces[0]], -2))


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_a_step_of_decoding_copies_nothing_but_its_token(model_with: Callable[..., Any], bits: int | None) -> None:
    model = model_with(bits)
    cache, places = DynamicCache(config=model.config), []
    for part in IDS.split([660, *[1] * 5, 5], 1):
        logits = model(part, cache=cache).logits
        places.append([(layer.keys.data_ptr(), layer.keys.shape[2], layer.values.shape[2]) for layer in cache.layers])
    torch.testing.assert_close(logits, model(IDS, cache=DynamicCache(config=model.config)).logits[:, -5:], atol=1e-3, rtol=0)
    for first, *others in zip(*places[1:-1], strict=True):
        assert others == [(first[0], first[1] + step, first[2] + step) for step in range(1, 5)]


@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_branches_of_a_cache_do_not_meet(model_with: Callable[..., Any], bits: int | None) -> None:
    """Copied whole, copied so that both hold the same tensors, cropped, reordered, offered back as they were."""
    model = model_with(bits)

    def filled() -> Any:
        cache = DynamicCache(config=model.config)
        for part in IDS[:, :652].split([650, 1, 1], 1):
            model(part, cache=cache)
        return cache

    def shallow(cache: Any) -> Any:
        other = copy.copy(cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        return other

    def cropped(cache: Any) -> Any:
        other = shallow(cache)
        other.crop(-2)
        model(IDS[:, 650:652], cache=other)
        return other

    def reordered(cache: Any) -> Any:
        other = shallow(cache)
        other.reorder_cache(torch.zeros(1, dtype=torch.long))
        return other

    def offered(cache: Any) -> Any:
        kept, other = [(layer.keys, layer.values) for layer in cache.layers], shallow(cache)
        model(IDS[:, 660:662], cache=other)
        for layer, (keys, values) in zip(other.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        return other

    def through(cache: Any, first: int) -> Tensor:
        return torch.cat([model(part, cache=cache).logits for part in IDS[:, first : first + 3].split(1, 1)], 1)

    def walked(caches: list[Any]) -> list[Tensor]:
        begun = [through(cache, first) for cache, first in zip(caches, (20, 40), strict=True)]
        return [torch.cat([logits, through(cache, 60)], 1) for cache, logits in zip(caches, begun, strict=True)]

    alone = walked([filled(), filled()])
    for branch in (copy.deepcopy, shallow, cropped, reordered, offered):
        for found, expected in zip(walked([trunk := filled(), branch(trunk)]), alone, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_modes_of_torch_may_change_between_steps(model_with: Callable[..., Any]) -> None:
    model = model_with(None)
    cache, modes = DynamicCache(config=model.config), (torch.no_grad, torch.inference_mode, torch.no_grad, torch.enable_grad)
    parts = []
    for part, mode in zip(IDS[:, :658].split([650, 2, 2, 2, 2], 1), (*modes, torch.no_grad), strict=True):
        with mode():
            parts.append(model(part, cache=cache).logits)
    assert parts[3].requires_grad
    parts[3].sum().backward()  # what it holds was not written over
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), model(IDS[:, :658]).logits, atol=1e-3, rtol=0)


class Pages:
    """As continuous batching hands them on; since transformers 5.24 attention fills them."""

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        kwargs["length"] = layer
        return key + 1, value + 2


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_pages_are_told_from_caches(name: str) -> None:
    """A cache comes by any name and goes by that of the native class; pages stay among the arguments until attention fills them."""
    cache, pages = DynamicCache(), Pages()
    for arguments, given in (({"cache": cache}, None), ({"layer_past": cache}, None), ({}, cache), ({"cache": None}, cache)):
        assert cache_of(given, arguments) is cache
        assert passed_on(name, cache, arguments) == {name: cache}
    arguments = {"cache": pages, "scaling": 1.0}
    assert cache_of(None, arguments) is None
    assert passed_on(name, None, arguments) == {"cache": pages, "scaling": 1.0}
    key, value = into_pages(name, torch.zeros(1), torch.zeros(1), 3, arguments)
    if name == "cache":
        assert (key.item(), value.item(), arguments) == (1, 2, {"scaling": 1.0, "length": 3})
    else:
        assert (key.item(), value.item(), arguments) == (0, 0, {"cache": pages, "scaling": 1.0})
    assert into_pages(name, key, value, 3, {})[0] is key
