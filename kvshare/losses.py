"""What healing minimises: the distance to the teacher.

In: logits of student and teacher on the same tokens. Out: scalar tensors. Never: knows how they are trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean KL(teacher || student) per token in nats, times temperature squared; logits (rows, length, vocabulary)."""
    wanted = torch.log_softmax(teacher.float() / temperature, dim=-1)
    given = torch.log_softmax(student.float() / temperature, dim=-1)
    divergence = nn.functional.kl_div(given, wanted, log_target=True, reduction="sum")
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])
