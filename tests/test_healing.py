"""Healing lowers the distance to the source, keeps the tie, resumes, and refuses what cannot go well."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
import transformers
import yaml
from common import at_times, edit_json
from safetensors.torch import load_file

import kvshare
from kvshare.checkpoint import work_folder
from kvshare.distillation import diverged, newest_state
from kvshare.errors import QualityError, TrainingError, UsageError
from kvshare.families import PARTS, family_of
from kvshare.journal import versions
from kvshare.losses import distillation_loss
from kvshare.preflight import preflight
from kvshare.recipe import Recipe
from kvshare.sections import Heal
from kvshare.source import read_json
from kvshare.training import batch_rows, rate_for


def short_recipe(folder: Path, **heal: object) -> Path:
    file = folder / "short.yaml"
    settings = {"tokens": 8_192, "batch_tokens": 1_024, "sequence_length": 128, "save_steps": 4, **heal}
    file.write_text(yaml.safe_dump({"heal": settings, "evaluation": {"tokens": 4096}}))
    return file


def small(folder: Path, **heal: object) -> Path:
    """A recipe of 8 steps."""
    settings = {"tokens": 2_048, "batch_tokens": 256, "sequence_length": 64, "lora_rank": 2, "save_steps": 2}
    return short_recipe(folder, **settings | heal)


def refused(action: Callable[[], object], *named: str) -> TrainingError:
    with pytest.raises(TrainingError) as caught:
        action()
    for name in named:
        assert name in str(caught.value)
    return caught.value


def fails(*_: object, **__: object) -> None:
    raise RuntimeError("this machine cannot")


def test_healing_brings_a_trained_model_closer(
    converted_folder: Callable[..., Path], tmp_path: Path, own_text: tuple[str, str]
) -> None:
    broken = converted_folder("tiny", 1)
    recipe = short_recipe(tmp_path, tokens=6_144)
    heal, val = own_text
    result = kvshare.heal(broken, tmp_path / "healed", "kvshare/tiny", heal, recipe=recipe, eval_data=val, eval_tokens=2048)
    before, after = kvshare.evaluate(broken, "kvshare/tiny", val, tokens=2048), result.report
    assert after is not None
    assert after.kl < 0.9 * before.kl
    assert result.tokens == 6_144
    assert after.cache_bytes_per_token == before.cache_bytes_per_token


@pytest.mark.parametrize(
    "key", ["llama-gqa", "qwen2", "smollm3", "phi", "gpt2", "phi3", "gemma3_text", "glm", *at_times("mistral", "qwen3")]
)
def test_the_tie_holds_and_embeddings_stay(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str, key: str
) -> None:
    folder = converted_folder(key)
    kvshare.heal(folder, tmp_path / "out", source_folder(key), text_file, tokens=2_048, recipe=short_recipe(tmp_path))
    kvshare.verify(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    family = family_of(json.loads((folder / "config.json").read_text())["model_type"])
    assert {family.weight(0, part) for part in PARTS} <= changed
    assert {name for name in before if ".0.mlp." in name and name.endswith("weight")} <= changed
    assert not {name for name in changed if any(part in name for part in ("embed", "norm", "lm_head", "wte", "wpe", "ln_"))}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["kvshare"]["healed_tokens"] == 2_048
    kvshare.load(tmp_path / "out")


@pytest.mark.parametrize("key", ["tiny", "qwen2"])
def test_layers_of_all_forms_keep_theirs(mixed_folder: Callable[[str], Path], tmp_path: Path, text_file: str, key: str) -> None:
    folder = mixed_folder(key)
    source = "kvshare/tiny" if key == "tiny" else folder.parent / "source"
    kvshare.heal(folder, tmp_path / "out", source, text_file, tokens=2_048, recipe=short_recipe(tmp_path))
    kvshare.verify(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    block = json.loads((tmp_path / "out" / "config.json").read_text())["kvshare"]
    assert block["kv_heads"] == json.loads((folder / "config.json").read_text())["kvshare"]["kv_heads"]
    for layer in range(4):
        names = [name for name in before if any(f"layers.{layer}.self_attn.{part}_proj.weight" in name for part in "kv")]
        assert [torch.equal(before[name], after[name]) for name in names] == [layer not in block["layers"]] * 2
        assert not torch.equal(*(tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] for tensors in (before, after)))


def test_resume_continues_to_the_same_weights(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, source, recipe = converted_folder("qwen2"), source_folder("qwen2"), small(tmp_path, save_steps=4)
    found: list[dict[str, float]] = []

    def trial(*arguments: Any) -> dict[str, float]:
        found.append(preflight(*arguments))
        return found[-1] if len(found) < 3 else {"kl": found[-1]["kl"] / 9}  # as another machine might find, but less

    monkeypatch.setattr("kvshare.training.preflight", trial)
    monkeypatch.setattr("kvshare.training.FULL_KL", 0.1)  # above that of the start, so that the rate is made of it
    undisturbed = kvshare.heal(folder, tmp_path / "whole", source, text_file, recipe=recipe)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "healing" and done == 6:
            raise KeyboardInterrupt

    output = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        kvshare.heal(folder, output, source, text_file, recipe=recipe, progress=stop)
    assert not output.exists()
    assert work_folder(output).is_dir()
    with pytest.raises(UsageError, match="seed differs"):
        kvshare.heal(folder, output, source, text_file, recipe=recipe, seed=5, resume=True)
    seen: list[int] = []
    result = kvshare.heal(
        folder,
        output,
        source,
        text_file,
        recipe=recipe,
        resume=True,
        progress=lambda stage, done, total: seen.append(done) if stage == "healing" else None,
    )
    assert min(seen) == 5  # from the state saved at step 4
    assert result.losses == undisturbed.losses
    assert found == [found[0]] * 3
    assert result.learning_rate == undisturbed.learning_rate < 2.8e-3  # the saved state's
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", output))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not work_folder(output).exists()


@pytest.mark.parametrize("key", ["qwen2", "gpt2"])
def test_activations_that_are_computed_again_are_the_same(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
) -> None:
    folder, sources = converted_folder(key), (source_folder(key), text_file)
    recipe = small(tmp_path, attention_matching=0.1)
    calls, attend = 0, torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        return attend(*arguments, **settings)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", counted)
    monkeypatch.setattr("kvshare.healing.write_channels", lambda *_: None)  # it attends as well, once training is done
    plain = kvshare.heal(folder, tmp_path / "a", *sources, recipe=recipe)
    once, calls = calls, 0
    again = kvshare.heal(folder, tmp_path / "b", *sources, recipe=_with(recipe, gradient_checkpointing=True))
    assert calls == 1.5 * once  # teacher and student once, the student once more
    assert [loss for _, loss in again.losses] == pytest.approx([loss for _, loss in plain.losses], rel=1e-5)
    assert again.terms["attention"] == pytest.approx(plain.terms["attention"], rel=1e-5)


def test_a_run_that_is_killed_goes_on_to_the_same_weights(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    folder, source, recipe, output = converted_folder("llama-gqa"), source_folder("llama-gqa"), small(tmp_path), tmp_path / "out"
    undisturbed = kvshare.heal(folder, tmp_path / "whole", source, text_file, recipe=recipe)
    words = ["heal", folder, "-o", output, "--source", source, "--data", text_file, "--recipe", recipe]
    with prepared.started(prepared.COMMAND, *words) as (process, _, said):
        while "\nhealing: 6/8" not in said.read_text():
            assert process.is_alive(), said.read_text()
            time.sleep(0.005)
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    assert kvshare.heal(folder, output, source, text_file, recipe=recipe, resume=True) == undisturbed
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_text_of_self_is_not_written_again(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, source, data = converted_folder("llama-gqa"), source_folder("llama-gqa"), f"self=1,{text_file}=1"
    recipe, output = small(tmp_path), tmp_path / "out"
    undisturbed = kvshare.heal(folder, tmp_path / "whole", source, data, recipe=recipe)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "healing" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvshare.heal(folder, output, source, data, recipe=recipe, progress=stop)
    monkeypatch.setattr("kvshare.data.self_rows", fails)
    assert kvshare.heal(folder, output, source, data, recipe=recipe, resume=True) == undisturbed
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not list(output.glob("*self*"))
    assert "text.txt=1" in (output / "README.md").read_text()
    assert str(Path(text_file).parent) not in (output / "README.md").read_text()


def test_a_result_that_is_not_good_enough_is_not_published(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    folder, source, output = converted_folder("tiny", "all", "mean"), source_folder("tiny"), tmp_path / "out"
    settings: dict[str, Any] = {"recipe": small(tmp_path), "eval_data": text_file, "eval_tokens": 1_024}
    with pytest.raises(QualityError) as caught:
        kvshare.heal(folder, output, source, text_file, **settings, max_perplexity_increase=0.0)
    assert caught.value.exit_code == 6
    assert all(named in str(caught.value) for named in ("+0.00%", "1,022 tokens of text.txt", str(work_folder(output)), "--resume"))
    assert not output.exists()
    trained: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "healing":
            trained.append(done)

    result = kvshare.heal(folder, output, source, text_file, **settings, max_perplexity_increase=1e3, resume=True, progress=note)
    assert not trained
    assert len(result.losses) == result.steps == 8
    measured = kvshare.evaluate(output, source, text_file, tokens=1_024)
    assert result.report is not None
    assert result.report.perplexity_increase == pytest.approx(measured.perplexity_increase, rel=1e-5)
    assert f"{result.report.perplexity_increase:+.2%}" in str(caught.value)
    report = json.loads((output / "report.json").read_text())
    assert report["perplexity"] == result.report.perplexity
    card = (output / "README.md").read_text()
    assert f"| perplexity | {result.report.source_perplexity:.3f}" in card
    assert "--data text.txt --tokens 1024 --seed 0" in card
    assert not work_folder(output).exists()


def test_a_limit_that_is_kept_lets_pass(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    # a limit in the recipe is enough to have the result measured, and figures of an earlier checkpoint do not stay
    limit = {"evaluation": {"tokens": 512, "data": text_file, "max_perplexity_increase": 10.0}}
    recipe = Recipe.model_validate(yaml.safe_load(small(tmp_path).read_text()) | limit)
    source = source_folder("llama-gqa")
    result = kvshare.heal(converted_folder("llama-gqa"), tmp_path / "a", source, text_file, recipe=recipe)
    assert result.report is not None
    assert result.report.tokens == 511
    again = kvshare.heal(tmp_path / "a", tmp_path / "b", source, text_file, recipe=small(tmp_path))
    assert again.report is None
    assert "perplexity" not in json.loads((tmp_path / "b" / "report.json").read_text())
    assert "evaluation" not in json.loads((tmp_path / "b" / "config.json").read_text())["kvshare"]


def test_another_job_is_never_resumed(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, source, output = tmp_path / "text.txt", tmp_path / "source", tmp_path / "out"
    shutil.copyfile(text_file, text)
    shutil.copytree(source_folder("llama-gqa"), source)
    folder, recipe = converted_folder("llama-gqa"), small(tmp_path)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "healing" and done == 3:
            raise KeyboardInterrupt

    def resumed(named: tuple[str, ...], data: object = text, **settings: Any) -> None:
        with pytest.raises(UsageError) as caught:
            kvshare.heal(folder, output, source, str(data), **{"recipe": recipe, "resume": True} | settings)
        for name in named:
            assert name in str(caught.value)
        assert newest_state(work_folder(output) / "training") is not None

    with pytest.raises(KeyboardInterrupt):
        kvshare.heal(folder, output, source, str(text), recipe=recipe, progress=stop)
    resumed(("heal.learning_rate differs", "was None and is now 0.25"), recipe=_with(recipe, learning_rate=0.25))
    resumed(("heal.tokens differs", "was 2048 and is now 4096"), tokens=4_096)
    resumed(("heal.data differs", text_file), data=text_file)
    resumed(("seed differs", "was 0 and is now 5"), seed=5)
    for library in ("kvshare", "torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr("kvshare.healing.versions", lambda library=library: versions() | {library: "9.9"})
            resumed((f"{library} differs", "is now '9.9'"))
    text.write_text("Another text. " * 2_000)
    resumed((f"text.{text} differs",))
    shutil.copyfile(text_file, text)
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    resumed(("source.files.model.safetensors differs",))
    content[-1] ^= 1
    weights.write_bytes(content)
    assert kvshare.heal(folder, output, source, str(text), recipe=recipe, resume=True).steps == 8
    assert read_json(output / "config.json")["kvshare"]["healed_with"] == versions()


def _with(recipe: Path, **heal: object) -> Recipe:
    values = yaml.safe_load(recipe.read_text())
    return Recipe.model_validate(values | {"heal": values["heal"] | heal})


def test_every_term_is_reported_and_lowers_itself(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    folder, source = converted_folder("qwen2", 1), source_folder("qwen2")
    recipe = small(tmp_path, tokens=4_096)
    matched, plain = (
        kvshare.heal(folder, tmp_path / name, source, text_file, recipe=_with(recipe, **terms))
        for name, terms in (("a", {"attention_matching": 30.0, "cross_entropy": 0.5}), ("b", {"attention_matching": 1e-9}))
    )
    assert list(matched.terms) == ["kl", "cross_entropy", "attention"]
    assert list(plain.terms) == ["kl", "attention"]
    assert matched.terms["attention"] < plain.terms["attention"]
    assert json.loads((tmp_path / "a" / "report.json").read_text())["heal"]["terms"] == matched.terms
    last = statistics.fmean(loss for _, loss in matched.losses[-10:])
    terms = matched.terms
    assert last == pytest.approx(terms["kl"] + 0.5 * terms["cross_entropy"] + 30 * terms["attention"], rel=1e-5)
    last = statistics.fmean(loss for _, loss in plain.losses[-10:])
    assert last == pytest.approx(plain.terms["kl"], rel=1e-5)


def test_a_single_step_trains(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    """The rate begins at nothing where it has steps to rise in."""
    folder, recipe = converted_folder("llama-gqa"), small(tmp_path, tokens=256)
    kvshare.heal(folder, tmp_path / "healed", source_folder("llama-gqa"), text_file, tokens=256, recipe=recipe)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "healed"))
    assert not torch.equal(before["model.layers.0.self_attn.k_proj.weight"], after["model.layers.0.self_attn.k_proj.weight"])


def test_nothing_to_resume_is_told(converted_folder: Callable[..., Path], tmp_path: Path, text_file: str) -> None:
    with pytest.raises(UsageError, match="nothing to resume"):
        kvshare.heal(converted_folder("tiny"), tmp_path / "out", "kvshare/tiny", text_file, resume=True)
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("accelerate.Accelerator.prepare", "setting up"),
        ("torch.nn.functional.kl_div", "forward"),
        ("torch.Tensor.backward", "backward"),
        ("torch.optim.AdamW.step", "optimizer's step"),
        ("peft.PeftModel.save_pretrained", "saving"),
        ("peft.PeftModel.load_adapter", "reading"),
    ],
)
def test_what_cannot_work_is_told_before_the_first_step(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    named: str,
) -> None:
    folder, source = converted_folder("llama-gqa"), source_folder("llama-gqa")
    steps: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "healing":
            steps.append(done)

    monkeypatch.setattr(broken, fails)
    output = tmp_path / "out"
    refused(
        lambda: kvshare.heal(folder, output, source, text_file, recipe=small(tmp_path), progress=note),
        "cannot start",
        named,
        "this machine cannot",
    )
    assert not steps
    assert not output.exists()
    assert not work_folder(output).exists()


def test_a_state_that_reads_back_otherwise_is_told(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft.PeftModel.load_adapter", lambda *_, **__: None)
    sources = converted_folder("llama-gqa"), tmp_path / "out", source_folder("llama-gqa"), text_file
    refused(lambda: kvshare.heal(*sources, recipe=small(tmp_path)), "cannot start", "not those that were written")


def test_the_trial_leaves_no_trace(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = converted_folder("llama-gqa"), source_folder("llama-gqa"), text_file
    found: list[dict[str, float]] = []

    def trial(*arguments: Any) -> dict[str, float]:
        found.append(preflight(*arguments))
        return found[0]

    monkeypatch.setattr("kvshare.training.preflight", trial)
    with_trial = kvshare.heal(sources[0], tmp_path / "a", *sources[1:], recipe=small(tmp_path))
    monkeypatch.setattr("kvshare.training.preflight", lambda *_: found[0])
    without = kvshare.heal(sources[0], tmp_path / "b", *sources[1:], recipe=small(tmp_path))
    assert len(found) == 1
    assert found[0]["kl"] == with_trial.losses[0][1]
    assert with_trial == without
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("kl", "part"),
    [(0.0125, 0.5), (0.0071, 0.38), (0.05, 1.0), (0.7, 1.0), (None, 1.0), (0.0, 1.0), (-1e-8, 1.0), (1e-8, 1.0), (math.nan, 1.0)],
)
def test_the_rate_goes_with_the_root_of_the_distance(kl: float | None, part: float) -> None:
    assert rate_for(1e-3, kl) == pytest.approx(part * 1e-3, rel=1e-12)
    if kl is not None:
        assert rate_for(1e-3, kl * (1 + 1e-6)) == rate_for(1e-3, kl) or math.isnan(kl)


def test_a_rate_that_was_made_reads_well() -> None:
    assert repr(rate_for(1e-3, 0.0065)) == "0.00036"


def test_what_is_nearly_the_source_is_healed_slowly(
    converted_folder: Callable[..., Path], tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(init: str, **heal: Any) -> float:
        recipe, output = small(tmp_path, tokens=256, **heal), tmp_path / "out"
        result = kvshare.heal(
            converted_folder("tiny", "all", init), output, "kvshare/tiny", text_file, recipe=recipe, overwrite=output.exists()
        )
        assert json.loads((output / "report.json").read_text())["heal"]["learning_rate"] == result.learning_rate
        return result.learning_rate

    monkeypatch.setattr("kvshare.training.rows_per_forward", lambda *_: 2)  # of the four rows of a step
    far, near = rate("mean"), rate("svd")
    assert far == 2e-3
    assert near < far / 2
    monkeypatch.undo()
    assert rate("svd", teacher_top_k=4_096) == near
    other = rate("svd", attention_matching=30.0, cross_entropy=0.5, kl=7.0, dtype="bfloat16")
    assert other == pytest.approx(near, rel=0.1)
    assert rate("svd", learning_rate=0.01) == 0.01
    assert rate("svd", kl=0.0, cross_entropy=1.0) == far


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_training(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    sources = source_folder("llama-gqa"), text_file
    folder, recipe = converted_folder("llama-gqa"), small(tmp_path)
    undisturbed = kvshare.heal(folder, tmp_path / "whole", *sources, recipe=recipe)
    done = 0

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.nan

    def loss(student: torch.Tensor, *rest: Any) -> torch.Tensor:
        value = distillation_loss(student, *rest)
        if done == 5:
            return value * math.nan if where == "loss" else NoGradient.apply(value)
        return value

    def note(stage: str, steps: int, total: int) -> None:
        nonlocal done
        done = steps if stage == "healing" else done

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("kvshare.losses.distillation_loss", loss)
        refused(
            lambda: kvshare.heal(folder, output, *sources, recipe=recipe, progress=note),
            "step 6",
            "the state of step 4 is kept in",
            "lower heal.learning_rate",
        )
    assert not output.exists()
    result = kvshare.heal(folder, output, *sources, recipe=recipe, resume=True)
    assert result == undisturbed
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_rate_that_is_far_too_high_stops_the_training(
    converted_folder: Callable[..., Path], tmp_path: Path, text_file: str
) -> None:
    recipe = small(tmp_path, tokens=4_096, learning_rate=1.0)
    error = refused(
        lambda: kvshare.heal(converted_folder("tiny"), tmp_path / "out", "kvshare/tiny", text_file, recipe=recipe),
        "diverged",
        "lower heal.learning_rate",
    )
    assert error.keeps_work
    assert newest_state(work_folder(tmp_path / "out") / "training") is not None


def test_when_training_diverges() -> None:
    assert diverged([1.0] + [4.1] * 9, 4.0) is None  # too early to say
    assert diverged([1.0] + [4.0] * 10, 4.0) is None
    assert diverged([1.0] + [0.1] * 50, 4.0) is None
    assert diverged([1e-6] + [1e-4] * 50, 4.0) is None
    assert diverged([1.0] * 50 + [4.1] * 10, 4.0) == "the loss of the last 10 steps is 4.1 on average, that of the first step was 1"


def test_a_state_that_was_not_written_to_its_end_is_passed_over(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = source_folder("llama-gqa"), text_file
    folder, recipe = converted_folder("llama-gqa"), small(tmp_path)
    undisturbed = kvshare.heal(folder, tmp_path / "whole", *sources, recipe=recipe)
    save = transformers.TrainerState.save_to_json

    def killed(state: Any, file: str) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        save(state, file)

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("transformers.TrainerState.save_to_json", killed)
        with pytest.raises(KeyboardInterrupt):
            kvshare.heal(folder, output, *sources, recipe=recipe)
    states = work_folder(output) / "training"
    assert (states / "checkpoint-4").is_dir()
    assert newest_state(states) == states / "checkpoint-2"
    seen: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "healing":
            seen.append(done)

    assert kvshare.heal(folder, output, *sources, recipe=recipe, resume=True, progress=note) == undisturbed
    assert seen == [3, 4, 5, 6, 7, 8]
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_teacher_of_another_vocabulary_is_refused(checkpoint: Path, tmp_path: Path, text_file: str) -> None:
    source = Path(kvshare.__file__).parent / "tiny"
    other = tmp_path / "other"
    other.mkdir()
    for file in source.glob("*.*"):
        (other / file.name).write_bytes(file.read_bytes())
    edit_json(other / "config.json", lambda config: config.update(vocab_size=5000))
    with pytest.raises(UsageError, match="5000"):
        kvshare.heal(checkpoint, tmp_path / "out", other, text_file)


def test_modules_that_are_not_there_are_named(converted_folder: Callable[..., Path], tmp_path: Path, text_file: str) -> None:
    with pytest.raises(UsageError, match="down_proj"):
        kvshare.heal(
            converted_folder("tiny"),
            tmp_path / "out",
            "kvshare/tiny",
            text_file,
            recipe=short_recipe(tmp_path, lora_targets=["c_attn"]),
        )


def test_batches_divide_evenly_and_fit() -> None:
    for vocabulary in (4_096, 151_936):
        batch, micro = batch_rows(Heal.model_validate({}), 512, vocabulary, 1_000)
        assert batch == 4
        assert batch % micro == 0
        assert micro == 1 or micro * 512 * vocabulary * 16 <= 1 << 30
