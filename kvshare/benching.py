"""A checkpoint's time and memory beside its source's, on the machine at hand.

In: a checkpoint, its source, context lengths, batch sizes. Out: a `Benchmark`; asked for, a folder with it and a picture.
Never: judges quality, which `evaluate` does; claims what it did not measure.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvshare.bench_plot import check_plots, draw_runs
from kvshare.checkpoint import check_output, fresh_folder, publish, workspace, write_json
from kvshare.errors import UsageError, closest
from kvshare.evaluation import stored_dtype
from kvshare.figures import as_json
from kvshare.loading import load, load_native
from kvshare.native import read_config, require_one_vocabulary
from kvshare.progress import Progress, silent
from kvshare.recipe import Bench, settings_of
from kvshare.sizes import bytes_of
from kvshare.source import Source, open_source
from kvshare.tensors import DTYPES, best_device
from kvshare.timing import Run, held_bytes, measure_pair
from kvshare.verification import read_block

RESULT = "bench.json"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Fit:
    """The most sequences of `context` tokens, and the most tokens of `batch_size` sequences, that a memory holds.

    Computed, not run: (memory - weights) / measured cache bytes per token. `longest_context` is not held against what the model
    was trained for.
    """

    memory_bytes: int
    context: int
    largest_batch: int
    source_largest_batch: int
    batch_size: int
    longest_context: int
    source_longest_context: int


@dataclass(frozen=True)
class Benchmark:
    """What was measured, on what, how often, and what was not. `weight_bytes` holds what the exact form adds, too."""

    checkpoint: str
    against: str
    form: str
    device: str
    dtype: str
    threads: int
    attention: str
    versions: dict[str, str]
    repeats: int
    new_tokens: int
    seed: int
    weight_bytes: int
    source_weight_bytes: int
    runs: tuple[Run, ...]
    fits: tuple[Fit, ...]
    not_measured: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return as_json(self)


def bench(
    checkpoint: str | Path,
    against: str | Path,
    *,
    contexts: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    repeats: int | None = None,
    new_tokens: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    memory: str | int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    seed: int | None = None,
    progress: Progress = silent,
) -> Benchmark:
    """Time a checkpoint and its source in turns, in one process, over all batch sizes and contexts.

    Args:
        checkpoint: a folder that kvshare wrote.
        against: its source.
        contexts, batch_sizes: of the prompts; None for the defaults.
        repeats: timed pairs of runs each.
        new_tokens: to decode behind every prompt.
        dtype: float32, float16 or bfloat16; None for that of the checkpoint's weights.
        device: as torch names it; None for the GPU if there is one.
        memory: such as `8GB` or `8GiB`, or bytes: what largest batch and longest context are computed for.
        output: a new folder for `bench.json` and `bench.png`.
        overwrite: replace that folder if kvshare wrote it.
        seed: of the prompts' random tokens; None for the default.
        progress: called on the way.

    Raises:
        UsageError: settings that cannot be run, an output that would destroy something, no memory on the device.
        BadCheckpointError: not a kvshare checkpoint.
    """
    settings = settings_of(Bench, contexts=contexts, batch_sizes=batch_sizes, repeats=repeats, new_tokens=new_tokens, seed=seed)
    folder, target = Path(checkpoint), None if output is None else Path(output)
    asked = check_benchmark(settings, folder, open_source(against), dtype, device, memory, target, overwrite)
    source, weights, place, budget = asked.source, asked.dtype, asked.device, asked.memory
    model = load(folder, dtype=weights).to(place)
    native = load_native(source.path, dtype=weights).to(place)
    pairs = [(batch, context) for batch in settings.batch_sizes for context in settings.contexts]
    runs = []
    for done, (batch, context) in enumerate(pairs):
        progress("timing", done, len(pairs))
        try:
            runs.append(measure_pair(model, native, batch, context, settings.new_tokens, settings.repeats, settings.seed))
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{batch} x {context} tokens cannot be timed", f"the memory of {place} is full", "give less of either"
            ) from None
    progress("timing", len(pairs), len(pairs))
    held, source_held = held_bytes(model), held_bytes(native)
    result = Benchmark(
        str(checkpoint),
        source.name,
        asked.form,
        _named(place),
        str(weights).removeprefix("torch."),
        torch.get_num_threads(),
        str(model.config._attn_implementation),
        _versions(),
        settings.repeats,
        settings.new_tokens,
        settings.seed,
        held,
        source_held,
        tuple(runs),
        () if budget is None else tuple(fit(run, budget, held, source_held) for run in runs),
        not_measured(place, budget is not None),
    )
    if target is not None:
        write_benchmark(result, target)
    return result


@dataclass(frozen=True)
class Asked:
    """What a benchmark will run: the source, the checkpoint's form, dtype and device of both, bytes of memory to fit into."""

    source: Source
    form: str
    dtype: torch.dtype
    device: torch.device
    memory: int | None


