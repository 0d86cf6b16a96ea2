"""How much of K and V one attention head uses, and how much of it the two have in common.

In: the `GroupProblem` of one KV head, of its own moments and metrics, and what the closed form made of it. Out: `HeadFigures`.
Never: sees weights or activations, does IO. Everything in float64.

Everything is weighted as method.md, section 2, says: keys by Lambda (what queries see of them), values by M (what the output
projection sees of them), tokens by what attention makes of them. So no figure changes when the model is written in another
basis (method.md, section 1): not with the values' basis, nor with the scale and turn of a rope pair. (Dropped
energy counts what rounding to 16 bits adds, too, which depends on the basis a little.) Where the output adds a bias of its own,
the mean costs nothing and is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvshare.merge.readers import GroupProblem, GroupSolution
from kvshare.merge.svd import LEAST, root, varying, weighted_second

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the principal angles


@dataclass(frozen=True)
class HeadFigures:
    """What is known of one KV head before anything is converted.

    `key_rank`, `value_rank`, `joint_rank`: the effective ranks of K, of V and of [K;V], see `effective_rank`; the first two are at
    most head_dim D, the last at most 2 D, and one shared projection keeps D. `overlap`, `angles`, `cka`: how far K and V are the
    same numbers, see `overlap`. `dropped`: the fraction of weighted energy that the closed form drops when it keeps D of the 2 D
    dimensions, the predicted damage of K = V (`lost` of a conversion's report); `predicted` is the same as a squared error of
    the attention output per token. `pair_energy`: the share of each rope pair in the energy of the keys, see `pair_energy`;
    None where rope turns nothing.
    """

    head: int
    key_rank: float
    value_rank: float
    joint_rank: float
    overlap: float
    angles: tuple[float, ...] | None
    cka: float
    dropped: float
    predicted: float
    pair_energy: tuple[float, ...] | None


def head_figures(head: int, problem: GroupProblem, solution: GroupSolution) -> HeadFigures:
    """All figures of one KV head.

    Args:
        head: its index in the source.
        problem: of that head alone, with equal weights of key and value errors.
        solution: the closed form of the same problem.
    """
    same, angles, similarity = overlap(problem)
    return HeadFigures(
        head,
        effective_rank(energies(_weighted(varying(problem), "keys"))),
        effective_rank(energies(_weighted(varying(problem), "values"))),
        effective_rank(joint_energies(problem)),
        same,
        angles,
        similarity,
        solution.loss / max(solution.energy, 1e-30),
        solution.loss,
        pair_energy(problem),
    )


def effective_rank(shares: Tensor) -> float:
    """exp(H(p)), H the entropy of the shares p that orthogonal directions have in the energy (Roy and Vetterli, 2007, here of
    squared singular values): r for r directions of equal energy, less where they are unequal; 0 where there is no energy.

    Args:
        shares: energies of any scale, none negative.
    """
    total = float(shares.sum())
    if total <= 0:
        return 0.0
    p = shares / total
    return math.exp(float(-torch.xlogy(p, p).sum()))


def energies(second: Tensor) -> Tensor:
    """The energies of a second moment's orthogonal directions, the largest first; those that do not occur are zero."""
    found = torch.linalg.eigvalsh(second).flip(0)
    return torch.where(found > LEAST * found[:1].clamp_min(0), found, torch.zeros_like(found))


def joint_energies(problem: GroupProblem) -> Tensor:
    """The squared singular values of Z = [sqrt(a) Lambda^1/2 W_K; sqrt(b) M^1/2 W_V] C^1/2, the largest first, (2 D).

    The first D of them are what one shared projection can hold, where keys and values have the same moments.
    """
    return energies(weighted_second(varying(problem))[0])


def overlap(problem: GroupProblem) -> tuple[float, tuple[float, ...] | None, float]:
    """How far K and V are the same numbers.

    Returns:
        the mean squared cosine of the principal angles between the subspaces that K and V span over tokens (1 where each
        number of one is a linear function of the other's, 0 where none correlate); the least angle, the quartiles and the
        greatest, in degrees; and linear CKA |C_kv|^2 / (|C_kk| |C_vv|) of weighted keys and values (Kornblith et al., 2019),
        which counts directions by their energy and is 1 where they are the same up to a rotation and a scale. 0, None and 0
        where keys or values have no energy.
    """
    width = problem.width
    second, _ = weighted_second(varying(problem))
    keys, values, cross = second[:width, :width], second[width:, width:], second[:width, width:]
    key_basis, value_basis = _whitening(keys), _whitening(values)
    count = min(key_basis.shape[1], value_basis.shape[1])
    if not count:
        return 0.0, None, 0.0
    cosines = torch.linalg.svdvals(key_basis.T @ cross @ value_basis).clamp(max=1.0)  # (count), the largest first
    quantiles = torch.quantile(torch.acos(cosines).rad2deg(), torch.tensor(QUANTILES, dtype=cosines.dtype, device=cosines.device))
    similarity = cross.square().sum() / (torch.linalg.matrix_norm(keys) * torch.linalg.matrix_norm(values))
    return float(cosines.square().mean()), tuple(quantiles.tolist()), float(similarity)


def pair_energy(problem: GroupProblem) -> tuple[float, ...] | None:
    """Lambda_j E|k_j|^2 of every rope pair j as a share of the keys' energy, lambda_j = (Lambda_jj + Lambda_j'j') / 2 (method.md).

    The numbers that rope does not turn hold the rest, so the shares add up to 1 where it turns all. None where it turns none.
    """
    r, half = problem.rotary_dim, problem.rotary_dim // 2
    if not r:
        return None
    target = problem.key_target[0]
    second = target @ varying(problem).keys[0] @ target.T  # E[k k^T] (D, D)
    metric = problem.key_metric[0]
    pairs = (metric.diagonal()[:half] + metric.diagonal()[half:r]) / 2 * (second.diagonal()[:half] + second.diagonal()[half:r])
    rest = (metric[r:, r:] * second[r:, r:]).sum()
    return tuple((pairs / (pairs.sum() + rest).clamp_min(1e-30)).tolist())


def _weighted(problem: GroupProblem, part: str) -> Tensor:
    """Lambda^1/2 E[k k^T] Lambda^1/2 of `keys`, or the same of `values` and M, (D, D)."""
    if part == "keys":
        target, second, metric = problem.key_target[0], problem.keys[0], problem.key_metric[0]
    else:
        target, second, metric = problem.value_target[0], problem.values[0], problem.value_metric[0]
    scale = root(metric)
    return scale @ target @ second @ target.T @ scale


def _whitening(second: Tensor) -> Tensor:
    """W (D, rank) with W^T C W = 1 of a second moment C, over the directions that occur."""
    found, directions = torch.linalg.eigh(second)
    occurs = found > LEAST * found[-1].clamp_min(1e-300)
    return directions[:, occurs] / found[occurs].sqrt()
