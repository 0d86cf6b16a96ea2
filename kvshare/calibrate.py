"""What a layer sees: hidden states that travel from layer to layer, and the moments taken on the way.

In: a loaded model and calibration tokens. Out: layer inputs, attention inputs and outputs, `Moments`.
Never: keeps the activations of more than one layer, changes a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvshare.merge import AttentionWeights, Moments

BATCH_TOKENS = 8_192


@dataclass(frozen=True)
class LayerCall:
    """How a decoder layer is called, apart from its hidden states; the same for every batch of equally long rows."""

    arguments: dict[str, Any]


class _StopError(Exception):
    pass


def first_inputs(model: nn.Module, layers: nn.ModuleList, rows: Tensor, device: torch.device) -> tuple[Tensor, list[LayerCall]]:
    """The hidden states that enter the first layer, and how each layer is called.

    Args:
        model: a causal language model in float32, so that its rope tables are exact.
        layers: its decoder layers.
        rows: token ids (rows, length), no padding.
        device: where layers will run.

    Returns:
        hidden states (rows, length, hidden) in float32 and one `LayerCall` per layer.
    """
    calls: list[LayerCall] = []

    def record(_module: nn.Module, _positional: Any, keywords: dict[str, Any]) -> None:
        calls.append(LayerCall({name: _moved(value, device) for name, value in keywords.items() if name != "hidden_states"}))

    def stop(_module: nn.Module, _positional: Any, _output: Any) -> None:
        raise _StopError

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=rows[:1].to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    hidden: list[Tensor] = []

    def catch(_module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden.append((positional[0] if positional else keywords["hidden_states"]).float().cpu())
        raise _StopError

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches(rows):
            try:
                with torch.no_grad():
                    model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
            except _StopError:
                pass
    finally:
        handle.remove()
    return torch.cat(hidden), calls


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Cut (rows, length, ...) into runs of about `BATCH_TOKENS` tokens."""
    yield from rows.split(max(1, BATCH_TOKENS // rows.shape[1]))


@torch.no_grad()
def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """The hidden states behind a decoder layer, (rows, length, hidden) in and out."""
    result = layer(hidden, **call.arguments)
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
        layer(hidden, **call.arguments)
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


class MomentSums:
    """Running sums of a layer's `Moments`, float64, one batch of attention inputs at a time."""

    def __init__(self, weights: AttentionWeights) -> None:
        self.weights = weights
        self.has_bias = weights.k_bias is not None or weights.v_bias is not None
        width = 2 * weights.kv_heads * weights.head_dim
        device = weights.q.device
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.queries = torch.zeros(weights.query_heads, weights.head_dim // 2, dtype=torch.float64, device=device)
        self.weight, self.tokens = 0.0, 0

    def add(self, inputs: Tensor) -> None:
        """Add a batch of attention inputs (tokens, hidden)."""
        w = self.weights
        states = inputs @ torch.cat([w.k, w.v]).to(inputs).T  # (tokens, 2 * kv heads * head_dim)
        biases = self._biases().to(inputs)
        states = states + biases
        if w.key_norm is not None:
            # Norms ignore scale: an error counts relative to the key it changes. The mean weight is set to 1 at the end.
            keys = states[:, : states.shape[1] // 2]
            scale = 1 / keys.square().mean(-1, keepdim=True).clamp_min(1e-12)
        else:
            scale = torch.ones_like(states[:, :1])
        doubles, scale = states.double(), scale.double()
        self.second += doubles.T @ (doubles * scale)
        self.first += (doubles * scale).sum(0)
        self.weight += float(scale.sum())
        queries = inputs @ w.q.to(inputs).T
        if w.q_bias is not None:
            queries = queries + w.q_bias.to(inputs)
        queries = queries.view(len(inputs), w.query_heads, w.head_dim)
        if w.query_norm is not None:
            queries = queries * queries.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt() * w.query_norm.to(inputs)
        pairs = queries.double().square().sum(0)  # (query heads, head_dim)
        half = w.head_dim // 2
        self.queries += (pairs[:, :half] + pairs[:, half:]) / 2
        self.tokens += len(inputs)

    def _biases(self) -> Tensor:
        w = self.weights
        return torch.cat(
            [
                torch.zeros(part.shape[0], dtype=torch.float64) if bias is None else bias.double().cpu()
                for part, bias in ((w.k, w.k_bias), (w.v, w.v_bias))
            ]
        )

    def moments(self) -> Moments:
        """The moments of all batches so far."""
        shape = (2, self.weights.kv_heads, self.weights.head_dim)
        second, mean = self.second / self.weight, torch.zeros_like(self.first)
        projected = torch.zeros_like(mean)
        if self.has_bias:
            mean = self.first / self.weight
            second = second - torch.outer(mean, mean)
            projected = mean - self._biases().to(mean)
        return Moments(second.view(*shape, *shape), mean.view(shape), projected.view(shape), self.queries / self.tokens)
