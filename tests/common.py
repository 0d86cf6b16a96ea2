"""What the tests share: small models of every family, converted once per session. Offline, on the CPU.

With KVSHARE_TEST_DEVICE=cuda, tests/test_triton.py and `tests/test_attention.py -k triton` run the kernels on a GPU. There, and
with KVSHARE_TEST_EVERY=1, what is tested in turn (see `in_turn`) is tested in every combination.
"""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # one for the process: Python finds the package in it once
os.environ["CUDA_VISIBLE_DEVICES"] = "0" if os.environ.get("KVSHARE_TEST_DEVICE") == "cuda" else ""
os.environ["TRITON_INTERPRET"] = "0" if os.environ["CUDA_VISIBLE_DEVICES"] else "1"

import gc
import json
import math
import pkgutil
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import transformers
from filelock import FileLock
from hypothesis import settings
from killing import SEARCH, no_plot
from kvshare.cli import main

import kvshare
from kvshare.budget import LayerHeads, head_units
from kvshare.data import load_rows, load_tokenizer
from kvshare.loading import load_native
from kvshare.planning import Plan
from kvshare.recipe import Recipe
from kvshare.runtime.kvshare_attention import ATTENTIONS, first_of
from kvshare.runtime.modeling_kvshare import shared_class
from kvshare.sections import Calibration
from kvshare.sensitivity import Agreement, Damage, Sensitivity
from kvshare.source import TINY, open_source

DEVICE = "cuda" if os.environ["CUDA_VISIBLE_DEVICES"] else "cpu"  # of the kernels for GPUs
EVERY = DEVICE == "cuda" or bool(os.environ.get("KVSHARE_TEST_EVERY"))  # combination of what is tested in turn

# `pytest --hypothesis-profile=thorough` tries many more inputs, other ones every time.
settings.register_profile("quick", max_examples=30, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=600, deadline=None, derandomize=False, print_blob=True)
settings.load_profile("quick")

torch.set_num_threads(1)  # small tensors: threads that wait for each other cost more than they bring
transformers.utils.logging.disable_progress_bar()

TINY_FOLDER = open_source(TINY).path
Row, Column = TypeVar("Row"), TypeVar("Column")
TEXT = [
    "The captain looked at the sea for a long time before he spoke to the men who stood around him on the deck.",
    "It was a cold morning in the village, and the old woman had already lit the fire when her son came down the stairs.",
    "She wrote a letter to her sister, in which she told her of the house, the garden and the people whom she had met.",
    "There is nothing so pleasant as a walk along the river when the sun is low and the birds are singing in the trees.",
]
# One closed form per layer, for tests that are not about which of several is the best.
QUICK = Recipe.model_validate({"merge": {"balance": [1.0], "grouping": "neighbours"}, "heal": {"enabled": False}})
BRIEF = QUICK.model_copy(update={"calibration": Calibration(sequence_length=128)})


def pytest_sessionfinish() -> None:
    """Remove the remote code that this process has loaded."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What stays to the end is not looked through again: the Trainer collects garbage several times in every run."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401

    gc.collect()
    gc.freeze()


SHORT: dict[str, Any] = SEARCH | {
    "kvshare.card.draw_plot": no_plot,
    "kvshare.evaluation.GENERATED_TOKENS": 16,
    "peft.PeftModel.create_or_update_model_card": lambda *_: None,
    "os.fsync": lambda _: None,  # what outlives a process, as every test asks, outlives it without the disk
}
AS_IS = {name: pkgutil.resolve_name(name) for name in SHORT}


@contextmanager
def replaced(values: Mapping[str, Any]) -> Iterator[None]:
    """Values of modules, by their full names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _short() -> Iterator[None]:
    """The closed form searches for a few steps only, caches are counted after a few tokens, nothing is drawn: see `thorough`."""
    with replaced(SHORT):
        yield


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """For tests that run kernels in triton's interpreter, which makes the language its own anew in every function that a kernel
    calls, a quarter of its time: once for each module of functions is enough, until the kernel ends and gives it back. Another
    quarter goes into looking for integers that overflow, of which nothing is said unless kernels are debugged.
    """
    try:
        from triton.runtime import interpreter as runtime
    except ImportError:
        yield
        return
    patched: set[int] = set()

    def patch(function: Any) -> Any:
        scope = runtime._LangPatchScope()
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            scope = whole(function)
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as context:
        whole = runtime._patch_lang
        context.setattr(runtime, "_patch_lang", patch)
        context.setattr(
            runtime.interpreter_builder, "options", replace(runtime.interpreter_builder.options, sanitize_overflow=False)
        )
        yield


