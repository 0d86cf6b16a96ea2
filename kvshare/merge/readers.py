"""What a closed form for one output head is asked and answers, and the best readers of numbers that are given.

In: a `GroupProblem` and a projection P. Out: a `GroupSolution` with the readers that fit P, and what is lost with them.
Never: searches P, sees weights or activations. Formulas: method.md, sections 1 and 2; everything in float64.

Keys are read as B s. Numbers that rope turns may be scaled and turned in pairs alone (complex z), because s is rotated before
it meets the query: so rotated numbers of a key are read from rotated numbers of s, pair by pair, and the other numbers from the
others, by any matrix F. Values are not rotated: A reads them from all of s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-9  # of the mean diagonal: keeps solves finite, far below what calibration can resolve
ROUNDING = 1e-5  # variance that rounding to bfloat16 adds to each number of s, relative to its own: readers must not amplify it


@dataclass(frozen=True)
class GroupProblem:
    """The source heads of one output head (g heads of D numbers each), n = 2 g D, one more where there are biases.

    Shapes: `keys`, `values` (g, n, n), or (1, n, n) where heads share them: second moments of u, with a last entry that is
    constantly 1 where there are biases; `key_target`, `value_target` (g, D, n): what keys and values are of u;
    `key_metric`, `value_metric` (g, D, D): Lambda (times a) and M. The first `rotary_dim` numbers of a head are rotated in pairs
    (j, j + rotary_dim/2), the others are not. `key_constant`, `value_constant`: whether the output may add a bias of its own.
    `signs_only` restricts B to a diagonal of +1 and -1, equal within pairs, all that a query norm lets through.
    """

    keys: Tensor
    values: Tensor
    key_target: Tensor
    value_target: Tensor
    key_metric: Tensor
    value_metric: Tensor
    rotary_dim: int
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
    """s = P u and its readers: keys are B (s + key_constant), values A (s + value_constant).

    Shapes: `projection` (D, 2 g D); `key_readers` (g, D, D), B; `readers` (g, D, D), A; constants (D).
    `loss` is the weighted error that remains, `energy` the same measure of keeping nothing.
    """

    projection: Tensor
    key_readers: Tensor
    readers: Tensor
    key_constant: Tensor
    value_constant: Tensor
    loss: float
    energy: float


def to_complex(x: Tensor) -> Tensor:
    """Rope pairs (j, j + r/2) of a last dimension of r rotated numbers as complex numbers, (..., r) -> (..., r / 2)."""
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half], x[..., half:])


def to_real(z: Tensor) -> Tensor:
    """The inverse of `to_complex`, (..., r / 2) -> (..., r)."""
    return torch.cat([z.real, z.imag], dim=-1)


def gauge_matrix(z: Tensor) -> Tensor:
    """The real (r, r) matrix that multiplies each rope pair by z_j; batched over leading dimensions."""
    real, imag = torch.diag_embed(z.real), torch.diag_embed(z.imag)
    return torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2)


def read(problem: GroupProblem, projection: Tensor, key_constant: Tensor, value_constant: Tensor) -> GroupSolution:
    """The best B and A for P and the constants, and the loss that remains."""
    key_readers = _key_readers(problem, with_constant(problem, projection, key_constant), projection)
    readers = _value_readers(problem, with_constant(problem, projection, value_constant), projection)

    def error(second: Tensor, metric: Tensor, missed: Tensor) -> float:
        return float((metric @ missed @ second * missed).sum())

    keys = problem.key_target - key_readers @ with_constant(problem, projection, key_constant)
    values = problem.value_target - readers @ with_constant(problem, projection, value_constant)
    rounded = float((value_gain(problem, readers) * _noise(problem, problem.values, projection)).sum())
    if _reads_freely(problem):
        rounded += float((key_gain(problem, key_readers) * _noise(problem, problem.keys, projection)).sum())
    loss = error(problem.keys, problem.key_metric, keys) + error(problem.values, problem.value_metric, values) + rounded
    energy = error(problem.keys, problem.key_metric, problem.key_target)
    energy += error(problem.values, problem.value_metric, problem.value_target)
    return GroupSolution(projection, key_readers, readers, key_constant, value_constant, loss, energy)


def with_constant(problem: GroupProblem, projection: Tensor, constant: Tensor) -> Tensor:
    """[P | constant] (D, n), or P where u has no constant entry."""
    return torch.cat([projection, constant[:, None]], dim=1) if problem.keys.shape[-1] > problem.numbers else projection


def value_gain(problem: GroupProblem, readers: Tensor) -> Tensor:
    """What noise of variance 1 in a number of s costs through the values, (g, D)."""
    return torch.einsum("gji,gjk,gki->gi", readers, problem.value_metric, readers)


def key_gain(problem: GroupProblem, key_readers: Tensor) -> Tensor:
    """The same through keys that are read freely, (g, D). A pair is read by a scale, to which rounding is indifferent: zero."""
    gain = torch.einsum("gji,gjk,gki->gi", key_readers, problem.key_metric, key_readers)
    first_free = problem.rotary_dim if _reads_freely(problem) else problem.width
    return torch.cat([torch.zeros_like(gain[:, :first_free]), gain[:, first_free:]], 1)


def _reads_freely(problem: GroupProblem) -> bool:
    return problem.rotary_dim < problem.width and not problem.signs_only


def _noise(problem: GroupProblem, moments: Tensor, projection: Tensor) -> Tensor:
    """The variance that rounding adds to each number of s, (g or 1, D)."""
    n = problem.numbers
    return ROUNDING * torch.einsum("im,gmn,in->gi", projection, moments[:, :n, :n], projection)


def _value_readers(problem: GroupProblem, kept: Tensor, projection: Tensor) -> Tensor:
    """A = E[v s^T] (E[s s^T] + rounding)^-1, (g, D, D), with s + constant = kept u."""
    cross = problem.value_target @ problem.values @ kept.T
    second = kept @ problem.values @ kept.T + torch.diag_embed(_noise(problem, problem.values, projection))
    return torch.linalg.solve(_batch_ridged(second), cross.transpose(1, 2)).transpose(1, 2)


def _key_readers(problem: GroupProblem, kept: Tensor, projection: Tensor) -> Tensor:
    """B (g, D, D), z on rope pairs and F on the other numbers: least squares of the keys under the metric, which couples both."""
    r, heads = problem.rotary_dim, problem.heads
    second = kept @ problem.keys @ kept.T  # E[s s^T] (g or 1, D, D)
    cross = problem.key_target @ problem.keys @ kept.T  # E[k s^T] (g, D, D)
    if problem.signs_only:
        # one head: a sign is undone by P
        diagonal = torch.ones_like(cross[..., 0]) if heads == 1 else signs(cross.diagonal(dim1=-2, dim2=-1), r)
        return torch.diag_embed(diagonal)
    metric = problem.key_metric
    rotary, wanted = [(metric[:, :r, :r], second[:, :r, :r])], metric[:, :r, :r] @ cross[:, :r, :r]
    if r < problem.width:
        # With F at its best, the residuals of pairs cost what F cannot undo, through the metric (`carried`) or on the data.
        free = second[:, r:, r:] + torch.diag_embed(_noise(problem, problem.keys, projection)[:, r:])
        free = _batch_ridged(free)  # E[s s^T] of the numbers that are not rotated
        explained = torch.linalg.solve(free, second[:, r:, :r])  # regression of the rotated numbers of s on the others
        carried = torch.linalg.solve(_batch_ridged(metric[:, r:, r:]), metric[:, r:, :r])  # (g, D - r, r)
        undone = metric[:, :r, r:] @ carried  # (g, r, r)
        left = cross[:, :, :r] - cross[:, :, r:] @ explained  # E[k s^T] behind that regression, (g, D, r)
        rotary = [
            (metric[:, :r, :r] - undone, second[:, :r, :r]),
            (undone, second[:, :r, :r] - second[:, :r, r:] @ explained),
        ]
        wanted = wanted - undone @ cross[:, :r, :r] + metric[:, :r, r:] @ (carried @ left[:, :r] + left[:, r:])
    # one head: any z is undone by P, so s stays in the coordinates of its keys
    z = torch.ones(1, r // 2, dtype=torch.complex128, device=kept.device) if heads == 1 else _scales(rotary, wanted)
    turned = gauge_matrix(z)
    if r == problem.width:
        return turned
    pull = cross[:, r:, r:] + carried @ (cross[:, :r, r:] - turned @ second[:, :r, r:])
    matrix = torch.linalg.solve(free, pull.transpose(1, 2)).transpose(1, 2)  # F (g, D - r, D - r)
    off = turned.new_zeros(heads, r, problem.width - r)
    return torch.cat([torch.cat([turned, off], -1), torch.cat([off.transpose(1, 2), matrix], -1)], -2)


def _scales(terms: list[tuple[Tensor, Tensor]], wanted: Tensor) -> Tensor:
    """Z per head and rope pair (g, r / 2): least squares under the sum of terms of a metric and a second moment of s.

    Args:
        terms: metric (g, r, r), which may couple pairs, and E[s s^T] (g or 1, r, r).
        wanted: the sum of metric times E[k s^T], (g, r, r).
    """
    total = torch.zeros_like(wanted)
    for metric, second in terms:
        m, s = _blocks(metric), _blocks(second.expand(len(wanted), -1, -1))
        real = m[0][0] * s[0][0] + m[0][1] * s[0][1] + m[1][0] * s[1][0] + m[1][1] * s[1][1]
        imag = m[1][1] * s[0][0] - m[1][0] * s[0][1] - m[0][1] * s[1][0] + m[0][0] * s[1][1]
        mixed = m[0][1] * s[0][0] - m[0][0] * s[0][1] + m[1][1] * s[1][0] - m[1][0] * s[1][1]
        total = total + torch.cat([torch.cat([real, mixed], -1), torch.cat([mixed.transpose(1, 2), imag], -1)], -2)
    diagonals = [[block.diagonal(dim1=-2, dim2=-1) for block in row] for row in _blocks(wanted)]
    pull = torch.cat([diagonals[0][0] + diagonals[1][1], diagonals[1][0] - diagonals[0][1]], -1)  # (g, r)
    return to_complex(torch.linalg.solve(_batch_ridged(total), pull))


def signs(diagonal: Tensor, rotary_dim: int) -> Tensor:
    """The signs of numbers (..., D), of a rope pair that of its sum."""
    half = rotary_dim // 2
    pairs = diagonal[..., :half] + diagonal[..., half:rotary_dim]
    summed = torch.cat([pairs, pairs, diagonal[..., rotary_dim:]], -1)
    return torch.where(summed < 0, -1.0, 1.0).to(diagonal.dtype)


def _blocks(matrix: Tensor) -> list[list[Tensor]]:
    """The four (r/2, r/2) blocks of batched (r, r) matrices."""
    half = matrix.shape[-1] // 2
    return [[matrix[..., :half, :half], matrix[..., :half, half:]], [matrix[..., half:, :half], matrix[..., half:, half:]]]


def _batch_ridged(matrix: Tensor) -> Tensor:
    """Batched square matrices with a `RIDGE` of each one's own mean diagonal."""
    ridge = RIDGE * matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    return matrix + ridge[:, None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
