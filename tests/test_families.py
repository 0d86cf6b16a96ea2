"""Every family of the registry: converted, the shared form computes what the native form computes, with half the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import BRIEF, FAMILY_SOURCES, SOURCES, TEXT, TIED_SOURCES, Outcome, edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.gptj import modeling_gptj

import kvshare
from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.evaluation import cached_numbers
from kvshare.families import FAMILIES, family_of
from kvshare.layerwise import read_weights
from kvshare.layout import pack
from kvshare.merge.mean import merge_mean
from kvshare.paged import shared_pages
from kvshare.passes import attention_of
from kvshare.recipe import Recipe
from kvshare.runtime import modeling_kvshare
from kvshare.source import open_source
from kvshare.tensors import read_tensor
from kvshare.training import _lora_targets, _modules


def test_every_family_has_a_model_in_the_tests() -> None:
    assert {model_type for model_type, _ in (SOURCES | FAMILY_SOURCES | TIED_SOURCES).values()} == set(FAMILIES)


@pytest.fixture(scope="module")
def forms(
    once: Callable[[str, Callable[[Path], Any]], Path], source_folder: Callable[[str], Path], text_file: str
) -> Callable[[str, str], Path]:
    """A checkpoint converted by `mean` or `svd`, by the source's key; nothing is measured on the way."""

    def get(key: str, init: str) -> Path:
        settings: dict[str, Any] = {} if init == "mean" else {"calibration": text_file, "calibration_tokens": 1024}
        return once(
            f"family-{key}-{init}",
            lambda folder: kvshare.convert(source_folder(key), folder, recipe=BRIEF, init=init, eval_mode="off", **settings),
        )

    return get


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def averaged(folder: Path) -> Any:
    """A source whose K and V are their mean."""
    planned, model = kvshare.plan(folder), loaded(folder)
    family = planned.family
    for layer, heads in zip(getattr(model.get_decoder(), family.stack), planned.layer_heads or (), strict=True):
        if heads:
            attention = attention_of(layer, family)
            mean = merge_mean(read_weights(attention, family, planned.head_dim), planned.source_kv_heads)
            for name, value in pack(mean, family).items():
                attention.get_parameter(name).copy_(value)
    return model


@pytest.mark.parametrize("key", FAMILY_SOURCES)
@torch.no_grad()
def test_a_family(source_folder: Callable[[str], Path], forms: Callable[[str, str], Path], key: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(kvshare.__file__).parent / "tiny", padding_side="left")
    inputs = dict(tokenizer([TEXT[0], TEXT[1][:40]], return_tensors="pt", padding=True, return_token_type_ids=False))
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    source, native, shared = (
        loaded(source_folder(key)),
        loaded(forms(key, "svd")),
        kvshare.load(forms(key, "svd"), dtype=torch.float32),
    )

    # what the closed form is told of rope, norms and biases is right: it does better than a mean
    wanted, got = source(**inputs).logits, native(**inputs).logits
    naive = averaged(source_folder(key))(**inputs).logits
    assert (got - wanted)[real].square().mean() < 0.7 * (naive - wanted)[real].square().mean()

    # the shared form is the native form, at once and through a cache that was filled before
    torch.testing.assert_close(shared(**inputs).logits[real], got[real], atol=1e-4, rtol=0)
    cache = DynamicCache(config=shared.config)
    parts = [shared(part, cache=cache).logits for part in ids[:1].split(9, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), native(ids[:1]).logits, atol=1e-4, rtol=0)

    settings = {"max_new_tokens": 16, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
    expected, given = native.generate(**inputs, **settings), shared.generate(**inputs, **settings)
    assert torch.equal(expected.sequences, given.sequences)
    parts = 2 * (2 if key == "falcon" else 1)  # natively, falcon caches each KV head once for every query head that it serves
    assert parts * cached_numbers(given.cache) == cached_numbers(expected.cache)

    # and it can be healed
    family = family_of(shared.config.model_type)
    assert len(_modules(shared, family, shared.config.kvshare["layers"], "k")) == 2  # lfm2 has three layers
    trained = {name.rpartition(".")[2] for name in _lora_targets(shared, Recipe().heal, family.k, [])}
    assert trained & {"o_proj", "dense", "out_proj"}


@pytest.mark.parametrize("key", ["gemma3_text", "cohere", "glm", "phi3", "olmo2"])
def test_weights_are_read_and_written_without_loss(source_folder: Callable[[str], Path], key: str) -> None:
    model = loaded(source_folder(key))
    family = family_of(model.config.model_type)
    attention = attention_of(model.model.layers[0], family)
    stored = dict(attention.named_parameters())
    for name, value in pack(read_weights(attention, family, 8, 4 if key == "glm" else 8), family).items():
        assert torch.equal(value.to(stored[name].dtype), stored[name]), name


@pytest.mark.parametrize("key", ["phi3", "gemma2", "cohere2", "exaone4", "gpt_oss", "qwen3_moe", "stablelm", "falcon"])
@torch.no_grad()
def test_a_family_with_fewer_heads(
    once: Callable[[str, Callable[[Path], Any]], Path], source_folder: Callable[[str], Path], text_file: str, key: str
) -> None:
    settings: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 1024, "eval_mode": "off", "recipe": BRIEF}
    folder = once(f"family-{key}-1", lambda folder: kvshare.convert(source_folder(key), folder, kv_heads=1, **settings))
    native, shared = loaded(folder), kvshare.load(folder, dtype=torch.float32)
    ids = torch.arange(100, 140)[None]
    expected, given = native(ids), shared(ids)
    torch.testing.assert_close(given.logits, expected.logits, atol=1e-4, rtol=0)
    parts = 2 * (4 if key == "falcon" else 1)
    assert parts * cached_numbers(given.cache) == cached_numbers(expected.cache)
    assert family_of(shared.config.model_type).kv_heads_of(shared.config.to_dict(), 4) == 1


