"""The command line does what the library does: the same names, JSON alone where JSON is asked for, refusals in three lines."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prepared
import pytest
import typer
from common import TINY_FOLDER, Outcome, edit_json
from killing import contents
from kvshare.cli import app
from kvshare.cli.options import DATA
from kvshare.cli.render import shown_progress
from transformers import AutoModelForCausalLM

import kvshare
from kvshare.documents import FORMS
from kvshare.recipe import load_recipe, recipe_names, recipe_text
from kvshare.source import INDEX

SCRIPT = Path(sys.executable).with_name("kvshare")
VERBS = {
    "inspect": "inspect",
    "plan": "plan",
    "convert": "convert",
    "heal": "heal",
    "eval": "evaluate",
    "bench": "bench",
    "verify": "verify",
    "push": "push",
}
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate"}
FIGURES = {
    "perplexity",
    "source_perplexity",
    "perplexity_increase",
    "kl",
    "token_agreement",
    "cache_bytes_per_token",
    "source_cache_bytes_per_token",
    "cache_reduction",
}


@pytest.fixture(scope="module")
def converted(once: Callable[[str, Callable[[Path], Any]], Path], text_file: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A checkpoint that the command wrote in a process of its own, and what it printed."""

    def make(folder: Path) -> None:
        folder.mkdir()
        recipe = folder / "one-balance.yaml"
        recipe.write_text("merge: {balance: [1.0]}")
        text = ("--calibration", text_file, "--calibration-tokens", "2048", "--eval-data", text_file, "--eval-tokens", "2048")
        options = ("-o", folder / "alone/converted", "--recipe", recipe, "--no-heal", *text, "--json")
        code = f"import killing; killing.search_briefly(); {prepared.COMMAND}"
        done = prepared.run(code, "convert", "kvshare/tiny", *options)
        (folder / "printed.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))

    folder = once("cli", make)
    return folder / "alone/converted", subprocess.CompletedProcess([], *json.loads((folder / "printed.json").read_text()))


def imported(*arguments: str) -> set[str]:
    """The top-level packages that the installed script imports."""
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=True, env=environment)
    return {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")
    }


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "kvshare/tiny"), ("recipes", "list")], ids=" ".join)
def test_what_needs_no_weights_imports_no_torch(arguments: tuple[str, ...]) -> None:
    packages = imported(*arguments)
    assert {"kvshare", "typer"} <= packages
    assert not packages & HEAVY


def test_help_and_errors_name_the_same_forms_of_text() -> None:
    # twice, because help is shown without what reads text
    assert DATA.replace("\\[", "[").lower() == FORMS.lower()


def test_help_names_every_verb(run: Callable[..., Outcome]) -> None:
    result = run("--help")
    assert result.code == 0
    assert all(verb in result.out for verb in (*VERBS, "recipes"))
    assert run("--version").out.strip() == kvshare.__version__


@pytest.mark.parametrize("verb", [*VERBS, "recipes", "recipes copy", "recipes list", "recipes show"])
def test_every_verb_explains_its_options(run: Callable[..., Outcome], verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 300)
    result = run(*verb.split(), "--help")
    assert (result.code, result.err) == (0, "")
    command: Any = typer.main.get_command(app)
    for word in verb.split():
        command = command.commands[word]
    shown = " ".join(result.out.replace("│", " ").split())
    for parameter in command.params:
        assert not parameter.help or " ".join(parameter.help.replace("\\[", "[").split()) in shown, parameter.name


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_named_as_in_the_library(verb: str) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands[verb]
    options = {parameter.name: parameter for parameter in command.params}
    if options.pop("as_json", None) is not None:
        assert "--json" in next(p.opts for p in command.params if p.name == "as_json")
    options.pop("quiet")  # of the command line alone; the library shows nothing
    options.pop("verbose", None)  # nor this
    parameters = dict(inspect.signature(getattr(kvshare, VERBS[verb])).parameters)
    parameters.pop("progress", None)
    if "dry_run" not in parameters:
        options.pop("dry_run", None)  # of the command line alone; the library has `plan`
    assert options.keys() == parameters.keys()
    for name, option in options.items():
        if option.param_type_name == "option":
            assert f"--{name.replace('_', '-')}" in option.opts
            assert option.required == (parameters[name].default is inspect.Parameter.empty)
            assert option.required or option.default == parameters[name].default


