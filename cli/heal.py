"""`kvshare heal`: distil a checkpoint further."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from kvshare.cli import options
from kvshare.cli.comparison import print_reports
from kvshare.cli.render import print_heal_plan, print_json, shown_progress, warn_of_contamination

from kvshare import processes


def run(
    checkpoint: options.Checkpoint,
    output: options.Output,
    source: Annotated[str, typer.Option(help="The model it came from, the teacher: a Hub id, a folder, or kvshare/tiny.")],
    data: Annotated[str | None, typer.Option(help=f"Text to train on. {options.DATA}.")] = None,
    tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    recipe: options.Recipe = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out text; the result is measured on it.")] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="How much of it.")] = None,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    seed: options.Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state of the same command.")] = False,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Distil a converted checkpoint on more text; LoRA is merged into the result."""
    first = processes.is_first()
    settings: dict[str, Any] = {
        "tokens": tokens,
        "recipe": recipe,
        "eval_data": eval_data,
        "eval_tokens": eval_tokens,
        "max_perplexity_increase": max_perplexity_increase,
        "seed": seed,
        "resume": resume,
        "overwrite": overwrite,
    }
    if dry_run:
        from kvshare.heal_plan import plan_heal

        with shown_progress(quiet=True):
            planned = plan_heal(checkpoint, output, source, data, **settings)
        values = planned.to_dict() | {"output": str(output)}
        if as_json and first:
            print_json(values)
        elif first:
            print_heal_plan(values)
            print(f"nothing was written; without --dry-run, {output} would be")
        return
    from kvshare import heal

    with shown_progress(quiet or not first) as progress:
        result = heal(checkpoint, output, source, data, **settings, progress=progress)
    if not first:
        return
    warn_of_contamination(result.contamination)
    if as_json:
        measured = {} if result.report is None else {"report": result.report.to_dict()}
        if result.contamination is not None:
            measured["contamination"] = result.contamination.to_dict()
        print_json(result.to_dict() | measured | {"output": str(output)})
        return
    print(f"{result.tokens:,} tokens in {result.steps} steps, loss {result.losses[0][1]:.4f} -> {result.losses[-1][1]:.4f}")
    print(f"learning rate, at its highest: {result.learning_rate:.2g}")
    print("the last steps: " + ", ".join(f"{name} {value:.4f}" for name, value in result.terms.items()))
    if result.report is None:
        print(f"written to {output}; measure it with: kvshare eval {output} --against {source} --data DATA")
        return
    print_reports([("healed", result.report)])
    print(f"written to {output}; load it with kvshare.load({str(output)!r})")
