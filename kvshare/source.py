"""A source model as its headers describe it.

In: a Hub id (with `@revision`), a local folder or `kvshare/tiny`. Out: a `Source`: config, commit, one `TensorSpec` per tensor.
Never: reads weights, unpickles, runs code that lies beside a model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.families import FAMILIES
from kvshare.headers import TensorSpec, read_header
from kvshare.parsing import is_file, is_folder, parse_json, read_bytes, shown
from kvshare.text_models import text_config, text_names

TINY = "kvshare/tiny"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
ADAPTER = "adapter_config.json"
CHECKPOINT_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # what transformers prefers to all other weights
REDIRECTIONS = ("transformers_weights", "fusion_config")  # fields of a config that make transformers load something else
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclass(frozen=True)
class Source:
    """What is known of a model before a weight is read.

    `name` is the Hub id or the folder's name; `commit` the Hub commit or None for a local folder; `tensors`
    are keyed by name; `file_bytes` are the sizes of the weight files. Of a checkpoint that holds images or audio beside a text
    model, config and tensors are those that the text model would have alone; `whole` is then its architecture.
    """

    name: str
    path: Path
    commit: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    file_bytes: dict[str, int]
    tokenizer_files: tuple[str, ...]
    whole: str | None = None

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""
        return str(self.config.get("model_type", ""))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the source in a converted checkpoint and when work is resumed."""
        found = {"name": self.name, "commit": self.commit, "file_bytes": self.file_bytes}
        return found if self.whole is None else found | {"whole": self.whole}


def open_source(model: str | Path) -> Source:
    """Read config.json and every safetensors header of a model.

    Args:
        model: a local folder, a Hub id `org/name` or `org/name@revision`, or `kvshare/tiny`.

    Raises:
        UsageError: no such folder, or the Hub does not give the model.
        BadCheckpointError: a missing shard, a damaged header, an index that does not fit its files.
        UnsupportedModelError: the weights are not safetensors.
    """
    name, path, commit = _locate(str(model))
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise BadCheckpointError(
            f"{path / 'config.json'} is not a JSON object", "it holds another kind of value", "download the model again"
        )
    refuse_redirections(config, os.listdir(path), str(path))
    files = weight_files(path)
    tensors = read_tensor_specs(path, files)
    present = tuple(file for file in TOKENIZER_FILES if is_file(path / file))
    sizes = {file: (path / file).stat().st_size for file in files}
    return without_images(Source(name, path, commit, config, tensors, sizes, present))


def without_images(source: Source) -> Source:
    """The text model of a source that holds more; otherwise the source as it is."""
    config = text_config(source.path, source.config)
    if config is None:
        return source
    names = text_names(source.tensors, FAMILIES[config["model_type"]])
    tensors = {name: replace(source.tensors[stored], name=name) for stored, name in names.items()}
    architectures = source.config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    whole = named if isinstance(named, str) and named.isidentifier() else source.model_type
    return replace(source, config=config, tensors=tensors, whole=whole)


def _locate(model: str) -> tuple[str, Path, str | None]:
    """The name, the local folder and the commit of a model; downloads from the Hub what is not in its cache."""
    if model == TINY:
        return TINY, Path(str(resources.files("kvshare") / "tiny")), None
    if is_folder(model):
        # where a folder lies is nobody's business: only its name goes into outputs
        return Path(model).resolve().name, Path(model), None
    repository, revision = hub_id(model) or ("", None)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.md", "*.model", "*.jinja", "LICENSE*", "NOTICE*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise refused(model, error) from None
    return repository, folder, folder.name


def hub_id(model: str) -> tuple[str, str | None] | None:
    """Repository and revision of a Hub id; None for `kvshare/tiny` and for a folder.

    Raises:
        UsageError: `model` is none of the three.
    """
    if model == TINY or is_folder(model):
        return None
    repository, _, revision = model.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repository):
        raise UsageError(
            f"no model {model!r}",
            "it is neither a folder nor a Hub id of the form org/name",
            "check the path, or write org/name or org/name@revision",
        )
    return repository, revision or None


def refused(model: str, error: Exception) -> UsageError:
    """What a user reads when the Hub does not give a model."""
    return UsageError(
        f"the Hub does not give {model!r}",
        str(error).splitlines()[0] if str(error) else repr(error),
        "check the id, the revision, your network and `hf auth login`; or pass a local folder",
    )


