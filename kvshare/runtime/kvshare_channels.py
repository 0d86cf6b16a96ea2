# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""What channels of a shared projection are like: the middle and the size of each, by which a cache in few bits is quantised.

In: the file `kvshare_channels.json` beside the weights. Out: two tensors for each shared layer, the same for every token. Never:
needs the file to be there, believes what it says before its shapes and numbers are checked.

    {"format_version": 1, "layers": {"0": {"middle": [[...], ...], "size": [[...], ...]}, ...}}    (kv heads, head_dim) each
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILE = "kvshare_channels.json"
FORMAT_VERSION = 1
MOST = 1e30  # of a number's size; float32 holds as much, and its inverse
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")  # how files are looked for


class Channels(NamedTuple):
    """Of every channel of a layer's shared projection, before bias, norm and rope: the middle of the range that nearly all its
    numbers lie in, and half of how wide that is. Both (kv heads, 1, head_dim), float32.
    """

    middle: Tensor
    size: Tensor


def read_channels(value: Any, shapes: Mapping[int, tuple[int, int]]) -> dict[int, Channels]:
    """The channels of each shared layer.

    Args:
        value: what the file holds, as JSON data.
        shapes: KV heads and head_dim of the shared layers.

    Raises:
        ValueError: it holds something else than two finite numbers for each channel of these layers, sizes above 0.
    """
    layers = value.get("layers") if isinstance(value, dict) else None
    if not isinstance(layers, dict) or value.keys() != {"format_version", "layers"}:
        raise ValueError("it is no object of format_version and layers")
    if type(value["format_version"]) is not int or value["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format_version is not {FORMAT_VERSION}")
    if layers.keys() != {str(layer) for layer in shapes}:
        raise ValueError(f"its layers are not the {len(shapes)} shared ones")
    found = {}
    for layer, shape in shapes.items():
        entry = layers[str(layer)]
        if not isinstance(entry, dict) or entry.keys() != set(Channels._fields):
            raise ValueError(f"layer {layer} is no object of {' and '.join(Channels._fields)}")
        middle, size = (_tensor(entry[name], shape, f"the {name} of layer {layer}") for name in Channels._fields)
        if not bool((size >= 1 / MOST).all()):
            raise ValueError(f"the size of layer {layer} holds a number that is not above 0")
        found[layer] = Channels(middle, size)
    return found


def _tensor(rows: Any, shape: tuple[int, int], what: str) -> Tensor:
    """(kv heads, 1, head_dim); on the CPU whatever torch's default is, because models are made on the meta device."""
    heads, width = shape
    if not isinstance(rows, list) or len(rows) != heads or not all(isinstance(row, list) and len(row) == width for row in rows):
        raise ValueError(f"{what} is not {heads} lists of {width} numbers")
    if not all(type(x) in (int, float) and -MOST <= x <= MOST for row in rows for x in row):
        raise ValueError(f"{what} holds something else than finite numbers")
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float32, device="cpu")[:, None]


def as_text(layers: Mapping[int, Channels]) -> str:
    """The content of the file: four significant digits of every number, so equal channels give equal bytes."""
    listed = {
        str(layer): {
            name: [[float(f"{x:.4g}") for x in row] for row in value[:, 0].tolist()]
            for name, value in zip(Channels._fields, layers[layer], strict=True)
        }
        for layer in sorted(layers)
    }
    return json.dumps({"format_version": FORMAT_VERSION, "layers": listed}, separators=(",", ":")) + "\n"


def give_channels(attentions: list[Any], name: Any, options: Mapping[str, Any]) -> None:
    """Give attention modules in shared form, as `kvshare_channels`, what lies beside the weights of their model, if it does.

    Args:
        attentions: the modules; each knows its `layer_idx`, `kvshare_heads` and `head_dim`.
        name: of the model, a folder or a Hub id; None where its weights come from elsewhere.
        options: of `from_pretrained`.

    Raises:
        ValueError: the file cannot be used.
    """
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("connection_errors", "gated_repo", "missing_entries")}
    wanted = {option: options[option] for option in HUB if options.get(option) is not None}
    file = None if name is None or not attentions else cached_file(name, FILE, **wanted, **quiet)
    if file is None:
        return
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
        found = read_channels(value, {module.layer_idx: (module.kvshare_heads, module.head_dim) for module in attentions})
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{FILE} of {name} cannot be used: {error}; copy the checkpoint again, or convert the model again"
        ) from None
    for module in attentions:
        module.kvshare_channels = found[module.layer_idx]


def save_channels(attentions: list[Any], folder: Path) -> None:
    """Write the file of a model that is saved, where its attention modules have channels; see `give_channels`. Otherwise the one of
    another model, which lies there, is removed.
    """
    found = {module.layer_idx: module.kvshare_channels for module in attentions if module.kvshare_channels is not None}
    if found:
        (folder / FILE).write_text(as_text(found), encoding="utf-8")
    else:
        (folder / FILE).unlink(missing_ok=True)


def channels_on(attention: Any, device: torch.device) -> Channels | None:
    """The channels of an attention module on a device, where they stay; None where it has none."""
    channels: Channels | None = attention.kvshare_channels
    if channels is None or channels.middle.device == device:
        return channels
    if torch.compiler.is_compiling():
        return Channels(*(value.to(device) for value in channels))
    with torch.inference_mode(False):
        attention.kvshare_channels = Channels(*(value.to(device) for value in channels))
    kept: Channels = attention.kvshare_channels
    return kept


def with_biases(channels: Channels | None, key_bias: Tensor | None, value_bias: Tensor | None) -> dict[str, Tensor | None]:
    """What a kernel is told of a layer whose cache it reads, (kv heads, head_dim): middles are part of its biases.

    Args:
        channels: of the layer, None where what is cached is the numbers themselves or was quantised without.
        key_bias, value_bias: (kv heads, 1, head_dim), or None.
    """
    biases = {"key_bias": key_bias, "value_bias": value_bias}
    middle, size = channels or (None, None)
    if middle is not None:
        biases = {name: middle if value is None else value.float() + middle for name, value in biases.items()}
    return {name: None if value is None else value[:, 0] for name, value in (biases | {"sizes": size}).items()}
