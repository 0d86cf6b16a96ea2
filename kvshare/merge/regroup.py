"""The closed form for a whole layer: which heads to merge, and the weights that follow.

In: `AttentionWeights`, `Moments`, the number of output heads, the balance of value error against key error.
Out: `AttentionWeights` with k == v, and a `MergeReport`. Never: sees activations, does IO.

Heads are renumbered: output head 0 serves the first group's query heads, and so on. Rows of q and columns of o move along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import torch

from kvshare.merge import AttentionWeights, Moments
from kvshare.merge.svd import GroupProblem, GroupSolution, gauge_matrix, solve_group

EXHAUSTIVE_HEADS = 16
PAIR_ITERATIONS = 20  # enough for the order of pair losses; the final solve runs to convergence

Grouping = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MergeReport:
    """What a closed-form merge did: `grouping` of source KV heads, `lost`, the weighted energy dropped as a fraction of
    what there was (the predicted damage), `condition`, the largest condition number of a value reader.
    """

    grouping: Grouping
    lost: float
    condition: float


def merge_svd(
    weights: AttentionWeights, moments: Moments, kv_heads: int, balance: float = 1.0, grouping: Grouping | None = None
) -> tuple[AttentionWeights, MergeReport]:
    """Share K and V of a layer and regroup its heads, in one solve per output head.

    Args:
        weights: the source layer; computed in float64, returned in float64.
        moments: second moments of its activations.
        kv_heads: KV heads of the result; divides the source's.
        balance: b / a with both errors measured relative to their energies.
        grouping: source KV heads per output head; None searches for the best.
    """
    weights = weights.to(torch.float64)
    problems = _Problems(weights, moments, balance)
    if grouping is None:
        grouping = choose_grouping(weights.kv_heads, kv_heads, problems.pair_loss)
    solutions = [solve_group(problems.of(group)) for group in grouping]
    merged = _assemble(weights, moments, grouping, solutions)
    lost = sum(solution.loss for solution in solutions) / max(sum(solution.energy for solution in solutions), 1e-30)
    condition = max(float(torch.linalg.cond(solution.readers).max()) for solution in solutions)
    return merged, MergeReport(grouping, lost, condition)


class _Problems:
    """Cuts the `GroupProblem` of any set of heads out of a layer."""

    def __init__(self, weights: AttentionWeights, moments: Moments, balance: float) -> None:
        width, heads = weights.head_dim, weights.kv_heads
        self.moments = moments
        self.signs_only = weights.query_norm is not None
        queries = moments.queries.view(heads, -1, width // 2).sum(1)  # lambda, summed over the query heads served
        self.key_weight = torch.cat([queries, queries], -1)  # (kv heads, head_dim)
        if weights.key_norm is not None:
            self.key_weight = self.key_weight * weights.key_norm.square()
        out = weights.o.view(weights.o.shape[0], heads, -1, width)  # (hidden, kv heads, queries per kv head, head_dim)
        self.value_metric = torch.einsum("ohqi,ohqj->hij", out, out)  # M
        second = moments.second
        own_keys = torch.einsum("hihi->hi", second[0, :, :, 0]) + moments.mean[0].square()
        own_values = torch.einsum("hihj->hij", second[1, :, :, 1]) + torch.einsum("hi,hj->hij", moments.mean[1], moments.mean[1])
        self.key_cost = 1 / max(float((self.key_weight * own_keys).sum()), 1e-30)
        self.value_cost = balance / max(float((self.value_metric * own_values).sum()), 1e-30)

    def of(self, group: tuple[int, ...]) -> GroupProblem:
        index = torch.tensor(group, device=self.key_weight.device)
        second = self.moments.second[:, index][:, :, :, :, index].contiguous()
        return GroupProblem(
            second,
            self.moments.mean[0, index],
            self.moments.mean[1, index],
            self.key_weight[index],
            self.value_metric[index],
            self.key_cost,
            self.value_cost,
            self.signs_only,
        )

    def pair_loss(self, first: int, second: int) -> float:
        return solve_group(self.of((first, second)), PAIR_ITERATIONS).loss


def choose_grouping(heads: int, groups: int, pair_loss: Callable[[int, int], float]) -> Grouping:
    """Divide `heads` into `groups` of equal size with the least sum of pair losses inside them.

    Exhaustive (by dynamic programming over sets of heads) up to 16 heads; greedy beyond.

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
        return _greedy(heads, size, cost)

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


def _assemble(weights: AttentionWeights, moments: Moments, grouping: Grouping, solutions: list[GroupSolution]) -> AttentionWeights:
    """Fold the gauges into q, the readers into o, and lay the heads in their new order."""
    width, heads, hidden = weights.head_dim, weights.kv_heads, weights.q.shape[1]
    query_rows = weights.q.view(heads, -1, width, hidden)  # (kv heads, queries per kv head, head_dim, hidden)
    query_bias = None if weights.q_bias is None else weights.q_bias.view(heads, -1, width)
    out = weights.o.view(weights.o.shape[0], heads, -1, width)  # (hidden, kv heads, queries per kv head, head_dim)
    keys, values = (part.view(heads, width, hidden) for part in (weights.k, weights.v))

    shared, q, q_bias, o, k_bias, v_bias = [], [], [], [], [], []
    for group, solution in zip(grouping, solutions, strict=True):
        index = torch.tensor(group, device=weights.q.device)
        source = torch.stack([keys[index], values[index]])  # (2, g, head_dim, hidden)
        shared.append(torch.einsum("dpgi,pgih->dh", solution.projection, source))
        # A score is q . B(z) s = (B(z)^T q) . s
        matrices = gauge_matrix(solution.gauge)
        q.append(torch.einsum("gij,gqih->gqjh", matrices, query_rows[index]).reshape(-1, hidden))
        if query_bias is not None:
            q_bias.append(torch.einsum("gij,gqi->gqj", matrices, query_bias[index]).flatten())
        o.append(torch.einsum("ogqi,gij->ogqj", out[:, index], solution.readers).reshape(out.shape[0], -1))
        projected = torch.einsum("dpgi,pgi->d", solution.projection, moments.projected_mean[:, index])
        k_bias.append(solution.key_constant - projected)
        v_bias.append(solution.value_constant - projected)

    projection = torch.cat(shared)
    return replace(
        weights,
        q=torch.cat(q),
        k=projection,
        v=projection,
        o=torch.cat(o, dim=1),
        q_bias=torch.cat(q_bias) if q_bias else None,
        k_bias=None if weights.k_bias is None else torch.cat(k_bias),
        v_bias=None if weights.v_bias is None else torch.cat(v_bias),
    )
