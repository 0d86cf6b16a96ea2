"""The closed form for one output head: which D numbers of (k, v) to keep, and how each source head reads them.

In: a `GroupProblem`, the second moments and metrics of the source heads that end in one output head. Out: a `GroupSolution`.
Never: sees weights, activations or other heads. Formulas: method.md, section 2; everything in float64.

With u = (k_1, ..., k_g, v_1, ..., v_g), before biases, norm and rope, every candidate is s = P u, so all that is needed of the
data is its second moments: K_h, tokens weighted by what an error in their keys does to the attention output, and V_h, pooled
by the attention weights as the values are. Were all of them equal, P for one head would be an eigenvalue problem; as they
are not, that is where a quasi-Newton search starts, the readers B and A being eliminated by their least squares.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvshare.merge.readers import RIDGE, GroupProblem, GroupSolution, gauge_matrix, read, read_with_slope, signs

LEAST = 1e-9  # of the largest energy: directions of u with less do not occur
ITERATIONS = 60
RESTARTED_ITERATIONS = 40  # where the solution at another balance is known
TOLERANCE = 1e-6  # relative fall of the loss below which the search has converged
SETTLING = 30  # rounds of readers and constants at a start
FLOOR = 2e-2  # least singular value of the key part of the first basis: what is lost to keys stays readable to values


def solve_group(problem: GroupProblem, iterations: int | None = None, start: GroupSolution | None = None) -> GroupSolution:
    """Minimise the weighted error of keys and values over P, B, A and the constants.

    Starts from the best of a few simple answers and searches P and the constants in coordinates in which the problem is round,
    so that the result does not depend on the basis the source happens to be written in.

    Args:
        problem: float64 tensors; D even.
        iterations: the most steps of the search; None for as many as are worth while.
        start: the solution of a problem that differs by the weight of the key error alone.
    """
    problem, mean = _centred(problem)
    if start is None:
        best = min((_settled(problem, first) for first in _starts(problem)), key=lambda solution: solution.loss)
    else:
        offset = start.projection @ mean
        best = read(problem, start.projection, start.key_constant + offset, start.value_constant + offset)
    if iterations is None:
        iterations = ITERATIONS if start is None else RESTARTED_ITERATIONS
    if iterations:
        best = _searched(problem, best, iterations)
    return _uncentred(best, mean)


def solve_in_turn(problem: GroupProblem) -> GroupSolution:
    """Merge the heads' keys and the heads' values first, each for itself, then share the two: what `solve_group` is held against.

    Args:
        problem: float64 tensors; D even.
    """
    if problem.heads == 1:
        return solve_group(problem)
    nothing = torch.zeros_like(problem.key_metric)
    keys = solve_group(replace(problem, value_metric=nothing)).projection
    values = solve_group(replace(problem, key_metric=nothing)).projection
    stacked = torch.cat([keys, values])  # (2 D, 2 g D): u of the merged heads
    centred, mean = _centred(problem)
    n = problem.numbers
    key_second, value_second = (part.mean(0)[:n, :n] for part in (centred.keys, centred.values))
    zero, width = keys.new_zeros(problem.width), problem.width
    key_readers, value_readers = read(centred, keys, zero, zero).key_readers, read(centred, values, zero, zero).readers
    identity = torch.eye(2 * width, dtype=keys.dtype, device=keys.device).view(2, 1, width, 2 * width)
    merged = GroupProblem(
        (stacked @ key_second @ stacked.T)[None],
        (stacked @ value_second @ stacked.T)[None],
        identity[0],
        identity[1],
        (key_readers.transpose(1, 2) @ problem.key_metric @ key_readers).sum(0, keepdim=True),
        (value_readers.transpose(1, 2) @ problem.value_metric @ value_readers).sum(0, keepdim=True),
        problem.rotary_dim,
        signs_only=problem.signs_only,
    )
    return _uncentred(_settled(centred, solve_group(merged).projection @ stacked), mean)


def _uncentred(solution: GroupSolution, mean: Tensor) -> GroupSolution:
    """The solution of a problem from that of its `_centred` form, in u - mean."""
    offset = solution.projection @ mean
    return replace(solution, key_constant=solution.key_constant - offset, value_constant=solution.value_constant - offset)


def _searched(problem: GroupProblem, start: GroupSolution, iterations: int) -> GroupSolution:
    """L-BFGS from `start`; returns the best solution met."""
    left, right, back = _round_coordinates(problem, start)
    n, rank = right.shape
    constants = torch.stack([start.key_constant, start.value_constant], 1)
    variable = left.T @ torch.cat([start.projection @ back, constants], 1)  # (D, rank + 2)
    variable.requires_grad_(True)
    best = start
    scale = 1 / max(start.loss, 1e-300)
    search = torch.optim.LBFGS(
        [variable],
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        nonlocal best
        values = torch.linalg.solve_triangular(left.T, variable.detach(), upper=True)
        solution, slope = read_with_slope(problem, values[:, :rank] @ right.T, values[:, rank], values[:, rank + 1])
        if solution.loss < best.loss:
            best = solution
        slope = torch.cat([slope[:, :n] @ right, slope[:, n:]], 1)
        variable.grad = (scale * torch.linalg.solve_triangular(left, slope, upper=False)).contiguous()
        return scale * solution.loss

    search.step(closure)
    return best


def _round_coordinates(problem: GroupProblem, solution: GroupSolution) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates Y with P = left^-T Y right^T and Y = left^T P back, in which the loss curves about equally in all directions.

    The curvature in P is nearly a Kronecker product of (D, D) and (n, n): its roots. Directions of u that never occur are left
    out: `right` and `back` are (n, rank).
    """
    n = problem.numbers
    keys, values = solution.key_readers, solution.readers
    key_normal = keys.transpose(1, 2) @ problem.key_metric @ keys  # B^T Lambda B (g, D, D)
    value_normal = values.transpose(1, 2) @ problem.value_metric @ values  # A^T M A (g, D, D)
    total = _ridged(key_normal.sum(0) + value_normal.sum(0), LEAST)
    inverse = torch.linalg.inv(total)
    typical = torch.zeros(n, n, dtype=total.dtype, device=total.device)
    for normal, second in ((key_normal, problem.keys), (value_normal, problem.values)):
        shares = torch.einsum("ij,gji->g", inverse, normal) / problem.width
        typical = typical + torch.einsum("g,gmn->mn", shares, second[:, :n, :n].expand(problem.heads, -1, -1))
    energies, directions = torch.linalg.eigh(_symmetric(typical))
    occurs = energies > LEAST * energies[-1]
    roots = energies[occurs].sqrt()
    return torch.linalg.cholesky(_symmetric(total)), directions[:, occurs] / roots, directions[:, occurs] * roots


