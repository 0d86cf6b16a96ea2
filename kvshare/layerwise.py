"""One decoder layer: its source weights and what it sees in, its shared weights out.

In: a source model's skeleton, calibration rows. Out: the shared `AttentionWeights` layer by layer, and a `LayerReport` of each.
Never: writes files, holds more than one layer, keeps more than its activations beside the two streams of hidden states.

Two streams of hidden states pass through the layers: the source's, which says what each layer should give, and the
converted model's, which is what each layer will see (method.md, section 2, output refit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from kvshare.activations import LayerCall, OutputSums, batches, enters, first_inputs, room, rotary_dim
from kvshare.families import Family
from kvshare.fit import FitReport, fit_layer
from kvshare.layout import pack, paired, unpack
from kvshare.merge import AttentionWeights, Grouping, Moments
from kvshare.merge.readers import GroupSolution
from kvshare.merge.refit import refit_output
from kvshare.merge.regroup import MergeReport, choose_grouping, divided, merge_svd, pair_losses, search_grouping, solve_layer
from kvshare.moments import MomentSums, Weighting, fits_apart
from kvshare.passes import add_moments, advance, attend_and_advance, attention_of, with_weights
from kvshare.planning import Plan
from kvshare.progress import Progress
from kvshare.recipe import Recipe
from kvshare.sections import Form, Merge
from kvshare.streaming import Skeleton, read_layer
from kvshare.tensors import DTYPES

FIXED_BALANCE = 4.0  # where there is no text to search for the balance of least error on
ALONE_ITERATIONS = 20  # of the search, where layers are compared; the rest gains a few percent of the error
STATISTICS_ITERATIONS = 12  # where there is no text: the perplexity of twenty steps, in three fifths of the time


@dataclass(frozen=True)
class LayerReport:
    """How well one layer was merged: `lost`, the fraction of weighted energy dropped (the prediction); `error`, the
    measured E|y - y_shared|^2 / E|y|^2 of its attention output, None where there was no text to measure on; the balance and
    grouping that were chosen; how the fit of `learned` went.
    """

    layer: int
    lost: float
    error: float | None
    balance: float
    condition: float
    grouping: Grouping
    fit: FitReport | None = None


@dataclass(frozen=True)
class MergedLayer:
    """A decoder layer as it was and as it is now, float32, in native form (None where no text passes through); its new attention
    weights and the report of the merge, both None where it was left untouched.
    """

    source: nn.Module | None
    module: nn.Module | None
    weights: AttentionWeights | None
    report: LayerReport | None


@dataclass(frozen=True)
class MergedBefore:
    """What an earlier run has made of a layer: its weights as they are stored, and the report of the merge."""

    weights: AttentionWeights
    report: LayerReport


@dataclass(frozen=True)
class Solved:
    """The closed form of one layer: the source's weights, the moments it was solved on, one solution per output head, and what
    it predicts.
    """

    weights: AttentionWeights
    moments: Moments
    solutions: list[GroupSolution]
    report: MergeReport


@dataclass(frozen=True)
class _View:
    """What one layer is merged on: the converted stream that enters it and the outputs that the source gives there."""

    layer: nn.Module
    family: Family
    call: LayerCall
    hidden: Tensor  # (rows, length, hidden)
    wanted: Tensor  # (rows, length, hidden)
    device: torch.device
    form: Form = "shared"


def read_weights(attention: nn.Module, family: Family, head_dim: int, rotary_dim: int | None = None) -> AttentionWeights:
    """The projections of an attention module as `AttentionWeights`, in the module's dtype."""
    tensors = {name: value.detach() for name, value in attention.named_parameters()}
    return unpack(tensors, family, head_dim, rotary_dim)


def as_stored(weights: AttentionWeights, plan: Plan, layer: int) -> AttentionWeights:
    """The weights of a layer, each tensor in the dtype that it will be stored in."""
    family = plan.family
    dtypes = {name: DTYPES[plan.source.tensors[family.tensor(layer, name)].dtype] for name in pack(weights, family)}
    cast = {name: value.to(dtypes[name]) for name, value in pack(weights, family).items()}
    return unpack(cast, family, weights.head_dim, weights.rotary_dim)


