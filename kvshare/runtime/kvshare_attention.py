# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""How a forward attends to what is cached: which kernel, why, and what it must be told of the model.

In: a decoder in shared form and the call that it got. Out: a `Choice` with its reason; tables of rope; the attention output.
Never: computes something else than the eager form, up to rounding.

    KVSHARE_ATTENTION=eager|compiled|triton    overrides the choice wherever the one that is named can compute the forward
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kvshare_channels import with_biases
from .kvshare_cpu import KINDS, Made, decode_on_cpu, missing
from .kvshare_tables import Pairs, Tables, by_tiles, every_slot, no_tables, pairs_of, rope_of, rotation_of

VARIABLE = "KVSHARE_ATTENTION"
BACKENDS = ("eager", "compiled", "triton")
ATTENTIONS = ("self_attn", "attention", "self_attention", "attn")  # what attention modules are called
KEY_NORMS = ("k_norm", "k_layernorm")  # what norms of keys are called
FEW = 8  # new tokens up to which a forward is a step of decoding
SOFTCAPPED = ("gemma2", "vaultgemma")  # families that squash scores
EAGER = (*SOFTCAPPED, "gpt_oss")  # families for which transformers has no other attention than eager
LONG = 256  # slots from which on compiling is worth it
LOGGER = logging.getLogger("kvshare.attention")


def layers_of(decoder: Any) -> Any:
    """The decoder layers of a model."""
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def first_of(module: Any, names: tuple[str, ...]) -> Any:
    """The part of a module under the first of these names that it has; None where it has none. A step of decoding asks for a few in
    every layer, and `hasattr` takes its time to say no.
    """
    for name in names:
        part = module._modules.get(name)
        if part is not None:
            return part
    return None


class Choice(NamedTuple):
    """What computes attention over the cache in a forward, and why."""

    backend: str
    reason: str


class Norm(NamedTuple):
    """A root mean square norm of each key head: it multiplies by its weight plus `offset`."""

    offset: float
    eps: float


