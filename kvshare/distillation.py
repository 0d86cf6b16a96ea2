"""The Trainer of healing: a transformers Trainer whose loss is the distance to the teacher, watched step by step.

In: a student with adapters, its teacher, rows of tokens. Out: a Trainer that is ready to train, and the states that it saved.
Never: goes on after a loss or a gradient that is no number, resumes from a state that was not written to its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from kvshare import processes
from kvshare.cutting import averaging, is_cut, same_weights
from kvshare.errors import TrainingError
from kvshare.losses import loss_terms, weighted
from kvshare.progress import Progress
from kvshare.sections import Heal
from kvshare.targets import Targets

COMPLETE = "complete"  # the file that says of a state that all of it was written
WINDOW = 10  # steps whose mean loss is held against that of the first one
NOTICEABLE = 0.1  # nats; below it a multiple of next to nothing proves nothing
Layers = Sequence[tuple[nn.Module, nn.Module]]
LOWER = "lower heal.learning_rate in the recipe and start again without --resume"


@dataclass(frozen=True)
class Schedule:
    """Rows per forward, forwards per optimizer step (of each process), steps, and the learning rate at its highest."""

    micro: int
    accumulation: int
    steps: int
    rate: float
    scheduler: str = "cosine"
    warmup: float = 0.0


def training_arguments(folder: Path, schedule: Schedule, settings: Heal, save_steps: int, seed: int) -> Any:
    """The TrainingArguments of a schedule; states are saved under `folder`."""
    import transformers

    # transformers 5 has renamed it on the way
    renamed = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    on_gpu = torch.cuda.is_available()
    bfloat16 = in_bfloat16(settings) and not processes.partitions()
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=schedule.micro,
        gradient_accumulation_steps=schedule.accumulation,
        max_steps=schedule.steps,
        learning_rate=schedule.rate,
        lr_scheduler_type=schedule.scheduler,
        warmup_steps=schedule.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=save_steps,
        save_total_limit=2,
        save_strategy="steps",
        report_to=list(settings.report_to),
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        ddp_find_unused_parameters=False,
        bf16=bfloat16,
        use_cpu=bfloat16 and not on_gpu,
        torch_compile=settings.compile,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="sequential",
        **{checkpointing: settings.gradient_checkpointing, f"{checkpointing}_kwargs": {"use_reentrant": False}},
    )


def in_bfloat16(settings: Heal) -> bool:
    """Whether forwards compute in bfloat16."""
    return settings.dtype == "bfloat16" or (settings.dtype == "auto" and torch.cuda.is_available())


def make_optimizer(adapted: nn.Module, shared_name: str, rate: float, shared_rate: float) -> torch.optim.Optimizer:
    """AdamW with a lower rate for matrices that are trained in full and for the shared projections: values read small parts of
    these, amplified many times.
    """
    slow: list[Tensor] = []
    others: list[Tensor] = []
    for name, value in adapted.named_parameters():
        if value.requires_grad:
            whole = ".modules_to_save." in name and value.dim() > 1
            (slow if whole or f".{shared_name}." in name else others).append(value)
    groups = [{"params": others, "lr": rate}, {"params": slow, "lr": rate * shared_rate}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def make_trainer(
    adapted: Any,
    teacher: Any,
    arguments: Any,
    optimizer: Callable[[], torch.optim.Optimizer],
    rows: Tensor,
    settings: Heal,
    layers: Layers,
    on_loss: Callable[[Tensor], None],
    callbacks: Sequence[Any],
) -> Any:
    """A transformers Trainer of `adapted` on `rows`, token ids (rows, length), in their order.

    The teacher is the source model, or what it said of the rows. Weights that both models have alike are held once. The log holds
    the mean of each term of the loss under the term's name.

    Args:
        optimizer: makes the optimizer, when it is needed: DeepSpeed puts other tensors into the one it gets.
        layers: the attention modules of student and teacher that correspond.
        on_loss: called with the loss of every forward before its backward.
        callbacks: of transformers' kind.
    """
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    already_cut = is_cut(adapted)
    seen: dict[str, list[Tensor]] = {}  # terms of the forwards since the last entry of the log

    class Distiller(Trainer):
        optimizer: Any
        loss_is_scaled_for_ga = False  # a mean per forward: the Trainer divides it by the accumulated forwards

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            with apart if apart is not None else self.accelerator.autocast():
                terms = loss_terms(model, teacher, inputs, settings, layers)
            loss = weighted(terms, settings)
            on_loss(loss)
            for name, value in terms.items():
                seen.setdefault(name, []).append(value.detach())
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and seen:
                means = torch.stack([torch.stack(values).mean() for values in seen.values()])[None]
                logs |= dict(zip(seen, self.accelerator.gather(means).mean(0).tolist(), strict=True))
                seen.clear()
            super().log(logs, start_time)

        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = self.optimizer or optimizer()
            return self.optimizer

        def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
            wrapped = super()._wrap_model(model, training, dataloader)
            # accelerate does not average what is trained beside weights that are cut
            return averaging(wrapped) if training and wrapped is adapted and already_cut else wrapped

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            if not isinstance(teacher, Targets):
                return {"input_ids": rows[index]}
            said = {"tokens": teacher.tokens[index], "log_probabilities": teacher.log_probabilities[index]}
            return {"input_ids": rows[index], **said}

    trainer = Distiller(model=adapted, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    apart = None
    if processes.partitions() and in_bfloat16(settings):
        # told of bfloat16, DeepSpeed makes all weights bfloat16, and within it no other autocast counts than its own
        apart = torch.autocast(arguments.device.type, torch.bfloat16)
        inner = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"] = inner
    if not isinstance(teacher, Targets) and not already_cut:
        teacher.to(trainer.args.device)
        hold_once(adapted.get_base_model(), teacher)
    return trainer


def hold_once(student: nn.Module, teacher: nn.Module) -> None:
    """Let frozen weights of the student that are the teacher's, and have its name, lie where the teacher's lie."""
    own, teachers = dict(student.named_parameters()), dict(teacher.named_parameters())
    for name, same in same_weights(student, teacher).items():
        own[name].data = teachers[same].data


def make_watch(state: Path, divergence_factor: float, settled: int, progress: Progress) -> Any:
    """A callback that stops training which goes wrong, reports to `progress`, and marks states that are complete.

    Its method `check_loss` takes the loss of every forward. Divergence is looked for in the losses after `settled` steps.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        step = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.step = state.global_step + 1

        def check_loss(self, loss: Tensor) -> None:
            if not bool(torch.isfinite(loss.detach())):
                raise stopped(folder, self.step, f"the loss is {float(loss.detach())}")

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if not finite_gradients(model):
                raise stopped(folder, self.step, "the loss is a number, and its gradient is not")

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["step"] > settled]
            if reason := diverged(losses, divergence_factor):
                raise stopped(folder, state.global_step, reason)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress("healing", state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            processes.meet()  # each has written its own state of random numbers
            if processes.is_first():
                (folder / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    folder = state
    return Watch()


def finite_gradients(model: nn.Module) -> bool:
    """Whether every gradient that a model holds is made of numbers."""
    found = [torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None]
    return bool(torch.stack(found).all()) if found else True


def diverged(losses: Sequence[float], factor: float) -> str | None:
    """Why training is to stop, if it is: the mean loss of the last steps against that of the first, on untouched weights."""
    if len(losses) <= WINDOW:
        return None
    first, last = losses[0], fmean(losses[-WINDOW:])
    if last <= factor * first or last - first < NOTICEABLE:
        return None
    return f"the loss of the last {WINDOW} steps is {last:.4g} on average, that of the first step was {first:.4g}"


def stopped(state: Path, step: int, reason: str) -> TrainingError:
    """The error of training that stops; what it had saved stays."""
    newest = newest_state(state)
    kept = f"the state of step {step_of(newest)} is kept in {newest}" if newest else "no state had been saved yet"
    return TrainingError(
        f"healing stopped at step {step}: it diverged",
        f"{reason}; {kept}, and nothing was published",
        f"{LOWER}; if the machine is to blame and not the rate, the same command with --resume goes on",
        keeps_work=True,
    )


def step_of(state: Path) -> int:
    """The step of a saved state."""
    return int(state.name.rpartition("-")[2])


def newest_state(folder: Path) -> Path | None:
    """The newest state that was written to its end; None where there is none."""
    complete = [file.parent for file in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=step_of, default=None)


def logged_losses(log: Sequence[dict[str, Any]]) -> tuple[tuple[int, float], ...]:
    """The loss of every step from a Trainer's log."""
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry)
    assert all(math.isfinite(loss) for _, loss in losses)
    return losses


def last_terms(log: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """The mean of each term of the loss over the last steps of a Trainer's log."""
    last = [entry for entry in log if "loss" in entry][-WINDOW:]
    return {name: fmean(entry[name] for entry in last) for name in names}
