"""The model card says what was done and shows what report.json holds: no figure that is not in it, no folder of whoever made it."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml
from common import BRIEF
from PIL import Image

import kvshare
from kvshare.card import card_files, card_matter, front_matter, with_datasets, write_card
from kvshare.card_plot import PLOT, draw_plot
from kvshare.recipe import Recipe, load_recipe
from kvshare.source import Source, open_source

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?%?")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORMATS = {  # as a reader may find a figure of the report in the card
    "perplexity": "{:.3f}",
    "perplexity_error": "{:.3f}",
    "source_perplexity": "{:.3f}",
    "source_perplexity_error": "{:.3f}",
    "perplexity_increase": "{:+.2%}",
    "perplexity_increase_error": "{:.2%}",
    "kl": "{:.4f}",
    "kl_error": "{:.4f}",
    "token_agreement": "{:.1%}",
    "token_agreement_error": "{:.1%}",
    "cache_bytes_per_token": "{:,.0f}",
    "source_cache_bytes_per_token": "{:,.0f}",
    "cache_reduction": "-{:.1%}",
    "tokens": "{:,}",
}


@pytest.fixture(params=["llama-mha", "mixed", "exact"])
def written(
    request: pytest.FixtureRequest, converted_folder: Callable[..., Path], mixed_folder: Callable[[str], Path]
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Card, config and report of a checkpoint: all heads, heads that differ by layer, exact."""
    folder = {
        "llama-mha": lambda: converted_folder("llama-mha", 4),
        "mixed": lambda: mixed_folder("llama-mha"),
        "exact": lambda: converted_folder("llama-mha", "all", "exact"),
    }[request.param]()
    config, report = (json.loads((folder / name).read_text()) for name in ("config.json", "report.json"))
    return (folder / "README.md").read_text(encoding="utf-8"), config, report


def without_settings(card: str, config: dict[str, Any]) -> str:
    """The card without front matter, recipe, commands and what config.json says was done: measurements are what remains."""
    text = card.split("---\n", 2)[2].partition("<details>")[0].partition("## Results\n")[2]
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    heads = config.get("num_key_value_heads", config["kvshare"]["source"]["num_key_value_heads"])
    return text.replace(f"({heads} KV heads for K and for V)", "").replace("an 8-bit cache", "")


