"""Checkpoints held against their source: perplexity, KL, agreement, cache bytes, and whatever else is asked for.

In: checkpoints, their source, held-out text. Out: a `Report` of each. Never: trains, writes files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from kvshare.data import load_rows, load_tokenizer, rows_per_forward
from kvshare.documents import check_data
from kvshare.errors import UsageError
from kvshare.exact import through_cache
from kvshare.figures import Perplexities, as_json, mean_and_error, perplexities
from kvshare.headers import ITEM_BYTES, read_header
from kvshare.loading import Forward, load, load_native, plain_forward
from kvshare.mixture import uses_self
from kvshare.native import require_one_vocabulary
from kvshare.positions import PositionFigures, by_position
from kvshare.probes import Probed, check_probes, compare_answers, prepare, probe
from kvshare.progress import Progress, silent
from kvshare.quantised import quantised_bytes, through_quantised_cache
from kvshare.recipe import Probes, load_recipe, settings_of
from kvshare.runtime.kvshare_cache import cache_name
from kvshare.sections import Evaluation
from kvshare.source import open_source, weight_files
from kvshare.tensors import DTYPES, best_device
from kvshare.verification import read_block

PROMPT_TOKENS, GENERATED_TOKENS = 16, 48  # of the sequence whose cache is measured
SELF_SEED = 1_000_003  # text that the source writes for evaluation is not the text it writes for training


@dataclass(frozen=True)
class QuantisedFigures:
    """A model whose cache is held in `bits` bits against the source as it is; the figures are those of a `Report`."""

    bits: int
    perplexity: float
    perplexity_error: float
    perplexity_increase: float
    perplexity_increase_error: float
    kl: float
    kl_error: float
    token_agreement: float
    token_agreement_error: float
    cache_bytes_per_token: float
    cache_reduction: float


@dataclass(frozen=True)
class Report(Perplexities):
    """How a checkpoint compares with its source on the same tokens.

    Fractions, not percent. `kl` is the mean KL(source || checkpoint) in nats per token; `*_error` are standard errors over
    rows; cache bytes are measured on the tensors of a generated sequence's cache, in the dtype the weights are stored in (layer by
    layer nothing is generated: then they are the plan's). What was not asked for is empty: figures by `positions`, in `quantised`
    caches, and `probed`.
    """

    kl: float
    kl_error: float
    token_agreement: float
    token_agreement_error: float
    cache_bytes_per_token: float
    source_cache_bytes_per_token: float
    cache_reduction: float
    tokens: int
    data: str
    positions: tuple[PositionFigures, ...] = ()
    quantised: tuple[QuantisedFigures, ...] = ()
    source_quantised: tuple[QuantisedFigures, ...] = ()
    probed: Probed = field(default_factory=Probed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; what is probed stands beside the other figures, what was not measured is left out."""
        values = as_json(self)
        values |= values.pop("probed")
        return {name: value for name, value in values.items() if value != []}


@overload
def evaluate(
    checkpoint: str | Path,
    against: str | Path,
    data: str,
    *,
    tokens: int | None = ...,
    contexts: Sequence[int] | None = ...,
    by_position: bool = ...,
    recall: int | None = ...,
    passkey: int | None = ...,
    tasks: Sequence[str] | None = ...,
    cache_bits: Sequence[int] | None = ...,
    seed: int | None = ...,
    progress: Progress = ...,
) -> Report: ...


@overload
def evaluate(
    checkpoint: list[Path] | list[str] | tuple[str | Path, ...],
    against: str | Path,
    data: str,
    *,
    tokens: int | None = ...,
    contexts: Sequence[int] | None = ...,
    by_position: bool = ...,
    recall: int | None = ...,
    passkey: int | None = ...,
    tasks: Sequence[str] | None = ...,
    cache_bits: Sequence[int] | None = ...,
    seed: int | None = ...,
    progress: Progress = ...,
) -> tuple[Report, ...]: ...