def norm_of(norm: nn.Module, head_dim: int) -> Norm | None:
    """What a norm of each head does, seen on numbers; None: something else than a root mean square norm of each head."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is None or eps is None or tuple(weight.shape) != (head_dim,) or getattr(norm, "bias", None) is not None:
        return None
    x = torch.linspace(-1, 2, head_dim, dtype=torch.float32, device=weight.device).to(weight.dtype)
    found, plain = norm(x).float(), x.float() * (x.float().square().mean() + eps).rsqrt()
    for offset in (0.0, 1.0):
        if torch.allclose(found, plain * (weight.float() + offset), rtol=0.02, atol=1e-3):
            return Norm(offset, float(eps))
    return None


class Plan(NamedTuple):
    """What kernels must be told of a decoder: why there can be none, for what they are made, how each kind of layer rotates."""

    refusal: str | None
    made: tuple[tuple[int, int, bool], ...]
    pairs: dict[str, Pairs | None]


def plan_of(decoder: Any, inputs: Tensor) -> Plan:
    """Look at the shared layers of a decoder; each keeps what it must be told in `kvshare_pairs` and `kvshare_norm`."""
    made, pairs = set(), dict.fromkeys(decoder.kvshare_kinds)
    for layer in layers_of(decoder):
        attention = first_of(layer, ATTENTIONS)
        kind = getattr(attention, "kvshare_layer_type", None)
        if kind is None:
            continue
        named = [kind] if decoder.kvshare_tables_by_kind else []
        one = torch.ones(1, 1, dtype=torch.long, device=inputs.device)
        refusal = _refusal_of(attention, rope_of(decoder)(inputs[:1, :1, :1].float(), one, *named)[1][0, 0])
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
        rotate = rotation_of(type(attention).__mro__[1])
        attention.kvshare_pairs = rotate and pairs_of(rotate, sample, len(sample) * attention.kvshare_table_repeat)
        if attention.kvshare_pairs is None:
            return "its rope turns other pairs than neighbours or halves"
    return None


def _kernel_tables(
    decoder: Any, inputs: Tensor, slots: Tensor, new: Tensor, pairs: Pairs | None, kind: list[str], backend: str
) -> Tables:
    """As a kernel takes them."""
    if pairs is None:
        return no_tables(inputs)
    if inputs.shape[1] > FEW:
        return every_slot(rope_of(decoder), inputs, slots, new, pairs, kind)
    return by_tiles(rope_of(decoder), inputs, slots, new, pairs, kind, backend == "compiled" and pairs.adjacent)


def cached_tables(
    decoder: Any, inputs: Tensor, positions: dict[str, Tensor], given: Any, in_order: bool, arguments: dict[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """Rope of every cached token, by kind of layer, in the form that the forward's attention takes it in.

    Args:
        decoder: in shared form; its `kvshare_choice` becomes what was chosen.
        inputs: embeddings of the new tokens, (batch, new tokens, hidden).
        positions: of slots, (batch or 1, slots); `given`, the positions of new tokens themselves, where these are all.
        given: positions of the new tokens.
        in_order: whether all tokens of each row follow one another.
        arguments: of the forward.

    Returns:
        cosines and sines of each slot, (batch or 1, slots, width), where attention is eager; otherwise the backend and `Tables`,
        one after the other. Nothing where there is nothing in the cache but what this forward brings.
    """
    if not positions:
        return {}
    choice = choose(decoder, inputs, max(slots.shape[1] for slots in positions.values()), arguments, in_order)
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
            tables[kind] = rope_of(decoder)(inputs, slots, *named)
        else:
            pairs = decoder.kvshare_plan.pairs[kind]
            first, second, query = _kernel_tables(decoder, inputs, slots, given, pairs, named, choice.backend)
            tables[kind] = (choice.backend, first, second, *query)
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


def choose(decoder: Any, inputs: Tensor, slots: int, arguments: dict[str, Any], in_order: bool = True) -> Choice:
    """What computes attention over the cache in a forward with these arguments, of new tokens `inputs` (batch, new tokens, hidden)
    over at most `slots` slots, whose positions are `in_order` where keys turn by them.

    Raises:
        ValueError: the environment asks for something that does not exist.
    """
    named = wanted()
    if named == "eager":
        return Choice("eager", f"{VARIABLE} asks for it")
    device, new = inputs.device.type, inputs.shape[1]
    backend = named or {"cpu": "compiled", "cuda": "triton"}.get(device)
    short = named is None and slots < LONG
    compiles = named is not None or device == "cpu"  # whether compiled forwards may hold a kernel: on a GPU that was not measured
    if torch.compiler.is_exporting():
        return Choice("eager", "an exported program runs where there may be no kernel")
    if torch.compiler.is_compiling():
        tried = decoder.kvshare_tried == (backend, device, inputs.dtype)
        if tried and compiles and not short and new <= FEW and _against(decoder, inputs, arguments) is None:
            return Choice(str(backend), "a forward that was not compiled has tried it")
        return Choice("eager", "torch.compile sees the whole forward")
    if backend is None:
        return Choice("eager", f"there is no kernel for {device}")
    reason = _against(decoder, inputs, arguments) if in_order else "positions of tokens do not follow one another"
    if reason is None and short:
        reason = f"{slots} slots are fewer than {LONG}"
    rotates_once = new > FEW and (named is None or backend == "compiled")
    if reason is None and (compiles or not rotates_once):  # a prompt tries the kernel for the compiled forwards that follow it
        reason = (_against_compiled if backend == "compiled" else _against_triton)(decoder, inputs)
        decoder.kvshare_tried = None if reason else (backend, device, inputs.dtype)
    if reason is None and rotates_once:
        reason = f"{new} new tokens share what is rotated once"
    return Choice("eager", reason) if reason else Choice(backend, f"{new} new of {slots} tokens on {device} in {inputs.dtype}")


def _against(decoder: Any, inputs: Tensor, arguments: dict[str, Any]) -> str | None:
    """Why no kernel can compute a forward, or None."""
    if torch.is_grad_enabled() and (inputs.requires_grad or any(weight.requires_grad for weight in decoder.parameters())):
        return "gradients are asked for"
    if decoder.training:
        return "the model is being trained"
    if arguments.get("cache") is not None:
        return "requests lie in pages, one behind the other"
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


SCHEMA = """(str backend, Tensor query, Tensor shared, Tensor first, Tensor second, Tensor? mask, Tensor? scales, Tensor? sizes,
Tensor? key_bias, Tensor? value_bias, Tensor? norm, Tensor? sinks, float scaling, bool adjacent, float eps, float norm_offset,
float? softcap) -> Tensor"""
GIVEN = ("scales", "sizes", "key_bias", "value_bias", "norm", "sinks", "scaling", "adjacent", "eps", "norm_offset", "softcap")
# of its own for each copy of this file: every checkpoint has one
NAMESPACE = "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in __name__)


@torch.library.custom_op(f"{NAMESPACE}::attend", mutates_args=(), schema=SCHEMA)
def _as_one(backend: str, query: Tensor, shared: Tensor, first: Tensor, second: Tensor, *given: Any) -> Tensor:
    """A kernel as torch.compile sees it: one operation, of which it knows no more than what comes out."""
    mask, *others = given
    return _by_kernel(backend, query, shared, first, second, mask, dict(zip(GIVEN, others, strict=True))).contiguous()


@_as_one.register_fake
def _(backend: str, query: Tensor, *given: Any) -> Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


def _by_kernel(
    backend: str, query: Tensor, shared: Tensor, first: Tensor, second: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """See `attend`; `given` as kernels take it."""
    if backend == "triton":
        tables = (first, second) if second.numel() else first if first.numel() else None
        return _on_gpu()(query, shared, tables, mask=mask, causal=mask is None, **given)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], shared.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    return decode_on_cpu(query, shared, (first, second) if first.numel() else None, mask=mask, **given).to(query.dtype)


@functools.cache
def _on_gpu() -> Any:
    """What needs triton is imported where it is first used; an import statement takes its time again in every layer."""
    from .kvshare_triton import attend_on_gpu

    return attend_on_gpu


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
        tables: of what `cached_tables` gives for the module's kind of layer, the first three.
        mask: as transformers makes it for sdpa or eager attention.
        key_bias, value_bias: (kv heads, 1, head_dim).
        arguments: what the family hands to attention beside the usual.

    Returns:
        (batch, new tokens, query heads, head_dim).
    """
    pairs, norm, sinks = attention.kvshare_pairs, attention.kvshare_norm, arguments.get("s_aux")
    backend, first, second = tables
    new = query.shape[2]
    if mask is not None:
        mask = mask[..., : shared.shape[2]]
    elif new > 1:  # then new tokens are the first slots: a static cache may have more, and they hold nothing yet
        shared, scales = shared[:, :, :new], None if scales is None else scales[:, :, :new]
    if pairs is None and first.numel():  # a layer that does not rotate, among others of its kind that do
        first, second = first.new_empty(0), second.new_empty(0)
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
    if not torch.compiler.is_compiling():
        return _by_kernel(backend, query, shared, first, second, mask, given)
    return _as_one(backend, query, shared, first, second, mask, *(given[name] for name in GIVEN))
