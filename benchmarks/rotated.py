"""A decoding step of attention in the rotated form beside the shared and the native one: times in turns.

    python benchmarks/rotated.py [--contexts 8192] [--batch-sizes 1] [--dtypes float32 bfloat16] [--threads 2]
    python benchmarks/rotated.py --threads 1 --processor-time    # on a machine that other work shares

Runs on the GPU if there is one, with times of CUDA graphs, as `decode.py` does. Native, packed and shared are those of `decode.py`.
The rotated form reads rotated keys as K and as V, and turns the output back: `kernel` with the shared form's kernel, which then has
nothing to rotate; `stock` with transformers' sdpa attention; `packed` with stock attention to which the query heads of a KV head
are tokens. All give the same numbers, which is checked against float64.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from functools import partial
from itertools import product
from typing import Any

import torch
from decode import SHAPES, Native, Shape, Step, copies, header, in_turns, kernel_of, prepare, ratio, show, tables, timer
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvshare.runtime.reference import rotated, rotated_attention
from kvshare.tensors import best_device


def rotated_steps(
    shape: Shape, batch: int, context: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, list[Step]], float]:
    """The steps of the rotated form by name, on each of as many caches as it takes, and the largest error of any of them, relative
    in the Euclidean norm.
    """
    generator = torch.Generator(device).manual_seed(context + batch)
    plain = torch.randn(batch, shape.heads, context, shape.head_dim, generator=generator, device=device)
    pairs = torch.arange(shape.head_dim // 2, dtype=torch.float64, device=device)
    frequencies = 5e5 ** -(pairs / (shape.head_dim // 2))
    positions = torch.arange(context, device=device)
    angles = positions[:, None].double() * frequencies
    key = torch.stack([rotated(row.double(), angles, False).to(dtype) for row in plain])
    query = torch.randn(batch, shape.queries, 1, shape.head_dim, generator=generator, device=device)
    turned = rotated(query.double(), angles[-1:], False).to(dtype)
    module, scaling = Native(shape.queries // shape.heads), shape.head_dim**-0.5
    cosine, sine = (part.repeat(1, 2).to(dtype) for part in tables(positions[-1:], frequencies).unbind(-2))

    def back(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cosine - torch.cat([-second, first], -1) * sine

    attend = kernel_of(device)

    def kernel(key: Tensor) -> Tensor:
        given: dict[str, Any] = {"mask": None, "key_bias": None, "value_bias": None, "norm": None, "softcap": None, "sinks": None}
        return back(attend(turned, key, None, scaling=scaling, adjacent=False, eps=0.0, **given).to(dtype))

    def stock(key: Tensor) -> Tensor:
        return back(sdpa_attention_forward(module, turned, key, key, None, scaling=scaling)[0])

    def packed(key: Tensor) -> Tensor:
        rows = turned.view(batch, shape.heads, -1, shape.head_dim)
        out = torch.nn.functional.scaled_dot_product_attention(rows, key, key, scale=scaling)
        return back(out.view(batch, 1, shape.queries, shape.head_dim))

    keys = [key] + [key.clone() for _ in range(copies(key) - 1)]
    ways = {"rotated, kernel": kernel, "rotated, stock": stock, "rotated, packed": packed}
    steps: dict[str, list[Step]] = {name: [partial(way, key) for key in keys] for name, way in ways.items()}
    unturned = rotated(key[:1].double(), -angles, False)  # as it was rounded
    asked = rotated(turned[:1].double(), -angles[-1:], False)
    expected = rotated_attention(asked, unturned, angles[None, -1:], angles[None], scaling=scaling)
    error = max(float((step()[:1].double() - expected).norm() / expected.norm()) for step, *_ in steps.values())
    return steps, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="of all threads together, in place of the time that passes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = best_device()
    if given.processor_time and device.type != "cpu":
        parser.error("--processor-time is of the CPU: leave it out, or hide the GPU")
    clock = time.process_time if given.processor_time else time.perf_counter
    unit = "ms of processor time" if given.processor_time else "ms"
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{given.threads} threads"
    print(f"{named}, torch {torch.__version__}, medians of {given.rounds} runs in turns, {unit}")

    ways = ("native", "packed", "shared", "rotated, kernel", "rotated, stock", "rotated, packed")
    header("shape", "dtype", "batch", "cached", *ways, "shared / rotated, kernel", "error")
    unbiased = [shape for shape in SHAPES if not shape.bias]  # the rotated form has biases in what it caches
    for shape, dtype, batch, context in product(unbiased, given.dtypes, given.batch_sizes, given.contexts):
        kind = getattr(torch, dtype)
        steps, _ = prepare(shape, batch, context, kind, 16, device)
        more, error = rotated_steps(shape, batch, context, kind, device)
        times = in_turns({name: timer(work, device, clock) for name, work in (steps | more).items()}, given.rounds, math.inf)
        medians = [f"{1e3 * statistics.median(times[name]):.3g}" for name in ways]
        show(shape.name, dtype, batch, context, *medians, ratio(times, "shared", "rotated, kernel"), f"{error:.1e}")


if __name__ == "__main__":
    main()