def test_plan_prints_json_with_the_documented_keys(run: Callable[..., Outcome]) -> None:
    result = run("plan", "kvshare/tiny", "--kv-heads", "1/4", "--init", "mean", "--recipe", "quick", "--json")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    seconds = values.pop("seconds")
    assert seconds.keys() == {"starting", "copying", "writing text", "measuring"}  # of the text to measure on
    assert all(0 <= stage < 3600 for stage in seconds.values())
    assert values == kvshare.plan("kvshare/tiny", kv_heads="1/4", init="mean", recipe="quick").to_dict()
    assert values.keys() == {
        *(
            "model",
            "commit",
            "model_type",
            "init",
            "form",
            "layers",
            "source_kv_heads",
            "kv_heads",
            "head_dim",
            "reasons",
            "recipe",
        ),
        *("layer_heads", "cache_budget", "one_process_because"),
        *("source_cache_bytes_per_token", "cache_bytes_per_token", "cache_reduction", "tensors_copied", "tensors_merged"),
        *("bytes_read", "bytes_written", "disk_bytes", "memory_bytes", "heals", "heal_tokens", "tensors"),
        *("decode_multiply_adds_per_cached_token", "decode_overhead", "map_bytes"),
    }
    assert values["tensors"][0].keys() == {"name", "action", "file", "dtype", "source_shape", "shape"}
    assert (values["init"], values["kv_heads"], values["heals"], values["heal_tokens"]) == ("mean", 2, False, 0)


def test_plan_prints_a_table_for_people(run: Callable[..., Outcome]) -> None:
    result = run("plan", "kvshare/tiny")
    assert result.code == 0
    for text in ("llama, 6 layers", "3.1 kB", "1.5 kB", "50.00%", "655,360 tokens", "instead of two of 8", "time on this machine"):
        assert text in result.out


def test_plan_of_a_budget_shows_its_bounds(run: Callable[..., Outcome]) -> None:
    result = run("plan", "kvshare/tiny", "--cache-budget", "0.3")
    assert result.code == 0
    for text in ("by layer", "at most 896 B", "at least 70.83%", "per-layer head counts are not native"):
        assert text in result.out
    values = json.loads(run("plan", "kvshare/tiny", "--cache-budget", "0.3", "--json").out)
    assert values.pop("seconds")["choosing heads"] > 0
    assert values == kvshare.plan("kvshare/tiny", cache_budget=0.3).to_dict()
    assert (values["layer_heads"], values["cache_budget"]) == (None, 0.3)


