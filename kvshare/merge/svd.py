"""The closed form for one output head: which D numbers of (k, v) to keep, and how each source head reads them.

In: a `GroupProblem`, the second moments and metrics of the source heads that end in one output head. Out: a `GroupSolution`.
Never: sees weights, activations or other heads. Formulas: method.md, section 2; everything in float64.

With u = (k_1, ..., k_g, v_1, ..., v_g), before biases, norm and rope, every candidate is s = P u, so all that is needed of the
data is its second moments: K_h, tokens weighted by what an error in their keys does to the attention output, and V_h, pooled
by the attention weights as the values are. Were all of them equal, P for one head would be an eigenvalue problem; as they
are not, that is where a quasi-Newton search starts, z and A being eliminated by their least squares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

RIDGE = 1e-9  # of the mean diagonal: keeps solves finite, far below what calibration can resolve
ROUNDING = 1e-5  # variance that rounding to bfloat16 adds to each number of s, relative to its own: readers must not amplify it
LEAST = 1e-9  # of the largest energy: directions of u with less do not occur
ITERATIONS = 60
RESTARTED_ITERATIONS = 40  # where the solution at another balance is known
TOLERANCE = 1e-6  # relative fall of the loss below which the search has converged
SETTLING = 30  # rounds of readers and constants at a start
FLOOR = 2e-2  # least singular value of the key part of the first basis: what is lost to keys stays readable to values


@dataclass(frozen=True)
class GroupProblem:
    """The source heads of one output head (g heads of D numbers each), n = 2 g D, one more where there are biases.

    Shapes: `keys`, `values` (g, n, n), or (1, n, n) where heads share them: second moments of u, with a last entry that is
    constantly 1 where there are biases; `key_target`, `value_target` (g, D, n): what keys and values are of u;
    `key_metric`, `value_metric` (g, D, D): Lambda (times a) and M. `key_constant`, `value_constant`: whether the output may
    add a bias of its own. `signs_only` restricts z to +1 and -1, all that a query norm lets through.
    """

    keys: Tensor
    values: Tensor
    key_target: Tensor
    value_target: Tensor
    key_metric: Tensor
    value_metric: Tensor
    key_constant: bool = False
    value_constant: bool = False
    signs_only: bool = False

    @property
    def heads(self) -> int:
        """The number of source heads, g."""
        return self.key_target.shape[0]

    @property
    def width(self) -> int:
        """head_dim, D."""
        return self.key_target.shape[1]

    @property
    def numbers(self) -> int:
        """How many numbers u has without its constant, 2 g D."""
        return 2 * self.heads * self.width


@dataclass(frozen=True)
class GroupSolution:
    """s = P u and its readers: keys are B(z) (s + key_constant), values A (s + value_constant).

    Shapes: `projection` (D, 2 g D); `gauge` (g, D / 2) complex, z; `readers` (g, D, D), A; constants (D).
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


