"""Training of a shared model: LoRA around the cache, what a recipe wants in full, the source as the teacher.

In: student, teacher, rows of tokens, settings. Out: the tensors that changed, LoRA merged, and what the training did.
Never: trains embeddings, trains K and V apart.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvshare import processes
from kvshare.annealing import annealed, passage
from kvshare.contamination import Contamination
from kvshare.cutting import cut, put_together
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
from kvshare.families import Family, Part, family_of
from kvshare.losses import KL, term_weights
from kvshare.preflight import preflight
from kvshare.progress import Progress
from kvshare.sections import Heal
from kvshare.targets import Targets, make_targets

BASE_RATE, BASE_HIDDEN, BASE_RANK = 2e-3, 128, 16
# Nats per token at the start. Measured on text apart, after 327k tokens: at a rate of 1e-3 a start of 0.0071 ends worse than it
# began, and better at a quarter of it; one of 0.0083 ends best at 0.3 to 0.5 of it (after 655k tokens, at 0.4); one of 0.049 at all
# of it. The KL is a squared distance, the rate a distance.
FULL_KL = 0.05
ROUNDING = 1e-6  # nats per token; a KL below it is that of a model and itself, and says nothing of a distance
WARMUP = 16  # steps at least: the first ones are as large as the rate, however small the gradient


@dataclass(frozen=True)
class HealResult:
    """What healing did: tokens seen, optimizer steps, and the loss over the training text, by step.

    The loss is the KL in nats per token, plus the weighted other terms where a recipe asks for them; `terms` holds the mean of each
    over the last ten steps, before its weight. `learning_rate` is that of LoRA where it was highest. `report` is the measurement of
    the result by `heal`, where it was asked for, and `contamination` what its text shares with that of healing.
    """

    tokens: int
    steps: int
    losses: tuple[tuple[int, float], ...]
    terms: dict[str, float]
    learning_rate: float
    report: Report | None = None
    contamination: Contamination | None = None

    def to_dict(self) -> dict[str, Any]:
        """What training did as JSON data, for report.json."""
        losses = [list(entry) for entry in self.losses]
        figures = {"tokens": self.tokens, "steps": self.steps, "learning_rate": self.learning_rate}
        return figures | {"losses": losses, "terms": self.terms}


def train(
    student: Any,
    teacher: Any,
    rows: Tensor,
    settings: Heal,
    seed: int,
    state: Path,
    resume: bool,
    progress: Progress,
    cuts: bool = False,
) -> tuple[dict[str, Tensor], HealResult]:
    """Distil `teacher` into `student` with PEFT and the transformers Trainer; returns the changed tensors, LoRA merged.

    Of several processes, the first has the tensors.

    Args:
        student: a shared model in float32; it is changed.
        teacher: the source model; it comes back on the device of the training, and where weights are cut, cut.
        rows: token ids (rows, length); each is seen once.
        settings: the recipe's `heal` section.
        seed: LoRA weights and dropout.
        state: folder of the Trainer's states.
        resume: start from the newest state.
        cuts: of several processes, each holds its part of the weights that are not trained.

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
    size = BASE_HIDDEN / int(student.config.hidden_size) * min(1.0, BASE_RANK / settings.lora_rank)
    highest = settings.learning_rate or BASE_RATE * math.sqrt(size)
    warmup = min(0.5, max(WARMUP / steps, min(0.05, 20 / steps))) if steps > 1 else 0.0  # of all steps; it begins at nothing
    schedule = Schedule(micro, batch // (micro * processes.count()), steps, highest, warmup=warmup)

    teacher.requires_grad_(False)
    layers = attention_pairs(adapted.get_base_model(), teacher, family)
    wanted = _targets(teacher, rows, settings, state / "teacher", progress)
    if cuts:
        beside = None if isinstance(wanted, Targets) else teacher
        cut(adapted.get_base_model(), beside, family, int(student.config.num_hidden_layers))
    optimizer = partial(make_optimizer, adapted, family.k, shared_rate=settings.shared_rate)
    once = partial(optimizer, highest)
    at_start = preflight(adapted, wanted, rows, settings, layers, schedule, once, state / "preflight", seed)
    if settings.learning_rate is None:
        schedule = replace(schedule, rate=rate_for(highest, at_start.get(KL)))
    transformers.set_seed(seed)
    watch = make_watch(state, settings.divergence_factor, math.ceil(settings.progressive * steps), progress)
    arguments = training_arguments(state, schedule, settings, settings.save_steps, seed)
    trained_by = partial(optimizer, schedule.rate)
    trainer = make_trainer(adapted, wanted, arguments, trained_by, rows, settings, layers, watch.check_loss, [watch])
    newest = newest_state(state) if resume else None
    processes.meet()
    for folder in state.glob("checkpoint-*") if processes.is_first() else ():
        if folder != newest:
            shutil.rmtree(folder)  # broken off while it was written, or older
    with annealed(layers if settings.progressive else [], lambda: passage(trainer.state.global_step, steps, settings.progressive)):
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    trained = {name.removeprefix("base_model.model.") for name, value in adapted.named_parameters() if value.requires_grad}
    modules = {name.split(".lora_")[0].split(".modules_to_save")[0] for name in trained}
    if cuts:
        put_together(adapted.get_base_model(), modules)
    changed = _merged(adapted, modules) if processes.is_first() else {}
    if not cuts:
        teacher.to(trainer.args.device)
    log = trainer.state.log_history
    rate = float(trainer.lr_scheduler.state_dict()["base_lrs"][0])  # of the state that was gone on from, where there was one
    return changed, HealResult(rows.numel(), steps, logged_losses(log), last_terms(log, list(term_weights(settings))), rate)


def rate_for(highest: float, kl: float | None) -> float:
    """The learning rate for a start at a KL to the source, in nats per token: with its root, at most `highest`.

    That is the rate as well where the KL is None, because it does not count, or nothing but rounding. A lower one has two digits,
    so that one process and several, which sum in another order, have the same rate.
    """
    if kl is None or not kl > ROUNDING:
        return highest
    return min(highest, float(f"{highest * math.sqrt(kl / FULL_KL):.1e}"))


def _merged(adapted: Any, modules: Collection[str]) -> dict[str, Tensor]:
    """The tensors of these modules, by name, LoRA merged; float32, on the CPU."""
    # in place, the merge would change the teacher, which has the same weights
    merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return {name: value.detach().float().cpu() for name, value in merged.state_dict().items() if name.rpartition(".")[0] in modules}


def count_trained(student: Any, settings: Heal) -> tuple[int, int]:
    """How many numbers healing trains, and how many the model has; `student` gets the adapters, and may be without weights."""
    whole = sum(value.numel() for value in student.parameters())
    adapted = _with_adapters(student, settings, family_of(student.config.model_type))
    return sum(value.numel() for value in adapted.parameters() if value.requires_grad), whole


def _with_adapters(student: Any, settings: Heal, family: Family) -> Any:
    """The student with LoRA on its targets, and copies to train of what is trained in full."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    layers = range(int(student.config.num_hidden_layers))
    whole = _modules(student, family, student.config.kvshare["layers"], "k")
    shared = [] if settings.shared == "full" else whole
    whole = [] if settings.shared == "lora" else whole
    if settings.attention == "full":
        parts: tuple[Part, ...] = ("o",) if family.fused else ("q", "o")  # in a fused tensor, q is trained as K and V are
        whole += [name for part in parts for name in _modules(student, family, layers, part)]
    if settings.norms:
        whole += [name for name, module in student.named_modules() if type(module).__name__.endswith("Norm")]
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # noise that the teacher does not have; one pass over the text needs no other regulariser
    targets = [*_lora_targets(student, settings, family.k, whole), *shared]
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        lora_dropout=0.0,
        target_modules=targets or DUMMY_TARGET_MODULES,  # experts are no linear layers: all that is left may be trained in full
        modules_to_save=whole or None,
        fan_in_fan_out=family.transposed,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, config)


def attention_pairs(student: Any, teacher: Any, family: Family) -> list[tuple[nn.Module, nn.Module]]:
    """The attention modules of the shared layers, the student's and the teacher's."""
    names = [family.attention.format(layer=layer) for layer in student.config.kvshare["layers"]]
    return [(student.get_submodule(name), teacher.get_submodule(name)) for name in names]


def _modules(student: nn.Module, family: Family, layers: Iterable[int], part: Part) -> list[str]:
    """The names of the modules of a projection. That of `k` makes what K and V share, in untouched layers keys alone."""
    wanted = {family.weight(layer, part).removesuffix(".weight") for layer in layers}
    return [name for name, _ in student.named_modules() if name in wanted]


def _lora_targets(student: nn.Module, settings: Heal, shared_name: str, whole: Sequence[str]) -> list[str]:
    """The names of the modules that get LoRA by the recipe's names, but for shared projections and what is trained in full."""
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in student.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    named = [name for name in linear if name.rpartition(".")[2] in settings.lora_targets and not name.endswith(f".{shared_name}")]
    if not named:
        raise UsageError(
            "the recipe's lora_targets are not in the model",
            f"its linear layers are: {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}",
            "name some of these under heal.lora_targets",
        )
    return [name for name in named if name not in whole]


def _targets(teacher: Any, rows: Tensor, settings: Heal, folder: Path, progress: Progress) -> Any:
    """The teacher, or what it says of the rows, if that is to be kept; then it leaves the device."""
    if settings.teacher_top_k is None:
        return teacher
    if torch.cuda.is_available():
        teacher.to("cuda")
    targets = make_targets(folder, teacher, rows, settings.teacher_top_k, settings.temperature, progress)
    teacher.to("cpu")
    return targets


def check_healing(settings: Heal, family: Family) -> None:
    """Refuse settings that this family or this machine does not bear, before anything is spent.

    Raises:
        UsageError: LoRA for a fused tensor; progressive sharing without the teacher's attention; a tracker that the Trainer does
            not know or that is not installed, or tensorboard without a folder of its own.
    """
    if settings.shared == "lora" and family.fused:
        raise UsageError(
            f"heal.shared = 'lora' does not go with {family.model_type}",
            "its queries, keys and values are one tensor, which is trained in full",
            "leave heal.shared out",
        )
    if settings.progressive and (settings.teacher_top_k is not None or settings.compile):
        other = "compile" if settings.compile else "teacher_top_k"
        raise UsageError(
            f"heal.progressive does not go with heal.{other}",
            "it computes the source's attention beside the student's, with a weight that changes from step to step",
            f"leave one of heal.progressive and heal.{other} out",
        )
    if settings.compile and processes.cuts():
        raise UsageError(
            "heal.compile does not go with FSDP",
            "each layer's weights are put together while it computes, which torch.compile has not been tried with here",
            "leave heal.compile out, or start it with DDP (recipes/accelerate/ddp.yaml)",
        )
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    for name in settings.report_to:
        if name not in there:
            raise UsageError(
                f"heal.report_to names {name}, which is not there",
                f"the transformers Trainer finds: {', '.join(there) or 'no tracker'}",
                f"install {name}, or leave it out",
            )
    if "tensorboard" in settings.report_to and "TENSORBOARD_LOGGING_DIR" not in os.environ:
        raise UsageError(
            "heal.report_to names tensorboard, and it has no folder to write to",
            "the Trainer would write beside its states, which are removed when training is done",
            "set the environment variable TENSORBOARD_LOGGING_DIR to a folder",
        )


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
