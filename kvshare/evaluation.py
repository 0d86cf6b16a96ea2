"""A checkpoint held against its source: perplexity, KL, agreement, recall, cache bytes.

In: a checkpoint, its source, held-out text. Out: a `Report`. Never: trains, writes files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.data import check_data, load_rows, load_tokenizer, rows_per_forward
from kvshare.errors import UsageError
from kvshare.exact import through_cache
from kvshare.loading import load, load_native
from kvshare.progress import Progress, silent
from kvshare.recipe import Evaluation, load_recipe
from kvshare.source import ITEM_BYTES, open_source, read_header, weight_files
from kvshare.tensors import DTYPES
from kvshare.verification import read_block

PROMPT_TOKENS, GENERATED_TOKENS = 16, 48  # of the sequence whose cache is measured
SELF_SEED = 1_000_003  # text that the source writes for evaluation is not the text it writes for training


@dataclass(frozen=True)
class Report:
    """How a checkpoint compares with its source on the same tokens.

    Fractions, not percent. `kl` is the mean KL(source || checkpoint) in nats per token; `*_error` are standard errors over
    rows; cache bytes are measured on the tensors of a generated sequence's cache, in the dtype the weights are stored in (layer by
    layer nothing is generated: then they are the plan's).
    """

    perplexity: float
    perplexity_error: float
    source_perplexity: float
    source_perplexity_error: float
    perplexity_increase: float
    perplexity_increase_error: float
    kl: float
    kl_error: float
    token_agreement: float
    token_agreement_error: float
    cache_bytes_per_token: float
    source_cache_bytes_per_token: float
    cache_reduction: float
    tokens: int
    data: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def evaluate(
    checkpoint: str | Path,
    against: str | Path,
    data: str,
    *,
    tokens: int | None = None,
    seed: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Measure a checkpoint against its source on the first `tokens` tokens of held-out text.

    Args:
        checkpoint: a folder that kvshare wrote.
        against: its source.
        data: text that neither calibration nor healing saw; `self` has the source write some.
        tokens: how many; None for the default.
        seed: for `self`; None for the default.
        progress: called on the way.

    Raises:
        UsageError: data that cannot be read, or two models of different vocabularies.
        BadCheckpointError: not a kvshare checkpoint.
    """
    recipe = load_recipe(None, evaluation__tokens=tokens, evaluation__data=data, seed=seed)
    folder = Path(checkpoint)
    read_block(folder)
    check_data(data)
    source = open_source(against)
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_native(source.path, dtype=torch.float32).to(device)
    model = load(folder, dtype=torch.float32).to(device)
    if model.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(
            f"{folder} and {source.name} cannot be compared",
            "their vocabularies differ",
            "give the model that the checkpoint was converted from",
        )
    rows = evaluation_rows(recipe.evaluation, tokenizer, teacher, recipe.seed, progress)
    return compare(model, teacher, rows, data, stored_bytes(folder), progress, forward_of(folder, model))


def evaluation_rows(settings: Evaluation, tokenizer: Any, source: Any, seed: int, progress: Progress) -> Tensor:
    """The rows of held-out text: the first of a data set in its own order, or written by the source with another seed."""

    def written(done: int, total: int) -> None:
        progress("writing text with the source model", done, total)

    return load_rows(
        settings.data,
        tokenizer,
        source,
        settings.tokens,
        settings.sequence_length,
        seed + SELF_SEED,
        shuffle=False,
        progress=written,
    )


def stored_dtype(folder: Path) -> str:
    """The dtype that most of a checkpoint's weights are stored in."""
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        for spec in read_header(folder / file):
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def stored_bytes(folder: Path) -> int:
    """Bytes per number of the dtype that most of a checkpoint's weights are stored in."""
    return ITEM_BYTES[stored_dtype(folder)]


def forward_of(checkpoint: Path, model: Any) -> Callable[[Tensor], Tensor] | None:
    """How `compare` is to run a checkpoint: None, by its plain forward; the exact form through a cache in the stored dtype.

    Without a cache the exact form is the source itself, and measuring it would prove nothing.
    """
    exact = read_block(checkpoint)["form"] == "exact"
    return through_cache(model, DTYPES[stored_dtype(checkpoint)]) if exact else None