def _centred(problem: GroupProblem) -> tuple[GroupProblem, Tensor]:
    """The same problem in u - m, and m (2 g D): where constants are free, P and they then do not fight over the mean."""
    n = problem.numbers
    mean = problem.values.mean(0)[:n, -1].clone()
    if not (problem.key_constant and problem.value_constant):
        return problem, torch.zeros_like(mean)
    shift = torch.eye(n + 1, dtype=mean.dtype, device=mean.device)
    shift[:n, -1] = -mean
    targets = []
    for target in (problem.key_target, problem.value_target):
        constant = target[..., -1] + target[..., :n] @ mean
        targets.append(torch.cat([target[..., :n], constant[..., None]], -1))
    keys, values = (shift @ second @ shift.T for second in (problem.keys, problem.values))
    return replace(problem, keys=keys, values=values, key_target=targets[0], value_target=targets[1]), mean


def _starts(problem: GroupProblem) -> list[Tensor]:
    """Candidates for P: the top directions of keys and values together, or common keys, and each head's own keys or values."""
    starts = list(torch.cat([problem.key_target, problem.value_target])[..., : problem.numbers])
    free = problem.rotary_dim == 0 and not problem.signs_only
    starts.append(_top_directions(problem, free) if free or problem.heads == 1 else _common_keys(problem))
    return starts


