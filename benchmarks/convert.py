"""What a conversion costs: time against a plain copy of the files, peak memory, memory against depth; and what it survives.

    python benchmarks/convert.py --work /big/disk --out times          # everything, about an hour on 2 cores
    python benchmarks/convert.py --work /big/disk --out times --only 'depth|kills'

In: a folder on a disk with 60 GB free. Out: `convert.json` in `--out`, one entry per measurement, and a Markdown table. The
checkpoints are synthetic, with the layout of real ones (1B and 8B Llama, bfloat16, many shards), and are removed afterwards; so
is the text, random words. What is already in the file is not measured again.

Every time is paired with its reference in this run, on the same disk, with the source out of the page cache before each; peak
memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvshare.activations import batches
from kvshare.checkpoint import OutputTensor, WeightWriter, write_json
from kvshare.data import calibration_rows, load_tokenizer
from kvshare.loading import load_native
from kvshare.source import TINY, open_source
from kvshare.statistics import calibration_recipe

TESTS = Path(__file__).resolve().parents[1] / "tests"
# what a process forked from this one reports of itself through `getrusage` would include what this one holds
PROGRAM = """
import sys
from kvshare.cli import main
try:
    main()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""
POOL = 1 << 27  # random numbers that all weights are cut from
SHARD = 2_000_000_000  # bytes of a shard
KILLED = ("mean", "svd", "budget", "healed", "heal")  # jobs of tests/killing.py
MADE = ("8b", "1b", "8-layers", "32-layers", "statistics-8b", "sources", "out")  # what is removed at the end


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes; its embeddings are tied where `tied`."""

    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden // self.query_heads


SHAPES = {
    "1b": Shape(2048, 16, 32, 8, 8192, 128_256, True),
    "8b": Shape(4096, 32, 32, 8, 14_336, 128_256, False),
}


def build(shape: Shape, folder: Path, shard: int = SHARD) -> Path:
    """A checkpoint of this shape with random weights and the bundled tokenizer, made once."""
    if (folder / "config.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))]
    wide, narrow = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        parts: tuple[tuple[str, tuple[int, ...]], ...] = (
            ("input_layernorm", (shape.hidden,)),
            ("self_attn.q_proj", (wide, shape.hidden)),
            ("self_attn.k_proj", (narrow, shape.hidden)),
            ("self_attn.v_proj", (narrow, shape.hidden)),
            ("self_attn.o_proj", (shape.hidden, wide)),
            ("post_attention_layernorm", (shape.hidden,)),
            ("mlp.gate_proj", (shape.intermediate, shape.hidden)),
            ("mlp.up_proj", (shape.intermediate, shape.hidden)),
            ("mlp.down_proj", (shape.hidden, shape.intermediate)),
        )
        sizes += [(f"model.layers.{layer}.{part}.weight", size) for part, size in parts]
    sizes.append(("model.norm.weight", (shape.hidden,)))
    if not shape.tied:
        sizes.append(("lm_head.weight", (shape.vocabulary, shape.hidden)))
    files, filled = [0], 0
    for _, size in sizes:
        filled += 2 * torch.Size(size).numel()
        files.append(filled // shard)
    count = files[-1] + 1
    named = [f"model-{file + 1:05d}-of-{count:05d}.safetensors" for file in files[1:]]
    writer = WeightWriter(folder, [OutputTensor(name, "BF16", size, file) for (name, size), file in zip(sizes, named, strict=True)])
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(POOL, dtype=torch.bfloat16).normal_(0, 1, generator=generator)
    for name, size in sizes:
        if len(size) == 1:
            writer.put(name, torch.ones(size))
            continue
        numbers = torch.Size(size).numel()
        start = int(torch.randint(POOL, (), generator=generator))
        value = torch.cat([pool[start:], pool.repeat(-(-numbers // POOL))])[:numbers].view(size)
        writer.put(name, value * size[1] ** -0.5)
    writer.finish()
    tiny = open_source(TINY).path
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / file, folder / file)
    write_json(
        folder / "config.json",
        json.loads((tiny / "config.json").read_text())
        | {
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.query_heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.intermediate,
            "vocab_size": shape.vocabulary,
            "tie_word_embeddings": shape.tied,
            "max_position_embeddings": 8192,
        },
    )
    return folder


def words(file: Path, count: int) -> Path:
    """A text of random words, made once."""
    if not file.is_file():
        rng = random.Random(0)
        known = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
        paragraphs = (" ".join(rng.choices(known, k=200)) for _ in range(count // 200))
        file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return file


def cold(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copied(source: Path, target: Path) -> float:
    """Seconds that a plain copy of the files takes, on the disk at the end."""
    shutil.rmtree(target, ignore_errors=True)
    cold(source)
    target.mkdir()
    start = time.monotonic()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def ran(source: Path, output: Path, *arguments: str | Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a kvshare command in a process of its own; the output is removed."""
    shutil.rmtree(output, ignore_errors=True)
    cold(source)
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments), "-o", str(output), "--quiet"]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return seconds, 1024 * int(done.stderr.split()[-2])


