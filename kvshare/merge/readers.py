"""What a closed form for one output head is asked and answers, and the best readers of numbers that are given.

In: a `GroupProblem` and a projection P. Out: a `GroupSolution` with the readers that fit P, and what is lost with them.
Never: searches P, sees weights or activations. Formulas: method.md, sections 1 and 2; everything in float64.

Keys are read as B s. Numbers that rope turns may be scaled and turned in pairs alone (complex z), because s is rotated before
it meets the query: so rotated numbers of a key are read from rotated numbers of s, pair by pair, and the other numbers from the
others, by any matrix F. Values are not rotated: A reads them from all of s. Where values are read from rotated numbers, what
rope does to them between a query and the tokens that it reads is noise of the size of the pair (method.md, rotated form).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

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
    `signs_only` restricts B to a diagonal of +1 and -1, equal within pairs, all that a query norm lets through. `value_noise`
    (g, D) is what rope adds to the variance of each number that values are read from, relative to that of its pair; None: nothing.
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
    value_noise: Tensor | None = None

    @cached_property
    def key_side(self) -> tuple[Tensor, Tensor, Tensor]:
        """Target, E[k u^T] (g, D, n) and metric of the keys."""
        return self.key_target, self.key_target @ self.keys, self.key_metric

    @cached_property
    def value_side(self) -> tuple[Tensor, Tensor, Tensor]:
        """Target, E[v u^T] (g, D, n) and metric of the values."""
        return self.value_target, self.value_target @ self.values, self.value_metric

    @cached_property
    def energy(self) -> float:
        """The weighted error of keeping nothing."""
        return sum(float((metric @ cross * target).sum()) for target, cross, metric in (self.key_side, self.value_side))

    @property
    def keys_are_kept(self) -> bool:
        """Whether B is the identity: any sign or scale of the keys of one head is undone by P."""
        return self.heads == 1 and (self.signs_only or self.rotary_dim == self.width)

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


@dataclass(frozen=True)
class _Kept:
    """What one side's moments hold of s + constant = kept u.

    Shapes: `kept` (D, n); `moved`, kept E[u u^T] (g or 1, D, n); `varied`, the same of P and u without constants
    (g or 1, D, 2 g D); `noise`, the variance that rounding, and rope, add to each number of s (g or 1, D).
    """

    kept: Tensor
    moved: Tensor
    varied: Tensor
    noise: Tensor

    @property
    def second(self) -> Tensor:
        """E[(s + constant) (s + constant)^T], (g or 1, D, D)."""
        return self.moved @ self.kept.T


def read(problem: GroupProblem, projection: Tensor, key_constant: Tensor, value_constant: Tensor) -> GroupSolution:
    """The best B and A for P and the constants, and the loss that remains."""
    return read_with_slope(problem, projection, key_constant, value_constant)[0]


def read_with_slope(
    problem: GroupProblem, projection: Tensor, key_constant: Tensor, value_constant: Tensor
) -> tuple[GroupSolution, Tensor]:
    """`read`, and the gradient of the loss in (P, key constant, value constant), B and A at their optimum; (D, 2 g D + 2)."""
    n = problem.numbers
    keys = _kept(problem, problem.keys, projection, key_constant)
    values = _kept(problem, problem.values, projection, value_constant)
    reach: Tensor | None = None
    if problem.value_noise is not None:  # what rope turns is the key with its bias
        whole = _with_constant(problem, problem.values, projection, key_constant)
        reach = whole @ problem.values
        noise = problem.value_noise * in_pairs((reach * whole).sum(-1), problem.rotary_dim)
        values = replace(values, noise=values.noise + noise)
    key_readers, readers = _key_readers(problem, keys), _value_readers(problem, values)
    slope = projection.new_zeros(problem.width, n + 2)
    loss = 0.0
    for place, (kept, reader, gain, target, cross, metric, free) in enumerate(
        (
            (keys, key_readers, key_gain(problem, key_readers), *problem.key_side, problem.key_constant),
            (values, readers, value_gain(problem, readers), *problem.value_side, problem.value_constant),
        )
    ):
        as_it_is = place == 0 and problem.keys_are_kept
        weighted = metric @ (cross - (kept.moved if as_it_is else reader @ kept.moved))  # metric E[missed u^T], (g, D, n)
        missed = target - (kept.kept if as_it_is else reader @ kept.kept)
        loss += float((weighted * missed).sum()) + float((gain * kept.noise).sum())
        pull = -2 * (weighted if as_it_is else reader.transpose(1, 2) @ weighted).sum(0)  # (D, n)
        slope[:, :n] += pull[:, :n] + 2 * ROUNDING * (gain[..., None] * kept.varied).sum(0)
        if place and reach is not None and problem.value_noise is not None:
            turned = in_pairs(problem.value_noise * gain, problem.rotary_dim)
            slope[:, :n] += 2 * (turned[..., None] * reach[..., :n]).sum(0)
            if problem.key_constant:
                slope[:, n] += 2 * (turned * reach[..., n]).sum(0)
        if free:
            slope[:, n + place] += pull[:, n]
    return GroupSolution(projection, key_readers, readers, key_constant, value_constant, loss, problem.energy), slope


def in_pairs(x: Tensor, rotary_dim: int) -> Tensor:
    """Both numbers of a rope pair as their mean, (..., D); numbers that are not rotated stay."""
    half = rotary_dim // 2
    pairs = (x[..., :half] + x[..., half:rotary_dim]) / 2
    return torch.cat([pairs, pairs, x[..., rotary_dim:]], -1)


def _with_constant(problem: GroupProblem, moments: Tensor, projection: Tensor, constant: Tensor) -> Tensor:
    """P with a column for the constant entry of u, where there is one."""
    return torch.cat([projection, constant[:, None]], dim=1) if moments.shape[-1] > problem.numbers else projection


def _kept(problem: GroupProblem, moments: Tensor, projection: Tensor, constant: Tensor) -> _Kept:
    n = problem.numbers
    kept = _with_constant(problem, moments, projection, constant)
    moved = kept @ moments
    varied = moved[..., :n] - constant[:, None] * moments[:, n:, :n] if moments.shape[-1] > n else moved
    return _Kept(kept, moved, varied, ROUNDING * (varied * projection).sum(-1))


def value_gain(problem: GroupProblem, readers: Tensor) -> Tensor:
    """What noise of variance 1 in a number of s costs through the values, (g, D)."""
    return ((problem.value_metric @ readers) * readers).sum(1)


def key_gain(problem: GroupProblem, key_readers: Tensor) -> Tensor:
    """The same through keys that are read freely, (g, D). A pair is read by a scale, to which rounding is indifferent: zero."""
    if problem.rotary_dim == problem.width or problem.signs_only:
        return torch.zeros_like(key_readers[..., 0])
    gain = ((problem.key_metric @ key_readers) * key_readers).sum(1)
    return torch.cat([torch.zeros_like(gain[:, : problem.rotary_dim]), gain[:, problem.rotary_dim :]], 1)


def _value_readers(problem: GroupProblem, kept: _Kept) -> Tensor:
    """A = E[v s^T] (E[s s^T] + rounding)^-1, (g, D, D)."""
    cross = problem.value_target @ kept.moved.transpose(1, 2)
    second = kept.second + torch.diag_embed(kept.noise)
    return torch.linalg.solve(_batch_ridged(second), cross.transpose(1, 2)).transpose(1, 2)


def _key_readers(problem: GroupProblem, kept: _Kept) -> Tensor:
    """B (g, D, D), z on rope pairs and F on the other numbers: least squares of the keys under the metric, which couples both."""
    r, heads = problem.rotary_dim, problem.heads
    if problem.keys_are_kept:
        return torch.eye(problem.width, dtype=kept.kept.dtype, device=kept.kept.device)[None]
    second = kept.second
    cross = problem.key_target @ kept.moved.transpose(1, 2)  # E[k s^T] (g, D, D)
    if problem.signs_only:
        return torch.diag_embed(signs(cross.diagonal(dim1=-2, dim2=-1), r))
    metric = problem.key_metric
    rotary, wanted = [(metric[:, :r, :r], second[:, :r, :r])], metric[:, :r, :r] @ cross[:, :r, :r]
    if r < problem.width:
        # With F at its best, the residuals of pairs cost what F cannot undo, through the metric (`carried`) or on the data.
        free = second[:, r:, r:] + torch.diag_embed(kept.noise[:, r:])
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
    z = torch.ones(1, r // 2, dtype=torch.complex128, device=second.device) if heads == 1 else _scales(rotary, wanted)
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
