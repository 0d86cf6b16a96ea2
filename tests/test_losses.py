"""Terms of the loss by their identities: nothing against itself, known values, gradients, and no work for a weight of 0."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kvshare.losses import (
    attention_loss,
    attention_outputs,
    distillation_loss,
    loss_terms,
    next_token_loss,
    term_weights,
    weighted,
)
from kvshare.sections import Heal

VOCABULARY, WIDTH = 11, 6
IDS = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))


def heal(**terms: float) -> Heal:
    return Heal.model_validate(terms)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return states @ self.weight, None


class Model(nn.Module):
    """Two attention modules in a row."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.attention = nn.ModuleList([Attention(), Attention()])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        states = self.embedding(input_ids)
        for attention in self.attention:
            states = states + attention(states)[0]
        return SimpleNamespace(logits=self.head(states))


def pairs(student: Model, teacher: Model) -> list[tuple[nn.Module, nn.Module]]:
    return list(zip(student.attention, teacher.attention, strict=True))


def test_the_divergence_is_what_it_is_called() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, VOCABULARY), torch.randn(2, 5, VOCABULARY)
    kl = torch.distributions.kl_divergence
    for temperature in (1.0, 2.5):
        given, wanted = (torch.distributions.Categorical(logits=x / temperature) for x in (student, teacher))
        torch.testing.assert_close(distillation_loss(student, teacher, temperature), temperature**2 * kl(wanted, given).mean())
        assert distillation_loss(teacher, teacher, temperature).abs() < 1e-6
        assert distillation_loss(teacher + 3.0, teacher, temperature).abs() < 1e-6  # logits are known up to a constant


def test_the_cross_entropy_is_of_the_next_token() -> None:
    torch.testing.assert_close(next_token_loss(torch.zeros(2, 5, VOCABULARY), IDS), torch.tensor(math.log(VOCABULARY)))
    knowing = 100.0 * nn.functional.one_hot(IDS, VOCABULARY).float().roll(-1, 1)
    assert next_token_loss(knowing, IDS) < 1e-6
    assert next_token_loss(knowing.roll(1, 1), IDS) > 10


def test_the_error_of_attention_is_relative() -> None:
    wanted = [torch.randn(2, 5, WIDTH), 1000 * torch.randn(2, 5, WIDTH)]
    assert attention_loss(wanted, wanted) == 0
    assert attention_loss([torch.zeros_like(x) for x in wanted], wanted) == 1
    torch.testing.assert_close(attention_loss([1.5 * wanted[0], wanted[1]], wanted), torch.tensor(0.125))


@pytest.mark.parametrize("term", ["kl", "cross_entropy", "attention"])
def test_gradients_reach_the_student_alone(term: str) -> None:
    student, teacher = Model(0), Model(1)
    terms = loss_terms(
        student, teacher, {"input_ids": IDS}, heal(cross_entropy=1.0, attention_matching=1.0), pairs(student, teacher)
    )
    terms[term].backward()
    assert all(value.grad is None for value in teacher.parameters())
    for attention in student.attention:
        assert attention.weight.grad.abs().sum() > 0
    assert (student.head.weight.grad is None) == (term == "attention")


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    student, teacher = Model(3), Model(3)
    terms = loss_terms(student, teacher, {"input_ids": IDS}, heal(attention_matching=2.0), pairs(student, teacher))
    assert list(terms) == ["kl", "attention"]
    loss = weighted(terms, heal(attention_matching=2.0))
    loss.backward()
    assert loss.abs() < 1e-6
    assert all(value.grad is None or value.grad.abs().max() < 1e-6 for value in student.parameters())


def test_the_sum_is_weighted() -> None:
    terms = {"kl": torch.tensor(1.0), "cross_entropy": torch.tensor(10.0), "attention": torch.tensor(100.0)}
    assert weighted(terms, heal(cross_entropy=0.5, attention_matching=0.25)) == 31
    assert term_weights(heal()) == {"kl": 1.0}


def test_a_weight_of_0_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a term that does not count was computed")

    for name in ("next_token_loss", "attention_loss"):
        monkeypatch.setattr(f"kvshare.losses.{name}", never)
    student, teacher = Model(0), Model(1)
    for attention in (*student.attention, *teacher.attention):
        monkeypatch.setattr(attention, "register_forward_hook", never)
    assert list(loss_terms(student, teacher, {"input_ids": IDS}, heal(), pairs(student, teacher))) == ["kl"]
    with pytest.raises(AssertionError, match="does not count"):
        loss_terms(student, teacher, {"input_ids": IDS}, heal(cross_entropy=0.1), pairs(student, teacher))


def test_outputs_are_taken_within_only() -> None:
    model = Model(0)
    with attention_outputs(list(model.attention)[::-1]) as outputs:
        model(IDS, use_cache=False)
        second, first = outputs
    states = model.embedding(IDS)
    torch.testing.assert_close(first, states @ model.attention[0].weight)
    torch.testing.assert_close(second, (states + first) @ model.attention[1].weight)
    assert not any(attention._forward_hooks for attention in model.attention)
