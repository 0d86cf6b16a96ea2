"""What a person sees: tables on standard output, progress with the time left on standard error.

One look for all verbs. Colour is never needed to read it: there is none in a file, in a pipe, or where NO_COLOR is set.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer

from kvshare.progress import Progress, silent

if TYPE_CHECKING:
    from kvshare.contamination import Contamination
    from kvshare.findings import Inspection
    from kvshare.sensitivity import Sensitivity

FILE_WIDTH = 1000  # characters; a table takes what its text needs


def print_json(value: Any) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


def print_table(title: str, rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> None:
    """A table on standard output; the first column names the row, the others are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    # a file has no width: nothing in it is broken up or cut short to fit one
    # and names are shown as they are, brackets and all
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH, markup=False, emoji=False).print(table)


def warn_of_contamination(found: Contamination | None) -> None:
    """On standard error, if held-out text shares runs of tokens with text that was trained on."""
    if found is not None and found.shared_rows:
        typer.echo(
            f"warning: {found.fraction:.1%} of the evaluation's rows share a run of {found.tokens} tokens with text that was "
            "calibrated or healed on; its figures may flatter",
            err=True,
        )


def print_choice(sensitivity: Sensitivity) -> None:
    """What a cache budget chose for each layer, and the damage that this does to it alone."""
    s = sensitivity
    print_table(
        f"cache budget: {s.units} of {s.budget_units} heads of K and V used, KL measured on {s.tokens:,} tokens",
        [
            (str(layer), option.name, str(option.units), f"{option.measured:.5f}", f"{option.predicted:.2e}")
            for layer, option in enumerate(s.choice)
        ],
        ("layer", "shared heads", "heads cached", "KL of it alone", "predicted error"),
    )
    print(f"rank correlation of predicted and measured damage: {s.agreement.spearman:.2f}")


def print_inspection(inspection: Inspection) -> None:
    """The figures of every layer, averaged over heads, the forms of the cache, and the damage predicted within budgets."""
    from kvshare.findings import listed, notes

    i = inspection
    rows = []
    for layer in i.layers:
        if layer.refused is not None:
            rows.append((str(layer.layer), *["-"] * 7))
            continue
        ranks = [f"{layer.mean(name):.1f}" for name in ("key_rank", "value_rank", "joint_rank")]
        rows.append(
            (
                *(str(layer.layer), *ranks, f"{layer.mean('overlap'):.3f}", f"{layer.mean('cka'):.3f}"),
                *(f"{layer.mean('dropped'):.2%}", f"{layer.dropped:.2%}"),
            )
        )
    title = f"{i.model}: {i.kv_heads} KV heads of {i.head_dim}, {i.tokens:,} tokens of {i.text}; means over heads"
    columns = ("layer", "rank K", "rank V", "rank [K;V]", "overlap", "CKA", "dropped", "worst")
    print_table(title, rows, columns)
    forms = [
        (
            *("K = V" if form.shared else "K and V", str(form.heads), str(form.bits)),
            *(f"{form.bytes_per_token:,.0f} B", f"{form.saved:.2%}"),
        )
        for form in i.cache
    ]
    print_table("KV cache", forms, ("cached", "heads", "bits", "per token", "saved"))
    choices = [
        (f"{budget:.2%}", f"{point.kept:.2%}", f"{point.predicted:.2e}", _spelled(point.heads))
        for budget, point in listed(i.frontier())
    ]
    print_table(
        "least predicted damage within a cache budget", choices, ("budget", "cache kept", "damage", "shared heads by layer")
    )
    for note in notes(i):
        print(f"- {note}")


def _spelled(heads: Sequence[int | None]) -> str:
    """Heads per layer; `-` is an untouched layer, and `3x8` three layers of 8 in a row."""
    runs = [(count, len(list(run))) for count, run in groupby(heads)]
    return " ".join(f"{length}x{count or '-'}" if length > 1 else str(count or "-") for count, length in runs)


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@contextmanager
def shown_progress(quiet: bool = False, models: bool = True) -> Iterator[Progress]:
    """Progress bars with the time left on a terminal; a line per stage where standard error is a file; nothing if `quiet`.

    The libraries underneath are kept from drawing bars of their own and from warning about their own future; without `models`,
    transformers is not imported for that.
    """
    if models:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if quiet:
        yield silent
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _lines() -> Progress:
    seen: dict[str, int] = {}

    def show(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if seen.get(stage) != tenth:
            seen[stage] = tenth
            typer.echo(f"{stage}: {done}/{total}", err=True)

    return show


def print_plan(values: dict[str, Any]) -> None:
    """What a conversion would do, from `Plan.to_dict`."""
    open_choice = values["layer_heads"] is None
    bound = "at most " if open_choice else ""
    print_table(
        f"{values['model']} ({values['model_type']}, {values['layers']} layers)",
        [
            ("KV heads", str(values["source_kv_heads"]), "by layer" if open_choice else str(values["kv_heads"])),
            ("KV cache per token", size(values["source_cache_bytes_per_token"]), bound + size(values["cache_bytes_per_token"])),
            ("KV cache saved", "", f"{'at least ' if open_choice else ''}{values['cache_reduction']:.2%}"),
            ("weights", size(values["bytes_read"]), size(values["bytes_written"])),
            ("tensors merged / copied", "", f"{values['tensors_merged']} / {values['tensors_copied']}"),
            ("init", "", values["init"]),
            ("form", "", "exact" if values["init"] == "exact" else values["form"]),
            ("healing", "", f"{values['heal_tokens']:,} tokens" if values["heals"] else "none"),
            ("disk needed", "", size(values["disk_bytes"])),
            ("memory needed by each process, about", "", size(values["memory_bytes"])),
            ("time on this machine, about", "", _stages(values["seconds"])),
            ("processes that can share it", "", "any number" if values["one_process_because"] is None else "one"),
        ],
        ("", "source", "converted"),
    )
    if values["one_process_because"] is not None:
        print(f"- one process, because {values['one_process_because']}")
    for reason in values["reasons"]:
        print(f"- {reason}")


def print_heal_plan(values: dict[str, Any]) -> None:
    """What a healing would do, from `HealPlan.to_dict`."""
    kept = values["teacher_top_k"]
    asked = "beside the student" if kept is None else f"asked once, {kept:,} probabilities of each token kept"
    measured = "none" if values["held_out"] is None else f"{values['held_out_tokens']:,} tokens of {values['held_out']}"
    print_table(
        f"{values['checkpoint']}, taught by {values['source']}",
        [
            ("parameters trained / of the model", f"{values['trained']:,} / {values['parameters']:,}"),
            ("text", values["data"]),
            ("tokens", f"{values['tokens']:,}"),
            ("steps", f"{values['steps']:,} of {values['rows_per_step']} x {values['sequence_length']} tokens"),
            ("teacher", asked),
            ("measurement", measured),
            ("disk needed", size(values["disk_bytes"])),
            ("memory needed by each process, about", size(values["memory_bytes"])),
            ("time on this machine, about", _stages(values["seconds"])),
        ],
        ("", "healing"),
    )


def _stages(seconds: dict[str, float]) -> str:
    """Seconds by stage as their sum and the longest stage."""
    longest = max(seconds, key=lambda stage: seconds[stage])
    return f"{_rounded(sum(seconds.values()))}, {longest} {_rounded(seconds[longest])}"


def _rounded(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
