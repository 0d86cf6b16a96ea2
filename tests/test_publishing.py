"""A push: the real hub client in the real command, against a server on loopback that drops, refuses and fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from common import TINY_FOLDER, Outcome
from hub_server import SIGNATURE, TOKEN, Fault, Hub, serving
from transformers import AutoModelForCausalLM

import kvshare
from kvshare.checkpoint import MANIFEST, sha256
from kvshare.errors import UsageError

SCRIPT = Path(sys.executable).with_name("kvshare")
Push = Callable[..., Outcome]
# how the hub client calls the HTTP client beneath it
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, source_folder: Callable[[str], Path], text_file: str) -> Path:
    """A checkpoint of several weight files."""
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(source_folder("llama-gqa")).save_pretrained(folder / "source", max_shard_size="1MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_FOLDER / name, folder / "source" / name)
    settings = {"calibration": text_file, "calibration_tokens": 1024, "eval_data": text_file, "eval_tokens": 512}
    kvshare.convert(folder / "source", folder / "out", init="mean", heal=False, **settings)  # type: ignore[arg-type]
    assert len(list((folder / "out").glob("*.safetensors"))) > 2
    return folder / "out"


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    """A copy of it, beside what a push must not send: work of a run that was broken off."""
    (tmp_path / "checkpoint.kvshare-work" / "training").mkdir(parents=True)
    (tmp_path / "checkpoint.kvshare-work" / "training" / "state.safetensors").write_bytes(b"state")
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def push(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """`kvshare push` with this Hub and this login; whatever happens, no token is seen anywhere.

    The client reads its settings when it is imported, offline as all tests are; only these settings are changed.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.01)))  # before it asks a busy server again

    def call(address: str, *arguments: str | Path, token: str | None = TOKEN) -> Outcome:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        done = run("push", *arguments)
        nothing_secret(done.out + done.err, tmp_path, token or TOKEN)
        return done

    yield call
    huggingface_hub.close_session()


def nothing_secret(printed: str, folder: Path, token: str) -> None:
    """Neither in what was printed nor in any file."""
    assert not any(secret in printed for secret in (token, SIGNATURE, "Traceback"))
    assert not any(token.encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def refused(done: Outcome, *named: str, code: int = 2) -> None:
    assert done.code == code, done.err
    assert done.out == ""
    what, why, remedy = done.err.splitlines()[-3:]
    assert (what[:7], why[:7], remedy[:7]) == ("error: ", "  why: ", "  do:  ")
    for text in named:
        assert text in done.err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, its subfolders included."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def listed(folder: Path) -> dict[str, int]:
    """What a push sends: the files that the manifest names, and the manifest."""
    names = [*json.loads((folder / MANIFEST).read_text())["files"], MANIFEST]
    return {name: (folder / name).stat().st_size for name in names}


@pytest.mark.parametrize("part_bytes", [None, 400_000])
def test_what_the_manifest_names_arrives_and_nothing_else(push: Push, hub: Hub, folder: Path, part_bytes: int | None) -> None:
    hub.part_bytes = part_bytes
    (folder / "notes.txt").write_text("mine")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "state.json").write_text("{}")
    before = contents(folder)
    done = push(hub.address, folder, "org/model", "--json")
    assert done.code == 0, done.err
    result, arrived = json.loads(done.out), hub.content("org/model")
    assert arrived.pop(".gitattributes")
    assert arrived == {name: (folder / name).read_bytes() for name in listed(folder)}
    assert (result["files"], result["bytes"]) == (listed(folder), sum(listed(folder).values()))
    assert result["commit"] == hub.repositories["org/model"].head("main")
    assert (result["private"], result["dry_run"]) == (True, False)
    assert hub.repositories["org/model"].private
    assert len(hub.repositories["org/model"].commits) == 2  # the first one and ours: all files appear together
    assert contents(folder) == before
    kvshare.verify(folder)


def test_a_dry_run_lists_files_and_asks_nobody(push: Push, hub: Hub, folder: Path) -> None:
    done = push(hub.address, folder, "org/model", "--dry-run", "--json", token=None)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["files"] == listed(folder)
    assert (result["url"], result["commit"], result["dry_run"], result["private"]) == (None, None, True, True)
    shown = push(hub.address, folder, "org/model", "--dry-run", "--public").out
    assert all(name in shown for name in listed(folder))
    assert "org/model (public)" in shown
    assert hub.requests == []


def test_a_dropped_connection_is_taken_up_again_in_the_same_command(push: Push, hub: Hub, folder: Path) -> None:
    hub.faults = [Fault("PUT /lfs/", times=1, skip=1)]
    done = push(hub.address, folder, "org/model", "--quiet")
    assert done.code == 0, done.err
    assert done.err == ""
    assert listed(folder).keys() <= hub.content("org/model").keys()
    assert len(hub.put) == len(set(hub.put)) == len(list(folder.glob("*.safetensors")))


