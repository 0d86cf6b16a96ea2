# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""How a forward attends to what is cached: which kernel, why, and what it must be told of the model.

In: a decoder in shared form and the call that it got. Out: a `Choice` with its reason; tables of rope; the attention output.
Never: computes something else than the eager form, up to rounding.

    KVSHARE_ATTENTION=eager|compiled|triton    overrides the choice wherever the one that is named can compute the forward
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kvshare_channels import with_biases
from .kvshare_cpu import KINDS, TILE, Made, decode_on_cpu, missing

VARIABLE = "KVSHARE_ATTENTION"
BACKENDS = ("eager", "compiled", "triton")
ATTENTIONS = ("self_attn", "attention", "self_attention", "attn")  # what attention modules are called
KEY_NORMS = ("k_norm", "k_layernorm")  # what norms of keys are called
FEW = 8  # new tokens up to which a forward is a step of decoding
EAGER = ("gemma2", "gpt_oss")  # families for which transformers has no other attention than eager
LONG = 256  # slots from which on compiling is worth it
LOGGER = logging.getLogger("kvshare.attention")


def first_of(module: Any, names: tuple[str, ...]) -> Any:
    """What a module has under the first of these names that it has; None where it has none."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


class Choice(NamedTuple):
    """What computes attention over the cache in a forward, and why."""

    backend: str
    reason: str


class Pairs(NamedTuple):
    """How a family rotates: the width that it rotates, whether the two of a pair lie side by side, and the column of the family's
    tables that holds the angle of each pair.
    """

    width: int
    adjacent: bool
    columns: tuple[int, ...]


class Norm(NamedTuple):
    """A root mean square norm of each key head: it multiplies by its weight plus `offset`."""

    offset: float
    eps: float


def key_positions(cache: Any, layer: int, position_ids: Tensor) -> Tensor:
    """The position of every slot that attention will read in `layer`, before the cache takes the new tokens in.

    Counted back from the last query: `generate` gives left padding the position 0, so the first one tells nothing.

    Args:
        cache: a transformers cache.
        layer: a layer of the kind whose slots are wanted.
        position_ids: (batch or 1, new tokens).

    Returns:
        (batch or 1, slots); slots of padding hold any number, attention masks them.
    """
    new = position_ids.shape[-1]
    slots, offset = cache.get_mask_sizes(new, layer)
    if slots == new:
        return position_ids
    past = cache.get_query_offset(layer) if hasattr(cache, "get_query_offset") else cache.get_seq_length(layer)
    steps = torch.arange(slots, device=position_ids.device) + offset - past - (new - 1)
    # The empty tail of a static cache lies beyond the last token; scaled ropes must not see such positions.
    return torch.minimum(position_ids[:, -1:] + steps, position_ids.max())


def pairs_of(rotate: Any, sample: Tensor, width: int) -> Pairs | None:
    """What a family's rope does to the first `width` numbers of a head, seen on vectors that tell; None: something else than rope.

    Args:
        rotate: the family's `apply_rotary_pos_emb`.
        sample: the family's sines at a position, (table width): they tell which columns are of the same angle.
        width: how many numbers it rotates.
    """
    if width % 2:
        return None
    columns, numbers = torch.arange(1.0, len(sample) + 1)[None, None], torch.arange(1.0, width + 1)[None, None, None]
    none, one = torch.zeros_like(columns), torch.ones_like(numbers)

    def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return rotate(x, x[:, :0], cosine, sine)[0].flatten()

    cosines, sines = turned(one, columns, none), turned(one, none, columns)
    moved, flat = turned(numbers, none, none + 1), numbers.flatten()
    half, sample = width // 2, sample.cpu()
    for adjacent, first, second in ((False, slice(half), slice(half, None)), (True, slice(0, None, 2), slice(1, None, 2))):
        if torch.equal(moved[first], -flat[second]) and torch.equal(moved[second], flat[first]):
            used = [found.long() - 1 for found in (cosines[first], cosines[second], -sines[first], sines[second])]
            if all(torch.equal(sample[found], sample[used[0]]) for found in used):
                return Pairs(width, adjacent, tuple(used[0].tolist()))
    return None


def norm_of(norm: nn.Module, head_dim: int) -> Norm | None:
    """What a norm of each head does, seen on numbers; None: something else than a root mean square norm of each head."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or eps is None or tuple(weight.shape) != (head_dim,) or getattr(norm, "bias", None) is not None:
        return None
    x = torch.linspace(-1, 2, head_dim, device=weight.device).to(weight.dtype)
    found, plain = norm(x).float(), x.float() * (x.float().square().mean() + eps).rsqrt()
    for offset in (0.0, 1.0):
        if torch.allclose(found, plain * (weight.float() + offset), rtol=0.02, atol=1e-3):
            return Norm(offset, float(eps))
    return None