def evaluate(
    checkpoint: str | Path | list[Path] | list[str] | tuple[str | Path, ...],
    against: str | Path,
    data: str,
    *,
    tokens: int | None = None,
    contexts: Sequence[int] | None = None,
    by_position: bool = False,
    recall: int | None = None,
    passkey: int | None = None,
    tasks: Sequence[str] | None = None,
    cache_bits: Sequence[int] | None = None,
    seed: int | None = None,
    progress: Progress = silent,
) -> Report | tuple[Report, ...]:
    """Measure checkpoints against their source on the first `tokens` tokens of held-out text.

    Args:
        checkpoint: a folder that kvshare wrote, or several of one source, which are given the same text and prompts.
        against: the source.
        data: text that neither calibration nor healing saw; `self` has the source write some.
        tokens: how many; None for the default.
        contexts: perplexity where windows of these many tokens slide by half of each.
        by_position: KL and agreement by the number of tokens before a prediction.
        recall: how many questions about 4, 16 and 64 key-value pairs in the context.
        passkey: how many numbers to hide at each depth of filler text as long as each of `contexts` (or a row).
        tasks: names of lm-eval tasks, or YAML files of one (which may name Python functions, and lm-eval runs them).
        cache_bits: measure again with the cache in this many bits, such as 8 and 4, and the source's, too.
        seed: for `self` and for prompts; None for the default.
        progress: called on the way.

    Returns:
        a report, or as many as there are checkpoints if several are given in a list.

    Raises:
        UsageError: data that cannot be read, models of different vocabularies, or something that cannot be measured.
        BadCheckpointError: not a kvshare checkpoint.
    """
    probes = settings_of(
        Probes,
        contexts=contexts,
        by_position=by_position,
        recall=recall,
        passkey=passkey,
        tasks=tasks,
        cache_bits=cache_bits,
    )
    recipe = load_recipe(None, evaluation__tokens=tokens, evaluation__data=data, seed=seed)
    folders = [Path(checkpoint)] if isinstance(checkpoint, str | Path) else [Path(folder) for folder in checkpoint]
    _check_checkpoints(folders, probes)
    check_data(data)
    source = open_source(against)
    tokenizer = load_tokenizer(folders[0])
    for folder in folders:
        require_one_vocabulary(folder, source)
    device = best_device()
    teacher = load_native(source.path, dtype=torch.float32).to(device)
    longest = int(getattr(teacher.config, "max_position_embeddings", None) or recipe.evaluation.sequence_length)
    check_probes(probes, longest)

    def read(length: int) -> Tensor:
        fitting = min(length, longest) if uses_self(recipe.evaluation.data) else length  # a model writes no more than it can read
        settings = recipe.evaluation.model_copy(update={"sequence_length": fitting})
        return evaluation_rows(settings, tokenizer, teacher, recipe.seed, progress)

    rows = read(recipe.evaluation.sequence_length)
    material = prepare(probes, read, tokenizer, recipe.evaluation.sequence_length, longest, recipe.seed)
    source_answers = probe(teacher, plain_forward(teacher), material, progress)
    source_bytes = stored_bytes(source.path)
    source_quantised = tuple(compare_quantised(teacher, teacher, rows, bits, source_bytes, progress) for bits in probes.cache_bits)
    reports = []
    for folder in folders:
        model = load(folder, dtype=torch.float32).to(device)
        forward, item_bytes = forward_of(folder, model), stored_bytes(folder)
        report = compare(model, teacher, rows, data, item_bytes, progress, forward, by_position)
        answers = probe(model, forward or plain_forward(model), material, progress)
        reports.append(
            replace(
                report,
                probed=compare_answers(answers, source_answers, material),
                quantised=tuple(compare_quantised(model, teacher, rows, bits, item_bytes, progress) for bits in probes.cache_bits),
                source_quantised=source_quantised,
            )
        )
    return reports[0] if isinstance(checkpoint, str | Path) else tuple(reports)


def _check_checkpoints(folders: list[Path], probes: Probes) -> None:
    if not folders:
        raise UsageError("there is nothing to measure", "no checkpoint was given", "give one or more folders")
    for folder in folders:
        if read_block(folder)["form"] == "exact" and probes.cache_bits:
            raise UsageError(
                f"the cache of {folder} cannot be held in {probes.cache_bits[0]} bits",
                "in exact form values are made of cached keys, and coarse keys would give wrong ones",
                "leave --cache-bits out for it",
            )