def test_the_same_command_again_sends_only_what_is_missing(push: Push, hub: Hub, folder: Path) -> None:
    hub.faults = [Fault("PUT /lfs/", 403, "the upload was cut off", skip=2)]
    before = contents(folder)
    refused(push(hub.address, folder, "org/model"), "403", "the upload was cut off")
    assert len(hub.put) == 2
    assert hub.content("org/model").keys() == {".gitattributes"}  # not half a model
    assert contents(folder) == before
    kvshare.verify(folder)
    hub.faults = []
    assert push(hub.address, folder, "org/model").code == 0
    assert len(hub.put) == len(set(hub.put)) == len(list(folder.glob("*.safetensors")))
    once_more = push(hub.address, folder, "org/model", "--json")
    assert json.loads(once_more.out)["commit"] == hub.repositories["org/model"].head("main")
    assert len(hub.repositories["org/model"].commits) == 2


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (
            Fault("POST /api/repos/create", 401, f"no rights for {TOKEN}"),
            ("does not accept your login", "hf auth login", "<token>"),
        ),
        (Fault("POST /api/repos/create", 403, "read-only"), ("may not write to org/model", "read-only")),
        (Fault("POST .*/preupload/", 404, "gone"), ("does not find org/model",)),
        (Fault("POST .*/commit/", 409, "being moved"), ("changed meanwhile", "being moved", "not sent twice")),
        (Fault("POST .*/commit/", 503, "overloaded"), ("status 503: overloaded", "not sent twice")),
        (Fault("POST .*objects/batch", 500, "broken"), ("status 500: broken",)),
        (Fault("POST /api/repos/create"), ("cannot be reached",)),
    ],
    ids=lambda value: f"{value.status} {value.where}" if isinstance(value, Fault) else "",
)
def test_what_the_hub_refuses_is_said_in_three_lines(
    push: Push, hub: Hub, folder: Path, fault: Fault, named: tuple[str, ...]
) -> None:
    hub.faults = [fault]
    before = contents(folder)
    refused(push(hub.address, folder, "org/model"), *named)
    assert contents(folder) == before
    assert all(set(repo.commits) == {"0" * 40} for repo in hub.repositories.values())


def test_a_login_that_is_missing_or_wrong_is_said_before_anything_is_sent(push: Push, hub: Hub, folder: Path) -> None:
    refused(push(hub.address, folder, "org/model", token=None), "no login", "hf auth login")
    assert hub.requests == []
    refused(push(hub.address, folder, "org/model", token="hf_anotherCanaryAnotherCanary"), "does not accept your login")
    refused(push("http://127.0.0.1:9", folder, "org/model"), "cannot be reached")
    refused(push(hub.address, folder, "model"), "names no repository")
    assert hub.repositories == {}


def test_a_damaged_checkpoint_is_not_pushed(push: Push, hub: Hub, folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    refused(push(hub.address, folder, "org/model"), "generation_config.json", code=4)
    refused(push(hub.address, folder, "org/model", "--dry-run"), "generation_config.json", code=4)
    assert hub.requests == []


def test_what_is_public_is_pushed_to_only_when_asked(push: Push, hub: Hub, folder: Path) -> None:
    done = push(hub.address, folder, "org/model", "--public", "--json")
    assert json.loads(done.out)["private"] is False
    assert not hub.repositories["org/model"].private
    commits = set(hub.repositories["org/model"].commits)
    refused(push(hub.address, folder, "org/model"), "exists and is public", "--public")
    assert set(hub.repositories["org/model"].commits) == commits


def test_a_branch_is_made_and_old_weights_are_not_mixed_with_new_ones(push: Push, hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert push(hub.address, folder, "org/model", "--revision", "half").code == 0
    assert hub.content("org/model").keys() == {".gitattributes"}
    assert listed(folder).keys() <= hub.content("org/model", "half").keys()
    files = hub.repositories["org/model"].commits[hub.repositories["org/model"].head("half")]
    files["model.safetensors"] = b"old"
    refused(push(hub.address, folder, "org/model", "--revision", "half"), "holds model.safetensors", "--revision")


def test_a_commit_of_someone_else_is_a_conflict(push: Push, hub: Hub, folder: Path) -> None:
    hub.faults = [Fault("POST .*objects/batch", 400, "wait")]
    refused(push(hub.address, folder, "org/model"), "400")
    repo = hub.repositories["org/model"]

    class Moved(dict[str, str]):
        """Another head after the first look at it."""

        def get(self, key: str, default: str | None = None) -> str:  # type: ignore[override]
            return "1" * 40 if any("preupload" in asked for asked in hub.requests) else self[key] if key in self else str(default)

    hub.faults, hub.requests = [], []
    repo.commits["1" * 40] = {".gitattributes": b"* text"}
    repo.branches = Moved(repo.branches)
    refused(push(hub.address, folder, "org/model"), "changed meanwhile", "refresh")


def test_the_verb_in_python_says_the_same(folder: Path) -> None:
    files = {file: sha256(folder / file) for file in listed(folder)}
    result = kvshare.push(folder, "org/model", dry_run=True)
    assert result.files == listed(folder)
    with pytest.raises(UsageError, match="no repository"):
        kvshare.push(folder, "https://example.org/model", dry_run=True)
    assert files == {file: sha256(folder / file) for file in listed(folder)}


def test_the_installed_script_pushes_and_leaves_no_token(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.faults = [Fault("PUT /lfs/", 500, "busy", times=1)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    home = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home" / "hf")}
    asked = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [str(SCRIPT), "push", str(folder), "org/model"]
    done = subprocess.run(command, env=kept | home | asked, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    nothing_secret(done.stdout + done.stderr, tmp_path, TOKEN)
    assert listed(folder).keys() <= hub.content("org/model").keys()
    assert f"{hub.address}/org/model" in done.stdout
    shown = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert set(shown) == {"uploading"}
