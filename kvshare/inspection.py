"""The low-rank regime of a model, before anything is converted: figures per layer and head, plots, and one page.

In: a model and a little text. Out: an `Inspection`, and a folder with `index.html`, `inspection.json` and the plots.
Never: changes the model, measures damage behind a layer, holds more than one layer once there is text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.activations import LayerCall, first_inputs, rotary_dim
from kvshare.budget import divisors, head_units
from kvshare.checkpoint import check_output, fresh_folder, publish, workspace, write_json
from kvshare.data import calibration_rows, tokenizer_for
from kvshare.findings import Inspection, LayerFigures, LayerOption
from kvshare.headers import ITEM_BYTES
from kvshare.layerwise import Solved, solve_alone
from kvshare.loading import writer_of
from kvshare.merge.regroup import layer_problems
from kvshare.mixture import named
from kvshare.native import require_form
from kvshare.page import render_page
from kvshare.passes import attention_of, passed, source_pass
from kvshare.planning import Plan, make_plan
from kvshare.plots import draw, png, svg
from kvshare.progress import Progress, silent
from kvshare.recipe import INSPECTED_TOKENS, load_recipe
from kvshare.sensitivity import per_energy
from kvshare.source import Source, open_source
from kvshare.spectra import HeadFigures, head_figures, joint_energies
from kvshare.streaming import Skeleton, open_skeleton, read_layer
from kvshare.tensors import best_device
from kvshare.tied import require_apart


def inspect(
    model: str | Path,
    output: str | Path,
    *,
    data: str | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Inspection:
    """Show what a conversion would have to work with: how low the rank of K and V is, how far they overlap, what sharing drops.

    Args:
        model: a Hub id (with `@revision`), a local folder, or `kvshare/tiny`.
        output: a new folder, for the page, the figures as JSON and the plots.
        data: the text to look at the model on; None or `self` has the model write it.
        tokens: how many; None for the default.
        seed: decides samples and the order of documents; None for the default.
        overwrite: replace an output that kvshare wrote.
        progress: called on the way.

    Raises:
        KVShareError: see the modules `source`, `planning`, `data` and `checkpoint`; nothing is left behind.
    """
    plan = inspection_plan(open_source(model), data, tokens, seed)
    target, source, recipe = Path(output), plan.source, plan.recipe
    tokenizer, settings = check_inspection(plan, target, overwrite), recipe.calibration

    with workspace(target) as work:
        device = best_device()
        rows = calibration_rows(recipe, tokenizer, writer_of(settings.data, source.path, device), progress)
        layers = tuple(inspect_layers(open_skeleton(source, plan.family), plan, rows, device, progress))
        result = Inspection(
            target,
            source.name,
            source.commit,
            source.model_type,
            plan.source_kv_heads,
            plan.family.number("num_attention_heads", source.config),
            plan.head_dim,
            plan.family.number("hidden_size", source.config),
            8 * ITEM_BYTES[next(tensor.dtype for tensor in plan.tensors if tensor.action == "merge")],
            plan.family.merges_heads(source.config),
            named(settings.data),
            rows.numel(),
            recipe.seed,
            layers,
        )
        staged = fresh_folder(work / "inspection")
        write_files(staged, result)
        publish(staged, target)
    return result


def inspection_plan(source: Source, data: str | None, tokens: int | None, seed: int | None) -> Plan:
    """The plan of the conversion that an inspection is of, from the arguments of `inspect`, which see."""
    recipe = load_recipe(None, calibration__data=data, calibration__tokens=tokens or INSPECTED_TOKENS, seed=seed)
    plan = make_plan(source, recipe)
    require_apart(plan.family, source.name)
    return plan


def check_inspection(plan: Plan, target: Path, overwrite: bool) -> Any:
    """Everything that can be refused before a weight is read; returns the tokenizer.

    Raises:
        KVShareError: see the modules `checkpoint`, `data` and `native`.
    """
    check_output(target, plan.source.path, overwrite)
    require_form(plan.source, plan.family)
    return tokenizer_for(plan.source.path, [plan.recipe.calibration.data])


def write_files(folder: Path, inspection: Inspection) -> None:
    """The figures, the plots and the page of an inspection, into an empty folder."""
    write_json(folder / "inspection.json", inspection.to_dict())
    drawn = {plot: svg(plot) for plot in draw(inspection)}
    for plot, text in drawn.items():
        (folder / f"{plot.name}.svg").write_text(text, encoding="utf-8")
        (folder / f"{plot.name}.png").write_bytes(png(plot))
    (folder / "index.html").write_text(render_page(inspection, drawn), encoding="utf-8")


def inspect_layers(
    skeleton: Skeleton, plan: Plan, rows: Tensor, device: torch.device, progress: Progress = silent
) -> Iterator[LayerFigures]:
    """The figures of every layer, in order, one layer at a time, each on the source's own hidden states.

    Args:
        skeleton: the source.
        plan: of its conversion.
        rows: token ids (rows, length).
        device: where one layer at a time is computed.
        progress: called on the way.
    """
    options = divisors(plan.source_kv_heads) if plan.family.merges_heads(plan.source.config) else (plan.source_kv_heads,)
    hidden, calls = first_inputs(skeleton.model, skeleton.layers, rows, device)
    for index, call in enumerate(calls):
        progress("inspecting layers", index, len(calls))
        layer = read_layer(skeleton, index, device)
        if not plan.family.attends(plan.source.config, index):
            yield LayerFigures(index, 0, (), (), (), "it has no K and V")
            hidden = passed(layer, hidden, call, device)
            continue
        wanted, behind = source_pass(layer, plan.family, hidden, call, device)
        yield inspect_layer(layer, plan, call, index, hidden, wanted, options, device)
        hidden = behind
    progress("inspecting layers", len(calls), len(calls))


def inspect_layer(
    layer: nn.Module,
    plan: Plan,
    call: LayerCall,
    index: int,
    hidden: Tensor,
    wanted: Tensor,
    options: Sequence[int],
    device: torch.device,
) -> LayerFigures:
    """The figures of one layer; one whose attention output is not finite says so in `refused`.

    Args:
        layer: the source's decoder layer on `device`, float32.
        plan: of the conversion.
        call: how the layer is called.
        index: of the layer.
        hidden: what enters the layer (rows, length, hidden).
        wanted: what its attention gives there (rows, length, hidden).
        options: the numbers of KV heads to share; the first is the source's.
        device: where to compute.
    """
    turned = rotary_dim(attention_of(layer, plan.family), plan.family, call)
    if not bool(torch.isfinite(wanted).all()):
        return LayerFigures(index, turned, (), (), (), "its attention output on this text is not finite")
    found = list(solve_alone(layer, plan, call, hidden, options, device))
    relative = per_energy(hidden + wanted)
    heads, spectrum = _heads(found[0])
    choices = tuple(
        LayerOption(count, head_units((count,), plan.source_kv_heads), solved.report.loss * relative)
        for count, solved in zip(options, found, strict=True)
    )
    return LayerFigures(index, turned, heads, spectrum, choices)


def _heads(solved: Solved) -> tuple[tuple[HeadFigures, ...], tuple[float, ...]]:
    """The figures of each head, from moments in which every head is a group, and the spectrum of [K;V] averaged over heads."""
    problems = layer_problems(solved.weights, solved.moments)
    heads = tuple(
        head_figures(head, problem, solution)
        for head, (problem, solution) in enumerate(zip(problems, solved.solutions, strict=True))
    )
    shares = torch.stack([joint_energies(problem) for problem in problems])  # (heads, 2 head_dim)
    return heads, tuple((shares / shares.sum(1, keepdim=True).clamp_min(1e-30)).mean(0).tolist())
