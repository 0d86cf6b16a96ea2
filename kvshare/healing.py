"""Healing: a short LoRA distillation that brings a shared model back to its source.

In: a kvshare checkpoint, its source as the teacher, text. Out: another checkpoint of the same form, LoRA merged, tie kept.
Never: trains embeddings, trains K and V apart, leaves an adapter that must be loaded separately.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare import processes
from kvshare.card import card_files, carried_report, front_matter, with_datasets
from kvshare.channels import write_channels
from kvshare.checkpoint import (
    MANIFEST,
    OutputTensor,
    WeightWriter,
    check_output,
    check_space,
    fresh_folder,
    is_published,
    publish,
    sha256,
    work_folder,
    workspace,
    write_files,
    write_json,
)
from kvshare.contamination import contamination
from kvshare.data import SelfCache, check_tokenizer, load_rows, load_tokenizer
from kvshare.distillation import newest_state
from kvshare.documents import check_data
from kvshare.errors import KVShareError, UsageError
from kvshare.evaluation import Report, evaluation_rows
from kvshare.families import family_of
from kvshare.geometry import geometry_of
from kvshare.journal import JOB, JOURNAL, Journal, check_same, content_of, flat, open_journal, read_journal, versions
from kvshare.loading import load, load_native, reload
from kvshare.memory import kept_bytes
from kvshare.merge import repeat_heads
from kvshare.mixture import parts_of
from kvshare.parsing import is_file
from kvshare.progress import Progress, silent
from kvshare.quality import check_quality, measure
from kvshare.recipe import Recipe, load_recipe
from kvshare.runtime.kvshare_channels import FILE as CHANNELS
from kvshare.source import INDEX, Source, open_source, read_json, read_tensor_specs, weight_files
from kvshare.tensors import best_device
from kvshare.training import HealResult, check_healing, train
from kvshare.verification import listed_files, read_block, verify

COMMAND, HEALED = "heal", "healed"  # the job's command, and the entry of what training did, as the journal names them
AGAIN = "run without --resume to begin again"


def heal(
    checkpoint: str | Path,
    output: str | Path,
    source: str | Path,
    data: str | None = None,
    *,
    tokens: int | None = None,
    recipe: str | Path | Recipe | None = None,
    eval_data: str | None = None,
    eval_tokens: int | None = None,
    max_perplexity_increase: float | None = None,
    seed: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> HealResult:
    """Distil a checkpoint further and write the result as a new checkpoint.

    Where `accelerate launch` has started several processes with the same arguments, they share the rows of every step.

    Args:
        checkpoint: a folder that kvshare wrote.
        output: a new folder.
        source: the model that the checkpoint came from; the teacher.
        data: text to train on, any DATA form; None as the recipe says.
        tokens: how many; None as the recipe says.
        recipe: whose `heal` section counts, and `evaluation` where the result is measured.
        eval_data, eval_tokens: held-out text; the result is measured where this or a quality gate is given.
        max_perplexity_increase: the quality gate, such as 0.05; a result that is worse is not published.
        seed: order of data and initial LoRA weights.
        resume: go on from the last saved state of the same command.
        overwrite: replace an output that kvshare wrote.
        progress: called on the way.

    Raises:
        UsageError: a checkpoint in exact form, an output that exists, data or tokenizer that cannot be used, a state of
            another job.
        QualityError: the result does not pass the quality gate; the finished training is kept.
        BadCheckpointError: not a kvshare checkpoint, or one that is damaged.
        TrainingError: a first step that fails when it is tried, or a loss that diverges; what was saved until then stays.
    """
    settings, measures = healing_recipe(recipe, data, tokens, eval_data, eval_tokens, max_perplexity_increase, seed)
    folder, target, teacher_source = Path(checkpoint), Path(output), open_source(source)
    tokenizer = check_heal(folder, target, teacher_source, settings, measures, resume, overwrite)
    first, work = processes.is_first(), work_folder(target)
    earlier, job = read_journal(work / JOURNAL), heal_job(folder, teacher_source, settings)
    published = resume and is_published(target, earlier)
    carried = carried_report(folder)
    check_earlier(earlier, job, work, resume)
    progress = progress if first else silent
    processes.meet()  # all have looked at output and work before one of them writes
    if published:
        with workspace(target, resumable=True) if first else nullcontext():
            return Journal(work / JOURNAL, earlier).result(HEALED, HealResult)
    cuts = processes.cuts()
    with (
        processes.uncut(),
        workspace(target, resumable=True) if first else nullcontext(),
        _keeping_states(work / "training") as state,
    ):
        if first:
            journal = open_journal(work, job, not resume, AGAIN)
            (state if resume else fresh_folder(state)).mkdir(exist_ok=True)
        teacher = load_native(teacher_source.path, dtype=torch.float32)
        cache = SelfCache(work, json.dumps(_identity(teacher_source)))
        rows, held_out = _texts(settings, tokenizer, teacher, cache, measures, progress)
        student = load(folder, dtype=torch.float32)
        changed, result = train(student, teacher, rows, settings.heal, settings.seed, state, resume, progress, cuts)
        if first:
            staged = fresh_folder(work / "healed")
            write_healed(staged, folder, student, changed, result, settings)
            write_channels(staged, rows, best_device(), progress)
            carry_files(folder, staged)
            if held_out is not None:
                if cuts:
                    teacher = load_native(teacher_source.path, dtype=torch.float32).to(best_device())
                report = _measured(staged, teacher, held_out, settings, progress)
                result = replace(result, report=report, contamination=contamination(held_out, [rows]))
            _describe(staged, folder, result, settings, carried)
            journal.record(HEALED, asdict(result))
            publish(staged, target, journal)
    return result


def healing_recipe(
    recipe: str | Path | Recipe | None,
    data: str | None,
    tokens: int | None,
    eval_data: str | None,
    eval_tokens: int | None,
    max_perplexity_increase: float | None,
    seed: int | None,
) -> tuple[Recipe, bool]:
    """The recipe of a healing from the arguments of `heal`, which see, and whether its result is measured."""
    settings = load_recipe(
        recipe,
        heal__tokens=tokens,
        heal__data=data,
        evaluation__data=eval_data,
        evaluation__tokens=eval_tokens,
        evaluation__max_perplexity_increase=max_perplexity_increase,
        seed=seed,
    )
    return settings, eval_data is not None or settings.evaluation.max_perplexity_increase is not None


def heal_job(checkpoint: Path, source: Source, settings: Recipe) -> dict[str, Any]:
    """What decides the weights of a healed checkpoint."""
    return flat(
        {
            "command": COMMAND,
            "checkpoint": sha256(checkpoint / MANIFEST),
            "source": _identity(source),
            **versions(),
            "device": best_device().type,
            "seed": settings.seed,
            "heal": settings.heal.model_dump(mode="json"),
            "text": {part.data: content_of(part.data) for part in parts_of(settings.heal.data)},
            # it saves states of its own, one part per process
            **({"deepspeed": f"{processes.count()} processes"} if processes.partitions() else {}),
        }
    )


def _identity(source: Source) -> dict[str, Any]:
    """What tells one teacher from another: its commit, or the content of a local folder's weights, wherever it lies."""
    if source.commit is not None:
        return {"name": source.name, "commit": source.commit}
    return {"files": {file: content_of(str(source.path / file)) for file in source.file_bytes}}