def _columns(table: Tensor, columns: tuple[int, ...]) -> Tensor:
    """These columns of a table; without a copy of the numbers to the device where they lie evenly."""
    even = slice(columns[0], columns[-1] + 1, max(1, columns[-1] - columns[0]) // max(1, len(columns) - 1) or 1)
    return table[..., even if [*range(*even.indices(table.shape[-1]))] == [*columns] else list(columns)]


def slot_tables(rotary: Any, inputs: Tensor, slots: Tensor, pairs: Pairs, kind: list[str]) -> Tensor:
    """Rope of every slot, (batch or 1, slots, 2, pairs): cosines and sines, float32; arguments as for `tile_tables`."""
    return torch.stack([_columns(table, pairs.columns) for table in rotary(inputs[..., :1].float(), slots, *kind)], 2)


def tile_tables(
    rotary: Any, inputs: Tensor, slots: Tensor, pairs: Pairs, kind: list[str], by_number: bool
) -> tuple[Tensor, Tensor]:
    """Rope where each tile of the cache begins, and within a tile: together they give every slot's.

    Rope of a sum of positions is the product of their rotations, so no table has to be as long as the cache. What cosines are
    multiplied by (yarn, longrope) stays in the first of the two.

    Args:
        rotary: the decoder's rotary embedding; it sees the last position, by which some change their frequencies.
        inputs: of the forward; their device counts.
        slots: positions of consecutive slots, (batch or 1, slots).
        pairs: how the family rotates.
        kind: the layer type, where the rotary embedding wants it.
        by_number: whether tables have a column for each number that is rotated, sines with the sign of their term.

    Returns:
        (batch or 1, tiles, 2, pairs) and (TILE, 2, pairs): cosines and sines, float32; `by_number`, twice as wide.
    """
    last = slots.amax()
    begins = slots[:, :1] + torch.arange(0, slots.shape[1], TILE, device=slots.device)
    begins = torch.minimum(begins, last)  # beyond the last token lies the empty tail of a static cache
    # backwards from 0: positions beyond the last would change frequencies
    within = -torch.arange(TILE, device=slots.device).expand(len(slots), TILE)
    every = torch.cat([begins, within, last.expand(len(slots), 1)], 1)
    tables, count = slot_tables(rotary, inputs, every, pairs, kind), begins.shape[1]
    first, second = tables[:, :count], tables[0, count:-1]
    second = second / second[:1, :1]  # by the cosine of position 0
    second = torch.stack([second[:, 0], -second[:, 1]], 1)
    if by_number:
        first, second = (torch.stack([torch.stack([x[..., 0, :], -x[..., 1, :]], -2), x], -1).flatten(-2) for x in (first, second))
    return first.contiguous(), second.contiguous()


class Plan(NamedTuple):
    """What kernels must be told of a decoder: why there can be none, for what they are made, how each kind of layer rotates."""

    refusal: str | None
    made: tuple[tuple[int, int, bool], ...]
    pairs: dict[str, Pairs | None]


def plan_of(decoder: Any, inputs: Tensor) -> Plan:
    """Look at the shared layers of a decoder; each keeps what it must be told in `kvshare_pairs` and `kvshare_norm`."""
    made, pairs = set(), dict.fromkeys(decoder.kvshare_kinds)
    for layer in decoder.layers:
        attention = first_of(layer, ATTENTIONS)
        kind = getattr(attention, "kvshare_layer_type", None)
        if kind is None:
            continue
        named = [kind] if decoder.kvshare_tables_by_kind else []
        one = torch.ones(1, 1, dtype=torch.long, device=inputs.device)
        refusal = _refusal_of(attention, decoder.rotary_emb(inputs[:1, :1, :1].float(), one, *named)[1][0, 0])
        if refusal:
            return Plan(refusal, (), {})
        found = attention.kvshare_pairs
        pairs[kind] = pairs[kind] or found
        made.add((attention.head_dim, found.width if found else 0, bool(found and found.adjacent)))
    return Plan(None, tuple(sorted(made)), pairs)


def _refusal_of(attention: Any, sample: Tensor) -> str | None:
    """Why no kernel computes what a shared attention module computes, or None; `sample` as for `pairs_of`."""
    if attention.kvshare_exact:
        return "the exact form makes values of the keys of all heads"
    if hasattr(attention, "kvshare_value_norm"):
        return "values pass a norm of their own"
    if getattr(attention.config, "clip_qkv", None) is not None:
        return "keys are clipped"
    attention.kvshare_norm = attention.kvshare_pairs = None
    norm = first_of(attention, KEY_NORMS)
    if norm is not None and any(weight.is_meta for weight in norm.parameters()):
        return "norms of keys are not in memory"
    if norm is not None:
        attention.kvshare_norm = norm_of(norm, attention.head_dim)
        if attention.kvshare_norm is None:
            return f"keys pass a {type(norm).__name__}, which is not a root mean square norm of each head"
    if attention.kvshare_rotates:
        rotate = getattr(sys.modules[type(attention).__mro__[1].__module__], "apply_rotary_pos_emb", None)
        attention.kvshare_pairs = rotate and pairs_of(rotate, sample, len(sample) * attention.kvshare_table_repeat)
        if attention.kvshare_pairs is None:
            return "its rope turns other pairs than neighbours or halves"
    return None


def _kernel_tables(
    decoder: Any, inputs: Tensor, slots: Tensor, pairs: Pairs | None, kind: list[str], choice: Choice
) -> tuple[Tensor, Tensor]:
    """As a kernel takes them; of each slot, followed by nothing, where many tokens are new: their positions may be any."""
    if pairs is None:
        return (inputs.new_empty(0, dtype=torch.float32),) * 2
    if inputs.shape[1] > FEW:
        tables = slot_tables(decoder.rotary_emb, inputs, slots, pairs, kind)
        return tables, tables.new_empty(0)
    return tile_tables(decoder.rotary_emb, inputs, slots, pairs, kind, choice.backend == "compiled" and pairs.adjacent)


def cached_tables(
    decoder: Any, inputs: Tensor, positions: dict[str, Tensor], given: Any, arguments: dict[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """Rope of every cached token, by kind of layer, in the form that the forward's attention takes it in.

    Args:
        decoder: in shared form; its `kvshare_choice` becomes what was chosen.
        inputs: embeddings of the new tokens, (batch, new tokens, hidden).
        positions: of slots, (batch or 1, slots); `given`, the positions of new tokens themselves, where these are all.
        given: positions of the new tokens.
        arguments: of the forward.

    Returns:
        cosines and sines of each slot, (batch or 1, slots, width), where attention is eager; otherwise the backend, and tables of
        tiles and within a tile, see `tile_tables`. Nothing where there is nothing in the cache but what this forward brings.
    """
    if not positions:
        return {}
    choice = choose(decoder, inputs, max(slots.shape[1] for slots in positions.values()), arguments)
    if choice.backend == "eager" and all(slots is given for slots in positions.values()):
        return {}
    if not torch.compiler.is_compiling():
        if getattr(decoder, "kvshare_choice", None) != choice:
            LOGGER.debug("%s attention: %s", *choice)
        decoder.kvshare_choice = choice
    tables: dict[str, tuple[Any, ...]] = {}
    for kind, slots in positions.items():
        named = [kind] if decoder.kvshare_tables_by_kind else []
        if choice.backend == "eager":
            tables[kind] = decoder.rotary_emb(inputs, slots, *named)
        else:
            made = _kernel_tables(decoder, inputs, slots, decoder.kvshare_plan.pairs[kind], named, choice)
            tables[kind] = (choice.backend, *made)
    return tables


def wanted() -> str | None:
    """The backend that the environment asks for.

    Raises:
        ValueError: it names none that there is.
    """
    named = os.environ.get(VARIABLE) or None
    if named not in (None, *BACKENDS):
        raise ValueError(f"{VARIABLE} is {named!r}: set it to {', '.join(BACKENDS)}, or unset it and the choice is automatic")
    return named


def choose(decoder: Any, inputs: Tensor, slots: int, arguments: dict[str, Any]) -> Choice:
    """What computes attention over the cache in a forward with these arguments, of new tokens `inputs` (batch, new tokens, hidden)
    over at most `slots` slots.

    Raises:
        ValueError: the environment asks for something that does not exist.
    """
    named = wanted()
    if named == "eager":
        return Choice("eager", f"{VARIABLE} asks for it")
    if torch.compiler.is_compiling():
        return Choice("eager", "torch.compile sees the whole forward")
    device, new = inputs.device.type, inputs.shape[1]
    backend = named or {"cpu": "compiled", "cuda": "triton"}.get(device)
    if backend is None:
        return Choice("eager", f"there is no kernel for {device}")
    reason = _against(decoder, inputs, arguments)
    if reason is None and new > FEW and (named is None or backend == "compiled"):
        reason = f"{new} new tokens share what is rotated once"
    if reason is None and named is None and slots < LONG:
        reason = f"{slots} slots are fewer than {LONG}"
    if reason is None:
        reason = (_against_compiled if backend == "compiled" else _against_triton)(decoder, inputs)
    return Choice("eager", reason) if reason else Choice(backend, f"{new} new of {slots} tokens on {device} in {inputs.dtype}")


def _against(decoder: Any, inputs: Tensor, arguments: dict[str, Any]) -> str | None:
    """Why no kernel can compute a forward, or None."""
    if torch.is_grad_enabled() and (inputs.requires_grad or any(weight.requires_grad for weight in decoder.parameters())):
        return "gradients are asked for"
    if decoder.training:
        return "the model is being trained"
    if arguments.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        return "attention weights are asked for"
    if type(inputs) is not Tensor or torch.is_autocast_enabled(inputs.device.type):
        return f"of a {type(inputs).__name__}, or with autocast, the numbers that arrive are not known"
    implementation = decoder.config._attn_implementation
    if implementation not in ("sdpa", *(["eager"] if decoder.config.model_type in EAGER else [])):
        return f"attn_implementation is {implementation!r}"
    if decoder.kvshare_plan is None:
        decoder.kvshare_plan = plan_of(decoder, inputs)
    return decoder.kvshare_plan.refusal


def _against_compiled(decoder: Any, inputs: Tensor) -> str | None:
    """Why the kernel for the CPU cannot compute a forward, or None."""
    if inputs.device.type != "cpu":
        return f"the compiled kernel is for the CPU, the model is on {inputs.device.type}"
    if inputs.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernel for the CPU knows no {inputs.dtype}"
    kind = KINDS[{8: torch.int8, 4: torch.uint8}.get(decoder.kvshare_bits, inputs.dtype)]
    problems = (missing(Made(dim, width, adjacent, kind)) for dim, width, adjacent in decoder.kvshare_plan.made)
    return next(filter(None, problems), None)


def _against_triton(decoder: Any, inputs: Tensor) -> str | None:
    """Why the kernel for GPUs cannot compute a forward, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from .kvshare_triton import problem_on

    if inputs.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernel for GPUs knows no {inputs.dtype}"
    bits = decoder.kvshare_bits
    problems = (problem_on(inputs.device, inputs.dtype, dim, width, bits) for dim, width, _ in decoder.kvshare_plan.made)
    return next(filter(None, problems), None)


def attend(
    attention: Any,
    query: Tensor,
    shared: Tensor,
    scales: Tensor | None,
    tables: tuple[Any, ...],
    mask: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    arguments: dict[str, Any],
) -> Tensor:
    """Attention over what is cached, by the kernel that `cached_tables` has chosen.

    Args:
        attention: the module.
        query: rotated, (batch, query heads, new tokens, head_dim).
        shared: as cached, (batch, kv heads, slots, head_dim), or half as wide in 4 bits.
        scales: of integers, (batch, kv heads, slots, 1).
        tables: what `cached_tables` gives for the module's kind of layer.
        mask: as transformers makes it for sdpa or eager attention.
        key_bias, value_bias: (kv heads, 1, head_dim).
        arguments: what the family hands to attention beside the usual.

    Returns:
        (batch, new tokens, query heads, head_dim).
    """
    pairs, norm, sinks = attention.kvshare_pairs, attention.kvshare_norm, arguments.get("s_aux")
    backend, first, second = tables
    new, slots = query.shape[2], shared.shape[2]
    if mask is not None:
        mask = mask[..., :slots]
    given: dict[str, Any] = {
        "scales": None if scales is None else scales[..., 0],
        "scaling": attention.scaling,
        "adjacent": pairs is not None and pairs.adjacent,
        **with_biases(None if scales is None else attention.kvshare_channels, key_bias, value_bias),
        "norm": None if norm is None else first_of(attention, KEY_NORMS).weight,
        "eps": 0.0 if norm is None else norm.eps,
        "norm_offset": 0.0 if norm is None else norm.offset,
        "softcap": arguments.get("softcap"),
        "sinks": sinks,
    }
    if backend == "triton":
        from .kvshare_triton import attend_on_gpu

        known = None if pairs is None else (first, second) if second.numel() else first
        return attend_on_gpu(query, shared, known, mask=mask, causal=mask is None, **given)
    if mask is None and new > 1:
        mask = torch.ones(new, slots, dtype=torch.bool, device=query.device).tril(slots - new)[None, None]
    return decode_on_cpu(query, shared, None if pairs is None else (first, second), mask=mask, **given).to(query.dtype)
