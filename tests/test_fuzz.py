"""Whatever lies in a file that kvshare reads: a result, or a refusal in three lines. No other exception, no write elsewhere.

Elsewhere is what is neither a folder of the test nor the cache of the Hub; the interpreter itself reports what is written.

Random bytes rarely get past a first check, so most inputs are valid ones in which some fields were changed, taken away, renamed,
doubled or exchanged. `pytest --hypothesis-profile=thorough tests/test_fuzz.py` tries many more of them (see common.py).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from common import QUICK, TEXT, TINY_FOLDER, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killing import CHANGES, WRITES
from safetensors.torch import load_file, save, save_file
from test_hub import Hub

import kvshare
from kvshare.card import card_files, card_matter, carried_report
from kvshare.checkpoint import MANIFEST, write_json
from kvshare.data import load_tokenizer, token_rows
from kvshare.documents import SEPARATOR, check_data
from kvshare.errors import KVShareError
from kvshare.families import family_of
from kvshare.headers import read_header
from kvshare.healing import COMMAND, check_earlier
from kvshare.hub import describe
from kvshare.journal import JOURNAL, open_journal, read_journal
from kvshare.layerwise import LayerReport
from kvshare.loading import load_native
from kvshare.native import require_form
from kvshare.planning import make_plan
from kvshare.recipe import Recipe, load_recipe, recipe_names
from kvshare.retrieval import read_questions
from kvshare.runtime.kvshare_channels import FILE as CHANNELS
from kvshare.sections import Calibration
from kvshare.sensitivity import Sensitivity
from kvshare.sizes import bytes_of
from kvshare.source import INDEX, SINGLE, Source, open_source
from kvshare.statistics import DESCRIPTION, LAYER_FILE
from kvshare.streaming import open_skeleton
from kvshare.training import HealResult
from kvshare.verification import read_block, verify, verify_form

# ---------------------------------------------------------------------------------------------------------------------- inputs

DEEP, LONG, TWICE = "@deep@", "@long@", "@twice@"  # what `dumped` puts where these stand: no dictionary can hold it
ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, 8, 16, -1, -8, 2**31, 2**32, 2**60, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, 0.5, -1.5, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        ".",
        "..",
        "../x",
        "../outside.safetensors",
        "/etc/passwd",
        "a/b",
        "x\0y",
        "\ud800",
        "a\nb\x1b[2J",
        "[/x]",
        "x" * 300,
        "0",
        "4",
    ),
    *("F32", "BF16", "F99", "llama", "gpt2", "shared", "exact", "svd", "model.safetensors", "config.json"),
    *([], {}, [[]], [None], [0], [2, 4], {"a": 1}, [[[[[]]]]], DEEP, LONG),
]
SCALARS = st.sampled_from(ODD) | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=5
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every field of a nested value, as its container and its key or index."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        found += [(inner, key) for key in keys]
        waiting += [inner[key] for key in keys]
    return found


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """A valid value in which one to three fields are not as they were."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        fields = places(value)
        if not fields:
            return draw(VALUES)
        container, key = draw(st.sampled_from(fields)) if len(fields) < 400 else fields[draw(st.integers(0, len(fields) - 1))]
        how = draw(st.sampled_from(["put", "put", "put", "delete", "rename", "twice", "wrap", "exchange"]))
        if how == "put":
            container[key] = copy.deepcopy(draw(VALUES))
        elif how == "delete":
            del container[key]
        elif how == "wrap":
            container[key] = [container[key]]
        elif how == "exchange":
            other, place = draw(st.sampled_from(fields))
            container[key] = copy.deepcopy(other[place])
        elif isinstance(container, dict):
            name = draw(st.sampled_from([*map(str, container), "../x", "a\0", "\ud800", ""]) | st.text(max_size=5))
            if how == "rename":
                container[name] = container.pop(key)
            else:
                container[f"{key}{TWICE}"] = draw(VALUES)
    return value


def dumped(value: Any) -> str:
    """JSON text, with nesting and numbers that no parser is expected to like, and keys that occur twice."""
    text = json.dumps(value)
    for mark, content in ((f'"{DEEP}"', "[" * 100_000 + "]" * 100_000), (f'"{LONG}"', "9" * 5_000), (f'{TWICE}"', '"')):
        text = text.replace(mark, content)
    return text