@torch.no_grad()
def compare(
    model: Any,
    source: Any,
    rows: Tensor,
    data: str,
    item_bytes: int,
    progress: Progress = silent,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Report:
    """Run both models over the same rows.

    Args:
        model, source: causal language models of one vocabulary, on one device.
        rows: token ids (rows, length).
        data: what to call the text in the report.
        item_bytes: bytes per cached number, for the cache figures.
        progress: called on the way.
        forward: token ids to the model's logits; None calls it without a cache.
    """
    run = forward or (lambda ids: model(input_ids=ids, use_cache=False).logits)
    device = next(model.parameters()).device
    per_batch = rows_per_forward(rows.shape[1], int(model.config.vocab_size))
    figures = []
    for done, batch in enumerate(rows.split(per_batch)):
        progress("measuring", done * per_batch, len(rows))
        batch = batch.to(device)
        figures.append(row_figures(run(batch), source(input_ids=batch, use_cache=False).logits, batch))
    progress("measuring", len(rows), len(rows))
    cache, source_cache = (cache_numbers_per_token(m, rows[0, :PROMPT_TOKENS]) * item_bytes for m in (model, source))
    return report_of(torch.cat(figures), rows, data, cache, source_cache)


def report_of(figures: Tensor, rows: Tensor, data: str, cache: float, source_cache: float) -> Report:
    """A `Report` from the figures of each row (rows, 4): loss, the source's loss, KL, agreement."""
    per_row = figures.double().cpu()
    loss, source_loss, kl, agreement = per_row.mean(0).tolist()
    errors = (per_row.std(0) / math.sqrt(len(per_row))).tolist() if len(per_row) > 1 else [math.nan] * 4
    ratio = math.exp(loss - source_loss)
    difference = per_row[:, 0] - per_row[:, 1]
    paired = float(difference.std()) / math.sqrt(len(per_row)) if len(per_row) > 1 else math.nan
    return Report(
        math.exp(loss),
        math.exp(loss) * errors[0],
        math.exp(source_loss),
        math.exp(source_loss) * errors[1],
        ratio - 1,
        ratio * paired,
        kl,
        errors[2],
        agreement,
        errors[3],
        cache,
        source_cache,
        1 - cache / source_cache,
        rows.shape[0] * (rows.shape[1] - 1),
        data,
    )


def row_figures(logits: Tensor, source_logits: Tensor, ids: Tensor) -> Tensor:
    """Per row: mean loss of both models, mean KL(source || model), share of equal top tokens. (rows, 4)"""
    given = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    wanted = torch.log_softmax(source_logits[:, :-1].float(), dim=-1)
    targets = ids[:, 1:, None]
    loss, source_loss = (-x.gather(-1, targets).squeeze(-1).mean(-1) for x in (given, wanted))
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean(-1)
    agreement = (given.argmax(-1) == wanted.argmax(-1)).float().mean(-1)
    return torch.stack([loss, source_loss, kl, agreement], dim=-1)


@torch.no_grad()
def cache_numbers_per_token(model: Any, prompt: Tensor) -> float:
    """Numbers that the cache holds per token after greedy generation from `prompt` (tokens), counted on its tensors."""
    from transformers import GenerationConfig

    ids = prompt[None].to(next(model.parameters()).device)
    settings = GenerationConfig(
        max_new_tokens=GENERATED_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return cached_numbers(output.past_key_values) / output.past_key_values.get_seq_length()


def cached_numbers(cache: Any) -> int:
    """How many numbers the tensors of a transformers cache hold, keys and values of all layers."""
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


@dataclass(frozen=True)
class Question:
    """A prompt whose answer stands in it."""

    prompt: str
    answer: str


def read_questions(file: Path) -> list[Question]:
    """Recall questions: a `.jsonl` with `prompt` and `answer`.

    Raises:
        UsageError: the file cannot be read or lacks these fields.
    """
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [Question(str(record["prompt"]), str(record["answer"])) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the questions in {file} cannot be read", repr(error), "give a .jsonl with 'prompt' and 'answer'"
        ) from None


@torch.no_grad()
def recall(
    model: Any, tokenizer: Any, questions: Iterable[Question], batch: int = 32, forward: Callable[[Tensor], Tensor] | None = None
) -> float:
    """The share of questions whose answer tokens are all predicted, greedily.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        questions: prompts with their answers.
        batch: questions per forward.
        forward: token ids to logits; None calls the model without a cache.
    """
    device = next(model.parameters()).device
    run = forward or (lambda ids: model(input_ids=ids, use_cache=False).logits)
    pairs = [(tokenizer(q.prompt)["input_ids"], tokenizer(q.answer, add_special_tokens=False)["input_ids"]) for q in questions]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    right = 0
    for start in range(0, len(pairs), batch):
        group = pairs[start : start + batch]
        length = max(len(prompt) + len(answer) for prompt, answer in group)
        # causal attention: what stands to the right of an answer cannot change it
        ids = torch.tensor([[*p, *a, *[0] * (length - len(p) - len(a))] for p, a in group], device=device)
        best = run(ids).argmax(-1).tolist()
        right += sum(best[i][len(p) - 1 : len(p) + len(a) - 1] == a for i, (p, a) in enumerate(group))
    return right / len(pairs)
