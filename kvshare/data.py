"""Text in, rows of token ids out.

In: a DATA argument: a `.txt` (documents separated by `<|endoftext|>`), `.jsonl` or `.parquet` file with a `text` field, a
`datasets` id (`org/name[/config][:split]`), `self`, text that the source model writes, or a mixture of these with weights
(`a.jsonl=3,self=1`). Out: rows of equally many token ids.
Never: pads, truncates a document to fit, runs code that lies beside a data set.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvshare.documents import check_data, documents
from kvshare.errors import UsageError
from kvshare.mixture import parts_of, turns, uses_self
from kvshare.progress import Progress, silent
from kvshare.recipe import Recipe
from kvshare.sections import SELF

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WRITING = "writing text with the source model"  # what progress calls it
BETWEEN_WORDS = re.compile(r"\w \w")
SAMPLE_ROWS, SAMPLE_CACHE_BYTES = 256, 4 << 30  # rows written at a time, and what their cache may take
LOGIT_BYTES = 1 << 30  # what the logits of one forward may take, copies for softmax and gradient included
PART_SEED = 104_729  # how far the seeds of a mixture's parts lie apart
PIECE = 1 << 16  # characters that are tokenised at a time; a tokenizer takes 150 to 300 bytes for each


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """The token ids of a document, of a long one piece by piece: nobody needs all tokens of a book at once.

    Pieces begin with a space between two words, where tokenizers separate anyway, or without such a place behind a line.
    """
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > PIECE:
            end = start + PIECE
            places = [match.start() + 1 for match in BETWEEN_WORDS.finditer(text, end - PIECE // 16, end)]
            end = places[-1] if places else text.rfind("\n", start + PIECE // 2, end) + 1 or end
        ids = tokenizer(text[start:end], add_special_tokens=start == 0, verbose=False)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and end < len(text):
            ids.pop()  # some close whatever they are given
        yield ids
        start = end


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, data: str) -> None:
    """Refuse a tokenizer that cannot mark where a document begins or ends.

    Raises:
        UsageError: no end-of-sequence token (for text), neither a beginning- nor an end-of-sequence token (for `self`).
    """
    if uses_self(data) and start_token(tokenizer) is None:
        raise UsageError(
            "the source model cannot write text by itself",
            "its tokenizer has neither a bos nor an eos token to begin with",
            "give text instead of 'self'",
        )
    if any(part.data != SELF for part in parts_of(data)) and tokenizer.eos_token_id is None:
        raise UsageError(
            "documents cannot be separated", "the tokenizer has no eos token", "set eos_token in tokenizer_config.json"
        )


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a document begins with: bos, or eos for models that are trained without bos."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def token_rows(
    data: str, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int | None = None, repeat: bool = False
) -> Tensor:
    """Pack documents, each closed by eos, into rows without padding.

    Args:
        data: any DATA argument but `self` and mixtures.
        tokens: how many are wanted; fewer come back when the data holds fewer and `repeat` is off.
        length: tokens per row.
        seed: shuffles the documents; None keeps their order.
        repeat: start again, shuffled anew, when the data is used up.

    Returns:
        token ids (rows, length), int64.

    Raises:
        UsageError: the data does not fill one row.
    """
    check_tokenizer(tokenizer, data)
    wanted = max(1, tokens // length) * length
    ids: list[int] = []
    epoch = 0
    while len(ids) < wanted:
        before = len(ids)
        for text in documents(data, None if seed is None else seed + 7919 * epoch):
            for piece in _token_ids(tokenizer, text):
                ids.extend(piece)
                if len(ids) >= wanted:
                    break
            if ids[-1] != tokenizer.eos_token_id:
                ids.append(tokenizer.eos_token_id)
            if len(ids) >= wanted:
                break
        epoch += 1
        if len(ids) == before or not repeat:
            break
    rows = min(len(ids), wanted) // length
    if rows == 0:
        raise UsageError(
            f"the data {data} holds too little text",
            f"{len(ids)} tokens do not fill one row of {length}",
            "give more text or a shorter sequence_length",
        )
    return torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)


@torch.no_grad()
def self_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    seed: int,
    progress: Progress = silent,
) -> Tensor:
    """Rows that the model writes itself: sampled at temperature 1 from its start token, on through ends of documents.

    Args:
        model: the source model.
        tokens, length: as for `token_rows`.
        seed: decides every sample.
        progress: called at the beginning and behind every token of a batch, with tokens.

    Returns:
        token ids (rows, length), int64, on the CPU.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    check_tokenizer(tokenizer, SELF)
    start: Any = start_token(tokenizer)
    count = max(1, tokens // length)
    batch = min(SAMPLE_ROWS, max(1, SAMPLE_CACHE_BYTES // (length * _cache_bytes(model.config))))
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=None,
        max_new_tokens=length - 1,
        pad_token_id=start,
        use_cache=True,
    )
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    carried = model.generation_config
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.generation_config = GenerationConfig()  # the model's own stops and penalties would bend the samples
        try:
            progress(WRITING, 0, count * length)
            for done in range(0, count, batch):
                prompt = torch.full((min(batch, count - done), 1), start, device=device)
                mask = torch.ones_like(prompt)
                told = StoppingCriteriaList([partial(_told, progress, done * length, count * length)])
                run = model.generate(prompt, attention_mask=mask, generation_config=settings, stopping_criteria=told)
                rows.append(run.cpu())
        finally:
            model.generation_config = carried
    return torch.cat(rows)


def _told(progress: Progress, before: int, total: int, ids: Tensor, _: Any) -> Tensor:
    """Report what is written so far, where `generate` asks which rows (rows, length) are at their end: none."""
    progress(WRITING, before + ids.numel(), total)
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _cache_bytes(config: PreTrainedConfig) -> int:
    """Bytes per token of the model's cache in float32."""
    numbers = 0
    for layer in getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers:
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        numbers += int(heads) * int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
    return 2 * 4 * numbers


def rows_per_forward(length: int, vocabulary: int) -> int:
    """How many rows of `length` tokens may pass through a model at a time, at least one, so that logits keep to `LOGIT_BYTES`."""
    return max(1, LOGIT_BYTES // (length * vocabulary * 4 * 4))


@dataclass(frozen=True)
class SelfCache:
    """Where text that a model wrote is kept, so that the same is not written again; `model` identifies the model."""

    folder: Path
    model: str

    def file(self, tokens: int, length: int, seed: int) -> Path:
        """The file of the text that these settings give with the libraries at hand."""
        import transformers

        made_by = [self.model, tokens, length, seed, torch.__version__, transformers.__version__]
        return self.folder / f"self-{hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]}.safetensors"


def load_rows(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    tokens: int,
    length: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = False,
    progress: Progress = silent,
    cache: SelfCache | None = None,
) -> Tensor:
    """Rows from any DATA argument; `model`, the source, is needed for `self` alone. See `token_rows` and `self_rows`.

    The rows of a mixture take turns by weight, each text in its own order; where one is used up and does not `repeat`, they end.
    """
    parts = parts_of(data)
    order = turns([part.share for part in parts], max(1, tokens // length))
    streams: list[list[Tensor]] = []
    for index, part in enumerate(parts):
        wanted, own_seed = order.count(index) * length, seed + PART_SEED * index
        if not wanted:
            streams.append([])
        elif part.data != SELF:
            streams.append([*token_rows(part.data, tokenizer, wanted, length, own_seed if shuffle else None, repeat)])
        elif model is None:
            raise ValueError("'self' needs the source model")
        else:
            streams.append([*_written_rows(model, tokenizer, wanted, length, own_seed, progress, cache)])
    remaining = [iter(stream) for stream in streams]
    rows = list(itertools.takewhile(lambda row: row is not None, (next(remaining[turn], None) for turn in order)))
    return torch.stack([row for row in rows if row is not None])


def _written_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    seed: int,
    progress: Progress,
    cache: SelfCache | None,
) -> Tensor:
    """The rows of `self_rows`, read where they were kept, and kept where they were written."""
    from safetensors.torch import load_file, save_file

    kept = None if cache is None else cache.file(tokens, length, seed)
    if kept is not None and kept.is_file():
        return load_file(kept)["rows"]
    rows = self_rows(model, tokenizer, tokens, length, seed, progress)
    if kept is not None:
        beside = kept.with_suffix(".part")
        save_file({"rows": rows}, beside)
        os.replace(beside, kept)
    return rows


def calibration_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None, progress: Progress = silent
) -> Tensor:
    """The text of the merge as token ids (rows, length). See `load_rows`."""
    settings = recipe.calibration
    return load_rows(settings.data, tokenizer, model, settings.tokens, settings.sequence_length, recipe.seed, progress=progress)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UsageError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        tokenizer("a")  # some settings are only looked at then
        return tokenizer
    except Exception as error:  # of many kinds, all of them about the files
        raise UsageError(
            f"the tokenizer in {path} cannot be loaded",
            (str(error).splitlines() or ["unknown reason"])[0],
            "put the model's tokenizer files into its folder",
        ) from error


def tokenizer_for(path: Path, texts: Iterable[str]) -> Any:
    """The tokenizer of a model folder, if there are these texts, DATA arguments, and it can read them.

    Raises:
        UsageError: see `load_tokenizer`, `check_data` and `check_tokenizer`.
    """
    tokenizer = load_tokenizer(path)
    for data in texts:
        check_data(data)
        check_tokenizer(tokenizer, data)
    return tokenizer
