"""Train a small model that really looks things up in its context, so that recall can be measured before and after a conversion.

    python benchmarks/recall_model.py --out recall-model --minutes 72
    python benchmarks/quality.py ... --recall-model recall-model --recall recall-model/questions.jsonl \
        --recall-data recall-model/ledgers.txt

In: the bundled model's tokenizer and config. Out: a normal folder, 500 questions that were not trained on (`questions.jsonl`,
with `prompt` and `answer`) and text to calibrate and heal on (`ledgers.txt`). Never: used by the library.

A ledger is a list of facts, a name and a number each, and questions about them, drawn with repetition so that guessing what
was not asked yet does not help. Training starts with rows of random tokens that repeat, on which a small model finds out that
looking up what followed the last time helps, and then that several tokens must be compared; then come ledgers of two facts
about four names, and whenever nine of ten digits are right, there is one fact more and half as many names again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvshare.data import load_tokenizer
from kvshare.retrieval import Question, recall
from kvshare.source import TINY, open_source

FIRST = "Al Bren Cor Dar El Fen Gar Hal Is Jor Kel Lor Mar Nor Os Pel Quin Ros Sel Tar Ul Ver Wyn Yor Zel".split()  # noqa: SIM905
LAST = ["a", "an", "en", "in", "or", "wyn", "ric", "da", "lia", "mund", "bert", "ia"]
NAMES = [first + last for last in LAST for first in FIRST]
THINGS = ["coins", "apples", "horses", "books", "lamps", "sheep", "keys", "rings", "barrels", "candles"]
MOST_FACTS = 14
NEXT_LEVEL = 0.9  # share of counted tokens that must be right before a fact is added
LARGE, SMALL = 64, 12  # alphabets of repeated rows
LOWEST_TOKEN, STRIDE = 300, 50  # the tokens that they are made of
REPEATED = {LARGE: (6, 17), SMALL: (14, 25)}  # how many of them in a row, and one more than the most
CONTEXT = {LARGE: 1, SMALL: 4}  # how many of them must be seen again to know where in the row one is


Pieces = Callable[[str], list[int]]  # the token ids of a question or an answer


@dataclass(frozen=True)
class Batch:
    """Token ids (rows, tokens) and which of them the loss counts, same shape."""

    ids: Tensor
    counted: Tensor


def ledger(rng: random.Random, facts: int, names: Sequence[str]) -> tuple[str, list[Question]]:
    """A ledger of so many facts, and four times as many questions about them."""
    thing = rng.choice(THINGS)
    names = rng.sample(names, facts)
    numbers = [str(rng.randint(100, 999)) for _ in names]
    lines = [f"Ledger of {thing}."] + [f"{name} has {number} {thing}." for name, number in zip(names, numbers, strict=True)]
    questions = [Question(f"How many {thing} has {name}? ", number) for name, number in zip(names, numbers, strict=True)]
    return "\n".join(lines) + "\n", rng.choices(questions, k=4 * facts)


def ledger_batch(
    tokenizer: Any, pieces: Pieces, rng: random.Random, rows: int, facts: int, names: Sequence[str], length: int
) -> Batch:
    """Each row is one ledger of `facts` facts with its questions, cut at `length`; the answers count."""
    ids, counts = [], []
    for _ in range(rows):
        text, questions = ledger(rng, facts, names)
        tokens = tokenizer(text)["input_ids"]
        answers = [False] * len(tokens)
        for question in questions:
            for part in (question.prompt, question.answer, ".\n"):
                piece = pieces(part)
                tokens += piece
                answers += [part is question.answer] * len(piece)
        ids.append(tokens[:length])
        counts.append(answers[:length])
    width = max(map(len, ids))
    padded = [torch.tensor([[*row, *[0] * (width - len(row))] for row in part]) for part in (ids, counts)]
    return Batch(padded[0], padded[1].bool())


def repeated_batch(generator: torch.Generator, rows: int, alphabet: int) -> Batch:
    """Each row is a few random tokens of an alphabet, three times over; all that the first time tells counts.

    In the large alphabet no token comes twice, so the token before tells what follows; in the small one only several do.
    """
    low, high = REPEATED[alphabet]
    count = int(torch.randint(low, high, (), generator=generator))
    if alphabet > high:
        drawn = torch.rand(rows, alphabet, generator=generator).argsort(1)[:, :count]
    else:
        drawn = torch.randint(alphabet, (rows, count), generator=generator)
    ids = (LOWEST_TOKEN + STRIDE * drawn).repeat(1, 3)
    return Batch(ids, torch.arange(3 * count).expand(rows, -1) >= count + CONTEXT[alphabet])


def train(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Train for `options.minutes`, printing the level and the share of counted tokens that are right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    rng, generator = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    names = random.Random(0).sample(NAMES, len(NAMES))
    pieces = cache(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    kinds: list[int | None] = [LARGE, SMALL, None]  # None: ledgers
    start, step, level, facts, known, right = time.monotonic(), 0, 0, 2, 4, 0.0
    while (done := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        rate = options.learning_rate * min(1, (step + 1) / 50) * min(1, max(0.02, (1 - done) / 0.35))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # what was learned first is kept alive by every eighth step
        kind = kinds[level] if step % 8 else kinds[step // 8 % (level + 1)]
        if kind is not None:
            batch = repeated_batch(generator, options.batch, kind)
        else:
            count = rng.randint(max(2, facts // 2), facts)
            batch = ledger_batch(tokenizer, pieces, rng, options.batch, count, names[:known], options.length)
        counted = batch.counted[:, 1:]
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[counted])  # the other tokens cannot be known
        targets = batch.ids[:, 1:][counted]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if kind == kinds[level]:
            right += 0.04 * (float((logits.argmax(-1) == targets).float().mean()) - right)
        if right > NEXT_LEVEL and (facts < MOST_FACTS or known < len(names)):
            if kind is not None:
                level, right = level + 1, 0.0
            else:
                facts, known, right = min(facts + 1, MOST_FACTS), min(known * 3 // 2, len(names)), 0.5
        if step % 100 == 0:
            print(
                f"step {step}, {done:.0%} of the time, stage {level + 1}, {facts} facts about {known} names, {right:.1%} right",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=72)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    folder = open_source(TINY).path
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=options.layers, intermediate_size=128)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    train(model, tokenizer, options)
    rng = random.Random(options.seed + 1)
    questions = []
    for _ in range(500):
        text, asked = ledger(rng, rng.randint(4, MOST_FACTS), NAMES)
        questions.append(Question(text + asked[0].prompt, asked[0].answer))
    written = []
    for _ in range(2000):
        text, asked = ledger(rng, rng.randint(4, MOST_FACTS), NAMES)
        written.append(text + "\n".join(f"{question.prompt}{question.answer}." for question in asked[:MOST_FACTS]))
    model.eval().to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    lines = [json.dumps({"prompt": question.prompt, "answer": question.answer}) for question in questions]
    (options.out / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (options.out / "ledgers.txt").write_text("<|endoftext|>".join(written))
    print(f"recall {recall(model.float(), tokenizer, questions):.1%} of {len(questions)} new questions")


if __name__ == "__main__":
    main()
