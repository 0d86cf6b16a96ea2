"""The exact form: no weight changes, values are made of cached keys, and what that loses is known before it is written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import SQUARE, TEXT, TINY_FOLDER, at_times, edit_json
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvshare
from kvshare import verification
from kvshare.errors import BadCheckpointError, KVShareError, UnsupportedModelError, UsageError
from kvshare.exact import check_layer, through_cache
from kvshare.runtime import modeling_kvshare as runtime

KEY, VALUE = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"


def projections(folder: Path, layer: int) -> tuple[Tensor, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    key, value = (tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"].double() for part in "kv")
    return key, value


def with_condition(size: int, condition: float) -> Tensor:
    """A random matrix with singular values from 1 down to 1 / condition, evenly spaced in their logarithm; float64."""
    left, _, right = torch.linalg.svd(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    return left * torch.logspace(0, -torch.tensor(condition).log10().item(), size, dtype=torch.float64) @ right


def tokens(texts: list[str] = TEXT[:1]) -> Tensor:
    return AutoTokenizer.from_pretrained(TINY_FOLDER)(texts[0], return_tensors="pt")["input_ids"]


def in_parts(model: Any, ids: Tensor, *sizes: int) -> Tensor:
    """Logits of a row that goes through a cache in parts of these sizes."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        return torch.cat([model(part, cache=cache).logits for part in ids.split(sizes, dim=1)], dim=1)


@pytest.fixture
def model(converted_folder: Callable[..., Path]) -> Any:
    """The bundled model in exact form, float32."""
    return kvshare.load(converted_folder("tiny", init="exact"), dtype=torch.float32)


# --- the mathematics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_map_makes_values_of_keys(dtype: torch.dtype) -> None:
    key, value = projections(TINY_FOLDER, 1)
    maps = runtime.exact_maps(key, value, dtype)
    hidden = torch.randn(50, 128, dtype=torch.float64)
    made = hidden @ key.T @ maps.values.double().T
    torch.testing.assert_close(made, hidden @ value.T, atol=1e-3 if dtype == torch.bfloat16 else 1e-9, rtol=0)