def merge_layers(
    skeleton: Skeleton,
    plan: Plan,
    rows: Tensor,
    device: torch.device,
    progress: Progress,
    finished: Callable[[int], MergedBefore | None] = lambda _: None,
    own: Callable[[int], bool] = lambda _: True,
) -> Iterator[MergedLayer]:
    """Merge all layers in order, each behind the converted layers before it, each read from the disk when its turn comes.

    Args:
        skeleton: the source.
        plan: its recipe's init is `svd` or `learned`.
        rows: calibration tokens (rows, length).
        device: where one layer at a time is computed, in float32.
        progress: called on the way.
        finished: what an earlier run has made of a layer; None where it is still to be merged.
        own: whether a layer is to be merged at all, or passed as the source has it; all are, where the recipe's merge is
            sequential.

    Yields:
        each layer, with its new weights rounded as they will be stored, which is how later layers see them.
    """
    assert plan.layer_heads is not None
    family, recipe, scratch, sequential = plan.family, plan.recipe, skeleton.scratch, plan.recipe.merge.sequential
    source_hidden, calls = first_inputs(skeleton.model, skeleton.layers, rows, device, scratch)
    hidden, wanted = room(source_hidden.shape, scratch).copy_(source_hidden), room(source_hidden.shape, scratch)
    corrects = sequential and not family.post_norm  # a norm lies between what attention gives and what it is added to
    for index, call in enumerate(calls):
        progress("merging layers", index, len(calls))
        layer = read_layer(skeleton, index, device)
        kv_heads, before = plan.layer_heads[index], finished(index)
        merged, weights, report = layer, None, None
        if not sequential:
            hidden.copy_(source_hidden)
        if kv_heads and before is None and own(index):
            attend_and_advance(layer, family, source_hidden, wanted, call, device, hidden if corrects else None)
            view = _View(layer, family, call, hidden, wanted, device, recipe.form)
            weights, report = _merge_layer(view, plan.head_dim, kv_heads, recipe, index, progress)
            weights = as_stored(weights, plan, index)
        else:
            advance(layer, source_hidden, call, device)
            if before is not None:
                weights, report = before.weights, before.report
        if weights is not None:
            merged = with_weights(layer, family, weights, recipe.form)
        if sequential:
            advance(merged, hidden, call, device)
        yield MergedLayer(layer, merged, weights, report)
    progress("merging layers", len(calls), len(calls))


def merge_alone(
    layer: nn.Module,
    plan: Plan,
    call: LayerCall,
    hidden: Tensor,
    wanted: Tensor,
    options: Sequence[int],
    device: torch.device,
) -> Iterator[tuple[nn.Module, float]]:
    """Merge one layer of the source in each of several ways, by the closed form, on the source's own hidden states.

    Args:
        layer: the source's decoder layer on `device`, float32.
        plan: of the conversion.
        call: how the layer is called.
        hidden: what enters the layer (rows, length, hidden).
        wanted: what its attention gives there (rows, length, hidden).
        options: the numbers of KV heads to try.
        device: where to compute.

    Yields:
        per option the layer with merged weights in native form, and the squared error of its attention output per token that
        the singular values dropped predict, keys and values weighted as they count to first order.
    """
    view = _View(layer, plan.family, call, hidden, wanted, device, plan.recipe.form)
    settings = plan.recipe.merge
    for solved in _solved(view, plan, options):
        merged, _, _ = _closed_form(view, solved.weights, solved.moments, settings, solved.solutions, ALONE_ITERATIONS)
        merged, _ = _refitted(view, merged, settings)
        yield with_weights(layer, plan.family, merged, plan.recipe.form), solved.report.loss


def source_moments(
    layer: nn.Module, plan: Plan, call: LayerCall, hidden: Tensor, kv_heads: int, device: torch.device, advances: bool = False
) -> tuple[Moments, int]:
    """The moments of one layer of the source, for a conversion to `kv_heads` KV heads, and how many numbers of a head rope turns;
    for the arguments see `merge_alone`. Where it `advances`, hidden states are taken behind the layer, in place.
    """
    view, settings = _View(layer, plan.family, call, hidden, hidden, device), plan.recipe.merge
    attention = attention_of(layer, plan.family)
    weights = read_weights(attention, plan.family, plan.head_dim, rotary_dim(attention, plan.family, call))
    grouping = _grouping(view, weights, kv_heads, settings)
    part = _part(view, settings.moment_tokens)
    moments = _moments(part, weights, grouping, settings.weighting, advances)
    if advances and len(rest := hidden[len(part.hidden) :]):
        advance(layer, rest, call, device)
    return moments, weights.rotated


