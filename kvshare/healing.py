"""Healing: a short LoRA distillation that brings a shared model back to its source.

In: a kvshare checkpoint, its source as the teacher, text. Out: another checkpoint of the same form, LoRA merged, tie kept.
Never: trains embeddings, trains K and V apart, leaves an adapter that must be loaded separately.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvshare import __version__
from kvshare.card import card_files, carried_report, front_matter, with_datasets
from kvshare.checkpoint import (
    MANIFEST,
    OutputTensor,
    WeightWriter,
    check_output,
    check_space,
    fresh_folder,
    publish,
    sha256,
    work_folder,
    workspace,
    write_files,
    write_json,
)
from kvshare.data import check_data, check_tokenizer, load_rows, load_tokenizer, rows_per_forward
from kvshare.errors import KVShareError, UsageError
from kvshare.families import Family, family_of
from kvshare.geometry import geometry_of
from kvshare.layout import tied
from kvshare.loading import load, load_native, reload
from kvshare.merge import repeat_heads
from kvshare.parsing import is_file, shown
from kvshare.progress import Progress, silent
from kvshare.recipe import Heal, Recipe, load_recipe
from kvshare.source import INDEX, open_source, read_json, read_tensor_specs, weight_files
from kvshare.verification import listed_files, read_block, verify

BASE_RATE, BASE_HIDDEN = 2e-3, 128
FINGERPRINT = "job.json"


@dataclass(frozen=True)
class HealResult:
    """What healing did: tokens seen, optimizer steps, and the KL (nats per token) over the training text, by step."""

    tokens: int
    steps: int
    losses: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for report.json."""
        return {"tokens": self.tokens, "steps": self.steps, "losses": [list(entry) for entry in self.losses]}


def heal(
    checkpoint: str | Path,
    output: str | Path,
    source: str | Path,
    data: str,
    *,
    tokens: int | None = None,
    recipe: str | Path | Recipe | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> HealResult:
    """Distil a checkpoint further and write the result as a new checkpoint.

    Args:
        checkpoint: a folder that kvshare wrote.
        output: a new folder.
        source: the model that the checkpoint came from; the teacher.
        data: text to train on, any DATA form.
        tokens: how many; None as the recipe says.
        recipe: whose `heal` section counts.
        seed: order of data and initial LoRA weights.
        resume: go on from the last saved state of the same command.
        overwrite: replace an output that kvshare wrote.
        progress: called on the way.

    Raises:
        UsageError: a checkpoint in exact form, an output that exists, data or tokenizer that cannot be used, a state of
            another job.
        BadCheckpointError: not a kvshare checkpoint, or one that is damaged.
    """
    folder, target = Path(checkpoint), Path(output)
    settings = load_recipe(recipe, heal__tokens=tokens, heal__data=data, seed=seed)
    if verify(folder).form == "exact":
        raise UsageError(
            f"{folder} has nothing to heal",
            "its weights are its source's own: it computes what the teacher computes",
            "use it as it is, or heal what `--init svd` made",
        )
    check_output(target, folder, overwrite)
    check_data(data)
    teacher_source = open_source(source)
    check_output(target, teacher_source.path, overwrite)
    check_space(target, 2 * sum((folder / file).stat().st_size for file in weight_files(folder)))
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, data)
    vocabulary = read_json(folder / "config.json").get("vocab_size")
    if teacher_source.config.get("vocab_size") != vocabulary:
        raise UsageError(
            f"{teacher_source.name} cannot teach {folder}",
            f"its vocabulary has {teacher_source.config.get('vocab_size')} tokens, the checkpoint's {vocabulary}",
            "give the model that the checkpoint was converted from",
        )
    job = {
        "checkpoint": sha256(folder / MANIFEST),
        "source": teacher_source.fingerprint["file_bytes"],
        "kvshare": __version__,
        "seed": settings.seed,
        **settings.heal.model_dump(mode="json"),
    }
    carried = carried_report(folder)
    if resume:
        _check_state(work_folder(target) / "training", job)
    with workspace(target, resumable=True) as work:
        state = work / "training" if resume else fresh_folder(work / "training")
        write_json(state / FINGERPRINT, job)
        teacher = load_native(teacher_source.path, dtype=torch.float32)
        rows = heal_rows(settings, tokenizer, teacher, progress)
        staged = fresh_folder(work / "healed")
        result = heal_into(staged, folder, teacher, rows, settings, state, resume, progress)
        carry_files(folder, staged)
        report = {"heal": result.to_dict(), **carried}
        write_json(staged / "report.json", report)
        matter = with_datasets(front_matter(folder / "README.md"), settings, heals=True)
        write_files(staged, card_files(read_json(staged / "config.json"), matter, report))
        publish(staged, target)
    return result