def solve_group(problem: GroupProblem, iterations: int | None = None, start: GroupSolution | None = None) -> GroupSolution:
    """Minimise the weighted error of keys and values over P, z, A and the constants.

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
        best = _read(problem, start.projection, start.key_constant + offset, start.value_constant + offset)
    if iterations is None:
        iterations = ITERATIONS if start is None else RESTARTED_ITERATIONS
    if iterations:
        best = _searched(problem, best, iterations)
    offset = best.projection @ mean
    return replace(best, key_constant=best.key_constant - offset, value_constant=best.value_constant - offset)


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
    centred, _ = _centred(problem)
    n = problem.numbers
    key_second, value_second = (part.mean(0)[:n, :n] for part in (centred.keys, centred.values))
    matrices, width = gauge_matrix(_gauge(centred, _with_constant(centred, keys, keys.new_zeros(problem.width)))), problem.width
    readers = _value_readers(centred, _with_constant(centred, values, keys.new_zeros(problem.width)), values)
    identity = torch.eye(2 * width, dtype=keys.dtype, device=keys.device).view(2, 1, width, 2 * width)
    merged = GroupProblem(
        (stacked @ key_second @ stacked.T)[None],
        (stacked @ value_second @ stacked.T)[None],
        identity[0],
        identity[1],
        (matrices.transpose(1, 2) @ problem.key_metric @ matrices).sum(0, keepdim=True),
        (readers.transpose(1, 2) @ problem.value_metric @ readers).sum(0, keepdim=True),
    )
    return _from_projection(problem, solve_group(merged).projection @ stacked)


def _from_projection(problem: GroupProblem, projection: Tensor) -> GroupSolution:
    """The best readers and constants of a given P."""
    problem, mean = _centred(problem)
    best = _settled(problem, projection)
    offset = projection @ mean
    return replace(best, key_constant=best.key_constant - offset, value_constant=best.value_constant - offset)


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
        solution = _read(problem, values[:, :rank] @ right.T, values[:, rank], values[:, rank + 1])
        if solution.loss < best.loss:
            best = solution
        slope = _gradient(problem, solution)
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
    matrices, readers = gauge_matrix(solution.gauge), solution.readers
    key_normal = matrices.transpose(1, 2) @ problem.key_metric @ matrices  # B^T Lambda B (g, D, D)
    value_normal = readers.transpose(1, 2) @ problem.value_metric @ readers  # A^T M A (g, D, D)
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


def _gradient(problem: GroupProblem, solution: GroupSolution) -> Tensor:
    """Of the loss in (P, key constant, value constant), z and A at their optimum; (D, 2 g D + 2)."""
    n = problem.numbers
    readers = solution.readers
    total = torch.zeros(problem.width, n + 2, dtype=readers.dtype, device=readers.device)
    for place, (reader, constant, second, target, metric, free) in enumerate(
        (
            (
                gauge_matrix(solution.gauge),
                solution.key_constant,
                problem.keys,
                problem.key_target,
                problem.key_metric,
                problem.key_constant,
            ),
            (readers, solution.value_constant, problem.values, problem.value_target, problem.value_metric, problem.value_constant),
        )
    ):
        missed = target - reader @ _with_constant(problem, solution.projection, constant)
        slope = -2 * (reader.transpose(1, 2) @ metric @ missed @ second).sum(0)  # (D, n or n + 1)
        total[:, :n] += slope[:, :n]
        if free:
            total[:, n + place] = slope[:, n]
    amplified = torch.einsum("gji,gjk,gki->gi", readers, problem.value_metric, readers)
    rounded = solution.projection @ problem.values[:, :n, :n]  # (g or 1, D, n)
    total[:, :n] += 2 * ROUNDING * (amplified[..., None] * rounded).sum(0)
    return total


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
    starts.append(_top_directions(problem) if problem.heads == 1 else _common_keys(problem))
    return starts


def _top_directions(problem: GroupProblem) -> Tensor:
    """The optimum for g = 1 and equal moments: the top D directions of L E[u u^T] L^T, written in key coordinates."""
    width, n = problem.width, problem.numbers
    both = [(problem.keys[0], problem.key_target[0], problem.key_metric[0])]
    both.append((problem.values[0], problem.value_target[0], problem.value_metric[0]))
    energies = [(metric * (target @ second @ target.T)).sum().clamp_min(1e-30) for second, target, metric in both]
    second = sum(pair[0][:n, :n] / energy for pair, energy in zip(both, energies, strict=True))
    key_root, value_root = _root(problem.key_metric[0]), _root(problem.value_metric[0])
    scale = torch.block_diag(key_root, value_root)  # L (2D, 2D)
    basis = torch.linalg.eigh(_symmetric(scale @ second @ scale.T)).eigenvectors[:, -width:]  # U (2D, D)
    left, singular, right = torch.linalg.svd(basis[:width])
    # Directions that hold no key energy would vanish from s in key coordinates; a floor keeps them for the values.
    key_part = left @ torch.diag(singular.clamp_min(FLOOR)) @ right
    return torch.linalg.solve(_ridged(key_root, 1e-6), key_part) @ basis.T @ scale


def _common_keys(problem: GroupProblem) -> Tensor:
    """The best rank-one model of the g keys of every rope pair, with the heads' moments and metrics averaged."""
    heads, width, n = problem.heads, problem.width, problem.numbers
    half = width // 2
    # E[k conj(k')] per pair from the real second moments: (half, g, g)
    second = problem.keys.mean(0)
    target = problem.key_target.reshape(heads * width, -1)
    blocks = (target @ second @ target.T).reshape(heads, 2, half, heads, 2, half)
    same = torch.einsum("gajhaj->jgh", blocks)
    crossed = torch.einsum("gjhj->jgh", blocks[:, 1, :, :, 0]) - torch.einsum("gjhj->jgh", blocks[:, 0, :, :, 1])
    diagonal = problem.key_metric.diagonal(dim1=-2, dim2=-1)
    weight = ((diagonal[:, :half] + diagonal[:, half:]) / 2).sqrt().T.clamp_min(1e-12)  # (half, g)
    covariance = torch.complex(same, crossed) * weight[:, :, None] * weight[:, None, :]
    top = torch.linalg.eigh(covariance).eigenvectors[:, :, -1]  # (half, g)
    gauge = (top / weight).T  # (g, half)
    if problem.signs_only:
        gauge = _sign(gauge * gauge[:1].conj())
    matrices = gauge_matrix(gauge)  # (g, D, D)
    weighted = problem.key_metric @ matrices  # Lambda B
    normal = torch.einsum("gij,gik->jk", matrices, weighted)
    keys = torch.linalg.solve(_ridged(normal), weighted.permute(2, 0, 1).reshape(width, -1))  # (D, g D)
    return torch.cat([keys, torch.zeros_like(keys)], dim=1).view(width, n)