def as_bytes(value: Any) -> bytes:
    """`dumped`, as it stands in a file."""
    return dumped(value).encode("utf-8", "surrogatepass")


def texts(valid: Any) -> st.SearchStrategy[bytes]:
    """Files that were JSON once: changed fields, cut short, a byte changed, or anything."""
    whole = json.dumps(valid).encode()
    places = st.integers(0, len(whole) - 1)
    cut = places.map(lambda place: whole[:place])
    flipped = st.tuples(places, st.integers(1, 255)).map(
        lambda at: whole[: at[0]] + bytes([whole[at[0]] ^ at[1]]) + whole[at[0] + 1 :]
    )
    mutated = changed(valid).map(as_bytes)
    anything = st.binary(max_size=40) | VALUES.map(as_bytes)
    return st.one_of(mutated, mutated, mutated, mutated, cut, flipped, anything)


def cases(share: float = 1.0) -> Any:
    """The settings of a test: a share of the profile's number of examples."""
    count = max(1, int(settings.default.max_examples * share))
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


class Watch:
    """What is written, renamed or removed beyond some folders while a reader works."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.active, self.strays = False, list[str]()
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by the interpreter for everything that it does to files, and much else."""
        if not self.active or (event != "open" and event not in CHANGES):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        if isinstance(arguments[0], str | bytes | os.PathLike):
            inside = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1  # a folder that is open, or none
            folder = "" if inside == -1 else os.readlink(f"/proc/self/fd/{inside}")
            path = os.path.realpath(os.path.join(folder, os.fsdecode(arguments[0])))
            if not path.startswith(self.allowed):
                self.strays.append(f"{event} {path}")


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def _nothing_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cache = os.path.dirname(huggingface_hub.constants.HF_HUB_CACHE)
    WATCH.allowed = tuple(map(os.path.realpath, (tmp_path_factory.getbasetemp(), cache, os.devnull)))
    yield
    WATCH.allowed = ()


def outcome(action: Callable[[], Any]) -> Any:
    """The result; or the refusal, which has what, why and what to do, and nothing that a terminal would obey."""
    before, WATCH.active = WATCH.active, True
    try:
        return action()
    except KVShareError as error:
        refusal = error
    finally:
        WATCH.active = before
        strays, WATCH.strays = WATCH.strays, []
        assert not strays, strays
    lines = str(refusal).split("\n")
    assert [line[:7] for line in lines[1:]] == ["  why: ", "  do:  "], lines
    assert all(line.isprintable() for line in lines), lines
    assert sum(map(len, lines)) < 10_000
    return refusal


# -------------------------------------------------------------------------------------------------------------- a tiny model

SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "vocab_size": 4096,
}


