"""Statistics of a model's layers in a folder: taken once, converted from as often as wanted, without text and without a forward.

In: a source and text; later, the folder. Out: the `Moments` of every layer, as safetensors. Never: changes weights, holds more
than one layer of the model.

What a line search, a refit or a sequential correction needs is not among them: a conversion from statistics is the closed form
alone, at one balance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from kvshare import __version__, processes
from kvshare.activations import first_inputs
from kvshare.checkpoint import check_output, check_space, fresh_folder, publish, workspace, write_json
from kvshare.data import calibration_rows, tokenizer_for
from kvshare.errors import BadCheckpointError, UsageError
from kvshare.headers import read_header
from kvshare.layerwise import source_moments
from kvshare.loading import writer_of
from kvshare.merge import AttentionWeights, Grouping, Moments
from kvshare.mixture import named
from kvshare.moments import moment_numbers
from kvshare.native import require_form
from kvshare.parsing import is_file, shown
from kvshare.planning import Plan, make_plan
from kvshare.progress import Progress, silent
from kvshare.recipe import Recipe, load_recipe
from kvshare.source import open_source, read_json
from kvshare.streaming import Skeleton, open_skeleton, read_layer
from kvshare.tensors import best_device, read_tensor
from kvshare.tied import require_apart
from kvshare.verification import listed_files

DESCRIPTION = "statistics.json"
LAYER_FILE = "layer-{:05d}.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Statistics:
    """What statistics were taken of: the source's fingerprint, tokens of which text, per layer the source heads that end in each
    output head, and how many numbers of a head rope turns.
    """

    format_version: int
    version: str
    source: dict[str, Any]
    data: str
    tokens: int
    weighting: str
    seed: int
    groupings: tuple[Grouping, ...]
    rotary_dims: tuple[int, ...]


def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    kv_heads: int | str | None = None,
    recipe: str | Path | Recipe | None = None,
    data: str | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Statistics:
    """Take the statistics of a model that conversions without text start from.

    Args:
        model: a Hub id (with `@revision`), a local folder, or `kvshare/tiny`.
        output: a new folder.
        kv_heads: KV heads that conversions will have, a divisor of the source's, or a fraction such as `1/4`.
        recipe: a shipped recipe's name, a YAML file or a `Recipe`, whose calibration and merge count.
        data, tokens: text, and how much of it; None as the recipe says.
        seed: decides samples and the order of documents.
        overwrite: replace an output that kvshare wrote.
        progress: called on the way.

    Raises:
        KVShareError: see the modules `recipe`, `source`, `planning`, `data` and `checkpoint`; nothing is left behind.
    """
    processes.require_one("calibrate", ("each layer is looked at behind those before it", "start it in one process"))
    settings = calibration_recipe(recipe, kv_heads, data, tokens, seed)
    target, source = Path(output), open_source(model)
    plan = make_plan(source, settings)
    require_apart(plan.family, source.name)
    tokenizer = check_calibration(plan, target, overwrite)
    with workspace(target) as work:
        device = best_device()
        rows = calibration_rows(settings, tokenizer, writer_of(settings.calibration.data, source.path, device), progress)
        staged = fresh_folder(work / "statistics")
        layers = []
        skeleton = open_skeleton(source, plan.family, work)
        for index, (moments, turned) in enumerate(take_moments(skeleton, plan, rows, device, progress)):
            save_file(_tensors(moments), staged / LAYER_FILE.format(index))
            layers.append((moments.grouping, turned))
        calibration = settings.calibration
        result = Statistics(
            FORMAT_VERSION,
            __version__,
            source.fingerprint,
            named(calibration.data),
            rows.numel(),
            settings.merge.weighting,
            settings.seed,
            tuple(grouping for grouping, _ in layers),
            tuple(turned for _, turned in layers),
        )
        write_json(staged / DESCRIPTION, asdict(result))
        publish(staged, target)
    return result


def calibration_recipe(
    recipe: str | Path | Recipe | None, kv_heads: int | str | None, data: str | None, tokens: int | None, seed: int | None
) -> Recipe:
    """The recipe of a calibration from the arguments of `calibrate`, which see."""
    return load_recipe(
        recipe, init="svd", kv_heads=kv_heads, seed=seed, calibration__data=data, calibration__tokens=tokens, heal__enabled=False
    )


def check_calibration(plan: Plan, target: Path, overwrite: bool) -> Any:
    """Everything that can be refused before a weight is read; returns the tokenizer.

    Raises:
        KVShareError: see the modules `checkpoint`, `data` and `native`.
    """
    if plan.layer_heads is None:
        raise UsageError(
            "statistics cannot be taken for a cache budget",
            "its choice of heads rests on forwards through the layers behind",
            "give kv_heads, or convert with the budget and text",
        )
    if 0 in plan.layer_heads:
        raise UsageError(
            f"statistics cannot be taken of {plan.source.name}",
            "some of its layers have no K and V, and statistics hold the moments of all layers",
            "convert with text",
        )
    check_output(target, plan.source.path, overwrite)
    check_space(target, statistics_bytes(plan))
    require_form(plan.source, plan.family)
    return tokenizer_for(plan.source.path, [plan.recipe.calibration.data])


def statistics_bytes(plan: Plan) -> int:
    """The most that the statistics of a plan take on the disk, but for headers."""
    size = plan.source_kv_heads // plan.kv_heads
    numbers = plan.kv_heads * 2 * moment_numbers(size, plan.head_dim) + 2 * plan.source_kv_heads * plan.head_dim**2
    return 8 * plan.layers * numbers


def take_moments(
    skeleton: Skeleton, plan: Plan, rows: Tensor, device: torch.device, progress: Progress = silent
) -> Iterator[tuple[Moments, int]]:
    """The moments of every layer on the source's own hidden states, in order, one layer in memory at a time; and how many numbers
    of a head rope turns there.

    Args:
        skeleton: the source.
        plan: of conversions; its heads say what is grouped.
        rows: token ids (rows, length).
        device: where a layer is computed.
        progress: called on the way.
    """
    assert plan.layer_heads is not None
    hidden, calls = first_inputs(skeleton.model, skeleton.layers, rows, device, skeleton.scratch)
    for index, (call, heads) in enumerate(zip(calls, plan.layer_heads, strict=True)):
        progress("calibrating layers", index, len(calls))
        assert heads
        # the layer has no name here, or it would be in memory until the next one has been read
        yield source_moments(read_layer(skeleton, index, device), plan, call, hidden, heads, device, index < len(calls) - 1)
    progress("calibrating layers", len(calls), len(calls))


def open_statistics(folder: str | Path, plan: Plan) -> Statistics:
    """The description of statistics that a plan is to be carried out with.

    Raises:
        BadCheckpointError: the folder does not hold statistics of a version that is known.
        UsageError: they are of another model, or of other heads.
    """
    path = Path(folder)
    if not is_file(path / DESCRIPTION):
        raise UsageError(
            f"there are no statistics in {path}",
            f"it holds no {DESCRIPTION}",
            "take them with `kvshare calibrate`, or correct the path",
        )
    listed_files(path)  # by the manifest, an interrupted conversion knows the statistics again
    try:
        found = TypeAdapter(Statistics).validate_python(read_json(path / DESCRIPTION))
    except ValidationError as error:
        raise BadCheckpointError(
            f"{path / DESCRIPTION} cannot be used", str(error).splitlines()[0], "take the statistics again with `kvshare calibrate`"
        ) from None
    if found.format_version != FORMAT_VERSION:
        raise BadCheckpointError(
            f"{path} has the format version {found.format_version}",
            f"this kvshare reads version {FORMAT_VERSION}",
            "take the statistics again with `kvshare calibrate`",
        )
    sizes = plan.source.fingerprint["file_bytes"]
    if found.source.get("file_bytes") != sizes:
        raise UsageError(
            f"the statistics in {path} are of another model",
            f"its files have {shown(found.source.get('file_bytes'))} bytes, those of {plan.source.name} {sizes!r}",
            f"take those of {plan.source.name} with `kvshare calibrate`",
        )
    heads = [len(grouping) for grouping in found.groupings]
    if heads != list(plan.layer_heads or ()):
        raise UsageError(
            f"the statistics in {path} are for {', '.join(map(str, sorted(set(heads))))} KV heads",
            f"the conversion is to have {plan.kv_heads}; which source heads are merged was chosen when they were taken",
            f"convert with that number, or take others with `kvshare calibrate --kv-heads {plan.kv_heads}`",
        )
    if not _complete(found, plan):
        raise BadCheckpointError(
            f"{path / DESCRIPTION} contradicts itself or {plan.source.name}",
            f"it must share the {plan.source_kv_heads} KV heads of each of {plan.layers} layers out evenly",
            "take the statistics again with `kvshare calibrate`",
        )
    return found


def _complete(statistics: Statistics, plan: Plan) -> bool:
    """Whether every layer's grouping takes each source head once, as many in each group, and its rope fits a head."""
    return len(statistics.groupings) == len(statistics.rotary_dims) == plan.layers and all(
        sorted(head for group in grouping for head in group) == list(range(plan.source_kv_heads))
        and len({len(group) for group in grouping}) == 1
        and turned in range(0, plan.head_dim + 1, 2)
        for grouping, turned in zip(statistics.groupings, statistics.rotary_dims, strict=True)
    )


