"""The shape of the sources: imports point one way, only data is read, no foreign code runs, modules stay small."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

import kvshare
from kvshare.runtime import NAMES, modeling_kvshare
from kvshare.runtime.kvshare_tables import rope_of

ROOT = Path(kvshare.__file__).parent
CLI = ROOT.parent / "cli"
# A layer imports those above it; modules of one line know nothing of each other.
LAYERS = [
    ["errors"],
    ["parsing"],
    ["runtime"],
    ["families", "headers"],
    ["text_models"],
    ["sections", "source", "budget", "repeats", "processes"],
    ["rotated", "mlx"],
    ["recipe", "mixture", "geometry"],
    ["hub", "documents", "tensors", "memory", "progress", "journal", "refusals", "sizes", "contamination", "tied"],
    ["planning", "merge", "data", "native"],
    ["turning", "layout", "duration"],
    ["moments"],
    ["activations"],
    ["streaming", "passes"],
    ["orthogonal"],
    ["fit"],
    ["layerwise"],
    ["sensitivity", "spectra", "channels"],
    ["checkpoint", "findings", "paged", "exporting"],
    ["verification", "plots"],
    ["loading", "exact", "page", "figures", "timing"],
    ["inspection", "statistics", "quantised", "positions", "retrieval", "tasks", "bench_plot"],
    ["probes"],
    ["evaluation"],
    ["benching", "streams", "quality"],
    ["card_plot"],
    ["card", "publishing"],
    ["losses", "targets", "annealing"],
    ["cutting"],
    ["distillation"],
    ["preflight"],
    ["training"],
    ["healing", "merged"],
    ["spreading", "heal_plan"],
    ["conversion"],
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SHIPPED = [name.removesuffix(".py") for name in NAMES]
STANDARD = {
    "__future__",
    "collections",
    "contextlib",
    "ctypes",
    "functools",
    "hashlib",
    "importlib",
    "inspect",
    "json",
    "logging",
    "os",
    "pathlib",
    "platform",
}
STANDARD |= {"shutil", "subprocess", "sys", "tempfile", "typing"}
# The front door, which imports its verbs when they are first used, and a package of data.
OUTSIDE = {"", "tiny"}


def module_of(file: Path) -> str:
    """`merge.svd` for kvshare/merge/svd.py, `cli.plan` for cli/plan.py."""
    parts = (
        ("cli", *file.relative_to(CLI).with_suffix("").parts)
        if file.is_relative_to(CLI)
        else file.relative_to(ROOT).with_suffix("").parts
    )
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_of(file): file for folder in (ROOT, CLI) for file in sorted(folder.rglob("*.py"))}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in FILES.items()}


def imports(module: str) -> Iterator[str]:
    """Every module that a module imports, anywhere in it, with the names taken from it: `kvshare.merge.svd.solve_group`."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and module.partition(".")[2] in SHIPPED:  # in a checkpoint, they lie beside each other elsewhere
                yield from (".".join(filter(None, ("kvshare.runtime", node.module, name.name))) for name in node.names)
                continue
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of kvshare that a module imports, without the `kvshare.`."""
    found = set()
    for name in imports(module):
        parts = name.split(".")
        if parts[0] == "kvshare":
            found.add(
                max((known for known in FILES if known.split(".") == parts[1 : 1 + len(known.split("."))]), key=len, default="")
            )
    return found


def test_every_module_has_its_place() -> None:
    assert len(FILES) > 25
    assert {module.partition(".")[0] for module in FILES} == {*LEVEL, *OUTSIDE}


@pytest.mark.parametrize("module", sorted(set(FILES) - OUTSIDE))
def test_imports_point_one_way(module: str) -> None:
    package = module.partition(".")[0]
    for imported in own_imports(module):
        other = imported.partition(".")[0]
        if other not in OUTSIDE and other != package:
            assert LEVEL[other] < LEVEL[package], f"{module} imports {imported}"


def test_imports_go_in_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in own_imports(module) - OUTSIDE - {module}:
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        if module not in OUTSIDE:
            visit(module, ())
    assert done == set(FILES) - OUTSIDE


def test_the_files_in_checkpoints_stand_alone() -> None:
    found = [name for module in SHIPPED for name in imports(f"runtime.{module}") if module != "kvshare_mlx"]
    assert {name.partition(".")[0] for name in found} <= {*STANDARD, "torch", "transformers", "triton", "kvshare"}
    assert {name.partition(".")[0] for name in imports("runtime.kvshare_mlx")} <= {*STANDARD, "mlx", "mlx_lm"}
    assert {name.split(".")[2] for name in found if name.startswith("kvshare.")} <= {*SHIPPED}


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_unpickled(module: str) -> None:
    text = FILES[module].read_text(encoding="utf-8")
    assert "torch.load" not in text
    packages = {name.partition(".")[0] for name in imports(module)}
    assert not packages & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    called = {node.func.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("module", FILES)
def test_remote_code_is_never_trusted(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant), f"{module}, line {node.value.lineno}"
            assert node.value.value is False, f"{module}, line {node.value.lineno}"
        if isinstance(node, ast.Dict):
            assert "trust_remote_code" not in [key.value for key in node.keys if isinstance(key, ast.Constant)], module


@pytest.mark.parametrize("module", FILES)
def test_modules_stay_small_and_say_what_they_are(module: str) -> None:
    most = 840 if module == "runtime.modeling_kvshare" else 400  # what ships inside checkpoints is one file for all families
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= most
    assert ast.get_docstring(TREES[module])


@pytest.mark.parametrize("module", FILES)
def test_the_command_line_is_built_on_typer_alone(module: str) -> None:
    packages = {name.partition(".")[0] for name in imports(module)}
    assert "click" not in packages
    assert module.startswith("cli") or not packages & {"typer", "rich"}


@pytest.mark.parametrize("entry", ["modeling_kvshare", "kvshare_rotated"])
def test_a_file_that_a_config_names_names_all_that_it_needs(entry: str) -> None:
    """Older versions of transformers copy those alone."""

    def named(file: str) -> set[str]:
        text = (ROOT / "runtime" / f"{file}.py").read_text(encoding="utf-8")
        return set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))

    needed = {other for file in SHIPPED for other in named(file)} - {entry}
    if entry == "modeling_kvshare":
        needed -= {"kvshare_rotated"}
    assert named(entry) == needed


def test_a_transformers_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.0")
    spec: Any = importlib.util.spec_from_file_location("kvshare.runtime.other", ROOT / "runtime" / "kvshare_classes.py")
    with pytest.raises(ImportError, match=r"needs transformers 5.4 or later, and this is 5.3.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_what_transformers_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache by another name would be lost, and the model would attend to new tokens alone."""

    class Attention(torch.nn.Module):
        def forward(self, hidden_states: Any, memory: Any = None) -> Any: ...

    Attention.__module__ = "transformers.models.llama.modeling_llama"
    with pytest.raises(ImportError, match="takes its cache by a name that this file does not know"):
        modeling_kvshare._attention_class(Attention)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda states, sine, cosine: states)
    with pytest.raises(ImportError, match="rotates in a way"):
        modeling_kvshare._attention_class.__wrapped__(modeling_llama.LlamaAttention)
    decoder = torch.nn.Module()
    decoder.turning = modeling_llama.LlamaRotaryEmbedding(LlamaConfig())
    with pytest.raises(ImportError, match="makes tables of rope under a name"):
        rope_of(decoder)


def test_the_public_names_are_where_the_front_door_says() -> None:
    assert set(kvshare.__all__) == set(kvshare._HOMES)
    for name, home in kvshare._HOMES.items():
        assert getattr(kvshare, name).__module__ == f"kvshare.{home}"
    with pytest.raises(AttributeError, match="'nothing'"):
        kvshare.nothing  # noqa: B018


def test_the_readme_shows_every_file() -> None:
    root = Path(__file__).parent.parent
    tree = (root / "README.md").read_text(encoding="utf-8").partition("## The tree")[2]
    for file in [*root.glob("kvshare/**/*.py"), *root.glob("cli/*.py")]:
        name = str(file.relative_to(root / "kvshare")) if "kvshare" in file.relative_to(root).parts[:1] else file.name
        assert name in tree or file.parent.name == "tiny", name
    for recipe in root.glob("recipes/*.yaml"):
        assert recipe.stem in tree
