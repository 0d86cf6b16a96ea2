"""mlx-lm with the smaller cache: its own model of every known family, held against itself with a cache of full size.

mlx has builds for some machines only. Without one, nothing of this file is checked.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import BRIEF, FAMILY_SOURCES, QUICK, SOURCES, TEXT, edit_json, random_model
from transformers import AutoConfig, AutoModelForCausalLM

import kvshare
from kvshare.families import family_of
from kvshare.mlx import KNOWN, READ_ROPE, older_rope
from kvshare.runtime import MLX

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: what mlx-lm computes with the smaller cache was not checked")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: what it computes with the smaller cache was not checked")

from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models import cache as caches  # noqa: E402

from kvshare.runtime import kvshare_mlx as runtime  # noqa: E402

SHORT_ROWS = BRIEF.model_copy(update={"heal": BRIEF.heal.model_copy(update={"sequence_length": 128, "batch_tokens": 512})})
PROMPT = [*range(100, 120)]
KEYS = {model_type: key for key, (model_type, _) in (SOURCES | FAMILY_SOURCES).items() if model_type in KNOWN}
# what mlx-lm asks for in config.json, and configs that transformers has written for the tests do not say
SAID: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "cohere2": {"sliding_window_pattern": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "gemma3_text": {"sliding_window_pattern": 2},
    "lfm2": {"block_dim": 32, "block_multiple_of": 1, "block_ffn_dim_multiplier": 1.0},
    "mellum": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "minimax_m2": {"rotary_dim": 8, "shared_intermediate_size": 0},
}


def asked(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what mlx-lm asks for."""
    said = {"partial_rotary_factor": 1.0, "rope_theta": 10_000.0, "rope_scaling": None}
    return said | config | older_rope(config) | SAID.get(config["model_type"], {})


def load(folder: Path, shared: bool) -> Any:
    """With the smaller cache by the file that lies in the folder."""
    config = asked(json.loads((folder / "config.json").read_text())) | {"model_file": MLX if shared else None}
    model, _ = mlx_lm.utils.load_model(folder, model_config=config, trust_remote_code=True)
    model.set_dtype(mx.float32)
    return model


def steps(model: Any, tokens: int = 30, cache: list[Any] | None = None) -> tuple[Any, list[int], int]:
    """Logits of all steps, the likeliest tokens and bytes of the cache: the prompt in two parts, then token by token."""
    cache = caches.make_prompt_cache(model) if cache is None else cache
    found = [model(mx.array([part]), cache=cache) for part in (PROMPT[:7], PROMPT[7:])]
    chosen = []
    for _ in range(tokens):
        chosen.append(found[-1][0, -1].argmax().item())
        found.append(model(mx.array([chosen[-1:]]), cache=cache))
    return mx.concatenate(found, axis=1), chosen, sum(layer.nbytes for layer in cache)


def assert_equal(native: Any, shared: Any, half: bool = True, **settings: Any) -> None:
    (wanted, tokens, whole), (got, given, kept) = (steps(model, **settings) for model in (native, shared))
    assert mx.abs(wanted - got).max().item() < 1e-3
    assert tokens == given
    assert not half or 2 * kept == whole


@pytest.mark.parametrize("model_type", KNOWN)
def test_a_family(source_folder: Callable[[str], Path], model_type: str) -> None:
    """mlx-lm's own model, with random weights of its own: what it makes of a checkpoint's weights is its affair."""
    config = asked(json.loads((source_folder(KEYS[model_type]) / "config.json").read_text()))
    family = family_of(model_type)
    layers = [layer for layer in range(family.number("num_hidden_layers", config)) if family.attends(config, layer)]
    heads = family.kv_heads_of(config, family.number("num_attention_heads", config))
    block = {"form": "shared", "layers": layers, "kv_heads": [heads] * len(layers)}
    args = runtime.ModelArgs.from_dict(config | {"kvshare": block})
    mx.random.seed(3)
    native, shared = args.module.Model(args.native), runtime.Model(args)
    native.update(
        tree_map(lambda value: mx.random.uniform(0.5, 1.5, value.shape) if value.ndim == 1 else value, native.parameters())
    )
    for layer in layers:
        attention = next(getattr(native.layers[layer], name) for name in runtime.ATTENTIONS if hasattr(native.layers[layer], name))
        if "k_proj" in attention:
            attention.v_proj.weight = attention.k_proj.weight
        else:
            rows = attention.qkv_proj.weight.split([32, 48])
            attention.qkv_proj.weight = mx.concatenate([*rows[:2], rows[1]])
    shared.update(native.parameters())
    native.eval(), shared.eval()
    recurrent = any(isinstance(layer, caches.ArraysCache) for layer in caches.make_prompt_cache(native))  # which stays as large
    assert_equal(native, shared, half=not recurrent)


