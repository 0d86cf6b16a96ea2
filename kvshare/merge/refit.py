"""The output projection that makes the best of the heads a layer has now: ridge regression, no gradients.

In: second moments of the concatenated head outputs and of the outputs they should give. Out: a new o projection.
Never: sees activations. Formula: method.md, section 2, output refit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def refit_output(current: Tensor, heads: Tensor, cross: Tensor, ridge: float = 1e-4) -> Tensor:
    """W_O* = argmin E|y - W z|^2 + ridge * |W - W_O|^2, the ridge measured in mean energies of z.

    Args:
        current: W_O (hidden, query heads * head_dim); what the ridge pulls to, so that directions without data stay.
        heads: E[z z^T] (query heads * head_dim, same) of the head outputs.
        cross: E[y z^T] (hidden, query heads * head_dim) with the wanted outputs y.
        ridge: relative to the mean diagonal of `heads`.
    """
    current, heads, cross = current.double(), heads.double(), cross.double()
    pull = ridge * heads.diagonal().mean().clamp_min(1e-30)
    identity = torch.eye(len(heads), dtype=torch.float64, device=heads.device)
    return torch.linalg.solve(heads + pull * identity, (cross + pull * current).T).T
