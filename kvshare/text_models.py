"""The text model inside a checkpoint that holds more: images, audio, video.

In: config.json, names of tensors. Out: the text model's config as if it were alone, and the names that its tensors have then.
Never: reads weights, runs code that lies beside a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kvshare.errors import UnsupportedModelError
from kvshare.families import FAMILIES, Family

# the model types whose text model was found to compute, for text, what the whole computes
WHOLE = (
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "exaone4_5",
    "gemma3",
    "gemma4",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "lfm2_vl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
    "video_llama_3",
    "video_llava",
    "vipllava",
)
# what a text model does to its logits when it is alone, and where that does nothing; inside, only these do it, too
OF_LOGITS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
SAME_LOGITS = ("gemma4",)
# where checkpoints of all versions keep the decoder, the most particular first, what sees beside it, and the output embedding
DECODERS = (
    "model.language_model.model.",
    "language_model.model.",
    "model.language_model.",
    "model.text_model.",
    "language_model.",
    "model.",
)
SEES = "visual."
HEADS = ("language_model.lm_head.", "lm_head.")
# what text models are without images: a token of text has one position in time, height and width, so rope is the usual one
ALONE = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
OF_IMAGES = ("mrope_section", "mrope_interleaved", "type")  # what rope of these says of positions in images


def text_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a config.json for the text model of a checkpoint that holds more; None where it is all that there is, or of
    no known family.

    Args:
        folder: where config.json lies.
        config: its content.

    Raises:
        UnsupportedModelError: the text model would give other logits alone.
    """
    if config.get("model_type") not in WHOLE:
        return None
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = whole.get_text_config(decoder=True)
        family = ALONE.get(text.model_type, text.model_type)
        if text is whole or family not in FAMILIES:
            return None
        fields = text.to_dict()
        if family != text.model_type:
            fields["rope_parameters"] = {key: value for key, value in fields["rope_parameters"].items() if key not in OF_IMAGES}
        fields |= {"model_type": family, "tie_word_embeddings": bool(whole.tie_word_embeddings)}
        fields["dtype"] = fields.get("dtype") or whole.to_dict().get("dtype")
        found = CONFIG_MAPPING[family].from_dict(fields).to_dict()
    except Exception:  # of many kinds, about what the file says; who needs more of it than this will say so
        return None
    changing = [name for name, neutral in OF_LOGITS.items() if found.get(name, neutral) != neutral]
    if changing and config["model_type"] not in SAME_LOGITS:
        raise UnsupportedModelError(
            f"the text model inside this {config['model_type']} would give other logits alone",
            f"transformers leaves out its {changing[0]} inside, and a {family} model by itself has it",
            "choose another model",
        )
    usual = PreTrainedConfig().to_dict()  # what every model has, and no config.json says
    alone = {name: value for name, value in found.items() if name not in usual or value != usual[name]}
    if "quantization_config" in config:
        alone["quantization_config"] = config["quantization_config"]
    return alone | {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]}


def text_names(stored: Collection[str], family: Family) -> dict[str, str]:
    """What the tensors of a text model are called when it is alone, by the names that they are stored under.

    Args:
        stored: all names of the checkpoint.
        family: of the text model.
    """
    first, _, inner = family.attention.partition(".")
    layers = inner.partition("{layer}")[0]
    decoder = next((prefix for prefix in DECODERS if any(name.startswith(f"{prefix}{layers}0.") for name in stored)), None)
    if decoder is None:
        return {}
    head = next((prefix for prefix in HEADS if any(name.startswith(prefix) for name in stored)), None)
    inside = {name: name.removeprefix(decoder) for name in stored if name.startswith(decoder)}
    names = {name: f"{first}.{rest}" for name, rest in inside.items() if not rest.startswith(SEES)}
    if head is not None:
        names |= {name: f"lm_head.{name.removeprefix(head)}" for name in stored if name.startswith(head)}
    return names
