"""Arguments that several verbs share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvshare.errors import UsageError

Model = Annotated[str, typer.Argument(help="A Hub id (with @revision), a local folder, or kvshare/tiny.")]
Checkpoint = Annotated[Path, typer.Argument(help="A folder that kvshare wrote.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The new folder.")]
Recipe = Annotated[str | None, typer.Option(help="A shipped recipe's name or a YAML file.")]
Init = Annotated[
    str | None,
    typer.Option(
        help="How K and V become one: mean, svd or learned; or exact: V is made of K, where W_K is square and invertible."
    ),
]
Form = Annotated[
    str | None,
    typer.Option(help="shared, the source's own function; or rotated: another one, whose cache stock attention reads as K and V."),
]
KVHeads = Annotated[str | None, typer.Option(help="KV heads of the output: a divisor of the source's, or a fraction such as 1/4.")]
CacheBudget = Annotated[
    float | None, typer.Option(help="The most of the cache to keep, such as 0.3: each layer gets what it is found to need.")
]
# a bracket of its own in help is escaped, or rich takes it for markup
DATA = r"A .txt, .jsonl or .parquet file, a datasets id org/name\[/config]\[:split], or 'self'; or several with weights, a=3,b=1"
Calibration = Annotated[str | None, typer.Option(help=f"Text for the merge. {DATA}.")]
Tokens = Annotated[int | None, typer.Option(help="How much of it.")]
Statistics = Annotated[str | None, typer.Option(help="A folder of `kvshare calibrate`, in place of text for the merge.")]
Heal = Annotated[bool | None, typer.Option("--heal/--no-heal", help="Distil after the merge.")]
HealData = Annotated[str | None, typer.Option(help="Text to distil on; the calibration's when only that is given.")]
EvalData = Annotated[str | None, typer.Option(help="Held-out text for the final measurement.")]
EvalMode = Annotated[
    str | None,
    typer.Option(help="whole: both models in memory; layers: layer by layer, for models that do not fit; off: no measurement."),
]
MaxPerplexityIncrease = Annotated[
    float | None,
    typer.Option(help="Quality gate, such as 0.05: a result that is worse by more is not published (exit code 6)."),
]
MLX = Annotated[
    bool | None,
    typer.Option("--mlx", help="Have mlx-lm use the smaller cache, too; its tools then ask for --trust-remote-code."),
]
MaxShardSize = Annotated[
    str | None, typer.Option(help="The most of a weight file, such as 5GB; as the source's files when not given.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would happen, and write nothing.")]
Seed = Annotated[int | None, typer.Option(help="Decides samples, the order of data and initial LoRA weights.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that kvshare wrote.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin again, whatever an interrupted run has finished.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say what was chosen, and why.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only results.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")]
Against = Annotated[str, typer.Option(help="The source: a Hub id, a folder, or kvshare/tiny.")]
LIST = "with commas between them, or the option repeated"


def words(values: list[str] | None) -> list[str] | None:
    """The values of an option that takes several: `a,b` and `c` are three. None stays None: not given."""
    return None if values is None else [word.strip() for value in values for word in value.split(",") if word.strip()]


def integers(option: str, values: list[str] | None) -> list[int] | None:
    """As `words`, in numbers.

    Raises:
        UsageError: a word that is no number.
    """
    try:
        return None if values is None else [int(word) for word in words(values) or []]
    except ValueError:
        raise UsageError(
            f"{option} {','.join(values or [])} cannot be read", "it takes whole numbers", f"for example: {option} 128,512"
        ) from None
