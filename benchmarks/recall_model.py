"""Train a small model that really looks things up in its context, so that recall can be measured before and after a conversion.

    python benchmarks/recall_model.py --out recall-model --minutes 50
    python benchmarks/quality.py ... --recall-model recall-model --recall recall-model/questions.jsonl \
        --recall-data recall-model/ledgers.txt

In: a model, the bundled one unless told. Out: a normal folder, 500 questions that were not trained on (`questions.jsonl`, with
`prompt` and `answer`) and text to calibrate and heal on (`ledgers.txt`). Never: used by the library.

A ledger is a list of facts, a name and a number each, and questions about them, drawn with repetition so that guessing what
was not asked yet does not help. Training starts with two facts about four names; whenever nine of ten answers begin right, there
is one fact more and half as many names again: with all from the start, a small model does not find out that looking up helps.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvshare.data import load_tokenizer
from kvshare.evaluation import Question, recall
from kvshare.source import TINY, open_source

FIRST = "Al Bren Cor Dar El Fen Gar Hal Is Jor Kel Lor Mar Nor Os Pel Quin Ros Sel Tar Ul Ver Wyn Yor Zel".split()  # noqa: SIM905
LAST = ["a", "an", "en", "in", "or", "wyn", "ric", "da", "lia", "mund", "bert", "ia"]
NAMES = [first + last for last in LAST for first in FIRST]
THINGS = ["coins", "apples", "horses", "books", "lamps", "sheep", "keys", "rings", "barrels", "candles"]
MOST_FACTS = 14
NEXT_LEVEL = 0.9  # share of first answer tokens that must be right before a fact is added
OTHER_LOSS = 0.01  # weight of all tokens but the first of an answer: they cannot be known, or are known once the first is


def ledger(rng: random.Random, facts: int, names: Sequence[str]) -> tuple[str, list[Question]]:
    """A ledger of so many facts, and four times as many questions about them."""
    thing = rng.choice(THINGS)
    names = rng.sample(names, facts)
    numbers = [str(rng.randint(100, 999)) for _ in names]
    lines = [f"Ledger of {thing}."] + [f"{name} has {number} {thing}." for name, number in zip(names, numbers, strict=True)]
    questions = [Question(f"How many {thing} has {name}? ", number) for name, number in zip(names, numbers, strict=True)]
    return "\n".join(lines) + "\n", rng.choices(questions, k=4 * facts)


def batch_of(tokenizer: Any, rng: random.Random, rows: int, facts: int, names: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and weights of the loss, both (rows, tokens); each row is one ledger with its questions, cut at `length`."""
    ids, weights = [], []
    for _ in range(rows):
        text, questions = ledger(rng, rng.randint(max(2, facts // 2), facts), names)
        tokens = tokenizer(text)["input_ids"]
        weight = [OTHER_LOSS] * len(tokens)
        for question in questions:
            for part in (question.prompt, question.answer, ".\n"):
                piece = tokenizer(part, add_special_tokens=False)["input_ids"]
                tokens += piece
                weight += [1.0 if part is question.answer else OTHER_LOSS] + [OTHER_LOSS] * (len(piece) - 1)
        ids.append(tokens[:length])
        weights.append(weight[:length])
    width = max(map(len, ids))
    padded = [torch.tensor([[*row, *[0] * (width - len(row))] for row in part]) for part in (ids, weights)]
    return padded[0], padded[1]


def train(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Train for `options.minutes`, printing the level and the share of answers that begin right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    rng = random.Random(options.seed)
    names = random.Random(0).sample(NAMES, len(NAMES))
    start, step, facts, known, right = time.monotonic(), 0, 2, 4, 0.0
    while (done := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        rate = options.learning_rate * min(1, (step + 1) / 100) * min(1, max(0.02, (1 - done) / 0.35))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = batch_of(tokenizer, rng, options.batch, facts, names[:known], options.length)
        logits = model(input_ids=ids).logits[:, :-1]
        targets, weights = ids[:, 1:], weights[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        asked = weights == 1
        right += 0.02 * (float((logits.argmax(-1) == targets)[asked].float().mean()) - right)
        if right > NEXT_LEVEL and (facts < MOST_FACTS or known < len(names)):
            facts, known, right = min(facts + 1, MOST_FACTS), known * 3 // 2, 0.5
        if step % 100 == 0:
            print(
                f"step {step}, {done:.0%} of the time, up to {facts} facts about {known} names, {right:.1%} of answers begin right",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY, help="where training starts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(open_source(options.model).path)
    model = AutoModelForCausalLM.from_pretrained(open_source(options.model).path, dtype=torch.float32)
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
