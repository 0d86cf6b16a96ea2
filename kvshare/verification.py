"""Is a folder a checkpoint that kvshare wrote, whole, and are its weights what its cache relies on?

In: a checkpoint folder. Out: its kvshare block, a `Verification`, or an error that names what is wrong.
Never: writes, loads a model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from kvshare.checkpoint import FORMAT_VERSION, MANIFEST, sha256
from kvshare.errors import BadCheckpointError
from kvshare.families import Family, Part, family_of
from kvshare.geometry import SHARED, geometry_of, require_attention
from kvshare.headers import TensorSpec
from kvshare.layout import fused_parts
from kvshare.parsing import is_file, is_folder, shown
from kvshare.repeats import check_repeats, shapes_of
from kvshare.rotated import says_rotated
from kvshare.runtime import ROTATED
from kvshare.runtime.kvshare_channels import FILE, read_channels
from kvshare.source import read_json, read_tensor_specs, refuse_redirections, weight_files

FORMS = ("shared", "exact", "rotated")  # how the runtime makes keys and values of what is cached


@dataclass(frozen=True)
class Verification:
    """What `verify` found in order: files, their bytes, and layers whose weights are what the checkpoint's form asks for."""

    files: int
    bytes: int
    layers: int
    form: str


class _Fields(BaseModel):
    """What others rely on in a kvshare block; fields that are not named here may hold anything."""

    model_config = ConfigDict(strict=True)


class _Origin(_Fields):
    name: str
    commit: str | None = None
    num_key_value_heads: PositiveInt


class _Measured(_Fields):
    data: str
    tokens: PositiveInt
    sequence_length: PositiveInt


class _Settings(_Fields):
    init: str
    evaluation: _Measured


class _Block(_Fields):
    version: str
    layers: list[NonNegativeInt]
    kv_heads: list[PositiveInt] | None = None
    source: _Origin
    recipe: _Settings
    seed: NonNegativeInt
    healed_tokens: NonNegativeInt = 0
    heal: dict[str, Any] = Field(default_factory=dict)


def read_block(checkpoint: Path) -> dict[str, Any]:
    """The kvshare block of a checkpoint's config.

    Raises:
        BadCheckpointError: the folder is missing or is not a kvshare checkpoint of a version that is known, or its block does not
            hold what it must.
    """
    if not is_folder(checkpoint):
        raise BadCheckpointError(f"there is no folder {checkpoint}", "a checkpoint is a local folder", "check the path")
    config = read_json(checkpoint / "config.json")
    block = config.get("kvshare") if isinstance(config, dict) else None
    if not isinstance(block, dict) or not isinstance(block.get("layers"), list):
        raise BadCheckpointError(
            f"{checkpoint} is not a kvshare checkpoint", "its config.json has no kvshare block", "make one with `kvshare convert`"
        )
    version = block.get("format_version")
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        raise BadCheckpointError(
            f"{checkpoint} has the format version {shown(version)}",
            f"this kvshare reads version {FORMAT_VERSION}",
            "convert the model again" if older else "update kvshare",
        )
    if block.get("form") not in FORMS:
        raise BadCheckpointError(
            f"{checkpoint} has the form {shown(block.get('form'))}", f"there are: {', '.join(FORMS)}", "convert the model again"
        )
    if [block["form"] == "rotated"] * 2 != says_rotated(config):
        raise _unusable(
            checkpoint,
            f"its form is {block['form']}, and the model_type {shown(config.get('model_type'))}: in rotated form, and no other, "
            f"this and the type of rope begin with {ROTATED}, so that no native class computes something else of its weights",
        )
    try:
        layers = _Block.model_validate(block).layers
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _unusable(checkpoint, f"its {where} is {shown(first['input'])}: {first['msg']}") from None
    if layers != sorted(set(layers)):
        raise _unusable(checkpoint, f"its layers {shown(layers)} are not in order")
    refuse_redirections(config, os.listdir(checkpoint), str(checkpoint))
    return block


def _unusable(checkpoint: Path, why: str) -> BadCheckpointError:
    return BadCheckpointError(f"the kvshare block of {checkpoint} cannot be used", why, "convert the model again")