def _check_state(state: Path, job: dict[str, Any]) -> None:
    """Refuse to resume what is not there or was another job; nothing is touched.

    Raises:
        UsageError: there is nothing to resume, or it belongs to a job with other settings; the first field is named.
    """
    if not is_file(state / FINGERPRINT):
        raise UsageError("there is nothing to resume", f"{state} holds no training state", "run the command without --resume")
    earlier = read_json(state / FINGERPRINT)
    for field, value in job.items():
        before = earlier.get(field) if isinstance(earlier, dict) else None
        if before != value:
            raise UsageError(
                f"the saved training state is of another job: {field} differs",
                f"it was {shown(before)} and is now {value!r}",
                "repeat the earlier settings, or run without --resume to start again",
            )


def heal_rows(recipe: Recipe, tokenizer: Any, teacher: Any, progress: Progress) -> Tensor:
    """The rows that healing trains on, in the order of training."""
    settings = recipe.heal
    length, seed = settings.sequence_length, recipe.seed + 1
    return load_rows(settings.data, tokenizer, teacher, settings.tokens, length, seed, repeat=True, progress=progress)


def heal_into(
    staged: Path, checkpoint: Path, teacher: Any, rows: Tensor, recipe: Recipe, state: Path, resume: bool, progress: Progress
) -> HealResult:
    """Train and write weights and config into `staged`; every tensor that was not trained is copied byte for byte."""
    student = load(checkpoint, dtype=torch.float32)
    changed, result = train(student, teacher, rows, recipe.heal, recipe.seed, state, resume, progress)
    specs = read_tensor_specs(checkpoint, weight_files(checkpoint))
    # a base model's checkpoint lacks the first part of each name
    bare = f"{student.base_model_prefix}."
    family, config = family_of(student.config.model_type), read_json(checkpoint / "config.json")
    if family.kv_heads is not None:
        geometry = geometry_of(config, family, str(checkpoint))
        for name in [name for name in changed if f".{family.k}." in name]:
            changed[name] = repeat_heads(changed[name], geometry.head_dim, geometry.kv_heads)
    changed = {name if name in specs else name.removeprefix(bare): value for name, value in tied(changed, family).items()}
    writer = WeightWriter(staged, [OutputTensor(s.name, s.dtype, s.shape, s.file) for s in specs.values()])
    for spec in specs.values():
        if spec.name in changed:
            writer.put(spec.name, changed[spec.name])
        else:
            writer.copy(spec, checkpoint)
    writer.finish()
    block = read_block(checkpoint)
    config["kvshare"] = {
        **block,
        "healed_tokens": block.get("healed_tokens", 0) + result.tokens,
        "heal": recipe.heal.model_dump(mode="json"),
    }
    write_json(staged / "config.json", config)
    reload(staged, {spec.name: (spec.dtype, spec.shape) for spec in specs.values()}, changed.keys() & specs.keys())
    return result