@pytest.mark.parametrize("key", ["phi3", "falcon"])
@torch.no_grad()
def test_one_tensor_for_all_projections_holds_repeated_heads(
    source_folder: Callable[[str], Path], text_file: str, tmp_path: Path, key: str
) -> None:
    """A cache budget gives one layer fewer heads than the config names."""
    settings: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 1024, "eval_mode": "off", "recipe": BRIEF}
    found = kvshare.convert(source_folder(key), tmp_path / "out", cache_budget=0.4, **settings)
    assert found.plan.layer_heads == (2, 1)
    native, shared = loaded(tmp_path / "out"), kvshare.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(100, 140)[None]
    given = shared(ids)
    torch.testing.assert_close(given.logits, native(ids).logits, atol=1e-4, rtol=0)
    assert cached_numbers(given.cache) == 3 * 40 * 8

    # and what is trained stays so: only one of equal heads is
    heal = BRIEF.heal.model_copy(update={"sequence_length": 64, "batch_tokens": 256})
    recipe = BRIEF.model_copy(update={"heal": heal})
    with torch.enable_grad():
        kvshare.heal(tmp_path / "out", tmp_path / "healed", source_folder(key), text_file, tokens=1024, recipe=recipe)
    healed = kvshare.load(tmp_path / "healed", dtype=torch.float32)
    assert not torch.allclose(healed(ids).logits, given.logits, atol=1e-4)
    torch.testing.assert_close(healed(ids).logits, loaded(tmp_path / "healed")(ids).logits, atol=1e-4, rtol=0)
    name = family_of(shared.config.model_type).weight(1, "k")
    shared.get_parameter(name).mul_(torch.rand(len(shared.get_parameter(name)), 1))
    shared.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(shared(ids).logits, loaded(tmp_path / "again")(ids).logits, atol=1e-4, rtol=0)

    weights = load_file(tmp_path / "again" / "model.safetensors")
    weights[name][-1] += 1  # of the last head of V
    weights[name][-1 - 2 * 8 if key == "phi3" else -1 - 8] += 1  # and of K
    save_file(weights, tmp_path / "again" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadCheckpointError, match=rf"{name} does not hold each of its heads 2 times"):
        kvshare.load(tmp_path / "again")


