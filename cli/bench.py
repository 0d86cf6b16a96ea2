"""`kvshare bench`: time and memory against the source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from kvshare.cli import options
from kvshare.cli.render import print_json, print_table, shown_progress, size

if TYPE_CHECKING:
    from kvshare.benching import Benchmark
    from kvshare.timing import Spread


def run(
    checkpoint: options.Checkpoint,
    against: options.Against,
    contexts: Annotated[list[str] | None, typer.Option(help=f"Tokens of the prompts, {options.LIST}.")] = None,
    batch_sizes: Annotated[list[str] | None, typer.Option(help=f"Prompts at a time, {options.LIST}.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed pairs of runs.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to decode behind every prompt.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; the checkpoint's own if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU, if there is one, if not given.")] = None,
    memory: Annotated[str | None, typer.Option(help="Compute what fits in so much, such as 8GB.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A new folder for bench.json and bench.png.")] = None,
    overwrite: options.Overwrite = False,
    seed: Annotated[int | None, typer.Option(help="Of the prompts' random tokens.")] = None,
    dry_run: options.DryRun = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Time prefill and decoding in turns with the source, and measure cache bytes and peak memory."""
    from kvshare import bench
    from kvshare.benching import check_benchmark
    from kvshare.hub import describe
    from kvshare.recipe import Bench, settings_of

    tokens, sizes = options.integers("--contexts", contexts), options.integers("--batch-sizes", batch_sizes)
    if dry_run:
        settings = settings_of(Bench, contexts=tokens, batch_sizes=sizes, repeats=repeats, new_tokens=new_tokens, seed=seed)
        asked = check_benchmark(settings, checkpoint, describe(against), dtype, device, memory, output, overwrite)
        if as_json:
            print_json({"output": None if output is None else str(output), "device": str(asked.device)} | settings.model_dump())
            return
        pairs = ", ".join(f"{size} x {context}" for size in settings.batch_sizes for context in settings.contexts)
        print(f"nothing was written; {settings.repeats} pairs each of {pairs} tokens would be timed on {asked.device}")
        return
    with shown_progress(quiet) as progress:
        result = bench(
            checkpoint,
            against,
            contexts=tokens,
            batch_sizes=sizes,
            repeats=repeats,
            new_tokens=new_tokens,
            dtype=dtype,
            device=device,
            memory=memory,
            output=output,
            overwrite=overwrite,
            seed=seed,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
        return
    _print(result)
    if verbose:
        for one in result.runs:
            print(f"- attention of {one.batch_size} x {one.context}: {one.attention}")
    if output is not None:
        print(f"written to {output}: bench.json, bench.png")


def _print(result: Benchmark) -> None:
    print_table(
        f"{result.device}, {result.dtype}, {result.threads} threads: medians of {result.repeats} pairs, ratios to the source",
        [
            (
                f"{run.batch_size} x {run.context}",
                _ratio(run.prefill.ratio),
                _ratio(run.decode.ratio),
                f"{1e3 * run.decode.seconds.median:.2f} / {1e3 * run.decode.source_seconds.median:.2f}",
                f"{run.cache_bytes_per_token:,.0f} / {run.source_cache_bytes_per_token:,.0f}",
                f"{size(run.peak_bytes)} / {size(run.source_peak_bytes)}",
            )
            for run in result.runs
        ],
        ("batch x context", "prefill time", "decode time", "decode, ms", "cache bytes per token", "peak memory"),
    )
    if result.fits:
        print_table(
            f"fits in {size(result.fits[0].memory_bytes)}, checkpoint / source",
            [
                (
                    f"{fit.batch_size} x {fit.context}",
                    f"{fit.largest_batch:,} / {fit.source_largest_batch:,}",
                    f"{fit.longest_context:,} / {fit.source_longest_context:,}",
                )
                for fit in result.fits
            ],
            ("batch x context", "largest batch of this context", "longest context of this batch"),
        )
    for line in result.not_measured:
        print(f"- not measured: {line}")


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f})"
