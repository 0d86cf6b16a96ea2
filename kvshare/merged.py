"""The merged checkpoint in native form, layer by layer, going on where an earlier run of the same job broke off.

In: a plan, calibration rows, the journal of the job. Out: a folder with weights and config, a report per merged layer, and
the evaluation, where held-out text is to pass through the layers beside the merge. Never: holds more than one layer, heals,
writes report, card or manifest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare import processes
from kvshare.checkpoint import (
    FORMAT_VERSION,
    MODELING,
    OutputTensor,
    WeightWriter,
    fits_page_cache,
    forget,
    sha256,
    sync,
    write_json,
)
from kvshare.errors import BadCheckpointError
from kvshare.evaluation import Report
from kvshare.headers import TensorSpec, read_header
from kvshare.journal import Journal, versions
from kvshare.layerwise import LayerReport, MergedBefore, MergedLayer, as_stored, merge_layers, merge_on_statistics
from kvshare.layout import names, pack, unpack
from kvshare.merge import AttentionWeights
from kvshare.merge.mean import merge_mean
from kvshare.passes import with_weights
from kvshare.planning import Plan
from kvshare.progress import Progress
from kvshare.quality import named_text
from kvshare.recipe import made_by
from kvshare.runtime import ROTATED_MODELING, SHIPPED
from kvshare.source import CARRIED_FILES
from kvshare.statistics import open_statistics, read_moments
from kvshare.streaming import Skeleton, open_skeleton, read_layer
from kvshare.streams import open_streams
from kvshare.tensors import map_tensor, read_tensor

EARLY = 256 << 20  # bytes after which what is copied is sent to the disk while copying goes on
COPIED, LAYER, SUM = "copied {}", "layer {}", "sha256 {}"  # entries: a file of the source, a merged layer, an output file


def write_merged(
    folder: Path,
    plan: Plan,
    rows: Tensor | None,
    held_out: Tensor | None,
    device: torch.device,
    journal: Journal,
    progress: Progress,
) -> Report | None:
    """Write the merged checkpoint, complete but for report, card and manifest; returns its evaluation, if it is by layers.

    Args:
        folder: made if it is not there; otherwise what the journal says is done in it is kept.
        plan: the heads of every layer are chosen.
        rows: calibration tokens (rows, length); None for an init that takes none.
        held_out: tokens (rows, length) that pass through the layers; looked at where the recipe evaluates by layers.
        device: where a layer is computed.
        journal: gets each finished file and layer, a layer's `LayerReport` with it.
        progress: called on the way.

    Raises:
        BadCheckpointError: NaN or infinity in what is read or made, or a file that ends too early.
    """
    writer = lay_out(folder, plan)
    layers = [LAYER.format(layer) for layer, heads in enumerate(plan.layer_heads or ()) if heads]
    summed: set[str] = set()
    if all(layer in journal for layer in layers):
        rows = None  # all is merged: no text has to pass for that
        if all(COPIED.format(file) in journal for file in plan.source.file_bytes):
            summed = {file for file in plan.files if SUM.format(file) in journal}
    # reading, writing to the disk and checksums wait for the disk, merging computes: they do not wait for each other
    with _background(drops=False) as keeper, _background() as copier, _background() as summer:
        copies = [copier.submit(_copy_tensors, file, writer, plan, journal, keeper) for file in sorted(plan.source.file_bytes)]
        kept: list[Future[None]] = []
        sums: dict[str, Future[None]] = {}

        def sum_up() -> None:
            for file in sorted(writer.complete() - sums.keys() - summed):
                sums[file] = summer.submit(_sum, folder, file, plan, journal)

        def finished(layer: int, names: Sequence[str], report: LayerReport | None) -> None:
            kept.append(keeper.submit(_keep_layer, layer, names, report, writer, journal))
            sum_up()
            _end_with([*copies, *kept, *sums.values()])

        report = _merge(folder, writer, plan, rows, held_out, device, journal, finished, progress)
        for index, copy in enumerate(copies):
            progress("copying weights", index, len(copies))
            kept += copy.result()
            sum_up()
        for work in (*kept, *sums.values()):
            work.result()
    writer.finish()
    write_json(folder / "config.json", plan.config | {"kvshare": _block(plan), "auto_map": _auto_map(plan)})
    for name in CARRIED_FILES:
        if (plan.source.path / name).is_file():
            shutil.copyfile(plan.source.path / name, folder / name)
    for file in SHIPPED:
        shutil.copyfile(file, folder / file.name)
    progress("copying weights", len(copies), len(copies))
    return report


def lay_out(folder: Path, plan: Plan) -> WeightWriter:
    """The weight files of the output, empty where nothing is written yet; what lies in them stays."""
    folder.mkdir(exist_ok=True)
    tensors = [OutputTensor(t.name, t.dtype, t.shape, t.file) for t in plan.tensors]
    return WeightWriter(folder, tensors, _cached(plan))


def write_share(folder: Path, plan: Plan, rows: Tensor | None, device: torch.device, journal: Journal, progress: Progress) -> None:
    """Copy and merge what falls to this process of several: files and layers are dealt out in turn. See `write_merged`, which then
    finds them done; each layer is merged by itself (see `one_process_because`).

    Args:
        folder: laid out by `lay_out`.
        plan, rows, device, progress: as for `write_merged`.
        journal: of this process.

    Raises:
        BadCheckpointError: see `write_merged`.
    """
    writer = lay_out(folder, plan)
    with _background(drops=False) as keeper, _background() as copier:
        copies = [
            copier.submit(_copy_tensors, file, writer, plan, journal, keeper)
            for place, file in enumerate(sorted(plan.source.file_bytes))
            if processes.is_own(place)
        ]
        kept: list[Future[None]] = []

        def finished(layer: int, names: Sequence[str], report: LayerReport | None) -> None:
            kept.append(keeper.submit(_keep_layer, layer, names, report, writer, journal))
            _end_with([*copies, *kept])

        _merge(folder, writer, plan, rows, None, device, journal, finished, progress, processes.is_own)
        for copy in copies:
            kept += copy.result()
        for work in kept:
            work.result()


def sum_share(folder: Path, plan: Plan, journal: Journal) -> None:
    """Take the checksums of the weight files, all complete, that fall to this process of several."""
    for place, file in enumerate(plan.files):
        if processes.is_own(place) and SUM.format(file) not in journal:
            _sum(folder, file, plan, journal)


def _end_with(begun: Sequence[Future[Any]]) -> None:
    """What has failed beside the merge ends it."""
    for work in begun:
        if work.done():
            work.result()


@contextmanager
def _background(drops: bool = True) -> Iterator[ThreadPoolExecutor]:
    """A thread for work beside the merge. When that fails, what has not begun is dropped, unless it notes what is finished."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=drops)