class Files:
    """A model, the same in two shards, and what `convert` makes of it; every file can be put back as it was."""

    def __init__(self, folder: Path) -> None:
        self.source = random_model(folder / "source", "llama", **SHAPE)
        self.sharded, self.converted = folder / "sharded", folder / "converted"
        shutil.copytree(self.source, self.sharded)
        values = load_file(self.source / SINGLE)
        names = sorted(values)
        shards = {f"model-{number}.safetensors": names[number::2] for number in range(2)}
        for file, held in shards.items():
            save_file({name: values[name] for name in held}, self.sharded / file, metadata={"format": "pt"})
        write_json(self.sharded / INDEX, {"weight_map": {name: file for file, held in shards.items() for name in held}})
        (self.sharded / SINGLE).rename(folder / "outside.safetensors")
        (folder / "text.txt").write_text("<|endoftext|>".join(TEXT), encoding="utf-8")
        self.statistics = folder / "statistics"
        short = QUICK.model_copy(update={"calibration": Calibration(sequence_length=16)})
        text: dict[str, Any] = {"calibration": str(folder / "text.txt"), "calibration_tokens": 64}
        kvshare.convert(self.source, self.converted, recipe=short, eval_mode="off", **text)
        kvshare.calibrate(self.source, self.statistics, kv_heads=1, recipe=short, data=str(folder / "text.txt"), tokens=64)
        self.kept = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    def json(self, file: Path) -> Any:
        """What a file holds when nothing was changed."""
        return json.loads(self.kept[file])

    @contextmanager
    def changed(self, file: Path, content: bytes) -> Iterator[None]:
        """Another content; in a checkpoint with its checksum in the manifest: whoever changes one can change both."""
        manifest = file.parent / MANIFEST
        file.write_bytes(content)
        if manifest in self.kept and file != manifest:
            listed = self.json(manifest)
            listed["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            write_json(manifest, listed)
        try:
            yield
        finally:
            for touched in (file, manifest):
                if touched in self.kept:
                    touched.write_bytes(self.kept[touched])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where examples are written."""
    return tmp_path_factory.mktemp("examples")


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: bytes, content: bytes) -> bytes:
    """The inverse."""
    return struct.pack("<Q", len(header)) + header + content


# ----------------------------------------------------------------------------------------------------------- files of a model

SMALL_HEADER, SMALL_DATA = header_of(
    save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.zeros(0, 5)})
)


@cases(2)
@given(data=st.data())
def test_headers(folder: Path, data: st.DataObject) -> None:
    raw = data.draw(texts(SMALL_HEADER))
    length = data.draw(st.just(len(raw)) | st.sampled_from([0, 1, 2**31, 2**60, 2**63, 2**64 - 1]) | st.integers(0, 2 * len(raw)))
    content = data.draw(st.sampled_from([SMALL_DATA] * 4 + [SMALL_DATA[:-1], SMALL_DATA + b"\0", b""]))
    file = folder / SINGLE
    file.write_bytes(struct.pack("<Q", length) + raw + content)
    specs = outcome(lambda: read_header(file))
    if not isinstance(specs, KVShareError):
        assert sum(spec.bytes for spec in specs) + 8 + length == file.stat().st_size
        assert len({spec.name for spec in specs}) == len(specs)


@cases()
@given(content=st.binary(max_size=64))
def test_any_bytes_as_weights(folder: Path, content: bytes) -> None:
    (folder / SINGLE).write_bytes(content)
    outcome(lambda: read_header(folder / SINGLE))


def opened(model: Path) -> Source | KVShareError:
    """What `open_source` says; no file outside the folder may be part of it."""
    source = outcome(lambda: open_source(model))
    if not isinstance(source, KVShareError):
        for file in source.file_bytes:
            assert (model / file).resolve().parent == model.resolve()
            assert file.endswith(".safetensors")
    return source


@cases(2)
@given(data=st.data())
def test_indices(files: Files, data: st.DataObject) -> None:
    file = files.sharded / INDEX
    with files.changed(file, data.draw(texts(files.json(file)))):
        opened(files.sharded)


PLANS = st.builds(
    lambda init, heads, budget: {"init": init, **({"kv_heads": heads} if budget is None else {"cache_budget": budget})},
    st.sampled_from(["mean", "svd", "exact", "learned"]),
    st.sampled_from(["all", 1, 2, "1/2", "1/7"]),
    st.none() | st.sampled_from([0.3, 1.0]),
)


def planned(model: Path, settings: dict[str, Any]) -> None:
    """Plan a conversion, if the model can be opened; the plan is JSON data."""
    source = opened(model)
    if not isinstance(source, KVShareError):
        plan = outcome(lambda: make_plan(source, load_recipe(None, **settings)))
        if not isinstance(plan, KVShareError):
            assert 0 <= plan.to_dict()["cache_reduction"] < 1
            json.dumps(plan.to_dict())


@cases(3)
@given(data=st.data(), settings=PLANS)
def test_configs(files: Files, data: st.DataObject, settings: dict[str, Any]) -> None:
    file = files.source / "config.json"
    with files.changed(file, data.draw(texts(files.json(file)))):
        outcome(lambda: planned(files.source, settings))


@cases()
@given(data=st.data(), settings=PLANS)
def test_headers_of_a_model(files: Files, data: st.DataObject, settings: dict[str, Any]) -> None:
    """Names, shapes and dtypes that fit their file and may not fit the config."""
    file = files.source / SINGLE
    header, content = header_of(files.kept[file])
    with files.changed(file, with_header(as_bytes(data.draw(changed(header))), content)):
        outcome(lambda: planned(files.source, settings))


def skeleton_of(source: Source) -> Any:
    """As every command opens it that reads a layer at a time."""
    family = family_of("llama")
    require_form(source, family)
    return open_skeleton(source, family)


@cases(0.5)
@given(data=st.data())
def test_loading_sources(files: Files, data: st.DataObject) -> None:
    """What a plan takes and transformers may not: activations, ropes, sizes, redirections."""
    file = files.source / "config.json"
    with files.changed(file, as_bytes(data.draw(changed(files.json(file))))):
        source = opened(files.source)
        if not isinstance(source, KVShareError):
            outcome(lambda: load_native(files.source))
            outcome(lambda: skeleton_of(source))


@cases(0.5)
@given(data=st.data(), name=st.sampled_from(["tokenizer_config.json", "tokenizer.json"]))
def test_tokenizers(files: Files, folder: Path, data: st.DataObject, name: str) -> None:
    for other in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / other).write_bytes(files.kept[files.source / other])
    valid = files.json(files.source / name)
    if name == "tokenizer.json":
        valid["model"]["vocab"] = {token: place for token, place in valid["model"]["vocab"].items() if place < 20}
        valid["model"]["merges"] = []
    (folder / name).write_bytes(data.draw(texts(valid)))
    outcome(lambda: load_tokenizer(folder)("some text"))


# ------------------------------------------------------------------------------------------------------ files of a checkpoint


def configs(valid: Any) -> st.SearchStrategy[bytes]:
    """Configs of checkpoints; in half of them the kvshare block alone is changed."""
    return texts(valid) | changed(valid["kvshare"]).map(lambda block: as_bytes(valid | {"kvshare": block}))


@cases(3)
@given(data=st.data())
def test_configs_of_checkpoints(files: Files, data: st.DataObject) -> None:
    file = files.converted / "config.json"
    with files.changed(file, data.draw(configs(files.json(file)))):
        for read in (read_block, verify_form, verify, lambda checkpoint: kvshare.push(checkpoint, "org/name", dry_run=True)):
            outcome(lambda read=read: read(files.converted))


@cases()
@given(data=st.data())
def test_headers_of_checkpoints(files: Files, data: st.DataObject) -> None:
    file = files.converted / SINGLE
    header, content = header_of(files.kept[file])
    with files.changed(file, with_header(as_bytes(data.draw(changed(header))), content)):
        outcome(lambda: verify(files.converted))


@cases(0.5)
@given(data=st.data())
def test_loading_checkpoints(files: Files, data: st.DataObject) -> None:
    file = files.converted / "config.json"
    with files.changed(file, data.draw(configs(files.json(file)))):
        model = outcome(lambda: kvshare.load(files.converted))
        assert isinstance(model, KVShareError) or model.config.model_type == "llama"


@cases()
@given(data=st.data())
def test_channels(files: Files, data: st.DataObject) -> None:
    """What a checkpoint says of the numbers that its cache is to hold in few bits."""
    file = files.converted / CHANNELS
    with files.changed(file, data.draw(texts(files.json(file)))):
        verified, model = outcome(lambda: verify(files.converted)), outcome(lambda: kvshare.load(files.converted, cache_bits=4))
        assert isinstance(verified, KVShareError) == isinstance(model, KVShareError)
        if not isinstance(model, KVShareError):
            layer = model.model.layers[1].self_attn.kvshare_channels
            assert layer.middle.shape == layer.size.shape == (2, 1, 4)
            assert bool(layer.middle.isfinite().all() & layer.size.isfinite().all() & (layer.size > 0).all())


@cases(2)
@given(data=st.data())
def test_manifests(files: Files, data: st.DataObject) -> None:
    file = files.converted / MANIFEST
    with files.changed(file, data.draw(texts(files.json(file)))):
        outcome(lambda: verify(files.converted))
        pushed = outcome(lambda: kvshare.push(files.converted, "org/name", dry_run=True))
        if not isinstance(pushed, KVShareError):
            assert all((files.converted / name).resolve().parent == files.converted.resolve() for name in pushed.files)


@cases(0.3)
@given(data=st.data(), name=st.sampled_from([DESCRIPTION, LAYER_FILE.format(0), LAYER_FILE.format(1), MANIFEST]))
def test_statistics(files: Files, folder: Path, data: st.DataObject, name: str) -> None:
    """What a conversion takes in place of text: moments of other shapes, heads that are not there, damaged files."""
    file = files.statistics / name
    if name.endswith(".json"):
        content = data.draw(texts(files.json(file)))
    else:
        header, numbers = header_of(files.kept[file])
        scale = data.draw(st.sampled_from([1.0, 0.0, -1.0, 1e-300, 1e300]))
        changed_numbers = (numpy.frombuffer(numbers) * scale).tobytes()
        content = with_header(as_bytes(data.draw(st.just(header) | changed(header))), changed_numbers)
    output = folder / "from-statistics"
    with files.changed(file, content):
        made = outcome(
            lambda: kvshare.convert(
                files.source, output, init="svd", kv_heads=1, statistics=files.statistics, heal=False, eval_mode="off"
            )
        )
    assert output.exists() != isinstance(made, KVShareError)
    if output.exists():
        verify(output)
        shutil.rmtree(output)
    assert not list(folder.glob("*from-statistics*"))


REPORT = {
    "perplexity": 10.0,
    "perplexity_error": 0.1,
    "source_perplexity": 9.0,
    "source_perplexity_error": None,
    "layers": [{"layer": 0, "lost": 0.1, "error": 0.2}, {"layer": 1, "lost": 0.3, "error": 0.4}],
    "heal": {"tokens": 10, "steps": 2, "losses": [[1, 0.5], [2, 0.4]]},
}


@cases(0.3)
@given(data=st.data())
def test_reports(files: Files, data: st.DataObject) -> None:
    """What healing carries over from a checkpoint's report, and the card that is made of it."""
    file = files.converted / "report.json"
    with files.changed(file, data.draw(texts(REPORT))):
        config = files.json(files.converted / "config.json")
        kept = outcome(lambda: carried_report(files.converted))
        if not isinstance(kept, KVShareError):
            outcome(lambda: card_files(config, {}, kept))


FRONT = {
    "license": "mit",
    "license_name": "some",
    "language": ["en", "de"],
    "base_model": "org/base",
    "datasets": ["org/books"],
    "tags": ["theirs"],
    "pipeline_tag": "text-generation",
}


def yamls(valid: Any) -> st.SearchStrategy[bytes]:
    """YAML that was valid once, and what only YAML can go wrong with."""
    nasty = st.sampled_from(NASTY_YAML)
    return st.one_of(
        texts(valid), texts(valid), nasty, st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    )


LAUGHS = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(15))
NASTY_YAML = [
    *(f"{text}".encode() for text in ("seed: 2001-99-99", "seed: !!int ''", "seed: !!int _", "seed: !!float x", "seed: !!bool x")),
    *(
        f"{text}".encode()
        for text in ("seed: !!timestamp x", "? [a]\n: b", "seed: !!binary x", "seed: =", "<<: 5", "<<: [1]", "&a [*a]")
    ),
    *(
        f"{text}".encode()
        for text in ("seed: !!python/object/apply:os.getcwd []", "seed: " + "9" * 5000, "--- 1\n--- 2", "seed: *b")
    ),
    *(b"[" * 2_000, b"{a: " * 2_000, b"- " * 2_000, LAUGHS.encode(), (LAUGHS + "init: *p").encode()),
    *(
        (LAUGHS + "license: *p\ndatasets: *p").encode(),
        b"heal: &a {tokens: 5, data: *a}",
        b"\xef\xbb\xbfseed: 1",
        b"\0",
        b"seed: '\xc2\x85'",
    ),
]


