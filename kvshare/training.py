"""Training of a shared model: LoRA around the cache, the shared projection in full, the source as the teacher.

In: student, teacher, rows of tokens, settings. Out: the tensors that changed, LoRA merged, and what the training did.
Never: trains embeddings, trains K and V apart.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvshare import processes
from kvshare.contamination import Contamination
from kvshare.data import rows_per_forward
from kvshare.distillation import (
    Schedule,
    last_terms,
    logged_losses,
    make_optimizer,
    make_trainer,
    make_watch,
    newest_state,
    training_arguments,
)
from kvshare.errors import UsageError
from kvshare.evaluation import Report
from kvshare.families import Family, family_of
from kvshare.losses import term_weights
from kvshare.preflight import preflight
from kvshare.progress import Progress
from kvshare.recipe import Heal

BASE_RATE, BASE_HIDDEN = 2e-3, 128


@dataclass(frozen=True)
class HealResult:
    """What healing did: tokens seen, optimizer steps, and the loss over the training text, by step.

    The loss is the KL in nats per token, plus the weighted other terms where a recipe asks for them; `terms` holds the mean of each
    over the last ten steps, before its weight. `report` is the measurement of the result by `heal`, where it was asked for, and
    `contamination` what its text shares with that of healing.
    """

    tokens: int
    steps: int
    losses: tuple[tuple[int, float], ...]
    terms: dict[str, float]
    report: Report | None = None
    contamination: Contamination | None = None

    def to_dict(self) -> dict[str, Any]:
        """What training did as JSON data, for report.json."""
        losses = [list(entry) for entry in self.losses]
        return {"tokens": self.tokens, "steps": self.steps, "losses": losses, "terms": self.terms}


def train(
    student: Any, teacher: Any, rows: Tensor, settings: Heal, seed: int, state: Path, resume: bool, progress: Progress
) -> tuple[dict[str, Tensor], HealResult]:
    """Distil `teacher` into `student` with PEFT and the transformers Trainer; returns the changed tensors, LoRA merged.

    Args:
        student: a shared model in float32; its shared projections are trained in full.
        teacher: the source model.
        rows: token ids (rows, length); each is seen once.
        settings: the recipe's `heal` section.
        seed: LoRA weights and dropout.
        state: folder of the Trainer's states.
        resume: start from the newest state.

    Raises:
        TrainingError: the first step fails when it is tried, or training diverges.
        UsageError: the model has none of the layers to train.
    """
    import transformers

    transformers.set_seed(seed)
    family = family_of(student.config.model_type)
    adapted = _with_adapters(student, settings, family)
    length = rows.shape[1]
    batch, micro = batch_rows(settings, length, int(student.config.vocab_size), len(rows))
    steps = math.ceil(len(rows) / batch)
    rate = settings.learning_rate or BASE_RATE * math.sqrt(BASE_HIDDEN / int(student.config.hidden_size))
    schedule = Schedule(micro, batch // (micro * processes.count()), steps, rate, warmup=min(0.05, 20 / steps))

    def optimizer() -> torch.optim.Optimizer:
        return make_optimizer(adapted, family.k, rate, settings.shared_rate)

    layers = _attention_pairs(adapted.get_base_model(), teacher, family)
    preflight(adapted, teacher, rows, settings, layers, schedule, optimizer, state / "preflight", seed)
    transformers.set_seed(seed)
    watch = make_watch(state, settings.divergence_factor, progress)
    arguments = training_arguments(state, schedule, settings, settings.save_steps, seed)
    trainer = make_trainer(adapted, teacher, arguments, optimizer(), rows, settings, layers, watch.check_loss, [watch])
    newest = newest_state(state) if resume else None
    processes.meet()
    for folder in state.glob("checkpoint-*") if processes.is_first() else ():
        if folder != newest:
            shutil.rmtree(folder)  # broken off while it was written, or older
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    trained = {name.removeprefix("base_model.model.") for name, value in adapted.named_parameters() if value.requires_grad}
    modules = {name.split(".lora_")[0].split(".modules_to_save")[0] for name in trained}
    merged: nn.Module = adapted.merge_and_unload()
    changed = {
        name: value.detach().float().cpu() for name, value in merged.state_dict().items() if name.rpartition(".")[0] in modules
    }
    log = trainer.state.log_history
    return changed, HealResult(rows.numel(), steps, logged_losses(log), last_terms(log, list(term_weights(settings))))


def _with_adapters(student: Any, settings: Heal, family: Family) -> Any:
    """The student with LoRA on its targets and its shared projections to be trained in full."""
    from peft import LoraConfig, get_peft_model

    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # noise that the teacher does not have; one pass over the text needs no other regulariser
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        lora_dropout=0.0,
        target_modules=list(_targets(student, settings, family.k)),
        modules_to_save=_shared_projections(student, family),
        fan_in_fan_out=family.transposed,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, config)


def _attention_pairs(student: Any, teacher: Any, family: Family) -> list[tuple[nn.Module, nn.Module]]:
    """The attention modules of the shared layers, the student's and the teacher's."""
    names = [family.attention.format(layer=layer) for layer in student.config.kvshare["layers"]]
    return [(student.get_submodule(name), teacher.get_submodule(name)) for name in names]


def _shared_projections(student: Any, family: Family) -> list[str] | None:
    """The names of the projections that K and V share; in untouched layers the module of that name makes keys alone."""
    shared = {family.weight(layer, "k").removesuffix(".weight") for layer in student.config.kvshare["layers"]}
    return [name for name, _ in student.named_modules() if name in shared] or None


def _targets(student: nn.Module, settings: Heal, shared_name: str) -> tuple[str, ...]:
    from transformers.pytorch_utils import Conv1D

    present = {name.rpartition(".")[2] for name, module in student.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    targets = tuple(name for name in settings.lora_targets if name in present and name != shared_name)
    if not targets:
        raise UsageError(
            "the recipe's lora_targets are not in the model",
            f"its linear layers are: {', '.join(sorted(present))}",
            "name some of these under heal.lora_targets",
        )
    return targets


def batch_rows(settings: Heal, length: int, vocabulary: int, rows: int) -> tuple[int, int]:
    """Rows per optimizer step, and per forward of each process: as many as keep the logits within a GiB, in equal parts.

    Raises:
        UsageError: the rows of a step cannot be shared equally among the processes.
    """
    batch = max(1, min(rows, settings.batch_tokens // length))
    count = processes.count()
    if batch % count:
        raise UsageError(
            f"{count} processes cannot share the {batch} rows of a step",
            f"heal.batch_tokens = {settings.batch_tokens} are {batch} rows of {length} tokens",
            f"start {math.gcd(batch, count)} processes, or set heal.batch_tokens to a multiple of {count * length}",
        )
    own, fits = batch // count, rows_per_forward(length, vocabulary)
    return batch, next(micro for micro in range(min(own, fits), 0, -1) if own % micro == 0)
