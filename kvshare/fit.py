"""The learned initialisation: one layer at a time, train the shared attention to give the source's outputs.

In: a decoder layer in shared weights, its attention inputs and wanted outputs. Out: `AttentionWeights` with k == v.
Never: touches other layers, the MLP or norms outside attention; holds more than one layer. Formula: method.md, section 3.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from kvshare.activations import LayerCall
from kvshare.families import Family
from kvshare.layout import pack
from kvshare.merge import AttentionWeights
from kvshare.orthogonal import HeadwiseMuon
from kvshare.runtime.kvshare_cache import CACHE_NAMES
from kvshare.sections import Fit

WARMUP = 0.05  # fraction of the steps
PROJECTIONS = 0.4  # of the learning rate: all numbers of a matrix move in every step of theirs
HELD_OUT = 1 / 16  # of the rows are not trained on
LOOKS = 15  # how often the held-out error is measured
PATIENCE = 5  # looks without a new best of the trained weights before training stops
WORSE = 1.25  # times the error of the start: trained weights above that are given up; less is within what few rows can tell


@dataclass(frozen=True)
class FitReport:
    """How a fit went: steps taken, the step whose weights were kept, and the relative output error on rows that were held out
    before and after: E|y_source - y_shared|^2 / E|y_source|^2.
    """

    steps: int
    kept_step: int
    held_out_before: float
    held_out_after: float


def fit_layer(
    attention: nn.Module,
    family: Family,
    weights: AttentionWeights,
    inputs: Tensor,
    wanted: Tensor,
    call: LayerCall,
    settings: Fit,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[AttentionWeights, FitReport]:
    """Minimise E|y_source - y_shared|^2 / E|y_source|^2 over the projections and the norms of one attention layer.

    The last rows are held out; the trained weights of the least error on them are kept, or the start where that is far better,
    and training stops early when that error no longer falls.

    Args:
        attention: the layer's attention in the output's shape, float32; its own parameters are not changed.
        family: of the layer.
        weights: where training starts.
        inputs: attention inputs (rows, length, hidden).
        wanted: attention outputs of the source (rows, length, hidden).
        call: how the layer is called.
        settings: steps, tokens per step, learning rate.
        seed: order of the rows.
        progress: called with steps done and steps in all.
    """
    device = inputs.device
    start = {field: value.float().to(device) for field, value in weights.tensors.items() if field != "v"}
    # Rows of very different size share one learning rate: each matrix is trained relative to its own scale.
    scales = {field: value.square().mean().sqrt().clamp_min(1e-8) for field, value in start.items()}
    free = {field: (value / scales[field]).clone().requires_grad_(True) for field, value in start.items()}
    optimizers = _optimizers(free, weights.head_dim, settings.learning_rate)
    warmup = max(1, int(WARMUP * settings.steps))
    schedules = [LambdaLR(optimizer, lambda step: _cosine(step, warmup, settings.steps)) for optimizer in optimizers]
    held = max(1, int(HELD_OUT * len(inputs)))
    trained_rows = max(1, len(inputs) - held)
    per_step = max(1, min(trained_rows, settings.batch_tokens // inputs.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    given = {name: value for name, value in call.arguments.items() if name not in CACHE_NAMES}
    if "residual" in inspect.signature(attention.forward).parameters:  # bloom's attention adds it to its output
        given["residual"] = 0.0

    def missed(rows: Tensor) -> Tensor:
        """E|y - y_shared|^2 / E|y|^2 over some rows."""
        current = {field: value * scales[field] for field, value in free.items()}
        parameters = pack(weights.with_tensors(current | {"v": current["k"]}), family)
        arguments = replace(call, arguments=given).of(len(rows))
        result = functional_call(attention, parameters, (), {"hidden_states": inputs[rows], **arguments})
        return (result[0] - wanted[rows]).square().sum() / wanted[rows].square().sum().clamp_min(1e-30)

    @torch.no_grad()
    def held_out_error() -> float:
        parts = torch.arange(len(inputs) - held, len(inputs), device=device).split(per_step)
        return sum(float(missed(rows)) * len(rows) for rows in parts) / held

    first = held_out_error()
    start_kept = {field: value.detach().clone() for field, value in free.items()}
    # At its highest the rate may lose more than it wins at first: what must go on falling is the error of trained weights.
    kept, least, kept_step, taken = start_kept, math.inf, 0, 0
    every = max(1, settings.steps // LOOKS)
    for step in range(settings.steps):
        if len(order) < per_step:
            order = torch.cat([order, torch.randperm(trained_rows, generator=generator)])
        rows, order = order[:per_step].to(device), order[per_step:]
        loss = missed(rows)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        taken = step + 1
        progress(taken, settings.steps)
        if taken % every == 0 or taken == settings.steps:
            error = held_out_error()
            if error < least:
                least, kept_step = error, taken
                kept = {field: value.detach().clone() for field, value in free.items()}
            elif taken - kept_step >= PATIENCE * every:
                break
    if not least <= WORSE * first:
        kept, least, kept_step = start_kept, first, 0
    progress(settings.steps, settings.steps)
    trained = {field: (value * scales[field]).double() for field, value in kept.items()}
    return weights.with_tensors(trained | {"v": trained["k"]}), FitReport(taken, kept_step, first, least)


def _optimizers(free: dict[str, Tensor], head_dim: int, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the projections, Adam for biases and norms, by field name."""
    projections = ("q", "k", "o")
    groups = [{"params": [free[name]], "head_dim": head_dim, "columns": name == "o"} for name in projections]
    others = [value for name, value in free.items() if name not in projections]
    optimizers: list[torch.optim.Optimizer] = [HeadwiseMuon(groups, PROJECTIONS * rate)]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0))
    return optimizers


def _cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))))
