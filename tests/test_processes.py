"""Healing in several processes: the same losses and weights as in one, a clean output, and refusals where that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

import kvshare
from kvshare import processes
from kvshare.checkpoint import work_folder
from kvshare.errors import UsageError
from kvshare.recipe import Heal
from kvshare.training import batch_rows

CONFIG = Path(__file__).parent.parent / "recipes" / "accelerate" / "ddp.yaml"
HEAL = "import sys; from kvshare.cli import main; sys.argv[0] = 'kvshare'; main()"


def test_two_processes_heal_as_one_does(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    folder, source, recipe = converted_folder("llama-gqa", 2), source_folder("llama-gqa"), tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "heal": {"tokens": 2_048, "batch_tokens": 512, "sequence_length": 64, "lora_rank": 2, "save_steps": 2},
                "evaluation": {"tokens": 512, "data": text_file, "max_perplexity_increase": 100.0},
            }
        )
    )
    alone = kvshare.heal(folder, tmp_path / "one", source, f"{text_file}=1,self=1", recipe=recipe)
    script, output = tmp_path / "heal.py", tmp_path / "two"
    script.write_text(HEAL)
    words = [folder, "-o", output, "--source", source, "--data", f"{text_file}=1,self=1", "--recipe", recipe, "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, launch), str(script), "heal", *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one process prints
    assert [loss for _, loss in result["losses"]] == pytest.approx([loss for _, loss in alone.losses], rel=1e-5)
    assert result["terms"]["kl"] == pytest.approx(alone.terms["kl"], rel=1e-5)
    kvshare.verify(output)
    before, first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "one", output))
    moved = max(float((before[name] - first[name]).abs().max()) for name in before)
    assert moved > 1e-4
    for name in first:
        assert (first[name] - second[name]).abs().max() < 1e-3 * moved, name
    assert not work_folder(output).exists()
    assert {file.name for file in output.iterdir()} == {file.name for file in (tmp_path / "one").iterdir()}


def test_the_launcher_reads_its_configuration() -> None:
    config = load_config_from_file(str(CONFIG))
    assert (str(config.distributed_type), config.num_processes, config.use_cpu) == ("DistributedType.MULTI_GPU", 2, False)


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
    with pytest.raises(UsageError, match="convert was started in 2 processes"):
        kvshare.convert("kvshare/tiny", tmp_path / "out")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="does not run under FSDP"):
        kvshare.heal(tmp_path, tmp_path / "out", "kvshare/tiny", "self")


def test_one_process_is_the_first_and_waits_for_nobody() -> None:
    assert (processes.count(), processes.is_first()) == (1, True)
    processes.meet()
    assert not torch.distributed.is_initialized()
