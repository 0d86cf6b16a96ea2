"""A source model whose decoder layers are read from its files one at a time.

In: a `Source`. Out: its modules without their weights, one decoder layer with its own, logits of last hidden states.
Never: holds more than one layer and, for logits, the output embedding; writes, runs code that lies beside a model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.activations import bypassed
from kvshare.errors import BadCheckpointError
from kvshare.families import Family
from kvshare.native import as_in_memory, read_config
from kvshare.source import Source
from kvshare.tensors import map_tensor, read_tensor


@dataclass(frozen=True)
class Skeleton:
    """A model whose layers have no weights (they are on the meta device); its tables are mapped from the disk. `scratch` is a
    folder for hidden states that are large, None to keep all of them in memory.
    """

    source: Source
    family: Family
    model: Any
    scratch: Path | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, without weights."""
        return getattr(self.model.get_decoder(), self.family.stack)

    def layer_prefix(self, index: int) -> str:
        """What the names of a decoder layer's tensors begin with, such as `model.layers.3.`."""
        return self.family.attention.format(layer=index).rpartition(".")[0] + "."


def open_skeleton(source: Source, family: Family, scratch: Path | None = None) -> Skeleton:
    """The modules of a source that `native.require_form` let pass, or of a checkpoint that was made of one: vectors outside the
    layers in float32, tables mapped in the dtype they are stored in.

    Raises:
        BadCheckpointError: a tensor outside the layers is missing.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = read_config(source.path)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    skeleton = Skeleton(source, family, model.eval(), scratch)
    prefix = skeleton.layer_prefix(0).removesuffix("0.")
    known = set(model.state_dict())
    state = {}
    for stored, spec in source.tensors.items():
        name = stored
        if stored not in known and not stored.startswith(prefix):
            # the model calls it otherwise, or this is a base model's checkpoint, which lacks the first part of the names
            (renamed,) = as_in_memory(model, {stored: torch.empty(0)})
            name = renamed if renamed in known else f"{model.base_model_prefix}.{stored}"
        if name in known and not stored.startswith(prefix):
            mapped = len(spec.shape) > 1
            state[name] = map_tensor(source.path, spec) if mapped else read_tensor(source.path, spec).float()
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    inside = {id(parameter) for parameter in skeleton.layers.parameters()}
    missing = [name for name, value in model.named_parameters() if value.is_meta and id(value) not in inside]
    _require(source, missing)
    return skeleton


def read_layer(skeleton: Skeleton, index: int, device: torch.device) -> nn.Module:
    """A decoder layer with its weights, in float32 on `device`.

    Raises:
        BadCheckpointError: a tensor of the layer is missing, or holds NaN or infinity.
    """
    source, prefix = skeleton.source, skeleton.layer_prefix(index)
    layer = copy.deepcopy(skeleton.layers[index])
    own = set(layer.state_dict())
    stored = {
        full: read_tensor(source.path, spec).to(device, torch.float32)
        for full, spec in source.tensors.items()
        if full.startswith(prefix)
    }
    if any(full.removeprefix(prefix) not in own for full in stored):
        stored = as_in_memory(skeleton.model, stored)
    state = {name: value for full, value in stored.items() if (name := full.removeprefix(prefix)) in own}
    layer.load_state_dict(state, strict=False, assign=True)
    _require(source, [f"{prefix}{name}" for name, value in layer.named_parameters() if value.is_meta])
    return layer.requires_grad_(False).to(device).eval()


def _require(source: Source, missing: list[str]) -> None:
    if missing:
        raise BadCheckpointError(
            f"{source.name} lacks {len(missing)} tensors, the first is {missing[0]}",
            "the model would compute with nothing in their place",
            "download the model again",
        )


@torch.no_grad()
def last_logits(skeleton: Skeleton, hidden: Tensor, device: torch.device) -> Tensor:
    """What the model predicts from the hidden states behind its last layer: (rows, length, hidden) to (rows, length, vocabulary).

    From the first call on, norm and output embedding are held in float32 on `device`.
    """
    decoder, head = skeleton.model.get_decoder(), skeleton.model.get_output_embeddings()
    inside = (skeleton.layers, decoder.get_input_embeddings())
    for module in (head, *(child for child in decoder.children() if all(child is not other for other in inside))):
        module.to(device, torch.float32)
    states = hidden.to(device)
    with bypassed(skeleton.model, skeleton.layers, lambda _: states):
        return skeleton.model(inputs_embeds=torch.zeros_like(states), use_cache=False).logits
