"""Healing in several processes: the same losses and weights as in one, a clean output, and refusals where that cannot be."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

import kvshare
from kvshare import processes
from kvshare.checkpoint import work_folder
from kvshare.distillation import make_trainer
from kvshare.errors import UnfinishedWorkError, UsageError
from kvshare.families import family_of
from kvshare.healing import heal_job
from kvshare.journal import check_same
from kvshare.recipe import load_recipe
from kvshare.sections import Heal
from kvshare.source import open_source
from kvshare.training import HealResult, batch_rows, check_healing

DEEPSPEED = {processes.DEEPSPEED: "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
CONFIGS = Path(__file__).parent.parent / "recipes" / "accelerate"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
FULL_KL = 2.0  # above that of the start, so that the rate is made of it
# Forks of a process that has everything imported, which notes how many numbers the weights of student and teacher take in each
# process. The first argument says what becomes of them: `whole`, or `killed`: both are when a step after the first saved state is
# shown as done, and run again.
FORKS = f"""
import json
import os
import signal
import sys
from pathlib import Path
from killing import run_together
from kvshare import healing, training
from kvshare.checkpoint import work_folder
from kvshare.cli import main
from kvshare.distillation import newest_state

training.FULL_KL = {FULL_KL}
tried = training.preflight

def watch(adapted, teacher, *rest):
    terms = tried(adapted, teacher, *rest)
    held = [getattr(value, "_local_tensor", value) for model in (adapted, teacher) for value in model.parameters()]
    numbers = sum({{value.data_ptr(): value.untyped_storage().nbytes() // 4 for value in held}}.values())
    Path(os.environ["HELD"], os.environ["RANK"]).write_text(str(numbers))
    return terms

training.preflight = watch
task, output, words = sys.argv[1], Path(sys.argv[-1]), sys.argv[2:]
trained = healing.train

def dies(stage, done, total):
    if (stage, done, total) == ("healing", 3, 4):
        os.kill(os.getpid(), signal.SIGKILL)

def train(*arguments):
    return trained(*arguments[:7], dies, *arguments[8:])

def heal(function, *more):
    def job(again):
        sys.argv = ["kvshare", *words, *more]
        sys.stdout = open(output.parent / f"printed {{os.environ['RANK']}}", "w")
        healing.train = function
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code
        finally:
            sys.stdout.flush()
    return run_together(job, output)[0]

for run in {{"whole": [(trained,)], "killed": [(train,), (trained, "--resume")]}}[task]:
    statuses = heal(*run)
    state = newest_state(work_folder(output) / "training")
    print(json.dumps({{"statuses": statuses, "state": state is not None, "output": output.exists()}}))
"""
# FSDP2 with all that reaches into the models: attention by itself, forwards that are run again, trained weights beside cut ones
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"progressive": 0.5, "norms": True, "attention": "full", "gradient_checkpointing": True},
}


def told_by_accelerate(name: str) -> dict[str, str]:
    """The environment that `accelerate launch` would make for a configuration of the recipes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "heal.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if name == "deepspeed":
        arguments.deepspeed_fields_from_accelerate_config = ""
        return dict(prepare_deepspeed_cmd_env(arguments)[1])
    return dict(prepare_multi_gpu_env(arguments))


@dataclass(frozen=True)
class Job:
    """A healing: what both processes are told but the output, the checkpoint it begins with, and what one process makes of it.

    `held` is how many numbers the weights of student and teacher take in each process once they have run.
    """

    environment: dict[str, str]
    words: list[str]
    folder: Path
    alone: HealResult
    one: Path
    two: Path
    printed: str
    held: list[int]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def job(
    request: pytest.FixtureRequest,
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    text_file: str,
) -> Job:
    """The same healing by one process and by two, which find what accelerate would tell them of the kind."""
    root = tmp_path_factory.mktemp("processes")
    folder, source, recipe = converted_folder("llama-gqa", 2), source_folder("llama-gqa"), root / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "heal": {"tokens": 2_048, "batch_tokens": 512, "sequence_length": 64, "lora_rank": 2, "save_steps": 2}
                | SETTINGS[request.param],
                "evaluation": {"tokens": 512, "data": text_file, "max_perplexity_increase": 100.0},
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvshare.training.FULL_KL", FULL_KL)
        alone = kvshare.heal(folder, root / "one", source, f"{text_file}=1,self=1", recipe=recipe)
    words = [*map(str, ("heal", folder, "--source", source, "--data", f"{text_file}=1,self=1", "--recipe", recipe, "--json"))]
    environment = told_by_accelerate(request.param) | ENVIRONMENT | {"HELD": str(root)}
    done = prepared.run(FORKS, "whole", *words, "-o", root / "two", environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["statuses"] == [0, 0], done.stderr
    printed = "".join((root / f"printed {rank}").read_text() for rank in (0, 1))
    held = [int((root / rank).read_text()) for rank in "01"]
    return Job(environment, words, folder, alone, root / "one", root / "two", printed, held)


def test_two_processes_heal_as_one_does(job: Job) -> None:
    result = json.loads(job.printed)  # one process prints
    assert [loss for _, loss in result["losses"]] == pytest.approx([loss for _, loss in job.alone.losses], rel=1e-5)
    assert result["learning_rate"] == job.alone.learning_rate < 2e-3
    assert result["terms"]["kl"] == pytest.approx(job.alone.terms["kl"], rel=1e-5)
    kvshare.verify(job.two)
    before, first, second = (load_file(path / "model.safetensors") for path in (job.folder, job.one, job.two))
    moved = max(float((before[name] - first[name]).abs().max()) for name in before)
    assert moved > 1e-4
    for name in first:
        assert (first[name] - second[name]).abs().max() < 1e-3 * moved, name
    assert not work_folder(job.two).exists()
    assert {file.name for file in job.two.iterdir()} == {file.name for file in job.one.iterdir()}


def test_two_processes_that_are_killed_go_on_to_the_same_bytes(job: Job, tmp_path: Path) -> None:
    done = prepared.run(FORKS, "killed", *job.words, "-o", tmp_path / "out", environment=job.environment)
    assert done.returncode == 0, done.stderr
    killed, resumed = map(json.loads, done.stdout.splitlines())
    assert -signal.SIGKILL in killed["statuses"]
    assert killed["state"]
    assert killed["output"] is False
    assert resumed["statuses"] == [0, 0], done.stderr
    output = tmp_path / "out"
    assert (output / "model.safetensors").read_bytes() == (job.two / "model.safetensors").read_bytes()
    assert (output / "report.json").read_bytes() == (job.two / "report.json").read_bytes()
    assert not work_folder(output).exists()


def test_fsdp_leaves_each_process_its_part_once(job: Job) -> None:
    whole = sum(value.numel() for value in kvshare.load(job.folder).parameters())
    if "FSDP_VERSION" not in job.environment:
        assert min(job.held) >= whole
        return
    trained = sum(value.numel() for name, value in load_file(job.folder / "model.safetensors").items() if "self_attn" in name)
    # half of what both have, which is held once; the trained projections, norms and adapters are whole and small
    assert max(job.held) < whole / 2 + 2 * trained < 0.75 * whole


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_the_launcher_reads_its_configuration(name: str, kind: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (str(config.distributed_type), config.num_processes, config.use_cpu) == (f"DistributedType.{kind}", 2, False)


def test_rows_are_shared_equally_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Heal.model_validate({"batch_tokens": 2_048, "sequence_length": 512})
    assert batch_rows(settings, 512, 4_096, 100) == (4, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert batch_rows(settings, 512, 4_096, 100) == (4, 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 processes cannot share the 4 rows of a step") as caught:
        batch_rows(settings, 512, 4_096, 100)
    assert "multiple of 1536" in caught.value.fix


def test_what_cannot_be_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="was started in 2 processes, and takes one"):
        kvshare.convert("kvshare/tiny", tmp_path / "out")
    with pytest.raises(UsageError, match="calibrate was started in 2 processes, and takes one"):
        kvshare.calibrate("kvshare/tiny", tmp_path / "out")
    monkeypatch.delenv("WORLD_SIZE")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "under the first FSDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "to the memory of the CPU"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "under DeepSpeed's ZeRO-3"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "no configuration file of DeepSpeed"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "does not take offload_optimizer_device: cpu"),
        (DEEPSPEED | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "does not take mixed_precision: bf16"),
    ],
)
def test_launchers_that_healing_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=named):
        kvshare.heal(tmp_path, tmp_path / "out", "kvshare/tiny", "self")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed"])
def test_healing_takes_what_the_launcher_says_of_a_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed need not be installed."""
    said = told_by_accelerate(name)
    for variable in (processes.FSDP, processes.DEEPSPEED, "FSDP_VERSION", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        if variable in said:
            monkeypatch.setenv(variable, said[variable])
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.require_known_launcher()
    assert (processes.cuts(), processes.partitions()) == (name == "fsdp2", name == "deepspeed")


def test_deepspeed_is_given_the_rates_of_healing(
    converted_folder: Callable[..., Path],
    source_folder: Callable[[str], Path],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It throws the Trainer's optimizer away and has it make another one."""
    made: list[Any] = []

    def keep(*arguments: Any) -> Any:
        made.append(make_trainer(*arguments))
        return made[-1]

    monkeypatch.setattr("kvshare.training.make_trainer", keep)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("heal: {tokens: 128, batch_tokens: 128, sequence_length: 64, shared_rate: 0.25}")
    kvshare.heal(converted_folder("llama-gqa", 2), tmp_path / "out", source_folder("llama-gqa"), text_file, recipe=recipe)
    made[0].optimizer = None
    others, slow = made[0].create_optimizer().param_groups
    assert slow["lr"] == others["lr"] / 4
    assert slow["params"]


def test_states_of_deepspeed_are_its_own(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = converted_folder("llama-gqa", 2), open_source(source_folder("llama-gqa"))
    plain = heal_job(folder, source, load_recipe(None))
    monkeypatch.setenv(processes.DEEPSPEED, "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = heal_job(folder, source, load_recipe(None))
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = heal_job(folder, source, load_recipe(None))
    for earlier, now in ((plain, two), (two, plain), (two, four)):
        with pytest.raises(UnfinishedWorkError, match="deepspeed differs"):
            check_same(earlier, now, folder)


def test_cut_weights_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Heal.model_validate({"compile": True})
    check_healing(settings, family_of("llama"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"heal.compile does not go with FSDP"):
        check_healing(settings, family_of("llama"))
    with processes.uncut():
        assert not processes.cuts()
    assert processes.cuts()


def test_one_process_is_the_first_and_waits_for_nobody() -> None:
    assert (processes.count(), processes.is_first()) == (1, True)
    processes.meet()
    assert not torch.distributed.is_initialized()