@cases(2)
@given(data=st.data())
def test_front_matter(files: Files, folder: Path, data: st.DataObject) -> None:
    """The card of a stranger's model, of which licence and data sets are carried on."""
    source = Source("model", folder, data.draw(st.sampled_from([None, "0" * 40])), {}, {}, {}, ())
    (folder / "README.md").write_bytes(b"---\n" + data.draw(yamls(FRONT)) + b"\n---\n# A model\n")
    config = files.json(files.converted / "config.json")
    made = outcome(lambda: card_files(config, card_matter(source, load_recipe(None)), {}))
    if not isinstance(made, KVShareError):
        card = (made["README.md"] or b"").decode()
        assert yaml.safe_load(card.partition("---\n")[2].partition("\n---\n")[0])["library_name"] == "transformers"


JOB = {"command": COMMAND, "checkpoint": "0" * 64, "kvshare": "0.1.0", "seed": 0, "heal.tokens": 100, "text.self": "self"}


@cases()
@given(data=st.data(), resume=st.booleans())
def test_jobs(folder: Path, data: st.DataObject, resume: bool) -> None:
    """Healing that broke off: the job that it says it was."""
    (folder / JOURNAL).write_bytes(data.draw(texts({"name": "job", "value": JOB})) + b"\n")
    outcome(lambda: check_earlier(read_journal(folder / JOURNAL), JOB, folder, resume))


