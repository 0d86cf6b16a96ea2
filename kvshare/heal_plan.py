"""What a healing would do, before anything is read but headers.

In: the arguments of `heal`. Out: a `HealPlan`, as `kvshare heal --dry-run` prints it; or the refusal that `heal` would give.
Never: reads weights to compute with them, downloads those of a Hub model, writes anything.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvshare.checkpoint import work_folder
from kvshare.duration import estimate_seconds
from kvshare.healing import check_earlier, check_heal, heal_job, healing_disk, healing_recipe
from kvshare.hub import describe
from kvshare.journal import JOURNAL, read_journal
from kvshare.loading import outline
from kvshare.memory import healing_memory
from kvshare.planning import make_plan
from kvshare.recipe import Recipe
from kvshare.training import batch_rows, count_trained


@dataclass(frozen=True)
class HealPlan:
    """What a healing would do.

    `parameters` and `trained` are numbers, the latter with those of adapters; `rows_per_step` rows of `sequence_length` tokens make
    one of the `steps`; `teacher_top_k` is how many of the source's probabilities are kept, None where it runs beside the student;
    `held_out` is the text of the measurement, None where nothing is measured; `memory_bytes` is of each process; `seconds` are
    by stage, of one process.
    """

    checkpoint: str
    source: str
    parameters: int
    trained: int
    data: str
    tokens: int
    sequence_length: int
    rows_per_step: int
    steps: int
    teacher_top_k: int | None
    held_out: str | None
    held_out_tokens: int
    disk_bytes: int
    memory_bytes: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return asdict(self)


def plan_heal(
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
) -> HealPlan:
    """What `heal` would do with the same arguments, which see there.

    Raises:
        KVShareError: what `heal` would refuse before it reads a weight.
    """
    settings, measures = healing_recipe(recipe, data, tokens, eval_data, eval_tokens, max_perplexity_increase, seed)
    folder, target, teacher = Path(checkpoint), Path(output), describe(source)
    check_heal(folder, target, teacher, settings, measures, resume, overwrite)
    work = work_folder(target)
    earlier = read_journal(work / JOURNAL)
    # to know a job again takes reading all weights of a source that has no commit; there may be nothing to hold it against
    check_earlier(earlier, heal_job(folder, teacher, settings) if earlier else {}, work, resume)
    heal, student = settings.heal, outline(folder)
    length, vocabulary = heal.sequence_length, int(student.config.vocab_size)
    rows = max(1, heal.tokens // length)
    batch, _ = batch_rows(heal, length, vocabulary, rows)
    trained, parameters = count_trained(student, heal)
    return HealPlan(
        str(folder),
        teacher.name,
        parameters,
        trained,
        heal.data,
        rows * length,
        length,
        batch,
        math.ceil(rows / batch),
        heal.teacher_top_k,
        settings.evaluation.data if measures else None,
        settings.evaluation.tokens if measures else 0,
        healing_disk(folder, settings),
        healing_memory(parameters, trained),
        estimate_seconds(make_plan(teacher, _as_conversion(settings, measures))),
    )


def _as_conversion(settings: Recipe, measures: bool) -> Recipe:
    """The conversion that has the same stages, and whose merge takes next to nothing."""
    evaluation = settings.evaluation.model_copy(update={"mode": "whole" if measures else "off"})
    heal = settings.heal.model_copy(update={"enabled": True})
    changes = {"init": "mean", "kv_heads": "all", "cache_budget": None, "heal": heal, "evaluation": evaluation}
    return settings.model_copy(update=changes)
