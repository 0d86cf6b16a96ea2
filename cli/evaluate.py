"""`kvshare eval`: a checkpoint against its source."""

from __future__ import annotations

from typing import Annotated

import typer
from kvshare.cli import options
from kvshare.cli.render import print_json, print_report, shown_progress


def run(
    checkpoint: options.Checkpoint,
    against: Annotated[str, typer.Option(help="The source: a Hub id, a folder, or kvshare/tiny.")],
    data: Annotated[str, typer.Option(help=f"Held-out text. {options.DATA}.")],
    tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    seed: options.Seed = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity, KL, agreement and cache bytes against the source."""
    from kvshare import evaluate

    with shown_progress(quiet) as progress:
        report = evaluate(checkpoint, against, data, tokens=tokens, seed=seed, progress=progress)
    if as_json:
        print_json(report.to_dict())
        return
    print_report(report)
