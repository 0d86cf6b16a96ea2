"""What a model finds again in its context: questions from a file, key-value pairs, a passkey.

In: a forward and a tokenizer. Out: which answers were right. Never: samples from a model, loads one.

An answer is right when every token of it is the most likely one, given those before it: what greedy decoding would write.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.errors import UsageError
from kvshare.loading import Forward, plain_forward
from kvshare.parsing import parse_json, read_bytes

POOL = 512  # tokens that keys and values are drawn from, where the tokenizer has as many
RECALL_PAIRS = (4, 16, 64)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DRAWS = 100  # of one prompt, until its text is tokenised as it was drawn
INTRODUCTION = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
FILLER = (" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.")


@dataclass(frozen=True)
class Question:
    """A prompt whose answer stands in it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """A question in tokens."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class RecallFigures:
    """The share of `questions` answered about `pairs` of key and value in the context, with binomial standard errors."""

    pairs: int
    questions: int
    seed: int
    accuracy: float
    accuracy_error: float
    source_accuracy: float
    source_accuracy_error: float


@dataclass(frozen=True)
class PasskeyFigures:
    """The share of `keys` found at `depth` (0 the start, 1 the end) of a text of `context` tokens; binomial standard errors."""

    context: int
    depth: float
    keys: int
    seed: int
    accuracy: float
    accuracy_error: float
    source_accuracy: float
    source_accuracy_error: float


def read_questions(file: Path) -> list[Question]:
    """Recall questions: a `.jsonl` with `prompt` and `answer`.

    Raises:
        UsageError: the file cannot be read or lacks these fields.
    """
    try:
        lines = [line for line in read_bytes(file).splitlines() if line.strip()]
        questions = [Question(*(_said(record, field) for field in ("prompt", "answer"))) for record in map(parse_json, lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the questions in {file} cannot be read", repr(error), "give a .jsonl with 'prompt' and 'answer'"
        ) from None
    if not questions:
        raise UsageError(f"{file} holds no questions", "it is empty", "give a .jsonl with 'prompt' and 'answer'")
    return questions


def _said(record: Any, field: str) -> str:
    text = str(record[field])
    text.encode()  # half a surrogate pair is no text
    if not text.strip():
        raise ValueError(f"a question has an empty {field}")
    return text


@torch.no_grad()
def answered(forward: Forward, prompts: Sequence[Prompt], device: torch.device, batch: int = 32) -> Tensor:
    """Which prompts are answered, (prompts,), bool, on the CPU; `batch` prompts of about equal length per forward."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids) + len(prompts[i].answer))
    right = torch.zeros(len(prompts), dtype=torch.bool)
    for start in range(0, len(order), batch):
        group = [(i, prompts[i]) for i in order[start : start + batch]]
        length = max(len(prompt.ids) + len(prompt.answer) for _, prompt in group)
        # causal attention: what stands to the right of an answer cannot change it
        rows = [[*p.ids, *p.answer, *[0] * (length - len(p.ids) - len(p.answer))] for _, p in group]
        best = forward(torch.tensor(rows, device=device)).argmax(-1).tolist()
        for (i, p), tokens in zip(group, best, strict=True):
            right[i] = tokens[len(p.ids) - 1 : len(p.ids) + len(p.answer) - 1] == [*p.answer]
    return right


def recall(model: Any, tokenizer: Any, questions: Iterable[Question], batch: int = 32, forward: Forward | None = None) -> float:
    """The share of questions whose answer tokens are all predicted, greedily.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: prompts with their answers.
        batch: questions per forward.
        forward: token ids to logits; None calls the model without a cache.
    """
    prompts = [
        Prompt(tuple(tokenizer(q.prompt)["input_ids"]), tuple(tokenizer(q.answer, add_special_tokens=False)["input_ids"]))
        for q in questions
    ]
    device = next(model.parameters()).device
    return float(answered(forward or plain_forward(model), prompts, device, batch).double().mean())


