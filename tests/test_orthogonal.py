"""Steps of the headwise optimizer: equally long in all directions of a head, as torch's own Muon takes them for one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvshare.orthogonal import HeadwiseMuon, orthogonal


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (3, 8, 8), (2, 3, 16, 40)])
def test_singular_values_become_alike_and_vectors_stay(shape: tuple[int, ...]) -> None:
    left, values, right = torch.linalg.svd(normal(*shape), full_matrices=False)
    far_apart = torch.logspace(0, -1.5, values.shape[-1])
    within = left.mT @ orthogonal(left * far_apart @ right) @ right.mT
    found = within.diagonal(dim1=-2, dim2=-1)
    assert 0.3 < float(found.min()) <= float(found.max()) < 1.3
    torch.testing.assert_close(within, torch.diag_embed(found), atol=1e-3, rtol=0)


def test_nothing_stays_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


def stepped(optimizer: torch.optim.Optimizer, value: Tensor, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        value.grad = gradient.clone()
        optimizer.step()
    return value.detach().clone()


@pytest.mark.parametrize("columns", [False, True])
def test_one_head_moves_as_by_the_muon_of_torch(columns: bool) -> None:
    start = normal(16, 48)
    gradients = [normal(16, 48, seed=seed) for seed in (1, 2, 3)]
    wanted = start.clone().requires_grad_(True)
    # torch's steps have a root mean square of a fifth of the rate, and are computed in bfloat16
    torch_own = torch.optim.Muon([wanted], lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    moved = stepped(torch_own, wanted, gradients) - start
    turned = (start.T if columns else start).clone().requires_grad_(True)
    own = HeadwiseMuon([{"params": [turned], "head_dim": 16, "columns": columns}], 0.01)
    given = stepped(own, turned, [gradient.T if columns else gradient for gradient in gradients])
    found = (given.T if columns else given) - start
    assert float((found - moved).norm() / moved.norm()) < 0.02
    assert float(found.square().mean().sqrt()) == pytest.approx(0.02, rel=0.5)


def test_heads_do_not_mix_and_the_size_of_a_gradient_does_not_count() -> None:
    gradient = normal(3 * 8, 40)
    gradient[8:16] *= 1e-3

    def moves(gradient: Tensor) -> Tensor:
        value = torch.zeros_like(gradient).requires_grad_(True)
        return stepped(HeadwiseMuon([{"params": [value], "head_dim": 8, "columns": False}], 0.1), value, [gradient])

    alone = torch.cat([moves(part) for part in gradient.split(8)])
    torch.testing.assert_close(moves(gradient), alone)
    torch.testing.assert_close(moves(1e-3 * gradient), alone, atol=1e-5, rtol=1e-4)