def _sign(z: Tensor) -> Tensor:
    real = torch.where(z.real < 0, -1.0, 1.0).to(torch.float64)
    return torch.complex(real, torch.zeros_like(real))


def _with_constant(problem: GroupProblem, projection: Tensor, constant: Tensor) -> Tensor:
    """[P | constant] (D, n), or P where u has no constant entry."""
    return torch.cat([projection, constant[:, None]], dim=1) if problem.keys.shape[-1] > problem.numbers else projection


def _settled(problem: GroupProblem, projection: Tensor) -> GroupSolution:
    """The readers and constants that fit P, each in turn; where constants are not free, they are zero."""
    zero = projection.new_zeros(problem.width)
    solution = _read(problem, projection, zero, zero)
    if not (problem.key_constant or problem.value_constant):
        return solution
    for _ in range(SETTLING):
        matrices = gauge_matrix(solution.gauge)
        constants = [
            _constant(second, target, metric, readers, projection) if free else zero
            for free, second, target, metric, readers in (
                (problem.key_constant, problem.keys, problem.key_target, problem.key_metric, matrices),
                (problem.value_constant, problem.values, problem.value_target, problem.value_metric, solution.readers),
            )
        ]
        solution = min(solution, _read(problem, projection, *constants), key=lambda candidate: candidate.loss)
    return solution


def _constant(second: Tensor, target: Tensor, metric: Tensor, readers: Tensor, projection: Tensor) -> Tensor:
    """The best c in readers (P u + c) ~ target u, (D); the last entry of u is 1."""
    n, heads = projection.shape[1], len(target)
    mean = second[:, :, -1].expand(heads, -1)  # weighted E[u], (g, n + 1)
    missed = (target @ mean[..., None] - readers @ (projection @ mean[:, :n, None]))[..., 0]  # (g, D)
    pull = torch.einsum("gji,gjk,gk->i", readers, metric, missed)
    normal = torch.einsum("gji,gjk,gkl,g->il", readers, metric, readers, second[:, -1, -1].expand(heads))
    return torch.linalg.solve(_ridged(normal), pull)


