"""The text model of a checkpoint that holds images, too: it computes what it computes there, and every verb takes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import BRIEF, edit_json, save_random
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import kvshare
from kvshare.errors import UnsupportedModelError
from kvshare.families import FAMILIES
from kvshare.loading import load_native
from kvshare.source import open_source
from kvshare.text_models import text_names

TEXT_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT_MODEL |= {"head_dim": 8, "vocab_size": 4096, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
SEEN = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEN |= {"image_size": 28, "patch_size": 14}
PATCHES = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
TURNS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
TIED = {"attention_k_eq_v": True, "global_head_dim": 16, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
# model_type: what the text model adds, what sees, and the family that the text model is of
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "gemma3": (
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 16, **WINDOWS},
        {"model_type": "siglip_vision_model", **SEEN},
        "gemma3_text",
    ),
    "gemma4": ({"model_type": "gemma4_text", "final_logit_softcapping": 5.0, **WINDOWS, **TIED}, None, "gemma4_text"),
    "internvl": (
        {"model_type": "qwen2"},
        {"model_type": "internvl_vision", **SEEN, "image_size": [28, 28], "patch_size": [14, 14]},
        "qwen2",
    ),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", "projection_dim": 16, **SEEN}, "llama"),
    "mistral3": ({"model_type": "mistral", "sliding_window": None}, {"model_type": "pixtral", "head_dim": 8, **SEEN}, "mistral"),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", "rope_parameters": TURNS},
        {**PATCHES, "fullatt_block_indexes": [0]},
        "qwen2",
    ),
    "qwen3_vl": (
        {"model_type": "qwen3_vl_text", "rope_parameters": TURNS},
        {**PATCHES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "qwen3",
    ),
    "smolvlm": ({"model_type": "llama"}, {"model_type": "smolvlm_vision", **SEEN}, "llama"),
}


def whole_model(folder: Path, model_type: str, tied: bool) -> Path:
    """A model with random weights that takes images, and the bundled tokenizer."""
    torch.manual_seed(7)
    text, seen, _ = WHOLE[model_type]
    parts = {"text_config": {**TEXT_MODEL, **text}, "vision_config": seen}
    config = AutoConfig.for_model(model_type, **parts, tie_word_embeddings=tied)
    config.text_config.tie_word_embeddings = not tied  # which does not count
    return save_random(AutoModelForImageTextToText.from_config(config), folder)


def as_published(config: dict[str, Any]) -> None:
    """Write a config as Qwen2.5-VL's own are: that of the text model lies at the top, by older names."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    del text["model_type"], text["layer_types"], text["tie_word_embeddings"]
    config |= text | {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "rope_theta": rope["rope_theta"]}


@pytest.fixture(scope="module")
def qwen3_vl(once: Callable[[str, Callable[[Path], Any]], Path]) -> Path:
    return once("whole-qwen3_vl", lambda folder: whole_model(folder, "qwen3_vl", False))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", WHOLE)
def test_it_computes_what_it_computes_inside(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder = whole_model(tmp_path / "source", model_type, tied)
    if model_type == "qwen2_5_vl":
        edit_json(folder / "config.json", as_published)
    source, alone = open_source(folder), load_native(folder)
    assert source.model_type == alone.config.model_type == WHOLE[model_type][2]
    assert source.whole == type(AutoModelForImageTextToText.from_pretrained(folder)).__name__
    assert source.config["architectures"] == [type(alone).__name__]
    assert set(source.tensors) == {name for name in alone.state_dict() if not (tied and name.startswith("lm_head"))}
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        wanted = AutoModelForImageTextToText.from_pretrained(folder).eval()(input_ids=ids).logits
        assert torch.equal(alone(ids).logits, wanted)


@pytest.mark.parametrize(
    ("decoder", "head"),
    [
        ("language_model.model", "language_model.lm_head"),
        ("model.language_model.model", "language_model.lm_head"),
        ("model.language_model", "lm_head"),
        ("model.text_model", "lm_head"),
        ("model", "lm_head"),
    ],
)
def test_it_is_found_under_the_names_of_all_versions(decoder: str, head: str) -> None:
    own = ["embed_tokens.weight", "layers.0.self_attn.k_proj.weight", "layers.1.mlp.up_proj.weight", "norm.weight"]
    beside = [
        "visual.blocks.0.attn.qkv.weight",
        "model.visual.blocks.0.attn.qkv.weight",
        "vision_tower.layers.0.self_attn.k_proj.weight",
    ]
    stored = [*(f"{decoder}.{name}" for name in own), f"{head}.weight", *beside]
    expected = {f"{decoder}.{name}": f"model.{name}" for name in own} | {f"{head}.weight": "lm_head.weight"}
    assert text_names(stored, FAMILIES["qwen2"]) == expected


def test_it_is_converted_and_nothing_else(qwen3_vl: Path, tmp_path: Path, text_file: str) -> None:
    text: dict[str, Any] = {"calibration": text_file, "calibration_tokens": 1024, "eval_data": text_file, "eval_tokens": 512}
    found = kvshare.convert(qwen3_vl, tmp_path / "out", recipe=BRIEF, **text)
    assert any("only the text model of this Qwen3VLForConditionalGeneration" in reason for reason in found.plan.reasons)
    assert "text model alone: it takes no images" in (tmp_path / "out" / "README.md").read_text()
    given = load_file(tmp_path / "out" / "model.safetensors")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert given.keys() == native.state_dict().keys()

    shared = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    ids = torch.arange(100, 140)[None]
    settings: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(native.generate(ids, **settings), shared.generate(ids, **settings))

    measured = kvshare.evaluate(tmp_path / "out", qwen3_vl, text_file, tokens=512)
    assert measured.kl == pytest.approx(found.report.kl, rel=1e-6)
    by_layers = kvshare.convert(qwen3_vl, tmp_path / "layers", recipe=BRIEF, eval_mode="layers", **text)
    assert by_layers.report.kl == pytest.approx(found.report.kl, rel=1e-3)


def test_it_is_calibrated_and_healed(qwen3_vl: Path, tmp_path: Path, text_file: str) -> None:
    kvshare.calibrate(qwen3_vl, tmp_path / "statistics", data=text_file, tokens=256)
    kvshare.convert(qwen3_vl, tmp_path / "out", recipe=BRIEF, statistics=tmp_path / "statistics", eval_mode="off")
    kvshare.heal(tmp_path / "out", tmp_path / "healed", qwen3_vl, text_file, tokens=1024, recipe=BRIEF)
    assert kvshare.verify(tmp_path / "healed").form == "shared"


def test_a_text_model_of_no_known_family_is_refused(qwen3_vl: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3_vl, tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", lambda config: config["text_config"].update(model_type="mamba"))
    with pytest.raises(UnsupportedModelError, match="'qwen3_vl' is not supported"):
        kvshare.plan(tmp_path / "source")


def test_a_text_model_that_would_give_other_logits_alone_is_refused(qwen3_vl: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3_vl, tmp_path / "source")
    parts = {"text_config": {**TEXT_MODEL, "model_type": "granite", "logits_scaling": 8.0}, "vision_config": SEEN}
    AutoConfig.for_model("llava_next", **parts).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="llava_next would give other logits alone"):
        kvshare.plan(tmp_path / "source")


def test_quantised_weights_of_a_whole_model_are_refused(qwen3_vl: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen3_vl, tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        kvshare.plan(tmp_path / "source")