def check_benchmark(
    settings: Bench,
    checkpoint: Path,
    source: Source,
    dtype: str | None,
    device: str | None,
    memory: str | int | None,
    output: Path | None,
    overwrite: bool,
) -> Asked:
    """Everything that can be refused before weights are loaded; for the arguments and errors see `bench`."""
    form = read_block(checkpoint)["form"]
    budget = None if memory is None else bytes_of(memory, "memory")
    weights = _dtype(dtype) if dtype is not None else DTYPES[stored_dtype(checkpoint)]
    place = _device(device)
    if output is not None:
        check_plots()
        _check_folder(output, (checkpoint, source.path), overwrite)
    _check_fitting(settings, checkpoint, source)
    return Asked(source, form, weights, place, budget)


def fit(run: Run, memory: int, weight_bytes: int, source_weight_bytes: int) -> Fit:
    """What fits in `memory` bytes by the weights and by the cache bytes per token of a run; 0 where the weights do not."""
    tokens, source_tokens = (
        max(0, memory - weights) / per_token
        for weights, per_token in (
            (weight_bytes, run.cache_bytes_per_token),
            (source_weight_bytes, run.source_cache_bytes_per_token),
        )
    )
    return Fit(
        memory,
        run.context,
        int(tokens // run.context),
        int(source_tokens // run.context),
        run.batch_size,
        int(tokens // run.batch_size),
        int(source_tokens // run.batch_size),
    )


def not_measured(device: torch.device, fits: bool) -> tuple[str, ...]:
    """What the figures do not say."""
    said = [
        "serving engines (vLLM, SGLang, llama.cpp): these are transformers' own forwards, one token of each sequence a step",
        "quality: kvshare eval measures it",
    ]
    if device.type == "cuda":
        said.append("other GPUs, several GPUs, the CPU; compiled forwards and CUDA graphs")
        said.append("peak memory beyond torch's allocator: the CUDA context, libraries, fragmentation")
    else:
        said.append("a GPU: where memory traffic decides, the ratios differ from those of a CPU")
        said.append("peak memory beyond torch's own tensors (by its profiler, in a run of its own): what math libraries take")
    if fits:
        said.append(
            "what fits was computed from weights and measured cache bytes per token; activations are not counted, nothing ran"
        )
    return tuple(said)


def write_benchmark(result: Benchmark, output: Path) -> None:
    """`bench.json` and `bench.png` in a folder that appears whole or not at all."""
    with workspace(output) as work:
        staged = fresh_folder(work / "output")
        write_json(staged / RESULT, result.to_dict())
        draw_runs(
            result.runs,
            f"{Path(result.checkpoint).name} against {result.against}, {result.dtype}, {result.device}",
            staged / "bench.png",
        )
        publish(staged, output)


def _check_folder(output: Path, read: tuple[Path, Path], overwrite: bool) -> None:
    for origin in read:
        check_output(output, origin, overwrite)
    if output.exists() and any(output.iterdir()) and not (output / RESULT).is_file():
        raise UsageError(
            f"the output {output} is not a benchmark",
            "it may be a checkpoint, which a benchmark never replaces",
            "choose another folder",
        )


def _check_fitting(settings: Bench, folder: Path, origin: Source) -> None:
    require_one_vocabulary(folder, origin)
    longest = getattr(read_config(origin.path), "max_position_embeddings", None)
    needed = max(settings.contexts) + settings.new_tokens
    if longest is not None and needed > longest:
        raise UsageError(
            f"contexts of {max(settings.contexts)} tokens cannot be timed",
            f"with {settings.new_tokens} new ones they are {needed}, and the models take {longest} (max_position_embeddings)",
            f"give --contexts up to {longest - settings.new_tokens}",
        )


def _dtype(name: str) -> torch.dtype:
    if name not in FLOATS:
        raise UsageError(f"dtype = {name!r} cannot be used", f"there are: {', '.join(FLOATS)}", closest(name, FLOATS))
    return FLOATS[name]


def _device(name: str | None) -> torch.device:
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}", "torch does not know it", "use cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UsageError(
            f"the device {name!r} cannot be used", "torch finds no such device here, or its clock is not known", "use cpu"
        )
    return device


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()})"


def _versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": str(torch.__version__), "transformers": transformers.__version__}
