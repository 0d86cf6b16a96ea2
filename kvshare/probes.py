"""What an evaluation measures when asked: context lengths, recall, passkey, tasks.

In: settings, text, a model at a time. Out: what each model did, then figures side by side with the source's.
Never: loads a model, keeps one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kvshare.data import rows_per_forward
from kvshare.errors import UsageError
from kvshare.figures import perplexities, share_and_error
from kvshare.loading import Forward
from kvshare.positions import ContextFigures, window_losses
from kvshare.progress import Progress
from kvshare.recipe import Probes
from kvshare.retrieval import (
    DEPTHS,
    RECALL_PAIRS,
    PasskeyFigures,
    Prompt,
    RecallFigures,
    answered,
    passkey_prompts,
    recall_prompts,
)
from kvshare.tasks import TaskFigures, TaskValue, check_tasks, run_tasks, side_by_side


@dataclass(frozen=True)
class Material:
    """What every model is given: `rows` for sliding windows (None without contexts), prompts by pairs and by context, depth."""

    settings: Probes
    seed: int
    tokenizer: Any
    rows: Tensor | None
    recall: dict[int, list[Prompt]]
    passkey: dict[tuple[int, float], list[Prompt]]


@dataclass(frozen=True)
class Answers:
    """What one model did with it: losses (rows,) and scored tokens per row by context, right answers (prompts,), task values."""

    windows: dict[int, tuple[Tensor, int]]
    recall: dict[int, Tensor]
    passkey: dict[tuple[int, float], Tensor]
    tasks: tuple[TaskValue, ...]


@dataclass(frozen=True)
class Probed:
    """Figures of a checkpoint beside those of its source; what was not asked for is empty."""

    contexts: tuple[ContextFigures, ...] = ()
    recall: tuple[RecallFigures, ...] = ()
    passkey: tuple[PasskeyFigures, ...] = ()
    tasks: tuple[TaskFigures, ...] = ()


def check_probes(settings: Probes, longest: int) -> None:
    """Refuse what cannot be measured, before anything is spent on it.

    Args:
        settings: what is asked for.
        longest: the most tokens that all models take.

    Raises:
        UsageError: a context beyond that, a task that lm-eval does not know, or no lm-eval.
    """
    for context in settings.contexts:
        if context > longest:
            raise UsageError(
                f"contexts of {context} tokens cannot be measured",
                f"the models take {longest} at most (max_position_embeddings)",
                f"give contexts up to {longest}",
            )
    if settings.tasks:
        check_tasks(settings.tasks)


def prepare(
    settings: Probes, read: Callable[[int], Tensor], tokenizer: Any, default_context: int, longest: int, seed: int
) -> Material:
    """Text and prompts, the same for every model.

    Args:
        settings: what is asked for.
        read: the rows of held-out text of a given length.
        tokenizer: of all models.
        default_context: of the passkey where no contexts are given.
        longest: the most tokens that all models take.
        seed: of keys, values and numbers.

    Raises:
        UsageError: text too short for the longest context, or a tokenizer that no prompts can be made with.
    """
    rows = read(2 * max(settings.contexts)) if settings.contexts else None
    pairs = [count for count in RECALL_PAIRS if 2 * count + 3 <= longest] if settings.recall else []
    contexts = (settings.contexts or (min(default_context, longest),)) if settings.passkey else ()
    return Material(
        settings,
        seed,
        tokenizer,
        rows,
        {count: recall_prompts(tokenizer, count, settings.recall, seed) for count in pairs},
        {
            (context, depth): passkey_prompts(tokenizer, context, depth, settings.passkey, seed)
            for context in contexts
            for depth in DEPTHS
        },
    )


def probe(model: Any, forward: Forward, material: Material, progress: Progress) -> Answers:
    """Give one model all of the material; `forward` is how it is run."""
    device, vocabulary = next(model.parameters()).device, int(model.config.vocab_size)

    def right(prompts: list[Prompt]) -> Tensor:
        length = max(len(prompt.ids) + len(prompt.answer) for prompt in prompts)
        return answered(forward, prompts, device, rows_per_forward(length, vocabulary))

    windows, found, keys = {}, {}, {}
    if material.rows is not None:
        for context in material.settings.contexts:
            stride = max(1, context // 2)
            windows[context] = window_losses(forward, material.rows, context, stride, vocabulary, device, progress)
    for done, (pairs, prompts) in enumerate(material.recall.items(), 1):
        found[pairs] = right(prompts)
        progress("measuring recall", done, len(material.recall))
    for done, (place, prompts) in enumerate(material.passkey.items(), 1):
        keys[place] = right(prompts)
        progress("measuring passkey", done, len(material.passkey))
    names = material.settings.tasks
    return Answers(windows, found, keys, run_tasks(model, material.tokenizer, names, forward) if names else ())


def compare_answers(model: Answers, source: Answers, material: Material) -> Probed:
    """What a checkpoint did beside what its source did with the same material."""
    contexts = [
        ContextFigures(**asdict(perplexities(loss, source.windows[context][0])), context=context, tokens=len(loss) * scored)
        for context, (loss, scored) in model.windows.items()
    ]
    found = [
        RecallFigures(pairs, len(right), material.seed, *share_and_error(right), *share_and_error(source.recall[pairs]))
        for pairs, right in model.recall.items()
    ]
    keys = [
        PasskeyFigures(*place, len(right), material.seed, *share_and_error(right), *share_and_error(source.passkey[place]))
        for place, right in model.passkey.items()
    ]
    return Probed(tuple(contexts), tuple(found), tuple(keys), side_by_side(model.tasks, source.tasks))
