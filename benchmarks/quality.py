"""Quality of every initialisation and head count, before and after healing, against the same bytes spent otherwise.

    python benchmarks/quality.py --train-data heal.txt --eval-data val.txt --out results
    python benchmarks/quality.py ... --recall-model DIR --recall questions.jsonl --recall-data ledgers.txt
    python benchmarks/quality.py --model DIR ... --heads 4 2 1    # another model
    python benchmarks/quality.py --form rotated --only "^(svd|learned) 8 (healed )?seed 0" ...    # the other form, in its own file

In: two text files that share no document (calibration and healing read the first, figures come from the second) and,
for recall, a model that answers questions about its context. Out: `results/quality.json`, one entry per measurement, and
a Markdown table. A measurement that is already in the file is not repeated, so the run may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor

import kvshare
from kvshare.checkpoint import write_json
from kvshare.data import load_tokenizer
from kvshare.evaluation import compare_quantised, evaluation_rows, stored_bytes
from kvshare.loading import load_native
from kvshare.progress import silent
from kvshare.recipe import Recipe, load_recipe
from kvshare.retrieval import read_questions, recall
from kvshare.sections import Form
from kvshare.source import open_source
from kvshare.tensors import best_device

INITS = ("mean", "svd", "learned")
ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "errors weighed by queries and output projection alone": {"merge__weighting": "projections"},
    "errors not weighed": {"merge__weighting": "none"},
    "no line search": {"merge__balance": (1.0,)},
    "heads merged first, K and V shared after": {"merge__joint": False},
    "neighbouring heads merged": {"merge__grouping": "neighbours"},
    "no refit": {"merge__refit": False},
    "statistics of the source": {"merge__sequential": False},
}
REGROUPING = ("heads merged first, K and V shared after", "neighbouring heads merged")  # nothing to show with every head kept
BUDGETS = (0.5, 0.375, 0.25, 0.125)
FIGURES = ("perplexity_increase", "kl", "token_agreement", "cache_reduction", "perplexity", "source_perplexity")


class Texts(argparse.Namespace):
    """What the measurement of a conversion is given."""

    form: Form = "shared"
    train_data: str
    eval_data: str
    eval_tokens: int
    out: Path


class Options(Texts):
    """All that this benchmark is given."""

    model: str
    heads: list[int]
    seeds: int
    heal_tokens: int
    recall_model: str | None
    recall: Path
    recall_data: str
    only: str
    table: bool


class Book:
    """The measurements, by name, on the disk after each."""

    def __init__(self, file: Path, only: str) -> None:
        self.file, self.only = file, re.compile(only)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """All measurements so far, those of a run beside this one included."""
        return json.loads(self.file.read_text()) if self.file.is_file() else {}

    def measure(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run a measurement unless its figures are there or it is not wanted."""
        if self.only.search(name) and name not in self.entries:
            values = run()
            with FileLock(self.file.with_suffix(".lock")):
                write_json(self.file, {**self.entries, name: values})
            shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
            print(name, {key: value for key, value in shown.items() if not isinstance(value, list)}, flush=True)


def figures(report: Any) -> dict[str, Any]:
    """The figures of a `Report` that the table uses."""
    values = report.to_dict()
    return {key: values[key] for key in FIGURES}


def converted(model: str, init: str, heads: int, seed: int, options: Texts, train: str, ablation: str = "as it is") -> Path:
    """The unhealed checkpoint of these settings, converted once."""
    which = "" if options.form == "shared" else f"{options.form}-"
    which += init if ablation == "as it is" else ablation.replace(" ", "-")
    settings = {"init": init, "form": options.form, "kv_heads": heads, **ABLATIONS[ablation]}
    recipe = load_recipe("eighth" if init == "learned" else "half", **settings)
    return made(model, f"{which}-{heads}-{seed}", recipe, seed, options, train)


def made(model: str, name: str, recipe: Recipe, seed: int, options: Texts, train: str) -> Path:
    """The unhealed checkpoint of a recipe, converted once; its figures lie in its report."""
    output = options.out / f"{Path(model).name}-{name}"
    if not output.exists():
        kvshare.convert(
            model,
            output,
            recipe=recipe,
            calibration=train,
            heal=False,
            seed=seed,
            eval_data=options.eval_data,
            eval_tokens=options.eval_tokens,
        )
    return output


def unhealed(model: str, init: str, heads: int, seed: int, options: Options, ablation: str = "as it is") -> dict[str, Any]:
    folder = converted(model, init, heads, seed, options, options.train_data, ablation)
    report = json.loads((folder / "report.json").read_text())
    return {key: report[key] for key in FIGURES}