def refuse_redirections(config: Mapping[str, Any], files: Collection[str], model: str) -> None:
    """Refuse a model of which transformers would load something else than its headers say.

    Args:
        config: the content of config.json.
        files: the names of all files beside it.
        model: what to call it.

    Raises:
        UnsupportedModelError: a field or a file that makes transformers do so.
    """
    for key in REDIRECTIONS:
        if config.get(key) is not None:
            raise UnsupportedModelError(
                f"config.json of {model} has {key} = {shown(config[key])}",
                "with it, transformers loads something else than the weights whose headers kvshare has checked",
                "remove that entry if you know what it was for; otherwise choose another model",
            )
    if ADAPTER in files:
        raise UnsupportedModelError(
            f"{model} holds an adapter beside the model",
            f"with {ADAPTER} there, transformers loads the adapter's weights on top of the model's",
            f"merge the adapter into the model, or copy the model to a folder without {ADAPTER}",
        )


def weight_files(path: Path) -> tuple[str, ...]:
    """The safetensors files of a model folder, as its index names them; a file beside the index is never read.

    Raises:
        BadCheckpointError: the index names a file that is missing, is no safetensors file or lies outside the folder; or there are
            other weights that transformers would read in their place.
        UnsupportedModelError: there are no safetensors.
    """
    if is_file(path / INDEX):
        named = sorted({inside(file, str(path)) for file in read_index(path).values()})
        for file in named:
            if not is_file(path / file):
                raise BadCheckpointError(f"the shard {file} is missing in {path}", f"{INDEX} names it", "download the model again")
    elif is_file(path / SINGLE):
        named = [SINGLE]
    else:
        raise _no_weights(path)
    others = [file.name for file in path.iterdir() if CHECKPOINT_SHARD.fullmatch(file.name)]
    if named != [SINGLE] and is_file(path / SINGLE):
        others.append(SINGLE)
    if others:
        raise BadCheckpointError(
            f"{path} holds {min(others)} beside the weights that it names",
            f"transformers would read that file in place of {named[0]}",
            "remove the weights that are not the model's, or download it again",
        )
    return tuple(named)


def _no_weights(path: Path) -> UnsupportedModelError | BadCheckpointError:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        return UnsupportedModelError(
            f"{path} holds no safetensors, only {pickled[0]}",
            "pickled weights can run code when they are read, so kvshare does not read them",
            "load it once with transformers and call save_pretrained, which writes safetensors",
        )
    return BadCheckpointError(
        f"{path} holds no weights", f"there is neither {SINGLE} nor {INDEX}", "give the folder of a complete model"
    )


def read_index(path: Path) -> dict[str, str]:
    """The tensor-to-file map of a sharded model."""
    index = read_json(path / INDEX)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(file, str) for file in weights.values()):
        raise BadCheckpointError(
            f"{path / INDEX} has no usable weight_map", "it must map tensor names to file names", "download the model again"
        )
    return weights


def inside(file: str, model: str) -> str:
    """The name of a shard, which lies in the model's own folder.

    Raises:
        BadCheckpointError: it would lie elsewhere, or is no safetensors file.
    """
    if Path(file).name != file or not file.endswith(".safetensors"):
        raise BadCheckpointError(
            f"{INDEX} of {model} names the file {file!r}",
            "a shard must be a safetensors file in the model's own folder",
            "do not use this model; download it from a source you trust",
        )
    return file


def read_tensor_specs(path: Path, files: tuple[str, ...]) -> dict[str, TensorSpec]:
    """The headers of all files, merged and held against the index.

    Raises:
        BadCheckpointError: a damaged header, a tensor in two files, or an index that disagrees with the files.
    """
    specs = [spec for file in files for spec in read_header(path / file)]
    return by_name(specs, read_index(path) if is_file(path / INDEX) else {})


def by_name(specs: Iterable[TensorSpec], index: Mapping[str, str]) -> dict[str, TensorSpec]:
    """The tensors of all files, held against the index.

    Raises:
        BadCheckpointError: a tensor in two files, or one that is not where the index says.
    """
    tensors: dict[str, TensorSpec] = {}
    for spec in specs:
        if spec.name in tensors:
            raise BadCheckpointError(
                f"the tensor {spec.name} is in two files",
                f"both {tensors[spec.name].file} and {spec.file} hold it",
                "download the model again",
            )
        tensors[spec.name] = spec
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise BadCheckpointError(
                f"the tensor {name} is not in {file}", f"{INDEX} says that it is there", "download the model again"
            )
    return tensors


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        BadCheckpointError: the file is missing or is not JSON.
    """
    try:
        return parse_json(read_bytes(file))
    except FileNotFoundError:
        raise BadCheckpointError(f"{file} is missing", "a model folder needs it", "give the folder of a complete model") from None
    except (OSError, ValueError) as error:
        raise BadCheckpointError(f"{file} cannot be read", str(error), "download that file again") from None