def check_earlier(earlier: dict[str, Any], job: dict[str, Any], work: Path, resume: bool) -> None:
    """Refuse to resume what is not there or was another job, and to begin where another command's work lies; nothing is touched.

    Raises:
        UsageError: there is nothing to resume.
        UnfinishedWorkError: the work is of a job with other settings, or of another command; the first field is named.
    """
    if resume and JOB not in earlier:
        raise UsageError("there is nothing to resume", f"{work} holds no unfinished work", "run the command without --resume")
    if resume:
        check_same(earlier[JOB], job, work, AGAIN)
    elif JOB in earlier:
        own = {"command": COMMAND}
        check_same({"command": earlier[JOB].get("command")}, own, work, "remove that folder, or choose another output")


def check_heal(folder: Path, target: Path, source: Source, settings: Recipe, measures: bool, resume: bool, overwrite: bool) -> Any:
    """Everything that can be refused before a weight is read, but for earlier work; returns the checkpoint's tokenizer.

    Args:
        folder: the checkpoint.
        target: the output.
        source: of the checkpoint, as far as its headers.
        settings, measures: see `healing_recipe`.
        resume, overwrite: as for `heal`.

    Raises:
        KVShareError: see `heal`.
    """
    processes.require_known_launcher()
    overwrite = overwrite or (resume and is_published(target, read_journal(work_folder(target) / JOURNAL)))
    texts = [settings.heal.data, *([settings.evaluation.data] if measures else [])]
    if verify(folder).form == "exact" or family_of(str(read_json(folder / "config.json").get("model_type"))).tied:
        raise UsageError(
            f"{folder} has nothing to heal",
            "its weights are its source's own: it computes what the teacher computes",
            "use it as it is, or heal what `--init svd` made",
        )
    check_output(target, folder, overwrite)
    for text in texts:
        check_data(text)
    check_output(target, source.path, overwrite)
    check_space(target, healing_disk(folder, settings))
    tokenizer = load_tokenizer(folder)
    for text in texts:
        check_tokenizer(tokenizer, text)
    vocabulary = read_json(folder / "config.json").get("vocab_size")
    if source.config.get("vocab_size") != vocabulary:
        raise UsageError(
            f"{source.name} cannot teach {folder}",
            f"its vocabulary has {source.config.get('vocab_size')} tokens, the checkpoint's {vocabulary}",
            "give the model that the checkpoint was converted from",
        )
    check_healing(settings.heal, family_of(source.model_type))
    return tokenizer