@pytest.mark.parametrize("layer", range(6))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_predicted_error_is_the_measured_one(layer: int, dtype: torch.dtype) -> None:
    key, value = projections(TINY_FOLDER, layer)
    maps = runtime.exact_maps(key, value, dtype)
    hidden = torch.randn(4_000, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
    keys = hidden @ key.T
    rounded = runtime.round_keys(maps, keys.to(maps.values.dtype), dtype)
    assert rounded.dtype == dtype

    def errors(cached: Tensor) -> tuple[float, float]:
        made = (cached.to(maps.values.dtype) @ maps.values.T).double()
        wanted = hidden @ value.T
        return float((made - wanted).norm() / wanted.norm()), float((cached.double() - keys).norm() / keys.norm())

    (of_values, of_keys), (ordinary, nearest) = errors(rounded), errors(keys.to(dtype))
    # a bound for every mantissa: a rounded number's error is eps / 12^1/2 of it at most, less where it is not a power of two
    assert 0.4 * maps.error < (of_values**2 + of_keys**2) ** 0.5 < maps.error
    assert of_values < 0.15 * ordinary
    assert of_keys < 2.5 * nearest


def test_a_well_conditioned_projection_loses_what_rounding_does() -> None:
    orthogonal, value = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q, torch.randn(64, 64, dtype=torch.float64)
    report = check_layer(orthogonal, value, 3, torch.bfloat16)
    assert report.layer == 3
    assert report.condition == pytest.approx(1, abs=1e-9)
    # keys and values are each off by what rounding to nearest does to a number
    assert report.value_error == pytest.approx((2 / 12) ** 0.5 * 2**-7, rel=0.2)


# --- the two ways to use it


def test_values_are_made_after_the_average_where_that_costs_less(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("_attend_to_averages", "_values_from_keys"):
        original = getattr(runtime, name)

        def spy(*arguments: Any, name: str = name, original: Any = original) -> Any:
            used.append(name)
            return original(*arguments)

        monkeypatch.setattr(runtime, name, spy)
    for queries in (1, 15, 16, 17):  # of 8 heads, against a hidden_size of 128
        used.clear()
        in_parts(model, tokens()[:, : 3 + queries], 3, queries)
        assert used == ["_attend_to_averages" if queries < 16 else "_values_from_keys"] * 6
    used.clear()
    in_parts(model, tokens()[:, :20], 20)
    assert used == []  # nothing was cached before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("key", ["tiny", *SQUARE])
def test_both_ways_agree(converted_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, key: str, attention: str) -> None:
    model = kvshare.load(converted_folder(key, init="exact"), dtype=torch.float32, attn_implementation=attention)
    logits = []
    for first in (True, False):
        monkeypatch.setattr(runtime, "_averages_first", lambda *_, first=first: first)
        logits.append(in_parts(model, tokens()[:, :20], 5, 12, 1, 2))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-5, rtol=0)


def test_sixteen_bits_lose_no_more_than_natively(
    converted_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, text_file: str
) -> None:
    rows = AutoTokenizer.from_pretrained(TINY_FOLDER)(Path(text_file).read_text()[:4000], return_tensors="pt")["input_ids"]
    rows = rows[:, :256]
    native = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    with torch.no_grad():
        wanted = torch.log_softmax(native(rows).logits, dim=-1)

    def divergence(model: Any) -> float:
        given = torch.log_softmax(in_parts(model, rows, 1, 100, 8, 8, *[1] * 9, 130).float(), dim=-1)
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())

    halved = kvshare.load(converted_folder("tiny", init="exact"))
    assert halved.dtype == torch.bfloat16
    exact, plain = divergence(halved), divergence(AutoModelForCausalLM.from_pretrained(TINY_FOLDER))
    assert exact < 3 * plain
    monkeypatch.setattr(runtime, "round_keys", lambda _, keys, dtype: keys.to(dtype))
    assert divergence(halved) > 100 * plain


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("key", ["square-norm", *at_times("tiny")])
def test_a_compiled_forward_has_no_graph_breaks(converted_folder: Callable[..., Path], key: str) -> None:
    model = kvshare.load(converted_folder(key, init="exact"), dtype=torch.float32)
    ids = tokens()[:, :12]
    expected = in_parts(model, ids, 10, 1, 1)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        model(ids[:, :10], cache=cache)
        got = [compiled(part, cache=cache).logits for part in ids[:, 10:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:, 10:], atol=1e-4, rtol=0)


# --- the weights stay what they are


def test_the_checkpoint_is_its_source(converted_folder: Callable[..., Path], source_folder: Callable[[str], Path]) -> None:
    for key in ("tiny", "square-bias"):
        folder, source = converted_folder(key, init="exact"), source_folder(key)
        before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
        stock, origin = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, source))
        assert type(stock) is type(origin)
        assert torch.equal(stock(tokens()).logits, origin(tokens()).logits)
        assert kvshare.verify(folder).form == "exact"
        block = json.loads((folder / "config.json").read_text())["kvshare"]
        assert (block["form"], block["healed_tokens"], block["recipe"]["heal"]["enabled"]) == ("exact", 0, False)


