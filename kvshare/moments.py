"""What errors in the keys and values of a layer do to its attention output, as second moments.

In: the source weights of one layer, its attention inputs, how it attends. Out: `Moments`.
Never: keeps activations beyond a batch, changes weights. Formulas: method.md, section 2, with the following weights.

A change dk_j of the key of token j moves the output of query i by p_ij (q_i . R_j dk_j) W_O (v_j - o_i), with p the attention
weights, q_i rotated, scaled and after its norm, R_j the rotation at j, o_i the output of the head. So to first order, errors of
different tokens taken as independent, they cost the sum over i and j of W_ij (q_i . R_j dk_j)^2 with
W_ij = p_ij^2 |W_O (v_j - o_i)|^2. It is kept as two factors: E[u_j u_j^T] of tokens weighted by the sum over i of W_ij times
the mean square of the scores of q_i, and Lambda, the mean over j of the sum over i of W_ij R_j^T q_i q_i^T R_j.
A change of values moves the output by W_O times its average over p, so the moments of values are those of averages over p:
what cancels in the average costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvshare.merge import AttentionWeights, Grouping, Moments
from kvshare.sections import Form
from kvshare.turning import TurnSums

CHUNK_NUMBERS = 1 << 25  # attention weights of the rows that are looked at together
BLOCK_TOKENS = 64  # queries whose attention weights are held at one time, so few that they stay in a cache
METRIC_TOKENS = 16  # tokens of a row at which Lambda is taken
ROPE_AVERAGE = 0.25  # part of Lambda that is averaged over all relative positions, in which rope pairs do not mix
EVEN = 0.1  # part of the weight of a row's keys that is spread evenly over them
ROW_SUM = 1 << 27  # numbers in a group's moments beyond which its heads share them

Weighting = Literal["attention", "projections", "none"]
"""`attention`: errors weigh as they move the attention output, as above. `projections`: as queries and the output projection see
them, all tokens alike (method.md, section 2). `none`: all alike, keys and values by their share of their own energy.
"""


@dataclass(frozen=True)
class Attending:
    """How a layer attends to rows of equal length.

    `rotate` and `unrotate` take (rows, heads, tokens, head_dim) and the positions of these tokens in the row: R_j x and R_j^T x.
    `visible` (tokens, tokens) is True where query i may read key j. `scaling` multiplies scores. `softcap` c makes c tanh(x / c)
    of them; `sinks` (query heads) are scores of nothing beside the keys; `bias` (query heads, 1 or i, j) is added to scores. None
    where the layer has none.
    """

    rotate: Callable[[Tensor, Tensor], Tensor]
    unrotate: Callable[[Tensor, Tensor], Tensor]
    visible: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None

    def weights(
        self, scores: Tensor, heads: slice, queries: slice = slice(None), keys: slice = slice(None)
    ) -> tuple[Tensor, Tensor | float]:
        """Attention weights of some query heads from scores (rows, queries, i, j), which are used up, and the derivative of capped
        scores. `queries` and `keys` say which tokens i and j are, where they are not all; the keys are all that these queries see.
        """
        slope: Tensor | float = 1.0
        if self.softcap is not None:
            capped = torch.tanh(scores / self.softcap)
            scores, slope = capped * self.softcap, 1 - capped.square()
        if self.bias is not None:
            bias = self.bias[heads, :, keys]
            scores = scores + (bias if bias.shape[1] == 1 else bias[:, queries]).to(scores)
        scores.masked_fill_(~self.visible[queries, keys], -torch.inf)
        if self.sinks is None:
            return scores.softmax(-1), slope
        sinks = self.sinks[heads].to(scores).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1], slope


def _blocks(visible: Tensor) -> list[tuple[slice, slice]]:
    """Runs of queries, and from the first to the last key that any of them sees; one run on a GPU, where few large steps win."""
    blocks, size = [], BLOCK_TOKENS if visible.device.type == "cpu" else len(visible)
    for start in range(0, len(visible), size):
        queries = slice(start, min(start + size, len(visible)))
        seen = visible[queries].any(0).nonzero()
        blocks.append((queries, slice(int(seen[0]), int(seen[-1]) + 1)))
    return blocks


def fits_apart(weights: AttentionWeights, heads: int) -> bool:
    """Whether each of the source heads of a group of `heads` may have moments of its own."""
    has_bias = weights.k_bias is not None or weights.v_bias is not None
    return heads * (2 * heads * weights.head_dim + has_bias) ** 2 <= ROW_SUM


def moment_numbers(heads: int, head_dim: int) -> int:
    """The most numbers in the moments of keys, or of values, of a group of `heads` source heads."""
    return min(max(ROW_SUM, numbers := (2 * heads * head_dim + 1) ** 2), heads * numbers)


class MomentSums:
    """Running sums of a layer's `Moments`, one batch of attention inputs at a time.

    Args:
        weights: the source layer.
        grouping: the source KV heads of each output head.
        weighting: what errors count; without attention, heads share their moments where no norm weighs the tokens.
        form: `rotated`, where values are to be read from rotated keys: then what rope does to them is looked at, too.
    """

    def __init__(
        self, weights: AttentionWeights, grouping: Grouping, weighting: Weighting = "attention", form: Form = "shared"
    ) -> None:
        self.weights, self.grouping, self.weighting = weights, grouping, weighting
        self.has_bias = weights.k_bias is not None or weights.v_bias is not None
        width, device = weights.head_dim, weights.q.device
        alike = weighting == "none" or (weighting == "projections" and weights.key_norm is None)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for group in grouping:
            numbers = 2 * len(group) * width + self.has_bias
            fits = fits_apart(weights, len(group))
            for sums, shared in ((self.keys, alike), (self.values, weighting != "attention")):
                count = len(group) if fits and not shared else 1
                sums.append(torch.zeros(count, numbers, numbers, dtype=torch.float64, device=device))
        self.metric = torch.zeros(weights.kv_heads, width, width, dtype=torch.float64, device=device)
        self.weight = torch.zeros(weights.kv_heads, dtype=torch.float64, device=device)
        self.tokens, self.sampled = 0, 0
        out = weights.o.view(len(weights.o), weights.kv_heads, -1, width)  # (hidden, kv heads, queries per kv head, head_dim)
        self.read = torch.einsum("ohqi,ohqj->hqij", out, out) if weighting == "attention" else None  # W_O^T W_O of each head
        self.turns = TurnSums(weights) if form == "rotated" and weighting == "attention" and weights.rotated else None

    @torch.no_grad()
    def add(self, inputs: Tensor, attending: Attending, projected: Mapping[str, Tensor] | None = None) -> None:
        """Add a batch.

        Args:
            inputs: of attention (rows, tokens, hidden).
            attending: how the layer attends to them.
            projected: what is known already of their projections (rows, tokens, width): `q` with its bias, `k` and `v` without.
        """
        chunk = max(1, CHUNK_NUMBERS // (self.weights.query_heads * inputs.shape[1] ** 2))
        blocks = _blocks(attending.visible)
        for start in range(0, len(inputs), chunk):
            part = slice(start, start + chunk)
            known = {name: states[part] for name, states in (projected or {}).items()}
            self._add(inputs[part], known, attending, blocks)

    def _add(
        self, inputs: Tensor, projected: Mapping[str, Tensor], attending: Attending, blocks: list[tuple[slice, slice]]
    ) -> None:
        w = self.weights
        rows, tokens, _ = inputs.shape
        served = w.query_heads // w.kv_heads

        def heads(part: str, weight: Tensor, bias: Tensor | None) -> Tensor:
            states = projected.get(part)
            if states is None:
                states = inputs @ weight.to(inputs).T
                states = states if bias is None else states + bias.to(inputs)
            return states.view(rows, tokens, -1, w.head_dim).transpose(1, 2)

        bare = torch.stack(
            [heads("k", w.k, None), heads("v", w.v, None)], 1
        )  # (rows, 2, kv heads, tokens, head_dim), without biases
        keys, values = (
            part if bias is None else part + bias.to(part).view(-1, 1, w.head_dim)
            for part, bias in zip(bare.unbind(1), (w.k_bias, w.v_bias), strict=True)
        )  # (rows, kv heads, tokens, head_dim)
        queries = heads("q", w.q, w.q_bias)  # (rows, query heads, tokens, head_dim)
        relative = torch.ones_like(keys[..., 0])  # what an error of a key counts: norms ignore scale
        if w.key_norm is not None:
            relative = _per_square(keys, w.key_norm)
            keys = keys * relative.sqrt()[..., None] * w.key_norm.to(inputs).view(-1, 1, w.head_dim)
        if w.query_norm is not None:
            size = _per_square(queries, w.query_norm).sqrt()[..., None]
            queries = queries * size * w.query_norm.to(inputs).view(-1, 1, w.head_dim)
        if self.weighting == "attention":
            importance = self._add_attention(queries, keys, values, relative, bare, attending, blocks)
        else:
            importance = relative if self.weighting == "projections" else torch.ones_like(relative)
            if self.weighting == "projections":
                scaled = (queries * attending.scaling).double().view(rows, w.kv_heads, served, tokens, w.head_dim)
                self.metric += torch.einsum("rhqtc,rhqtd->hcd", scaled, scaled)
            self.sampled += rows * tokens
            self._add_plain_values(bare)
        self.weight += importance.double().sum((0, 2))
        self.tokens += rows * tokens
        self._add_keys(bare, importance)

    def _add_attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        relative: Tensor,
        bare: Tensor,
        attending: Attending,
        blocks: list[tuple[slice, slice]],
    ) -> Tensor:
        """Add the metric and the moments of values; returns what each token's key counts, (rows, kv heads, tokens)."""
        w = self.weights
        served = w.query_heads // w.kv_heads
        positions = torch.arange(keys.shape[2], device=keys.device)
        queries = attending.rotate(queries, positions) * attending.scaling
        keys = attending.rotate(keys, positions)
        importance = torch.zeros_like(relative)
        energies = _turned(keys.transpose(-1, -2) @ keys / keys.shape[2], w.rotated)  # (rows, kv heads, head_dim, head_dim)
        assert self.read is not None
        step = max(1, len(positions) // METRIC_TOKENS)
        at = positions[::step]
        for head in range(w.kv_heads):
            own = slice(head * served, (head + 1) * served)
            place, group = next((place, group) for place, group in enumerate(self.grouping) if head in group)
            states = self._group_inputs(bare, group)
            start = (len(group) + group.index(head)) * w.head_dim  # of its value in them
            metric = self.read[head].to(values)
            read = _read(values[:, head, None], metric)
            sharpness = ((queries[:, own] @ energies[:, head, None]) * queries[:, own]).sum(-1, keepdim=True)
            outer = torch.zeros(len(at), w.head_dim, w.head_dim, dtype=torch.float64, device=keys.device)
            for i, j in blocks:
                asking = queries[:, own, i]
                scores = (asking.flatten(1, 2) @ keys[:, head, j].transpose(-1, -2)).unflatten(1, (served, -1))
                attention, slope = attending.weights(scores, own, i, j)  # (rows, queries, i, j)
                if self.turns is not None:
                    self.turns.add(attention, head, attending.rotate, positions[i], positions[j])
                averaged = (attention.flatten(1, 2) @ states[:, j]).unflatten(1, (served, -1))
                self._add_values(averaged, place, group.index(head))
                outputs = averaged[..., start : start + w.head_dim]
                if w.v_bias is not None:
                    bias = w.v_bias.to(outputs).view(-1, w.head_dim)[head]
                    outputs = outputs + averaged[..., -1:] * bias  # the last number is the sum of the weights
                costs = _costs(attention, outputs, metric, read[:, :, j])
                if w.key_norm is not None:
                    costs *= relative[:, head, None, None, j]
                if isinstance(slope, Tensor):
                    costs *= slope.square()
                importance[:, head, j] += (sharpness[:, :, i].transpose(-1, -2) @ costs).sum((1, 2))
                _add_outer(outer, asking, costs, j, step)
            self._add_metric(outer, head, attending, at)
        self.sampled += len(keys) * len(at)
        # Far from first order, a key that nobody reads may be changed so much that it is read.
        return (1 - EVEN) * importance + EVEN * importance.mean(-1, keepdim=True)

    def _add_metric(self, outer: Tensor, head: int, attending: Attending, at: Tensor) -> None:
        """Add R_j^T A_j R_j at some tokens j, with A_j = sum_i W_ij q_i q_i^T of shape (j, head_dim, head_dim)."""
        turned = attending.unrotate(outer.transpose(0, 1)[:, None].to(self.read), at)  # on one side, then on the other
        turned = attending.unrotate(turned.transpose(0, 3).contiguous(), at)
        self.metric[head] += turned.double().sum((1, 2))

    def _group_inputs(self, bare: Tensor, group: tuple[int, ...]) -> Tensor:
        """U of a group, (rows, tokens, n)."""
        rows, _, _, tokens, _ = bare.shape
        states = bare[:, :, list(group)].permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1)
        return torch.cat([states, torch.ones_like(states[..., :1])], -1) if self.has_bias else states

    def _add_values(self, averaged: Tensor, group: int, place: int) -> None:
        """Add u averaged by the attention weights of a source head, (rows, queries, i, n), at its place in a group."""
        sums = self.values[group]
        states = averaged.flatten(0, 2).double()
        share = averaged.shape[1] * (len(self.grouping[group]) if len(sums) == 1 else 1)
        sums[place if len(sums) > 1 else 0] += states.T @ states / share

    def _add_plain_values(self, bare: Tensor) -> None:
        """Moments of u, all tokens alike."""
        for sums, group in zip(self.values, self.grouping, strict=True):
            states = self._group_inputs(bare, group).flatten(0, 1).double()
            sums[0] += states.T @ states

    def _add_keys(self, bare: Tensor, importance: Tensor) -> None:
        for keys, group in zip(self.keys, self.grouping, strict=True):
            states = self._group_inputs(bare, group).flatten(0, 1).double()
            shares = importance[:, list(group)].transpose(0, 1).flatten(1).double()  # (g, tokens)
            for place, share in enumerate(shares if len(keys) > 1 else shares.sum(0, keepdim=True)):
                keys[place] += (states * share[:, None]).T @ states

    def moments(self) -> Moments:
        """The moments of all batches so far."""
        w = self.weights
        metric = self.metric / self.sampled
        if self.weighting == "projections":
            metric = metric * (self.weight / self.tokens)[:, None, None]  # what norms make of errors in keys
        averaged = 1.0 if self.weighting == "projections" else ROPE_AVERAGE
        metric = (1 - averaged) * metric + averaged * _turned(metric, w.rotated)
        if w.key_norm is not None:
            norm = w.key_norm.to(metric).view(-1, 1, w.head_dim)  # of each head, or one for all
            metric = norm.transpose(1, 2) * metric * norm
        out = w.o.double().view(len(w.o), w.kv_heads, -1, w.head_dim)  # (hidden, kv heads, queries per kv head, head_dim)
        value_metric = torch.einsum("ohqi,ohqj->hij", out, out)
        if self.weighting == "none":
            metric, value_metric = (torch.eye(w.head_dim).to(metric).expand_as(metric) for _ in range(2))
        keys = []
        for sums, group in zip(self.keys, self.grouping, strict=True):
            weights = self.weight[list(group)]
            keys.append(sums / (weights if len(sums) > 1 else weights.sum().view(1)).clamp_min(1e-30)[:, None, None])
        values = [sums / self.tokens for sums in self.values]
        if self.weighting != "attention":
            # errors of scores and of outputs have no common unit: the energies of keys and values are made equal
            metric = metric * (self._energy(value_metric, values, 1) / self._energy(metric, keys, 0).clamp_min(1e-30))
        noise = None if self.turns is None else self.turns.noise()
        return Moments(self.grouping, tuple(keys), tuple(values), metric, value_metric, noise)

    def _energy(self, metric: Tensor, moments: list[Tensor], part: int) -> Tensor:
        """What keys (part 0) or values (part 1) of all heads weigh, without biases."""
        width = self.weights.head_dim
        total = metric.new_zeros(())
        for second, group in zip(moments, self.grouping, strict=True):
            for place, head in enumerate(group):
                start = (part * len(group) + place) * width
                block = second[place if len(second) > 1 else 0, start : start + width, start : start + width]
                total = total + (metric[head] * block).sum()
        return total