@pytest.mark.parametrize("key", ["phi3", "qwen3_moe", "gemma3_text", "opt", "gpt_neox", "falcon", "gptj", "lfm2"])
def test_what_is_saved_is_what_was_loaded(forms: Callable[[str, str], Path], tmp_path: Path, key: str) -> None:
    kvshare.load(forms(key, "svd")).save_pretrained(tmp_path)
    before, after = (loaded(path).state_dict() for path in (forms(key, "svd"), tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_experts_are_read_by_remote_code(forms: Callable[[str, str], Path]) -> None:
    folder, ids = forms("qwen3_moe", "svd"), torch.arange(100, 140)[None]
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(remote).__module__.startswith("transformers_modules")
    with torch.no_grad():
        torch.testing.assert_close(remote(ids).logits, loaded(folder)(ids).logits, atol=1e-4, rtol=0)


def test_heads_that_are_normed_as_one_are_not_merged(source_folder: Callable[[str], Path]) -> None:
    with pytest.raises(kvshare.KVShareError, match="norms the keys of all heads as one"):
        kvshare.plan(source_folder("olmo2"), kv_heads=1)


def test_layers_without_keys_and_values_stay_untouched(
    source_folder: Callable[[str], Path], forms: Callable[[str, str], Path], text_file: str, tmp_path: Path
) -> None:
    plan = kvshare.plan(source_folder("lfm2"), heal=False)
    assert plan.layer_heads == (0, 2, 2)
    assert plan.reasons[0].startswith("layers 0 have no K and V and stay untouched")
    assert not any(".layers.0." in tensor.name for tensor in plan.tensors if tensor.action == "merge")
    assert plan.cache_bytes_per_token == 2 * 2 * 8 * 4
    found = kvshare.inspect(source_folder("lfm2"), tmp_path / "seen", data=text_file, tokens=512)
    assert [layer.refused for layer in found.layers] == ["it has no K and V", None, None]
    for settings in ({"cache_budget": 0.3}, {"init": "exact"}):
        with pytest.raises(kvshare.KVShareError):
            kvshare.plan(source_folder("lfm2"), heal=False, **settings)
    shutil.copytree(forms("lfm2", "mean"), tmp_path / "damaged")
    edit_json(tmp_path / "damaged" / "config.json", lambda config: config["kvshare"].update(layers=[0, 1]))
    with pytest.raises(kvshare.KVShareError, match="K and V in part only"):
        kvshare.load(tmp_path / "damaged")
    shutil.copytree(source_folder("lfm2"), tmp_path / "none")
    edit_json(tmp_path / "none" / "config.json", lambda config: config.update(layer_types=["conv"] * 3))
    with pytest.raises(UnsupportedModelError, match="no layer with K and V"):
        kvshare.plan(tmp_path / "none")


@pytest.mark.parametrize("key", TIED_SOURCES)
@torch.no_grad()
def test_keys_and_values_of_one_projection_are_cached_once(
    source_folder: Callable[[str], Path], forms: Callable[[str, str], Path], tmp_path: Path, key: str
) -> None:
    folder, borrowed = forms(key, "svd"), key == "gemma4_text-borrowed"
    plan = kvshare.plan(source_folder(key))
    assert plan.layer_heads == (None, 1, None, 1, *([0, 0] if borrowed else []))
    assert [reason.split()[1:3] for reason in plan.reasons] == [["1,", "3"], ["0,", "2"], *([["4,", "5"]] if borrowed else [])]
    assert {tensor.action for tensor in plan.tensors} == {"copy"}
    assert (plan.source_cache_bytes_per_token, plan.cache_bytes_per_token) == (4 * (2 * 32 + 2 * 32), 4 * (2 * 32 + 2 * 16))
    assert not plan.recipe.heal.enabled
    assert kvshare.verify(folder).layers == 2
    before, after = (open_source(path).tensors for path in (source_folder(key), folder))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(read_tensor(source_folder(key), spec), read_tensor(folder, after[name])) for name, spec in before.items()
    )

    native, shared = loaded(source_folder(key)), kvshare.load(folder, dtype=torch.float32)
    ids = torch.arange(100, 140).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    wanted = native(ids, attention_mask=mask).logits
    assert torch.equal(shared(ids, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
    cache = DynamicCache(config=shared.config)
    parts = [shared(part, cache=cache).logits for part in ids[:1].split(9, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted[:1], atol=1e-4, rtol=0)
    settings = {"max_new_tokens": 16, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
    for more in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        expected, given = (model.generate(ids, attention_mask=mask, **settings, **more) for model in (native, shared))
        assert torch.equal(expected.sequences, given.sequences)
        for layer, (full, part) in enumerate(zip(expected.cache.layers[:4], given.cache.layers[:4], strict=True)):
            assert part.keys.numel() == full.keys.numel() == full.values.numel()
            assert part.values.numel() == (0 if layer in (1, 3) else full.values.numel())

    shared.save_pretrained(tmp_path)
    kept, saved = native.state_dict(), loaded(tmp_path).state_dict()
    assert kept.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in kept.items())
    with pytest.raises(UnsupportedModelError, match="knows of no pages"), shared_pages(shared):
        pass


def test_keys_and_values_of_one_projection_by_remote_code(forms: Callable[[str, str], Path]) -> None:
    folder, ids = forms("gemma4_text-borrowed", "mean"), torch.arange(100, 140)[None]
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(remote).__module__.startswith("transformers_modules")
    with torch.no_grad():
        found = remote(ids, use_cache=True)
        assert torch.equal(found.logits, loaded(folder)(ids).logits)
    assert found.cache.layers[1].values.shape[-1] == 0


def test_one_projection_is_measured_and_said_in_the_card(
    source_folder: Callable[[str], Path], text_file: str, tmp_path: Path
) -> None:
    found = kvshare.convert(source_folder("gemma4_text"), tmp_path / "out", eval_data=text_file, eval_tokens=1024)
    assert found.heal is None
    assert found.report is not None
    assert found.report.kl == found.report.perplexity_increase == 0
    assert found.report.cache_bytes_per_token < 0.7 * found.report.source_cache_bytes_per_token
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the weights are the source's own, bit for bit" in card
    assert "K and V are one projection in 2 of 4 layers" in card
    with pytest.raises(UsageError, match="nothing to heal"):
        kvshare.heal(tmp_path / "out", tmp_path / "healed", source=source_folder("gemma4_text"), data=text_file)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"init": "exact", "heal": False}, "init exact"),
        ({"cache_budget": 0.3}, "a cache budget"),
        ({"kv_heads": 1}, "fewer KV heads"),
        ({"heal": False, "eval_mode": "layers"}, "layer by layer"),
    ],
)
def test_what_one_projection_cannot_have(source_folder: Callable[[str], Path], settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"one projection already, and cannot have .*{named}"):
        kvshare.plan(source_folder("gemma4_text"), **settings)