def stable_tokens(tokenizer: Any, seed: int, wanted: int = POOL) -> list[int]:
    """Tokens that come back as themselves when their text is tokenised, in an order that `seed` decides.

    Words of their own are preferred, as they do not join with their neighbours; a tokenizer without them (of bytes, of
    characters) gives whatever is no space and no special token.
    """
    special = set(tokenizer.all_special_ids)
    order = [token for token in range(len(tokenizer)) if token not in special]
    random.Random(seed).shuffle(order)
    words: list[int] = []
    others: list[int] = []
    for token in order:
        text = _text(tokenizer, [token] * 3)
        if text.strip().isprintable() and text.strip() and _tokens(tokenizer, text)[-2:] == [token, token]:
            parts = text.split()
            (words if len(parts) == 3 and parts[0].isalnum() else others).append(token)
        if len(words) == wanted:
            break
    return words if len(words) == wanted else [*words, *others][:wanted]


def recall_prompts(tokenizer: Any, pairs: int, count: int, seed: int) -> list[Prompt]:
    """Multi-query associative recall (Arora et al., 2023, Zoology), one query per prompt: k1 v1 ... kn vn, then ki -> vi.

    Keys and values are single tokens of the tokenizer's own, all different; the prompt is what tokenising its text gives.

    Args:
        tokenizer: any.
        pairs: of key and value in a prompt.
        count: how many prompts.
        seed: decides all of them.

    Raises:
        UsageError: the tokenizer has too few such tokens, or joins them however they are drawn.
    """
    pool = stable_tokens(tokenizer, seed)
    draw = random.Random(f"{seed} {pairs}")
    start = _start(tokenizer)
    prompts: list[Prompt] = []
    tries = 0
    while len(prompts) < count:
        tries += 1
        if len(pool) < 2 * pairs or tries > DRAWS * count:
            raise UsageError(
                f"no recall prompts of {pairs} pairs can be made with this tokenizer",
                f"{len(pool)} of its tokens stay as they are when text is tokenised again, {2 * pairs} different ones are needed",
                "leave --recall out, or use a model with a larger vocabulary",
            )
        drawn = draw.sample(pool, 2 * pairs)
        asked = draw.randrange(pairs)
        ids = [*drawn, drawn[2 * asked]]
        answer = drawn[2 * asked + 1]
        # a first token may have lost its space in the text; all that follow must be the same
        if _tokens(tokenizer, _text(tokenizer, [*ids, answer]))[1:] == [*ids, answer][1:]:
            prompts.append(Prompt((*start, *ids), (answer,)))
    return prompts


def passkey_prompts(tokenizer: Any, context: int, depth: float, count: int, seed: int) -> list[Prompt]:
    """A number of five digits in filler text, asked for at its end (Mohtashami and Jaggi, 2023, Landmark Attention).

    Args:
        tokenizer: any.
        context: tokens that prompt and answer may take; as much filler goes in as fits.
        depth: the share of the filler that stands before the number.
        count: how many prompts.
        seed: decides the numbers.

    Raises:
        UsageError: not even a prompt without filler fits.
    """
    draw = random.Random(f"{seed} {context} {depth}")
    guess = 2 * context // len(_tokens(tokenizer, "".join(FILLER))) * len(FILLER)
    prompts = []
    for _ in range(count):
        key = str(draw.randrange(10_000, 100_000))
        sentences = guess
        prompt = _passkey_prompt(tokenizer, key, depth, sentences)
        while len(prompt.ids) + len(prompt.answer) > context:
            over = len(prompt.ids) + len(prompt.answer) - context
            if sentences == 0:
                raise UsageError(
                    f"a passkey does not fit {context} tokens",
                    f"the question alone takes {over} more",
                    f"give contexts of {context + over} tokens or more",
                )
            sentences = max(0, sentences - max(1, over // 16))
            prompt = _passkey_prompt(tokenizer, key, depth, sentences)
        prompts.append(prompt)
    return prompts


def _passkey_prompt(tokenizer: Any, key: str, depth: float, sentences: int) -> Prompt:
    before = round(depth * sentences)
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    hidden = f" The pass key is {key}. Remember it. {key} is the pass key."
    text = "".join([INTRODUCTION, *filler[:before], hidden, *filler[before:], " What is the pass key? The pass key is"])
    ids, start = _tokens(tokenizer, text), _start(tokenizer)
    whole = _tokens(tokenizer, f"{text} {key}")
    answer = whole[len(ids) :] if whole[: len(ids)] == ids else _tokens(tokenizer, f" {key}")
    return Prompt((*start, *ids), tuple(answer))


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if it does."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
