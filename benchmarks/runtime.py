"""The shared form against the native form of the same weights, family by family and mode by mode.

    python benchmarks/runtime.py                       # a small random model of every family in the tests
    python benchmarks/runtime.py --only 'qwen|falcon' --modes greedy,beam
    python benchmarks/runtime.py CHECKPOINT ...        # checkpoints that kvshare wrote

In: nothing, or checkpoints. Out: a Markdown table on standard output: whether tokens are equal, how large the cache is relative to
the native form's, and the time of a decoded token in both forms, their runs taking turns. Models of the tests are converted by
`mean`: what is compared here does not depend on how well weights were merged.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.continuous_batching import cache as paged

import kvshare
from kvshare.paged import shared_pages
from kvshare.timing import cache_bytes

TESTS = Path(__file__).resolve().parents[1] / "tests"
PROMPT = torch.arange(100, 140)[None]
PADDED = {"input_ids": PROMPT.repeat(2, 1), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
PADDED["attention_mask"][1, :25] = 0
NEW = 16
PLAIN: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


def generated(model: Any, inputs: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, int]:
    """Tokens, and bytes of the cache."""
    torch.manual_seed(3)
    output = model.generate(**(inputs or {"input_ids": PROMPT}), **PLAIN | settings)
    return output.sequences.tolist(), cache_bytes(output.cache)


def continued(model: Any) -> tuple[Any, int]:
    """A second question into the cache of the first."""
    cache = DynamicCache(config=model.config)
    first = model.generate(PROMPT, cache=cache, **PLAIN).sequences
    return generated(model, {"input_ids": torch.cat([first, PROMPT[:, :7]], 1)}, cache=cache)


def batched(model: Any) -> tuple[Any, int]:
    """Continuous batching, of three requests; the shared form with pages of its own."""
    made: list[Any] = []
    begin = paged.PagedAttentionCache.__init__

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(self)

    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
    settings = ContinuousBatchingConfig(page_size=16, num_blocks=32, max_batch_tokens=64)
    prompts = [PROMPT[0, :length].tolist() for length in (40, 7, 23)]
    shared = type(model).__module__.endswith("modeling_kvshare")
    paged.PagedAttentionCache.__init__ = keep
    try:
        with shared_pages(model) if shared else nullcontext():
            outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=settings, warmup=False)
    finally:
        paged.PagedAttentionCache.__init__ = begin
    if len(outputs) < len(prompts):
        raise ValueError("continuous batching of this family fails in transformers")
    pages = sum(allocator.bytes_per_block for allocator in made[0].cache_allocators.values())
    return [output.generated_tokens for output in outputs.values()], pages


MODES: dict[str, Callable[[Any], tuple[Any, int]]] = {
    "greedy": generated,
    "sampling": lambda model: generated(model, do_sample=True, top_k=50),
    "beam": lambda model: generated(model, num_beams=3),
    "left padding": lambda model: generated(model, PADDED),
    "prompt lookup": lambda model: generated(model, prompt_lookup_num_tokens=3),
    "chunked prefill": lambda model: generated(model, prefill_chunk_size=16),
    "static cache": lambda model: generated(model, cache_implementation="static", disable_compile=True),
    "continued": continued,
    "continuous batching": batched,
}


@torch.no_grad()
def decode_times(models: tuple[Any, Any], repeats: int) -> tuple[float, float]:
    """Milliseconds of a decoded token, the median, of both models."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for model, times in zip(models, found, strict=True):
            cache = DynamicCache(config=model.config)
            ids = model(PROMPT, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
            for _ in range(NEW):
                start = time.perf_counter()
                ids = model(ids, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
                times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[0]), statistics.median(found[1])


def rows(name: str, folder: Path, modes: list[str], repeats: int) -> Iterator[tuple[str, ...]]:
    """The rows of the table for a checkpoint."""
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    models = native, kvshare.load(folder, dtype=torch.float32)
    plain, ours = decode_times(models, repeats)
    for mode in modes:
        try:
            (expected, full) = MODES[mode](native)
        except Exception as error:  # of many kinds: what the native form cannot do is not asked of the other
            yield name, mode, "-", "-", "-", f"not natively: {str(error).splitlines()[0][:60]}"
            continue
        try:
            (given, part) = MODES[mode](models[1])
        except kvshare.KVShareError as error:
            yield name, mode, "-", "-", "-", f"refused: {error.what}"
            continue
        timed = (f"{plain:.2f}", f"{ours:.2f}", f"{ours / plain:.2f}x") if mode == modes[0] else ("", "", "")
        yield name, mode, "yes" if given == expected else "NO", f"{part / full:.3f}", " / ".join(timed[:2]).strip(" /"), timed[2]


def small_models(only: str, root: Path) -> Iterator[tuple[str, Path]]:
    """The models of the tests, converted, by their names there."""
    sys.path.insert(0, str(TESTS))
    from common import FAMILY_SOURCES, SMALL, SOURCES, TIED_SOURCES, random_model

    for name, (model_type, fields) in (SOURCES | FAMILY_SOURCES | TIED_SOURCES).items():
        if re.search(only, name):
            source = random_model(root / name / "source", model_type, **({} if name in SOURCES else SMALL) | fields)
            kvshare.convert(source, root / name / "out", init="mean", heal=False, eval_mode="off")
            yield name, root / name / "out"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--only", default="", help="a regular expression of names of models of the tests")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| model | mode | tokens equal | cache / native | ms per token, native / shared | |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        given = [(folder.name, folder) for folder in arguments.checkpoints]
        for name, folder in given or small_models(arguments.only, Path(work)):
            for row in rows(name, folder, arguments.modes.split(","), arguments.repeats):
                print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