def _read(values: Tensor, metric: Tensor) -> Tensor:
    """Values (rows, 1, j, head_dim) as the costs of W_O^T W_O, (queries, head_dim, head_dim), read them: see `_costs`."""
    read = values @ metric
    return torch.cat([read, (read * values).sum(-1, keepdim=True), torch.ones_like(read[..., :1])], -1)


def _costs(attention: Tensor, outputs: Tensor, metric: Tensor, read: Tensor) -> Tensor:
    """W_ij = p_ij^2 |W_O (v_j - o_i)|^2, (rows, queries, i, j), with the squares in one product.

    Args:
        attention: p, of the same shape.
        outputs: o, (rows, queries, i, head_dim).
        metric: W_O^T W_O, (queries, head_dim, head_dim).
        read: from `_read`, (rows, queries, j, head_dim + 2).
    """
    own = ((outputs @ metric) * outputs).sum(-1, keepdim=True)
    costs = torch.cat([-2 * outputs, torch.ones_like(own), own], -1) @ read.transpose(-1, -2)
    return costs.clamp_min_(0).mul_(attention).mul_(attention)  # in place: these are large


def _add_outer(total: Tensor, queries: Tensor, costs: Tensor, keys: slice, step: int) -> None:
    """Add sum_i W_ij q_i q_i^T of every `step`-th token j of a row, as far as it is among `keys`.

    Args:
        total: (every `step`-th token, head_dim, head_dim).
        queries: (rows, queries, i, head_dim).
        costs: W of these queries and keys, (rows, queries, i, j).
        keys: the tokens j of the costs.
        step: between the tokens.
    """
    first, last = -(-keys.start // step), (keys.stop - 1) // step + 1
    chosen = costs[..., first * step - keys.start :: step]
    read = queries.flatten(0, 2)  # (rows * queries * i, head_dim)
    weighted = chosen.permute(3, 0, 1, 2).flatten(1)[None] * read.T[:, None]  # (head_dim, j, rows * queries * i)
    total[first:last] += (weighted.flatten(0, 1) @ read).view(read.shape[1], -1, read.shape[1]).transpose(0, 1)


def _per_square(states: Tensor, norm: Tensor) -> Tensor:
    """What an RMS norm multiplies squares by: states (rows, heads, tokens, head_dim) to (rows, heads, tokens)."""
    squares = states.square().mean(-1)
    if norm.numel() > states.shape[-1]:  # all heads are normed as one
        squares = squares.mean(1, keepdim=True).expand_as(squares)
    return squares.clamp_min(1e-12).reciprocal()


def _turned(second: Tensor, rotary_dim: int) -> Tensor:
    """Second moments (..., D, D) averaged over all turns of rope: nothing is left between pairs or between them and numbers that
    are not rotated.
    """
    half = rotary_dim // 2
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    pairs = (diagonal[..., :half] + diagonal[..., half:rotary_dim]) / 2
    averaged = torch.diag_embed(torch.cat([pairs, pairs, torch.zeros_like(diagonal[..., rotary_dim:])], -1))
    averaged[..., rotary_dim:, rotary_dim:] = second[..., rotary_dim:, rotary_dim:]
    return averaged
