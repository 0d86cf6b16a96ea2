"""The kernels for GPUs, in triton's interpreter or on a GPU: against float64, and that they compile for real devices."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import DEVICE
from test_attention import INTEGERS, SHAPES, case, error

from kvshare.runtime.reference import rotated, shared_attention

pytest.importorskip("triton")
from kvshare.runtime import kvshare_tiles, kvshare_triton

pytestmark = pytest.mark.usefixtures("interpreter")
UNLIKE = ("as many heads", "norm and bias", "part, side by side", "no rope", "sinks")  # tried with channels, too
HALVES = ("llama", "norm", "sinks")  # tried in float16, too
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def attended(arguments: dict[str, Any]) -> torch.Tensor:
    """What the kernel gives; its tables have a column for each pair also where pairs lie side by side."""
    tables = arguments["tables"]
    if isinstance(tables, tuple):
        tables = tuple((table[..., 1::2] if arguments["adjacent"] else table).contiguous().to(DEVICE) for table in tables)
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return kvshare_triton.attend_on_gpu(**there | {"tables": tables if isinstance(tables, tuple) else there["tables"]}).cpu()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is given to write to holds NaN."""

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(args, torch.nan, **kwargs)

    monkeypatch.setattr(kvshare_triton.torch, "empty", empty)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in SHAPES for dtype in LIMITS if dtype != torch.float16 or name in HALVES], ids=str
)
def test_decoding_against_float64(name: str, dtype: torch.dtype) -> None:
    arguments, expected = case(name, dtype)
    got = attended(arguments)
    assert got.dtype == dtype
    assert error(got, expected) < LIMITS[dtype]


@pytest.mark.parametrize(
    ("name", "unlike"), [(name, unlike) for name in INTEGERS for unlike in (False, True) if not unlike or name in UNLIKE], ids=str
)
@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_of_integers(name: str, bits: int, unlike: bool) -> None:
    arguments, expected = case(name, tile=64, bits=bits, unlike=unlike)
    assert error(attended(arguments), expected) < 1e-5