def healed(model: str, init: str, heads: int, seed: int, options: Options) -> dict[str, Any]:
    folder = converted(model, init, heads, seed, options, options.train_data)
    output = options.out / f"{folder.name}-healed"
    if not output.exists():
        kvshare.heal(folder, output, model, options.train_data, tokens=options.heal_tokens, seed=seed)
    return figures(kvshare.evaluate(output, model, options.eval_data, tokens=options.eval_tokens))


def within_budget(model: str, budget: float, options: Options) -> dict[str, Any]:
    """The heads that a cache budget chooses, layer by layer, and what they cost together."""
    output = made(model, f"budget-{budget}", load_recipe(None, cache_budget=budget), 0, options, options.train_data)
    report = json.loads((output / "report.json").read_text())
    sensitivity = report["sensitivity"]
    return {key: report[key] for key in FIGURES} | {
        "chosen": ", ".join(layer["chosen"] for layer in sensitivity["layers"]),
        "rank_correlation": sensitivity["agreement"]["spearman"],
    }


def quantised(model: str, folder: Path | None, bits: int, options: Texts) -> dict[str, Any]:
    """The source, or a converted checkpoint, with its cache held in so many bits."""
    source = load_native(open_source(model).path, dtype=torch.float32).to(best_device())
    student = source if folder is None else kvshare.load(folder, dtype=torch.float32).to(best_device())
    settings = load_recipe(None, evaluation__data=options.eval_data, evaluation__tokens=options.eval_tokens).evaluation
    rows = evaluation_rows(settings, load_tokenizer(open_source(model).path), source, 0, silent)
    return rounded(student, source, rows, bits, stored_bytes(open_source(model).path))


def rounded(student: Any, source: Any, rows: Tensor, bits: int, item_bytes: int) -> dict[str, Any]:
    """Figures of a model with its cache in so many bits; for the arguments see `compare_quantised`."""
    report = compare_quantised(student, source, rows, bits, item_bytes)
    values = {name: getattr(report, name) for name in FIGURES if name != "source_perplexity"}
    return values | {"source_perplexity": report.perplexity / (1 + report.perplexity_increase)}


def recalled(model: str, folder: Path | None, options: Options) -> dict[str, Any]:
    path = open_source(model).path
    net = load_native(path, dtype=torch.float32) if folder is None else kvshare.load(folder, dtype=torch.float32)
    return {"recall": recall(net.to(best_device()), load_tokenizer(path), read_questions(options.recall))}


def converted_recall(model: str, init: str, heads: int, options: Options) -> dict[str, Any]:
    """Recall of a conversion."""
    return recalled(model, converted(model, init, heads, 0, options, options.recall_data), options)


