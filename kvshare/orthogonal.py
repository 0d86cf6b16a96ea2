"""An optimizer for projections of attention: momentum whose singular values are made equal, head by head.

In: gradients. Out: steps. Never: mixes heads, looks at how large a gradient is.

Muon (Jordan et al. 2024). Values and keys read parts of a shared projection whose sizes differ by orders of magnitude; steps that
are equally long in all directions reach the small ones, those of Adam do not. torch.optim.Muon takes matrices whole, which costs
hidden^3 in every step; by heads it costs head_dim hidden^2, less than the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration, to bring singular values near 1 quickly


class HeadwiseMuon(torch.optim.Optimizer):
    """Steps that move every head by an orthogonal matrix whose numbers have the learning rate for their root mean square.

    Args:
        groups: each with `params`, matrices of all heads; `head_dim`; and `columns`, whether heads are columns (as of an output
            projection), not rows.
        lr: learning rate.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move all matrices by their gradients; `closure` is not for this optimizer."""
        assert closure is None
        for group in self.param_groups:
            for value in group["params"]:
                if value not in self.state:
                    self.state[value]["momentum"] = torch.zeros_like(value)
                momentum = self.state[value]["momentum"]
                momentum.lerp_(value.grad, 1 - MOMENTUM)
                ahead = value.grad.lerp(momentum, MOMENTUM)
                turned = ahead.T if group["columns"] else ahead
                heads = orthogonal(turned.unflatten(0, (-1, group["head_dim"])))  # (heads, head_dim, hidden)
                moved = heads.flatten(0, 1) * max(heads.shape[-2:]) ** 0.5
                value.sub_(moved.T if group["columns"] else moved, alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Each of some matrices (..., rows, columns) with singular values near 1 in place of its own; 0 stays 0."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp_min(1e-30)
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = found @ found.mT
        found = first * found + (second * square + third * square @ square) @ found
    return found.mT if tall else found
