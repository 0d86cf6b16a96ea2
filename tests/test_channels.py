"""What is known of channels is right, lies beside the weights as a file, and makes a cache in few bits lose less."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import TINY_FOLDER, edit_json
from test_bits import PROMPT
from torch import Tensor

import kvshare
from kvshare.channels import ChannelRanges, take_channels, write_channels
from kvshare.checkpoint import MANIFEST
from kvshare.data import load_tokenizer, token_rows
from kvshare.errors import BadCheckpointError
from kvshare.healing import carry_files, heal_rows, healing_recipe
from kvshare.loading import load_native, plain_forward
from kvshare.progress import silent
from kvshare.quantised import round_trip, through_quantised_cache
from kvshare.recipe import Recipe
from kvshare.runtime.kvshare_bits import BITS, dequantise, quantise
from kvshare.runtime.kvshare_channels import FILE, Channels, as_text, channels_on, read_channels

CPU = torch.device("cpu")
SHAPES = {0: (2, 4), 3: (1, 4)}


def unlike(*shape: int) -> tuple[Tensor, Channels]:
    """Numbers (batch, heads, tokens, width) whose channels have a middle and a size of their own."""
    _, heads, _, width = shape
    generator = torch.Generator().manual_seed(0)
    middle = 5 * torch.randn(heads, 1, width, generator=generator)
    channels = Channels(middle, torch.logspace(-1, 1, width).expand(heads, 1, width))
    return torch.randn(shape, generator=generator) * channels.size + channels.middle, channels


@pytest.mark.parametrize("bits", BITS)
def test_integers_are_what_the_formula_says(bits: int) -> None:
    x, (middle, size) = unlike(2, 3, 5, 16)
    x[0, 0, 0] = middle[0]
    numbers, scale = quantise(x, bits, Channels(middle, size))
    if bits == 4:
        numbers = torch.cat([numbers & 15, numbers >> 4], -1).to(torch.int8) - 8
    most = 2 ** (bits - 1)
    for row, whole, a in zip(((x - middle) / size).flatten(0, 2), numbers.flatten(0, 2), scale.flatten(), strict=True):
        farthest = max(row.tolist(), key=abs)
        assert float(a) == pytest.approx(-farthest / most, rel=1e-3, abs=1e-7)
        assert whole.tolist() == [max(-most, min(most - 1, round(y / float(a)))) for y in row.tolist()]
        assert farthest == 0 or int(whole[row.tolist().index(farthest)]) == -most


@pytest.mark.parametrize("bits", BITS)
def test_every_channel_is_rounded_by_its_own_size(bits: int) -> None:
    x, channels = unlike(2, 3, 50, 16)
    numbers, scale = quantise(x, bits, channels)
    got = dequantise(numbers, scale, x.dtype, channels)
    assert numbers.nbytes + scale.nbytes == 2 * 3 * 50 * (16 * bits // 8 + 2)
    assert torch.equal(got, round_trip(x, bits, channels))
    off = (got - x).abs() / (scale.float().abs() * channels.size)
    assert off.max() <= 1.01  # one that is nearly as large as the largest, on the other side
    assert (off > 0.51).float().mean() < 0.01
    lost, lost_without = ((y - x).square().mean((0, 2)) / channels.size[:, 0].square() for y in (got, round_trip(x, bits)))
    assert lost.max() < {8: 1e-3, 4: 0.1}[bits]
    assert lost_without.max() > 20 * lost.max()


def test_ranges_hold_nearly_all_numbers() -> None:
    x, _ = unlike(4, 2, 100, 8)
    x[:, 1, :, 3] = 7.0
    ranges = ChannelRanges(3)
    for part in x.transpose(1, 2).split(1):
        ranges.add(part)
    middle, size = ranges.channels()
    flat = x.transpose(0, 1).flatten(1, 2)
    upper, lower = (middle + size)[:, 0], (middle - size)[:, 0]
    torch.testing.assert_close(upper[0], flat[0].sort(0).values[-3])
    torch.testing.assert_close(lower[0], flat[0].sort(0).values[2])
    torch.testing.assert_close(size[1, 0, 3], 0.001 * size[1].square().sum().div(8).sqrt())  # a channel that never moves


@pytest.mark.parametrize("key", ["llama-bias", "qwen3", "smollm3", "gpt2", "cohere", "glm", "falcon", "phi3", "olmo", "mixed"])
@torch.no_grad()
def test_channels_are_those_of_what_is_cached(
    converted_folder: Callable[..., Path], mixed_folder: Callable[[str], Path], key: str
) -> None:
    folder = mixed_folder("llama-gqa") if key == "mixed" else converted_folder(key)
    rows = torch.randint(4096, (6, 40), generator=torch.Generator().manual_seed(0))
    found = take_channels(folder, rows, CPU)
    cache = transformers.DynamicCache()
    model = kvshare.load(folder, dtype=torch.float32)
    model(rows, cache=cache)
    assert sorted(found) == model.config.kvshare["layers"]
    for layer, (middle, size) in found.items():
        cached = cache.layers[layer].keys.transpose(0, 1).flatten(1, 2)
        torch.testing.assert_close((middle + size)[:, 0], cached.amax(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close((middle - size)[:, 0], cached.amin(1), atol=1e-4, rtol=1e-4)
    again = read_channels(
        json.loads((folder / FILE).read_text()), {layer: (len(c.middle), c.middle.shape[2]) for layer, c in found.items()}
    )
    for _, attention in ((name, module) for name, module in model.named_modules() if hasattr(module, "kvshare_channels")):
        assert all(torch.equal(a, b) for a, b in zip(attention.kvshare_channels, again[attention.layer_idx], strict=True))


@torch.no_grad()
def test_four_bits_lose_far_less_with_the_file(
    measured_folder: Callable[[str], Path], own_text: tuple[str, str], tmp_path: Path
) -> None:
    folder = measured_folder("svd")
    rows = token_rows(own_text[1], load_tokenizer(folder), 2048, 128)
    without = Path(shutil.copytree(folder, tmp_path / "without"))
    (without / FILE).unlink()

    def divergence(checkpoint: Path, bits: int) -> float:
        model = kvshare.load(checkpoint, dtype=torch.float32)
        given, wanted = (forward(rows).log_softmax(-1) for forward in (through_quantised_cache(model, bits), plain_forward(model)))
        return float((wanted.exp() * (wanted - given)).sum(-1).mean())

    assert divergence(folder, 4) < 0.2 * divergence(without, 4)
    assert divergence(folder, 8) < 0.5 * divergence(without, 8)


@torch.no_grad()
def test_whoever_loads_a_checkpoint_finds_its_channels(checkpoint: Path, tmp_path: Path) -> None:
    expected = kvshare.load(checkpoint, dtype=torch.float32, cache_bits=4)(PROMPT, use_cache=True).logits
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.kvshare["cache_bits"] = 4
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    remote = load(checkpoint, config=config, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(remote(PROMPT, use_cache=True).logits, expected)
    remote.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / FILE).read_bytes() == (checkpoint / FILE).read_bytes()
    (checkpoint / FILE).unlink()
    plain = kvshare.load(checkpoint, dtype=torch.float32, cache_bits=4)
    assert plain.model.layers[0].self_attn.kvshare_channels is None
    assert not torch.equal(plain(PROMPT, use_cache=True).logits, expected)
    plain.save_pretrained(tmp_path / "saved")  # where the channels of another model lie
    assert not (tmp_path / "saved" / FILE).exists()
    # a file that others have damaged
    (checkpoint / FILE).write_text('{"format_version": 1, "layers": {}}')
    with pytest.raises(ValueError, match="cannot be used: its layers are not the 6 shared ones"):
        load(checkpoint, config=config, trust_remote_code=True)
    with pytest.raises(BadCheckpointError, match=r"kvshare_channels\.json cannot be used"):
        kvshare.load(checkpoint)


@pytest.mark.usefixtures("compiling")
@torch.no_grad()
def test_one_graph_reads_channels(converted_folder: Callable[..., Path]) -> None:
    model = kvshare.load(converted_folder("llama-gqa"), dtype=torch.float32, cache_bits=4)
    logits = []
    for forward in (model.forward, torch.compile(model.forward, backend="eager", fullgraph=True)):
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        logits += [forward(input_ids=part, cache=cache).logits for part in PROMPT[:, :20].split([19, 1], 1)]
    for eager, compiled in zip(logits[:2], logits[2:], strict=True):  # the least difference may round a number the other way
        assert float((eager - compiled).square().mean()) < 1e-3 * float(eager.square().mean())


def test_what_has_no_text_or_shares_nothing_has_no_channels(
    converted_folder: Callable[..., Path], tmp_path: Path, text_file: str
) -> None:
    assert not (converted_folder("llama-gqa", 2, "mean") / FILE).exists()
    assert not (converted_folder("llama-mha", "all", "exact") / FILE).exists()
    assert not (converted_folder("llama-gqa", "all", "svd", "rotated") / FILE).exists()
    rows = torch.full((2, 8), 100)
    folder = Path(shutil.copytree(converted_folder("llama-gqa", 2, "mean"), tmp_path / "copy"))
    write_channels(folder, rows, CPU)
    first = (folder / FILE).read_bytes()
    write_channels(folder, rows, CPU)
    assert (folder / FILE).read_bytes() == first
    edit_json(folder / "config.json", lambda config: config["kvshare"].update(layers=[], kv_heads=[]))
    (folder / FILE).unlink()
    write_channels(folder, rows, CPU)
    assert not (folder / FILE).exists()


def test_verify_knows_the_file(checkpoint: Path) -> None:
    assert kvshare.verify(checkpoint).files == len(list(checkpoint.iterdir())) - 1
    whole = (checkpoint / FILE).read_bytes()
    (checkpoint / FILE).unlink()
    with pytest.raises(BadCheckpointError, match=f"{FILE} is missing"):
        kvshare.verify(checkpoint)
    edit_json(checkpoint / MANIFEST, lambda manifest: manifest["files"].pop(FILE))
    kvshare.verify(checkpoint)
    (checkpoint / FILE).write_bytes(whole)
    with pytest.raises(BadCheckpointError, match=f"{FILE} is not in the manifest"):
        kvshare.verify(checkpoint)


def test_healing_takes_channels_anew(
    converted_folder: Callable[..., Path], source_folder: Callable[[str], Path], tmp_path: Path, text_file: str
) -> None:
    recipe = Recipe.model_validate({"heal": {"batch_tokens": 512, "sequence_length": 64}})
    settings, _ = healing_recipe(recipe, text_file, 1_024, None, None, None, None)
    rows = heal_rows(settings, load_tokenizer(TINY_FOLDER), None, silent)
    for init in ("svd", "mean"):  # with a file and without
        checkpoint, healed = converted_folder("llama-gqa", "all", init), tmp_path / init
        kvshare.heal(checkpoint, healed, source_folder("llama-gqa"), text_file, tokens=1_024, recipe=recipe)
        kvshare.verify(healed)
        written = (healed / FILE).read_text()
        assert written == as_text(take_channels(healed, rows, CPU))
        assert written != as_text(take_channels(checkpoint, rows, CPU))


def test_channels_of_other_weights_are_not_carried(checkpoint: Path, tmp_path: Path) -> None:
    assert (checkpoint / FILE).exists()
    carry_files(checkpoint, tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert not (tmp_path / FILE).exists()


VALID = json.loads(
    as_text(
        {layer: Channels(torch.zeros(heads, 1, width), torch.ones(heads, 1, width)) for layer, (heads, width) in SHAPES.items()}
    )
)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: v.pop("layers"), "no object of format_version and layers"),
        (lambda v: v.update(more=1), "no object of format_version and layers"),
        (lambda v: v.update(format_version=2), "format_version is not 1"),
        (lambda v: v.update(format_version=True), "format_version is not 1"),
        (lambda v: v["layers"].pop("3"), "not the 2 shared ones"),
        (lambda v: v["layers"].update({"03": 1}), "not the 2 shared ones"),
        (lambda v: v["layers"]["0"].pop("middle"), "layer 0 is no object of middle and size"),
        (lambda v: v["layers"]["0"]["middle"].pop(), "the middle of layer 0 is not 2 lists of 4 numbers"),
        (lambda v: v["layers"]["3"]["size"][0].append(1.0), "the size of layer 3 is not 1 lists of 4 numbers"),
        (lambda v: v["layers"]["3"].update(size="xxxx"), "the size of layer 3 is not 1 lists of 4 numbers"),
        (
            lambda v: v["layers"]["0"]["middle"][1].__setitem__(0, float("nan")),
            "middle of layer 0 holds something else than finite",
        ),
        (lambda v: v["layers"]["0"]["middle"][1].__setitem__(0, 10**400), "middle of layer 0 holds something else than finite"),
        (lambda v: v["layers"]["0"]["middle"][1].__setitem__(0, True), "middle of layer 0 holds something else than finite"),
        (lambda v: v["layers"]["0"]["size"][1].__setitem__(0, 0), "size of layer 0 holds a number that is not above 0"),
        (lambda v: v["layers"]["0"]["size"][1].__setitem__(0, -1.0), "size of layer 0 holds a number that is not above 0"),
    ],
)
def test_what_is_no_file_of_channels_is_refused(change: Callable[[Any], Any], why: str) -> None:
    value = json.loads(json.dumps(VALID))
    assert read_channels(value, SHAPES)[3].size.shape == (1, 1, 4)
    change(value)
    with pytest.raises(ValueError, match=why):
        read_channels(value, SHAPES)
    with pytest.raises(ValueError, match="no object"):
        read_channels([value], SHAPES)


def test_the_file_holds_four_digits() -> None:
    channels = Channels(torch.randn(2, 1, 4) * torch.logspace(-8, 8, 4), torch.rand(2, 1, 4) + 0.1)
    text = as_text({0: channels})
    again = read_channels(json.loads(text), {0: (2, 4)})
    assert as_text(again) == text
    for before, after in zip(channels, again[0], strict=True):
        torch.testing.assert_close(after, before, atol=0, rtol=5.1e-4)


def test_channels_follow_their_module_to_a_device(converted_folder: Callable[..., Path]) -> None:
    model = kvshare.load(converted_folder("tiny"), cache_bits=8)
    attention = model.model.layers[0].self_attn
    before = attention.kvshare_channels
    assert channels_on(attention, CPU) is before
    with torch.inference_mode():
        moved = channels_on(attention, torch.device("meta"))
    assert moved is attention.kvshare_channels
    assert {value.device.type for value in attention.kvshare_channels} == {"meta"}
    assert not moved.middle.is_inference()
    native = load_native(TINY_FOLDER)
    assert not any(hasattr(module, "kvshare_channels") for module in native.modules())