def healed_recall(model: str, init: str, heads: int, options: Options) -> dict[str, Any]:
    """Recall after healing with a quarter of the tokens."""
    folder = converted(model, init, heads, 0, options, options.recall_data)
    output = options.out / f"{folder.name}-healed"
    if not output.exists():
        kvshare.heal(folder, output, model, options.recall_data, tokens=options.heal_tokens // 4, seed=0)
    return recalled(model, output, options)


def table(book: Book, heads: list[int], seeds: int) -> str:
    """All measurements as Markdown."""
    entries = book.entries

    def cell(name: str) -> str:
        found = [entries[f"{name} seed {seed}"]["perplexity_increase"] for seed in range(seeds) if f"{name} seed {seed}" in entries]
        if not found:
            return "–"
        spread = f" ± {statistics.stdev(found):.2%}" if len(found) > 1 else ""
        return f"{statistics.mean(found):+.2%}{spread}"

    columns = [f"{init}{state}" for init in INITS for state in ("", ", healed")]
    lines = ["| KV heads (cache saved) | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for count in heads:
        cells = [cell(f"{init} {count}{state}") for init in INITS for state in ("", " healed")]
        saved = next((e["cache_reduction"] for n, e in entries.items() if f" {count} seed" in n), float("nan"))
        lines.append(f"| {count} ({saved:.2%}) | " + " | ".join(cells) + " |")
    lines += ["", "| measurement | perplexity | KL | agreement | cache saved |", "|---|---|---|---|---|"]
    for name, entry in sorted(entries.items()):
        if "kl" in entry and " with " not in name:
            lines.append(
                f"| {name} | {entry['perplexity_increase']:+.2%} | {entry['kl']:.4f} | {entry['token_agreement']:.1%} | "
                f"{entry['cache_reduction']:.2%} |"
            )
    budgets = {name: entry for name, entry in entries.items() if "chosen" in entry}
    if budgets:
        lines += ["", "| cache budget | chosen heads, layer by layer | perplexity | rank correlation |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {entry['chosen']} | {entry['perplexity_increase']:+.2%} | {entry['rank_correlation']:.2f} |"
        for name, entry in sorted(budgets.items(), reverse=True)
    ]
    shown = [count for count in heads if f"svd {count} seed 0" in entries]
    lines += [
        "",
        "| svd, not healed, seed 0 | " + " | ".join(f"{count} heads" for count in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for ablation in ABLATIONS:
        names = [f"svd {count} seed 0" if ablation == "as it is" else f"svd {count} with {ablation}" for count in shown]
        found = [f"{entries[name]['perplexity_increase']:+.2%}" if name in entries else "–" for name in names]
        lines.append(f"| {ablation} | " + " | ".join(found) + " |")
    lines += ["", "| recall | answered |", "|---|---|"]
    lines += [f"| {name} | {entry['recall']:.1%} |" for name, entry in sorted(entries.items()) if "recall" in entry]
    return "\n".join(lines)


def measure_all(book: Book, options: Options) -> None:
    """Every measurement, the quick ones first."""
    model, heads = options.model, options.heads
    for count in heads:
        book.measure(f"mean {count} seed 0", partial(unhealed, model, "mean", count, 0, options))
        for seed in range(options.seeds):
            book.measure(f"svd {count} seed {seed}", partial(unhealed, model, "svd", count, seed, options))
    book.measure("int8 cache", lambda: quantised(model, None, 8, options))
    half = heads[0]
    try:
        kvshare.plan(model, init="exact")
        book.measure("exact seed 0", lambda: unhealed(model, "exact", half, 0, options))
    except kvshare.KVShareError as error:
        print(f"no exact form: {error}")
    book.measure(
        f"svd {half} + int8 cache",
        lambda: quantised(model, converted(model, "svd", half, 0, options, options.train_data), 8, options),
    )
    if options.recall_model:
        measure_recall(book, options)
    for budget in BUDGETS:
        book.measure(f"budget {budget} seed 0", partial(within_budget, model, budget, options))
    for init in ("svd", "learned", "mean"):
        for count in heads:
            book.measure(f"{init} {count} seed 0", partial(unhealed, model, init, count, 0, options))
            book.measure(f"{init} {count} healed seed 0", partial(healed, model, init, count, 0, options))
    for ablation, count in product(ABLATIONS, heads):
        if ablation != "as it is" and not (ablation in REGROUPING and count == max(heads)):
            book.measure(f"svd {count} with {ablation}", partial(unhealed, model, "svd", count, 0, options, ablation))
    for seed, count in product(range(1, options.seeds), heads):
        book.measure(f"learned {count} seed {seed}", partial(unhealed, model, "learned", count, seed, options))


def measure_recall(book: Book, options: Options) -> None:
    """Recall of a model that can do it: as it was, converted, converted and healed."""
    teller = options.recall_model
    assert teller is not None
    book.measure("source recall", lambda: recalled(teller, None, options))
    for count in options.heads:
        for init in INITS:
            book.measure(f"{init} {count} recall", partial(converted_recall, teller, init, count, options))
        for init in ("svd", "learned"):
            book.measure(f"{init} {count} healed recall", partial(healed_recall, teller, init, count, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kvshare/tiny")
    parser.add_argument("--form", default="shared", choices=["shared", "rotated"])
    parser.add_argument("--train-data", required=True, help="text for calibration and healing")
    parser.add_argument("--eval-data", required=True, help="held-out text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 4, 2, 1])
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds without healing")
    parser.add_argument("--heal-tokens", type=int, default=655_360)
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--recall-model", help="a model trained to answer questions about its context")
    parser.add_argument("--recall", type=Path, help="questions: .jsonl with prompt and answer")
    parser.add_argument("--recall-data", default="self", help="text to calibrate and heal that model on")
    parser.add_argument("--only", default="", help="measure only what this regular expression finds in the name")
    parser.add_argument("--table", action="store_true", help="print the table of what is measured and stop")
    options = parser.parse_args(namespace=Options())
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options.out / ("quality.json" if options.form == "shared" else f"quality-{options.form}.json"), options.only)
    if not options.table:
        measure_all(book, options)
    print(table(book, options.heads, options.seeds))


if __name__ == "__main__":
    main()
