"""`kvshare eval`: checkpoints against their source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from kvshare.cli import options
from kvshare.cli.comparison import print_reports
from kvshare.cli.render import print_json, shown_progress


def run(
    checkpoint: Annotated[list[Path], typer.Argument(help="A folder that kvshare wrote, or several of one source.")],
    against: options.Against,
    data: Annotated[str, typer.Option(help=f"Held-out text. {options.DATA}.")],
    tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    contexts: Annotated[
        list[str] | None, typer.Option(help=f"Perplexity with sliding windows of these many tokens, {options.LIST}.")
    ] = None,
    by_position: Annotated[bool, typer.Option("--by-position", help="KL and agreement by tokens before a prediction.")] = False,
    recall: Annotated[int | None, typer.Option(help="Questions about key-value pairs in the context.")] = None,
    passkey: Annotated[int | None, typer.Option(help="Numbers to find at each depth of a long text.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help=f"lm-eval tasks, or YAML files of one, {options.LIST}. Needs kvshare\\[tasks].")
    ] = None,
    cache_bits: Annotated[
        list[str] | None, typer.Option(help=f"Measure also with the cache in 2 to 8 bits, {options.LIST}.")
    ] = None,
    seed: options.Seed = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity, KL, agreement and cache bytes against the source, and whatever else is asked for."""
    from kvshare import evaluate

    with shown_progress(quiet) as progress:
        reports = evaluate(
            tuple(checkpoint),
            against,
            data,
            tokens=tokens,
            contexts=options.integers("--contexts", contexts),
            by_position=by_position,
            recall=recall,
            passkey=passkey,
            tasks=options.words(tasks),
            cache_bits=options.integers("--cache-bits", cache_bits),
            seed=seed,
            progress=progress,
        )
    if as_json and len(reports) == 1:
        print_json(reports[0].to_dict())
    elif as_json:
        print_json({"reports": [{"checkpoint": str(c)} | r.to_dict() for c, r in zip(checkpoint, reports, strict=True)]})
    else:
        short = [folder.name for folder in checkpoint]
        names = ["converted"] if len(short) == 1 else short if len({*short}) == len(short) else [str(c) for c in checkpoint]
        print_reports(list(zip(names, reports, strict=True)))