def carry_files(checkpoint: Path, staged: Path) -> None:
    """Copy the small files of a checkpoint that are not there yet: tokenizer, runtime, card. Where there is a manifest, those that
    it names, and nothing that someone has put beside them.
    """
    known = listed_files(checkpoint) if is_file(checkpoint / MANIFEST) else {file.name for file in checkpoint.iterdir()}
    for name in sorted({*known} - {*weight_files(checkpoint), INDEX, MANIFEST}):
        if is_file(checkpoint / name) and not (staged / name).exists():
            shutil.copyfile(checkpoint / name, staged / name)


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
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.set_seed(seed)
    family = family_of(student.config.model_type)
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
    adapted = get_peft_model(student, config)
    length = rows.shape[1]
    batch, micro = batch_rows(settings, length, int(student.config.vocab_size), len(rows))
    steps = math.ceil(len(rows) / batch)
    rate = settings.learning_rate or BASE_RATE * math.sqrt(BASE_HIDDEN / int(student.config.hidden_size))
    on_gpu = torch.cuda.is_available()
    arguments = transformers.TrainingArguments(
        output_dir=str(state),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(0.05, 20 / steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=settings.save_steps,
        save_total_limit=2,
        save_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        bf16=on_gpu,
        remove_unused_columns=False,
        label_names=[],
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="sequential",
    )
    optimizer = _optimizer(adapted, family.k, rate, settings.shared_rate)
    trainer = _distiller(adapted, teacher, arguments, optimizer, rows, settings.temperature, progress)
    newest = newest_state(state) if resume else None
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
    if not all(math.isfinite(loss) for _, loss in losses):
        raise KVShareError("healing diverged", "the loss became NaN or infinite", "lower heal.learning_rate in the recipe")
    trained = {name.removeprefix("base_model.model.") for name, value in adapted.named_parameters() if value.requires_grad}
    modules = {name.split(".lora_")[0].split(".modules_to_save")[0] for name in trained}
    merged: nn.Module = adapted.merge_and_unload()
    changed = {
        name: value.detach().float().cpu() for name, value in merged.state_dict().items() if name.rpartition(".")[0] in modules
    }
    return changed, HealResult(rows.numel(), steps, losses)


def newest_state(folder: Path) -> Path | None:
    """The newest state that was saved to its end, if there is one; the Trainer writes `trainer_state.json` last."""
    from transformers.trainer import TRAINER_STATE_NAME

    found = []
    for state in folder.glob("checkpoint-*"):
        number = state.name.rpartition("-")[2]
        with suppress(ValueError, OSError):
            json.loads((state / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            found.append((int(number), state))
    return max(found)[1] if found else None


def _optimizer(adapted: nn.Module, shared_name: str, rate: float, shared_rate: float) -> torch.optim.Optimizer:
    """AdamW with a lower rate for the shared projections: values read small parts of them, amplified many times."""
    trainable = [(name, value) for name, value in adapted.named_parameters() if value.requires_grad]
    shared = [value for name, value in trainable if f".{shared_name}." in name]
    others = [value for name, value in trainable if f".{shared_name}." not in name]
    groups = [{"params": others, "lr": rate}, {"params": shared, "lr": rate * shared_rate}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


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
    """Rows per optimizer step and rows per forward: as many as keep the logits within a GiB, in equal parts."""
    batch = max(1, min(rows, settings.batch_tokens // length))
    fits = rows_per_forward(length, vocabulary)
    return batch, next(micro for micro in range(min(batch, fits), 0, -1) if batch % micro == 0)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean KL(teacher || student) per token in nats, times temperature squared; logits (rows, length, vocabulary)."""
    wanted = torch.log_softmax(teacher.float() / temperature, dim=-1)
    given = torch.log_softmax(student.float() / temperature, dim=-1)
    divergence = nn.functional.kl_div(given, wanted, log_target=True, reduction="sum")
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])


def _distiller(
    adapted: Any,
    teacher: Any,
    arguments: Any,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    temperature: float,
    progress: Progress,
) -> Any:
    """A transformers Trainer whose loss is the distance to the teacher, and which reports to `progress`."""
    from transformers import Trainer, TrainerCallback

    class Distiller(Trainer):
        loss_is_scaled_for_ga = False  # a mean per forward: the Trainer divides it by the accumulated forwards

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            ids = inputs["input_ids"]
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False).logits
            output = model(input_ids=ids, use_cache=False)
            loss = distillation_loss(output.logits, wanted, temperature)
            return (loss, output) if return_outputs else loss

    class Reporter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress("healing", state.global_step, state.max_steps)

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": rows[index]}

    trainer = Distiller(model=adapted, args=arguments, train_dataset=Rows(), callbacks=[Reporter()], optimizers=(optimizer, None))
    trainer.remove_callback(_printer())
    teacher.to(trainer.args.device)
    return trainer


def _printer() -> type:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
