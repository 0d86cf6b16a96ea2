"""The conversion: plan, merge layer by layer, heal, measure, publish; a run that broke off is gone on with.

In: a model and settings. Out: a checkpoint folder with its report. Never: leaves a half-written output, writes into the source.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare import processes
from kvshare.card import card_files, card_matter
from kvshare.channels import write_channels
from kvshare.checkpoint import (
    MANIFEST,
    check_output,
    check_space,
    fresh_folder,
    is_published,
    publish,
    sha256,
    sync_folder,
    work_folder,
    workspace,
    write_files,
    write_json,
)
from kvshare.contamination import Contamination, contamination
from kvshare.data import SelfCache, calibration_rows, tokenizer_for
from kvshare.evaluation import Report, evaluation_rows
from kvshare.exact import ExactLayer, check_layers
from kvshare.healing import carry_files, heal_into, heal_rows
from kvshare.journal import JOB, JOURNAL, Journal, check_same, content_of, flat, open_journal, read_journal, versions
from kvshare.layerwise import LayerReport
from kvshare.loading import load_native, reload
from kvshare.memory import needs_whole
from kvshare.merged import layer_reports, weight_sums, write_merged
from kvshare.mixture import parts_of
from kvshare.native import require_form
from kvshare.planning import Plan, make_plan
from kvshare.progress import Progress, silent
from kvshare.quality import check_quality, measure
from kvshare.recipe import Recipe, calibrates, conversion_recipe, data_used, made_by
from kvshare.refusals import one_process_because
from kvshare.sensitivity import Sensitivity, measure_sensitivity
from kvshare.sizes import bytes_of
from kvshare.source import open_source, read_json
from kvshare.spreading import check_left, merge_as_first, merge_as_other
from kvshare.statistics import open_statistics
from kvshare.tensors import best_device
from kvshare.training import HealResult, check_healing

# the stages, as the journal names them
CONTAMINATION, SENSITIVITY, MERGED, HEALED, MEASURED = "contamination", "sensitivity", "merged", "healed", "measured"
STAGED = "merged"  # where in the work folder the merged checkpoint is made
BETTER = (
    "the same command with a higher limit publishes this result; with --restart, more KV heads, init learned or more healing may "
    "give a better one"
)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: its plan, what a cache budget's choice rests on, one report per merged layer (none for `mean`),
    the healing if any, the measurement, and what its text shares with that of calibration and healing.
    """

    output: Path
    plan: Plan
    sensitivity: Sensitivity | None
    layers: tuple[LayerReport, ...] | tuple[ExactLayer, ...]
    heal: HealResult | None
    report: Report | None
    contamination: Contamination | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data: the evaluation's figures, if any, at the top level, the rest below. This is report.json."""
        return {
            **({} if self.report is None else self.report.to_dict()),
            "sensitivity": None if self.sensitivity is None else self.sensitivity.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
            "heal": None if self.heal is None else self.heal.to_dict(),
            "contamination": None if self.contamination is None else self.contamination.to_dict(),
        }