def _top_directions(problem: GroupProblem, free: bool) -> Tensor:
    """The optimum for equal moments: the top D directions of L E[u u^T] L^T, L the roots of the metrics.

    Args:
        problem: of one head, or of any number of heads where keys are read freely.
        free: keys are read from s in any coordinates. Otherwise P is written in those of the keys.
    """
    width = problem.width
    weighted, scale = weighted_second(problem)
    basis = torch.linalg.eigh(weighted).eigenvectors[:, -width:]  # U (2 g D, D)
    if free:
        return basis.T @ scale
    left, singular, right = torch.linalg.svd(basis[:width])
    # Directions that hold no key energy would vanish from s in key coordinates; a floor keeps them for the values.
    key_part = left @ torch.diag(singular.clamp_min(FLOOR)) @ right
    return torch.linalg.solve(_ridged(scale[:width, :width], 1e-6), key_part) @ basis.T @ scale


def weighted_second(problem: GroupProblem) -> tuple[Tensor, Tensor]:
    """Z Z^T of method.md, section 2, as L E[u u^T] L^T (2 g D, 2 g D), and L, the roots of the metrics, of the same shape.

    Keys and values have moments of their own: E[u u^T] is the sum of both, each relative to the energy that it weighs.
    """
    n, heads = problem.numbers, problem.heads
    second = torch.zeros(n, n, dtype=problem.keys.dtype, device=problem.keys.device)
    for moments, target, metric in (
        (problem.keys, problem.key_target, problem.key_metric),
        (problem.values, problem.value_target, problem.value_metric),
    ):
        energies = (metric * (target @ moments @ target.transpose(1, 2))).sum((1, 2)).clamp_min(1e-30)  # (g)
        second = second + (moments[:, :n, :n].expand(heads, -1, -1) / energies[:, None, None]).sum(0)
    scale = torch.block_diag(*(root(metric) for metric in (*problem.key_metric, *problem.value_metric)))
    return _symmetric(scale @ second @ scale.T), scale


def _common_keys(problem: GroupProblem) -> Tensor:
    """The best model that one head is of the g keys: of rank one for every rope pair, and for the numbers that are not rotated
    their top directions; the heads' moments averaged.
    """
    width, r = problem.width, problem.rotary_dim
    second = problem.keys.mean(0)
    if problem.signs_only:
        return _averaged(problem.key_metric, torch.diag_embed(_common_signs(problem, second)), width)
    pairs = _averaged(problem.key_metric[:, :r, :r], gauge_matrix(_common_scales(problem, second)), width)
    if r == width:
        return pairs
    roots = torch.stack([root(metric) for metric in problem.key_metric[:, r:, r:]])
    weighted = (roots @ problem.key_target[:, r:]).flatten(0, 1)  # (g (D - r), n)
    top = torch.linalg.eigh(_symmetric(weighted @ second @ weighted.T)).eigenvectors[:, r - width :]  # (g (D - r), D - r)
    return torch.cat([pairs, top.T @ weighted[:, : problem.numbers]])


def _common_scales(problem: GroupProblem, second: Tensor) -> Tensor:
    """Z (g, r / 2) of the best rank-one model of the g keys of every rope pair."""
    heads, r = problem.heads, problem.rotary_dim
    half = r // 2
    # E[k conj(k')] per pair from the real second moments: (half, g, g)
    target = problem.key_target[:, :r].flatten(0, 1)  # (g r, n); r may be 0
    blocks = (target @ second @ target.T).reshape(heads, 2, half, heads, 2, half)
    same = torch.einsum("gajhaj->jgh", blocks)
    crossed = torch.einsum("gjhj->jgh", blocks[:, 1, :, :, 0]) - torch.einsum("gjhj->jgh", blocks[:, 0, :, :, 1])
    diagonal = problem.key_metric.diagonal(dim1=-2, dim2=-1)
    weight = ((diagonal[:, :half] + diagonal[:, half:r]) / 2).sqrt().T.clamp_min(1e-12)  # (half, g)
    covariance = torch.complex(same, crossed) * weight[:, :, None] * weight[:, None, :]
    return (torch.linalg.eigh(covariance).eigenvectors[:, :, -1] / weight).T