def test_one_projection_by_the_words_of_a_config(source_folder: Callable[[str], Path], text_file: str, tmp_path: Path) -> None:
    source, folder = source_folder("gemma4_text"), tmp_path / "source"
    for verb in (kvshare.inspect, kvshare.calibrate):
        with pytest.raises(UnsupportedModelError, match="nothing to merge"):
            verb(source, tmp_path / "out", data=text_file, tokens=512)
    shutil.copytree(source, folder)

    def as_published(config: dict[str, Any]) -> None:
        del config["per_layer_config"]
        config.update(global_head_dim=16, num_global_key_value_heads=1)

    edit_json(folder / "config.json", as_published)
    assert kvshare.plan(folder).layer_heads == (None, 1, None, 1)
    kvshare.convert(folder, tmp_path / "out", eval_mode="off")
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        wanted, got = loaded(source)(ids).logits, kvshare.load(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert torch.equal(wanted, got)

    edit_json(folder / "config.json", lambda config: config.update(per_layer_config={"1": {"head_dim": 16}, "3": {"head_dim": 8}}))
    with pytest.raises(UnsupportedModelError, match="differ in size"):
        kvshare.plan(folder)
    edit_json(folder / "config.json", lambda config: config.update(attention_k_eq_v=False))
    with pytest.raises(UnsupportedModelError, match="no layer in which one projection makes K and V"):
        kvshare.plan(folder)
    edit_json(folder / "config.json", lambda config: config.update(layer_types=["full_attention"]))
    with pytest.raises(BadCheckpointError, match="layer_types"):
        kvshare.plan(folder)


@pytest.mark.parametrize("key", ["falcon-one-head", "bloom", "gptj"])
def test_heads_that_no_config_counts_are_not_merged(source_folder: Callable[[str], Path], key: str) -> None:
    with pytest.raises(kvshare.KVShareError, match="take kv_heads all"):
        kvshare.plan(source_folder(key), cache_budget=0.6)


def test_a_form_that_this_transformers_does_not_allow_is_refused_before_a_weight_is_read(
    source_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text_file: str,
    run: Callable[..., Outcome],
) -> None:
    """gptj before transformers 5.24 has no attention function to be given."""
    monkeypatch.delattr(modeling_gptj, "eager_attention_forward")
    # as if for the first time
    monkeypatch.setattr(modeling_kvshare, "_attention_class", modeling_kvshare._attention_class.__wrapped__)
    source = source_folder("gptj")
    for verb in (
        lambda: kvshare.convert(source, tmp_path / "out", init="mean", heal=False, eval_mode="off"),
        lambda: kvshare.inspect(source, tmp_path / "out", data=text_file, tokens=256),
        lambda: kvshare.calibrate(source, tmp_path / "out", data=text_file, tokens=256),
    ):
        with pytest.raises(UnsupportedModelError, match=r"GPTJAttention of transformers 5\.\S+ attends in a way"):
            verb()
    for verb in ("inspect", "calibrate", "convert"):  # a dry run refuses what the run would
        text = "--calibration" if verb == "convert" else "--data"
        tried = run(verb, source, "-o", tmp_path / "out", text, text_file, "--dry-run")
        assert tried.code != 0
        assert "attends in a way" in tried.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["gptj", "qwen3_moe"])
