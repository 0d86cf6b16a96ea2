"""The closed form for one output head: which D numbers of (k, v) to keep, and how each source head reads them.

In: a `GroupProblem`, the second moments and metrics of the source heads that end in one output head. Out: a `GroupSolution`.
Never: sees weights, activations or other heads. Formulas: method.md, section 2; everything in float64.

With u = (k_1, v_1, ..., k_g, v_g) every candidate is s = P u, so all that is needed of the data is E[u u^T].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-9  # of the mean diagonal: keeps solves finite, far below what calibration can resolve
ITERATIONS = 200
TOLERANCE = 1e-5  # relative fall of the loss below which the alternation has converged
FLOOR = 2e-2  # least singular value of the key part of the kept basis: what is lost to keys stays readable to values


@dataclass(frozen=True)
class GroupProblem:
    """The source heads of one output head (g heads of D numbers each).

    Shapes: `second` (2, g, D, 2, g, D); `key_mean`, `value_mean` (g, D), zero where there is no bias; `key_weight`
    (g, D), the diagonal of Lambda; `value_metric` (g, D, D), M. `key_cost` and `value_cost` are the formula's a and b.
    `signs_only` restricts z to +1 and -1, all that a query norm lets through.
    """

    second: Tensor
    key_mean: Tensor
    value_mean: Tensor
    key_weight: Tensor
    value_metric: Tensor
    key_cost: float
    value_cost: float
    signs_only: bool = False


@dataclass(frozen=True)
class GroupSolution:
    """s = P u and its readers: keys are B(z) (s + key_constant), values A (s + value_constant), about the means.

    Shapes: `projection` (D, 2, g, D); `gauge` (g, D / 2) complex, z; `readers` (g, D, D), A; constants (D).
    `loss` is the weighted error that remains, `energy` the same measure of keeping nothing.
    """

    projection: Tensor
    gauge: Tensor
    readers: Tensor
    key_constant: Tensor
    value_constant: Tensor
    loss: float
    energy: float


def to_complex(x: Tensor) -> Tensor:
    """Rope pairs (j, j + D/2) of the last dimension as complex numbers, (..., D) -> (..., D / 2)."""
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half], x[..., half:])


def to_real(z: Tensor) -> Tensor:
    """The inverse of `to_complex`, (..., D / 2) -> (..., D)."""
    return torch.cat([z.real, z.imag], dim=-1)


def gauge_matrix(z: Tensor) -> Tensor:
    """B(z), the real (D, D) matrix that multiplies each rope pair by z_j; batched over leading dimensions."""
    real, imag = torch.diag_embed(z.real), torch.diag_embed(z.imag)
    return torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)


def solve_group(problem: GroupProblem, iterations: int = ITERATIONS) -> GroupSolution:
    """Minimise the weighted error of keys and values over P, z and A.

    One head: the top D right singular directions of the stacked, weighted (k, v) are the optimum. Several: alternate the
    closed forms of z, A and P from the best common keys until the loss stands still.

    Args:
        problem: float64 tensors; D even.
        iterations: the most alternations.
    """
    heads, width = problem.key_weight.shape
    if heads == 1:
        projection = _one_head(problem)
        gauge = torch.ones(1, width // 2, dtype=torch.complex128, device=projection.device)
        return _readers(problem, projection, gauge)
    projection, gauge = _common_keys(problem)
    best = _readers(problem, projection, gauge)
    for _ in range(iterations):
        projection = _project(problem, best)
        current = _readers(problem, projection, _gauge(problem, projection, best), best)
        if not current.loss < best.loss:
            break
        converged = best.loss - current.loss <= TOLERANCE * best.loss
        best = current
        if converged:
            break
    return best


def _one_head(problem: GroupProblem) -> Tensor:
    """The closed optimum for g = 1: the top D directions of L E[u u^T] L^T, written in key coordinates."""
    width = problem.key_weight.shape[1]
    key_root = (problem.key_cost * problem.key_weight[0]).sqrt()
    value_root = _root(problem.value_cost * problem.value_metric[0])
    scale = torch.block_diag(torch.diag(key_root), value_root)  # L (2D, 2D)
    covariance = scale @ problem.second.reshape(2 * width, 2 * width) @ scale.T
    basis = torch.linalg.eigh(_symmetric(covariance)).eigenvectors[:, -width:]  # U (2D, D)
    left, singular, right = torch.linalg.svd(basis[:width])
    # Directions that hold no key energy would vanish from s in key coordinates; a floor keeps them for the values.
    key_part = left @ torch.diag(singular.clamp_min(FLOOR)) @ right
    inverse = torch.diag(1 / key_root.clamp_min(key_root.max() * 1e-6))
    return (inverse @ key_part @ basis.T @ scale).view(width, 2, 1, width)


def _common_keys(problem: GroupProblem) -> tuple[Tensor, Tensor]:
    """The best rank-one model of the g keys of every rope pair: a start for the alternation."""
    heads, width = problem.key_weight.shape
    half = width // 2
    # E[k conj(k')] per pair from the real second moments, means included: (half, g, g)
    keys = problem.second[0, :, :, 0] + torch.einsum("gi,hj->gihj", problem.key_mean, problem.key_mean)
    blocks = keys.reshape(heads, 2, half, heads, 2, half)
    same = torch.einsum("gajhaj->jgh", blocks)
    crossed = torch.einsum("gjhj->jgh", blocks[:, 1, :, :, 0]) - torch.einsum("gjhj->jgh", blocks[:, 0, :, :, 1])
    weight = problem.key_weight[:, :half].sqrt().T.clamp_min(1e-12)  # (half, g)
    covariance = torch.complex(same, crossed) * weight[:, :, None] * weight[:, None, :]
    top = torch.linalg.eigh(covariance).eigenvectors[:, :, -1]  # (half, g)
    gauge = (top / weight).T  # (g, half)
    if problem.signs_only:
        gauge = _sign(gauge * gauge[:1].conj())
    matrices = gauge_matrix(gauge)  # (g, D, D)
    weighted = problem.key_weight[:, :, None] * matrices  # Lambda B
    normal = torch.einsum("gij,gik->jk", matrices, weighted)
    projection = torch.zeros(width, 2, heads, width, dtype=torch.float64, device=normal.device)
    projection[:, 0] = torch.linalg.solve(_ridged(normal), weighted.permute(2, 0, 1).reshape(width, -1)).view(width, heads, width)
    return projection, gauge


def _sign(z: Tensor) -> Tensor:
    real = torch.where(z.real < 0, -1.0, 1.0).to(torch.float64)
    return torch.complex(real, torch.zeros_like(real))


def _cross(problem: GroupProblem, projection: Tensor) -> tuple[Tensor, Tensor]:
    """E[u s^T] as (2, g, D, D) and E[s s^T] (D, D), about the means."""
    width = projection.shape[0]
    flat = projection.reshape(width, -1)  # (D, 2 g D)
    cross = problem.second.reshape(flat.shape[1], -1) @ flat.T  # (2 g D, D)
    return cross.view(*projection.shape[1:], width), _symmetric(flat @ cross)


def _gauge(problem: GroupProblem, projection: Tensor, previous: GroupSolution) -> Tensor:
    """Z per head and rope pair: complex least squares of the keys on s."""
    cross, second = _cross(problem, projection)
    constant = previous.key_constant
    keys = cross[0] + torch.einsum("gi,d->gid", problem.key_mean, constant)  # (g, D, D)
    second = second + torch.outer(constant, constant)
    half = keys.shape[-1] // 2
    j = torch.arange(half, device=keys.device)
    numerator = torch.complex(keys[:, j, j] + keys[:, j + half, j + half], keys[:, j + half, j] - keys[:, j, j + half])
    if problem.signs_only:
        return _sign(numerator)
    diagonal = second.diagonal()
    return numerator / (diagonal[:half] + diagonal[half:]).clamp_min(1e-30)


def _project(problem: GroupProblem, solution: GroupSolution) -> Tensor:
    """P for given readers: the normal equations, in which E[u u^T] cancels."""
    heads, width = problem.key_weight.shape
    matrices = gauge_matrix(solution.gauge)
    keys = problem.key_cost * torch.einsum("gij,gi->gji", matrices, problem.key_weight)  # a B^T Lambda
    values = problem.value_cost * solution.readers.transpose(1, 2) @ problem.value_metric  # b A^T M
    normal = (keys @ matrices + values @ solution.readers).sum(0)
    right = torch.stack([keys, values]).permute(2, 0, 1, 3).reshape(width, -1)  # (D, 2 g D)
    return torch.linalg.solve(_ridged(normal), right).view(width, 2, heads, width)


def _readers(problem: GroupProblem, projection: Tensor, gauge: Tensor, previous: GroupSolution | None = None) -> GroupSolution:
    """The best A for given P, z and the previous constant of the values, the best constants for it, and the loss that remains."""
    cross, second = _cross(problem, projection)
    constant = torch.zeros_like(projection[:, 0, 0, 0]) if previous is None else previous.value_constant
    values = cross[1] + torch.einsum("gi,d->gid", problem.value_mean, constant)
    solved = _ridged(second + torch.outer(constant, constant))
    readers = torch.linalg.solve(solved, values.transpose(1, 2)).transpose(1, 2)  # A = E[v s^T] E[s s^T]^-1
    matrices = gauge_matrix(gauge)

    key_scale = gauge.abs().square() * problem.key_weight[:, : gauge.shape[1]]
    key_pull = gauge.conj() * problem.key_weight[:, : gauge.shape[1]] * to_complex(problem.key_mean)
    key_constant = to_real(key_pull.sum(0) / key_scale.sum(0).clamp_min(1e-30))
    pull = torch.einsum("gji,gjk,gk->i", readers, problem.value_metric, problem.value_mean)
    normal = torch.einsum("gji,gjk,gkl->il", readers, problem.value_metric, readers)
    value_constant = torch.linalg.solve(_ridged(normal), pull)

    keys, values = problem.second[0, :, :, 0], problem.second[1, :, :, 1]
    own_keys = torch.einsum("gigi->gi", keys)
    own_values = torch.einsum("gigj->gij", values)
    key_error = (
        own_keys - 2 * torch.einsum("gid,gid->gi", matrices, cross[0]) + torch.einsum("gid,de,gie->gi", matrices, second, matrices)
    )
    mixed = readers @ cross[1].transpose(1, 2)
    value_error = own_values - mixed - mixed.transpose(1, 2) + readers @ second @ readers.transpose(1, 2)
    key_miss = problem.key_mean - torch.einsum("gid,d->gi", matrices, key_constant)
    value_miss = problem.value_mean - torch.einsum("gid,d->gi", readers, value_constant)
    key_error = key_error + key_miss.square()
    value_error = value_error + torch.einsum("gi,gj->gij", value_miss, value_miss)

    def weigh(keys: Tensor, values: Tensor) -> float:
        return float(
            problem.key_cost * (problem.key_weight * keys).sum()
            + problem.value_cost * torch.einsum("gij,gij->", problem.value_metric, values)
        )

    energy = weigh(own_keys, own_values)
    return GroupSolution(projection, gauge, readers, key_constant, value_constant, weigh(key_error, value_error), energy)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _ridged(matrix: Tensor) -> Tensor:
    diagonal = matrix.diagonal().mean().clamp_min(1e-30)
    return matrix + RIDGE * diagonal * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