@pytest.mark.parametrize("key", ["tiny", "qwen2", "phi3", "smollm3-bias", "olmo2"])
def test_what_kvshare_wrote(converted_folder: Callable[..., Path], key: str) -> None:
    folder = converted_folder(key)
    assert_equal(load(folder, False), shared := load(folder, True))
    model, ids = kvshare.load(folder, dtype=torch.float32), torch.tensor([PROMPT])
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings, pad_token_id=0)[0, len(PROMPT) :].tolist()
    assert steps(shared)[1][:5] == expected[:5]  # another library: what rounds otherwise may choose otherwise, later


@pytest.mark.parametrize("key", ["qwen2", "qwen3", "tiny"])
def test_layers_with_fewer_heads(mixed_folder: Callable[[str], Path], key: str) -> None:
    folder = mixed_folder(key)
    block = json.loads((folder / "config.json").read_text())["kvshare"]
    native, shared = load(folder, False), load(folder, True)
    assert_equal(native, shared, half=False)
    whole, kept = ([layer.nbytes for layer in cached(model)] for model in (native, shared))
    heads = dict(zip(block["layers"], block["kv_heads"], strict=True))
    stored = json.loads((folder / "config.json").read_text())["num_key_value_heads"]
    for layer, (full, part) in enumerate(zip(whole, kept, strict=True)):
        assert part == (full if layer not in heads else full // 2 * heads[layer] // stored)


@pytest.mark.parametrize("key", ["qwen2", "qwen3"])
def test_heads_are_shared_out_among_processes(mixed_folder: Callable[[str], Path], key: str) -> None:
    """What `shard` leaves to the first of two, without what it would add of the other's."""
    models = [load(mixed_folder(key), shared) for shared in (False, True)]
    for attention in (layer.self_attn for model in models for layer in model.layers):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.update({name: rows[: len(rows) // 2] for name, rows in projection.items()})
        attention.o_proj.weight = attention.o_proj.weight[:, : attention.o_proj.weight.shape[1] // 2]
        attention.n_heads, attention.n_kv_heads = attention.n_heads // 2, attention.n_kv_heads // 2
    assert_equal(*models, half=False)


def cached(model: Any) -> list[Any]:
    cache = caches.make_prompt_cache(model)
    model(mx.array([PROMPT]), cache=cache)
    return cache


@pytest.mark.parametrize("key", ["tiny", "qwen2"])
def test_caches_with_a_window_that_keep_the_first_tokens(converted_folder: Callable[..., Path], key: str) -> None:
    native, shared = (load(converted_folder(key), shared) for shared in (False, True))
    found = []
    for model in (native, shared):
        cache = [caches.RotatingKVCache(16, keep=4) for _ in model.layers]
        found.append(steps(model, 40, cache)[0])
        assert all(layer.size() == 16 for layer in cache)
    assert mx.abs(found[0] - found[1]).max().item() < 1e-3


@pytest.mark.parametrize("key", ["tiny", "cohere2"])
def test_batches_go_on(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], key: str, tmp_path: Path
) -> None:
    """Prompts of several lengths, left-padded caches, rows that end early, and caches that are taken out and go on."""
    folder = converted_folder(key)
    if key == "cohere2":  # mlx-lm knows it with tied embeddings alone
        model_type, fields = FAMILY_SOURCES[key]
        random_model(tmp_path / "source", model_type, **fields, tie_word_embeddings=True)
        kvshare.convert(tmp_path / "source", folder := tmp_path / "out", recipe=BRIEF, init="mean", eval_mode="off")
    tokenizer, prompts = mlx_lm.tokenizer_utils.load(folder), [PROMPT[:3], [7] * 9, PROMPT]
    found = []
    for model in (load(folder, False), load(folder, True)):
        first = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=[30, 5, 20], return_prompt_caches=True)
        again = mlx_lm.batch_generate(model, tokenizer, [[5, 6], [8], [9] * 4], prompt_caches=first.caches, max_tokens=20)
        sizes = [sum(layer.nbytes for layer in row) for row in first.caches]
        found.append((first.texts, again.texts, sizes))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == [2 * size for size in found[1][2]]


def test_a_cache_is_saved_trimmed_and_used_again(converted_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = load(converted_folder("tiny"), True)
    cache = caches.make_prompt_cache(model)
    wanted = model(mx.array([PROMPT]), cache=cache)
    caches.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    read = caches.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert caches.trim_prompt_cache(read, 4) == 4
    assert mx.abs(model(mx.array([PROMPT[-4:]]), cache=read) - wanted[:, -4:]).max().item() < 1e-4


@pytest.fixture(scope="module")
def wide(once: Callable[[str, Callable[[Path], Any]], Path], text_file: str) -> Path:
    """A checkpoint for mlx-lm whose heads have as many numbers as it rounds together."""

    def make(folder: Path) -> None:
        shape = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        source = random_model(folder / "source", "qwen3", **shape)
        text = {"calibration": text_file, "calibration_tokens": 1024, "eval_mode": "off"}
        kvshare.convert(source, folder / "out", recipe=BRIEF, mlx=True, **text)

    return once("mlx-wide", make) / "out"


@pytest.mark.parametrize("bits", [8, 4])
def test_caches_in_few_bits(wide: Path, bits: int) -> None:
    whole = steps(load(wide, False))[0]
    found = []
    for model in (load(wide, False), load(wide, True)):
        cache = [caches.QuantizedKVCache(group_size=64, bits=bits) for _ in model.layers]
        logits = mx.concatenate([model(mx.array([part]), cache=cache) for part in (PROMPT[:7], PROMPT[7:])], axis=1)
        error = mx.square(logits - whole[:, : len(PROMPT)]).mean() / mx.square(whole).mean()
        found.append((error.item(), sum(layer.nbytes for layer in cache)))
    assert 2 * found[1][1] == found[0][1]
    assert found[1][0] < 2 * found[0][0]


@pytest.mark.parametrize("settings", [{}, {"quant_predicate": "mixed_4_6"}])
def test_weights_in_few_bits(wide: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """As `mlx_lm.convert` writes them, which copies the file that the config names."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(wide))
    mlx_lm.convert(str(wide), str(tmp_path / "out"), quantize=True, trust_remote_code=True, **settings)
    model, _ = mlx_lm.load(str(tmp_path / "out"), trust_remote_code=True)
    native = load(tmp_path / "out", False)
    if not settings:
        assert_equal(native, model)
    else:  # K has fewer bits than V there, of which keys are made
        assert 2 * steps(model)[2] == steps(native)[2]
        source = steps(load(wide, False), 0)[0]
        errors = [mx.square(steps(other, 0)[0] - source).mean().item() for other in (native, model)]
        assert errors[1] < 1.1 * errors[0]


def test_what_is_no_longer_one_projection_is_refused(wide: Path) -> None:
    from mlx_lm.tuner.lora import LoRALinear

    model = load(wide, True)
    model.layers[1].self_attn.v_proj.weight = model.layers[1].self_attn.v_proj.weight + 1
    with pytest.raises(ValueError, match="the weights of K and V differ"):
        steps(model)
    model = load(wide, True)
    model.layers[1].self_attn.v_proj = LoRALinear.from_base(model.layers[1].self_attn.v_proj)
    with pytest.raises(ValueError, match="an adapter lies around"):
        model(mx.array([PROMPT]))

    def turned(self: Any, x: Any, mask: Any = None, cache: Any = None) -> Any:
        keys, values = (made.reshape(1, -1, 2, 64).transpose(0, 2, 1, 3) for made in (self.k_proj(x), self.v_proj(x)))
        cache.update_and_fetch(-keys, values)

    attention = load(wide, False).layers[0].self_attn
    attention.__class__ = runtime._shared_class(type("Attention", (type(attention),), {"__call__": turned}))
    attention.kvshare_asked = False
    with pytest.raises(ValueError, match="in a way that kvshare does not know"):
        attention(mx.zeros((1, 4, 256)))


@pytest.mark.parametrize("model_type", KNOWN)
def test_rope_is_said_twice_and_means_the_same(source_folder: Callable[[str], Path], model_type: str) -> None:
    """To transformers as well, whatever kinds of rope there are."""
    folder = source_folder(KEYS[model_type])
    for scaled in (False, True):
        config = json.loads((folder / "config.json").read_text())
        ropes = config.get("rope_parameters") or {}
        if scaled and ropes and model_type not in ("phi3", "phimoe"):  # which know another kind alone
            ropes.get("full_attention", ropes).update(rope_type="linear", factor=4.0, rope_theta=1234.0)
        said = older_rope(config)
        assert (said.keys() >= {"rope_theta"}) == (bool(ropes) and model_type not in READ_ROPE)
        if said.get("rope_theta") == 1234.0:
            assert said["rope_scaling"]["factor"] == 4.0
        one, other = (AutoConfig.for_model(**copy.deepcopy(fields)).to_dict() for fields in (config, config | said))
        assert one.get("rope_parameters") == other.get("rope_parameters")
        assert older_rope(config | said) == {}


def test_the_documentation_lists_what_is_known() -> None:
    text = (Path(__file__).parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
    assert f"Known are: {', '.join(KNOWN)}." in " ".join(text.split())


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e3}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e3},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
WINDOWS = {"tie_word_embeddings": True, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
        ("qwen2", {"rope_parameters": YARN}),
        ("gemma3_text", WINDOWS | {"rope_parameters": BY_KIND, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}),
    ],
)
@torch.no_grad()
def test_mlx_turns_as_transformers_does(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    source = random_model(tmp_path / "source", model_type, **fields)
    kvshare.convert(source, tmp_path / "out", recipe=BRIEF, init="mean", eval_mode="off", mlx=True)
    ids = [*range(100, 160)]
    wanted = kvshare.load(tmp_path / "out", dtype=torch.float32)(torch.tensor([ids])).logits
    model, _ = mlx_lm.utils.load_model(tmp_path / "out", trust_remote_code=True)
    got = torch.tensor(model(mx.array([ids]), cache=caches.make_prompt_cache(model)).tolist())
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_other_forms_and_families_are_refused(source_folder: Callable[[str], Path], wide: Path) -> None:
    for settings in ({"form": "rotated"}, {"init": "exact", "heal": False}):
        with pytest.raises(kvshare.KVShareError, match="in mlx-lm, kvshare has the shared form alone"):
            kvshare.plan("kvshare/tiny", mlx=True, **settings)
    for key in ("bloom", "gpt_neox", "gemma4_text"):
        with pytest.raises(kvshare.KVShareError, match=r"mlx-lm cannot run .* with the smaller cache"):
            kvshare.plan(source_folder(key), mlx=True)
    config = json.loads((wide / "config.json").read_text())
    with pytest.raises(ValueError, match="runs the shared form of kvshare alone"):
        runtime.ModelArgs.from_dict(config | {"kvshare": {"form": "exact"}})
    with pytest.raises(ValueError, match="mlx-lm has no model 'bloom'"):
        runtime.ModelArgs.from_dict(config | {"model_type": "bloom"})


def test_by_the_command_line(run: Callable[..., Any], source_folder: Callable[[str], Path], text_file: str, tmp_path: Path) -> None:
    source = source_folder("llama-gqa")
    (tmp_path / "recipe.yaml").write_text(json.dumps(QUICK.model_dump(mode="json")))
    text = ["--calibration", text_file, "--calibration-tokens", "1024", "--eval-data", text_file, "--eval-tokens", "1024"]
    done = run("convert", source, "-o", tmp_path / "out", "--mlx", "--recipe", tmp_path / "recipe.yaml", *text, "--quiet")
    assert done.code == 0, done.err
    assert run("verify", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mlx_lm.generate" in card
    assert "transformers and mlx-lm" in card
    kvshare.heal(tmp_path / "out", tmp_path / "healed", source, text_file, tokens=1024, recipe=SHORT_ROWS)
    for folder in (tmp_path / "out", tmp_path / "healed"):
        model, tokenizer = mlx_lm.load(str(folder), trust_remote_code=True)
        model.set_dtype(mx.float32)
        assert_equal(load(folder, False), model)
        shared = kvshare.load(folder, dtype=torch.float32)
        ids = torch.tensor([tokenizer.encode(TEXT[0])])
        wanted = shared(ids).logits
        got = torch.tensor(model(mx.array(ids.tolist()), cache=caches.make_prompt_cache(model)).tolist())
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)
        remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # which brings no file for mlx-lm along
        for saved in (shared, remote):
            saved.save_pretrained(tmp_path / "again")
            assert json.loads((tmp_path / "again" / "config.json").read_text())["model_file"] == MLX
            assert_equal(load(folder, False), load(tmp_path / "again", True))
            shutil.rmtree(tmp_path / "again")
        remote.config._name_or_path = "org/name"  # where the file is not at hand, mlx-lm is not told of it
        remote.save_pretrained(tmp_path / "again")
        assert "model_file" not in json.loads((tmp_path / "again" / "config.json").read_text())
        shutil.rmtree(tmp_path / "again")

    # without the option, mlx-lm runs what it knows, and code of the source is not named
    shutil.copytree(Path(kvshare.__file__).parent / "tiny", tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", lambda config: config.update(model_file="other.py"))
    plain, told = (kvshare.plan(tmp_path / "source", mlx=mlx) for mlx in (None, True))
    assert "model_file" not in plain.config
    assert told.config == plain.config | {"model_file": MLX, "rope_theta": 10_000.0}
    assert next(reason for reason in told.reasons if reason not in plain.reasons).startswith("mlx: mlx-lm uses the smaller cache")
