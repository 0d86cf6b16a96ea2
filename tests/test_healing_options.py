"""What a recipe may choose for healing: what is trained, in what precision, who is told, and a teacher that is asked once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_healing import small
from transformers import TrainerCallback

import kvshare
from kvshare.checkpoint import work_folder
from kvshare.distillation import hold_once
from kvshare.errors import NoSpaceError, UsageError
from kvshare.families import family_of
from kvshare.heal_plan import plan_heal
from kvshare.loading import load, load_native, outline
from kvshare.losses import distillation_loss, loss_terms, partial_divergence
from kvshare.recipe import load_recipe
from kvshare.targets import make_targets
from kvshare.training import _with_adapters, count_trained


@pytest.mark.parametrize(
    ("key", "chosen"),
    [
        ("qwen3", {"shared": "lora", "norms": True}),
        ("qwen3", {"attention": "full"}),
        ("gpt2", {"attention": "full", "norms": True}),
    ],
    ids=str,
)
def test_what_is_trained(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    key: str,
    chosen: dict[str, Any],
) -> None:
    folder, recipe = converted_folder(key), small(tmp_path, **chosen)
    kvshare.heal(folder, tmp_path / "out", source_folder(key), text_file, recipe=recipe)
    kvshare.verify(tmp_path / "out")
    kvshare.load(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    moved = {name: (after[name] - before[name]).float() for name in before if not torch.equal(before[name], after[name])}
    family = family_of(json.loads((folder / "config.json").read_text())["model_type"])
    norms = {name for name in before if "norm" in name or ".ln_" in name}
    assert norms
    assert norms & moved.keys() == (norms if chosen.get("norms") else set())
    assert not {name for name in moved if any(part in name for part in ("embed", "lm_head", "wte", "wpe"))}
    ranks = {part: int(torch.linalg.matrix_rank(moved[family.weight(1, part)], rtol=1e-3)) for part in ("k", "o")}
    for part, rank in ranks.items():
        in_full = chosen.get("shared", "full") == "full" and (part == "k" or "attention" in chosen)
        assert (rank > 4) is in_full, ranks  # LoRA is of rank 2, and c_attn holds the keys twice


def test_a_fused_tensor_is_not_trained_through_lora(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    folder, source, recipe = converted_folder("gpt2"), source_folder("gpt2"), small(tmp_path, shared="lora")
    with pytest.raises(UsageError, match=r"heal\.shared"):
        kvshare.heal(folder, tmp_path / "out", source, text_file, recipe=recipe)
    with pytest.raises(UsageError, match=r"heal\.shared"):
        kvshare.convert(source, tmp_path / "out", recipe=recipe)


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"compile": True}], ids=str)
def test_forwards_in_other_ways_give_nearly_the_same(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    folder, sources = converted_folder("llama-gqa"), (source_folder("llama-gqa"), text_file)
    compiled, original = [], torch.compile

    def compile_eagerly(model: Any, **_: Any) -> Any:
        compiled.append(model)
        return original(model, backend="eager")

    monkeypatch.setattr("torch.compile", compile_eagerly)
    plain = kvshare.heal(folder, tmp_path / "a", *sources, recipe=small(tmp_path))
    assert not compiled
    other = kvshare.heal(folder, tmp_path / "b", *sources, recipe=small(tmp_path, **changes))
    assert bool(compiled) is ("compile" in changes)
    tolerance = 0.05 if "dtype" in changes else 1e-5
    assert [loss for _, loss in other.losses] == pytest.approx([loss for _, loss in plain.losses], rel=tolerance)
    assert (other.losses != plain.losses) is ("dtype" in changes)
    kvshare.verify(tmp_path / "b")


def test_trackers_are_told_every_term(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logged.append(dict(logs))

    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setitem(transformers_trackers(), "wandb", Tracker)
    recipe = small(tmp_path, report_to=["wandb"], cross_entropy=0.5)
    result = kvshare.heal(converted_folder("qwen2"), tmp_path / "out", source_folder("qwen2"), text_file, recipe=recipe)
    steps = [entry for entry in logged if "kl" in entry]
    assert len(steps) == result.steps == 8  # the trial before the first step is not reported
    assert [entry["loss"] for entry in steps] == pytest.approx([entry["kl"] + 0.5 * entry["cross_entropy"] for entry in steps])


def transformers_trackers() -> dict[str, Any]:
    from transformers.integrations import integration_utils

    return integration_utils.INTEGRATION_TO_CALLBACK


@pytest.mark.parametrize(("name", "named"), [("wandbb", "which is not there"), ("tensorboard", "TENSORBOARD_LOGGING_DIR")])
def test_trackers_that_cannot_be_used_are_refused(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    named: str,
) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    recipe, folder = small(tmp_path, report_to=[name]), converted_folder("qwen2")
    with pytest.raises(UsageError, match=named):
        kvshare.heal(folder, tmp_path / "out", source_folder("qwen2"), text_file, recipe=recipe)
    with pytest.raises(UsageError, match=named):
        kvshare.convert(source_folder("qwen2"), tmp_path / "out", recipe=recipe)
    assert not work_folder(tmp_path / "out").exists()


def test_what_both_models_have_is_held_once(converted_folder: Callable[..., Path], source_folder: Callable[[str], Path]) -> None:
    student = load(converted_folder("llama-gqa"), dtype=torch.float32).requires_grad_(False)
    teacher = load_native(source_folder("llama-gqa"), dtype=torch.float32)
    own = {name: value.clone() for name, value in student.state_dict().items()}
    hold_once(student, teacher)
    assert all(torch.equal(value, own[name]) for name, value in student.state_dict().items())
    lying = {value.data_ptr() for value in teacher.parameters()}
    apart = {name for name, value in student.named_parameters() if value.data_ptr() not in lying}
    assert apart
    assert all(".self_attn." in name for name in apart)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_divergence_of_the_most_probable_and_the_rest(
    k: int, temperature: float, source_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    logits, others = torch.randn(2, 3, 40, dtype=torch.float64) * 4, torch.randn(2, 3, 40, dtype=torch.float64) * 4
    known, tokens = torch.log_softmax(logits / temperature, -1).topk(k, -1)
    rest = torch.log1p(-known.exp().sum(-1, keepdim=True).clamp(max=1))
    student = others.requires_grad_()
    found = partial_divergence(student, tokens, torch.cat([known, rest], -1).float(), temperature)
    whole = distillation_loss(student, logits, temperature)
    gradient, whole_gradient = (torch.autograd.grad(loss, student)[0] for loss in (found, whole))
    found, whole = found.detach(), whole.detach()
    assert torch.isfinite(gradient).all()
    if k == 40:
        assert float(found) == pytest.approx(float(whole), rel=1e-5)
        torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)
    else:
        assert 0 < float(found) < float(whole)
        assert float(partial_divergence(logits, tokens, torch.cat([known, rest], -1).float(), temperature)) == pytest.approx(
            0, abs=1e-5
        )


def test_a_teacher_that_is_asked_once_teaches_the_same(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, sources = converted_folder("llama-gqa", 2), (source_folder("llama-gqa"), text_file)
    live = kvshare.heal(folder, tmp_path / "live", *sources, recipe=small(tmp_path))
    asked = most = 0
    work = work_folder(tmp_path / "kept")

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal asked, most
        asked += stage == "asking the source"
        most = max(most, sum(file.stat().st_size for file in work.rglob("*") if file.is_file()))
        if stage == "healing" and done == 5:
            raise KeyboardInterrupt

    recipe = small(tmp_path, teacher_top_k=5_000)  # more than the vocabulary
    with pytest.raises(KeyboardInterrupt):
        kvshare.heal(folder, tmp_path / "kept", *sources, recipe=recipe, progress=stop)
    assert asked
    planned = plan_heal(folder, tmp_path / "plan", *sources, recipe=recipe)
    weights = (folder / "model.safetensors").stat().st_size
    assert most > 2_048 * 4 * (2 * 4_096 + 1)  # what is kept of the teacher
    assert most + weights < planned.disk_bytes == 2 * weights + 2_048 * 4 * (2 * 4_096 + 1)
    monkeypatch.setattr("kvshare.targets._write", None)  # the files are there
    kept = kvshare.heal(folder, tmp_path / "kept", *sources, recipe=recipe, resume=True)
    assert [loss for _, loss in kept.losses] == pytest.approx([loss for _, loss in live.losses], rel=1e-4)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "kept"))
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=2e-2) for name in first)
    monkeypatch.undo()
    few = kvshare.heal(folder, tmp_path / "few", *sources, recipe=small(tmp_path, teacher_top_k=8))
    assert 0 < few.losses[0][1] < live.losses[0][1]


def test_what_is_kept_is_what_the_teacher_says(source_folder: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = load_native(source_folder("tiny"), dtype=torch.float32)
    rows = torch.randint(4_096, (3, 32), generator=torch.Generator().manual_seed(0))
    targets = make_targets(tmp_path / "teacher", teacher, rows, 7, 2.0, lambda *_: None)
    with torch.no_grad():
        wanted = torch.log_softmax(teacher(input_ids=rows).logits / 2, -1)
    torch.testing.assert_close(targets.log_probabilities[..., :-1], wanted.topk(7, -1).values)
    torch.testing.assert_close(targets.log_probabilities.exp().sum(-1), torch.ones(3, 32))
    torch.testing.assert_close(wanted.gather(-1, targets.tokens.long()), targets.log_probabilities[..., :-1])
    assert sum(file.stat().st_size for file in (tmp_path / "teacher").iterdir()) == 3 * 32 * (7 * 4 + 8 * 4)


def test_kept_probabilities_and_attention_outputs_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="attention_matching"):
        load_recipe(load_recipe("half"), heal__teacher_top_k=8, heal__attention_matching=1.0)


def test_a_loss_without_terms_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to minimise"):
        load_recipe("half", heal__kl=0.0)
    assert load_recipe("half", heal__kl=0.0, heal__cross_entropy=1.0).heal.kl == 0


def test_a_term_that_does_not_count_is_not_computed(source_folder: Callable[[str], Path]) -> None:
    student = load_native(source_folder("llama-gqa"), dtype=torch.float32)
    settings = load_recipe("half", heal__kl=0.0, heal__cross_entropy=1.0).heal
    assert list(loss_terms(student, None, {"input_ids": torch.arange(8)[None]}, settings, [])) == ["cross_entropy"]


@pytest.mark.parametrize(
    ("key", "chosen"), [("qwen3", {"shared": "lora", "norms": True}), ("gpt2", {"attention": "full"}), ("llama-gqa", {})], ids=str
)
def test_what_will_be_trained_is_counted_without_weights(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, key: str, chosen: dict[str, Any]
) -> None:
    folder, recipe = converted_folder(key), load_recipe(small(tmp_path, **chosen))
    student = load(folder)
    whole = sum(value.numel() for value in student.parameters())
    adapted = _with_adapters(student, recipe.heal, family_of(student.config.model_type))
    trained = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    assert count_trained(outline(folder), recipe.heal) == (trained, whole)
    planned = plan_heal(folder, tmp_path / "out", source_folder(key), recipe=recipe, eval_data="self", eval_tokens=512)
    assert (planned.trained, planned.parameters) == (trained, whole)
    assert (planned.data, planned.tokens, planned.steps, planned.rows_per_step) == ("self", 2_048, 8, 4)
    assert (planned.held_out, planned.held_out_tokens, planned.teacher_top_k) == ("self", 512, None)
    assert planned.seconds.keys() == {"starting", "copying", "writing text", "healing", "measuring"}
    assert planned.memory_bytes > 4 * (2 * whole + 4 * trained)


def test_the_disk_has_to_hold_what_is_kept_of_the_teacher(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, source = converted_folder("llama-gqa"), source_folder("llama-gqa")
    recipe = load_recipe(small(tmp_path))
    kept = load_recipe(recipe, heal__teacher_top_k=64)
    weights = (folder / "model.safetensors").stat().st_size
    free = SimpleNamespace(free=2 * weights + 2_048 * 4 * 2 * 64)  # a log probability of all other tokens too little
    monkeypatch.setattr("kvshare.checkpoint.shutil.disk_usage", lambda _: free)
    for act in (kvshare.heal, plan_heal):
        with pytest.raises(NoSpaceError):
            act(folder, tmp_path / "out", source, text_file, recipe=kept)
    assert plan_heal(folder, tmp_path / "out", source, text_file, recipe=recipe).teacher_top_k is None
    assert kvshare.plan(source, recipe=load_recipe("half", heal__teacher_top_k=64)).disk_bytes - kvshare.plan(
        source, recipe="half"
    ).disk_bytes == 655_360 * 4 * (2 * 64 + 1)
