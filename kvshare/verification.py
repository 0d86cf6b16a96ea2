"""Is a folder a checkpoint that kvshare wrote, whole, and are its weights what its cache relies on?

In: a checkpoint folder. Out: its kvshare block, a `Verification`, or an error that names what is wrong.
Never: writes, loads a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvshare.checkpoint import FORMAT_VERSION, MANIFEST, sha256
from kvshare.errors import BadCheckpointError
from kvshare.families import family_of
from kvshare.repeats import check_repeats, repeats_of
from kvshare.source import TensorSpec, read_json, read_tensor_specs, weight_files

FORMS = ("shared", "exact")  # how the runtime makes keys and values of what is cached


@dataclass(frozen=True)
class Verification:
    """What `verify` found in order: files, their bytes, and layers whose weights are what the checkpoint's form asks for."""

    files: int
    bytes: int
    layers: int
    form: str


def read_block(checkpoint: Path) -> dict[str, Any]:
    """The kvshare block of a checkpoint's config.

    Raises:
        BadCheckpointError: the folder is missing or is not a kvshare checkpoint of a version that is known.
    """
    if not checkpoint.is_dir():
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
            f"{checkpoint} has the format version {version!r}",
            f"this kvshare reads version {FORMAT_VERSION}",
            "convert the model again" if older else "update kvshare",
        )
    if block.get("form") not in FORMS:
        raise BadCheckpointError(
            f"{checkpoint} has the form {block.get('form')!r}", f"there are: {', '.join(FORMS)}", "convert the model again"
        )
    return block


def verify_form(checkpoint: Path) -> int:
    """Check that the weights of K and V of every layer are equal bit for bit (form `shared`) or square (`exact`), and that a
    layer of fewer heads than the config names holds each of them repeated; returns how many layers there are.

    Raises:
        BadCheckpointError: they do not fit, one is missing, or heads are not repeated as the kvshare block says.
    """
    block, config = read_block(checkpoint), read_json(checkpoint / "config.json")
    hidden = config.get("hidden_size")
    specs = read_tensor_specs(checkpoint, weight_files(checkpoint))
    family = family_of(str(config.get("model_type", ""))).located(specs)
    for layer, repeat in zip(block["layers"], repeats_of(checkpoint, config), strict=True):
        pair = [specs.get(family.weight(layer, part)) for part in ("k", "v")]
        if None in pair:
            missing = family.weight(layer, "k" if pair[0] is None else "v")
            raise BadCheckpointError(
                f"the tensor {missing} is missing in {checkpoint}",
                "what is cached is read through both projections",
                "convert the model again",
            )
        if block["form"] == "exact":
            if {spec.shape for spec in pair if spec is not None} != {(hidden, hidden)}:
                raise BadCheckpointError(
                    f"layer {layer} of {checkpoint} is not square", "k_proj would have no inverse", "convert the model again"
                )
            continue
        key, value = (_bytes(checkpoint, spec) for spec in pair if spec is not None)
        if family.fused and pair[0] is not None:
            key, value = _thirds(key, pair[0].shape[0] if family.transposed else 1)
        if key != value:
            raise BadCheckpointError(
                f"K and V of layer {layer} differ in {checkpoint}",
                "the shared cache would compute another function than the stored weights",
                "convert the model again; train shared models through kvshare only",
            )
        for name in (family.weight(layer, "k"), family.bias(layer, "k"), family.bias(layer, "v")):
            if name in specs and repeat > 1:
                check_repeats(name, _bytes(checkpoint, specs[name]), repeat, config["num_key_value_heads"])
    return len(block["layers"])


def _bytes(folder: Path, spec: TensorSpec) -> bytes:
    with (folder / spec.file).open("rb") as stream:
        stream.seek(spec.start)
        return stream.read(spec.bytes)


def _thirds(data: bytes, rows: int) -> tuple[bytes, bytes]:
    """The bytes of k and of v in a tensor that holds q, k and v side by side in each of its `rows`."""
    parts = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, 3, -1)
    return parts[:, 1].numpy().tobytes(), parts[:, 2].numpy().tobytes()


def verify(checkpoint: str | Path) -> Verification:
    """Recompute every checksum of the manifest, and check that the weights of K and V fit the form.

    Args:
        checkpoint: a folder that kvshare wrote.

    Raises:
        BadCheckpointError: a file is missing, was changed, or does not belong; or the weights do not fit the form.
    """
    folder = Path(checkpoint)
    form = read_block(folder)["form"]
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("size"), int) for entry in files.values()
    ):
        raise BadCheckpointError(f"{folder / MANIFEST} cannot be used", "it does not list the files", "convert the model again")
    for name, entry in sorted(files.items()):
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise BadCheckpointError(
                f"the file {name} is missing in {folder}", "the manifest names it", "copy the checkpoint again"
            )
        if file.stat().st_size != entry["size"] or sha256(file) != entry.get("sha256"):
            raise BadCheckpointError(
                f"the file {name} was changed or damaged",
                "its size or SHA-256 is not the manifest's",
                "copy the checkpoint again, or convert the model again",
            )
    unlisted = [name for name in weight_files(folder) if name not in files]
    if unlisted:
        raise BadCheckpointError(
            f"the file {unlisted[0]} is not in the manifest", "it is read as weights all the same", "copy the checkpoint again"
        )
    return Verification(len(files), sum(entry["size"] for entry in files.values()), verify_form(folder), form)
