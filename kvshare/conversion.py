"""The conversion: plan, merge layer by layer, heal, measure, publish.

In: a model and settings. Out: a checkpoint folder with its report. Never: leaves a half-written output, writes into the source.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare import __version__, processes
from kvshare.card import card_files, card_matter
from kvshare.checkpoint import (
    FORMAT_VERSION,
    MODELING,
    OutputTensor,
    WeightWriter,
    check_output,
    check_space,
    fresh_folder,
    publish,
    workspace,
    write_files,
    write_json,
)
from kvshare.contamination import Contamination, contamination
from kvshare.data import calibration_rows, check_data, check_tokenizer, load_tokenizer
from kvshare.errors import UsageError
from kvshare.evaluation import Report, evaluation_rows
from kvshare.exact import ExactLayer, check_layers
from kvshare.healing import carry_files, heal_into, heal_rows
from kvshare.layerwise import LayerReport, MergedLayer, merge_layers, with_weights
from kvshare.layout import names, pack, unpack
from kvshare.loading import load_native
from kvshare.memory import needs_whole
from kvshare.merge import AttentionWeights
from kvshare.merge.mean import merge_mean
from kvshare.planning import Plan, make_plan
from kvshare.progress import Progress, silent
from kvshare.quality import check_quality, measure, named_text
from kvshare.recipe import CALIBRATED, Recipe, data_used, load_recipe
from kvshare.runtime import MODELING_FILE
from kvshare.sensitivity import Sensitivity, measure_sensitivity
from kvshare.source import CARRIED_FILES, open_source, read_json
from kvshare.streaming import Skeleton, open_skeleton, read_layer
from kvshare.streams import open_streams
from kvshare.tensors import DTYPES, read_tensor
from kvshare.training import HealResult
from kvshare.verification import verify_form

BETTER = "use more KV heads, init learned, more healing or a higher limit"


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
    kv_heads: int | str | None = None,
    cache_budget: float | None = None,
    recipe: str | Path | Recipe | None = None,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    heal: bool | None = None,
    heal_data: str | None = None,
    heal_tokens: int | None = None,
    eval_data: str | None = None,
    eval_tokens: int | None = None,
    eval_mode: str | None = None,
    max_perplexity_increase: float | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Give a model back with a shared K and V. Every None means "as the recipe says".

    Args:
        model: a Hub id (with `@revision`), a local folder, or `kvshare/tiny`.
        output: a new folder.
        init: `mean`, `svd`, `learned` or `exact`.
        kv_heads: KV heads of the output, a divisor of the source's, or a fraction such as `1/4`.
        cache_budget: the most of the source's cache to keep, such as 0.3, in place of `kv_heads`: layers then keep K and V apart,
            share them, or share fewer heads, as they are found to bear it.
        recipe: a shipped recipe's name, a YAML file or a `Recipe`.
        calibration, calibration_tokens: text for the merge.
        heal: whether to distil after the merge.
        heal_data, heal_tokens: text to distil on; the calibration's data where only that is given.
        eval_data, eval_tokens: held-out text for the final measurement.
        eval_mode: `whole`, with both models in memory; `layers`, layer by layer; or `off`.
        max_perplexity_increase: the quality gate, such as 0.05; a result that is worse is not published.
        seed: decides samples, order of data and initial LoRA weights.
        overwrite: replace an output that kvshare wrote.
        progress: called on the way.

    Raises:
        KVShareError: see the modules `recipe`, `source`, `planning`, `data` and `checkpoint`; nothing is left behind.
        QualityError: the result does not pass the quality gate.
    """
    processes.require_one("convert")
    settings = load_recipe(
        recipe,
        init=init,
        kv_heads=kv_heads,
        cache_budget=cache_budget,
        seed=seed,
        calibration__data=calibration,
        calibration__tokens=calibration_tokens,
        heal__enabled=heal,
        heal__data=heal_data or calibration,
        heal__tokens=heal_tokens,
        evaluation__data=eval_data,
        evaluation__tokens=eval_tokens,
        evaluation__mode=eval_mode,
        evaluation__max_perplexity_increase=max_perplexity_increase,
    )
    if heal and settings.init == "exact":
        raise UsageError(
            "an exact conversion cannot be healed", "its weights are the source's own: nothing was lost", "leave --heal out"
        )
    target = Path(output)
    source = open_source(model)
    plan = make_plan(source, settings)
    settings = plan.recipe
    check_output(target, source.path, overwrite)
    check_space(target, plan.disk_bytes)
    tokenizer = load_tokenizer(source.path)
    for data in data_used(settings):
        check_data(data)
        check_tokenizer(tokenizer, data)
    checked = check_layers(plan, progress) if settings.init == "exact" else ()
    with workspace(target) as work:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = load_native(source.path, dtype=torch.float32).to(device) if needs_whole(settings) else None
        rows = calibration_rows(settings, tokenizer, teacher, progress) if settings.init in CALIBRATED else None
        sensitivity = None
        if settings.cache_budget is not None:
            assert rows is not None
            sensitivity = measure_sensitivity(teacher, plan, rows, device, progress)
            plan = make_plan(source, settings, sensitivity.chosen)
        held_out = _held_out(settings, tokenizer, teacher, progress)
        if not needs_whole(settings, writes=False):
            teacher = None  # it has written its text: what follows takes a layer at a time
        merged, layers, report = _write_merged(work, plan, rows, held_out, device, progress)
        staged, healed, trained = merged, None, [] if rows is None else [rows]
        if settings.heal.enabled:
            staged = fresh_folder(work / "healed")
            rows = heal_rows(settings, tokenizer, teacher, progress)
            trained.append(rows)
            healed = heal_into(staged, merged, teacher, rows, settings, fresh_folder(work / "training"), False, progress)
            carry_files(merged, staged)
        if settings.evaluation.mode == "whole":
            assert held_out is not None
            report = measure(staged, teacher, held_out, settings.evaluation.data, progress)
        else:
            verify_form(staged)
        if report is not None:
            check_quality(report, settings.evaluation, "and the work was removed", BETTER)
        shared = None if held_out is None else contamination(held_out, trained)
        result = Conversion(target, plan, sensitivity, checked or layers, healed, report, shared)
        write_json(staged / "report.json", result.to_dict())
        write_files(staged, card_files(read_json(staged / "config.json"), card_matter(source, settings), result.to_dict()))
        publish(staged, target)
    return result


