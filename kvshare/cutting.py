"""Weights that healing leaves as they are, cut among the processes (FSDP2); what is trained lies whole in each of them.

In: a student with adapters, its teacher. Out: the same models, each layer of which is put together while it computes.
Never: cuts what is trained, changes a value, holds a weight twice that both models have alike.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from kvshare import processes
from kvshare.families import Family
from kvshare.tensors import best_device


def cut(student: nn.Module, teacher: nn.Module | None, family: Family, layers: int) -> None:
    """Leave in every process its part of each frozen weight. All processes call it, and call both models in the same order.

    Args:
        student: the model below its adapters; what requires gradients stays whole.
        teacher: the source model, which requires none; None where it takes no part in the training.
        family: of both.
        layers: how many decoder layers each has.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(best_device().type, (processes.count(),))
    alike = {} if teacher is None else same_weights(student, teacher)
    names = [family.attention.format(layer=layer) for layer in range(layers)]
    for model in (student,) if teacher is None else (teacher, student):
        trained = {value for value in model.parameters() if value.requires_grad}
        # a mixed attention output calls the teacher's attention alone, see `annealed`: it is put together by itself
        attention = names if model is teacher else []
        for name in (*attention, *(name.rpartition(".")[0] for name in names), ""):
            fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    if teacher is None:
        return
    teachers = dict(teacher.named_parameters())
    for name, same in alike.items():
        module, _, last = name.rpartition(".")
        setattr(student.get_submodule(module), last, teachers[same])  # taken up by the first forward


def same_weights(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """The names of frozen weights of the student that are the teacher's and have its name, and that name."""
    teachers = dict(teacher.named_parameters())
    found = {}
    for name, value in student.named_parameters():
        same = teachers.get(plain := name.replace(".base_layer.", "."))
        if same is not None and not value.requires_grad and value.dtype == same.dtype and torch.equal(value, same):
            found[name] = plain
    return found


def is_cut(model: Any) -> bool:
    """Whether `cut` was here."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(value, DTensor) for value in model.parameters())


def averaging(model: nn.Module) -> nn.Module:
    """A cut model in DDP, which averages the gradients of what is trained; it is not to touch anything else."""
    from torch.nn.parallel import DistributedDataParallel

    cut_up = [name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, cut_up)
    device = best_device()
    return DistributedDataParallel(model, device_ids=[processes.local_rank()] if device.type == "cuda" else None)


def put_together(model: nn.Module, names: Collection[str]) -> None:
    """Bring modules of a cut model, by their names, to the memory of the first process's CPU, whole. All processes call it."""
    from torch.distributed.tensor import DTensor

    first = processes.is_first()
    for name in sorted(names):
        for module in model.get_submodule(name).modules():
            for own, value in list(module.named_parameters(recurse=False)):
                whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value.detach()
                if first:
                    setattr(module, own, nn.Parameter(whole.cpu(), requires_grad=False))