def test_every_figure_of_the_card_is_one_of_the_report(written: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    card, config, report = written
    shown = set(NUMBER.findall(without_settings(card, config)))
    held = {text.format(report[key]) for key, text in FORMATS.items()}
    assert shown == held


def test_a_figure_follows_the_report(written: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    """So the test above fails where a card shows another figure than its report holds."""
    _, config, report = written
    for key, text in FORMATS.items():
        changed = report | {key: report[key] + 7}
        card = write_card(config, {}, changed)
        assert text.format(changed[key]) in card
        assert set(NUMBER.findall(without_settings(card, config))) != {f.format(report[k]) for k, f in FORMATS.items()}


def test_figures_of_a_single_row_have_no_errors(written: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    _, config, report = written
    single = report | {key: None for key in report if key.endswith("_error")} | {"perplexity": None}
    card = write_card(config, {}, single)
    assert "±" not in card
    assert f"| {report['source_perplexity']:.3f} | not finite |" in card
    assert draw_plot(report | {key: None for key in report if key.endswith("_error")}) is not None


def test_the_card_says_what_was_done(written: tuple[str, dict[str, Any], dict[str, Any]], text_file: str) -> None:
    card, config, report = written
    block = config["kvshare"]
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    expected = json.loads(json.dumps(block["recipe"]))
    for section in ("calibration", "heal", "evaluation"):
        expected[section]["data"] = Path(expected[section]["data"]).name
    assert recipe == expected
    assert str(Path(text_file).parent) not in card
    assert f"`{block['source']['name']}`" in card
    assert f"kvshare {kvshare.__version__}" in card
    command = next(shlex.split(line) for line in card.splitlines() if line.startswith("    kvshare eval"))
    assert command[:5] == ["kvshare", "eval", "<this folder>", "--against", block["source"]["name"]]
    asked = dict(zip(command[3::2], command[4::2], strict=True))
    assert asked["--data"] == report["data"] == Path(text_file).name
    assert int(asked["--tokens"]) == block["recipe"]["evaluation"]["tokens"]
    assert int(asked["--seed"]) == block["seed"]
    for part in ("## Loading", "trust_remote_code=True", "Without `trust_remote_code`", "## Limits", f"]({PLOT})"):
        assert part in card


def test_the_commit_and_another_length_of_rows_are_named(written: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    _, config, report = written
    changed = json.loads(json.dumps(config))
    changed["kvshare"]["source"] |= {"name": "org/model", "commit": COMMIT}
    changed["kvshare"]["recipe"]["evaluation"]["sequence_length"] = 128
    card = write_card(changed, {}, report)
    assert f"commit `{COMMIT}`" in card
    assert f"--against org/model@{COMMIT}" in card
    assert "rows of 128 tokens" in card


@pytest.mark.usefixtures("thorough")
def test_weights_that_were_not_measured_have_no_table(written: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    _, config, report = written
    files = card_files(config, {}, {"heal": {"tokens": 2, "steps": 2, "losses": [[1, 0.5], [2, 0.25]]}})
    card = (files["README.md"] or b"").decode()
    assert "have not been measured" in card
    assert NUMBER.findall(without_settings(card, config)) == []
    assert files[PLOT] != card_files(config, {}, report)[PLOT]
    assert card_files(config, {}, {})[PLOT] is None
    assert PLOT not in (card_files(config, {}, {})["README.md"] or b"").decode()


def source_with(folder: Path, front: dict[str, Any], commit: str | None) -> Source:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n# A model\n")
    return Source("org/model" if commit else "model", folder, commit, {}, {}, {}, ())


def test_licence_language_base_and_data_come_from_what_is_known(tmp_path: Path) -> None:
    front = {"license": "mit", "language": ["en"], "base_model": "org/base", "datasets": ["org/books"], "tags": ["theirs"]}
    local = card_matter(source_with(tmp_path / "local", front, None), Recipe())
    assert (local["license"], local["language"], local["base_model"]) == ("mit", ["en"], "org/base")
    assert local["base_model_relation"] == "finetune"
    assert local["datasets"] == ["org/books"]
    assert "theirs" not in local["tags"]
    recipe = load_recipe(None, calibration__data="org/web/en:train", heal__data="folder/mine.txt")
    hub = card_matter(source_with(tmp_path / "hub", front, COMMIT), recipe)
    assert (hub["base_model"], hub["datasets"]) == ("org/model", ["org/books", "org/web"])
    bare = card_matter(source_with(tmp_path / "bare", {}, None), Recipe())
    assert bare.keys() == {"library_name", "tags"}
    healed = with_datasets(bare, load_recipe(None, calibration__data="org/web", heal__data="org/more"), heals=True)
    assert healed["datasets"] == ["org/more"]
    assert front_matter(tmp_path / "nowhere.md") == {}
    assert "base_model" not in card_matter(open_source("kvshare/tiny"))


@pytest.mark.usefixtures("thorough")
def test_the_figure_is_made_of_the_report_alone_and_always_of_the_same_bytes(
    source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    folder, text = tmp_path / "out", {"calibration": text_file, "calibration_tokens": 1024, "eval_data": text_file}
    kvshare.convert(source_folder("llama-mha"), folder, kv_heads=4, recipe=BRIEF, eval_tokens=1024, **text)
    report = json.loads((folder / "report.json").read_text())
    stored = (folder / PLOT).read_bytes()
    assert PLOT in json.loads((folder / "kvshare_manifest.json").read_text())["files"]
    with matplotlib.rc_context({"font.size": 30, "figure.dpi": 20, "axes.facecolor": "black"}):
        assert draw_plot(report) == stored
    assert draw_plot(report | {"perplexity": 2 * report["perplexity"]}) != stored
    assert draw_plot({"layers": report["layers"]}) != stored
    image = Image.open(io.BytesIO(stored))
    assert image.width > 2 * image.height
    assert not image.info.keys() & {"Software", "Creation Time", "date:create"}
    one_row = report | {"perplexity_error": float("nan"), "source_perplexity_error": float("nan")}
    assert draw_plot(one_row) not in (None, stored)
    assert draw_plot({"layers": [], "heal": None}) is None