def _common_signs(problem: GroupProblem, second: Tensor) -> Tensor:
    """Signs (g, D) of the best rank-one models of the g keys, of pairs and of the numbers that are not rotated."""
    r = problem.rotary_dim
    scales = _common_scales(problem, second)
    pairs = (scales * scales[:1].conj()).real  # (g, r / 2), relative to the first head
    target = problem.key_target[:, r:]
    weight = problem.key_metric.diagonal(dim1=-2, dim2=-1)[:, r:].sqrt().T  # (D - r, g)
    covariance = torch.einsum("gim,mn,hin->igh", target, second, target) * weight[:, :, None] * weight[:, None, :]
    top = torch.linalg.eigh(covariance).eigenvectors[:, :, -1].T  # (g, D - r)
    return signs(torch.cat([pairs, torch.zeros_like(pairs), top], -1), r)


def _averaged(metric: Tensor, matrices: Tensor, width: int) -> Tensor:
    """P (r, 2 g D) of the best s in matrices s ~ keys, for the first r numbers of each key.

    Args:
        metric: (g, r, r).
        matrices: readers of keys (g, r, r).
        width: D.
    """
    heads, r = matrices.shape[:2]
    weighted = metric @ matrices  # Lambda B
    normal = torch.einsum("gij,gik->jk", matrices, weighted)
    keys = torch.linalg.solve(_ridged(normal), weighted.permute(2, 0, 1).reshape(r, -1))  # (r, g r)
    projection = keys.new_zeros(r, 2, heads, width)
    projection[:, 0, :, :r] = keys.view(r, heads, r)
    return projection.view(r, -1)


def _settled(problem: GroupProblem, projection: Tensor) -> GroupSolution:
    """The readers and constants that fit P, each in turn; where constants are not free, they are zero."""
    zero = projection.new_zeros(problem.width)
    solution = read(problem, projection, zero, zero)
    if not (problem.key_constant or problem.value_constant):
        return solution
    # readers of what varies fit whatever the constants are
    key_readers, value_readers = _both(read(varying(problem), projection, zero, zero))
    for _ in range(SETTLING):
        constants = [
            _constant(second, target, metric, reader, projection) if free else zero
            for free, second, target, metric, reader in (
                (problem.key_constant, problem.keys, problem.key_target, problem.key_metric, key_readers),
                (problem.value_constant, problem.values, problem.value_target, problem.value_metric, value_readers),
            )
        ]
        found = read(problem, projection, *constants)
        if found.loss >= solution.loss * (1 - TOLERANCE):
            return min(solution, found, key=lambda candidate: candidate.loss)
        solution = found
        key_readers, value_readers = _both(solution)
    return solution


def varying(problem: GroupProblem) -> GroupProblem:
    """The problem less the mean of u where the output adds a constant of its own, which then holds it for nothing."""
    keys = _covariance(problem.keys) if problem.key_constant else problem.keys
    values = _covariance(problem.values) if problem.value_constant else problem.values
    return replace(problem, keys=keys, values=values)


def _both(solution: GroupSolution) -> tuple[Tensor, Tensor]:
    return solution.key_readers, solution.readers


def _covariance(second: Tensor) -> Tensor:
    """Second moments (..., n + 1, n + 1) of u, with a last entry that is constantly 1, as moments of u less its mean."""
    return second - second[..., :, -1:] @ second[..., -1:, :] / second[..., -1:, -1:].clamp_min(1e-30)


def _constant(second: Tensor, target: Tensor, metric: Tensor, reader: Tensor, projection: Tensor) -> Tensor:
    """The best c in reader (P u + c) ~ target u, (D); the last entry of u is 1."""
    n, heads = projection.shape[1], len(target)
    mean = second[:, :, -1].expand(heads, -1)  # weighted E[u], (g, n + 1)
    missed = (target @ mean[..., None] - reader @ (projection @ mean[:, :n, None]))[..., 0]  # (g, D)
    pull = torch.einsum("gji,gjk,gk->i", reader, metric, missed)
    normal = torch.einsum("gji,gjk,gkl,g->il", reader, metric, reader, second[:, -1, -1].expand(heads))
    return torch.linalg.solve(_ridged(normal), pull)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _ridged(matrix: Tensor, ridge: float = RIDGE) -> Tensor:
    diagonal = matrix.diagonal().mean().clamp_min(1e-30)
    return matrix + ridge * diagonal * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