def test_saving_after_use_writes_the_same_bits(model: Any, tmp_path: Path) -> None:
    expected = in_parts(model, tokens(), 4, tokens().shape[1] - 4)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    before, after = load_file(TINY_FOLDER / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    again = kvshare.load(tmp_path, dtype=torch.float32)
    assert torch.equal(in_parts(again, tokens(), 4, tokens().shape[1] - 4), expected)


def test_maps_follow_the_weights(model: Any) -> None:
    ids = tokens()
    in_parts(model, ids, 4, ids.shape[1] - 4)
    kept = model.model.layers[0].self_attn.kvshare_maps
    in_parts(model, ids, 4, ids.shape[1] - 4)
    assert model.model.layers[0].self_attn.kvshare_maps is kept
    native = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    with torch.no_grad():
        for net in (model, native):
            net.model.layers[0].self_attn.k_proj.weight.mul_(1.1)
            net.model.layers[1].self_attn.v_proj.weight.add_(0.01)
        expected = native(ids).logits
        torch.testing.assert_close(in_parts(model, ids, 4, ids.shape[1] - 4), expected, atol=1e-4, rtol=0)
        copied = copy.deepcopy(model).to(torch.float64)
        torch.testing.assert_close(in_parts(copied, ids, 4, ids.shape[1] - 4).float(), expected, atol=1e-4, rtol=0)


def test_it_trains_as_its_source_does(model: Any) -> None:
    native = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    for net in (native, model):
        net.train()(tokens(), labels=tokens()).loss.backward()
    expected = {name: value.grad for name, value in native.named_parameters()}
    assert all(torch.equal(value.grad, expected[name]) for name, value in model.named_parameters())


def test_gradients_pass_the_rounding(model: Any) -> None:
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    native = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32)
    gradients = []
    for net, through in ((native, False), (model, True)):
        parts = embedded.split([3, embedded.shape[1] - 3], dim=1) if through else [embedded]
        cache = transformers.DynamicCache(config=net.config)
        logits = torch.cat([net(inputs_embeds=part, cache=cache).logits for part in parts], dim=1)
        gradients.append(torch.autograd.grad(logits[..., :50].square().mean(), embedded)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


# --- what is measured


def test_the_report_is_of_the_cache_in_the_stored_dtype(converted_folder: Callable[..., Path]) -> None:
    report = json.loads((converted_folder("tiny", init="exact") / "report.json").read_text())
    assert 0 < report["kl"] < 2e-4  # bfloat16: not nothing, and close to it
    assert abs(report["perplexity_increase"]) < 2e-3
    assert report["cache_reduction"] == 0.5
    for layer, entry in enumerate(report["layers"]):
        assert entry["layer"] == layer
        assert entry["condition"] == pytest.approx(float(torch.linalg.cond(projections(TINY_FOLDER, layer)[0])))
        assert entry["value_error"] < runtime.VALUE_ERROR


def test_the_measurement_sees_a_cache_that_loses(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        honest = through_cache(model, torch.bfloat16)(ids)
        monkeypatch.setattr("kvshare.exact.round_keys", lambda _, keys, dtype: keys.to(dtype))
        assert (through_cache(model, torch.bfloat16)(ids) - expected).norm() > 20 * (honest - expected).norm()


# --- what is refused


def refusal(kind: type[KVShareError], run: Callable[[], Any], *named: str) -> None:
    with pytest.raises(kind) as caught:
        run()
    assert type(caught.value) is kind
    assert [line[:7] for line in str(caught.value).splitlines()[1:]] == ["  why: ", "  do:  "]
    for name in named:
        assert name in str(caught.value), str(caught.value)


def changed(source: Path, folder: Path, dtype: torch.dtype, key: Tensor) -> Path:
    """A copy of a model, stored in another dtype, with another W_K in its layer 1."""
    copy = Path(shutil.copytree(source, folder))
    tensors = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors | {KEY: key.to(dtype)}, copy / "model.safetensors", metadata={"format": "pt"})
    edit_json(copy / "config.json", lambda config: config.update(dtype=str(dtype).removeprefix("torch.")))
    return copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("singular", [True, False])
def test_a_near_singular_projection_is_refused_with_its_condition_number(
    source_folder: Callable[[str], Path], tmp_path: Path, text_file: str, dtype: torch.dtype, singular: bool
) -> None:
    key = with_condition(64, 1e4)
    if singular:
        key[3] = 0
    source = changed(source_folder("llama-mha"), tmp_path / "source", dtype, key)
    number = f"number is {float(torch.linalg.cond(projections(source, 1)[0])):.3g}"
    output = tmp_path / "out"

    def convert() -> Any:
        return kvshare.convert(source, output, init="exact", eval_data=text_file, eval_tokens=512)

    if singular or dtype == torch.bfloat16:
        lost = "there is no inverse" if singular else "in BF16 would be off by"
        refusal(UnsupportedModelError, convert, "layer 1", number, lost, "limit is 2%")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        return
    assert convert().report.kl < 1e-6
    # and in bfloat16 the runtime refuses what the conversion would have refused
    halved = kvshare.load(output, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"layer 1 would be off by .*the limit is 2%"):
        in_parts(halved, tokens(), 3, tokens().shape[1] - 3)


@pytest.mark.parametrize("part", [KEY, VALUE])
def test_a_projection_with_nan_is_refused(source_folder: Callable[[str], Path], tmp_path: Path, text_file: str, part: str) -> None:
    source = Path(shutil.copytree(source_folder("llama-mha"), tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors[part][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run = lambda: kvshare.convert(source, tmp_path / "out", init="exact", eval_data=text_file)  # noqa: E731
    refusal(BadCheckpointError, run, part, "NaN")
    assert not (tmp_path / "out").exists()


def test_what_has_no_exact_form_is_refused_before_a_weight_is_read(
    source_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvshare.exact.read_tensor", None)
    for settings, kind, named in (
        ({"model": source_folder("llama-gqa")}, UnsupportedModelError, "4 x 8 = 32"),
        ({"kv_heads": 4}, UsageError, "4 KV heads of 8"),
        ({"kv_heads": "1/2"}, UsageError, "4 KV heads of 8"),
        ({"heal": True}, UsageError, "--heal"),
    ):
        given: dict[str, Any] = {"model": "kvshare/tiny", "init": "exact", **settings}
        refusal(kind, lambda given=given: kvshare.convert(output=tmp_path / "out", **given), named)  # type: ignore[misc]
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing_to_heal(converted_folder: Callable[..., Path], tmp_path: Path, text_file: str) -> None:
    folder = converted_folder("tiny", init="exact")
    refusal(UsageError, lambda: kvshare.heal(folder, tmp_path / "out", "kvshare/tiny", text_file), "nothing to heal")
    assert list(tmp_path.iterdir()) == []


def test_an_adapted_projection_is_refused_when_a_cache_is_read(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM")).eval()
    adapted(input_ids=tokens(), use_cache=False)
    with pytest.raises(ValueError, match="merge adapters"):
        in_parts(adapted, tokens(), 3, tokens().shape[1] - 3)
    in_parts(adapted.merge_and_unload(), tokens(), 3, tokens().shape[1] - 3)


def test_arithmetic_that_rounds_is_refused(converted_folder: Callable[..., Path]) -> None:
    halved = kvshare.load(converted_folder("tiny", init="exact"))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="do without TF32 and autocast"):
        in_parts(halved, tokens(), 3, tokens().shape[1] - 3)
    in_parts(halved, tokens(), 3, tokens().shape[1] - 3)


def test_a_form_that_does_not_fit_is_found(converted_folder: Callable[..., Path], tmp_path: Path) -> None:
    for name, source, form, named in (
        ("shared", converted_folder("tiny", init="exact"), "shared", "layer 0 differ"),
        ("exact", converted_folder("llama-gqa"), "exact", "not square"),
        ("none", converted_folder("tiny", init="exact"), "both", "'both'"),
    ):
        folder = Path(shutil.copytree(source, tmp_path / name))
        edit_json(folder / "config.json", lambda config, form=form: config["kvshare"].update(form=form))
        refusal(BadCheckpointError, lambda folder=folder: kvshare.load(folder), named)  # type: ignore[misc]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="the form 'both'"):
        runtime.shared_class(transformers.LlamaForCausalLM)(config)
    assert {*verification.FORMS} == {*runtime.FORMS, "rotated"}