def _merge(
    folder: Path,
    writer: WeightWriter,
    plan: Plan,
    rows: Tensor | None,
    held_out: Tensor | None,
    device: torch.device,
    journal: Journal,
    finished: Callable[[int, Sequence[str], LayerReport | None], None],
    progress: Progress,
    own: Callable[[int], bool] | None = None,
) -> Report | None:
    """Merge and write the layers, and evaluate, if it is by layers; for the arguments see `write_merged`.

    `finished` is told of every layer that this run wrote: its number, its tensors, its report. Where `own` is given, the layers
    that it says are merged, and nothing is evaluated.
    """
    by_layers = plan.recipe.evaluation.mode == "layers" and own is None
    skeleton = open_skeleton(plan.source, plan.family, folder.parent) if rows is not None or by_layers else None
    streams = None
    if by_layers:
        assert skeleton is not None
        assert held_out is not None
        streams = open_streams(skeleton, held_out, device)
    planned = {tensor.name for tensor in plan.tensors if tensor.action == "merge"}
    for layer, merged in enumerate(_merged_layers(folder, plan, skeleton, rows, device, journal, progress, own)):
        if streams is not None:
            assert merged.source is not None
            assert merged.module is not None
            streams = streams.through(merged.source, merged.module)
        if merged.weights is None:
            continue
        values = pack(merged.weights.repeated(plan.kv_heads), plan.family)
        values = {stored: value for name, value in values.items() if (stored := plan.family.tensor(layer, name)) in planned}
        if LAYER.format(layer) in journal:
            for name in values:
                writer.keep(name)
            continue
        for name, value in values.items():
            writer.put(name, value)
        finished(layer, list(values), merged.report)
    if streams is None:
        return None
    cache = (float(plan.cache_bytes_per_token), float(plan.source_cache_bytes_per_token))
    return streams.report(named_text(plan.recipe.evaluation.data), *cache)