def _held_out(recipe: Recipe, tokenizer: Any, teacher: Any, progress: Progress) -> Tensor | None:
    """The text of the final measurement as token ids (rows, length); None where nothing is measured."""
    if recipe.evaluation.mode == "off":
        return None
    return evaluation_rows(recipe.evaluation, tokenizer, teacher, recipe.seed, progress)


def _write_merged(
    work: Path, plan: Plan, rows: Tensor | None, held_out: Tensor | None, device: torch.device, progress: Progress
) -> tuple[Path, tuple[LayerReport, ...], Report | None]:
    """The merged checkpoint in native form, complete but for report, card and manifest; its evaluation, if it is by layers."""
    folder = fresh_folder(work / "merged")
    writer = WeightWriter(folder, [OutputTensor(t.name, t.dtype, t.shape, t.source.file) for t in plan.tensors])
    for tensor in plan.tensors:
        if tensor.action == "copy":
            writer.copy(tensor.source, plan.source.path)
    planned = {tensor.name for tensor in plan.tensors if tensor.action == "merge"}
    by_layers = plan.recipe.evaluation.mode == "layers"
    forwards = rows is not None or by_layers
    skeleton = open_skeleton(plan.source, plan.family) if forwards else None
    streams = None
    if by_layers:
        assert skeleton is not None
        assert held_out is not None
        streams = open_streams(skeleton, held_out, device)
    reports = []
    for layer, merged in enumerate(_merged_layers(plan, skeleton, rows, device, progress)):
        if streams is not None:
            assert merged.source is not None
            assert merged.module is not None
            streams = streams.through(merged.source, merged.module)
        if merged.report is not None:
            reports.append(merged.report)
        if merged.weights is None:
            continue
        for name, value in pack(merged.weights.repeated(plan.kv_heads), plan.family).items():
            if (stored := plan.family.tensor(layer, name)) in planned:
                writer.put(stored, value)
    writer.finish()
    write_json(folder / "config.json", plan.config | {"kvshare": _block(plan), "auto_map": _auto_map(plan)})
    for name in CARRIED_FILES:
        if (plan.source.path / name).is_file():
            shutil.copyfile(plan.source.path / name, folder / name)
    shutil.copyfile(MODELING_FILE, folder / MODELING)
    report = None
    if streams is not None:
        cache = (float(plan.cache_bytes_per_token), float(plan.source_cache_bytes_per_token))
        report = streams.report(named_text(plan.recipe.evaluation.data), *cache)
    return folder, tuple(reports), report


def _merged_layers(
    plan: Plan, skeleton: Skeleton | None, rows: Tensor | None, device: torch.device, progress: Progress
) -> Iterator[MergedLayer]:
    if plan.recipe.init == "exact":
        return
    stored = DTYPES[plan.source.tensors[plan.family.weight(0, "k")].dtype]
    if rows is not None:
        assert skeleton is not None
        yield from merge_layers(skeleton, plan, rows, stored, device, progress)
        return
    for index in range(plan.layers):
        progress("merging layers", index, plan.layers)
        weights = merge_mean(_stored_weights(plan, index), plan.kv_heads).to(stored)
        if skeleton is None:
            yield MergedLayer(None, None, weights, None)
            continue
        layer = read_layer(skeleton, index, device)
        yield MergedLayer(layer, with_weights(layer, plan.family, weights), weights, None)
    progress("merging layers", plan.layers, plan.layers)


def _stored_weights(plan: Plan, layer: int) -> AttentionWeights:
    """The attention of one layer as it lies on the disk."""
    stored = {name: plan.source.tensors.get(plan.family.tensor(layer, name)) for name in names(plan.family)}
    tensors = {name: read_tensor(plan.source.path, spec) for name, spec in stored.items() if spec is not None}
    return unpack(tensors, plan.family, plan.head_dim)


def _auto_map(plan: Plan) -> dict[str, str]:
    return {"AutoModelForCausalLM": f"{Path(MODELING).stem}.{plan.config['architectures'][0]}"}


def _block(plan: Plan) -> dict[str, Any]:
    """The kvshare block of config.json: what was done to which model, enough to do it again."""
    import transformers

    return {
        "format_version": FORMAT_VERSION,
        "form": "exact" if plan.recipe.init == "exact" else "shared",
        "version": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **_shared_layers(plan),
        "source": {**plan.source.fingerprint, "num_key_value_heads": plan.source_kv_heads},
        "recipe": plan.recipe.model_dump(mode="json"),
        "seed": plan.recipe.seed,
        "healed_tokens": 0,
    }


def _shared_layers(plan: Plan) -> dict[str, list[int]]:
    """Which layers share K and V, and how many heads each of them has; the weights may hold a head several times."""
    assert plan.layer_heads is not None
    shared = [(layer, heads) for layer, heads in enumerate(plan.layer_heads) if heads is not None]
    return {"layers": [layer for layer, _ in shared], "kv_heads": [heads for _, heads in shared]}