RESULTS: dict[str, tuple[Any, Any]] = {
    "layer 0": (
        LayerReport,
        {"layer": 0, "lost": 0.1, "error": 0.2, "balance": 1.0, "condition": 2.0, "grouping": [[0], [1]], "fit": None},
    ),
    "healed": (
        HealResult,
        {"tokens": 5, "steps": 1, "losses": [[1, 0.5]], "terms": {"kl": 0.5}, "learning_rate": 0.01, "report": None},
    ),
    "sensitivity": (
        Sensitivity,
        {
            "layers": [[{"heads": 2, "units": 2, "predicted": 0.1, "measured": 0.2}]],
            "chosen": [2],
            "units": 2,
            "budget_units": 2,
            "agreement": {"spearman": 0.5, "log_pearson": 0.5, "spearman_of_layers": 0.5},
            "tokens": 5,
        },
    ),
}


@cases()
@given(data=st.data())
def test_journals(folder: Path, data: st.DataObject) -> None:
    """Work that broke off; what is found there is of the same job and of the right kind, or refused."""
    job = {"command": "convert", "seed": 0}
    lines: list[Any] = [{"name": "job", "value": job}, *({"name": name, "value": value} for name, (_, value) in RESULTS.items())]
    place = data.draw(st.integers(0, len(lines) - 1))
    written = [json.dumps(line).encode() for line in lines]
    written[place] = data.draw(texts(lines[place]))
    (folder / JOURNAL).write_bytes(b"\n".join(written) + data.draw(st.sampled_from([b"\n", b""])))
    journal = outcome(lambda: open_journal(folder, job, False))
    if not isinstance(journal, KVShareError):
        for name, (kind, _) in RESULTS.items():
            if name in journal:
                outcome(lambda name=name, kind=kind: journal.result(name, kind))


