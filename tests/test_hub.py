"""Planning a Hub model reads its headers and no weights. The real hub client, against a server on loopback that counts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from common import Outcome

import kvshare
from kvshare.duration import estimate_seconds

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_canaryCanaryCanaryCanaryCanary"


class Hub(ThreadingHTTPServer):
    """What the Hub's HTTP API says about one repository, `org/model`, and how many bytes of each file it gave away."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.given: dict[str, int] = {}


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test reads what was given, not a log."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/model"):
            files = sorted(self.server.folder.iterdir())
            if "/tree/" in path:
                listed: Any = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            else:
                siblings = [{"rfilename": f.name, "size": f.stat().st_size, "blobId": "0" * 40} for f in files]
                listed = {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "private": False, "siblings": siblings}
            return self.send(json.dumps(listed).encode(), 200, {"Content-Type": "application/json"}, body)
        file = self.server.folder / path.rpartition("/")[2]
        if not path.startswith("/org/model/resolve/") or not os.path.isfile(file):
            return self.send(b"", 404, {"X-Error-Code": "EntryNotFound" if "org/model" in path else "RepoNotFound"}, body)
        content, headers, status = file.read_bytes(), {}, 200
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : int(last) + 1], 206
        if body:
            self.server.given[file.name] = self.server.given.get(file.name, 0) + len(content)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return self.send(content, status, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', **headers}, body)

    def send(self, content: bytes, status: int, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def served(source_folder: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    """A model whose weights are larger than what a client reads to get at a header."""
    folder = Path(shutil.copytree(source_folder("llama-gqa"), tmp_path / "served"))
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


def plan(hub: Hub, home: Path, model: str) -> subprocess.CompletedProcess[str]:
    """`kvshare plan` in a process whose Hub is the server."""
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    command = [str(Path(sys.executable).with_name("kvshare")), "plan", model, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_plan_of_a_hub_model_downloads_no_weights(served: Hub, tmp_path: Path) -> None:
    result = plan(served, tmp_path / "home", "org/model@main")
    assert result.returncode == 0, result.stderr
    remote, local = json.loads(result.stdout), kvshare.plan(served.folder).to_dict()
    assert remote.pop("seconds").keys() == estimate_seconds(kvshare.plan(served.folder)).keys()
    assert (remote.pop("model"), remote.pop("commit")) == ("org/model", COMMIT)
    del local["model"], local["commit"]
    assert remote == local
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    weights = (served.folder / "model.safetensors").stat().st_size
    assert weights > 200_000
    assert 0 < served.given["model.safetensors"] <= 100_001  # what the client asks for to find the header in
    assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN in file.read_text(errors="ignore") for file in (tmp_path / "home").rglob("*") if file.is_file())


def test_a_model_that_the_hub_does_not_have_is_an_error_with_a_remedy(served: Hub, tmp_path: Path) -> None:
    result = plan(served, tmp_path / "home", "org/other")
    assert result.returncode == 2
    assert "the Hub does not give 'org/other'" in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stdout + result.stderr


def test_a_damaged_header_on_the_hub_is_named(served: Hub, tmp_path: Path) -> None:
    file = served.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"?" + file.read_bytes()[9:])
    result = plan(served, tmp_path / "home", "org/model")
    assert result.returncode == 4
    assert "damaged" in result.stderr
    assert "model.safetensors" in result.stderr


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_remedy(served: Hub, tmp_path: Path) -> None:
    served.server_address = ("127.0.0.1", 9)  # where nothing listens
    result = plan(served, tmp_path / "home", "org/model")
    assert result.returncode == 2
    assert "the Hub does not give 'org/model'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_dry_runs_download_no_weights(
    served: Hub,
    converted_folder: Callable[..., Path],
    run: Callable[..., Outcome],
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, constants = f"http://127.0.0.1:{served.server_address[1]}", huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    checkpoint, output = converted_folder("llama-gqa"), tmp_path / "out"
    for words in (
        ("convert", "org/model", "-o", output, "--no-heal", "--calibration", text_file, "--eval-mode", "off"),
        ("calibrate", "org/model", "-o", output, "--data", text_file),
        ("inspect", "org/model", "-o", output, "--data", text_file),
        ("heal", checkpoint, "-o", output, "--source", "org/model", "--data", text_file),
        ("bench", checkpoint, "-o", output, "--against", "org/model", "--contexts", "16"),
    ):
        result = run(*words, "--dry-run")
        assert result.code == 0, result.err
        assert "nothing was written" in result.out
    huggingface_hub.close_session()
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not output.exists()