def healing_disk(checkpoint: Path, settings: Recipe) -> int:
    """The most bytes on the disk at one time: the result, saved states, and what is kept of the teacher's probabilities."""
    weights = sum((checkpoint / file).stat().st_size for file in weight_files(checkpoint))
    return 2 * weights + kept_bytes(settings.heal, read_json(checkpoint / "config.json"))


def _texts(
    settings: Recipe, tokenizer: Any, teacher: Any, cache: SelfCache, measures: bool, progress: Progress
) -> tuple[Tensor, Tensor | None]:
    """The rows of training, in every process, and the held-out ones in the first, if the result is to be measured."""
    held_out = None
    if processes.is_first():
        if measures:
            held_out = evaluation_rows(settings.evaluation, tokenizer, teacher, settings.seed, progress)
        rows = heal_rows(settings, tokenizer, teacher, progress, cache)
    processes.meet()  # what the teacher wrote lies there for all
    return (rows if processes.is_first() else heal_rows(settings, tokenizer, teacher, progress, cache)), held_out


@contextmanager
def _keeping_states(state: Path) -> Iterator[Path]:
    """Whatever goes wrong, a state that was saved is worth going on with."""
    try:
        yield state
    except KVShareError as error:
        error.keeps_work = error.keeps_work or newest_state(state) is not None
        raise


def _measured(staged: Path, teacher: Any, rows: Tensor, settings: Recipe, progress: Progress) -> Report:
    """The measurement of what is about to be published; config.json says on which text, so that the card can.

    Raises:
        QualityError: the result does not pass the quality gate; the finished training can be resumed with another.
    """
    report = measure(staged, teacher, rows, settings.evaluation.data, progress)
    check_quality(
        report,
        settings.evaluation,
        f"and the work is kept in {staged.parent}",
        "heal on more tokens or other text; the same command with --resume and a higher limit publishes this result",
        keeps_work=True,
    )
    config = read_json(staged / "config.json")
    config["kvshare"]["evaluation"] = settings.evaluation.model_dump(mode="json", exclude={"max_perplexity_increase"}) | {
        "seed": settings.seed
    }
    write_json(staged / "config.json", config)
    return report


