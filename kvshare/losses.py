"""What healing minimises: terms of the distance to the teacher, each with a weight.

In: logits and attention outputs of student and teacher on the same tokens. Out: scalar tensors by the name of the term.
Never: computes a term whose weight is 0, knows how the sum is minimised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.sections import Heal

KL, CROSS_ENTROPY, ATTENTION = "kl", "cross_entropy", "attention"


def term_weights(settings: Heal) -> dict[str, float]:
    """The weights of the terms that count, by name."""
    weights = {KL: settings.kl, CROSS_ENTROPY: settings.cross_entropy, ATTENTION: settings.attention_matching}
    return {name: weight for name, weight in weights.items() if weight > 0}


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean KL(teacher || student) per token in nats, times temperature squared; logits (rows, length, vocabulary)."""
    wanted = torch.log_softmax(teacher.float() / temperature, dim=-1)
    given = torch.log_softmax(student.float() / temperature, dim=-1)
    divergence = nn.functional.kl_div(given, wanted, log_target=True, reduction="sum")
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])


def partial_divergence(student: Tensor, tokens: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """As `distillation_loss`, of the distribution over k tokens and all others together: at most the KL over all tokens.

    Args:
        student: logits (rows, length, vocabulary).
        tokens, log_probabilities: of the teacher, (rows, length, k) and (rows, length, k + 1); see `Targets`.
        temperature: that of the log probabilities.
    """
    given = torch.log_softmax(student.float() / temperature, dim=-1)
    known, others = log_probabilities[..., :-1], log_probabilities[..., -1]
    divergence = (known.exp() * (known - given.gather(-1, tokens))).sum()
    if tokens.shape[-1] < student.shape[-1]:
        rest = given.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        divergence = divergence + (others.exp() * (others - rest)).sum()
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token in nats; logits (rows, length, vocabulary), token ids (rows, length)."""
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of attention outputs relative to the teacher's size, the mean over layers; each (rows, length, hidden)."""
    errors = [
        (given.float() - wanted.float()).square().sum() / wanted.float().square().sum()
        for given, wanted in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


@contextmanager
def attention_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What attention modules give in the forwards within: one tensor (rows, length, hidden) for each, in their order."""
    found: dict[int, Tensor] = {}
    outputs: list[Tensor] = []

    def keep(index: int, output: Any) -> None:
        found[index] = output[0] if isinstance(output, tuple) else output
        if len(found) == len(modules):
            outputs[:] = [found[i] for i in range(len(modules))]

    handles = [
        module.register_forward_hook(lambda _module, _input, output, index=index: keep(index, output))
        for index, module in enumerate(modules)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def loss_terms(
    student: Any, teacher: Any, inputs: Mapping[str, Tensor], settings: Heal, layers: Sequence[tuple[nn.Module, nn.Module]]
) -> dict[str, Tensor]:
    """The terms that count, before their weights.

    Args:
        student, teacher: called with `input_ids`; the teacher without gradients, and not where the inputs hold what it says.
        inputs: `input_ids` (rows, length) and, where they were kept, `tokens` and `log_probabilities` of the teacher.
        settings: weights and temperature.
        layers: the attention modules of student and teacher whose outputs are to match.
    """
    weights = term_weights(settings)
    own, teachers = ([pair[side] for pair in layers] if ATTENTION in weights else [] for side in (0, 1))
    ids, kept = inputs["input_ids"], "tokens" in inputs
    asked = ATTENTION in weights or (KL in weights and not kept)
    with torch.no_grad(), attention_outputs(teachers) as wanted_outputs:
        wanted = teacher(input_ids=ids, use_cache=False).logits if asked else None
    with attention_outputs(own) as outputs:
        logits = student(input_ids=ids, use_cache=False).logits
    terms = {}
    if KL in weights and kept:
        terms[KL] = partial_divergence(logits, inputs["tokens"].long(), inputs["log_probabilities"], settings.temperature)
    elif KL in weights:
        assert wanted is not None
        terms[KL] = distillation_loss(logits, wanted, settings.temperature)
    if CROSS_ENTROPY in weights:
        terms[CROSS_ENTROPY] = next_token_loss(logits, ids)
    if ATTENTION in weights:
        terms[ATTENTION] = attention_loss(outputs, wanted_outputs)
    return terms


def weighted(terms: dict[str, Tensor], settings: Heal) -> Tensor:
    """The sum that is minimised."""
    weights = term_weights(settings)
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()
