"""Hidden states through a decoder layer, batch by batch.

In: a decoder layer, hidden states on the CPU, how the layer is called. Out: hidden states behind it, outputs of its attention,
sums of its moments.
Never: holds more than a batch on the device, changes a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.activations import LayerCall, attending, batches, enters, run_layer
from kvshare.families import Family
from kvshare.layout import pack
from kvshare.merge import AttentionWeights
from kvshare.moments import MomentSums
from kvshare.sections import Form


def attention_of(layer: nn.Module, family: Family) -> nn.Module:
    """The attention module of a decoder layer."""
    return layer.get_submodule(family.attention.rpartition("{layer}.")[2])


def with_weights(layer: nn.Module, family: Family, weights: AttentionWeights, form: Form) -> nn.Module:
    """A float32 copy of a decoder layer with other attention weights, in its native form, or in the rotated one."""
    changed = copy.deepcopy(layer)
    attention: Any = attention_of(changed, family)
    device = next(layer.parameters()).device
    for name, value in pack(weights, family).items():
        module, _, kind = name.rpartition(".")
        setattr(attention.get_submodule(module), kind, nn.Parameter(value.to(device, torch.float32, copy=True)))
    for name in ("num_kv_heads", "num_key_value_heads"):
        if hasattr(attention, name):
            setattr(attention, name, weights.kv_heads)
    attention.num_key_value_groups = weights.query_heads // weights.kv_heads
    if form == "rotated":
        from kvshare.runtime.kvshare_rotated import rotate_attention

        rotate_attention(attention)
    return changed


def passed(layer: nn.Module, hidden: Tensor, call: LayerCall, device: torch.device) -> Tensor:
    """The hidden states behind a layer, (rows, length, hidden) in and out, on the CPU; computed on `device` batch by batch."""
    return torch.cat([run_layer(layer, batch.to(device), call).cpu() for batch in batches(hidden)])


def advance(layer: nn.Module, hidden: Tensor, call: LayerCall, device: torch.device) -> None:
    """As `passed`, in place."""
    for batch in batches(hidden):
        batch.copy_(run_layer(layer, batch.to(device), call))


def add_moments(
    sums: MomentSums,
    layer: nn.Module,
    family: Family,
    hidden: Tensor,
    call: LayerCall,
    device: torch.device,
    advances: bool = False,
) -> None:
    """Add what a layer's attention sees to the sums of its moments.

    Args:
        sums: of the layer.
        layer: of the source, on `device`.
        family: of the layer.
        hidden: hidden states (rows, length, hidden) on the CPU.
        call: how the layer is called.
        device: where it computes.
        advances: whether hidden states are taken behind the layer, in place, too; what it projects then is not projected again.
    """
    attention = attention_of(layer, family)
    modules = _projections(attention, family, sums.weights) if advances else {}
    for batch in batches(hidden):
        states, seen = batch.to(device), dict[str, Tensor]()
        if advances:
            with _catching(attention, modules, seen):
                behind = run_layer(layer, states, call)
            inputs = seen.pop("inputs")
        else:
            inputs = enters(layer, attention, states, call)
        sums.add(inputs, attending(attention, family, call, sums.weights.rotated, inputs), seen)
        if advances:
            batch.copy_(behind)


def _projections(attention: nn.Module, family: Family, weights: AttentionWeights) -> dict[str, nn.Module]:
    """The modules that give what moments are taken of, by part: queries with a bias, keys and values without one. A module that
    gives more at once, or numbers in another order, is not among them.
    """
    modules, found = dict(attention.named_modules()), dict[str, nn.Module]()
    for part, own in (("q", weights.q), ("k", weights.k), ("v", weights.v)):
        module = modules.get(getattr(family, part))
        if type(module) is nn.Linear and own.is_set_to(module.weight.detach()) and (part == "q" or module.bias is None):
            found[part] = module
    return found


@contextmanager
def _catching(attention: nn.Module, modules: Mapping[str, nn.Module], seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep what enters attention, as `inputs`, and what the modules in it give, by their part."""

    def enter(_module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen["inputs"] = positional[0] if positional else keywords["hidden_states"]

    def keep(part: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def give(_module: nn.Module, _positional: Any, result: Tensor) -> None:
            seen[part] = result.clone()  # attention may change it in place

        return give

    handles = [attention.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [module.register_forward_hook(keep(part)) for part, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attend_and_advance(
    layer: nn.Module,
    family: Family,
    hidden: Tensor,
    wanted: Tensor,
    call: LayerCall,
    device: torch.device,
    other: Tensor | None = None,
) -> None:
    """Take hidden states behind a layer, in place, and keep what its attention gave on the way.

    Args:
        layer: of the source, on `device`.
        family: of the layer.
        hidden: hidden states (rows, length, hidden) on the CPU.
        wanted: gets the attention outputs, same shape; where there is another stream, with what that one has drifted from this
            one added, so that it is corrected there; for families that add it to the hidden states as it is, or scaled.
        call: how the layer is called.
        device: where it computes.
        other: hidden states of the other stream, same shape.
    """
    outputs: list[Tensor] = []
    with _keeping(_output(layer, family), outputs):
        others = [None] * len(hidden) if other is None else list(batches(other))
        for batch, given, drifted in zip(batches(hidden), batches(wanted), others, strict=False):
            behind = run_layer(layer, batch.to(device), call)
            given.copy_(outputs.pop())
            if drifted is not None:
                given += (batch - drifted) / getattr(layer, "residual_multiplier", 1.0)
            batch.copy_(behind)


def _output(layer: nn.Module, family: Family) -> nn.Module:
    """What gives the output of attention: bloom's attention module adds what it is added to."""
    return attention_of(layer, family).get_submodule(family.o)


def source_pass(layer: nn.Module, family: Family, hidden: Tensor, call: LayerCall, device: torch.device) -> tuple[Tensor, Tensor]:
    """Attention outputs and layer outputs of the source stream, both (rows, length, hidden), on the CPU."""
    outputs: list[Tensor] = []

    with _keeping(_output(layer, family), outputs):
        behind = [run_layer(layer, batch.to(device), call).cpu() for batch in batches(hidden)]
    return torch.cat(outputs), torch.cat(behind)


@contextmanager
def _keeping(module: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Append to `outputs`, on the CPU, what a module gives."""

    def keep(_module: nn.Module, _positional: Any, result: Any) -> None:
        outputs.append(result.cpu())

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