def _describe(staged: Path, checkpoint: Path, result: HealResult, settings: Recipe, carried: dict[str, Any]) -> None:
    """Write report and card; of the checkpoint's own figures those stay that are not of its weights."""
    measured: dict[str, Any] = {} if result.report is None else result.report.to_dict()
    if result.contamination is not None:
        measured["contamination"] = result.contamination.to_dict()
    report = {**measured, "heal": result.to_dict(), **carried}
    write_json(staged / "report.json", report)
    matter = with_datasets(front_matter(checkpoint / "README.md"), settings, heals=True)
    write_files(staged, card_files(read_json(staged / "config.json"), matter, report))


def heal_rows(recipe: Recipe, tokenizer: Any, teacher: Any, progress: Progress, cache: SelfCache | None = None) -> Tensor:
    """The rows that healing trains on, token ids (rows, length) in the order of training."""
    settings = recipe.heal
    length, seed = settings.sequence_length, recipe.seed + 1
    return load_rows(settings.data, tokenizer, teacher, settings.tokens, length, seed, repeat=True, progress=progress, cache=cache)


def heal_into(
    staged: Path, checkpoint: Path, teacher: Any, rows: Tensor, recipe: Recipe, state: Path, resume: bool, progress: Progress
) -> HealResult:
    """Train, and write weights, config and channels into `staged`; see `train`, `write_healed` and `write_channels`."""
    student = load(checkpoint, dtype=torch.float32)
    changed, result = train(student, teacher, rows, recipe.heal, recipe.seed, state, resume, progress)
    write_healed(staged, checkpoint, student, changed, result, recipe)
    write_channels(staged, rows, best_device(), progress)
    return result


def write_healed(
    staged: Path, checkpoint: Path, student: Any, changed: dict[str, Tensor], result: HealResult, recipe: Recipe
) -> None:
    """Write weights and config into `staged`; every tensor that was not trained is copied byte for byte."""
    from kvshare.runtime.kvshare_projections import as_native

    specs = read_tensor_specs(checkpoint, weight_files(checkpoint))
    # a base model's checkpoint lacks the first part of each name
    bare = f"{student.base_model_prefix}."
    family, config = family_of(student.config.model_type), read_json(checkpoint / "config.json")
    geometry = geometry_of(config, family, str(checkpoint))
    changed |= as_native(student, changed)
    if not family.fused:
        for name in [name for name in changed if f".{family.k}." in name]:
            if family.kv_heads is not None:
                changed[name] = repeat_heads(changed[name], geometry.head_dim, geometry.kv_heads)
            if name.endswith(".weight"):
                changed[name.replace(f".{family.k}.", f".{family.v}.")] = changed[name]
    changed = {name if name in specs else name.removeprefix(bare): value for name, value in changed.items()}
    writer = WeightWriter(staged, [OutputTensor(s.name, s.dtype, s.shape, s.file) for s in specs.values()])
    for spec in specs.values():
        if spec.name in changed:
            writer.put(spec.name, changed[spec.name])
        else:
            writer.copy(spec, checkpoint)
    writer.finish()
    block = read_block(checkpoint)
    config["kvshare"] = {
        **{key: value for key, value in block.items() if key != "evaluation"},
        "healed_tokens": block.get("healed_tokens", 0) + result.tokens,
        "heal": recipe.heal.model_dump(mode="json"),
        "healed_with": versions(),
    }
    write_json(staged / "config.json", config)
    reload(staged, {spec.name: (spec.dtype, spec.shape) for spec in specs.values()}, changed.keys() & specs.keys())


def carry_files(checkpoint: Path, staged: Path) -> None:
    """Copy the small files of a checkpoint that are not there yet: tokenizer, runtime, card, but not its channels, which are
    those of other weights. Where there is a manifest, those that it names, and nothing that someone has put beside them.
    """
    known = listed_files(checkpoint) if is_file(checkpoint / MANIFEST) else {file.name for file in checkpoint.iterdir()}
    for name in sorted({*known} - {*weight_files(checkpoint), INDEX, MANIFEST, CHANNELS}):
        if is_file(checkpoint / name) and not (staged / name).exists():
            shutil.copyfile(checkpoint / name, staged / name)
