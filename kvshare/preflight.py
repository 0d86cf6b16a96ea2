"""One step of healing, undone: what would fail in the first hour fails in the first seconds.

In: a student with adapters and all that its training needs. Out: the terms of the loss at the start, or an error
that names what failed.
Never: leaves a weight, a gradient or a file changed.
"""

from __future__ import annotations

import errno
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvshare import processes
from kvshare.distillation import LOWER, Layers, Schedule, finite_gradients, last_terms, make_trainer, training_arguments
from kvshare.errors import KVShareError, TrainingError
from kvshare.losses import term_weights
from kvshare.sections import Heal

START, FORWARD, BACKWARD, STEP = "setting up the training", "the forward pass", "the backward pass", "the optimizer's step"
SAVE, LOAD = "saving the training state", "reading the saved training state"
REMEDIES = {
    START: "check that torch, transformers, accelerate and peft fit together",
    FORWARD: "check that this torch and transformers run the model; where memory is short, lower heal.sequence_length",
    BACKWARD: "check that this torch trains the model; where memory is short, lower heal.sequence_length",
    STEP: "check that this torch trains the model; where memory is short, lower heal.lora_rank",
    SAVE: "check the disk and the rights of the output's folder",
    LOAD: "check the disk, and that torch, transformers, peft and safetensors fit together",
}


def preflight(
    adapted: Any,
    teacher: Any,
    rows: Tensor,
    settings: Heal,
    layers: Layers,
    schedule: Schedule,
    optimizer: Callable[[], torch.optim.Optimizer],
    folder: Path,
    seed: int,
) -> dict[str, float]:
    """Forward, backward, optimizer step, save and reload on the rows of the first step, as training does them; then as if it had
    not been. Returns the mean of each term of the loss over these rows before the step, without its weight, by name.

    Args:
        adapted, teacher, rows, settings, layers: as for `make_trainer`.
        schedule: of the training that is to follow.
        optimizer: makes the optimizer.
        folder: where a state may be written; it is removed.
        seed: of the trial; the state of random numbers is left changed.

    Raises:
        TrainingError: one of these fails, or does not give back what was saved.
        OSError: the disk is full.
    """
    from transformers import TrainerCallback

    stage = START

    def forwarded(loss: Tensor) -> None:
        nonlocal stage
        if not bool(torch.isfinite(loss.detach())):
            raise ArithmeticError(f"the loss is {float(loss.detach())}")
        stage = BACKWARD

    class Stages(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal stage
            stage = FORWARD

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal stage
            stage = FORWARD

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            nonlocal stage
            if not finite_gradients(model):
                raise ArithmeticError("gradients are NaN or infinite")
            stage = STEP

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal stage
            stage = SAVE

    before, unreported = _trainable(adapted), settings.model_copy(update={"report_to": ()})
    once = Schedule(schedule.micro, schedule.accumulation, 1, schedule.rate, "constant")
    try:
        trainer = make_trainer(
            adapted,
            teacher,
            training_arguments(folder, once, unreported, 1, seed),
            optimizer,
            rows[: schedule.micro * schedule.accumulation * processes.count()],
            settings,
            layers,
            forwarded,
            [Stages()],
        )
        trainer.train()
        terms = last_terms(trainer.state.log_history, list(term_weights(settings)))
        after = _trainable(adapted)
        if not all(bool(torch.isfinite(value).all()) for value in after.values()):
            stage = STEP
            raise ArithmeticError("weights became NaN or infinite")
        stage = LOAD
        _restore(adapted, before)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        if not all(torch.equal(value, after[name]) for name, value in _trainable(adapted).items()):
            raise ArithmeticError("the weights that were read are not those that were written")
        if processes.partitions():
            trainer.model_wrapped.destroy()  # it listens to gradients, too
        del trainer
        processes.meet()
        return terms
    except KVShareError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        remedy = LOWER if isinstance(error, ArithmeticError) and stage != LOAD else REMEDIES[stage]
        raise TrainingError(f"healing cannot start: {stage} fails", reason, remedy) from error
    finally:
        _restore(adapted, before)
        adapted.zero_grad(set_to_none=True)
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)
        gc.collect()  # what several processes wrapped the model in listens to its gradients until it is gone


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def _restore(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in model.named_parameters():
        if name in values:
            value.copy_(values[name])