@pytest.fixture
def thorough() -> Iterator[None]:
    """For tests of how good the closed form is, and of figures: what others do in short to save time is done as it is."""
    with replaced(AS_IS):
        yield


@pytest.fixture
def compiling() -> Iterator[None]:
    """For tests that compile: of code that all models share, torch counts the compilations of a whole process, and allows eight."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """A folder by its name, made by the first of the test processes that wants it."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], Any]) -> Path:
        folder = root / name
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                make(folder)
        return folder

    return get


def in_turn(rows: Iterable[Row], columns: Sequence[Column], each: int = 1, whole: Collection[Row] = ()) -> list[tuple[Row, Column]]:
    """Pairs for a test that asks the same of two things that have little to do with each other, such as models and ways to
    generate: every row with `each` of the columns, the next row with the next ones, so that both are tested equally often; the
    rows of `whole`, and all where every combination is asked for, with every column.
    """
    pairs, place = [], 0
    for row in rows:
        count = len(columns) if EVERY or row in whole else each
        pairs += [(row, columns[(place + step) % len(columns)]) for step in range(count)]
        place += count
    return pairs


def at_times(*rows: Row) -> list[Row]:
    """What is tested as well where every combination is asked for."""
    return [*rows] if EVERY else []


def quick_for(source: Path) -> Recipe:
    """Rows are short where weights are random: their length says nothing then, and long ones take longer."""
    return QUICK if source == TINY_FOLDER else BRIEF


def random_model(folder: Path, model_type: str, **fields: Any) -> Path:
    """A model of a family with random weights and the bundled tokenizer: it proves shapes and identities, never quality. A field
    that is `...` is left to the family.
    """
    torch.manual_seed(7)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    settings = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    settings |= fields if "n_embd" in fields else shape | fields
    config = transformers.AutoConfig.for_model(model_type, **{name: value for name, value in settings.items() if value is not ...})
    return save_random(transformers.AutoModelForCausalLM.from_config(config), folder)


@torch.no_grad()
def save_random(model: Any, folder: Path) -> Path:
    """Give a model random weights, under which no layer is idle, and save it with the bundled tokenizer."""
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.normal_(0, 0.5)
        elif value.dim() == 1:
            value.uniform_(0.5, 1.5)
        else:
            value.normal_(0, value.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_FOLDER / name, folder / name)
    return folder


SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-gqa": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": None}),
    "smollm3-bias": ("smollm3", {"no_rope_layers": [0, 1], "attention_bias": True, "pad_token_id": None}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 8, "n_positions": 512}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
}
WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1}
FALCON = {"head_dim": ..., "num_key_value_heads": ...}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
# the other families of the registry: one small model each, with what is special about it, for the tests that walk them
FAMILY_SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral": ("ministral", WINDOWS),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.1,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
        },
    ),
    "mixtral": ("mixtral", EXPERTS),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mellum": ("mellum", EXPERTS | WINDOWS),
    "dots1": ("dots1", ROUTED | {"sliding_window": None}),
    "glm4_moe": ("glm4_moe", ROUTED | {"partial_rotary_factor": 0.5, "use_qk_norm": True, "attention_bias": True}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", WINDOWS | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3_text": ("gemma3_text", WINDOWS | {"query_pre_attn_scalar": 16}),
    "vaultgemma": ("vaultgemma", WINDOWS | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "pad_token_id": None}),
    "phimoe": ("phimoe", EXPERTS | {"attention_bias": True}),
    "olmo": ("olmo", {"clip_qkv": 1.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOWS),
    "olmoe": ("olmoe", EXPERTS),
    "flex_olmo": ("flex_olmo", EXPERTS | {"pad_token_id": None}),
    "minimax_m2": ("minimax_m2", EXPERTS),
    "granite": (
        "granite",
        {"attention_multiplier": 0.2, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "granitemoe": ("granitemoe", EXPERTS | {"residual_multiplier": 0.4, "attention_multiplier": 0.3}),
    "granitemoeshared": (
        "granitemoeshared",
        EXPERTS | {"residual_multiplier": 0.4, "attention_multiplier": 0.3, "shared_intermediate_size": 32},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        EXPERTS
        | {"layer_types": ["linear_attention", "full_attention", "full_attention"], "num_hidden_layers": 3}
        | {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16, "shared_intermediate_size": 32}
        | {"residual_multiplier": 0.4, "attention_multiplier": 0.3},
    ),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 12}),
    "gpt_oss": ("gpt_oss", WINDOWS | EXPERTS | {"attention_bias": True}),
    "exaone4": ("exaone4", WINDOWS | {"sliding_window_pattern": 2}),
    "exaone_moe": ("exaone_moe", WINDOWS | ROUTED | {"sliding_window_pattern": 2}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "hy_v3": ("hy_v3", EXPERTS),
    "jais2": ("jais2", {}),
    "hyperclovax": ("hyperclovax", {"residual_multiplier": 0.4, "attention_multiplier": 0.2}),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "cwm": ("cwm", WINDOWS),
    "solar_open": ("solar_open", ROUTED),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", WINDOWS),
    "glm": ("glm", {"partial_rotary_factor": 0.5, "attention_bias": True, "pad_token_id": None}),
    "glm4": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True, "pad_token_id": None}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "use_bias": True},
    ),
    "helium": ("helium", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": 4, "pad_token_id": None, "dropout": 0.0}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "hidden_dropout": 0.0}),
    "falcon": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-one-head": ("falcon", FALCON | {"new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": (
        "falcon",
        FALCON | {"new_decoder_architecture": False, "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
    ),
    "bloom": ("bloom", {}),
    "gptj": ("gptj", {"rotary_dim": 4, "n_inner": 48}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        EXPERTS | {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3, "num_dense_layers": 1},
    ),
}
# models that make K and V by one projection themselves, in layers of full attention: nothing is merged
GEMMA4 = {"attention_k_eq_v": True, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1, "sliding_window": 12}
GEMMA4 |= {"hidden_size_per_layer_input": 0, "num_hidden_layers": 4, "layer_types": 2 * ["sliding_attention", "full_attention"]}
BORROWED = {"num_hidden_layers": 6, "layer_types": 3 * ["sliding_attention", "full_attention"], "num_kv_shared_layers": 2}
BORROWED |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 4096, "attention_bias": True}
BORROWED |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
TIED_SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text": ("gemma4_text", GEMMA4),
    "gemma4_text-borrowed": ("gemma4_text", GEMMA4 | BORROWED),
}
# as many numbers in the keys of a token as in its hidden state: these have an exact form, with llama-mha and the bundled model
SQUARE: dict[str, tuple[str, dict[str, Any]]] = {
    "square-bias": ("llama", {"num_key_value_heads": 8, "attention_bias": True}),
    "square-window": ("mistral", {"num_key_value_heads": 8, "sliding_window": 12}),
    "square-norm": ("qwen3", {"num_key_value_heads": 8}),
    "square-groups": ("qwen3", {"head_dim": 16}),
    "square-pairs": ("gptj", {"rotary_dim": 4, "n_inner": 48, "num_key_value_heads": ...}),
}


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[..., Any]:
    """A model in shared form with random weights, by its key in SOURCES or FAMILY_SOURCES."""

    def make(key: str, **more: Any) -> Any:
        model_type, fields = (SOURCES | FAMILY_SOURCES)[key]
        fields = ({} if key in SOURCES else SMALL) | fields | more
        config = transformers.AutoConfig.from_pretrained(random_model(tmp_path / "source", model_type, **fields))
        decoder = transformers.AutoModelForCausalLM.from_config(config).get_decoder()
        found = [first_of(layer, ATTENTIONS) for layer in (decoder.h if hasattr(decoder, "h") else decoder.layers)]
        config.kvshare = {"form": "shared", "layers": [index for index, attention in enumerate(found) if attention is not None]}
        named = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        return shared_class(named).from_pretrained(tmp_path / "source", config=config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text file of 60 documents."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("<|endoftext|>".join(" ".join(TEXT[(i + j) % 4] for j in range(8)) for i in range(60)), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def own_text(once: Callable[[str, Callable[[Path], Any]], Path]) -> tuple[str, str]:
    """Two text files that the bundled model wrote, what it knows well: one to calibrate and heal on, one to measure on."""

    def write(folder: Path) -> None:
        folder.mkdir()
        tokenizer = load_tokenizer(TINY_FOLDER)
        rows = load_rows("self", tokenizer, load_native(TINY_FOLDER, dtype=torch.float32), 15_360, 128, 0)
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        (folder / "heal.txt").write_text("<|endoftext|>".join(texts[:84]))
        (folder / "val.txt").write_text("<|endoftext|>".join(texts[84:]))

    folder = once("own-text", write)
    return str(folder / "heal.txt"), str(folder / "val.txt")


@pytest.fixture(scope="session")
def source_folder(once: Callable[[str, Callable[[Path], Any]], Path]) -> Callable[[str], Path]:
    """A source model by its key in one of these tables, made once; `tiny` is the bundled, really trained one."""

    def get(key: str) -> Path:
        if key == "tiny":
            return TINY_FOLDER
        model_type, fields = (SOURCES | SQUARE | FAMILY_SOURCES | TIED_SOURCES)[key]
        small = SMALL if key in FAMILY_SOURCES | TIED_SOURCES else {}
        return once(f"source-{key}", lambda folder: random_model(folder, model_type, **small | fields))

    return get


@pytest.fixture(scope="session")
def converted_folder(
    once: Callable[[str, Callable[[Path], Any]], Path], source_folder: Callable[[str], Path], text_file: str
) -> Callable[..., Path]:
    """A converted checkpoint of a source, made once per settings: a little text, one closed form per layer, no healing."""

    def get(key: str, kv_heads: int | str = "all", init: str = "svd", form: str = "shared") -> Path:
        settings: dict[str, Any] = {"init": init, "kv_heads": kv_heads, "form": form, "calibration": text_file}
        settings |= {"calibration_tokens": 4096 if key == "tiny" else 1024, **measuring(key, text_file)}
        return once(
            f"{key}-{kv_heads}-{init}-{form}".replace("/", "of"),
            lambda folder: kvshare.convert(source_folder(key), folder, recipe=quick_for(source_folder(key)), **settings),
        )

    return get


@pytest.fixture(scope="session")
def measured_folder(once: Callable[[str, Callable[[Path], Any]], Path], own_text: tuple[str, str]) -> Callable[[str], Path]:
    """The bundled, really trained model by init: calibrated and measured on text that it wrote itself, not healed. Closed forms are
    searched for as always, but only one per layer unless every combination is tested.
    """
    settings: dict[str, Any] = {"calibration_tokens": 8_192, "eval_tokens": 4_096, "heal": False}
    settings |= {"calibration": own_text[0], "eval_data": own_text[1], "recipe": None if EVERY else QUICK}

    def make(output: Path, init: str) -> None:
        with replaced(AS_IS):
            kvshare.convert("kvshare/tiny", output, init=init, **settings)

    def get(init: str) -> Path:
        return once(f"measured-{init}", lambda output: make(output, init))

    return get


def measuring(key: str, text_file: str) -> dict[str, Any]:
    """How a conversion of the source of this key is measured: not at all, but for the models at whose reports tests look."""
    return {"eval_data": text_file, "eval_tokens": 1024} if key in ("tiny", "llama-mha") else {"eval_mode": "off"}


def convert_layers(source: Path, output: Path, chosen: LayerHeads, text_file: str, **settings: Any) -> None:
    """Convert with a cache budget that chooses these heads per layer, None for an untouched one, without measuring damage."""

    def choose(_model: Any, plan: Plan, *_: Any) -> Sensitivity:
        units = head_units(chosen, plan.source_kv_heads)
        layers = tuple((Damage(heads, head_units((heads,), plan.source_kv_heads), 0.0, 0.0),) for heads in chosen)
        return Sensitivity(layers, chosen, units, units, Agreement(math.nan, math.nan, math.nan), 0)

    text = {"calibration": text_file, "calibration_tokens": 1024, "eval_data": text_file, "eval_tokens": 1024}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvshare.conversion.measure_sensitivity", choose)
        kvshare.convert(source, output, recipe=quick_for(source), cache_budget=1.0, **{"heal": False, **text, **settings})


def mixed_layers(key: str, source_heads: int) -> LayerHeads:
    """Layers of all forms: untouched, shared, shared with fewer heads."""
    if key == "tiny":
        return (2, None, 8, 4, None, 1)
    return (None, source_heads, max(1, source_heads // 2), 1)


@pytest.fixture(scope="session")
def mixed_folder(once: Callable[[str, Callable[[Path], Any]], Path], text_file: str) -> Callable[[str], Path]:
    """A converted checkpoint of `mixed_layers` by its key in SOURCES, made once; its source lies beside it."""

    def make(key: str, folder: Path) -> None:
        source = TINY_FOLDER
        if key != "tiny":
            model_type, fields = SOURCES[key]
            more = {"num_hidden_layers": 4}
            if "no_rope_layers" in fields:
                more["no_rope_layers"] = 2 * fields["no_rope_layers"]
            source = random_model(folder / "source", model_type, **fields | more)
        heads = json.loads((source / "config.json").read_text())["num_key_value_heads"]
        convert_layers(source, folder / "out", mixed_layers(key, heads), text_file, **measuring(key, text_file))

    return lambda key: once(f"{key}-mixed", lambda folder: make(key, folder)) / "out"


@pytest.fixture
def checkpoint(converted_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A converted checkpoint that a test may damage."""
    return Path(shutil.copytree(converted_folder("tiny"), tmp_path / "checkpoint"))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """The entry point of the `kvshare` script, with these arguments."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kvshare", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def edit_json(file: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file in place."""
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")