def convert(
    model: str | Path,
    output: str | Path,
    *,
    init: str | None = None,
    form: str | None = None,
    kv_heads: int | str | None = None,
    cache_budget: float | None = None,
    recipe: str | Path | Recipe | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    statistics: str | Path | None = None,
    heal: bool | None = None,
    heal_data: str | None = None,
    heal_tokens: int | None = None,
    eval_data: str | None = None,
    eval_tokens: int | None = None,
    eval_mode: str | None = None,
    max_perplexity_increase: float | None = None,
    mlx: bool | None = None,
    seed: int | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Give a model back with a shared K and V. Every None means "as the recipe says".

    Where `accelerate launch` has started several processes with the same arguments, they share the layers, if these can be merged
    each by itself (see `one_process_because`). The first then measures and publishes; the others return what is known by then.

    Args:
        model: a Hub id (with `@revision`), a local folder, or `kvshare/tiny`.
        output: a new folder.
        init: `mean`, `svd`, `learned` or `exact`.
        form: `shared`, or `rotated`: another function, whose cache stock attention reads as K and as V.
        kv_heads: KV heads of the output, a divisor of the source's, or a fraction such as `1/4`.
        cache_budget: the most of the source's cache to keep, such as 0.3, in place of `kv_heads`: layers then keep K and V apart,
            share them, or share fewer heads, as they are found to bear it.
        recipe: a shipped recipe's name, a YAML file or a `Recipe`.
        calibration, calibration_tokens: text for the merge.
        statistics: a folder that `calibrate` wrote, in place of text.
        heal: whether to distil after the merge.
        heal_data, heal_tokens: text to distil on; the calibration's data where only that is given.
        eval_data, eval_tokens: held-out text for the final measurement.
        eval_mode: `whole`, with both models in memory; `layers`, layer by layer; or `off`.
        max_perplexity_increase: the quality gate, such as 0.05; a result that is worse is not published.
        mlx: whether mlx-lm uses the smaller cache, too.
        seed: decides samples, order of data and initial LoRA weights.
        max_shard_size: the most bytes of a weight file, such as `5GB`; None keeps the files of the source.
        overwrite: replace an output that kvshare wrote.
        restart: begin again, whatever an earlier run that broke off has finished. Otherwise the same call goes on with it.
        progress: called on the way.

    Raises:
        KVShareError: see the modules `recipe`, `source`, `planning`, `data` and `checkpoint`; nothing is left behind, but where the
            disk became full or training diverged: then what is finished stays, and the same call goes on with it.
        UsageError: several processes were started for a conversion that takes one.
        QualityError: the result does not pass the quality gate; it stays, and the same call with a higher limit publishes it.
    """
    settings = conversion_recipe(
        recipe,
        init,
        form,
        kv_heads,
        cache_budget,
        calibration,
        calibration_tokens,
        statistics,
        heal,
        heal_data,
        heal_tokens,
        eval_data,
        eval_tokens,
        eval_mode,
        seed,
        max_perplexity_increase,
        mlx,
    )
    processes.require_one("this conversion", one_process_because(settings))
    target = Path(output)
    source = open_source(model)
    most = None if max_shard_size is None else bytes_of(max_shard_size, "max_shard_size")
    plan = make_plan(source, settings, max_shard_bytes=most)
    tokenizer = check_conversion(plan, target, overwrite)
    job = _job(plan)
    checked = check_layers(plan, progress) if plan.recipe.init == "exact" else ()
    earlier = {} if restart else read_journal(work_folder(target) / JOURNAL)
    if processes.count() > 1 and JOB in earlier:
        check_same(earlier[JOB], job, work_folder(target))  # in all of them, so that none waits for one that has refused
    shares = processes.count() > 1 and MERGED not in earlier
    progress = progress if processes.is_first() else silent
    rows = calibration_rows(settings, tokenizer, None, progress) if shares and calibrates(plan.recipe) else None
    processes.meet()  # all have looked at output and work before one of them writes
    if not processes.is_first():
        work, journal = work_folder(target), Journal(work_folder(target) / JOURNAL, earlier)
        if shares:
            journal = merge_as_other(work, work / STAGED, plan, rows, best_device(), job, progress)
        return Conversion(target, plan, None, layer_reports(plan, journal), None, None)
    with workspace(target, resumable=True) as work:
        check_left(work)
        journal = open_journal(work, job, restart)
        if not is_published(target, journal.entries):
            if shares:
                merge_as_first(work / STAGED, plan, rows, best_device(), journal, progress)
            staged = _make(work, plan, tokenizer, journal, progress)
            result = _conversion(target, plan, checked, journal)
            if result.report is not None:
                check_quality(result.report, settings.evaluation, f"and the work is kept in {work}", BETTER, keeps_work=True)
            write_json(staged / "report.json", result.to_dict())
            matter = card_matter(source, plan.recipe)
            write_files(staged, card_files(read_json(staged / "config.json"), matter, result.to_dict()))
            publish(staged, target, journal, {} if plan.recipe.heal.enabled else weight_sums(plan, journal))
        return _conversion(target, plan, checked, journal)


def check_conversion(plan: Plan, target: Path, overwrite: bool) -> Any:
    """Everything that can be refused before a weight is read; returns the tokenizer.

    Raises:
        KVShareError: see the modules `checkpoint`, `data` and `native`.
    """
    if not is_published(target, read_journal(work_folder(target) / JOURNAL)):
        check_output(target, plan.source.path, overwrite)
    check_space(target, plan.disk_bytes)
    if plan.recipe.calibration.statistics is not None:
        open_statistics(plan.recipe.calibration.statistics, plan)
    require_form(plan.source, plan.family)
    if plan.recipe.heal.enabled:
        check_healing(plan.recipe.heal, plan.family)
    return tokenizer_for(plan.source.path, data_used(plan.recipe))


def _job(plan: Plan) -> dict[str, Any]:
    """What decides the bytes of a conversion's output."""
    statistics = plan.recipe.calibration.statistics
    return flat(
        {
            "command": "convert",
            "source": plan.source.fingerprint,
            "recipe": made_by(plan.recipe),
            "text": {part.data: content_of(part.data) for data in sorted(data_used(plan.recipe)) for part in parts_of(data)},
            "statistics": None if statistics is None else sha256(Path(statistics) / MANIFEST),
            "files": list(plan.files),
            **versions(),
            "device": best_device().type,
        }
    )


def _make(work: Path, plan: Plan, tokenizer: Any, journal: Journal, progress: Progress) -> Path:
    """The checkpoint, complete but for report, card and manifest; the journal gets what was found on the way.

    Stages that the journal holds are not done again.
    """
    settings, device = plan.recipe, best_device()
    teacher = load_native(plan.source.path, dtype=torch.float32).to(device) if needs_whole(settings) else None
    rows = None
    if calibrates(settings) and MERGED not in journal:
        rows = calibration_rows(settings, tokenizer, teacher, progress)
    held_out = _held_out(settings, tokenizer, teacher, progress)
    cache = SelfCache(work, json.dumps(plan.source.fingerprint))
    healing = None
    if settings.heal.enabled and HEALED not in journal:
        healing = heal_rows(settings, tokenizer, teacher, progress, cache)
    if CONTAMINATION not in journal:
        trained = [text for text in (rows, healing) if text is not None]
        found = None if held_out is None else contamination(held_out, trained)
        journal.record(CONTAMINATION, None if found is None else asdict(found))
    if settings.cache_budget is not None and SENSITIVITY not in journal:
        assert rows is not None
        journal.record(SENSITIVITY, asdict(measure_sensitivity(teacher, plan, rows, device, progress)))
    plan = _chosen(plan, journal)
    if not needs_whole(settings, writes=False):
        teacher = None  # it has written its text: what follows takes a layer at a time
    staged = work / STAGED
    if MERGED not in journal:
        report = write_merged(staged, plan, rows, held_out, device, journal, progress)
        if rows is not None and not settings.heal.enabled:  # healing changes the weights and takes them itself
            write_channels(staged, rows, device, progress)
        sync_folder(staged)
        journal.record(MERGED, None if report is None else asdict(report))
    if settings.heal.enabled:
        merged, staged = staged, work / "healed"
        if HEALED not in journal:
            assert healing is not None
            training = work / "training"
            training.mkdir(exist_ok=True)
            healed = heal_into(fresh_folder(staged), merged, teacher, healing, settings, training, True, progress)
            carry_files(merged, staged)
            sync_folder(staged)
            journal.record(HEALED, asdict(healed))
    reload(staged, {t.name: (t.dtype, t.shape) for t in plan.tensors}, [t.name for t in plan.tensors if t.action == "merge"])
    if settings.evaluation.mode == "whole" and MEASURED not in journal:
        assert held_out is not None
        journal.record(MEASURED, asdict(measure(staged, teacher, held_out, settings.evaluation.data, progress)))
    return staged


def _chosen(plan: Plan, journal: Journal) -> Plan:
    """The plan with the heads that a cache budget chose, if there is one."""
    if SENSITIVITY not in journal:
        return plan
    return make_plan(plan.source, plan.recipe, journal.result(SENSITIVITY, Sensitivity).chosen, plan.max_shard_bytes)


def _conversion(target: Path, plan: Plan, checked: tuple[ExactLayer, ...], journal: Journal) -> Conversion:
    """What was done, as the journal has it."""
    plan = _chosen(plan, journal)
    entry = MEASURED if MEASURED in journal else MERGED
    return Conversion(
        target,
        plan,
        journal.result(SENSITIVITY, Sensitivity) if SENSITIVITY in journal else None,
        checked or layer_reports(plan, journal),
        journal.result(HEALED, HealResult) if HEALED in journal else None,
        journal.result(entry, Report | None),  # type: ignore[arg-type]
        journal.result(CONTAMINATION, Contamination | None),  # type: ignore[arg-type]
    )


def _held_out(recipe: Recipe, tokenizer: Any, teacher: Any, progress: Progress) -> Tensor | None:
    """The text of the final measurement as token ids (rows, length); None where nothing is measured."""
    if recipe.evaluation.mode == "off":
        return None
    return evaluation_rows(recipe.evaluation, tokenizer, teacher, recipe.seed, progress)
