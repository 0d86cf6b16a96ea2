"""The rotated form: it computes what its definition says, in every mode, and nothing else takes its checkpoints for its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import QUICK, SMALL, TEXT, TINY_FOLDER, at_times, convert_layers, edit_json, in_turn, random_model
from test_modes import InHalves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)

import kvshare
from kvshare.activations import LayerCall
from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.evaluation import cache_numbers_per_token
from kvshare.families import FAMILIES
from kvshare.fit import fit_layer
from kvshare.layerwise import read_weights
from kvshare.loading import load_native
from kvshare.merge import AttentionWeights
from kvshare.merge.mean import merge_mean
from kvshare.paged import shared_pages
from kvshare.passes import with_weights
from kvshare.planning import make_plan
from kvshare.recipe import load_recipe
from kvshare.rotated import says_rotated
from kvshare.runtime import ROTATED, ROTATED_CLASS, kvshare_rotated
from kvshare.runtime.kvshare_rotated import marked, rope_type, rotated_class, rotated_config, unmarked
from kvshare.runtime.reference import rotated, rotated_attention
from kvshare.sections import Fit
from kvshare.source import open_source
from kvshare.turning import TurnSums
from kvshare.verification import verify_form

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# one small model of every family of this form, with what is special about it
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 12}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "granite": ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.4}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": None}),
    "starcoder2": ("starcoder2", {"sliding_window": 12}),
    "arcee": ("arcee", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "cohere": ("cohere", {}),
    "glm": ("glm", {"partial_rotary_factor": 0.5, "attention_bias": True, "pad_token_id": None}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
}
INTERLEAVED = ("cohere", "glm")
IDS = torch.tensor(AutoTokenizer.from_pretrained(TINY_FOLDER)(TEXT[0])["input_ids"])[None]
SETTINGS: dict[str, Any] = {"max_new_tokens": 16, "pad_token_id": 0, "return_dict_in_generate": True}


def test_every_family_of_the_form_is_tried() -> None:
    assert {model_type for model_type, _ in KINDS.values()} == {name for name, family in FAMILIES.items() if family.rotated_form}
    assert (kvshare_rotated.PREFIX, kvshare_rotated.NAME) == (ROTATED, ROTATED_CLASS)


@pytest.fixture(scope="module")
def model_of(once: Callable[[str, Callable[[Path], Any]], Path]) -> Callable[[str], Any]:
    """A model of random weights in rotated form, float32, by its key in KINDS."""

    def get(key: str) -> Any:
        model_type, fields = KINDS[key]
        source = once(f"rotated-{key}", lambda folder: random_model(folder, model_type, **SMALL | fields))
        native = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        block = {"form": "rotated", "layers": [0, 1]}
        config = rotated_config(type(native.config)).from_dict(native.config.to_dict() | {"kvshare": block})
        model = rotated_class(type(native))(config).eval()
        model.load_state_dict(native.state_dict(), strict=False)
        return model

    return get


def in_halves(x: torch.Tensor, width: int) -> torch.Tensor:
    """The first numbers of each head, whose rope pairs lie side by side, as pairs that lie half of them apart."""
    return torch.cat([x[..., :width:2], x[..., 1:width:2], x[..., width:]], -1)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("key", KINDS)
def test_attention_is_what_the_form_says(model_of: Callable[[str], Any], key: str, layer: int) -> None:
    model = model_of(key)
    attention, decoder = model.model.layers[layer].self_attn, model.model
    seen: dict[str, Any] = {}
    output = next(getattr(attention, name) for name in ("o_proj", "dense") if hasattr(attention, name))
    handles = [
        attention.register_forward_pre_hook(lambda _, args, given: seen.update(given, args=args), with_kwargs=True),
        output.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0])),
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = seen["args"][0] if seen["args"] else seen["hidden_states"]
    tokens, width = hidden.shape[1], 2 * len(decoder.rotary_emb.inv_freq) if attention.kvshare_rotates else 0

    def heads(projection: Any, norm: Any) -> torch.Tensor:
        states = torch.nn.functional.linear(hidden, projection.weight, projection.bias).unflatten(-1, (-1, attention.head_dim))
        return (states if norm is None else norm(states)).transpose(1, 2)

    query = heads(attention.q_proj, getattr(attention, "q_norm", None))
    shared = heads(attention.k_proj, getattr(attention, "k_norm", None))
    bias = None if attention.v_proj.bias is None else attention.v_proj.bias.view(-1, attention.head_dim)
    got = seen["heads"].view(1, tokens, -1, attention.head_dim)
    if key in INTERLEAVED:
        query, shared, got = (in_halves(x, width) for x in (query, shared, got))
        bias = None if bias is None else in_halves(bias, width)
    angles = torch.arange(tokens).double()[None, :, None] * decoder.rotary_emb.inv_freq.double()[: width // 2]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if model.config.model_type.endswith(("mistral", "starcoder2")):
        causal = causal.triu(-11)
    wanted = rotated_attention(
        query,
        shared,
        angles,
        angles,
        scaling=attention.scaling,
        rope_scale=decoder.rotary_emb.attention_scaling if width else 1.0,
        mask=causal[None, None],
        value_bias=bias,
    )
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=1e-4)
    assert float((wanted - got.double().roll(1, 1)).detach().abs().max()) > 0.01


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize(("key", "implementation"), in_turn(KINDS, ["sdpa", "eager"]))
def test_a_cache_in_parts_gives_the_logits_of_one_forward(
    model_of: Callable[[str], Any], key: str, size: int, implementation: str
) -> None:
    model = model_of(key)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, cache=cache, use_cache=True).logits for part in IDS.split(size, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    assert all(layer.values.numel() == 0 and layer.keys.numel() for layer in cache.layers)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beam": {"do_sample": False, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "chunked prefill into a static cache": {
        "do_sample": False,
        "prefill_chunk_size": 5,
        "cache_implementation": "static",
        "disable_compile": True,
    },
}


@pytest.mark.parametrize(("mode", "key"), in_turn(MODES, ["llama-bias", "mistral", "qwen3", "smollm3"], each=2))
def test_generation_gives_the_tokens_of_whole_forwards(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, key: str, mode: str
) -> None:
    """Of prompts of different length, padded on the left, with any cache; without one, everything is computed anew every time."""
    monkeypatch.setattr("kvshare.runtime.kvshare_cache.LONG", 1)
    model = model_of(key)
    inputs = {
        "input_ids": torch.cat([IDS[:, :14], torch.cat([torch.zeros_like(IDS[:, :4]), IDS[:, 3:13]], 1)]),
        "attention_mask": torch.ones(2, 14, dtype=torch.long),
    }
    inputs["attention_mask"][1, :4] = 0
    plain = {name: MODES[mode][name] for name in ("do_sample", "num_beams") if name in MODES[mode]}
    torch.manual_seed(5)
    wanted = model.generate(**inputs, use_cache=False, **plain, **SETTINGS).sequences
    torch.manual_seed(5)
    assert torch.equal(model.generate(**inputs, **MODES[mode], **SETTINGS).sequences, wanted)


def test_other_caches_and_bits(model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    wanted = model.generate(IDS, use_cache=False, do_sample=False, **SETTINGS).sequences
    cache = DynamicCache(config=model.config)
    first = model.generate(IDS[:, :9], cache=cache, do_sample=False, **SETTINGS).sequences
    assert first.shape[1] == 25
    again = torch.cat([first, IDS[:, 9:]], 1)
    continued = model.generate(again, cache=cache, do_sample=False, **SETTINGS).sequences
    assert torch.equal(continued, model.generate(again, use_cache=False, do_sample=False, **SETTINGS).sequences)
    filled = DynamicCache(config=model.config)
    filled.update(*torch.zeros(2, 1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="holds values"):
        model(IDS, cache=filled)
    for layer in model.model.layers:
        layer.self_attn.kvshare_bits = 8
    model.model.kvshare_bits = 8
    run = model.generate(IDS, do_sample=False, **SETTINGS)
    assert torch.equal(run.sequences[:, : IDS.shape[1] + 1], wanted[:, : IDS.shape[1] + 1])
    assert {layer.keys.dtype for layer in run.cache.layers} == {torch.int8}


@pytest.mark.parametrize("key", ["llama", "qwen2", "smollm3"])
def test_without_positions_it_is_the_shared_form(model_of: Callable[[str], Any], key: str) -> None:
    """With all tokens at one position nothing turns, and keys are values; a bias of keys is in the values of this form alone."""
    from kvshare.runtime.modeling_kvshare import shared_class

    model = model_of(key)
    native = getattr(transformers, type(model).__name__.removeprefix(ROTATED_CLASS))
    config = native.config_class.from_dict(model.config.to_dict() | {"rope_parameters": dict(model.config.rope_parameters)})
    config.kvshare = {"form": "shared", "layers": [0, 1]}
    shared = shared_class(native)(config).eval()
    shared.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one in (model, shared):
            for layer in one.model.layers:
                if layer.self_attn.k_proj.bias is not None:
                    layer.self_attn.k_proj.bias.zero_()
        zeros = torch.zeros_like(IDS)
        got, wanted = (one(IDS, position_ids=zeros, use_cache=False).logits for one in (model, shared))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(*(one(IDS, use_cache=False).logits for one in (model, shared)), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_the_shared_form_decodes_it(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = model_of("qwen3").to(dtype)
    ids = IDS.repeat(1, 10)[:, :300]
    results = {}
    for backend in ("eager", "compiled"):
        monkeypatch.setenv("KVSHARE_ATTENTION", backend)
        with torch.inference_mode():
            cache = model(ids[:, :-1], use_cache=True).cache
            results[backend] = model(ids[:, -1:], cache=cache).logits
        assert model.model.kvshare_choice.backend == backend, model.model.kvshare_choice.reason
    close = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(results["compiled"], results["eager"], atol=close, rtol=close)


@pytest.mark.parametrize(("key", "kv_heads"), [("llama-gqa", 2), ("qwen3", "all"), ("qwen2", "all")])
@pytest.mark.parametrize("init", ["mean", "svd"])
def test_a_conversion_is_a_checkpoint(
    converted_folder: Callable[..., Path], key: str, kv_heads: int | str, init: str, tmp_path: Path
) -> None:
    folder = converted_folder(key, kv_heads, init, "rotated")
    assert kvshare.verify(folder).form == "rotated"
    config = json.loads((folder / "config.json").read_text())
    assert config["kvshare"]["form"] == "rotated"
    assert says_rotated(config) == [True, True]
    model = kvshare.load(folder, dtype=torch.float32)
    once = config["kvshare"]["source"]["num_key_value_heads"] * config["head_dim"] * len(model.model.layers)
    assert cache_numbers_per_token(model, IDS[0, :8]) <= once
    assert not any(name.endswith("v_proj.weight") for name, _ in model.named_parameters())
    with torch.no_grad():
        wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "again")
    assert verify_form(tmp_path / "again") == len(model.model.layers)
    with torch.no_grad():
        assert torch.equal(kvshare.load(tmp_path / "again", dtype=torch.float32)(IDS).logits, wanted)


def test_stock_transformers_refuses_it(converted_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted_folder("llama-gqa", 2, "mean", "rotated"), tmp_path / "copy"))
    for loader in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            loader.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(KeyError, match="kvshare_rotated_default"):  # a native class, named by hand
        transformers.LlamaForCausalLM.from_pretrained(folder)
    edit_json(folder / "config.json", lambda config: config.pop("auto_map"))
    with pytest.raises(ValueError, match="kvshare_rotated_llama"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    with pytest.raises(UnsupportedModelError, match="no native form"):
        load_native(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(model_type="llama"),
        lambda config: config.update(rope_parameters=unmarked(config["rope_parameters"])),
        lambda config: config["kvshare"].update(form="shared"),
        lambda config: config.update(model_type="kvshare_rotated_nemotron"),
    ],
)
def test_a_config_that_a_native_class_would_take_is_refused(
    converted_folder: Callable[..., Path], tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    folder = Path(shutil.copytree(converted_folder("llama-gqa", 2, "mean", "rotated"), tmp_path / "copy"))
    edit_json(folder / "config.json", change)
    with pytest.raises(BadCheckpointError, match="rotated"):
        kvshare.load(folder)


def test_ropes_by_config() -> None:
    assert rope_type({}) == "default"
    assert rope_type({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}) == "linear"
    assert rope_type({"rope_parameters": {"full_attention": {"rope_type": "default"}}}) == "several"
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert marked(old) == {"rope_theta": 5.0, "rope_scaling": {"factor": 2.0, "rope_type": "kvshare_rotated_linear"}}
    assert marked(marked(old)) == marked(old)
    assert unmarked(marked(old)["rope_scaling"]) == {"factor": 2.0, "rope_type": "linear"}
    config = rotated_config(transformers.LlamaConfig).from_dict(marked(old))
    assert config.rope_parameters == {"factor": 2.0, "rope_type": "linear", "rope_theta": 5.0}


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_ropes_that_change_with_the_length_are_refused(tmp_path: Path, rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    source = open_source(random_model(tmp_path / "source", "llama", **SMALL, rope_parameters=parameters))
    with pytest.raises(UnsupportedModelError, match=f"type {rope}"):
        make_plan(source, QUICK.model_copy(update={"form": "rotated"}))


def test_what_cannot_be_in_this_form_is_refused(source_folder: Callable[[str], Path], text_file: str) -> None:
    for key in ("gpt2", "phi3", "qwen2_moe", "olmo2", "gemma4_text"):
        with pytest.raises(UnsupportedModelError, match="no rotated form"):
            kvshare.plan(source_folder(key), form="rotated")
    with pytest.raises(UsageError, match="init exact"):
        load_recipe(None, form="rotated", init="exact")
    with pytest.raises(UsageError, match="statistics"):
        load_recipe(None, form="rotated", calibration__statistics="folder")
    with pytest.raises(UsageError, match="form"):
        load_recipe(None, form="turned")


def test_the_fit_learns_the_function_of_this_form(source_folder: Callable[[str], Path]) -> None:
    """What a layer in rotated form gives is learned again from weights that were moved."""
    model = load_native(source_folder("tiny"), dtype=torch.float32)
    layer, family = model.model.layers[0], FAMILIES["llama"]
    tokens = torch.randint(4096, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inputs = layer.input_layernorm(model.model.embed_tokens(tokens))
    positions = model.model.rotary_emb(inputs, torch.arange(32)[None])
    call = LayerCall({"position_embeddings": positions, "attention_mask": None})
    weights = merge_mean(read_weights(layer.self_attn, family, 16), 8)
    attention: Any = with_weights(layer, family, weights, "rotated").self_attn
    with torch.no_grad():
        wanted = attention(inputs, **call.arguments)[0]
    moved = weights.k * torch.linspace(0.5, 1.5, len(weights.k))[:, None]
    settings = Fit.model_validate({"batch_tokens": 128, "steps": 60, "learning_rate": 0.05})
    start = weights.with_tensors({"k": moved, "v": moved})
    result, report = fit_layer(attention, family, start, inputs, wanted, call, settings, 0, lambda done, total: None)
    assert report.held_out_after < 0.2 * report.held_out_before
    assert torch.equal(result.k, result.v)


def test_healing_writes_this_form(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], text_file: str, tmp_path: Path
) -> None:
    before = converted_folder("llama-gqa", 2, "mean", "rotated")
    source, recipe = source_folder("llama-gqa"), load_recipe(QUICK, heal__batch_tokens=1024)
    text: dict[str, Any] = {"eval_data": text_file, "eval_tokens": 2048}
    healed = kvshare.heal(before, tmp_path / "healed", source, text_file, tokens=16_384, recipe=recipe, **text)
    assert kvshare.verify(tmp_path / "healed").form == "rotated"
    assert healed.report is not None
    assert healed.report.kl < 0.9 * kvshare.evaluate(before, source, text_file, tokens=2048).kl
    assert "in rotated form" in (tmp_path / "healed" / "README.md").read_text()


def test_the_plan_says_what_the_form_means(run: Callable[..., Any]) -> None:
    done = run("plan", "kvshare/tiny", "--form", "rotated", "--no-heal")
    assert done.code == 0
    assert "another function" in done.out
    assert "trust_remote_code" in done.out


def test_what_rope_leaves_of_values() -> None:
    """A head that reads the token before it: every pair is turned by one angle, and nothing is noise; one that reads all evenly
    keeps what turns slowly.
    """
    layer = AttentionWeights(*(torch.zeros(16, 16) for _ in range(4)), head_dim=8, rotary_dim=6)
    positions, frequencies = torch.arange(64.0), torch.tensor([1.0, 0.1, 1e-4])

    def rotate(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return 1.5 * rotated(x, positions[at][:, None] * frequencies, False)

    before = torch.eye(64).roll(1, 0)[1:]
    before = torch.cat([torch.eye(64)[:1], before])[None, None]
    evenly = torch.ones(1, 1, 64, 64).tril() / torch.arange(1, 65)[:, None]
    sums = TurnSums(layer)
    for head, weights in enumerate((before, evenly)):
        sums.add(weights, head, rotate, positions.long(), positions.long())
    noise = sums.noise()
    assert noise.shape == (2, 8)
    assert torch.equal(noise[:, :3], noise[:, 3:6])
    assert torch.equal(noise[:, 6:], torch.zeros(2, 2).double())
    assert float(noise[0].max()) < 0.1  # but for the first token, which reads itself
    assert float(noise[1, 0]) > 0.4 > float(noise[1, 1]) > float(noise[1, 2])
    assert float(noise[1, 2]) < 1e-4


@pytest.mark.usefixtures("thorough")
def test_the_closed_form_of_this_form_loses_less_in_it(once: Callable[[str, Callable[[Path], Any]], Path], text_file: str) -> None:
    """Of one layer: what is solved with the noise of rope has a smaller error in the rotated form than what is solved without."""
    errors = {}
    for name, noise in (("with", TurnSums.noise), ("without", lambda self: 0 * TurnSums.noise(self))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kvshare.moments.TurnSums", type("Sums", (TurnSums,), {"noise": noise}))
            source = once("rotated-one-layer", lambda folder: random_model(folder, "llama", **SMALL | {"num_hidden_layers": 1}))
            text = {"calibration": text_file, "calibration_tokens": 4096, "eval_data": text_file, "eval_tokens": 1024}
            folder = once(f"rotated-one-layer-{name}", lambda folder, s=source, t=text: convert_rotated(s, folder, t))
        errors[name] = json.loads((folder / "report.json").read_text())["layers"][0]["error"]
    assert errors["with"] < 0.9 * errors["without"]


def convert_rotated(source: Path, folder: Path, text: dict[str, Any]) -> None:
    kvshare.convert(source, folder, recipe=QUICK, form="rotated", **text)


def test_layers_of_all_forms(text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untouched layers, layers that share all heads and layers with fewer: what is cached of each, and the same tokens."""
    source = random_model(tmp_path / "source", "qwen2", **SMALL | {"num_hidden_layers": 3})
    convert_layers(source, tmp_path / "out", (None, 2, 1), text_file, form="rotated")
    assert kvshare.verify(tmp_path / "out").layers == 2
    model = kvshare.load(tmp_path / "out", dtype=torch.float32)
    assert [layer.self_attn.k_proj.weight.shape[0] for layer in model.model.layers] == [16, 16, 8]
    got = model.generate(IDS, do_sample=False, **SETTINGS)
    assert torch.equal(got.sequences, model.generate(IDS, use_cache=False, do_sample=False, **SETTINGS).sequences)
    numbers = [layer.keys.numel() + layer.values.numel() for layer in got.cache.layers]
    assert numbers == [count * got.cache.get_seq_length() * 8 for count in (4, 2, 1)]
    model.save_pretrained(tmp_path / "again")
    assert verify_form(tmp_path / "again") == 2
    again = kvshare.load(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    logits, ids = [], IDS.repeat(1, 15)[:, :270]
    for backend in ("eager", "compiled"):
        monkeypatch.setenv("KVSHARE_ATTENTION", backend)
        with torch.inference_mode():
            cache = model(ids[:, :-2], use_cache=True).cache
            logits.append(model(ids[:, -2:], cache=cache).logits)
        assert model.model.kvshare_choice.backend == backend
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", ["llama", "mistral"])
def test_continuous_batching_in_pages_of_full_size(model_of: Callable[[str], Any], key: str) -> None:
    model = model_of(key)
    prompts = [list(range(100, 130)), list(range(200, 207))]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    settings = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32)
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=settings, warmup=False)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config, use_cache=False)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()
    with pytest.raises(UnsupportedModelError, match="shared form"), shared_pages(model):
        pass


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("key", ["mistral", *at_times("llama")])
@torch.no_grad()
def test_one_graph_with_a_static_cache(model_of: Callable[[str], Any], key: str) -> None:
    model = model_of(key)
    wanted = model.generate(IDS, use_cache=False, do_sample=False, **SETTINGS | {"max_new_tokens": 6}).sequences
    forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache, ids, given = StaticCache(config=model.config, max_cache_len=40), IDS, [IDS]
    for _ in range(6):
        ids = forward(input_ids=ids, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
        given.append(ids)
    assert torch.equal(torch.cat(given, 1), wanted)


def test_a_cache_that_quantises_by_itself(model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    cache = QuantizedCache("fp8", model.config)
    cache.layers = [InHalves(residual_length=4) for _ in cache.layers]
    wanted = model.generate(IDS, use_cache=False, do_sample=False, **SETTINGS).sequences
    assert torch.equal(model.generate(IDS, cache=cache, do_sample=False, **SETTINGS).sequences, wanted)