def _read(problem: GroupProblem, projection: Tensor, key_constant: Tensor, value_constant: Tensor) -> GroupSolution:
    """The best z and A for P and the constants, and the loss that remains."""
    gauge = _gauge(problem, _with_constant(problem, projection, key_constant))
    readers = _value_readers(problem, _with_constant(problem, projection, value_constant), projection)
    matrices = gauge_matrix(gauge)

    def error(second: Tensor, metric: Tensor, missed: Tensor) -> float:
        return float((metric @ missed @ second * missed).sum())

    keys = problem.key_target - matrices @ _with_constant(problem, projection, key_constant)
    values = problem.value_target - readers @ _with_constant(problem, projection, value_constant)
    noise = _noise(problem, projection)  # (g or 1, D)
    rounded = float((torch.einsum("gji,gjk,gki->gi", readers, problem.value_metric, readers) * noise).sum())
    loss = error(problem.keys, problem.key_metric, keys) + error(problem.values, problem.value_metric, values) + rounded
    energy = error(problem.keys, problem.key_metric, problem.key_target)
    energy += error(problem.values, problem.value_metric, problem.value_target)
    return GroupSolution(projection, gauge, readers, key_constant, value_constant, loss, energy)


def _noise(problem: GroupProblem, projection: Tensor) -> Tensor:
    """The variance that rounding adds to each number of s, (g or 1, D)."""
    n = problem.numbers
    return ROUNDING * torch.einsum("im,gmn,in->gi", projection, problem.values[:, :n, :n], projection)


def _value_readers(problem: GroupProblem, kept: Tensor, projection: Tensor) -> Tensor:
    """A = E[v s^T] (E[s s^T] + rounding)^-1, (g, D, D), with s + constant = kept u."""
    cross = problem.value_target @ problem.values @ kept.T
    second = kept @ problem.values @ kept.T + torch.diag_embed(_noise(problem, projection))
    ridge = RIDGE * second.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    second = second + ridge[:, None, None] * torch.eye(problem.width, dtype=second.dtype, device=second.device)
    return torch.linalg.solve(second, cross.transpose(1, 2)).transpose(1, 2)


def _gauge(problem: GroupProblem, kept: Tensor) -> Tensor:
    """Z per head and rope pair: least squares of the keys on s under the metric, which may couple pairs."""
    half = problem.width // 2
    if problem.heads == 1:
        # one head: any z is undone by P, so s stays in the coordinates of its keys
        return torch.ones(1, half, dtype=torch.complex128, device=kept.device)
    second = kept @ problem.keys @ kept.T  # E[s s^T] (g or 1, D, D)
    cross = problem.key_target @ problem.keys @ kept.T  # E[k s^T] (g, D, D)
    if problem.signs_only:
        j = torch.arange(half, device=kept.device)
        diagonal = cross[:, j, j] + cross[:, j + half, j + half]
        return _sign(torch.complex(diagonal, torch.zeros_like(diagonal)))
    second = second.expand(problem.heads, -1, -1)
    m, s = _blocks(problem.key_metric), _blocks(second)
    real = m[0][0] * s[0][0] + m[0][1] * s[0][1] + m[1][0] * s[1][0] + m[1][1] * s[1][1]
    imag = m[1][1] * s[0][0] - m[1][0] * s[0][1] - m[0][1] * s[1][0] + m[0][0] * s[1][1]
    mixed = m[0][1] * s[0][0] - m[0][0] * s[0][1] + m[1][1] * s[1][0] - m[1][0] * s[1][1]
    normal = torch.cat([torch.cat([real, mixed], -1), torch.cat([mixed.transpose(1, 2), imag], -1)], -2)  # (g, D, D)
    wanted = _blocks(problem.key_metric @ cross)
    diagonals = [[block.diagonal(dim1=-2, dim2=-1) for block in row] for row in wanted]
    pull = torch.cat([diagonals[0][0] + diagonals[1][1], diagonals[1][0] - diagonals[0][1]], -1)  # (g, D)
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    normal = normal + ridge[:, None, None] * torch.eye(2 * half, dtype=normal.dtype, device=normal.device)
    return to_complex(torch.linalg.solve(normal, pull))


def _blocks(matrix: Tensor) -> list[list[Tensor]]:
    """The four (D/2, D/2) blocks of batched (D, D) matrices."""
    half = matrix.shape[-1] // 2
    return [[matrix[..., :half, :half], matrix[..., :half, half:]], [matrix[..., half:, :half], matrix[..., half:, half:]]]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _ridged(matrix: Tensor, ridge: float = RIDGE) -> Tensor:
    diagonal = matrix.diagonal().mean().clamp_min(1e-30)
    return matrix + ridge * diagonal * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
