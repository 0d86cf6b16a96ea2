"""Kernels compute what attention over the shared cache is, and are chosen where they can."""

from __future__ import annotations

import functools
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import DEVICE, FAMILY_SOURCES, SOURCES, at_times, in_turn
from torch import Tensor

from kvshare.runtime import kvshare_attention, kvshare_bits, kvshare_cpu, kvshare_triton
from kvshare.runtime.kvshare_channels import Channels, with_biases
from kvshare.runtime.reference import rotated, shared_attention

pytestmark = pytest.mark.usefixtures("interpreter")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="the kernel for the CPU needs a C compiler"
)
# batch, query heads, kv heads, head_dim, rotated width, new tokens, slots, what else there is
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, str]] = {
    "llama": (1, 8, 2, 64, 64, 1, 300, ""),
    "as many heads": (2, 4, 4, 128, 128, 1, 70, "bool mask"),
    "one head": (2, 8, 1, 96, 96, 1, 350, "padded"),
    "few tokens": (2, 8, 2, 64, 64, 5, 100, "causal"),
    "odd group": (1, 6, 2, 80, 80, 3, 65, "causal key bias value bias"),
    "norm": (2, 4, 2, 128, 128, 1, 97, "norm padded"),
    "norm and bias": (1, 4, 2, 64, 64, 2, 40, "norm key bias causal"),
    "side by side": (2, 4, 2, 64, 64, 1, 129, "adjacent padded"),
    "part, side by side": (1, 4, 2, 64, 32, 2, 50, "adjacent causal key bias"),
    "part": (1, 4, 2, 80, 32, 1, 50, ""),
    "narrow": (1, 4, 2, 16, 16, 1, 33, "value bias"),
    "two numbers": (1, 2, 1, 6, 2, 1, 33, "key bias"),
    "no rope": (2, 4, 2, 64, 0, 1, 40, "float mask"),
    "capped": (2, 4, 2, 256, 256, 1, 64, "softcap float mask"),
    "sinks": (2, 4, 2, 64, 64, 2, 80, "sinks value bias causal"),
    "window": (2, 4, 2, 64, 64, 1, 200, "window"),
}


