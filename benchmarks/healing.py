"""Healing against its alternatives at the same tokens: other losses, other starts, fewer heads, fewer bits, more training.

    python benchmarks/healing.py --model MODEL --train-data heal.txt --eval-data val.txt --out results
    python benchmarks/healing.py ... --only "kl 8" --seeds 1 --heal-tokens 65536
    python benchmarks/healing.py ... --recall questions.jsonl            # recall of every result
    python benchmarks/healing.py --out results --table                   # table and plot of what is measured

In: a model and two text files that share no document; every result is trained on the first, every figure is of the second. Out:
`results/healing.json`, one entry per measurement, `healing.svg` (perplexity over tokens) and a Markdown table. A measurement that
is in the file is not repeated, so the run may be stopped and started again. Nothing is chosen by the figures.

Everything is trained by the same loop on the same rows with LoRA of rank 64 on queries, outputs and the MLP:

- `kl`: the learned start and the loss of the recipes; `cross-entropy`: the text alone; `self`: text that the source wrote;
- `budget`: as `kl`, with half of the cache, but as many heads in each layer as it bears;
- `mixed`, `mixed budget`: as `kl` and `budget`, with 0.3 of the cross-entropy of the text beside the KL, at a rate of 2.5e-4;
- `svd`, `mean`: as `kl`, from these starts; `full`: as `svd`, with the attention trained in full, as the recipe `full`;
- `progressive`, `mean progressive`: attention passes from the source's to the shared one over the first 30 % of the training;
- `gqa`: K and V kept apart, neighbouring heads averaged to half as many as `kl` shares, so that the cache is the same;
- `more training`: the source on the text alone; K and V are trained as shared projections are;
- `more mixed training`: the source as `mixed`, the KL to itself;
- `int8`, `int4`: the source with its cache in so many bits, not trained;
- `..., cache in 8 bits`: what was healed, through such a cache, by the channels that were taken before healing;
- `speed`: tokens per second of `kl`, of `cross-entropy` (no teacher), and of the transformers Trainer with PEFT on the source.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import Book, Texts, converted, figures, made, quantised, rounded
from torch import Tensor, nn

import kvshare
from kvshare.checkpoint import fresh_folder
from kvshare.data import SelfCache, load_tokenizer
from kvshare.evaluation import compare, evaluation_rows, stored_bytes
from kvshare.families import family_of
from kvshare.healing import heal_rows
from kvshare.loading import load_native
from kvshare.losses import next_token_loss
from kvshare.plots import BOTH, INK, KEYS, STYLE, VALUES, WORST
from kvshare.progress import silent
from kvshare.recipe import Recipe, load_recipe
from kvshare.retrieval import read_questions, recall
from kvshare.source import open_source
from kvshare.tensors import best_device
from kvshare.training import train

TEXT_ALONE: dict[str, Any] = {"kl": 0.0, "cross_entropy": 1.0}
MIXED: dict[str, Any] = {"cross_entropy": 0.3, "learning_rate": 2.5e-4}
BUDGET = 0.5  # of the source's cache: what half of its bytes buy where layers share unequally
POINTS = 8  # of the curve, evenly spread
IN_8_BITS = "cache in 8 bits"


class Options(Texts):
    """All that this benchmark is given."""

    model: str
    heads: list[int]
    seeds: int
    heal_tokens: int
    fit_steps: int | None
    calibration_tokens: int | None
    speed_tokens: int
    curve_rows: int
    recall: Path | None
    only: str
    table: bool


class Bench:
    """What all measurements of a model share; the models are loaded anew for each."""

    def __init__(self, options: Options) -> None:
        self.options, self.device = options, best_device()
        self.source = open_source(options.model)
        self.tokenizer = load_tokenizer(self.source.path)
        self.bytes = stored_bytes(self.source.path)
        settings = load_recipe(None, evaluation__data=options.eval_data, evaluation__tokens=options.eval_tokens).evaluation
        self.held_out = evaluation_rows(settings, self.tokenizer, None, 0, silent)
        self.questions = read_questions(options.recall) if options.recall else None
        family = family_of(self.source.model_type)
        self.heads = int(self.source.config.get(family.kv_heads or "", 0)) or int(
            self.source.config[family.field("num_attention_heads", self.source.config)]
        )

    def teacher(self) -> Any:
        """The source in float32."""
        return load_native(self.source.path, dtype=torch.float32).to(self.device)

    def shared(self, init: str, heads: int, seed: int) -> Any:
        """A converted model that is not healed."""
        folder = converted(self.options.model, init, heads, seed, self.options, self.options.train_data)
        return kvshare.load(folder, dtype=torch.float32).to(self.device)

    def budgeted(self, budget: float, seed: int) -> Any:
        """A converted model that is not healed, whose layers share as many heads as they bear."""
        options = self.options
        longer = {"fit__steps": options.fit_steps, "calibration__tokens": options.calibration_tokens}
        longer = {name: value for name, value in longer.items() if value}
        recipe = load_recipe("eighth", kv_heads="all", cache_budget=budget, **longer)
        folder = made(options.model, f"budget-{budget}-{seed}", recipe, seed, options, options.train_data)
        return kvshare.load(folder, dtype=torch.float32).to(self.device)

    def grouped(self, heads: int) -> Any:
        """The source with neighbouring KV heads averaged, K and V apart."""
        source = self.teacher()
        family = family_of(self.source.model_type)
        config = copy.deepcopy(source.config)
        assert family.kv_heads is not None
        setattr(config, family.kv_heads, heads)
        model = type(source)(config).float().eval().to(self.device)
        values = source.state_dict()
        for name, old in values.items():
            if old.shape != model.state_dict()[name].shape:
                values[name] = old.view(heads, self.heads // heads, -1, *old.shape[1:]).mean(1).reshape(-1, *old.shape[1:])
        model.load_state_dict(values)
        return self.whole(model)

    def whole(self, model: Any) -> Any:
        """A model that keeps K and V apart, marked so that `train` trains keys as it trains shared projections."""
        model.config.kvshare = {"layers": list(range(int(model.config.num_hidden_layers)))}
        return model

    def recipe(self, tokens: int, seed: int, data: str, **heal: Any) -> Recipe:
        """The default recipe with these settings of healing."""
        given = {"tokens": tokens, "data": data, "dtype": "float32", "lora_rank": 64, **heal}
        return load_recipe(None, seed=seed, **{f"heal__{name}": value for name, value in given.items()})

    def train(
        self, name: str, student: Any, seed: int, data: str | None = None, tokens: int | None = None, **heal: Any
    ) -> tuple[list[tuple[int, float]], float, float]:
        """Train `student` in place; returns the curve (tokens, perplexity of the first held-out rows), tokens per second, and the
        learning rate.
        """
        options = self.options
        recipe = self.recipe(tokens or options.heal_tokens, seed, data or options.train_data, **heal)
        teacher = self.teacher()
        rows = heal_rows(recipe, self.tokenizer, teacher, silent, SelfCache(options.out, str(self.source.path)))
        curve: list[tuple[int, float]] = [(0, self.perplexity(student))]
        spent, began, first = 0.0, 0.0, 0

        def look(stage: str, done: int, total: int) -> None:
            nonlocal spent, began, first
            now = time.perf_counter()
            if stage != "healing":
                return
            if began:
                spent += now - began
            else:
                first = done
            if tokens is None and (done == total or done % max(1, total // POINTS) == 0):
                curve.append((done * rows.numel() // total, self.perplexity(student)))
            began = time.perf_counter()

        state = fresh_folder(options.out / "states" / name.replace(" ", "-"))
        _, result = train(student, teacher, rows, recipe.heal, seed, state, False, look)
        shutil.rmtree(state)
        speed = rows.numel() * (result.steps - first) / result.steps / spent if spent else float("nan")
        return curve, speed, result.learning_rate

    def perplexity(self, model: Any) -> float:
        """Of the first rows of the held-out text, for the curve."""
        training = model.training
        model.eval()
        with torch.no_grad():
            rows = self.held_out[: self.options.curve_rows].to(self.device)
            losses = [next_token_loss(model(input_ids=row, use_cache=False).logits, row) for row in rows.split(1)]
        model.train(training)
        return math.exp(statistics.fmean(map(float, losses)))

    def healed(self, name: str, student: Any, seed: int, data: str | None = None, **heal: Any) -> dict[str, Any]:
        """The figures of a model that is trained, and how it got there."""
        curve, speed, rate = self.train(name, student, seed, data, **heal)
        student, teacher = student.eval(), self.teacher()
        report = compare(student, teacher, self.held_out, Path(self.options.eval_data).name, self.bytes)
        values = figures(report) | {"curve": curve, "tokens_per_second": speed, "learning_rate": rate}
        if any(getattr(module, "kvshare_channels", None) is not None for module in student.modules()):
            values[IN_8_BITS] = rounded(student, teacher, self.held_out, 8, self.bytes)
        if self.questions:
            values["recall"] = recall(student, self.tokenizer, self.questions)
        return values


def plain_trainer(bench: Bench) -> float:
    """Tokens per second of the transformers Trainer with PEFT on the source, as anyone would write it."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from kvshare.distillation import Schedule, training_arguments
    from kvshare.training import batch_rows

    recipe = bench.recipe(bench.options.speed_tokens, 0, bench.options.train_data)
    rows = heal_rows(recipe, bench.tokenizer, None, silent)
    model = bench.teacher()
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = sorted(linear & set(recipe.heal.lora_targets))
    adapted = get_peft_model(model, LoraConfig(r=recipe.heal.lora_rank, target_modules=targets, task_type="CAUSAL_LM"))
    batch, micro = batch_rows(recipe.heal, rows.shape[1], int(model.config.vocab_size), len(rows))
    steps = len(rows) // batch
    times: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": rows[index], "labels": rows[index]}

    state = fresh_folder(bench.options.out / "states" / "plain")
    schedule = Schedule(micro, batch // micro, steps, 1e-3)
    arguments = training_arguments(state, schedule, recipe.heal, 10 * steps, 0)
    arguments.label_names = ["labels"]
    trainer = Trainer(model=adapted, args=arguments, train_dataset=Rows(), callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(state)
    return batch * rows.shape[1] * (steps - 1) / (times[-1] - times[0])


def speeds(bench: Bench) -> dict[str, Any]:
    """Tokens per second of each way, one after the other."""
    half = bench.heads
    with_teacher = bench.train("speed", bench.shared("svd", half, 0), 0, tokens=bench.options.speed_tokens)[1]
    without = bench.train("speed", bench.shared("svd", half, 0), 0, tokens=bench.options.speed_tokens, **TEXT_ALONE)[1]
    plain = plain_trainer(bench)
    return {
        "plain": plain,
        "without_teacher": without,
        "with_teacher": with_teacher,
        "ratio_without_teacher": without / plain,
        "ratio_with_teacher": with_teacher / plain,
    }


def measure_all(book: Book, bench: Bench) -> None:
    """Every measurement, a seed after the other."""
    options = bench.options

    def measure(name: str, make: Callable[[], Any], seed: int, data: str | None = None, **heal: Any) -> None:
        name = f"{name} seed {seed}"
        book.measure(name, lambda: bench.healed(name, make(), seed, data, **heal))

    book.measure("speed", lambda: speeds(bench))
    for bits in (8, 4):
        book.measure(f"int{bits}", partial(quantised, options.model, None, bits, options))
    for seed in range(options.seeds):
        measure("more training", lambda: bench.whole(bench.teacher()), seed, **TEXT_ALONE, lora_targets=_with_values(bench))
        measure("more mixed training", lambda: bench.whole(bench.teacher()), seed, **MIXED, lora_targets=_with_values(bench))
        for heads in options.heads:
            start = partial(bench.shared, "learned", heads, seed)
            measure(f"kl {heads}", start, seed)
            measure(f"mixed {heads}", start, seed, **MIXED)
            measure(f"cross-entropy {heads}", start, seed, **TEXT_ALONE)
            measure(f"mean {heads}", partial(bench.shared, "mean", heads, seed), seed)
            measure(f"self {heads}", start, seed, "self")
            if heads == bench.heads:
                measure(f"svd {heads}", partial(bench.shared, "svd", heads, seed), seed)
                measure(f"full {heads}", partial(bench.shared, "svd", heads, seed), seed, attention="full")
                measure(f"budget {BUDGET}", partial(bench.budgeted, BUDGET, seed), seed)
                measure(f"mixed budget {BUDGET}", partial(bench.budgeted, BUDGET, seed), seed, **MIXED)
                measure(f"progressive {heads}", start, seed, progressive=0.3)
                measure(f"mean progressive {heads}", partial(bench.shared, "mean", heads, seed), seed, progressive=0.3)
            if heads % 2 == 0:
                grouped = partial(bench.grouped, heads // 2)
                measure(f"gqa {heads}", grouped, seed, lora_targets=_with_values(bench))


def _with_values(bench: Bench) -> tuple[str, ...]:
    """The modules that get LoRA where K and V are apart: values too."""
    return (*load_recipe(None).heal.lora_targets, family_of(bench.source.model_type).v)


def table(entries: dict[str, dict[str, Any]]) -> str:
    """All measurements as Markdown; increases are over the source as it is, over the source that was trained as long on the text
    alone, and over the source that was trained as long by the same loss, which by the KL to itself stays as it is.
    """
    entries = dict(part for full, entry in entries.items() for part in _rows(full, entry))
    names = list(dict.fromkeys(name.partition(" seed ")[0] for name in entries))

    def found(name: str, key: str) -> list[float]:
        chosen = [entry for full, entry in entries.items() if full.partition(" seed ")[0] == name and key in entry]
        return [float(entry[key]) for entry in chosen]

    def cell(values: list[float], form: str) -> str:
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    def over(name: str, base: str) -> str:
        trained = found(base, "perplexity")
        return cell([value / statistics.mean(trained) - 1 for value in found(name, "perplexity") if trained], "+.2%")

    lines = [
        "| measurement | cache saved | perplexity over the source's | over that of the source trained as long "
        "| by the same loss | KL | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if name == "speed":
            continue
        increase = cell(found(name, "perplexity_increase"), "+.2%")
        by_text, by_both = over(name, "more training"), over(name, "more mixed training")
        alike = by_both if "mixed" in name else by_text if name.startswith(("cross-entropy", "more training")) else increase
        lines.append(
            f"| {name} | {cell(found(name, 'cache_reduction')[:1], '.2%')} | {increase} | {by_text} | {alike} | "
            f"{cell(found(name, 'kl'), '.4f')} | {cell(found(name, 'recall'), '.1%')} |"
        )
    if speed := entries.get("speed"):
        lines += [
            "",
            f"Tokens per second: {speed['plain']:.0f} plain PEFT and Trainer on the source; healing without its teacher "
            f"{speed['without_teacher']:.0f} ({speed['ratio_without_teacher']:.2f}x), with it {speed['with_teacher']:.0f} "
            f"({speed['ratio_with_teacher']:.2f}x).",
        ]
    return "\n".join(lines)


def _rows(full: str, entry: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A measurement and, where it was taken, the same with its cache in 8 bits."""
    name, _, seed = full.partition(" seed ")
    rounded_too = [(f"{name}, {IN_8_BITS} seed {seed}", entry[IN_8_BITS])] if IN_8_BITS in entry else []
    return [(full, entry), *rounded_too]


def plot(entries: dict[str, dict[str, Any]], heads: list[int], file: Path) -> None:
    """Perplexity above the source's over tokens, of the first seed of each way, a panel for every number of heads."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    ways = {"kl": BOTH, "self": "#7a5fb5", "cross-entropy": KEYS, "mean": WORST, "gqa": VALUES}

    def curve(name: str) -> list[tuple[int, float]]:
        return next((entry["curve"] for full, entry in entries.items() if full.partition(" seed ")[0] == name), [])

    trained = curve("more training")
    if not trained:
        return
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(heads), 3.4), layout="constrained")
        for axes, count in zip(figure.subplots(1, len(heads), squeeze=False, sharey=True)[0], heads, strict=True):
            lines = {way: (curve(f"{way} {count}"), colour, "-", "o") for way, colour in ways.items()}
            lines["source, trained as long"] = (trained, INK, "--", "")
            if "int4" in entries:
                level = trained[0][1] * (1 + entries["int4"]["perplexity_increase"])
                lines["int4 cache, not trained"] = ([(tokens, level) for tokens, _ in trained], INK, ":", "")
            for label, (points, colour, style, marker) in lines.items():
                above = [(tokens / 1e3, 100 * (value / trained[0][1] - 1)) for tokens, value in points]
                if shown := [point for point in above if point[1] > 0]:
                    axes.plot(*zip(*shown, strict=True), color=colour, linestyle=style, marker=marker, label=label)
            axes.set(yscale="log", xlabel="thousands of tokens", title=f"{count} shared head" + "s" * (count > 1))
            axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
            axes.grid(visible=True)
        figure.axes[0].set_ylabel("held-out perplexity above the source's")
        labels = {line.get_label(): line for axes in figure.axes for line in axes.lines}  # a panel may lack some
        if labels:
            figure.legend(list(labels.values()), list(map(str, labels)), loc="outside lower center", ncols=len(labels))
        figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="kvshare/tiny")
    parser.add_argument("--train-data", help="text for calibration and training")
    parser.add_argument("--eval-data", help="held-out text")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"))
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 2, 1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heal-tokens", type=int, default=655_360)
    parser.add_argument("--fit-steps", type=int, help="of each layer before healing, for a budget, in place of the recipe's")
    parser.add_argument("--calibration-tokens", type=int, help="for a budget, in place of the recipe's")
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    parser.add_argument("--speed-tokens", type=int, default=65_536)
    parser.add_argument("--curve-rows", type=int, default=32, help="held-out rows for each point of the curves")
    parser.add_argument("--recall", type=Path, help="questions: .jsonl with prompt and answer")
    parser.add_argument("--only", default="", help="measure only what this regular expression finds in the name")
    parser.add_argument("--table", action="store_true", help="print the table of what is measured, draw the plot, and stop")
    options = parser.parse_args(namespace=Options())
    if not options.table and not (options.train_data and options.eval_data):
        parser.error("--train-data and --eval-data are needed to measure")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    book = Book(options.out / "healing.json", options.only)
    if not options.table:
        measure_all(book, Bench(options))
    print(table(book.entries))
    plot(book.entries, options.heads, options.out / "healing.svg")


if __name__ == "__main__":
    main()
