"""The closed form for a whole layer: which heads to merge, and the weights that follow.

In: `AttentionWeights`, `Moments`, the number of output heads, the balance of key error against value error.
Out: `AttentionWeights` with k == v, and a `MergeReport`. Never: sees activations, does IO.

Heads are renumbered: output head 0 serves the first group's query heads, and so on. Rows of q and columns of o move along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product, repeat

import torch
from torch import Tensor

from kvshare.merge import AttentionWeights, Grouping, Moments
from kvshare.merge.readers import GroupProblem, GroupSolution
from kvshare.merge.svd import solve_group, solve_in_turn

EXHAUSTIVE_HEADS = 16
PAIR_ITERATIONS = 20  # enough for the order of pair losses; the final solve runs to convergence


@dataclass(frozen=True)
class MergeReport:
    """What a closed-form merge did: `grouping` of source KV heads; `lost`, the weighted energy dropped as a fraction of
    what there was; `loss`, the same as a squared error of the attention output per token (the predicted damage);
    `condition`, the largest condition number of a value reader.
    """

    grouping: Grouping
    lost: float
    loss: float
    condition: float


def solve_layer(
    weights: AttentionWeights,
    moments: Moments,
    balance: float = 1.0,
    starts: Sequence[GroupSolution] | None = None,
    iterations: int | None = None,
    joint: bool = True,
) -> list[GroupSolution]:
    """Share K and V of a layer and regroup its heads: one solution per output head, all in float64.

    Args:
        weights: the source layer.
        moments: second moments of its activations, for the groups that are wanted.
        balance: a / b, the weight of the key error against the value error; 1 is what both do to the output to first order.
        starts: the solutions at another balance, if there are any; they shorten the search.
        iterations: the most steps of the search; None for as many as are worth while.
        joint: whether heads are merged and K and V shared in one problem; one after the other is there to be compared with.
    """
    problems = layer_problems(weights, moments, balance)
    if not joint:
        return [solve_in_turn(problem) for problem in problems]
    known: Sequence[GroupSolution | None] = starts or [None] * len(problems)
    # many small products: a head keeps one core busy, not all of them
    workers = 1 if weights.k.is_cuda else min(len(problems), torch.get_num_threads())
    if workers == 1:
        return [solve_group(problem, iterations, start) for problem, start in zip(problems, known, strict=True)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(solve_group, problems, repeat(iterations), known))


def layer_problems(weights: AttentionWeights, moments: Moments, balance: float = 1.0) -> list[GroupProblem]:
    """The problem of every output head of a layer, in float64; for the arguments see `solve_layer`."""
    return [
        _problem(weights, group, keys, values, moments, balance)
        for group, keys, values in zip(moments.grouping, moments.keys, moments.values, strict=True)
    ]


def merge_svd(
    weights: AttentionWeights, grouping: Grouping, solutions: Sequence[GroupSolution]
) -> tuple[AttentionWeights, MergeReport]:
    """The weights of the shared layer and what the merge lost; in float64, but for queries that stay as they are.

    Args:
        weights: the source layer.
        grouping: the source KV heads of each output head.
        solutions: one per output head.
    """
    merged = _assemble(weights, grouping, solutions)
    loss, energy = (sum(getattr(solution, name) for solution in solutions) for name in ("loss", "energy"))
    condition = max(float(torch.linalg.cond(solution.readers).max()) for solution in solutions)
    return merged, MergeReport(grouping, loss / max(energy, 1e-30), loss, condition)


def search_grouping(weights: AttentionWeights, scout: Moments, kv_heads: int) -> Grouping:
    """The grouping of a layer's heads whose pairs lose least when they are merged.

    Args:
        weights: the source layer.
        scout: moments of all heads as one group; those that weigh by projections do.
        kv_heads: KV heads of the result; divides the source's.
    """
    return choose_grouping(weights.kv_heads, kv_heads, pair_losses(weights, scout))


def pair_losses(weights: AttentionWeights, scout: Moments) -> Callable[[int, int], float]:
    """What two heads of a layer lose when they are merged; each pair is solved once. For the arguments see `search_grouping`."""

    @cache
    def pair_loss(first: int, second: int) -> float:
        (problem,) = layer_problems(weights, divided(scout, ((first, second),), weights.head_dim))
        return solve_group(problem, PAIR_ITERATIONS).loss

    return pair_loss


def divided(whole: Moments, grouping: Grouping, head_dim: int) -> Moments:
    """The moments of other groups, from those of all heads as one group.

    Args:
        whole: of a single group, which holds all heads in their order.
        grouping: any groups of these heads.
        head_dim: numbers of a head.
    """
    heads = len(whole.key_metric)
    numbers = torch.arange(2 * heads * head_dim).view(2, heads, head_dim)
    rest = torch.arange(2 * heads * head_dim, whole.keys[0].shape[-1])
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for group in grouping:
        index = torch.cat([numbers[:, list(group)].flatten(), rest]).to(whole.key_metric.device)
        for parts, part in ((keys, whole.keys[0]), (values, whole.values[0])):
            parts.append((part if len(part) == 1 else part[list(group)])[:, index[:, None], index])
    return Moments(grouping, tuple(keys), tuple(values), whole.key_metric, whole.value_metric, whole.value_noise)


def _problem(
    weights: AttentionWeights, group: tuple[int, ...], keys: Tensor, values: Tensor, moments: Moments, balance: float
) -> GroupProblem:
    """The problem of one output head."""
    width, heads, count = weights.head_dim, weights.kv_heads, len(group)
    numbers = 2 * count * width
    targets = torch.eye(numbers, keys.shape[-1], dtype=torch.float64, device=keys.device).view(2, count, width, -1)
    for target, bias in zip(targets, (weights.k_bias, weights.v_bias), strict=True):
        if bias is not None:
            target[:, :, -1] = bias.view(heads, width)[list(group)].double()
    return GroupProblem(
        keys,
        values,
        targets[0],
        targets[1],
        balance * moments.key_metric[list(group)],
        moments.value_metric[list(group)],
        weights.rotated,
        weights.k_bias is not None,
        weights.v_bias is not None,
        weights.query_norm is not None,
        None if moments.value_noise is None else moments.value_noise[list(group)],
    )


def choose_grouping(heads: int, groups: int, pair_loss: Callable[[int, int], float]) -> Grouping:
    """Divide `heads` into `groups` of equal size with the least sum of pair losses inside them.

    Exhaustive (by dynamic programming over sets of heads) up to 16 heads; greedy beyond, then improved by exchanging heads.

    Args:
        heads: number of source KV heads.
        groups: number of output heads; divides `heads`.
        pair_loss: loss of merging two heads, symmetric.
    """
    size = heads // groups
    if size == 1:
        return tuple((head,) for head in range(heads))
    if groups == 1:
        return (tuple(range(heads)),)
    losses = {(i, j): pair_loss(i, j) for i, j in combinations(range(heads), 2)}

    def cost(group: tuple[int, ...]) -> float:
        return sum(losses[pair] for pair in combinations(sorted(group), 2))

    if heads > EXHAUSTIVE_HEADS:
        return _exchanged(_greedy(heads, size, cost), cost)

    @cache
    def best(remaining: tuple[int, ...]) -> tuple[float, Grouping]:
        if not remaining:
            return 0.0, ()
        first, others = remaining[0], remaining[1:]
        candidates = []
        for rest in combinations(others, size - 1):
            group = (first, *rest)
            tail_cost, tail = best(tuple(head for head in others if head not in rest))
            candidates.append((cost(group) + tail_cost, (group, *tail)))
        return min(candidates)

    return best(tuple(range(heads)))[1]


def _greedy(heads: int, size: int, cost: Callable[[tuple[int, ...]], float]) -> Grouping:
    """Fill one group after another, each time with the head that adds least."""
    free = list(range(heads))
    groups = []
    while free:
        group: tuple[int, ...] = (free.pop(0),)
        while len(group) < size:
            nearest = min(free, key=lambda head: cost((*group, head)))
            free.remove(nearest)
            group = (*group, nearest)
        groups.append(tuple(sorted(group)))
    return tuple(groups)


def _exchanged(grouping: Grouping, cost: Callable[[tuple[int, ...]], float]) -> Grouping:
    """Exchange two heads of different groups as long as that lowers the cost."""
    groups = [list(group) for group in grouping]
    improved = True
    while improved:
        improved = False
        for one, other in combinations(range(len(groups)), 2):
            for i, j in product(range(len(groups[one])), range(len(groups[other]))):
                before = cost(tuple(groups[one])) + cost(tuple(groups[other]))
                groups[one][i], groups[other][j] = groups[other][j], groups[one][i]
                if cost(tuple(groups[one])) + cost(tuple(groups[other])) < before * (1 - 1e-9):
                    improved = True
                else:
                    groups[one][i], groups[other][j] = groups[other][j], groups[one][i]
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _assemble(weights: AttentionWeights, grouping: Grouping, solutions: Sequence[GroupSolution]) -> AttentionWeights:
    """Fold the gauges into q, the readers into o, and lay the heads in their new order; a head at a time becomes float64."""
    width, hidden, per_head = weights.head_dim, weights.q.shape[1], weights.query_heads // weights.kv_heads
    identity = torch.eye(width, dtype=torch.float64, device=weights.q.device)
    same = all(torch.equal(matrix, identity) for solution in solutions for matrix in solution.key_readers)
    # keys that are kept, of heads that stay where they are: so do the queries, which are the largest matrix here
    same = same and [head for group in grouping for head in group] == list(range(weights.kv_heads))

    shared, q, q_bias, o = [], [], [], []
    for group, solution in zip(grouping, solutions, strict=True):
        heads = [part[head * width : (head + 1) * width].double() for part in (weights.k, weights.v) for head in group]
        shared.append(solution.projection @ torch.cat(heads))
        for head, matrix, reader in zip(group, solution.key_readers, solution.readers, strict=True):
            queries = slice(head * per_head * width, (head + 1) * per_head * width)
            if not same:
                # a score is q . B s = (B^T q) . s
                q.append((matrix.T @ weights.q[queries].double().view(per_head, width, hidden)).flatten(0, 1))
                if weights.q_bias is not None:
                    q_bias.append((weights.q_bias[queries].double().view(per_head, width) @ matrix).flatten())
            o.append((weights.o[:, queries].double().reshape(-1, width) @ reader).view(weights.o.shape[0], -1))

    projection = torch.cat(shared)
    return replace(
        weights,
        q=weights.q if same else torch.cat(q),
        k=projection,
        v=projection,
        o=torch.cat(o, dim=1),
        q_bias=torch.cat(q_bias) if q_bias else weights.q_bias,
        k_bias=None if weights.k_bias is None else torch.cat([solution.key_constant for solution in solutions]),
        v_bias=None if weights.v_bias is None else torch.cat([solution.value_constant for solution in solutions]),
    )
