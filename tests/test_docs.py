"""The documentation says what the command line does: every command and option in it exists, and every one that exists is in it."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from kvshare.cli import app

from kvshare.recipe import recipe_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GROUP: Any = typer.main.get_command(app)
VERBS: dict[str, Any] = GROUP.commands


def options(command: Any) -> set[str]:
    """Every spelling of every option, as `--help` shows them."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every `kvshare ...` in indented or fenced code, and in backticks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^ {4}(kvshare [^\n#]*)", text, re.MULTILINE)
    lines += [line for block in fenced for line in re.findall(r"^(kvshare [^\n#]*)", block, re.MULTILINE)]
    for line in lines:
        yield shlex.split(line)
    for code in re.findall(r"`(kvshare [^`]+)`", text):
        yield shlex.split(" ".join(code.split()))


def resolved(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the rest of them."""
    command, rest = GROUP, words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_exists(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        if len(words) < 2:
            continue
        command, rest = resolved(words)
        assert command is not GROUP, f"{page.name}: {' '.join(words)}"
        used = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert used <= options(command), f"{page.name}: {' '.join(words)}"


def test_commands_are_found_in_all_their_forms() -> None:
    text = "    kvshare plan M --nothing   # why\n\nas in `kvshare heal OUT\n-o B`\n```\nkvshare eval O\n```\n"
    assert list(commands(text)) == [
        ["kvshare", "plan", "M", "--nothing"],
        ["kvshare", "eval", "O"],
        ["kvshare", "heal", "OUT", "-o", "B"],
    ]
    assert sum(len(list(commands(page.read_text(encoding="utf-8")))) for page in PAGES) > 30


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_a_page_with_all_its_options(verb: str) -> None:
    text = (ROOT / "docs" / "verbs" / f"{verb}.md").read_text(encoding="utf-8")
    launched = re.sub(r"accelerate launch .*?\(which kvshare\)", "", text)  # whose options are not ours
    shown = set(re.findall(r"--[a-z][a-z-]*", launched))
    names = {name for name in options(VERBS[verb]) if name.startswith("--")} - {"--help"}
    borrowed = {"convert": options(VERBS["plan"])}.get(verb, set())
    assert names <= shown | borrowed
    assert shown <= {option for command in VERBS.values() for option in options(command)}
    for word, command in getattr(VERBS[verb], "commands", {}).items():
        assert f"`{word}`" in text, command.name


def test_every_page_is_in_the_navigation_and_every_verb_in_the_start() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = set(re.findall(r"[\w/]+\.md", yaml.safe_dump(yaml.safe_load(text)["nav"])))
    assert pages == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    start = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert all(f"(verbs/{verb}.md)" in start for verb in VERBS)
    names = re.findall(r"--recipe (\w+)", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert set(names) - {"my"} <= set(recipe_names())


def test_figures_have_one_home() -> None:
    spec = importlib.util.spec_from_file_location("sections", ROOT / "docs" / "sections.py")
    assert spec is not None
    assert spec.loader is not None
    sections = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sections)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert not re.search(r"\d %", page)
    built = sections.on_page_markdown(page)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = readme.partition("\n## Results\n")[2].partition("\n## ")[0]
    assert tables.count("|---") > 3
    assert tables.strip() in built
    with pytest.raises(ValueError, match="no section 'Nothing'"):
        sections.on_page_markdown("<!-- README: Nothing -->")


def test_every_promise_has_tests_that_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 21))
    assert all("`test_" in tests or "(#" in tests for _, tests in rows)
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert page.count("::") == len(named) > 50
    for file, function in named:
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{function}"
