"""Headers are checked to the byte, refusals name file, tensor and remedy, and a plan says what a conversion then does."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kvshare
from kvshare.errors import BadCheckpointError, KVShareError, UnsupportedModelError, UsageError
from kvshare.families import FAMILIES
from kvshare.headers import read_header
from kvshare.source import INDEX, SINGLE, open_source

QUERY = "model.layers.1.self_attn.q_proj.weight"
VALUE = "model.layers.1.self_attn.v_proj.weight"


@pytest.fixture
def single(source_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model in one file that a test may damage."""
    return Path(shutil.copytree(source_folder("llama-gqa"), tmp_path / "single"))


@pytest.fixture(scope="module")
def sharded_model(source_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in many files."""
    folder = tmp_path_factory.mktemp("sharded")
    source = source_folder("llama-gqa")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


@pytest.fixture
def sharded(sharded_model: Path, tmp_path: Path) -> Path:
    """The same model in many files, which a test may damage."""
    return Path(shutil.copytree(sharded_model, tmp_path / "sharded"))


def shard_of(folder: Path, tensor: str) -> str:
    return str(json.loads((folder / INDEX).read_text())["weight_map"][tensor])


def refusal(model: str | Path, kind: type[KVShareError], *named: str, **settings: Any) -> str:
    """The text of the error of planning this model; it has what, why and what to do, and names what it must name."""
    with pytest.raises(kind) as caught:
        kvshare.plan(model, **settings)
    assert type(caught.value) is kind
    text = str(caught.value)
    first, why, remedy = text.splitlines()
    assert first
    assert re.fullmatch(r"  why: \S.*", why)
    assert re.fullmatch(r"  do:  \S.*", remedy)
    for name in named:
        assert name in text, text
    return text


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


def test_every_tensor_is_found_where_it_lies(single: Path, sharded: Path) -> None:
    expected = load_file(single / SINGLE)
    for folder in (single, sharded):
        source = open_source(folder)
        assert source.tensors.keys() == expected.keys()
        for name, spec in source.tensors.items():
            raw = bytearray((folder / spec.file).read_bytes()[spec.start : spec.end])
            value = torch.frombuffer(raw, dtype=torch.float32).view(spec.shape)
            assert spec.dtype == "F32"
            assert torch.equal(value, expected[name])
    assert len(open_source(sharded).file_bytes) > 4
    assert open_source(single).file_bytes == {SINGLE: (single / SINGLE).stat().st_size}


def test_a_file_that_is_one_byte_short_or_long_is_named(single: Path, sharded: Path) -> None:
    for folder, name in ((single, SINGLE), (sharded, shard_of(sharded, VALUE))):
        file = folder / name
        whole = file.read_bytes()
        for damaged in (whole[:-1], whole + b"\0", whole[:20], whole[:4], b""):
            file.write_bytes(damaged)
            refusal(folder, BadCheckpointError, name)


@pytest.mark.parametrize(
    ("before", "after"), [(b"{", b"["), (b'"F32"', b'"F31"'), (b'"shape":[', b'"shape":{'), (b'"data_offsets"', b'"data_offsetz"')]
)
def test_a_flipped_header_byte_is_named(single: Path, before: bytes, after: bytes) -> None:
    file = single / SINGLE
    raw = file.read_bytes()
    start = raw.index(before, 8)
    file.write_bytes(raw[:start] + after + raw[start + len(before) :])
    refusal(single, BadCheckpointError, SINGLE)


def test_no_flipped_header_byte_breaks_the_reader(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    save_file({"first": torch.zeros(2, 3), "second": torch.zeros(4, dtype=torch.bfloat16)}, file)
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    found = 0
    for position in range(8 + length):
        for flip in (1, 16, 128):
            file.write_bytes(raw[:position] + bytes([raw[position] ^ flip]) + raw[position + 1 :])
            try:
                specs = read_header(file)
            except BadCheckpointError:
                found += 1
                continue
            assert sum(spec.bytes for spec in specs) == 32
    assert found > length


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[VALUE]["shape"].append(2),
        lambda header: header[VALUE].update(shape=[-4, -64]),
        lambda header: header[VALUE].update(dtype="F16"),
        lambda header: header[VALUE].update(data_offsets=header[QUERY]["data_offsets"]),
        lambda header: header[VALUE].update(data_offsets=[0, "all"]),
        lambda header: header.update({VALUE: []}),
    ],
    ids=["shape", "negative shape", "dtype", "overlap", "offsets", "not a mapping"],
)
def test_an_entry_that_contradicts_the_data_names_file_and_tensor(single: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_header(single / SINGLE, change)
    text = refusal(single, BadCheckpointError, SINGLE)
    assert VALUE in text or "self_attn" in text


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = shard_of(sharded, VALUE)
    (sharded / shard).unlink()
    refusal(sharded, BadCheckpointError, shard)


def test_a_tensor_in_two_shards_is_named_with_both(sharded: Path) -> None:
    first, second = shard_of(sharded, VALUE), shard_of(sharded, "lm_head.weight")
    assert first != second
    save_file(load_file(sharded / second) | {VALUE: load_file(sharded / first)[VALUE]}, sharded / second)
    refusal(sharded, BadCheckpointError, first, second, VALUE)


def test_an_index_that_names_a_missing_tensor_is_refused(sharded: Path) -> None:
    shard = shard_of(sharded, VALUE)
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.layers.9.ghost": shard}))
    refusal(sharded, BadCheckpointError, "model.layers.9.ghost", shard)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "below/it.safetensors", "..", ""])
def test_a_shard_outside_the_folder_is_never_opened(sharded: Path, name: str) -> None:
    shutil.copyfile(sharded / shard_of(sharded, VALUE), sharded.parent / "outside.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({VALUE: name}))
    refusal(sharded, BadCheckpointError, INDEX, repr(name), "own folder")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "no json"])
def test_a_useless_index_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refusal(sharded, BadCheckpointError, INDEX)


def test_pickled_weights_are_refused(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refusal(single, UnsupportedModelError, "pytorch_model.bin", "save_pretrained")
    assert UnsupportedModelError.exit_code == 3
    (single / "pytorch_model.bin").unlink()
    refusal(single, BadCheckpointError, SINGLE)


def test_a_stale_file_beside_the_index_is_never_read(sharded: Path) -> None:
    expected = kvshare.plan(sharded).to_dict()
    for name in ("model-00099-of-00099.safetensors", "pytorch_model.bin"):
        (sharded / name).write_bytes(b"left over from another download")
    assert kvshare.plan(sharded).to_dict() == expected


@pytest.mark.parametrize("name", [SINGLE, "shard-00001-model-00001-of-00001.safetensors"])
def test_weights_that_transformers_would_prefer_are_refused(sharded: Path, name: str) -> None:
    """kvshare would merge the weights that the index names, and the model would be loaded with others."""
    (sharded / name).write_bytes(b"left over from another download")
    refusal(sharded, BadCheckpointError, name, "transformers would read that file")


@pytest.mark.parametrize("field", ["transformers_weights", "fusion_config", "adapter_config.json"])
def test_what_leads_transformers_elsewhere_is_refused(single: Path, field: str) -> None:
    """Weights of another name, other modules, an adapter on top: none of them is in the headers that were checked."""
    if field.endswith(".json"):
        (single / field).write_text("{}")
    else:
        edit_json(single / "config.json", lambda config: config.update({field: "other.safetensors"}))
    refusal(single, UnsupportedModelError, field, "transformers loads")


@pytest.mark.parametrize(
    "content",
    [
        b'{"model_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"hidden_size": ' + b"9" * 5_000 + b"}",
        b'{"model_type": "\xff"}',
        b"\0",
    ],
    ids=["deep", "long number", "no text", "no JSON"],
)
def test_json_that_breaks_parsers_is_refused(single: Path, content: bytes) -> None:
    (single / "config.json").write_bytes(content)
    refusal(single, BadCheckpointError, "config.json", "cannot be read")


def test_names_cannot_reach_the_terminal(single: Path) -> None:
    edit_json(single / "config.json", lambda config: config.update(model_type="\x1b[2J\nllama"))
    assert refusal(single, UnsupportedModelError).isascii()


@pytest.mark.parametrize("model", ["org/name@\0", "x\0", "x/" + "y" * 5_000])
def test_a_name_that_no_file_can_have_is_refused(model: str) -> None:
    refusal(model, UsageError)


@pytest.mark.parametrize(("content", "named"), [(None, "missing"), ("{", "cannot be read"), ("[]", "JSON object")])
def test_a_useless_config_is_named(single: Path, content: str | None, named: str) -> None:
    (single / "config.json").unlink()
    if content is not None:
        (single / "config.json").write_text(content)
    refusal(single, BadCheckpointError, "config.json", named)


@pytest.mark.parametrize("model", ["not a model", "nobody/has-this-model", "nobody/has-this-model@main", "../nothing/here"])
def test_a_model_that_is_nowhere_is_named(model: str) -> None:
    refusal(model, UsageError, repr(model))


def test_an_unknown_family_names_the_closest(single: Path) -> None:
    edit_json(single / "config.json", lambda config: config.update(model_type="qwen4"))
    refusal(single, UnsupportedModelError, "'qwen4'", "did you mean 'qwen3'", ", ".join(sorted(FAMILIES)))
    edit_json(single / "config.json", lambda config: config.pop("model_type"))
    refusal(single, UnsupportedModelError, ", ".join(sorted(FAMILIES)))


def test_a_form_of_a_family_that_is_not_known_names_the_field(source_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source_folder("phi"), tmp_path / "phi"))
    kvshare.plan(folder)
    edit_json(folder / "config.json", lambda config: config.update(qk_layernorm=True))
    refusal(folder, UnsupportedModelError, "qk_layernorm = True", "phi")


@pytest.mark.parametrize("kv_heads", [4, "1/2", 1])
def test_heads_of_a_family_without_a_number_for_them_stay(source_folder: Callable[[str], Path], kv_heads: int | str) -> None:
    refusal(source_folder("gpt2"), UsageError, "gpt2", "kv_heads all", kv_heads=kv_heads)
    assert kvshare.plan(source_folder("gpt2"), kv_heads=8).to_dict()["cache_reduction"] == 0.5


def test_a_fused_tensor_is_merged_whole(source_folder: Callable[[str], Path]) -> None:
    merged = {
        init: {
            tensor.name.removeprefix("transformer.h.1."): tensor.shape
            for tensor in kvshare.plan(source_folder("gpt2"), init=init).tensors
            if tensor.action == "merge" and ".h.1." in tensor.name
        }
        for init in ("mean", "svd")
    }
    assert merged["mean"] == {"attn.c_attn.weight": (64, 192), "attn.c_attn.bias": (192,)}
    assert merged["svd"] == merged["mean"] | {"attn.c_proj.weight": (64, 64)}


@pytest.mark.parametrize("kv_heads", [3, 16, 5, "1/3", "12"])
def test_heads_that_do_not_divide_list_those_that_do(kv_heads: int | str) -> None:
    refusal("kvshare/tiny", UsageError, f"{kv_heads} KV heads", "choose one of: 1, 2, 4, 8", kv_heads=kv_heads)


def test_quantised_models_are_refused(single: Path) -> None:
    edit_json(single / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    refusal(single, UnsupportedModelError, "quantised")


def test_integer_projections_are_refused(single: Path) -> None:
    tensors = load_file(single / SINGLE)
    save_file(tensors | {VALUE: tensors[VALUE].to(torch.int8)}, single / SINGLE)
    refusal(single, UnsupportedModelError, VALUE, "I8")


def test_a_converted_model_is_refused(converted_folder: Callable[..., Path]) -> None:
    refusal(converted_folder("tiny"), UnsupportedModelError, "kvshare checkpoint already")


def test_a_missing_projection_is_named(single: Path) -> None:
    tensors = load_file(single / SINGLE)
    del tensors[VALUE]
    save_file(tensors, single / SINGLE)
    refusal(single, BadCheckpointError, VALUE, "missing")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 8},
        {"head_dim": 16},
        {"hidden_size": 32},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 3},
        {"num_attention_heads": "eight"},
        {"num_hidden_layers": 0},
        {"head_dim": 7},
        {"num_key_value_heads": "4"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(single: Path, fields: dict[str, Any]) -> None:
    edit_json(single / "config.json", lambda config: config.update(fields))
    refusal(single, BadCheckpointError)


def test_a_plan_reads_no_weights(single: Path) -> None:
    expected = kvshare.plan(single).to_dict()
    raw = (single / SINGLE).read_bytes()
    start = min(spec.start for spec in read_header(single / SINGLE))
    (single / SINGLE).write_bytes(raw[:start] + b"\xff" * (len(raw) - start))  # every number is NaN
    assert bool(torch.isnan(load_file(single / SINGLE)[VALUE]).all())
    assert kvshare.plan(single).to_dict() == expected


@pytest.mark.parametrize(
    ("key", "kv_heads", "init"),
    [
        ("tiny", "all", "svd"),
        ("tiny", 2, "svd"),
        ("qwen2", "all", "svd"),
        ("qwen3", "all", "svd"),
        ("qwen2", 1, "mean"),
        ("tiny", "all", "exact"),
    ],
)
def test_planned_tensors_are_the_written_ones(
    source_folder: Callable[[str], Path], converted_folder: Callable[..., Path], key: str, kv_heads: int | str, init: str
) -> None:
    planned = kvshare.plan(source_folder(key), kv_heads=kv_heads, init=init)
    source, written = open_source(source_folder(key)), open_source(converted_folder(key, kv_heads, init))
    assert planned.bytes_read == sum(spec.bytes for spec in source.tensors.values())
    assert planned.bytes_written == sum(spec.bytes for spec in written.tensors.values())
    assert {t.name: (t.dtype, t.shape) for t in planned.tensors} == {s.name: (s.dtype, s.shape) for s in written.tensors.values()}
    assert planned.files == tuple(written.file_bytes)
    for name, value in planned.config.items():
        if name != "auto_map":
            assert written.config[name] == value


def test_what_is_copied_and_what_is_merged(source_folder: Callable[[str], Path]) -> None:
    def merged(init: str, key: str = "qwen2") -> set[str]:
        plan = kvshare.plan(source_folder(key), init=init)
        return {tensor.name.removeprefix("model.layers.1.self_attn.") for tensor in plan.tensors if tensor.action == "merge"} - {
            tensor.name for tensor in plan.tensors if ".layers.0." in tensor.name
        }

    changed = {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}
    assert merged("mean") == changed
    assert merged("svd") == merged("learned") == changed | {"q_proj.weight", "q_proj.bias", "o_proj.weight"}
    assert merged("learned", "qwen3") - merged("svd", "qwen3") == {"q_norm.weight", "k_norm.weight"}
    assert all(tensor.action == "copy" for tensor in kvshare.plan(source_folder("square-norm"), init="exact").tensors)


@pytest.mark.parametrize(
    ("key", "layers", "query_heads", "kv_heads", "head_dim", "width"),
    [("tiny", 6, 8, 8, 16, 4), ("square-groups", 2, 8, 4, 16, 8)],
)
def test_an_exact_plan_states_what_it_costs(
    source_folder: Callable[[str], Path], key: str, layers: int, query_heads: int, kv_heads: int, head_dim: int, width: int
) -> None:
    plan = kvshare.plan(source_folder(key), init="exact")
    figures, hidden = plan.to_dict(), kv_heads * head_dim
    native = layers * query_heads * 2 * head_dim  # a score and a value
    exact = layers * query_heads * (head_dim + hidden)  # a score and an average of all keys
    assert figures["decode_multiply_adds_per_cached_token"] == exact - native
    assert figures["decode_overhead"] == exact / native - 1 == (kv_heads - 1) / 2
    assert figures["map_bytes"] == layers * hidden**2 * width * 4 // 3
    assert figures["cache_reduction"] == 0.5
    assert (figures["heals"], figures["heal_tokens"], figures["tensors_merged"]) == (False, 0, 0)
    assert f"{exact - native:,} multiply-adds" in "".join(plan.reasons)
    assert any("nothing is healed" in reason for reason in plan.reasons)
    assert plan.disk_bytes == plan.bytes_written == plan.bytes_read
    shared = kvshare.plan(source_folder(key), init="svd").to_dict()
    assert shared["map_bytes"] == shared["decode_multiply_adds_per_cached_token"] == shared["decode_overhead"] == 0


def test_a_source_without_an_exact_form_is_refused(source_folder: Callable[[str], Path]) -> None:
    refusal(source_folder("llama-gqa"), UnsupportedModelError, "no exact form", "4 x 8 = 32", init="exact")
    refusal(source_folder("gpt2"), UnsupportedModelError, "no exact form", "one tensor", init="exact")
    refusal(source_folder("square-norm"), UsageError, "2 KV heads of 8", init="exact", kv_heads=2)
    assert kvshare.plan(source_folder("square-norm"), init="exact", kv_heads="1/1").kv_heads == 8
    assert not kvshare.plan(source_folder("square-norm"), recipe="exact").recipe.heal.enabled


@pytest.mark.parametrize(
    ("kv_heads", "heads"),
    [(None, 8), ("all", 8), (8, 8), (4, 4), ("2", 2), (1, 1), ("1/2", 4), ("1/4", 2), ("1/8", 1), ("1/16", 1)],
)
def test_cache_figures(kv_heads: int | str | None, heads: int) -> None:
    plan = kvshare.plan("kvshare/tiny", kv_heads=kv_heads)
    figures = plan.to_dict()
    assert figures["source_cache_bytes_per_token"] == 2 * 6 * 8 * 16 * 2  # K and V, layers, heads, head_dim, bfloat16
    assert figures["cache_bytes_per_token"] == 6 * heads * 16 * 2
    assert figures["cache_reduction"] == 1 - heads / 16
    assert figures["kv_heads"] == plan.config["num_key_value_heads"] == heads
    assert any(f"{heads} heads" in reason for reason in plan.reasons)
    assert json.loads(json.dumps(figures)) == figures


def test_disk_and_memory_depend_on_what_is_done() -> None:
    healed, quick = kvshare.plan("kvshare/tiny", recipe="half"), kvshare.plan("kvshare/tiny", recipe="quick")
    assert healed.disk_bytes == 2 * healed.bytes_written
    assert quick.disk_bytes == quick.bytes_written == healed.bytes_written
    assert healed.memory_bytes > quick.memory_bytes > quick.bytes_read
