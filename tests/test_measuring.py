"""What an evaluation can measure beyond its first figures: identities, rigged models, two ways that agree."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as llama
from common import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import kvshare
from kvshare.data import load_tokenizer, token_rows
from kvshare.errors import UsageError
from kvshare.evaluation import compare, compare_quantised, generated_cache
from kvshare.figures import share_and_error
from kvshare.loading import load_native, plain_forward
from kvshare.positions import by_position, window_losses
from kvshare.quantised import quantised_bytes, round_trip, through_quantised_cache
from kvshare.retrieval import DEPTHS, answered, passkey_prompts, recall_prompts
from kvshare.source import TINY, open_source
from kvshare.tasks import _manager, run_tasks

CPU = torch.device("cpu")


def strict(text: str) -> Any:
    """JSON without NaN and Infinity, which are none."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(open_source(TINY).path)


@pytest.fixture(scope="module")
def source(source_folder: Callable[[str], Path]) -> Any:
    return load_native(source_folder("llama-gqa"), dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def rows(tokenizer: Any, text_file: str) -> Tensor:
    return token_rows(text_file, tokenizer, 8 * 48, 48)


def test_figures_by_position_average_to_those_of_all() -> None:
    torch.manual_seed(0)
    kl, agreement = torch.rand(5, 37, dtype=torch.float64), (torch.rand(5, 37) > 0.4).double()
    found = by_position(kl, agreement)
    assert [(p.first, p.last) for p in found] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 37)]
    counts = [p.last - p.first + 1 for p in found]
    assert sum(n * p.kl for n, p in zip(counts, found, strict=True)) / 37 == pytest.approx(float(kl.mean()))
    assert sum(n * p.token_agreement for n, p in zip(counts, found, strict=True)) / 37 == pytest.approx(float(agreement.mean()))
    assert found[0].kl_error == pytest.approx(float(kl[:, 0].std()) / 5**0.5)


def test_windows_that_do_not_overlap_are_rows(source: Any, rows: Tensor) -> None:
    losses, scored = window_losses(plain_forward(source), rows, 12, 12, 4096, CPU)
    assert scored == 4 * 11
    for row, loss in zip(rows, losses, strict=True):
        parts = [float(source(input_ids=part[None], labels=part[None]).loss) for part in row.view(4, 12)]
        assert float(loss) == pytest.approx(sum(parts) / 4, rel=1e-5)