def _keep_layer(layer: int, names: Sequence[str], report: LayerReport | None, writer: WeightWriter, journal: Journal) -> None:
    """Bring a layer to the disk and note it."""
    writer.sync(names)
    journal.record(LAYER.format(layer), None if report is None else asdict(report))


def _cached(plan: Plan) -> bool:
    """Whether source and output could stay in the page cache; what could not is not left there to be pushed out by what follows."""
    return fits_page_cache(plan.bytes_read + plan.bytes_written)


def _sum(folder: Path, file: str, plan: Plan, journal: Journal) -> None:
    """Take the checksum of a complete file; the copying and merging have only just left it in the page cache."""
    digest = sha256(folder / file)
    if not _cached(plan):
        sync(folder / file)
        with (folder / file).open("rb") as stream:
            forget(stream.fileno())
    journal.record(SUM.format(file), digest)


def weight_sums(plan: Plan, journal: Journal) -> dict[str, str]:
    """The SHA-256 of the weight files that `write_merged` made."""
    return {file: journal.entries[SUM.format(file)] for file in plan.files}


def layer_reports(plan: Plan, journal: Journal) -> tuple[LayerReport, ...]:
    """The reports of the merged layers, in their order; none of `mean` and `exact`."""
    entries = [entry for layer in range(plan.layers) if journal.entries.get(entry := LAYER.format(layer)) is not None]
    return tuple(journal.result(entry, LayerReport) for entry in entries)


def _copy_tensors(file: str, writer: WeightWriter, plan: Plan, journal: Journal, keeper: ThreadPoolExecutor) -> list[Future[None]]:
    """What does not change of one file of the source, byte for byte. The disk writes while the next bytes are read: returns what
    `keeper` has begun of that, which ends with the journal's entry.
    """
    names = [tensor.name for tensor in plan.tensors if tensor.action == "copy" and tensor.source.file == file]
    if COPIED.format(file) in journal:
        for name in names:
            writer.keep(name)
        return []
    begun: list[Future[None]] = []
    since: list[str] = []
    for name in names:
        writer.copy(plan.source.tensors[name], plan.source.path)
        since.append(name)
        if sum(plan.source.tensors[name].bytes for name in since) >= EARLY and (not begun or begun[-1].done()):
            begun.append(keeper.submit(writer.sync, since))
            since = []
    return [*begun, keeper.submit(_keep_copy, file, names, writer, journal)]


def _keep_copy(file: str, names: Sequence[str], writer: WeightWriter, journal: Journal) -> None:
    """Bring what was copied of a file to the disk and note it."""
    writer.sync(names)
    journal.record(COPIED.format(file))


