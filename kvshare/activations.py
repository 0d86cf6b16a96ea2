"""What a layer sees: hidden states that travel from layer to layer, and how they are attended to.

In: a loaded model and calibration tokens. Out: layer inputs, attention inputs and outputs, second moments of head outputs.
Never: keeps the activations of more than one layer, changes a model; large states lie in files without a name.
"""

from __future__ import annotations

import inspect
import math
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.families import Family
from kvshare.layout import pair_order
from kvshare.memory import BATCH_TOKENS, IN_MEMORY
from kvshare.moments import Attending
from kvshare.runtime.kvshare_attention import SOFTCAPPED
from kvshare.runtime.kvshare_tables import rotation_of


@dataclass(frozen=True)
class LayerCall:
    """How a decoder layer is called, apart from its hidden states; the same for every batch of equally long rows."""

    arguments: dict[str, Any]

    def of(self, rows: int) -> dict[str, Any]:
        """The arguments for `rows` rows: what bloom adds to scores has a part for each row and head."""
        alibi = self.arguments.get("alibi")
        if alibi is None:
            return self.arguments
        return self.arguments | {"alibi": alibi.repeat(rows, *[1] * (alibi.dim() - 1))}


class _StopError(Exception):
    pass


@contextmanager
def bypassed(model: Any, layers: nn.ModuleList, result: Callable[[Tensor], Tensor] = lambda hidden: hidden) -> Iterator[None]:
    """Decoder layers of a model that compute nothing: each gives `result` of the hidden states that enter it."""
    records = bool(getattr(model, "_can_record_outputs", None))  # of what layers do by themselves: they give hidden states alone

    def forward(*positional: Any, **keywords: Any) -> Tensor:
        return result(positional[0] if positional else keywords["hidden_states"])

    def forward_with_weights(*positional: Any, **keywords: Any) -> tuple[Tensor, None]:
        return forward(*positional, **keywords), None

    for layer in layers:
        gives_weights = not records and "output_attentions" in inspect.signature(type(layer).forward).parameters  # in a tuple
        layer.forward = forward_with_weights if gives_weights else forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def room(shape: Sequence[int], scratch: Path | None = None) -> Tensor:
    """An empty float32 tensor on the CPU.

    Where it is large and there is a scratch folder, its data lies in a file there that has no name and goes with the tensor: the
    system writes out what does not fit into memory.
    """
    numbers = math.prod(shape)
    if scratch is None or 4 * numbers <= IN_MEMORY:
        return torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
    with tempfile.TemporaryFile(dir=scratch) as file:
        file.truncate(4 * numbers)
        mapped = mmap.mmap(file.fileno(), 4 * numbers)
    return torch.frombuffer(mapped, dtype=torch.float32).view(tuple(shape))


