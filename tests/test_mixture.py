"""Mixtures keep their shares at every step, give the rows that their texts give, and are refused where they cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import TINY_FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare.data import PART_SEED, SelfCache, check_tokenizer, load_rows, load_tokenizer, token_rows
from kvshare.documents import check_data
from kvshare.errors import UsageError
from kvshare.mixture import Part, named, parts_of, turns, uses_self
from kvshare.recipe import load_recipe


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    for name, word in (("a", "sea"), ("b", "tree")):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(f"{word} {i}. " * 20 for i in range(30)))
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


class Writer:
    """Stands for a model that writes text: counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, _model: Any, _tokenizer: Any, tokens: int, length: int, seed: int, _progress: Any = None) -> torch.Tensor:
        self.asked += 1
        return torch.full((max(1, tokens // length), length), seed)


def test_a_text_alone_is_no_mixture(tmp_path: Path) -> None:
    for data in ("self", "text.txt", "org/name:train", "a,b.txt"):
        assert parts_of(data) == (Part(data, 1.0),)
    odd = tmp_path / "a=1,b=2.txt"
    odd.touch()
    assert parts_of(str(odd)) == (Part(str(odd), 1.0),)
    assert named(str(odd)) == "a=1,b=2.txt"


def test_weights_become_shares() -> None:
    assert parts_of("a.jsonl=3, org/name/part:train=1") == (Part("a.jsonl", 0.75), Part("org/name/part:train", 0.25))
    assert [part.share for part in parts_of("a.txt=0.1,b.txt=0.3")] == pytest.approx([0.25, 0.75])
    assert parts_of("odd=name.txt=2") == (Part("odd=name.txt", 1.0),)
    assert [uses_self(data) for data in ("self", "self=1,a.txt=1", "a.txt=1,b.txt=2", "a.txt")] == [True, True, False, False]
    assert named("/some/where/a.txt=3,self=1,org/name=0.5") == "a.txt=3,self=1,org/name=0.5"


@pytest.mark.parametrize(
    "data", ["a.txt=0", "a.txt=-1", "a.txt=nan", "a.txt=inf", "a.txt=x", "a.txt=1,b.txt", "=1", "a.txt=1,a.txt=2", "a.txt=1,,"]
)
def test_what_is_no_mixture_is_refused(data: str) -> None:
    with pytest.raises(UsageError, match="mixture"):
        check_data(data)


def test_every_part_is_checked(texts: tuple[str, str], tokenizer: Any) -> None:
    check_data(f"{texts[0]}=1,{texts[1]}=1,self=2")
    with pytest.raises(UsageError, match=r"no file missing\.txt"):
        check_data(f"{texts[0]}=1,missing.txt=1")
    tokenizer = load_tokenizer(TINY_FOLDER)
    tokenizer.eos_token = None
    check_tokenizer(tokenizer, "self=1")
    with pytest.raises(UsageError, match="no eos token"):
        check_tokenizer(tokenizer, f"self=1,{texts[0]}=1")


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5), rows=st.integers(1, 200))
def test_shares_hold_at_every_step(weights: list[float], rows: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    order = turns(shares, rows)
    assert len(order) == rows
    assert order == turns(shares, rows + 7)[:rows]
    for done in range(1, rows + 1):
        for part, share in enumerate(shares):
            assert order[:done].count(part) - share * done < 1 + 1e-9  # never ahead of its share by a row


def test_rows_of_a_mixture_are_those_of_its_texts(texts: tuple[str, str], tokenizer: Any) -> None:
    rows = load_rows(f"{texts[0]}=3,{texts[1]}=1", tokenizer, None, 40 * 16, 16, 5, repeat=True)
    assert rows.shape == (40, 16)
    order = turns([0.75, 0.25], 40)
    assert (order.count(0), order.count(1)) == (30, 10)
    for index, text in enumerate(texts):
        own = token_rows(text, tokenizer, order.count(index) * 16, 16, 5 + PART_SEED * index, repeat=True)
        assert torch.equal(rows[[turn == index for turn in order]], own)
    assert torch.equal(load_rows(f"{texts[0]}=2", tokenizer, None, 160, 16, 5), load_rows(texts[0], tokenizer, None, 160, 16, 5))


def test_a_text_that_is_used_up_ends_the_mixture(texts: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("some words " * 40)
    few = len(token_rows(str(tmp_path / "short.txt"), tokenizer, 10**6, 16))
    rows = load_rows(f"{texts[0]}=1,{tmp_path / 'short.txt'}=1", tokenizer, None, 10**4, 16, 5)
    assert len(rows) == 2 * few + 1
    assert len(load_rows(f"{texts[0]}=1,{tmp_path / 'short.txt'}=1", tokenizer, None, 10**4, 16, 5, repeat=True)) == 10**4 // 16


def test_what_a_model_wrote_is_not_written_again(
    tokenizer: Any, texts: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer()
    monkeypatch.setattr("kvshare.data.self_rows", writer)
    cache, model = SelfCache(tmp_path, "a model"), object()

    def rows(cache: SelfCache | None = cache, data: str = "self", tokens: int = 64, seed: int = 3) -> torch.Tensor:
        return load_rows(data, tokenizer, model, tokens, 8, seed, cache=cache)

    first = rows()
    assert torch.equal(rows(), first)
    assert writer.asked == 1
    for other in (
        {"seed": 4},
        {"tokens": 128},
        {"cache": SelfCache(tmp_path, "another model")},
        {"cache": None},
        {"cache": None},
    ):
        before = writer.asked
        rows(**other)
        assert writer.asked == before + 1
    before = writer.asked
    mixed = rows(data=f"{texts[0]}=1,self=1")
    assert torch.equal(rows(data=f"{texts[0]}=1,self=1"), mixed)
    assert mixed.shape == (8, 8)
    assert set(mixed[1::2].flatten().tolist()) == {3 + PART_SEED}
    assert writer.asked == before + 1
    assert not list(tmp_path.glob("*.part"))


def test_a_recipe_may_write_a_mixture_as_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("heal: {data: {a.jsonl: 3, org/name:train: 0.5}}\ncalibration: {data: self=1}")
    recipe = load_recipe(file)
    assert recipe.heal.data == "a.jsonl=3,org/name:train=0.5"
    assert recipe.calibration.data == "self=1"
    for wrong in ("{a.jsonl: [1]}", "{a.jsonl: yes}", "{'a,b': 1}", "{3: 1}", "{}", "{a.jsonl: x}"):
        file.write_text(f"heal: {{data: {wrong}}}")
        with pytest.raises(UsageError, match=r"heal\.data"):
            load_recipe(file)
