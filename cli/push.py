"""`kvshare push`: a checkpoint to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer
from kvshare.cli import options
from kvshare.cli.render import print_json, print_table, shown_progress, size


def run(
    checkpoint: options.Checkpoint,
    repo: Annotated[str, typer.Argument(help="A model repository org/name; it is made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public; private is the default.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; it is made if there is none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes, upload nothing.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Verify a checkpoint and upload it with the login of `hf auth login`; run again, it goes on where it stopped."""
    from kvshare import push

    with shown_progress(quiet, models=False) as progress:
        result = push(checkpoint, repo, public=public, revision=revision, dry_run=dry_run, progress=progress)
    if as_json:
        print_json(result.to_dict())
        return
    seen = "private" if result.private else "public"
    rows = [(name, size(count)) for name, count in result.files.items()]
    print_table(f"{result.repo} ({seen})", [*rows, ("together", size(result.bytes))], ("file", "size"))
    print("nothing was uploaded: this was a dry run" if result.dry_run else f"uploaded to {result.url}, commit {result.commit}")