def read_moments(folder: str | Path, statistics: Statistics, layer: int, weights: AttentionWeights) -> Moments:
    """The moments of one layer, float64.

    Args:
        folder: of the statistics.
        statistics: their description.
        layer: which one.
        weights: of the source there, which say how large its moments are.

    Raises:
        BadCheckpointError: the layer's file is missing or damaged, lacks a tensor, or holds one of another shape.
        UnsupportedModelError: it holds no floating-point numbers.
    """
    path = Path(folder)
    file = path / LAYER_FILE.format(layer)
    if not is_file(file):
        raise BadCheckpointError(f"the file {file} is missing", f"{DESCRIPTION} speaks of that layer", "copy the statistics again")
    tensors = {spec.name: read_tensor(path, spec) for spec in read_header(file)}
    grouping, width = statistics.groupings[layer], weights.head_dim
    metric: set[tuple[int, ...]] = {(weights.kv_heads, width, width)}
    shapes = {"key_metric": metric, "value_metric": metric}
    has_bias = weights.k_bias is not None or weights.v_bias is not None
    for index, group in enumerate(grouping):
        numbers = 2 * len(group) * width + has_bias
        shapes |= {f"{part}.{index}": {(1, numbers, numbers), (len(group), numbers, numbers)} for part in ("keys", "values")}
    for name, fitting in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) not in fitting:
            raise BadCheckpointError(
                f"the file {file} lacks {name!r} of layer {layer}, or holds another shape of it",
                f"its shape would be {' or '.join(map(str, sorted(fitting)))}",
                "take the statistics again with `kvshare calibrate`",
            )
    doubles = {name: tensors[name].double() for name in shapes}
    keys, values = (tuple(doubles[f"{part}.{group}"] for group in range(len(grouping))) for part in ("keys", "values"))
    return Moments(grouping, keys, values, doubles["key_metric"], doubles["value_metric"])


def _tensors(moments: Moments) -> dict[str, Tensor]:
    groups = {
        f"{part}.{group}": value
        for part, values in (("keys", moments.keys), ("values", moments.values))
        for group, value in enumerate(values)
    }
    tensors = groups | {"key_metric": moments.key_metric, "value_metric": moments.value_metric}
    return {name: value.cpu().contiguous() for name, value in tensors.items()}