def evaluation_rows(settings: Evaluation, tokenizer: Any, source: Any, seed: int, progress: Progress) -> Tensor:
    """The rows of held-out text: the first of a data set in its own order, or written by the source with another seed."""
    return load_rows(
        settings.data,
        tokenizer,
        source,
        settings.tokens,
        settings.sequence_length,
        seed + SELF_SEED,
        shuffle=False,
        progress=progress,
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


def forward_of(checkpoint: Path, model: Any) -> Forward | None:
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
    forward: Forward | None = None,
    positions: bool = False,
) -> Report:
    """Run both models over the same rows.

    Args:
        model, source: causal language models of one vocabulary, on one device.
        rows: token ids (rows, length).
        data: what to call the text in the report.
        item_bytes: bytes per cached number, for the cache figures.
        progress: called on the way.
        forward: token ids to the model's logits; None calls it without a cache.
        positions: whether to report KL and agreement by position, too.
    """
    run, run_source = forward or plain_forward(model), plain_forward(source)
    device = next(model.parameters()).device
    per_batch = rows_per_forward(rows.shape[1], int(model.config.vocab_size))
    figures = []
    for done, batch in enumerate(rows.split(per_batch)):
        progress("measuring", done * per_batch, len(rows))
        batch = batch.to(device)
        figures.append(token_figures(run(batch), run_source(batch), batch).cpu())
    progress("measuring", len(rows), len(rows))
    cache, source_cache = (cache_numbers_per_token(m, rows[0, :PROMPT_TOKENS]) * item_bytes for m in (model, source))
    return report_of(torch.cat(figures, dim=1), data, cache, source_cache, positions)


def report_of(per_token: Tensor, data: str, cache: float, source_cache: float, positions: bool = False) -> Report:
    """A `Report` from the figures of every prediction (4, rows, length - 1): loss, the source's loss, KL, agreement."""
    loss, source_loss, kl, agreement = per_token.mean(-1).double()
    kl_mean, kl_error = mean_and_error(kl)
    agreed, agreement_error = mean_and_error(agreement)
    return Report(
        **asdict(perplexities(loss, source_loss)),
        kl=kl_mean,
        kl_error=kl_error,
        token_agreement=agreed,
        token_agreement_error=agreement_error,
        cache_bytes_per_token=cache,
        source_cache_bytes_per_token=source_cache,
        cache_reduction=1 - cache / source_cache,
        tokens=kl.numel() * per_token.shape[-1],
        data=data,
        positions=by_position(per_token[2], per_token[3]) if positions else (),
    )


def token_figures(logits: Tensor, source_logits: Tensor, ids: Tensor) -> Tensor:
    """Of every prediction: loss of both models, KL(source || model), whether top tokens are equal. (4, rows, length - 1)"""
    given = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    wanted = torch.log_softmax(source_logits[:, :-1].float(), dim=-1)
    targets = ids[:, 1:, None]
    loss, source_loss = (-x.gather(-1, targets).squeeze(-1) for x in (given, wanted))
    kl = (wanted.exp() * (wanted - given)).sum(-1)
    agreement = (given.argmax(-1) == wanted.argmax(-1)).float()
    return torch.stack([loss, source_loss, kl, agreement])


@torch.no_grad()
def compare_quantised(
    model: Any, source: Any, rows: Tensor, bits: int, item_bytes: int, progress: Progress = silent
) -> QuantisedFigures:
    """A model with its cache in `bits` bits against the source as it is; `item_bytes` is what a number of the source's cache takes.

    Args as for `compare`. The model may be the source itself.
    """
    r = compare(model, source, rows, "", item_bytes, progress, through_quantised_cache(model, bits))
    cache = generated_cache(model, rows[0, :PROMPT_TOKENS])
    per_token = quantised_bytes(cache, bits) / cache.get_seq_length()
    return QuantisedFigures(
        bits,
        r.perplexity,
        r.perplexity_error,
        r.perplexity_increase,
        r.perplexity_increase_error,
        r.kl,
        r.kl_error,
        r.token_agreement,
        r.token_agreement_error,
        per_token,
        1 - per_token / r.source_cache_bytes_per_token,
    )


@torch.no_grad()
def generated_cache(model: Any, prompt: Tensor) -> Any:
    """The cache of a model after greedy generation from `prompt` (tokens)."""
    from transformers import GenerationConfig

    ids = prompt[None].to(next(model.parameters()).device)
    settings = GenerationConfig(
        max_new_tokens=GENERATED_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return getattr(output, cache_name(type(model)))


def cache_numbers_per_token(model: Any, prompt: Tensor) -> float:
    """Numbers that the cache holds per token after greedy generation from `prompt` (tokens), counted on its tensors."""
    cache = generated_cache(model, prompt)
    return cached_numbers(cache) / cache.get_seq_length()


def cached_numbers(cache: Any) -> int:
    """How many numbers the tensors of a transformers cache hold, keys and values of all layers."""
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if getattr(layer, "keys", None) is not None)