@pytest.mark.parametrize(("dtype", "unlike"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_of_integers_in_16_bits(bits: int, dtype: torch.dtype, unlike: bool) -> None:
    """In float16 the interpreter does what machine code does two at a time: turn integers as they lie, by tables with sizes."""
    arguments, expected = case("sinks", dtype, 64, bits, unlike)
    assert error(attended(arguments), expected) < LIMITS[dtype]


@pytest.mark.parametrize(("bits", "unlike"), [(None, False), (8, False), (8, True), (4, True)])
def test_norms_of_keys_that_are_turned_as_they_lie(monkeypatch: pytest.MonkeyPatch, bits: int | None, unlike: bool) -> None:
    """In float16, and squares of these numbers are in its range: the interpreter has no products in bfloat16."""
    monkeypatch.setattr(kvshare_triton, "_packs", lambda *_: 1)
    arguments, expected = case("norm and bias", torch.float16, 64, bits, unlike)
    if unlike:
        arguments |= {"sizes": arguments["sizes"] / 64, "scales": arguments["scales"] * 64}
    assert error(attended(arguments), expected) < LIMITS[torch.float16]


def test_weights_are_read_as_they_are_stored() -> None:
    """In bfloat16 and not side by side; what a family adds to the weights of its norm is added in float32."""
    for name in ("norm and bias", "sinks"):
        arguments, _ = case(name)
        weights = {key: arguments[key] for key in ("key_bias", "value_bias", "norm", "sinks") if arguments[key] is not None}
        rounded = {key: value.bfloat16() for key, value in weights.items()}
        added = {"norm": rounded["norm"].float() + 1} if "norm" in rounded else {}
        wanted = attended(arguments | {key: value.float() for key, value in rounded.items()} | added)
        stored = {key: value.repeat_interleave(2, -1)[..., ::2] for key, value in rounded.items()}
        assert error(attended(arguments | stored | {"norm_offset": 1.0}), wanted) < 1e-6


def test_a_cache_that_does_not_lie_in_words() -> None:
    """Rows of bytes that begin anywhere are read byte by byte."""
    arguments, expected = case("llama", tile=64, bits=8)
    numbers = arguments["shared"]
    odd = torch.zeros(*numbers.shape[:3], numbers.shape[3] + 1, dtype=torch.int8)[..., 1:]
    arguments["shared"] = odd.copy_(numbers)
    assert kvshare_triton._in_words(odd, 32, 64, False) is None
    assert kvshare_triton._in_words(numbers, 32, 64, False) is not None
    assert error(attended(arguments), expected) < 1e-5


def executed(code: str, words: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Numbers that PTX of `kvshare_tiles` makes of two words, (4, 2): by a small interpreter of the few instructions it has."""

    def pair(bits: int) -> torch.Tensor:
        return torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(dtype)

    def bits(pair: torch.Tensor) -> int:
        return int(pair.view(torch.int32)[0]) & 0xFFFFFFFF

    held = {"$4": words[0], "$5": words[1]}
    for line in code.strip("{ }").split(";"):
        name, *operands = line.replace(",", " ").split() or [".reg"]
        if name == ".reg":
            continue
        out, *values = operands
        found = [held[value] if value in held else int(value, 16) for value in values]
        if name == "mov.b32":
            held[out] = found[0]
        elif name == "prmt.b32":
            every = found[0].to_bytes(4, "little") + found[1].to_bytes(4, "little")
            held[out] = int.from_bytes(bytes(every[found[2] >> 4 * n & 7] for n in range(4)), "little")
        elif name == "lop3.b32":
            a, b, c, table = found
            held[out] = sum((table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1) & 1) << n for n in range(32))
        elif name.startswith("fma.rn."):
            held[out] = bits((pair(found[0]).double() * pair(found[1]).double() + pair(found[2]).double()).to(dtype))
        elif name.startswith("add.rn."):
            held[out] = bits((pair(found[0]).double() + pair(found[1]).double()).to(dtype))
        else:
            raise ValueError(name)
    return torch.stack([pair(held[f"${n}"]) for n in range(4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_machine_code_makes_numbers_of_bytes(dtype: torch.dtype) -> None:
    kind = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}[dtype]
    for first in range(0, 256, 4):
        found = torch.tensor([(first + 37 * n) % 256 for n in range(8)], dtype=torch.uint8)
        words = tuple(int(word) & 0xFFFFFFFF for word in found.view(torch.int32))
        given = executed(getattr(kvshare_tiles, f"SIGNED_{kind}").value, words, dtype)
        assert torch.equal(given.double(), found.view(torch.int8).view(2, 4).T.double())
        given = executed(getattr(kvshare_tiles, f"FOUR_{kind}").value, words, dtype)
        assert torch.equal(given.double(), (found & 15).view(2, 4).T.double() - 8)


def test_channels_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvshare_triton, "LEAST", 1)
    arguments, expected = case("llama", tile=64, bits=4, unlike=True)
    assert error(attended(arguments), expected) < 1e-5


def test_no_more_splits_than_shorten_the_longest() -> None:
    assert kvshare_triton._splits(1024, 66) == 64  # 16 rounds each, where 66 would have 15 or 16
    assert kvshare_triton._splits(4096, 66) == 66
    for rounds in range(1, 300):
        for most in range(300):
            splits = kvshare_triton._splits(rounds, most)
            allowed = max(1, min(most, -(-rounds // kvshare_triton.LEAST), kvshare_triton.MOST))
            assert 1 <= splits <= allowed
            assert -(-rounds // splits) == -(-rounds // allowed)


@pytest.mark.parametrize(("kilohertz", "width", "fast"), [(2_619_000, 5_120, False), (3_201_000, 6_144, True), (None, None, False)])
def test_fast_memory_gets_more_programs(
    monkeypatch: pytest.MonkeyPatch, kilohertz: int | None, width: int | None, fast: bool
) -> None:
    """Of an H100, of an H200, and of a torch that does not know."""
    clock = {"memory_clock_rate": kilohertz, "memory_bus_width": width} if width else {}
    properties = SimpleNamespace(multi_processor_count=132, **clock)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kvshare_triton, "_processors", kvshare_triton._processors.__wrapped__)
    assert kvshare_triton._fast.__wrapped__(torch.device("cuda", 0)) is fast
    assert kvshare_triton._launch(64, 4, True, fast).programs == (8 if fast else 4)


@pytest.mark.parametrize("processors", [1, 3, 20])
def test_splits_come_together(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    for name in ("one head", "sinks"):
        arguments, expected = case(name, tile=64)
        monkeypatch.setattr(kvshare_triton, "_processors", lambda device: processors)
        monkeypatch.setattr(kvshare_triton, "LEAST", 1)
        assert error(attended(arguments), expected) < 1e-5


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("masked", ["causal", "padded", "window"])
def test_prefill_against_float64(masked: str, adjacent: bool) -> None:
    batch, queries, heads, head_dim, new, past = 2, 4, 2, 32, 70, 30
    generator = torch.Generator().manual_seed(3)
    slots = past + new
    query = torch.randn(batch, queries, new, head_dim, generator=generator)
    shared = torch.randn(batch, heads, slots, head_dim, generator=generator)
    positions = (torch.arange(slots) - torch.tensor([[0], [13]])).clamp(min=0)  # of padding, any
    angles = positions[..., None].double() * 100.0 ** -(torch.arange(12, dtype=torch.float64) / 12)  # 24 of 32 numbers rotate
    query = rotated(query.double(), angles[:, None, past:], adjacent).float()
    where, at = torch.arange(slots), torch.arange(past, slots)[:, None]
    mask = (where <= at)[None, None].expand(batch, 1, new, slots)
    if masked == "padded":
        mask = mask & (where >= torch.tensor([0, 13]).view(batch, 1, 1, 1))
    if masked == "window":
        mask = mask & (where > at - 20)
    options = dict.fromkeys(("key_bias", "value_bias", "norm", "softcap", "sinks")) | {"scaling": 0.2, "adjacent": adjacent}
    expected = shared_attention(query, shared, angles, mask=mask, eps=0.0, **options)
    tables = torch.stack([angles.cos(), angles.sin()], 2).float()
    given = {"mask": None, "causal": True} if masked == "causal" else {"mask": mask}
    got = attended({"query": query, "shared": shared, "tables": tables, "eps": 0.0, **options, **given})
    assert error(got, expected) < 1e-5


def test_the_kernel_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    try:
        kvshare_triton.problem_on.cache_clear()
        assert kvshare_triton.problem_on(device, torch.float32, 32, 32) is None
        kvshare_triton.problem_on.cache_clear()
        monkeypatch.setattr(kvshare_triton, "attend_on_gpu", lambda query, *_, **__: 1.2 * query.transpose(1, 2))
        assert "is off by" in str(kvshare_triton.problem_on(device, torch.float32, 32, 32))
        monkeypatch.setattr(kvshare_triton, "attend_on_gpu", lambda *_, **__: 1 / 0)
        kvshare_triton.problem_on.cache_clear()
        assert "ZeroDivisionError" in str(kvshare_triton.problem_on(device, torch.float32, 32, 32))
    finally:
        kvshare_triton.problem_on.cache_clear()


@pytest.mark.skipif(DEVICE == "cpu", reason="not checked: that CUDA graphs can hold a step, for there is no GPU")
def test_a_graph_holds_a_step() -> None:
    arguments, expected = case("llama", torch.bfloat16, tile=64)
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    there["tables"] = tuple(table.to(DEVICE) for table in arguments["tables"])
    kvshare_triton.attend_on_gpu(**there)
    graph, query = torch.cuda.CUDAGraph(), there["query"].clone()
    with torch.cuda.graph(graph):
        got = kvshare_triton.attend_on_gpu(**there)
    there["query"].zero_()
    graph.replay()
    there["query"].copy_(query)
    graph.replay()
    assert error(got.cpu(), expected) < LIMITS[torch.bfloat16]


COMPILE = r"""
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvshare.runtime import kvshare_kernels as kernels, kvshare_splits as splits

def compiled(kernel, capability, constants, pointers):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 3})

floats = dict.fromkeys(("cosines", "within", "key_bias", "value_bias", "norm", "sizes", "sinks", "partial"), "*fp32")
floats |= dict.fromkeys(("scaling", "eps", "norm_offset", "softcap"), "fp32") | {"scales": "*fp16"}
every = dict.fromkeys(("ADJACENT", "TABLED", "CAUSAL", "KEY_BIAS", "VALUE_BIAS", "NORM", "CAP", "SINKS"), True)
flags = dict.fromkeys((*every, "SIZES", "OVERLAP", "WIDE", "PACKED", "WORDS"), False)
decode = {"D": 64, "PAIRS": 32, "GROUP": 4, "KIND": 0, "MASK": 0, "SPLIT": True, "M": 8, "P": 32, "R": 16}
decode |= {"N": 16, "T": 2, "TILE": 32, "LINES": 32, "shared_t": 64}
wide = {"D": 128, "PAIRS": 64, "P": 64}
channels = {"KEY_BIAS": True, "VALUE_BIAS": True, "SIZES": True, "PACKED": 2}
for capability, dtype, more in (
    (80, "*bf16", {"PACKED": 2}),
    (80, "*bf16", channels | {"KIND": 2, "WORDS": True}),
    (90, "*bf16", wide | {"PACKED": 2, "NORM": True, "OVERLAP": True}),
    (90, "*fp16", {"PACKED": 2, "KIND": 2}),
    (90, "*bf16", {"PACKED": 2, "PAIRS": 0, "R": 64}),
    (90, "*fp16", every | {"SPLIT": False, "M": 64, "N": 64, "T": 1, "PAIRS": 16, "R": 32, "MASK": 1}),
    (90, "*bf16", {"KIND": 3, "PAIRS": 0, "R": 64, "MASK": 2}),
    (90, "*bf16", wide | channels | {"KIND": 3, "WORDS": True, "NORM": True, "SPLIT": False}),
    (90, "*fp16", channels | {"KIND": 3, "WORDS": True, "M": 64, "N": 64, "T": 1, "TILE": 64}),
):
    constants = flags | decode | more
    shared = "*i32" if constants["WORDS"] else {0: dtype, 2: "*i8", 3: "*u8"}[constants["KIND"]]
    pointers = floats | {"query": dtype, "out": dtype, "shared": shared, "mask": "*fp32" if constants["MASK"] == 2 else "*i8"}
    made = compiled(kernels.attend_kernel, capability, constants, pointers).asm
    assert "mma" in made["ptx"]
    exchanged = [line for line in made["ttgir"].splitlines() if "movmatrix" in line]
    assert len(exchanged) == 2 * constants["T"] * constants["WORDS"]
    for line in exchanged:  # numbers lie as a product leaves them, and are taken in as the next one wants them without moving
        assert len(re.findall(r", #mma\d*>", line)) == 3, line
    constants = {"GROUP": 4, "D": 64, "VALUE_BIAS": True, "SINKS": True, "SIZES": True, "S": 128, "W": 32}
    constants |= {"OVERLAP": capability == 90}
    compiled(splits.join_kernel, capability, constants, floats | {"out": "*bf16"})
"""


def test_the_kernels_compile_for_gpus() -> None:
    """To machine code for A100 and H100: what the interpreter forgives, the compiler does not."""
    environment = {"TRITON_INTERPRET": "0", "PATH": "/usr/bin:/bin", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