@pytest.mark.parametrize("length", [24, 21])  # the last window of the second ends with the row
def test_sliding_windows_score_every_token_once(source: Any, rows: Tensor, length: int) -> None:
    ids, context, stride = rows[:2, :length], 8, 4
    losses, scored = window_losses(plain_forward(source), ids, context, stride, 4096, CPU)
    assert scored == length - 1
    expected = torch.zeros(2, dtype=torch.float64)
    for target in range(1, length):
        start = min(max(0, -(-(target - context + 1) // stride) * stride), length - context)
        logits = source(input_ids=ids[:, start:target]).logits[:, -1].double()
        expected += torch.nn.functional.cross_entropy(logits, ids[:, target], reduction="none")
    assert torch.allclose(losses, expected / scored, rtol=1e-5)


def test_a_source_against_itself_loses_nothing(source: Any, rows: Tensor) -> None:
    report = compare(source, source, rows, "text", 4, positions=True)
    assert (report.kl, report.token_agreement, report.perplexity_increase, report.cache_reduction) == (0, 1, 0, 0)
    assert {(p.kl, p.token_agreement) for p in report.positions} == {(0, 1)}


def integers(x: Tensor, bits: int) -> Tensor:
    """Through tensors of int8, as a cache that really holds them would."""
    most = {8: 127, 4: 7}[bits]
    scale = (x.abs().max(dim=3, keepdim=True)[0] / most).to(torch.float16)
    held = torch.round(x / scale.float()).to(torch.int16).clamp(-most, most).to(torch.int8)
    return held.float() * scale.float()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_cache_is_read_as_integers(source: Any, rows: Tensor, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # one implementation for both: the least difference in a hidden state may round a number of the next layer the other way
    monkeypatch.setattr(source.config, "_attn_implementation", "eager")
    given, unrounded = through_quantised_cache(source, bits)(rows[:2]), plain_forward(source)(rows[:2])
    eager = llama.eager_attention_forward

    def rounding(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return eager(module, query, integers(key, bits), integers(value, bits), *args, **kwargs)

    monkeypatch.setattr(llama, "eager_attention_forward", rounding)
    expected = plain_forward(source)(rows[:2])
    assert torch.allclose(given, expected, atol=1e-5)
    assert (unrounded - expected).abs().max() > 1e-3


def test_rounding_keeps_what_it_can() -> None:
    x = torch.tensor([[[[-7.0, 0, 3, 7]], [[0, 0, 0, 0]]]])
    assert torch.equal(round_trip(x, 4), x)
    assert round_trip(x[..., :0], 4).shape == (1, 2, 1, 0)
    noise = torch.randn(2, 3, 50, 16)
    for bits, steps in ((8, 127), (4, 7), (2, 1)):
        limit = noise.abs().amax(-1, keepdim=True) / steps * 0.501
        assert bool(((round_trip(noise, bits) - noise).abs() <= limit).all())


def test_bytes_of_a_quantised_cache(converted_folder: Callable[..., Path], source: Any, rows: Tensor) -> None:
    model = kvshare.load(converted_folder("llama-gqa"), dtype=torch.float32)
    for net, tensors in ((source, 2), (model, 1)):
        cache = generated_cache(net, rows[0, :16])
        # per token: 2 layers, 4 heads of 8 numbers, and a scale of 2 bytes each
        assert quantised_bytes(cache, 8) == cache.get_seq_length() * tensors * 2 * 4 * (8 + 2)
        assert quantised_bytes(cache, 4) == cache.get_seq_length() * tensors * 2 * 4 * (4 + 2)
    figures = compare_quantised(model, source, rows, 8, 4)
    assert figures.cache_bytes_per_token == 80
    assert figures.cache_reduction == 1 - 80 / (2 * 2 * 4 * 8 * 4)


def copier(ids: Tensor) -> Tensor:
    """A model that goes on as the text went on after the longest stretch that it has seen before."""
    logits = torch.zeros(*ids.shape, 4096)
    for row, tokens in enumerate(ids.tolist()):
        for here in range(1, len(tokens)):
            best, follows = 0, 0
            for before in range(here):
                same = 0
                while same <= before and tokens[before - same] == tokens[here - same]:
                    same += 1
                if same > best:
                    best, follows = same, tokens[before + 1]
            logits[row, here, follows] = 1
    return logits


def silence(ids: Tensor) -> Tensor:
    """A model that says the end-of-sequence token whatever it is given."""
    return torch.nn.functional.one_hot(torch.zeros_like(ids), 4096).float()


def test_who_copies_recalls_all_and_who_does_not_nothing(tokenizer: Any) -> None:
    prompts = [*recall_prompts(tokenizer, 4, 12, 3), *recall_prompts(tokenizer, 16, 6, 3)]
    prompts += [*passkey_prompts(tokenizer, 96, 0.5, 2, 3), *passkey_prompts(tokenizer, 128, 1.0, 1, 3)]
    assert answered(copier, prompts, CPU, batch=5).all()
    assert not answered(silence, prompts, CPU).any()
    assert share_and_error(torch.tensor([True, True, True, False])) == (0.75, (0.75 * 0.25 / 4) ** 0.5)


def test_answers_stay_with_their_prompts(tokenizer: Any) -> None:
    prompts = [p for n in (16, 4, 16, 4) for p in recall_prompts(tokenizer, n, 2, n)]
    knows = {p.ids for p in prompts[::3]}

    def some(ids: Tensor) -> Tensor:
        known = torch.tensor([any(tuple(row[: len(ids_)].tolist()) == ids_ for ids_ in knows) for row in ids])
        return copier(ids) * known[:, None, None] + silence(ids) * ~known[:, None, None]

    assert answered(some, prompts, CPU, batch=3).tolist() == [p.ids in knows for p in prompts]


def tokenizers() -> dict[str, Any]:
    """Bytes without merges; pieces that carry their space in front, as SentencePiece has them; whole words."""
    letters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    )
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(TEXT, trainers.WordLevelTrainer(show_progress=False, special_tokens=["<unk>"]))
    return {
        "bytes": PreTrainedTokenizerFast(tokenizer_object=letters),
        "pieces": PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>"),
        "words": PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"),
    }


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_recall_prompts_are_text_of_any_tokenizer(kind: str) -> None:
    own = tokenizers()[kind]
    prompts = recall_prompts(own, 4, 8, 0)
    assert prompts == recall_prompts(own, 4, 8, 0)
    assert prompts != recall_prompts(own, 4, 8, 1)
    for prompt in prompts:
        keys, values, asked = prompt.ids[:8:2], prompt.ids[1:8:2], prompt.ids[8]
        assert len({*keys, *values}) == 8
        assert prompt.answer == (values[keys.index(asked)],)
        text = own.decode([*prompt.ids, *prompt.answer])
        assert tuple(own(text, add_special_tokens=False)["input_ids"])[1:] == (*prompt.ids, *prompt.answer)[1:]
    with pytest.raises(UsageError, match="a larger vocabulary"):
        recall_prompts(own, 200, 1, 0)


def test_passkeys_stand_where_they_should(tokenizer: Any) -> None:
    places = []
    for depth in DEPTHS:
        (prompt,) = passkey_prompts(tokenizer, 256, depth, 1, 0)
        assert 240 <= len(prompt.ids) + len(prompt.answer) <= 256
        text = tokenizer.decode(prompt.ids)
        key = tokenizer.decode(prompt.answer).strip()
        assert (len(key), text.count(key)) == (5, 2)
        places.append(text.index(key) / len(text))
    assert places == sorted(places)
    assert places[0] < 0.2
    assert places[-1] > 0.8
    with pytest.raises(UsageError, match="does not fit 40 tokens"):
        passkey_prompts(tokenizer, 40, 0.5, 1, 0)


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of lm-eval that needs no network: which of two words goes on."""
    folder = tmp_path_factory.mktemp("task")
    questions = [{"question": text, "choices": ["sea", "letter"], "answer": i % 2} for i, text in enumerate(TEXT)]
    (folder / "trivia.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "trivia.yaml").write_text(
        f"""task: kvshare_trivia
dataset_path: json
dataset_kwargs: {{data_files: {folder / "trivia.jsonl"}}}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return str(folder / "trivia.yaml")


@pytest.fixture
def offline_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the datasets library may keep what it has read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.usefixtures("offline_data")
def test_a_task_is_answered_by_likelihood(source: Any, tokenizer: Any, task_file: str) -> None:
    (value,) = run_tasks(source, tokenizer, [task_file], plain_forward(source))
    assert "hellaswag" not in _manager([task_file]).all_tasks  # the thousands that come with lm-eval are not read for it
    right = []
    for index, text in enumerate(TEXT):
        prompt = tokenizer(text)["input_ids"]
        likely = []
        for choice in ("sea", "letter"):
            ids = tokenizer(f"{text} {choice}")["input_ids"]
            predicted = plain_forward(source)(torch.tensor([ids])).log_softmax(-1)[0, :-1]
            likely.append(float(predicted.gather(-1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :].sum()))
        right.append(likely.index(max(likely)) == index % 2)
    assert (value.task, value.metric, value.value) == ("kvshare_trivia", "acc", sum(right) / 4)
    assert value.error == pytest.approx((value.value * (1 - value.value) / 3) ** 0.5)


def test_several_checkpoints_side_by_side(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], text_file: str
) -> None:
    folders = [converted_folder("llama-gqa"), converted_folder("llama-gqa", 2)]
    asked: dict[str, Any] = {"contexts": [80, 96], "by_position": True, "recall": 3, "passkey": 1, "cache_bits": [8], "tokens": 512}
    both = kvshare.evaluate(folders, source_folder("llama-gqa"), text_file, **asked)
    alone = kvshare.evaluate(folders[1], source_folder("llama-gqa"), text_file, **asked)
    assert alone.to_dict() == both[1].to_dict()
    values = strict(json.dumps(both[0].to_dict()))
    assert values["perplexity_error"] is None  # of a single row, none is known
    assert values["source_quantised"] == strict(json.dumps(both[1].to_dict()))["source_quantised"]
    assert [(c["context"], c["tokens"]) for c in values["contexts"]] == [(80, 2 * 191), (96, 2 * 191)]
    assert [q["pairs"] for q in values["recall"]] == [4, 16, 64]
    assert [(k["context"], k["depth"]) for k in values["passkey"]] == [(c, d) for c in (80, 96) for d in DEPTHS]
    weights = [p["last"] - p["first"] + 1 for p in values["positions"]]
    mean = sum(w * p["kl"] for w, p in zip(weights, values["positions"], strict=True)) / sum(weights)
    assert mean == pytest.approx(values["kl"], rel=1e-4)
    assert values["quantised"][0]["cache_bytes_per_token"] * 2 == values["source_quantised"][0]["cache_bytes_per_token"]
    for c in values["contexts"]:
        assert c["perplexity_increase"] == pytest.approx(c["perplexity"] / c["source_perplexity"] - 1)
    plain = kvshare.evaluate(folders[0], source_folder("llama-gqa"), text_file, tokens=512).to_dict()
    assert not {"contexts", "positions", "recall", "passkey", "tasks", "quantised", "source_quantised"} & plain.keys()
    assert plain.items() <= both[0].to_dict().items()


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"contexts": [600]}, "the models take 512 at most"),
        ({"contexts": [1]}, "contexts.0 = 1"),
        ({"cache_bits": [9]}, "cache_bits.0 = 9"),
        ({"recall": -1}, "recall = -1"),
        ({"passkey": 1, "contexts": [40]}, "does not fit 40 tokens"),
        ({"tasks": ["hellaswagg"]}, "did you mean 'hellaswag"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    text_file: str,
    asked: dict[str, Any],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def one_folder(_: bool) -> Any:
        """Of the thousands of files that come with lm-eval, reading which takes many seconds."""
        from lm_eval import tasks

        folder = Path(tasks.__file__).parent / "hellaswag"
        return tasks.TaskManager(include_path=str(folder), include_defaults=False)

    monkeypatch.setattr("kvshare.tasks._index", one_folder)
    with pytest.raises(UsageError, match=named):
        kvshare.evaluate(converted_folder("llama-gqa"), source_folder("llama-gqa"), text_file, tokens=512, **asked)


def test_coarse_caches_of_the_exact_form_are_refused(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], text_file: str
) -> None:
    exact = converted_folder("llama-mha", "all", "exact")
    with pytest.raises(UsageError, match="coarse keys would give wrong ones"):
        kvshare.evaluate(exact, source_folder("llama-mha"), text_file, tokens=512, cache_bits=[8])


def test_without_lm_eval_a_task_says_how_to_get_it(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError) as refused:
        kvshare.evaluate(converted_folder("llama-gqa"), source_folder("llama-gqa"), text_file, tasks=["arc_easy"])
    assert str(refused.value).splitlines()[1:] == ["  why: lm-eval is not installed", "  do:  pip install 'kvshare[tasks]'"]