@torch.no_grad()
def first_inputs(
    model: Any, layers: nn.ModuleList, rows: Tensor, device: torch.device, scratch: Path | None = None
) -> tuple[Tensor, list[LayerCall]]:
    """The hidden states that enter the first layer, and how each layer is called. No layer computes anything.

    Args:
        model: a causal language model; its layers may be without weights.
        layers: its decoder layers.
        rows: token ids (rows, length), no padding.
        device: where layers will run.
        scratch: a folder for states that are large, see `room`.

    Returns:
        hidden states (rows, length, hidden) in float32 and one `LayerCall` per layer.
    """
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    calls: list[LayerCall] = []
    caught: list[Tensor] = []

    def record(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        arguments = dict(zip(inspect.signature(type(module).forward).parameters, [module, *positional], strict=False)) | keywords
        kept = {name: _moved(value, device) for name, value in arguments.items() if name not in ("self", "hidden_states")}
        calls.append(LayerCall(kept))

    def catch(_module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        caught.append((positional[0] if positional else keywords["hidden_states"]).float().cpu())

    def enter(ids: Tensor) -> None:
        # in float32 from here on, so that rope tables are exact whatever the embedding is stored in
        decoder(inputs_embeds=embedding(ids.to(embedding.weight.device)).float(), use_cache=False)

    with bypassed(model, layers), _hooks([layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]):
        enter(rows[:1])
    hidden = None
    with bypassed(model, layers), _hooks([layers[0].register_forward_pre_hook(catch, with_kwargs=True)]):
        done = 0
        for batch in batches(rows):
            enter(batch)
            states = caught.pop()
            if hidden is None:
                hidden = room((*rows.shape, states.shape[-1]), scratch)
            hidden[done : done + len(states)] = states
            done += len(states)
    assert hidden is not None
    return hidden, calls


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    """Hooks that are there for a while."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value


def rotary_dim(attention: Any, family: Family, call: LayerCall) -> int:
    """How many numbers of a head rope turns in this layer, 0 where it turns none."""
    tables = call.arguments.get("position_embeddings")
    if tables is None or call.arguments.get("alibi") is not None or not _rotates(attention, family):
        return 0
    return int(tables[0].shape[-1]) * (2 if family.half_tables else 1)


def _rotates(attention: Any, family: Family) -> bool:
    """Whether rope turns the keys of this layer."""
    if family.rotates == "windows":
        config = attention.config
        return config.sliding_window is None or config.layer_types[attention.layer_idx] == "sliding_attention"
    return family.rotates is None or bool(getattr(attention, family.rotates))


def attending(attention: Any, family: Family, call: LayerCall, turned: int, inputs: Tensor) -> Attending:
    """How an attention module attends in `call`, which is that of a row without padding.

    Args:
        attention: its module in transformers has `apply_rotary_pos_emb`, if rope turns any numbers.
        family: of the layer.
        call: holds `position_embeddings`, cos and sin (1, tokens, rotated width), and the mask, if attention is more than causal.
        turned: how many numbers of a head rope turns, the first ones.
        inputs: hidden states (..., tokens, hidden), on the device where attention is computed.
    """
    mask, alibi = call.arguments.get("attention_mask"), call.arguments.get("alibi")
    tokens, device = inputs.shape[-2], inputs.device
    if mask is None:
        visible = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    else:
        visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > torch.finfo(mask.dtype).min / 2
    bias = None
    if mask is not None and mask.shape[1] > 1:  # falcon adds it to the mask
        bias = mask[0].masked_fill(~visible, 0.0)
    elif alibi is not None:
        bias = alibi.view(-1, 1, alibi.shape[-1])

    softcap = attention.attn_logit_softcapping if family.model_type in SOFTCAPPED else None
    sinks = attention.sinks.detach() if hasattr(attention, "sinks") else None
    how = Attending(lambda x, _at: x, lambda x, _at: x, visible, _scaling(attention), softcap, sinks, bias)
    if not turned:
        return how
    rotary = rotation_of(type(attention))
    tables = call.arguments["position_embeddings"]
    cos, sin = tables[::-1] if family.sines_first else tables
    order = pair_order(turned, turned).to(device)

    def turn(x: Tensor, at: Tensor, sign: int) -> Tensor:
        first = x[..., :turned]
        if family.interleaved:
            first = first[..., order.argsort()]
        moved = rotary(first, first, cos[:, at], sign * sin[:, at])[1]
        return torch.cat([moved[..., order] if family.interleaved else moved, x[..., turned:]], -1)

    return replace(how, rotate=lambda x, at: turn(x, at, 1), unrotate=lambda x, at: turn(x, at, -1))


def _scaling(attention: Any) -> float:
    """What scores are multiplied by."""
    if hasattr(attention, "scale_attn"):
        return 1 / float(attention.scale_attn)
    return float(attention.scaling if hasattr(attention, "scaling") else attention.inv_norm_factor)


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Cut (rows, length, ...) into runs of about `BATCH_TOKENS` tokens."""
    yield from rows.split(max(1, BATCH_TOKENS // rows.shape[1]))


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """The hidden states behind a decoder layer, (rows, length, hidden) in and out."""
    result = layer(hidden, **call.of(len(hidden)))
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
def enters(layer: nn.Module, module: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """What enters `module` while `layer` runs on `hidden`: (rows, length, width). What comes after it is not computed."""
    kept: list[Tensor] = []

    def catch(_module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        kept.append(positional[0] if positional else keywords["hidden_states"])
        raise _StopError

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        layer(hidden, **call.of(len(hidden)))
    except _StopError:
        pass
    finally:
        handle.remove()
    return kept[0]


@dataclass
class OutputSums:
    """Second moments of head outputs z and wanted attention outputs y, float64, one batch at a time.

    `heads` E[z z^T], `cross` E[y z^T], `energy` E|y|^2, all as sums over tokens.
    """

    heads: Tensor | None = None
    cross: Tensor | None = None
    energy: float = 0.0

    def add(self, heads: Tensor, wanted: Tensor) -> None:
        """Add a batch: `heads` (..., query heads * head_dim), `wanted` (..., hidden)."""
        z, y = heads.flatten(0, -2), wanted.flatten(0, -2)
        # products in float32 over one batch, sums over batches in float64
        second, cross = (z.T @ z).double(), (y.T @ z).double()
        self.heads = second if self.heads is None else self.heads + second
        self.cross = cross if self.cross is None else self.cross + cross
        self.energy += float(y.double().square().sum())

    def error(self, output: Tensor) -> float:
        """E|y - W z|^2 / E|y|^2 of an output projection W (hidden, query heads * head_dim)."""
        assert self.heads is not None
        assert self.cross is not None
        w = output.double()
        missed = self.energy - 2 * float((w * self.cross).sum()) + float(((w @ self.heads) * w).sum())
        return max(missed, 0.0) / max(self.energy, 1e-30)