def case(
    name: str, dtype: torch.dtype = torch.float32, tile: int = kvshare_cpu.TILE, bits: int | None = None, unlike: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a kernel, and what it should give; channels that are `unlike` have a mean and a size of their own."""
    batch, queries, heads, head_dim, width, new, slots, more = SHAPES[name]
    generator = torch.Generator().manual_seed(slots)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale, adjacent = 1.25, "adjacent" in more
    query, shared = normal(batch, queries, new, head_dim), normal(batch, heads, slots, head_dim).to(dtype)
    channels = Channels(3 * normal(heads, 1, head_dim), normal(heads, 1, head_dim).exp()) if unlike else None
    shared = kvshare_bits.restored(shared, channels)
    numbers, scales = (shared, shared) if bits is None else kvshare_bits.quantise(shared, bits, channels)
    if bits is not None:
        shared = kvshare_bits.dequantise(numbers, scales, torch.float32, channels)
    first = -torch.arange(batch)[:, None] * 3 + 7  # rows begin at positions of their own, some before 0
    frequencies = 100.0 ** -(torch.arange(width // 2, dtype=torch.float64) / max(1, width // 2))

    def table(positions: Tensor, scale: float) -> Tensor:
        angles = positions[..., None].double() * frequencies
        cosine, sine = angles.cos() * scale, angles.sin() * scale
        if adjacent:
            cosine, sine = cosine.repeat_interleave(2, -1), torch.stack([-sine, sine], -1).flatten(-2)
        return torch.stack([cosine, sine], -2).float()

    own = (first + slots - new + torch.arange(new))[:, None, :, None] * frequencies
    query = rotated(query.double(), own, adjacent).to(dtype)
    where, at = torch.arange(slots), torch.arange(slots - new, slots)[:, None]
    masks = {
        "bool mask": torch.rand(batch, 1, new, slots, generator=generator) < 0.7,
        "padded": (where >= 5 * torch.arange(batch)[:, None]).view(batch, 1, 1, slots),
        "causal": (where <= at)[None, None],
        "float mask": normal(1, 1, new, slots).masked_fill(where % 5 == 2, torch.finfo(torch.float32).min),
        "window": ((where <= at) & (where > at - 50))[None, None],
    }
    options: dict[str, Any] = {
        "scaling": head_dim**-0.5,
        "adjacent": adjacent,
        "mask": next((mask for kind, mask in masks.items() if kind in more), None),
        "key_bias": 3 * normal(heads, head_dim) if "key bias" in more else None,
        "value_bias": normal(heads, head_dim) if "value bias" in more else None,
        "norm": normal(head_dim) if "norm" in more else None,
        "eps": 1e-2,
        "softcap": 2.0 if "softcap" in more else None,
        "sinks": normal(queries) if "sinks" in more else None,
    }
    tables = (table(first + torch.arange(0, slots, tile), scale), table(torch.arange(tile), 1.0)) if width else None
    angles = (first + where)[..., None].double() * frequencies
    expected = shared_attention(query, shared, angles, rope_scale=scale, **options)
    if bits is not None:
        biases = (None if bias is None else bias[:, None] for bias in (options["key_bias"], options["value_bias"]))
        options |= {"scales": scales[..., 0], **with_biases(channels, *biases)}
    return {"query": query, "shared": numbers, "tables": tables, **options}, expected


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is given to write to holds NaN."""

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return torch.full(args, torch.nan, **kwargs)

    monkeypatch.setattr(kvshare_cpu.torch, "empty", empty)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_the_cpu_kernel_against_float64(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            arguments, expected = case(name, dtype)
            got = kvshare_cpu.decode_on_cpu(**arguments)
            assert got.shape == expected.shape
            assert error(got, expected) < 1e-5
            assert error(got.to(dtype), expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    finally:
        torch.set_num_threads(1)


INTEGERS = ("llama", "as many heads", "one head", "norm and bias", "part, side by side", "two numbers", "no rope", "sinks")


@needs_compiler
@pytest.mark.parametrize("unlike", [False, True])
@pytest.mark.parametrize("bits", kvshare_bits.BITS)
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.usefixtures("poisoned")
def test_the_cpu_kernel_reads_integers(name: str, bits: int, unlike: bool) -> None:
    arguments, expected = case(name, bits=bits, unlike=unlike)
    assert error(kvshare_cpu.decode_on_cpu(**arguments), expected) < 1e-5


# what compilers call generations of processors, by the width of their vectors: 4, 8 and 16 numbers
GENERATIONS = ("x86-64", "x86-64-v3", "x86-64-v4")
needs_gcc = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="not checked: vectors of other machines, for want of gcc"
)


KINDS = {f"{generation} {dtype}": (generation, kind) for dtype, kind in kvshare_cpu.KINDS.items() for generation in GENERATIONS}


@needs_gcc
@pytest.mark.parametrize(("kind", "pairs"), in_turn(KINDS, ["halves", "adjacent"]))
def test_no_vector_is_taken_apart(kind: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider ones than a machine has, and bytes that become numbers at one go, make a step up to six times slower."""
    strict = [*(flag for flag in kvshare_cpu.FLAGS if flag != "-w"), "-Werror=vector-operation-performance"]
    monkeypatch.setattr(kvshare_cpu, "FLAGS", strict)
    generation, made = KINDS[kind]
    monkeypatch.setattr(kvshare_cpu, "NATIVE", ([f"-march={generation}"],))
    monkeypatch.setattr(kvshare_cpu, "compiler", lambda: "gcc")
    assert kvshare_cpu._build(kvshare_cpu.Made(64, 64, pairs == "adjacent", made), tmp_path / "step.so") == ""


def built_anew(monkeypatch: pytest.MonkeyPatch, folder: Path, compiler: str, flags: list[str]) -> float:
    """The greatest error of kernels that this compiler makes with these flags."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(kvshare_cpu, "compiler", lambda: compiler)
    monkeypatch.setattr(kvshare_cpu, "kernel", functools.cache(kvshare_cpu.kernel.__wrapped__))
    monkeypatch.setattr(kvshare_cpu, "NATIVE", (flags,))
    errors = []
    for name, bits in (("llama", None), ("llama", 8), ("llama", 4), ("part, side by side", None)):
        arguments, expected = case(name, bits=bits)
        errors.append(error(kvshare_cpu.decode_on_cpu(**arguments), expected))
    return max(errors)


@needs_gcc
@pytest.mark.parametrize("generation", GENERATIONS[: 1 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 2])
@pytest.mark.usefixtures("poisoned")
def test_narrower_vectors_against_float64(generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert built_anew(monkeypatch, tmp_path, "gcc", [f"-march={generation}"]) < 1e-5


@pytest.mark.skipif(shutil.which("clang") is None, reason="not checked: what clang makes of the kernel for the CPU, for want of it")
@pytest.mark.usefixtures("poisoned")
def test_clang_against_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert built_anew(monkeypatch, tmp_path, "clang", kvshare_cpu.NATIVE[0]) < 1e-5


@needs_compiler
def test_the_cpu_kernel_reads_a_cache_as_it_lies() -> None:
    arguments, expected = case("as many heads")
    shared = arguments["shared"]
    wide = torch.full((*shared.shape[:2], shared.shape[2] + 9, shared.shape[3] + 3), torch.nan)
    view = wide[:, :, 4:-5, 1:-2]
    view.copy_(shared)
    assert error(kvshare_cpu.decode_on_cpu(**arguments | {"shared": view}), expected) < 1e-5
    by_token = shared.transpose(1, 2).contiguous().transpose(1, 2)
    assert error(kvshare_cpu.decode_on_cpu(**arguments | {"shared": by_token}), expected) < 1e-5


@needs_compiler
def test_a_query_that_attends_to_nothing_gives_zero() -> None:
    arguments, _ = case("as many heads")
    mask = arguments["mask"].clone()
    mask[0] = False
    got = kvshare_cpu.decode_on_cpu(**arguments | {"mask": mask})
    assert not got[0].any()
    assert got[1].abs().min() > 0


def in_bits(model: Any, bits: int | None) -> Any:
    """The model, with a cache in so many bits."""
    decoder = model.get_decoder()
    for module in (decoder, *(layer.self_attn for layer in decoder.layers)):
        module.kvshare_bits = bits
    return model


def logits_of_steps(model: Any, ids: Tensor, mask: Tensor, steps: int, **settings: Any) -> Tensor:
    """Prefill, then `steps` tokens one by one, then the rest at once, into a padded batch's cache."""
    cache = settings.pop("cache", None) or transformers.DynamicCache(config=model.config)
    sizes = [ids.shape[1] - steps - 3, *[1] * steps, 3]
    parts, seen = [], 0
    for part in ids.split(sizes, 1):
        seen += part.shape[1]
        positions = (mask[:, :seen].cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
        parts.append(model(part, attention_mask=mask[:, :seen], position_ids=positions, cache=cache).logits)
    return torch.cat(parts, 1)


# no kernel knows these: norms of all heads as one, norms that subtract a mean, clipped keys
# layers that do not rotate, or make their own keys
WITHOUT = {"gpt2", "opt", "bloom", "falcon", "falcon-alibi", "falcon-one-head", "granitemoehybrid"}
REFUSED = {
    "olmo": "clipped",
    "olmo2": "each head",
    "olmo3": "each head",
    "olmoe": "each head",
    "flex_olmo": "each head",
    "minimax_m2": "each head",
}


@needs_compiler
@pytest.mark.parametrize("key", sorted({*SOURCES, *FAMILY_SOURCES} - WITHOUT))
@torch.no_grad()
def test_families_decode_through_the_kernel(model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    model = model_of(key)
    ids = torch.arange(100, 180).view(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    monkeypatch.setenv(kvshare_attention.VARIABLE, "eager")
    expected = logits_of_steps(model, ids, mask, 4)
    assert model.get_decoder().kvshare_choice.backend == "eager"
    monkeypatch.setenv(kvshare_attention.VARIABLE, "compiled")
    got = logits_of_steps(model, ids, mask, 4)
    choice = model.get_decoder().kvshare_choice
    if key in REFUSED:
        assert choice.backend == "eager"
        assert REFUSED[key] in choice.reason
    else:
        assert choice.backend == "compiled", choice
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


TRITON = ("llama-gqa", "smollm3", "phi", "gpt_oss", "cohere", *at_times("qwen3", "qwen2", "mistral-window", "gemma2"))


@pytest.mark.parametrize("key", TRITON)
@torch.no_grad()
def test_families_prefill_and_decode_through_the_triton_kernel(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    model = model_of(key, num_attention_heads=4, num_key_value_heads=2).to(DEVICE)
    ids = torch.arange(100, 148, device=DEVICE).view(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    monkeypatch.setenv(kvshare_attention.VARIABLE, "eager")
    expected = logits_of_steps(model, ids, mask, 1)
    monkeypatch.setenv(kvshare_attention.VARIABLE, "triton")
    got = logits_of_steps(model, ids, mask, 1)
    assert model.get_decoder().kvshare_choice.backend == "triton"
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


# some change their frequencies where a sequence grows beyond 16 tokens
ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
        "factor": 32.0,
    },
}


@needs_compiler
@pytest.mark.parametrize(("rope", "backend"), [*((rope, "compiled") for rope in ROPES), ("longrope", "triton")])
@torch.no_grad()
def test_scaled_ropes(model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rope: str, backend: str) -> None:
    fields = {"rope_parameters": {"rope_theta": 1e4, "rope_type": rope, **ROPES[rope]}}
    device = DEVICE if backend == "triton" else "cpu"
    model = model_of("llama-gqa", max_position_embeddings=16 if rope == "dynamic" else 512, **fields).to(device)
    ids, logits = torch.arange(100, 136, device=device).view(2, 18), []
    for chosen in ("eager", backend):
        monkeypatch.setenv(kvshare_attention.VARIABLE, chosen)
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(part, cache=cache).logits for part in ids.split([14, *[1] * 4], 1)]
        assert model.get_decoder().kvshare_choice.backend == chosen
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@needs_compiler
@pytest.mark.parametrize("backend", ["compiled", "triton"])
@torch.no_grad()
def test_static_caches_decode_through_the_kernel(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    model = model_of("mistral-window").to(device)
    ids, logits = torch.arange(100, 180, device=device).view(2, 40), []
    for chosen in ("eager", backend):
        monkeypatch.setenv(kvshare_attention.VARIABLE, chosen)
        cache = transformers.StaticCache(config=model.config, max_cache_len=90)
        logits.append(logits_of_steps(model, ids, torch.ones_like(ids), 4, cache=cache))
        assert model.get_decoder().kvshare_choice.backend == chosen
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@needs_compiler
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("backend", ["compiled", "triton"])
@torch.no_grad()
def test_a_short_prompt_fills_a_static_cache(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str, bits: int | None
) -> None:
    """Without a mask, which transformers leaves out where all new tokens are the first slots: those behind them hold nothing."""
    device = DEVICE if backend == "triton" else "cpu"
    model = model_of("llama-gqa").to(device)
    decoder, logits = in_bits(model, bits).get_decoder(), []
    for chosen in ("eager", backend):
        monkeypatch.setenv(kvshare_attention.VARIABLE, chosen)
        cache = transformers.StaticCache(config=model.config, max_cache_len=300)
        logits.append(model(torch.arange(100, 107, device=device)[None], cache=cache).logits)
        assert decoder.kvshare_choice.backend == chosen
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@needs_compiler
@pytest.mark.parametrize(("backend", "bits"), [("eager", 8), ("compiled", None), ("compiled", 8), ("triton", 8)])
@torch.no_grad()
def test_defaults_of_torch_do_not_matter(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str, bits: int | None
) -> None:
    """What a program has made the default dtype and device changes nothing, and writes nowhere else."""
    device = DEVICE if backend == "triton" else "cpu"
    ids, logits = torch.arange(100, 130, device=device).view(2, 15), []
    monkeypatch.setenv(kvshare_attention.VARIABLE, backend)
    if backend == "triton":
        kvshare_triton.problem_on.cache_clear()
    for dtype, default in ((torch.float32, None), (torch.bfloat16, "meta")):
        model = in_bits(model_of("qwen3").to(device), bits)
        torch.set_default_dtype(dtype)
        torch.set_default_device(default)
        try:
            cache = transformers.DynamicCache(config=model.config)
            parts = [model(part, cache=cache).logits for part in ids.split([13, 1, 1], 1)]
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert model.get_decoder().kvshare_choice.backend == backend
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@needs_compiler
@pytest.mark.parametrize(
    ("key", "backend", "named"),
    [("qwen2", "compiled", False), ("cohere", "compiled", True), ("gemma2", "compiled", False), ("qwen3", "triton", True)],
)
@pytest.mark.usefixtures("compiling")
@torch.no_grad()
def test_a_kernel_is_one_operation_of_a_compiled_forward(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, key: str, backend: str, named: bool
) -> None:
    """On the CPU by itself, on a GPU where it is asked for."""
    device = DEVICE if backend == "triton" else "cpu"
    model = model_of(key).to(device)
    ids = torch.arange(100, 130, device=device).view(2, 15)
    calls = 0

    def watched(*arguments: Any, function: Any = kvshare_attention._by_kernel) -> Tensor:
        nonlocal calls
        calls += 1
        return function(*arguments)

    def logits(forward: Any) -> list[Tensor]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=300)
        model(ids[:, :12], cache=cache)  # tries the kernel
        return [forward(part, cache=cache).logits for part in ids[:, 12:].split(1, 1)]

    monkeypatch.setenv(kvshare_attention.VARIABLE, "eager")
    expected = logits(model)
    if named:
        monkeypatch.setenv(kvshare_attention.VARIABLE, backend)
    else:
        monkeypatch.delenv(kvshare_attention.VARIABLE)
    forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(kvshare_attention, "_by_kernel", watched)
    calls = 0
    got = logits(forward)
    assert calls >= 3 * len(model.get_decoder().layers)
    for wanted, found in zip(expected, got, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    if key == "qwen2":  # what no kernel can do is left to eager attention here, too
        calls = 0
        model.train()
        forward(ids[:, :1], cache=transformers.StaticCache(config=model.config, max_cache_len=300))
        assert calls == 0


@needs_compiler
@torch.no_grad()
def test_the_choice_and_its_reason(model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kvshare_attention.VARIABLE, raising=False)
    model = model_of("llama-gqa")
    decoder = model.get_decoder()

    def chosen(tokens: int, new: int = 1, **settings: Any) -> Any:
        cache = model(torch.arange(tokens)[None], use_cache=True).cache
        model(torch.arange(new)[None], cache=cache, **settings)
        return decoder.kvshare_choice

    assert chosen(300) == ("compiled", "1 new of 301 tokens on cpu in torch.float32")
    assert chosen(20) == ("eager", "21 slots are fewer than 256")
    assert "new tokens" in chosen(300, 20).reason
    assert "attention weights" in chosen(300, output_attentions=True).reason
    with torch.enable_grad():
        assert "gradients" in chosen(300).reason
    model.set_attn_implementation("eager")
    assert chosen(300) == ("eager", "attn_implementation is 'eager'")
    model.set_attn_implementation("sdpa")
    monkeypatch.setenv(kvshare_attention.VARIABLE, "eager")
    assert chosen(300) == ("eager", "KVSHARE_ATTENTION asks for it")
    monkeypatch.setenv(kvshare_attention.VARIABLE, "fast")
    with pytest.raises(ValueError, match="set it to eager, compiled, triton"):
        chosen(300)


@torch.no_grad()
def test_without_a_compiler_attention_is_eager(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(kvshare_attention.VARIABLE, "compiled")
    model, ids = model_of("llama-gqa"), torch.arange(40)[None]
    forget()
    try:
        logits_of_steps(model, ids, torch.ones_like(ids), 4)
        assert model.get_decoder().kvshare_choice == ("eager", "there is no C compiler (CC, cc, gcc, clang)")
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho the compiler is broken >&2\nexit 1\n")
        broken.chmod(0o755)
        forget()
        logits_of_steps(model, ids, torch.ones_like(ids), 4)
        assert "fails: the compiler is broken" in model.get_decoder().kvshare_choice.reason
    finally:
        forget()


def forget() -> None:
    for known in (kvshare_cpu.compiler, kvshare_cpu._machine, kvshare_cpu.kernel, kvshare_cpu.missing):
        known.cache_clear()


@needs_compiler
def test_a_compiled_file_is_kept_and_one_that_is_damaged_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    try:
        made = kvshare_cpu.Made(16, 16, False, 0)
        kvshare_cpu.kernel(made)
        (file,) = (tmp_path / "kvshare").iterdir()
        before = file.stat().st_mtime_ns
        kvshare_cpu.kernel.cache_clear()
        kvshare_cpu.kernel(made)
        assert file.stat().st_mtime_ns == before
        file.unlink()  # not written to: it is in use
        file.write_bytes(b"broken")
        forget()
        assert kvshare_cpu.missing(made) is None  # it is compiled again
    finally:
        forget()