def merge_on_statistics(
    weights: AttentionWeights, moments: Moments, settings: Merge, layer: int
) -> tuple[AttentionWeights, LayerReport]:
    """The closed form alone, on moments that were taken before: no text, so no line search and no refit.

    Args:
        weights: of the source layer; its `rotary_dim` is known.
        moments: of the source layer.
        settings: the recipe's `merge` section, of which `joint` counts, and `balance` where it is a single one.
        layer: for the report.
    """
    balance = settings.balance[0] if len(settings.balance) == 1 else FIXED_BALANCE
    solved = solve_layer(weights, moments, balance, None, STATISTICS_ITERATIONS, settings.joint)
    merged, report = merge_svd(weights, moments.grouping, solved)
    return merged, LayerReport(layer, report.lost, None, balance, report.condition, report.grouping)


def solve_alone(
    layer: nn.Module, plan: Plan, call: LayerCall, hidden: Tensor, options: Sequence[int], device: torch.device
) -> Iterator[Solved]:
    """The closed form of one layer of the source for each of several numbers of heads, as `merge_alone` takes it, without
    applying it: what is lost is predicted, and nothing is measured. For the arguments see there.
    """
    return _solved(_View(layer, plan.family, call, hidden, hidden, device), plan, options)


def _solved(view: _View, plan: Plan, options: Sequence[int]) -> Iterator[Solved]:
    attention, settings = attention_of(view.layer, plan.family), plan.recipe.merge
    weights = read_weights(attention, plan.family, plan.head_dim, rotary_dim(attention, plan.family, view.call))
    part, heads = _part(view, settings.moment_tokens), (tuple(range(weights.kv_heads)),)
    # the moments of all heads as one group hold those of all other groups, as long as each head has its own
    whole = None
    if len(options) > 1 and fits_apart(weights, weights.kv_heads):
        whole = _moments(part, weights, heads, settings.weighting)
    pair_loss = cache(lambda: pair_losses(weights, _scout(view, weights)))
    for kv_heads in options:
        grouping = _sides(weights, kv_heads)
        if _searches(weights, kv_heads, settings):
            grouping = choose_grouping(weights.kv_heads, kv_heads, pair_loss())
        if whole is None:
            moments = _moments(part, weights, grouping, settings.weighting)
        else:
            moments = divided(whole, grouping, weights.head_dim)
        solutions = solve_layer(weights, moments, iterations=ALONE_ITERATIONS)
        _, report = merge_svd(weights, moments.grouping, solutions)
        yield Solved(weights, moments, solutions, report)


def _merge_layer(
    view: _View, head_dim: int, kv_heads: int, recipe: Recipe, index: int, progress: Progress
) -> tuple[AttentionWeights, LayerReport]:
    attention = attention_of(view.layer, view.family)
    weights = read_weights(attention, view.family, head_dim, rotary_dim(attention, view.family, view.call))
    settings = recipe.merge
    grouping = _grouping(view, weights, kv_heads, settings)
    moments = _moments(_part(view, settings.moment_tokens), weights, grouping, settings.weighting)
    merged, report, balance = _closed_form(view, weights, moments, settings)
    merged, error = _refitted(view, merged, settings)
    fit = None
    if recipe.init == "learned":
        merged, fit = _learn(view, merged, recipe, index, progress)
        merged, error = _refitted(view, merged, settings)
    return merged, LayerReport(index, report.lost, error, balance, report.condition, report.grouping, fit)


def _grouping(view: _View, weights: AttentionWeights, kv_heads: int, settings: Merge) -> Grouping:
    """Which source heads end in which output head, searched on part of the calibration text where there is a choice."""
    if _searches(weights, kv_heads, settings):
        return search_grouping(weights, _scout(view, weights), kv_heads)
    return _sides(weights, kv_heads)


def _searches(weights: AttentionWeights, kv_heads: int, settings: Merge) -> bool:
    """Whether there is a choice of which heads to merge, and it is to be made."""
    return kv_heads not in (1, weights.kv_heads) and settings.grouping == "search"