def against_copy(source: Path, work: Path, repeats: int, *arguments: str | Path) -> dict[str, Any]:
    """A conversion against the copy of the same files, in turns."""
    pairs = []
    for _ in range(repeats):
        copy = copied(source, work / "copy")
        seconds, peak = ran(source, work / "out", "convert", source, *arguments)
        shutil.rmtree(work / "out")
        pairs.append((seconds / copy, copy, seconds, peak))
        print(f"copy {copy:.1f} s, conversion {seconds:.1f} s, ratio {seconds / copy:.2f}, peak {peak / 2**30:.2f} GiB", flush=True)
    ratios = [pair[0] for pair in pairs]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "copy_seconds": [pair[1] for pair in pairs],
        "seconds": [pair[2] for pair in pairs],
        "peak_gib": max(pair[3] for pair in pairs) / 2**30,
    }


def mean_8b(work: Path, repeats: int, _tokens: int) -> dict[str, Any]:
    """`mean` at 8B shapes against the copy."""
    return against_copy(build(SHAPES["8b"], work / "8b"), work, repeats, "--init", "mean", "--no-heal", "--eval-mode", "off")


def svd_8b(work: Path, repeats: int, _tokens: int) -> dict[str, Any]:
    """`svd` from statistics at 8B shapes against the copy; the statistics are of few tokens, which changes no time."""
    source, statistics_folder = build(SHAPES["8b"], work / "8b"), work / "statistics-8b"
    if not statistics_folder.is_dir():
        text = words(work / "words.txt", 200_000)
        ran(source, statistics_folder, "calibrate", source, "--data", text, "--tokens", "512")
    return against_copy(source, work, repeats, "--statistics", statistics_folder, "--no-heal", "--eval-mode", "off")