def _merged_layers(
    folder: Path,
    plan: Plan,
    skeleton: Skeleton | None,
    rows: Tensor | None,
    device: torch.device,
    journal: Journal,
    progress: Progress,
    own: Callable[[int], bool] | None,
) -> Iterator[MergedLayer]:
    if plan.recipe.init == "exact":
        return
    assert plan.layer_heads is not None
    written = {spec.name: spec for file in plan.files for spec in read_header(folder / file)}

    def earlier(layer: int) -> AttentionWeights | None:
        """The weights of a layer that is done, from the output."""
        assert plan.layer_heads is not None
        heads = plan.layer_heads[layer]
        if LAYER.format(layer) not in journal or not heads:
            return None
        return _stored_weights(folder, written, plan, layer).unrepeated(heads)

    if rows is not None:
        assert skeleton is not None

        def finished(layer: int) -> MergedBefore | None:
            weights = earlier(layer)
            return None if weights is None else MergedBefore(weights, journal.result(LAYER.format(layer), LayerReport))

        yield from merge_layers(skeleton, plan, rows, device, progress, finished, own or (lambda _: True))
        return
    taken = plan.recipe.calibration.statistics
    statistics = None if taken is None else open_statistics(taken, plan)
    for index in range(plan.layers):
        progress("merging layers", index, plan.layers)
        if own is not None and not own(index):
            yield MergedLayer(None, None, None, None)
            continue
        if not plan.layer_heads[index] or plan.family.tied:
            layer = None if skeleton is None else read_layer(skeleton, index, device)
            yield MergedLayer(layer, layer, None, None)
            continue
        weights, report = earlier(index), None
        if weights is None:
            turned = None if statistics is None else statistics.rotary_dims[index]
            source = _stored_weights(plan.source.path, plan.source.tensors, plan, index, turned)
            if taken is None or statistics is None:
                weights = merge_mean(source, plan.kv_heads)
            else:
                moments = read_moments(taken, statistics, index, source)
                try:
                    weights, report = merge_on_statistics(source, moments, plan.recipe.merge, index)
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    raise BadCheckpointError(
                        f"layer {index} cannot be merged with the statistics in {taken}",
                        str(error).partition(" (")[0],
                        "take the statistics again with `kvshare calibrate`",
                    ) from None
            weights = as_stored(weights, plan, index)
        if skeleton is None:
            yield MergedLayer(None, None, weights, report)
            continue
        layer = read_layer(skeleton, index, device)
        yield MergedLayer(layer, with_weights(layer, plan.family, weights, plan.recipe.form), weights, report)
    progress("merging layers", plan.layers, plan.layers)


def _stored_weights(
    folder: Path, specs: Mapping[str, TensorSpec], plan: Plan, layer: int, rotary_dim: int | None = None
) -> AttentionWeights:
    """The attention of one layer as it lies on the disk; what no merge touches is not read."""
    changes = {tensor.name for tensor in plan.tensors if tensor.action == "merge"}
    stored = {name: specs.get(plan.family.tensor(layer, name)) for name in names(plan.family)}
    tensors = {
        name: (read_tensor if spec.name in changes else map_tensor)(folder, spec)
        for name, spec in stored.items()
        if spec is not None
    }
    return unpack(tensors, plan.family, plan.head_dim, rotary_dim)


def _auto_map(plan: Plan) -> dict[str, str]:
    name = plan.config["architectures"][0]
    if plan.recipe.form != "rotated":
        return {"AutoModelForCausalLM": f"{Path(MODELING).stem}.{name}"}
    module = Path(ROTATED_MODELING).stem
    return {"AutoConfig": f"{module}.{name.replace('ForCausalLM', 'Config')}", "AutoModelForCausalLM": f"{module}.{name}"}


def _block(plan: Plan) -> dict[str, Any]:
    """The kvshare block of config.json: what was done to which model, enough to do it again."""
    made_with = versions()
    return {
        "format_version": FORMAT_VERSION,
        "form": "exact" if plan.recipe.init == "exact" else plan.recipe.form,
        "version": made_with["kvshare"],
        "torch": made_with["torch"],
        "transformers": made_with["transformers"],
        **_shared_layers(plan),
        "source": {**plan.source.fingerprint, "num_key_value_heads": plan.source_kv_heads},
        "recipe": made_by(plan.recipe),
        "seed": plan.recipe.seed,
        "healed_tokens": 0,
    }


def _shared_layers(plan: Plan) -> dict[str, list[int]]:
    """Which layers share K and V, and how many heads each of them has; the weights may hold a head several times."""
    assert plan.layer_heads is not None
    shared = [(layer, heads) for layer, heads in enumerate(plan.layer_heads) if heads]
    return {"layers": [layer for layer, _ in shared], "kv_heads": [heads for _, heads in shared]}