# ------------------------------------------------------------------------------------------------------ what a user hands over


@cases(2)
@given(data=st.data(), name=st.sampled_from(recipe_names()))
def test_recipes(folder: Path, data: st.DataObject, name: str) -> None:
    file = folder / "recipe.yaml"
    file.write_bytes(data.draw(yamls(load_recipe(name).model_dump(mode="json"))))
    recipe = outcome(lambda: load_recipe(file))
    if not isinstance(recipe, KVShareError):
        assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


ARGUMENTS = st.text(max_size=12) | st.sampled_from(
    ["\0", "x" * 5_000, "x/" + "y" * 300, "\ud800", "~", "org/name@\0", "..", "/", "a/.."]
)


def size_of(text: str) -> int:
    """What an option for a number of bytes makes of its argument."""
    return bytes_of(text, "max_shard_size")


@cases()
@given(text=ARGUMENTS)
def test_arguments(text: str) -> None:
    """What stands where a model, a recipe, a text, a checkpoint or a size is expected."""
    for action in (open_source, load_recipe, check_data, size_of, lambda name: read_block(Path(name))):
        outcome(lambda action=action: action(text))


@cases()
@given(size=st.from_regex(r"\A *[0-9.]{1,400} *[kMGTiBx]{0,3} *\Z"))
def test_sizes(size: str) -> None:
    assert isinstance(outcome(lambda: size_of(size)), int | KVShareError)


