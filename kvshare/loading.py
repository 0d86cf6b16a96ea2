"""Loading models: a source in its native form, a checkpoint in its shared form.

In: a folder or a `Source`. Out: a transformers model in evaluation mode. Never: runs code that lies beside a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.mixture import uses_self
from kvshare.native import is_rotated, native_class, outlined, read_config
from kvshare.parsing import is_file, shown
from kvshare.source import GENERATION, open_source, read_json, read_tensor_specs, weight_files
from kvshare.tensors import map_tensor, read_tensor
from kvshare.verification import verify_form

Forward = Callable[[Tensor], Tensor]  # token ids (rows, length) to logits (rows, length, vocabulary)


def load(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    cache_bits: int | None = None,
) -> Any:
    """A kvshare checkpoint as a transformers model that caches one tensor where the source caches two: half the bytes.

    Args:
        checkpoint: a folder that kvshare wrote.
        dtype: of the weights; `auto` is the stored one.
        device_map, attn_implementation: as for transformers' `from_pretrained`.
        cache_bits: 8 or 4, for a cache of integers with a scale for each token and head; None for the model's dtype.

    Raises:
        UsageError: another number of bits, or a checkpoint in exact form, which needs them all.
        BadCheckpointError: not a kvshare checkpoint, missing tensors, or k_proj and v_proj that do not fit its form.
        UnsupportedModelError: another family.
    """
    from kvshare.runtime.kvshare_bits import BITS

    folder = Path(checkpoint)
    loader, config = _shared_class(folder), read_config(folder)
    if cache_bits is not None:
        if cache_bits not in BITS or config.kvshare["form"] == "exact":
            raise UsageError(
                f"a cache of {cache_bits} bits is not possible for {folder}",
                f"its form is {config.kvshare['form']}, and in exact form values need all bits of keys; otherwise it is 8 or 4",
                "leave cache_bits out, or use a checkpoint in shared form",
            )
        config.kvshare = config.kvshare | {"cache_bits": cache_bits}
    options = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    return _strict(loader, folder, config, **options)


def outline(checkpoint: Path) -> Any:
    """The model that `load` gives, with names and shapes and no weights: everything lies on the meta device.

    Raises:
        BadCheckpointError, UnsupportedModelError: as for `load`.
    """
    return outlined(_shared_class(checkpoint), read_config(checkpoint))


def _shared_class(folder: Path) -> Any:
    """The class of a checkpoint in the form that its block names, when its files are found right."""
    from kvshare.runtime.modeling_kvshare import shared_class

    verify_form(folder)
    native = native_class(folder, read_tensor_specs(folder, weight_files(folder)))
    loader = native if is_rotated(folder) else shared_class(native)
    named = read_json(folder / "config.json").get("architectures")
    if named != [loader.__name__]:
        raise BadCheckpointError(
            f"config.json in {folder} names the architectures {shown(named)}",
            f"a model of its model_type is a {loader.__name__}",
            "convert the model again",
        )
    return loader


def load_native(folder: Path, *, dtype: torch.dtype | str = "auto", device_map: Any = None) -> Any:
    """A model folder, shared or not, through transformers' own class; its text model alone, where it holds more.

    Raises:
        BadCheckpointError: missing tensors, tensors of another shape, or a config that transformers cannot use.
        UnsupportedModelError: another family, or a checkpoint in rotated form, which has no native class.
    """
    import transformers

    if is_rotated(folder):
        raise UnsupportedModelError(
            f"{folder} has no native form",
            "it is in rotated form, which no class of transformers computes",
            "give the model that it was converted from",
        )

    source = open_source(folder)
    native, config = native_class(folder, source.tensors), read_config(folder)
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    if source.whole is None:
        return _strict(transformers.AutoModelForCausalLM, folder, config, trust_remote_code=False, **options)
    state = {name: map_tensor(folder, spec) for name, spec in source.tensors.items()}
    model = _strict(native, None, config, state_dict=state, **options)
    if is_file(folder / GENERATION):
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def writer_of(data: str, folder: Path, device: torch.device) -> Any:
    """The model of a folder in float32, if it is to write some of a text; otherwise None, and no model is held in memory."""
    return load_native(folder, dtype=torch.float32).to(device) if uses_self(data) else None


def reload(folder: Path, planned: Mapping[str, tuple[str, tuple[int, ...]]], touched: Collection[str]) -> None:
    """Read what was written as if it came from elsewhere, before it is published.

    Args:
        folder: a checkpoint, but for report, card and manifest.
        planned: dtype and shape of every tensor that it is to hold.
        touched: the tensors that were computed.

    Raises:
        BadCheckpointError: a tensor that was not planned, is missing, has another dtype or shape; NaN or infinity where something
            was computed; K and V that differ; or something that stock transformers could not load.
    """
    specs = read_tensor_specs(folder, weight_files(folder))
    for name in sorted({*planned, *specs}):
        found = (specs[name].dtype, specs[name].shape) if name in specs else None
        if found != planned.get(name):
            raise BadCheckpointError(
                f"the tensor {name} was not written as planned",
                f"planned: {planned.get(name, 'none')}; in the file: {found or 'none'}",
                "run the command again; if it happens again, check the disk",
            )
    for name in sorted(touched):
        read_tensor(folder, specs[name])
    verify_form(folder)
    native_class(folder, specs)


def plain_forward(model: Any) -> Forward:
    """A model's own forward, without a cache."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def _strict(loader: Any, folder: Path | None, config: Any, **options: Any) -> Any:
    """Load from a folder, or from a `state_dict` among the options, and treat a tensor that is missing as the error it is:
    transformers would fill it with random numbers.
    """
    given = {name: value for name, value in options.items() if value is not None}
    model, info = loader.from_pretrained(
        folder, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True, **given
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadCheckpointError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}",
            "the model would compute with random numbers in their place",
            "download or convert the model again",
        )
    return model.eval()
