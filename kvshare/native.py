"""What transformers makes of a model folder before a weight is read: its config, and the parameters that its class needs.

In: a folder, tensor headers. Out: a transformers config, the native class; or the error that names the field or tensor.
Never: reads weights, runs code that lies beside a model, lets a config choose code that is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.families import Family, family_of
from kvshare.geometry import geometry_of, require_attention
from kvshare.headers import FLOATS, TensorSpec
from kvshare.parsing import is_file, shown
from kvshare.runtime import ROTATED
from kvshare.source import GENERATION, Source, read_json
from kvshare.tensors import DTYPES
from kvshare.text_models import text_config


def read_config(folder: Path) -> Any:
    """The config of a model folder, of transformers' own class; that of the text model alone, where the folder holds more.

    How attention is computed is for whoever loads the model to say: a config may name a kernel, which is code from the Hub.

    Raises:
        BadCheckpointError: transformers cannot use config.json or generation_config.json.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

    try:
        if is_rotated(folder):
            from kvshare.runtime.kvshare_rotated import rotated_config

            named = str(read_json(folder / "config.json")["model_type"])
            config = rotated_config(CONFIG_MAPPING[named.removeprefix(ROTATED)]).from_pretrained(folder, local_files_only=True)
        else:
            text = text_config(folder, read_json(folder / "config.json"))
            if text is None:
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            else:
                config = CONFIG_MAPPING[text["model_type"]].from_dict(text)
        config._attn_implementation = None
        config._experts_implementation = None
        if config.dtype not in (None, *DTYPES.values()):
            raise ValueError(f"its dtype is {shown(config.dtype)}")
    except Exception as error:  # of many kinds, all of them about what the file says
        raise _refused(folder / "config.json", error) from error
    if is_file(folder / GENERATION):
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # as above
            raise _refused(folder / GENERATION, error) from error
    return config


def is_rotated(folder: Path) -> bool:
    """Whether a folder says that it is a checkpoint in rotated form, which no class of transformers computes."""
    config = read_json(folder / "config.json")
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith(ROTATED)


def require_one_vocabulary(checkpoint: Path, source: Source) -> None:
    """Refuse two models whose logits cannot be held against each other.

    Raises:
        UsageError: their vocabularies differ.
        BadCheckpointError: see `read_config`.
    """
    if read_config(checkpoint).vocab_size != read_config(source.path).vocab_size:
        raise UsageError(
            f"{checkpoint} and {source.name} cannot be compared",
            "their vocabularies differ",
            "give the model that the checkpoint was converted from",
        )


def _refused(file: Path, error: Exception) -> BadCheckpointError:
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return BadCheckpointError(f"transformers cannot use {file}", said, "correct it, or download the model again")


def as_in_memory(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint as the model names and shapes them: experts are stored one by one and held as one tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Tensor] = {}
    waiting: dict[str, WeightConverter] = {}
    for stored in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters)
        if pattern is None:
            found[name] = tensors[stored]
            continue
        converter = waiting.setdefault(name, copy.deepcopy(by_pattern[pattern]))
        converter.add_tensor(name, stored, pattern, tensors[stored])
    for name, converter in waiting.items():
        for target, value in converter.convert(name, model=model, config=model.config).items():
            found[target] = value[0] if isinstance(value, list) else value
    return found


def _shapes_in_memory(model: Any, tensors: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a checkpoint, those that the model holds otherwise as it holds them."""
    known = {name for name, _ in model.named_parameters()}
    known |= {name.removeprefix(f"{model.base_model_prefix}.") for name in known}
    others = {
        name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
        for name, spec in tensors.items()
        if name not in known and spec.dtype in FLOATS
    }
    shapes = {name: spec.shape for name, spec in tensors.items()}
    return shapes | {name: tuple(value.shape) for name, value in as_in_memory(model, others).items()}


def native_class(folder: Path, tensors: Mapping[str, TensorSpec]) -> Any:
    """The class that stock transformers loads a folder with, after all that it needs was found in the headers; of a checkpoint in
    rotated form, which stock transformers refuses, the class of that form.

    Args:
        folder: of the model.
        tensors: by name, from its headers; those of the text model alone, where the folder holds more.

    Raises:
        BadCheckpointError: a config that cannot be used, a tensor that is missing or has another shape than the class gives it.
        UnsupportedModelError: another family, or a tensor that holds no floating-point numbers.
    """
    return type(_native_outline(folder, tensors))


def _native_outline(folder: Path, tensors: Mapping[str, TensorSpec]) -> Any:
    """The model without weights whose class `native_class` gives."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    raw = read_json(folder / "config.json")
    raw = text_config(folder, raw) or raw
    family = family_of(str(raw.get("model_type", ""))).located(tensors)
    require_attention(tensors, family, geometry_of(raw, family, str(folder)), str(folder))  # so there is an end to what is made
    config = read_config(folder)
    try:
        if is_rotated(folder):
            from kvshare.runtime.kvshare_rotated import rotated_class

            model = outlined(rotated_class(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family.model_type]]), config)
        else:
            model = outlined(partial(AutoModelForCausalLM.from_config, trust_remote_code=False, dtype=torch.float32), config)
    except Exception as error:  # of many kinds, all of them about what the config says
        raise _refused(folder / "config.json", error) from error
    missing = []
    try:
        stored = _shapes_in_memory(model, tensors)
    except Exception as error:  # as above, about shapes
        raise _refused(folder, error) from error
    for name, parameter in model.named_parameters():
        # a base model's checkpoint lacks the first part of the names of its decoder
        held = name if name in stored else name.removeprefix(f"{model.base_model_prefix}.")
        spec = tensors.get(held)
        if held not in stored:
            missing.append(name)
        elif stored[held] != tuple(parameter.shape):
            raise BadCheckpointError(
                f"the tensor {held} of {folder} has the shape {list(stored[held])}",
                f"by its config, {type(model).__name__} needs {list(parameter.shape)}",
                "download or convert the model again",
            )
        elif spec is not None and spec.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"the tensor {spec.name} of {folder} is stored as {spec.dtype}",
                f"kvshare reads {', '.join(FLOATS)}",
                "give the unquantised model",
            )
    if missing:
        raise BadCheckpointError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}",
            "the model would compute with random numbers in their place",
            "download or convert the model again",
        )
    return model


def require_form(source: Source, family: Family) -> None:
    """Refuse a model that stock transformers cannot load, or whose shared form this version of it does not allow.

    Raises:
        BadCheckpointError, UnsupportedModelError: as for `native_class`, and as above.
    """
    from kvshare.runtime.modeling_kvshare import shared_class

    model = _native_outline(source.path, source.tensors)
    native, config = model.__class__, model.config
    config.kvshare = {"form": "shared", "layers": [*geometry_of(source.config, family, source.name).attention]}
    try:
        outlined(shared_class(native), config)
    except ImportError as error:
        raise UnsupportedModelError(
            f"{source.name} has no shared form in the transformers that is installed",
            str(error).partition(": ")[0],
            "install the version that kvshare is tested with (README names it)",
        ) from error


def outlined(loader: Callable[[Any], Any], config: Any) -> Any:
    """What a class, or another loader, makes of a config: names and shapes, and no weights; all lies on the meta device."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        model = loader(config)
        model.tie_weights()
    return model