QUESTIONS = [{"prompt": "one and", "answer": " two"}, {"prompt": "three and", "answer": " four"}]


@cases()
@given(data=st.data())
def test_questions(folder: Path, data: st.DataObject, tokenizer: Any) -> None:
    lines = [json.dumps(line).encode() for line in QUESTIONS]
    lines[data.draw(st.integers(0, 1))] = data.draw(texts(QUESTIONS[0]))
    file = folder / "questions.jsonl"
    file.write_bytes(b"\n".join(lines))
    questions = outcome(lambda: read_questions(file))
    if not isinstance(questions, KVShareError):
        assert questions
        assert all(tokenizer(question.answer)["input_ids"] and tokenizer(question.prompt) for question in questions)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY_FOLDER)


def read_rows(file: Path, tokenizer: Any) -> None:
    rows = outcome(lambda: token_rows(str(file), tokenizer, 64, 4))
    assert isinstance(rows, KVShareError) or rows.shape[1] == 4


@cases()
@given(data=st.data())
def test_text_files(folder: Path, tokenizer: Any, data: st.DataObject) -> None:
    pieces = st.sampled_from([SEPARATOR.encode(), b"\0", b"\xff", "\ud800".encode("utf-8", "surrogatepass"), b" "]) | st.binary(
        max_size=20
    )
    (folder / "text.txt").write_bytes(b"".join(data.draw(st.lists(pieces, max_size=8))))
    read_rows(folder / "text.txt", tokenizer)


@cases(0.5)
@given(data=st.data())
def test_json_lines(folder: Path, tokenizer: Any, data: st.DataObject) -> None:
    lines = [data.draw(texts({"text": "It was a cold morning in the village.", "other": 1})) for _ in range(2)]
    (folder / "text.jsonl").write_bytes(b"\n".join(lines))
    read_rows(folder / "text.jsonl", tokenizer)


PARQUET = io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"text": ["It was a cold morning.", "She wrote a letter."]}), PARQUET)


@cases(0.5)
@given(data=st.data())
def test_parquet(folder: Path, tokenizer: Any, data: st.DataObject) -> None:
    valid = bytearray(PARQUET.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        valid[data.draw(st.integers(0, len(valid) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "text.parquet").write_bytes(bytes(valid[: data.draw(st.just(len(valid)) | st.integers(0, len(valid)))]))
    read_rows(folder / "text.parquet", tokenizer)


# ------------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Iterator[Hub]:
    """A Hub on loopback that gives a copy of the model in shards, and a client that asks it."""
    served = Path(shutil.copytree(files.sharded, tmp_path_factory.mktemp("hub") / "served"))
    hub = Hub(served)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(served.parent / "cache"))
        address = f"http://127.0.0.1:{hub.server_address[1]}"
        patch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        patch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        assert describe("org/model").tensors.keys() == open_source(files.sharded).tensors.keys()
        yield hub
    huggingface_hub.close_session()
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@cases(0.5)
@given(data=st.data())
def test_headers_on_the_hub(files: Files, hub: Hub, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([INDEX, "model-0.safetensors"]))
    whole = files.kept[files.sharded / name]
    if name == INDEX:
        content = data.draw(texts(json.loads(whole)))
    else:
        header, rest = header_of(whole)
        raw = data.draw(texts(header))
        content = struct.pack("<Q", data.draw(st.just(len(raw)) | st.sampled_from([0, 2**60]))) + raw + rest
    (hub.folder / name).write_bytes(content)
    shutil.rmtree(hub.folder.parent / "cache", ignore_errors=True)
    try:
        source = outcome(lambda: describe("org/model"))
    finally:
        (hub.folder / name).write_bytes(whole)
    if not isinstance(source, KVShareError):
        assert all(file.endswith(".safetensors") and "/" not in file for file in source.file_bytes)
        outcome(lambda: make_plan(source, load_recipe()))