def calibration_1b(work: Path, repeats: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of `calibrate` at 1B shapes against a forward of the same rows through the loaded model."""
    source, text = build(SHAPES["1b"], work / "1b"), words(work / "words.txt", 200_000)
    layer = sum(spec.bytes for name, spec in open_source(source).tensors.items() if name.startswith("model.layers.0."))
    pairs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--forward", str(source), str(text), str(tokens)]
        forward = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        seconds, peak = ran(source, work / "statistics-1b", "calibrate", source, "--data", text, "--tokens", str(tokens))
        shutil.rmtree(work / "statistics-1b")
        pairs.append((forward / seconds, forward, seconds, peak))
        print(f"forward {forward:.0f} s, calibration {seconds:.0f} s, peak {peak / 2**30:.2f} GiB", flush=True)
    return {
        "ratio": statistics.median(pair[0] for pair in pairs),
        "ratios": [pair[0] for pair in pairs],
        "tokens": tokens,
        "forward_tokens_per_second": [tokens / pair[1] for pair in pairs],
        "tokens_per_second": [tokens / pair[2] for pair in pairs],
        "peak_gib": max(pair[3] for pair in pairs) / 2**30,
        "three_layers_gib": 3 * 2 * layer / 2**30,  # in float32
        "activations_gib": 4 * tokens * SHAPES["1b"].hidden / 2**30,
    }


def forward_seconds(source: Path, text: str, tokens: int) -> float:
    """Seconds of the decoder's forward over the rows that `calibrate` takes, the model loaded in float32 before."""
    recipe = calibration_recipe(None, None, text, tokens, None)
    rows = calibration_rows(recipe, load_tokenizer(source), None)
    model = load_native(source, dtype=torch.float32)
    decoder: Any = model.get_decoder()
    with torch.inference_mode():
        decoder(input_ids=rows[:1, :16], use_cache=False)
        start = time.monotonic()
        for batch in batches(rows):
            decoder(input_ids=batch, use_cache=False)
        return time.monotonic() - start


def depth(work: Path, _repeats: int, _tokens: int) -> dict[str, Any]:
    """Peak memory of a conversion with text at 8 layers and at 32, otherwise the same."""
    text, peaks = words(work / "words.txt", 200_000), {}
    for layers in (8, 32):
        source = build(Shape(1024, layers, 16, 8, 2816, 32_000, True), work / f"{layers}-layers")
        settings = ("--calibration", text, "--calibration-tokens", "4096", "--eval-data", text, "--eval-tokens", "2048")
        _, peaks[layers] = ran(source, work / "out", "convert", source, *settings, "--no-heal", "--eval-mode", "layers")
        shutil.rmtree(work / "out")
    return {"ratio": peaks[32] / peaks[8], "peak_gib": {str(layers): peak / 2**30 for layers, peak in peaks.items()}}


def kills(work: Path, _repeats: int, _tokens: int) -> dict[str, Any]:
    """Every change of the file system of conversions and a healing: killed before it, and run again."""
    sources = work / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    shape = Shape(64, 2, 8, 8, 128, 4096, True)
    build(shape, sources / "model", shard=200_000)
    words(sources / "text.txt", 20_000)
    script = [sys.executable, str(TESTS / "killing.py"), str(sources), str(work / "killed"), *(f"{name}=0" for name in KILLED)]
    quick = ["--init", "mean", "--no-heal", "--eval-mode", "off"]
    ran(sources / "model", sources / "converted", "convert", sources / "model", *quick)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # forks of one thread
    done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    shutil.rmtree(work / "killed")
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "killed": sum(job["killed"] for job in found.values()),
        "wrong": sum(len(job["wrong"]) for job in found.values()),
        **found,
    }


MEASUREMENTS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "mean 8B": mean_8b,
    "svd from statistics 8B": svd_8b,
    "calibration 1B": calibration_1b,
    "depth": depth,
    "kills": kills,
}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| measurement | result | peak memory |", "|---|---|---|"]
    for name, found in results.items():
        peak = found.get("peak_gib", "")
        if name == "kills":
            said = f"{found['killed']} kills, {found['wrong']} of them not survived"
        elif name == "depth":
            said = f"32 layers take {found['ratio']:.2f} times the memory of 8"
            peak = ", ".join(f"{value:.2f} GiB" for value in peak.values())
        else:
            against = "of the token rate of a forward" if "tokens" in found else "times the copy"
            ratios = found["ratios"]
            said = f"{found['ratio']:.2f} {against} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(f"| {name} | {said} | {f'{peak:.2f} GiB' if isinstance(peak, float) else peak} |")
    return "\n".join(rows)


def main() -> None:
    """Measure what is asked for and is not measured yet."""
    if sys.argv[1:2] == ["--forward"]:
        print(forward_seconds(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure on, with 60 GB free")
    parser.add_argument("--out", type=Path, required=True, help="where convert.json goes")
    parser.add_argument("--only", default="", help="a regular expression that the measurement's name must contain")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a time and its reference")
    parser.add_argument("--tokens", type=int, default=32_768, help="of the calibration at 1B")
    parser.add_argument("--keep", action="store_true", help="leave the synthetic checkpoints for the next run")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "convert.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, measure in MEASUREMENTS.items():
        if name not in results and re.search(options.only, name):
            results[name] = measure(options.work, options.repeats, options.tokens)
            write_json(file, results)
            print(name, json.dumps(results[name]), flush=True)
    if not options.keep:
        for made in MADE:
            shutil.rmtree(options.work / made, ignore_errors=True)
        (options.work / "words.txt").unlink(missing_ok=True)
    print(table(results))


if __name__ == "__main__":
    main()
