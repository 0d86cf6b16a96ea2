"""Text becomes rows of tokens without loss, in an order that the seed decides; data that cannot be used is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from common import TEXT, TINY_FOLDER, edit_json
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

from kvshare import data as data_module
from kvshare import documents as documents_module
from kvshare.data import load_rows, load_tokenizer, self_rows, start_token, token_rows
from kvshare.documents import SEPARATOR, check_data, documents
from kvshare.errors import UsageError

TEXTS = [" ".join(TEXT[(i + j) % 4] for j in range(1 + i % 3)) + f" Number {i}." for i in range(30)]


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(TINY_FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same documents as text, JSON lines and parquet."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(SEPARATOR.join(TEXTS), encoding="utf-8")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in TEXTS), encoding="utf-8")
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "text.parquet")
    return {form: str(folder / f"text.{form}") for form in ("txt", "jsonl", "parquet")}


def write(folder: Path, text: str, name: str = "given.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refusal(action: Callable[[], object], *named: str) -> None:
    with pytest.raises(UsageError) as caught:
        action()
    text = str(caught.value)
    assert [line[:7] for line in text.splitlines()[1:]] == ["  why: ", "  do:  "]
    for name in named:
        assert name in text


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
def test_every_form_gives_the_documents(files: dict[str, str], form: str) -> None:
    assert list(documents(files[form])) == TEXTS


def test_rows_lose_nothing(files: dict[str, str], tokenizer: Any) -> None:
    expected = [token for text in TEXTS for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    for file in files.values():
        rows = token_rows(file, tokenizer, 10**6, 16)
        assert rows.dtype == torch.int64
        assert rows.shape == (len(expected) // 16, 16)
        assert rows.flatten().tolist() == expected[: rows.numel()]


def test_no_more_rows_than_asked_for(files: dict[str, str], tokenizer: Any) -> None:
    whole = token_rows(files["txt"], tokenizer, 10**6, 16)
    assert torch.equal(token_rows(files["txt"], tokenizer, 79, 16), whole[:4])
    assert torch.equal(token_rows(files["txt"], tokenizer, 3, 16), whole[:1])


@pytest.mark.parametrize("piece", [1, 2, 5, 7, 13, 14, 100])
def test_a_separator_across_two_reads_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    file = write(tmp_path, SEPARATOR.join(["one", " two\n", "", "<|endof", "three\r\nand <|>", "é" * 20]))
    opened = open

    class InPieces:
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self.stream = opened(*arguments, **settings)

        def __enter__(self) -> InPieces:
            return self

        def __exit__(self, *error: object) -> None:
            self.stream.close()

        def read(self, _size: int) -> str:
            return self.stream.read(piece)

    monkeypatch.setattr(documents_module, "open", InPieces, raising=False)
    assert [record["text"] for record in documents_module._text_documents(file)] == [
        "one",
        "two",
        "",
        "<|endof",
        "three\nand <|>",
        "é" * 20,
    ]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    assert list(documents(write(tmp_path, f"{SEPARATOR}\n{SEPARATOR}one{SEPARATOR}  {SEPARATOR}two{SEPARATOR}"))) == ["one", "two"]


@pytest.mark.parametrize("form", ["txt", "jsonl", "parquet"])
def test_the_seed_decides_the_order(files: dict[str, str], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the library sleeps for five seconds behind every shuffled parquet file
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    first, again, other = (list(documents(files[form], seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != TEXTS
    assert Counter(first) == Counter(other) == Counter(TEXTS)


def test_repeating_shuffles_anew(files: dict[str, str], tokenizer: Any) -> None:
    once = token_rows(files["txt"], tokenizer, 10**6, 8, seed=3)
    size = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
    assert once.numel() == size // 8 * 8
    twice = token_rows(files["txt"], tokenizer, 2 * size, 8, seed=3, repeat=True).flatten()
    assert len(twice) == 2 * size // 8 * 8
    assert torch.equal(twice[: once.numel()], once.flatten())
    second = twice[size:]
    assert not torch.equal(second[:100], twice[:100])
    assert Counter(second.tolist()) - Counter(twice[:size].tolist()) == Counter()


@pytest.mark.parametrize("closed", [False, True], ids=["as it is", "begun and closed by the tokenizer"])
@pytest.mark.parametrize(
    "text",
    [" ".join(TEXTS), "\n".join(TEXTS).replace(" ", "_"), "".join(TEXTS).replace(" ", "")],
    ids=["words", "lines", "neither"],
)
def test_long_documents_are_tokenised_in_pieces(
    tmp_path: Path, tokenizer: Any, text: str, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if closed:
        mark = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{mark} $A {mark}", special_tokens=[(mark, tokenizer.eos_token_id)]
        )
    given: list[str] = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, piece: str, **settings: Any) -> Any:
            given.append(piece)
            return tokenizer(piece, **settings)

    monkeypatch.setattr(data_module, "PIECE", 256)
    counting: Any = Counting()
    ids = token_rows(write(tmp_path, text), counting, 10**6, 1).flatten()
    assert len(given) > 5
    assert max(map(len, given)) <= 256
    assert "".join(given) == text
    whole = tokenizer(text)["input_ids"]
    whole = whole if closed else [*whole, tokenizer.eos_token_id]
    assert ids.tolist().count(tokenizer.eos_token_id) == 1 + closed
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    if " " in text:
        assert ids.tolist() == whole
    given.clear()
    few = token_rows(write(tmp_path, text), counting, 64, 64).flatten()
    assert torch.equal(few, ids[:64])
    assert sum(map(len, given)) <= 512  # the others are not looked at


def test_text_that_fills_no_row_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    refusal(lambda: token_rows(write(tmp_path, "too little"), tokenizer, 100, 64), "too little text", "one row of 64")
    for empty in ("", f" \n{SEPARATOR} "):
        refusal(lambda empty=empty: token_rows(write(tmp_path, empty), tokenizer, 100, 64, repeat=True), "0 tokens")


@pytest.mark.parametrize("content", ['{"body": "x"}', '{"text": null}', '{"text": 3}', "[3]", "no json"])
def test_records_without_text_are_refused(tmp_path: Path, content: str) -> None:
    file = write(tmp_path, content, "given.jsonl")
    refusal(lambda: list(documents(file)), file)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    for name in ("given.parquet", "given.txt"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 not what it says")
        refusal(lambda name=name: list(documents(str(tmp_path / name))), name)


@pytest.mark.parametrize(
    "data", ["text.docx", "text", "", "a/b/c/d", "folder/text.csv", "org/name:train[:1%]", "self ", "https://example.org/text"]
)
def test_unknown_forms_are_refused(data: str) -> None:
    refusal(lambda: check_data(data), repr(data), "'self'")


def test_forms_that_are_known() -> None:
    for data in (
        "self",
        "org/name",
        "org/name/config",
        "org/name:train",
        "org/name/config:train",
        "wikimedia/wikipedia/20231101.en:train",
    ):
        check_data(data)
    refusal(lambda: check_data("missing/text.txt"), "no file missing/text.txt")


def test_a_data_set_that_cannot_be_reached_is_refused() -> None:
    refusal(lambda: list(documents("nobody/has-this-data")), "nobody/has-this-data")


def test_a_tokenizer_without_ends_is_refused(files: dict[str, str], tokenizer: Any, model: Any) -> None:
    tokenizer.eos_token = None
    assert start_token(tokenizer) == tokenizer.bos_token_id
    refusal(lambda: token_rows(files["txt"], tokenizer, 100, 16), "no eos token")
    assert self_rows(model, tokenizer, 8, 8, 0).shape == (1, 8)
    tokenizer.bos_token = None
    refusal(lambda: self_rows(model, tokenizer, 8, 8, 0), "neither a bos nor an eos token")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINY_FOLDER / "config.json").read_text())
    refusal(lambda: load_tokenizer(tmp_path), str(tmp_path))


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_FOLDER / name, tmp_path / name)
    edit_json(tmp_path / "tokenizer_config.json", lambda settings: settings.update(model_max_length=[]))
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_the_model_writes_the_same_text_for_the_same_seed(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "SAMPLE_ROWS", 64)
    carried = model.generation_config
    before, state = carried.to_dict(), torch.get_rng_state()
    first = self_rows(model, tokenizer, 70 * 12, 12, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is carried
    assert carried.to_dict() == before
    torch.manual_seed(99)
    assert torch.equal(self_rows(model, tokenizer, 70 * 12, 12, 5), first)
    assert not torch.equal(self_rows(model, tokenizer, 70 * 12, 12, 6), first)
    assert first.shape == (70, 12)
    assert set(first[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert len({tuple(row) for row in first.tolist()}) > 60


def test_the_model_writes_on_through_ends_and_against_its_own_settings(model: Any, tokenizer: Any) -> None:
    expected = self_rows(model, tokenizer, 64 * 20, 20, 5)
    end = int(expected[0, 3])  # a token that occurs is made the end of every document
    carried = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=end, do_sample=False, repetition_penalty=5.0, max_length=4
    )
    try:
        assert torch.equal(self_rows(model, tokenizer, 64 * 20, 20, 5), expected)
    finally:
        model.generation_config = carried


def test_the_text_of_self_follows_the_model(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        loss = model(rows := self_rows(model, tokenizer, 16 * 32, 32, 1), labels=rows).loss
        noise = torch.randint(1, 4096, rows.shape, generator=torch.Generator().manual_seed(0))
        assert loss + 2 < model(noise, labels=noise).loss


def test_self_needs_the_model(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "SAMPLE_ROWS", 64)
    seen: list[tuple[str, int, int]] = []
    rows = load_rows("self", tokenizer, model, 65 * 4, 4, 2, progress=lambda *report: seen.append(report))
    assert torch.equal(rows, self_rows(model, tokenizer, 65 * 4, 4, 2))
    stages, done, totals = zip(*seen, strict=True)
    assert (set(stages), set(totals)) == ({"writing text with the source model"}, {65 * 4})
    assert done == (0, 128, 192, 256, 258, 259, 260)  # token by token, 64 rows and then one
    with pytest.raises(ValueError, match="source model"):
        load_rows("self", tokenizer, None, 100, 10, 0)


def test_a_file_is_never_taken_for_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one/two", "one/more/three.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
        refusal(lambda name=name: check_data(name), repr(name), "no known form")
    refusal(lambda: check_data("one/more/missing.txt"), "no file one/more/missing.txt")