def verify_form(checkpoint: Path) -> int:
    """Check that the weights of K and V of every layer are equal bit for bit (forms `shared` and `rotated`) or square (`exact`),
    and that a layer of fewer heads than the config names holds each of them repeated; what is said of channels has to fit, too.
    Returns how many layers there are.

    Raises:
        BadCheckpointError: they do not fit, one is missing, or heads are not repeated as the kvshare block says.
        UnsupportedModelError: a model_type or numbers that kvshare does not know.
    """
    block, config = read_block(checkpoint), read_json(checkpoint / "config.json")
    specs = read_tensor_specs(checkpoint, weight_files(checkpoint))
    family = family_of(str(config.get("model_type", ""))).located(specs)
    if block["form"] == "rotated" and not family.rotated_form:
        raise _unusable(checkpoint, f"its form is rotated, which {family.model_type} models do not have")
    geometry = geometry_of(config, family, str(checkpoint))
    require_attention(specs, family, geometry, str(checkpoint))
    if block["layers"] and block["layers"][-1] >= geometry.layers:
        raise _unusable(checkpoint, f"it names layer {block['layers'][-1]}, and there are {geometry.layers}")
    if not all(layer in geometry.attention for layer in block["layers"]):
        raise _unusable(checkpoint, f"its layers {shown(block['layers'])} have K and V in part only")
    if block["form"] == "exact" and geometry.kv_heads * geometry.head_dim != geometry.hidden:
        raise BadCheckpointError(
            f"the layers of {checkpoint} are not square", "k_proj would have no inverse", "convert the model again"
        )
    shapes = shapes_of(checkpoint, config, geometry.kv_heads, geometry.head_dim)
    if block["form"] == "shared" and is_file(checkpoint / FILE):
        _check_channels(checkpoint, shapes)
    for layer, (kv_heads, _) in shapes.items():
        if block["form"] == "exact":
            continue
        heads = (geometry.query_heads, geometry.kv_heads)
        weights = {part: specs[family.weight(layer, part)] for part in SHARED}
        rows = _rows(checkpoint, weights, family, heads)
        if rows["k"] != rows["v"]:
            raise BadCheckpointError(
                f"K and V of layer {layer} differ in {checkpoint}",
                "the shared cache would compute another function than the stored weights",
                "convert the model again; train shared models through kvshare only",
            )
        if kv_heads == geometry.kv_heads:
            continue
        biases = {part: specs[name] for part in SHARED if (name := family.bias(layer, part)) in specs}
        held = [(weights["k"].name, rows["k"])]
        held += [(biases[part].name, data) for part, data in _rows(checkpoint, biases, family, heads).items()]
        for name, data in held:
            check_repeats(name, data, geometry.kv_heads // kv_heads, geometry.kv_heads)
    return len(block["layers"])


def _check_channels(checkpoint: Path, shapes: dict[int, tuple[int, int]]) -> None:
    """Check what a checkpoint says of the channels of its shared layers, of which `shapes` are KV heads and head_dim."""
    try:
        read_channels(read_json(checkpoint / FILE), shapes)
    except ValueError as error:
        raise BadCheckpointError(
            f"{checkpoint / FILE} cannot be used", str(error), "copy the checkpoint again, or convert the model again"
        ) from None


def _bytes(folder: Path, spec: TensorSpec) -> bytes:
    with (folder / spec.file).open("rb") as stream:
        stream.seek(spec.start)
        return stream.read(spec.bytes)


def _rows(folder: Path, tensors: dict[Part, TensorSpec], family: Family, heads: tuple[int, int]) -> dict[Part, bytes]:
    """The bytes of k and v, or of their biases, of a model with these query and KV heads, by the tensors that hold them."""
    if not family.fused:
        return {part: _bytes(folder, spec) for part, spec in tensors.items()}
    if not tensors:
        return {}
    spec = tensors["k"]  # which holds v, too
    whole = torch.frombuffer(bytearray(_bytes(folder, spec)), dtype=torch.uint8).view(*spec.shape, -1)
    rows = whole.transpose(0, 1) if family.transposed and len(spec.shape) > 1 else whole
    _, key, value = fused_parts(rows, heads, family)
    return {"k": key.numpy().tobytes(), "v": value.numpy().tobytes()}


def listed_files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """What the manifest of a checkpoint says of each file by its name: `size` in bytes and `sha256`.

    Raises:
        BadCheckpointError: there is no manifest, or it does not list files.
    """
    manifest = read_json(checkpoint / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and type(entry.get("size")) is int for entry in files.values()
    ):
        raise BadCheckpointError(f"{checkpoint / MANIFEST} cannot be used", "it does not list the files", "convert the model again")
    return files


def verify(checkpoint: str | Path) -> Verification:
    """Recompute every checksum of the manifest, and check that the weights of K and V fit the form.

    Args:
        checkpoint: a folder that kvshare wrote.

    Raises:
        BadCheckpointError: a file is missing, was changed, or does not belong; or the weights do not fit the form.
    """
    folder = Path(checkpoint)
    form, files = read_block(folder)["form"], listed_files(folder)
    for name, entry in sorted(files.items()):
        file = folder / name
        if Path(name).name != name or not is_file(file):
            raise BadCheckpointError(
                f"the file {name} is missing in {folder}", "the manifest names it", "copy the checkpoint again"
            )
        if file.stat().st_size != entry["size"] or sha256(file) != entry.get("sha256"):
            raise BadCheckpointError(
                f"the file {name} was changed or damaged",
                "its size or SHA-256 is not the manifest's",
                "copy the checkpoint again, or convert the model again",
            )
    unlisted = [name for name in (*weight_files(folder), FILE) if name not in files and is_file(folder / name)]
    if unlisted:
        raise BadCheckpointError(
            f"the file {unlisted[0]} is not in the manifest", "it is read all the same", "copy the checkpoint again"
        )
    return Verification(len(files), sum(entry["size"] for entry in files.values()), verify_form(folder), form)