def test_convert_meets_a_budget_and_shows_the_choice(
    run: Callable[..., Outcome], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    text = ("--calibration", text_file, "--calibration-tokens", "2048", "--eval-data", text_file, "--eval-tokens", "1024")
    result = run("convert", source_folder("llama-gqa"), "-o", tmp_path / "out", "--no-heal", "--cache-budget", "0.4", *text)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = report["sensitivity"]
    assert found["units"] <= found["budget_units"] == 6  # of 2 layers with 8 heads of K and V
    assert report["cache_bytes_per_token"] == found["units"] * 8 * 4
    assert f"{found['units']} of 6 heads of K and V" in result.out
    assert f"rank correlation of predicted and measured damage: {found['agreement']['spearman']:.2f}" in result.out
    for layer in found["layers"]:
        assert re.search(rf"^│ {layer['layer']} +│ +{layer['chosen']} │", result.out, re.MULTILINE)
    assert "measuring sensitivity" in result.err
    assert run("verify", tmp_path / "out").code == 0


def test_convert_prints_json_alone(converted: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, done = converted
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() >= FIGURES
    assert result["cache_reduction"] == 0.5
    assert result["cache_bytes_per_token"] * 2 == result["source_cache_bytes_per_token"]
    assert result["perplexity_increase"] == pytest.approx(result["perplexity"] / result["source_perplexity"] - 1)
    assert Path(result.pop("output")) == output
    assert json.loads((output / "report.json").read_text()) == result
    assert "measuring" in done.stderr
    assert [path.name for path in output.parent.iterdir()] == [output.name]  # nothing else is left there


def test_eval_repeats_the_measurement(
    run: Callable[..., Outcome], converted: tuple[Path, subprocess.CompletedProcess[str]], text_file: str
) -> None:
    output, _ = converted
    asked = ("eval", output, "--against", "kvshare/tiny", "--data", text_file, "--tokens", "2048")
    result = run(*asked, "--json")
    assert result.code == 0, result.err
    values = json.loads(result.out)
    stored = json.loads((output / "report.json").read_text())
    for name in FIGURES:
        assert values[name] == pytest.approx(stored[name], rel=1e-4, abs=1e-6), name
    table = run(*asked).out
    assert f"{values['perplexity']:.3f}" in table
    assert "50.00%" in table


def test_verify_counts_what_it_checked(
    run: Callable[..., Outcome], converted: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output, _ = converted
    result = run("verify", output)
    assert result.code == 0
    assert "6 shared layers, all as written" in result.out
    damaged = Path(shutil.copytree(output, tmp_path / "damaged"))
    edit_json(damaged / "generation_config.json", lambda config: config.update(temperature=2.0))
    refused = run("verify", damaged)
    assert refused.code == 4
    assert "generation_config.json" in refused.err
    assert refused.out == ""


def test_the_exact_form_from_plan_to_heal(
    run: Callable[..., Outcome], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    source, output = source_folder("llama-mha"), tmp_path / "out"
    planned = run("plan", source, "--init", "exact")
    assert planned.code == 0
    assert "multiply-adds more per cached token" in " ".join(planned.out.split())
    done = run("convert", source, "-o", output, "--recipe", "exact", "--eval-data", text_file, "--eval-tokens", "1024", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["cache_reduction"] == 0.5
    assert result["kl"] < 1e-6
    assert [sorted(entry) for entry in result["layers"]] == [["condition", "layer", "value_error"]] * 2
    assert "2 exact layers, all as written" in run("verify", output).out
    evaluated = run("eval", output, "--against", source, "--data", text_file, "--tokens", "1024", "--json")
    assert json.loads(evaluated.out)["kl"] == pytest.approx(result["kl"], abs=1e-6)
    refused(run("heal", output, "-o", tmp_path / "healed", "--source", source, "--data", text_file), 2, "nothing to heal")


def test_heal_prints_json_alone(
    run: Callable[..., Outcome], converted: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, text_file: str
) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text("heal: {sequence_length: 64, batch_tokens: 128, lora_rank: 2}")
    output = tmp_path / "healed"
    asked = ("--source", "kvshare/tiny", "--data", text_file, "--tokens", "256", "--recipe", recipe, "-o", output, "--json")
    result = run("heal", converted[0], *asked)
    assert result.code == 0, result.err
    values = json.loads(result.out)
    assert (values["tokens"], values["steps"], values["output"]) == (256, 2, str(output))
    assert run("verify", output).code == 0


def test_a_conversion_that_is_not_good_enough_is_not_published(
    run: Callable[..., Outcome], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    text = ("--init", "mean", "--no-heal", "--eval-data", text_file, "--eval-tokens", "512", "-o", tmp_path / "out")
    asked = ("convert", source_folder("llama-gqa"), *text, "--max-perplexity-increase")
    refused(run(*asked, "0"), 6, "not good enough", "at most +0.00%", "the work is kept")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.kvshare-work"]
    refused(run(*asked, "0.1", "--eval-mode", "off"), 2, "max_perplexity_increase = 0.1", "mode off")
    refused(run(*asked, "-1"), 2, "max_perplexity_increase")
    refused(run(*asked, "1000", "--eval-mode", "layers"), 2, "evaluation.mode differs", "--restart")
    assert run(*asked, "1000", "--eval-mode", "layers", "--restart").code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["perplexity_increase"] > 0


def test_recipes_list_show_copy(run: Callable[..., Outcome], tmp_path: Path) -> None:
    listed = run("recipes", "list").out
    for name in recipe_names():
        assert re.search(rf"^{name} +\S", listed, re.MULTILINE)
        assert run("recipes", "show", name).out == recipe_text(name)
        assert run("recipes", "copy", name, tmp_path / f"{name}.yaml").code == 0
        assert load_recipe(tmp_path / f"{name}.yaml") == load_recipe(name)
    (tmp_path / "half.yaml").write_text("my own")
    assert run("recipes", "copy", "half", tmp_path / "half.yaml").code == 2
    assert (tmp_path / "half.yaml").read_text() == "my own"
    assert "did you mean 'half'" in run("recipes", "show", "halve").err


def refused(result: Outcome, code: int, *named: str) -> None:
    """The exit code, nothing on standard output, and what, why and what to do as the last lines of standard error."""
    assert result.code == code, result.err
    assert result.out == ""
    what, why, remedy = result.err.splitlines()[-3:]
    assert what.startswith("error: ")
    assert why.startswith("  why: ")
    assert remedy.startswith("  do:  ")
    assert "Traceback" not in result.err
    for name in named:
        assert name in result.err


def broken(kind: str, folder: Path, source: Path) -> Path:
    """A copy of a model with something wrong."""
    copy = Path(shutil.copytree(source, folder / "source"))
    if kind == "family":
        edit_json(copy / "config.json", lambda config: config.update(model_type="gpt5"))
    if kind == "shard":
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(copy, max_shard_size="60KB")
        (copy / json.loads((copy / INDEX).read_text())["weight_map"]["lm_head.weight"]).unlink()
    return copy


@pytest.mark.parametrize(
    ("kind", "options", "code", "named"),
    [
        ("family", [], 3, "'gpt5'"),
        ("shard", [], 4, "safetensors is missing"),
        ("heads", ["--kv-heads", "3"], 2, "choose one of: 1, 2, 4"),
        ("budget", ["--cache-budget", "0.1"], 2, "give at least 0.125"),
        ("budget", ["--cache-budget", "0.5", "--kv-heads", "2"], 2, "both cache_budget = 0.5 and kv_heads = 2"),
        ("init", ["--init", "best"], 2, "init = 'best'"),
        ("square", ["--init", "exact"], 3, "4 x 8 = 32"),
        ("exact", ["--init", "exact", "--heal"], 2, "leave --heal out"),
        ("tokens", ["--eval-tokens", "0"], 2, "evaluation.tokens = 0"),
        ("recipe", ["--recipe", "quack"], 2, "did you mean 'quick'"),
        ("data", ["--calibration", "empty.txt"], 2, "empty.txt holds too little text"),
        ("file", ["--calibration", "nowhere.txt"], 2, "no file nowhere.txt"),
        ("form", ["--eval-data", "text.docx"], 2, "no known form"),
    ],
)
def test_a_refused_conversion_leaves_nothing_behind(
    run: Callable[..., Outcome],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text_file: str,
    kind: str,
    options: list[str],
    code: int,
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    source = broken(kind, tmp_path, source_folder("llama-gqa"))
    before = sorted(path.name for path in tmp_path.iterdir())
    text = ["--calibration", text_file, "--eval-data", text_file]
    refused(run("convert", source, "-o", tmp_path / "output", "--no-heal", *text, *options), code, named)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_foreign_code_does_not_run(run: Callable[..., Outcome], tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY_FOLDER, tmp_path / "source", ignore=shutil.ignore_patterns("__*")))
    canary = tmp_path / "canary"
    (source / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    edit_json(source / "config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}))
    edit_json(source / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}))
    words = ("--init", "mean", "--no-heal", "--eval-mode", "off")
    for command in (("plan", source), ("convert", source, "-o", tmp_path / "out", *words), ("verify", tmp_path / "out")):
        result = run(*command)
        assert result.code == 0, result.err
    assert not canary.exists()
    assert not (tmp_path / "out" / "evil.py").exists()


def test_an_existing_output_stays(
    run: Callable[..., Outcome], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("mine")
    asked = ("convert", source_folder("llama-gqa"), "-o", tmp_path / "output", "--calibration", text_file)
    refused(run(*asked), 2, "exists", "--overwrite")
    refused(run(*asked, "--overwrite"), 2, "not a kvshare checkpoint")
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "mine.txt"]


def test_what_is_no_checkpoint_is_refused(
    run: Callable[..., Outcome], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    native = source_folder("llama-gqa")
    for folder, named in ((native, "not a kvshare checkpoint"), (tmp_path / "nowhere", "no folder")):
        refused(run("verify", folder), 4, named)
        refused(run("eval", folder, "--against", "kvshare/tiny", "--data", text_file), 4, named)
        refused(run("heal", folder, "-o", tmp_path / "out", "--source", "kvshare/tiny", "--data", text_file), 4, named)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_script_returns_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt5"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    done = subprocess.run([SCRIPT, "plan", tmp_path], capture_output=True, text=True, check=False)
    refused(Outcome(done.returncode, done.stdout, done.stderr), 3, "pytorch_model.bin")
    assert len(done.stderr.splitlines()) == 3
    unknown = subprocess.run([SCRIPT, "plan", tmp_path, "--kv-head", "2"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "--kv-heads" in unknown.stderr


def strict_json(text: str) -> Any:
    """JSON without NaN and Infinity, which are none."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_eval_shows_checkpoints_side_by_side(
    run: Callable[..., Outcome],
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "trivia.jsonl").write_text('{"question": "The sea is", "choices": ["blue", "cold"], "answer": 1}\n')
    (tmp_path / "trivia.yaml").write_text(
        f"task: kvshare_sea\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'trivia.jsonl'}}}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    one, other = converted_folder("llama-gqa"), converted_folder("llama-gqa", 2)
    asked = (
        "--against",
        source_folder("llama-gqa"),
        "--data",
        text_file,
        "--tokens",
        "512",
        "--contexts",
        "80,96",
        "--by-position",
    )
    asked += ("--recall", "2", "--passkey", "1", "--cache-bits", "8", "--cache-bits", "4", "--tasks", tmp_path / "trivia.yaml")
    result = run("eval", one, other, *asked, "--json")
    assert result.code == 0, result.err
    reports = strict_json(result.out)["reports"]
    assert [report["checkpoint"] for report in reports] == [str(one), str(other)]
    for report in reports:
        assert report.keys() >= FIGURES | {"contexts", "positions", "recall", "passkey", "tasks", "quantised", "source_quantised"}
        assert [q["bits"] for q in report["quantised"]] == [8, 4]
        assert [t["task"] for t in report["tasks"]] == ["kvshare_sea"] * len(report["tasks"])
        assert report["tasks"][0].keys() == {*("task", "metric", "value", "value_error", "source_value", "source_value_error")}
    few = ("--recall", "1", "--passkey", "1", "--cache-bits", "4")
    table = run("eval", one, *asked[:9], *few).out
    for text in ("sliding windows of 80 tokens", "4 to 7", "64 pairs", "96 tokens, depth 25%", "the cache in 4 bits"):
        assert text in table
    refused(run("eval", one, *asked[:6], "--contexts", "many"), 2, "--contexts many")


def test_bench_prints_and_writes_what_it_measured(
    run: Callable[..., Outcome], converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = ("bench", converted_folder("llama-gqa"), "--against", source_folder("llama-gqa"), "--contexts", "16", "--repeats", "2")
    asked += ("--batch-sizes", "1,2", "--new-tokens", "2", "--memory", "1MB")
    result = run(*asked, "-o", tmp_path / "times", "--json")
    assert result.code == 0, result.err
    values = strict_json(result.out)
    assert values == json.loads((tmp_path / "times" / "bench.json").read_text())
    assert [(r["batch_size"], r["context"]) for r in values["runs"]] == [(1, 16), (2, 16)]
    assert all(r["cache_bytes"] * 2 == r["source_cache_bytes"] for r in values["runs"])
    table = run(*asked).out
    for text in ("2 x 16", "256 / 512", "fits in 1.0 MB", "not measured: a GPU"):
        assert text in table
    refused(run(*asked, "-o", tmp_path / "times"), 2, "exists", "--overwrite")


def every_command(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*words, name))
        else:
            yield (*words, name), command


@pytest.mark.parametrize(
    ("words", "command"),
    list(every_command(typer.main.get_command(app))),
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_verb_can_be_quiet(words: tuple[str, ...], command: Any) -> None:
    quiet = next((parameter for parameter in command.params if parameter.name == "quiet"), None)
    assert quiet is not None, words
    assert set(quiet.opts) == {"--quiet", "-q"}


def test_quiet_shows_results_alone(
    run: Callable[..., Outcome], converted: tuple[Path, subprocess.CompletedProcess[str]], text_file: str
) -> None:
    asked = ("eval", converted[0], "--against", "kvshare/tiny", "--data", text_file, "--tokens", "1024")
    loud, quiet = run(*asked), run(*asked, "--quiet")
    assert "measuring: " in loud.err
    assert quiet.err == ""
    assert quiet.out == loud.out
    assert "perplexity increase" in quiet.out


def test_lines_begin_anew_with_a_stage_that_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Text is written once to calibrate on and once to heal on."""
    with shown_progress() as progress:
        for total in (40, 200):
            for done in range(0, total + 1, 2):
                progress("writing text", done, total)
    told = capsys.readouterr().err.splitlines()
    assert (len(told), told[0], told[10:12]) == (22, "writing text: 0/40", ["writing text: 40/40", "writing text: 0/200"])


def test_a_log_file_gets_whole_lines_without_colour(tmp_path: Path) -> None:
    """Also where the terminal would be narrow, and where the file can hold neither lines of a box nor other signs."""
    environment = os.environ | {"COLUMNS": "30", "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    for name, extra in (("plain", {}), ("ascii", environment)):
        with (tmp_path / name).open("wb") as log:
            command = [SCRIPT, "plan", "kvshare/tiny", "--init", "exact"]
            done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | extra, check=False)
        assert done.returncode == 0
        text = (tmp_path / name).read_bytes().decode("ascii" if name == "ascii" else "utf-8")
        assert "\x1b" not in text
        assert re.search(r"tensors merged / copied.+0 / 56", text)
        assert "multiply-adds more per cached token" in text


def test_progress_on_a_terminal_uses_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("with", "without"):
        monkeypatch.setattr(sys, "stderr", Terminal())
        if name == "without":
            monkeypatch.setenv("NO_COLOR", "1")
        with shown_progress(models=False) as progress:
            progress("measuring", 1, 2)
            progress("measuring", 2, 2)
        shown[name] = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert all("measuring" in text and "2/2" in text for text in shown.values())
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", shown["with"])
    assert not re.search(r"\x1b\[[0-9;]*[34][0-9](?:;[0-9;]*)?m", shown["without"])


# a call of every command that writes, and what its dry run says
DRY_RUNS = [
    (("inspect", "kvshare/tiny", "-o", "OUT", "--data", "TEXT"), "would show 6 layers on 8,192 tokens"),
    (("bench", "CHECKPOINT", "--against", "kvshare/tiny", "-o", "OUT"), "5 pairs each of 1 x 128, 1 x 512, 4 x 128, 4 x 512"),
    (("recipes", "copy", "half", "OUT"), "would be the recipe half"),
    (("calibrate", "kvshare/tiny", "-o", "OUT", "--data", "TEXT"), "would hold 6 layers for 8 KV heads"),
    (("convert", "kvshare/tiny", "-o", "OUT", "--calibration", "TEXT"), "nothing was written; without --dry-run"),
    (("heal", "CHECKPOINT", "-o", "OUT", "--source", "kvshare/tiny", "--data", "TEXT"), "nothing was written; without --dry-run"),
    (("push", "CHECKPOINT", "org/model"), "nothing was uploaded"),
]


def test_every_command_that_writes_has_a_dry_run() -> None:
    writes = {
        words: {parameter.name for parameter in command.params}
        for words, command in every_command(typer.main.get_command(app))
        if {"output", "overwrite", "file", "repo"} & {parameter.name for parameter in command.params}
    }
    assert all("dry_run" in names for names in writes.values()), writes
    assert {" ".join(words) for words in writes} == {" ".join(words[: 2 if words[0] == "recipes" else 1]) for words, _ in DRY_RUNS}


@pytest.mark.parametrize(("words", "said"), DRY_RUNS, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_a_dry_run_checks_and_writes_nothing(
    words: tuple[str, ...],
    said: str,
    run: Callable[..., Outcome],
    checkpoint: Path,
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"OUT": str(tmp_path / "out"), "TEXT": text_file, "CHECKPOINT": str(checkpoint)}
    monkeypatch.chdir(tmp_path)
    before, folders = contents(tmp_path), sorted(tmp_path.rglob("*"))
    result = run(*(places.get(word, word) for word in words), "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert said in result.out
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == (before, folders)
    if "OUT" not in words:
        return
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert run(*(places.get(word, word) for word in words), "--dry-run").code == 2  # what would be refused is refused