def test_attention_is_trained_in_full_where_nothing_else_is_linear(
    forms: Callable[[str, str], Path], source_folder: Callable[[str], Path], text_file: str, tmp_path: Path, key: str
) -> None:
    """Of qwen3_moe, whose experts are no linear layers, that is all that heals."""
    heal = BRIEF.heal.model_copy(update={"attention": "full", "sequence_length": 64, "batch_tokens": 256})
    recipe = BRIEF.model_copy(update={"heal": heal})
    kvshare.heal(forms(key, "svd"), tmp_path / "healed", source_folder(key), text_file, tokens=1024, recipe=recipe)
    before, after = (loaded(folder).state_dict() for folder in (forms(key, "svd"), tmp_path / "healed"))
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed >= {"q_proj", "k_proj", "v_proj"}
    assert changed & {"experts", "gate"} == set()
    assert ("fc_in" in changed) == (key == "gptj")


def test_layers_that_draft_tokens_stay_as_they_are(source_folder: Callable[[str], Path], text_file: str, tmp_path: Path) -> None:
    """They lie behind the layers that the config counts, and transformers does not load them."""
    source = tmp_path / "source"
    shutil.copytree(source_folder("glm4_moe"), source)
    held = load_file(source / "model.safetensors")
    drafting = {
        name.replace(".1.", ".2."): value + 1 for name, value in held.items() if name.startswith("model.layers.1.self_attn")
    }
    save_file(held | drafting, source / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 512, "eval_data": text_file, "eval_tokens": 256}
    kvshare.convert(source, tmp_path / "out", recipe=BRIEF, **settings)
    given = load_file(tmp_path / "out" / "model.safetensors")
    assert given.keys() == held.keys() | drafting.keys()
    assert all(torch.equal(given[name], value) for name, value in drafting.items())
    assert not torch.equal(given["model.layers.1.self_attn.k_proj.weight"], held["model.layers.1.self_attn.k_proj.weight"])


def test_what_is_cached_as_one_already_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="latent"):
        family_of("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match=r"mistral, .*\n.*did you mean 'qwen3_moe'"):
        family_of("qwen3_mo")