def _sides(weights: AttentionWeights, kv_heads: int) -> Grouping:
    """Heads that stand side by side, in `kv_heads` groups."""
    heads, size = tuple(range(weights.kv_heads)), weights.kv_heads // kv_heads
    return tuple(heads[start : start + size] for start in range(0, len(heads), size))


def _scout(view: _View, weights: AttentionWeights) -> Moments:
    """Moments of all heads as one group, on part of the calibration text: enough to say which heads to merge."""
    share = replace(view, hidden=view.hidden[: _share(view.hidden)])
    return _moments(share, weights, (tuple(range(weights.kv_heads)),), "projections")


def _part(view: _View, tokens: int) -> _View:
    """The view of the first `tokens` tokens, in whole rows."""
    rows = max(1, tokens // view.hidden.shape[1])
    return replace(view, hidden=view.hidden[:rows], wanted=view.wanted[:rows])


def _share(hidden: Tensor) -> int:
    """Rows that are enough to choose between alternatives."""
    return max(1, len(hidden) // 4)


def _moments(view: _View, weights: AttentionWeights, grouping: Grouping, weighting: Weighting, advances: bool = False) -> Moments:
    sums = MomentSums(weights, grouping, weighting, view.form)
    add_moments(sums, view.layer, view.family, view.hidden, view.call, view.device, advances)
    return sums.moments()


def _closed_form(
    view: _View,
    weights: AttentionWeights,
    moments: Moments,
    settings: Merge,
    solutions: Sequence[GroupSolution] | None = None,
    iterations: int | None = None,
) -> tuple[AttentionWeights, MergeReport, float]:
    """The closed form at the balance of least output error on part of the calibration text."""
    share = _share(view.hidden)
    best: tuple[float, AttentionWeights, MergeReport, float] | None = None
    for balance in settings.balance:
        solutions = solve_layer(weights, moments, balance, solutions, iterations, settings.joint)
        merged, report = merge_svd(weights, moments.grouping, solutions)
        if len(settings.balance) == 1:
            return merged, report, balance
        outputs = _output_sums(view, merged, view.hidden[:share], view.wanted[:share])
        error = outputs.error(_refit(merged, outputs) if settings.refit else merged.o)
        if best is None or error < best[0]:
            best = (error, merged, report, balance)
    assert best is not None
    return best[1:]


def _refitted(view: _View, weights: AttentionWeights, settings: Merge) -> tuple[AttentionWeights, float]:
    """The weights with a refitted output projection, if the recipe asks for it, and their output error."""
    outputs = _output_sums(view, weights, view.hidden, view.wanted)
    if settings.refit:
        weights = replace(weights, o=_refit(weights, outputs))
    return weights, outputs.error(weights.o)


def _output_sums(view: _View, weights: AttentionWeights, hidden: Tensor, targets: Tensor) -> OutputSums:
    layer = with_weights(view.layer, view.family, weights, view.form)
    output = getattr(attention_of(layer, view.family), view.family.o)
    sums = OutputSums()
    for batch, target in zip(batches(hidden), batches(targets), strict=True):
        wanted = target.to(view.device)
        if output.bias is not None:
            wanted = wanted - output.bias.detach()
        sums.add(paired(enters(layer, output, batch.to(view.device), view.call), view.family, weights), wanted)
    return sums


def _refit(weights: AttentionWeights, outputs: OutputSums) -> Tensor:
    assert outputs.heads is not None
    assert outputs.cross is not None
    return refit_output(weights.o, outputs.heads, outputs.cross)


def _learn(
    view: _View, merged: AttentionWeights, recipe: Recipe, index: int, progress: Progress
) -> tuple[AttentionWeights, FitReport]:
    layer = with_weights(view.layer, view.family, merged, view.form)
    attention = attention_of(layer, view.family)
    inputs = torch.cat([enters(layer, attention, batch.to(view.device), view.call) for batch in batches(view.hidden)])

    def step(done: int, total: int) -> None:
        progress(f"fitting layer {index}", done, total)

    wanted, seed = view.wanted.to(view.device), recipe.seed + index
    return fit_layer(attention, view.family, merged, inputs, wanted, view.call, recipe.fit, seed, step)
