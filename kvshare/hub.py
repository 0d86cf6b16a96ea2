"""A Hub model as its headers describe it, without downloading its weights.

In: a Hub id (with `@revision`) or whatever else names a model. Out: a `Source` for planning.
Never: downloads weights, sends anything but what the hub client sends to read a public or permitted file.
"""

from __future__ import annotations

from pathlib import Path

from kvshare.errors import BadCheckpointError, UnsupportedModelError, UsageError
from kvshare.headers import TensorSpec, tensor_spec
from kvshare.source import (
    GENERATION,
    TOKENIZER_FILES,
    Source,
    by_name,
    hub_id,
    inside,
    open_source,
    read_json,
    refuse_redirections,
    refused,
    without_images,
)


def describe(model: str | Path) -> Source:
    """Read config.json and every safetensors header of a model; of a Hub model, these and its tokenizer alone.

    A Hub model's tensors have offsets in the data of their file, not in the file. Without a network, the hub client's cache is
    read, as `open_source` does.

    Args:
        model: a local folder, a Hub id `org/name` or `org/name@revision`, or `kvshare/tiny`.

    Raises:
        UsageError, BadCheckpointError, UnsupportedModelError: as `open_source`.
    """
    named = hub_id(str(model))
    if named is None:
        return open_source(model)
    repository, revision = named
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    if constants.is_offline_mode():
        return open_source(model)
    api = HfApi()
    failures: tuple[type[Exception], ...] = (*http_errors(), OSError, ValueError)
    try:
        info = api.model_info(repository, revision=revision, files_metadata=True)
        names = {file.rfilename: file.size or 0 for file in info.siblings or []}
        folder = Path(
            snapshot_download(repository, revision=info.sha, allow_patterns=["config.json", GENERATION, *TOKENIZER_FILES])
        )
        found = api.get_safetensors_metadata(repository, revision=info.sha)
    except NotASafetensorsRepoError:
        raise UnsupportedModelError(
            f"{model} holds no safetensors",
            "other weight files can run code when they are read, so kvshare does not read them",
            "load it once with transformers and call save_pretrained, which writes safetensors",
        ) from None
    except SafetensorsParsingError as error:
        raise BadCheckpointError(f"a weight file of {model} is damaged", str(error).splitlines()[0], "tell its author") from None
    except failures as error:
        raise refused(str(model), error) from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        # what the hub client says of headers and indices whose fields are of other kinds than it expects
        raise BadCheckpointError(f"the weight files of {model} are damaged", repr(error), "tell its author") from None
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise BadCheckpointError(
            f"config.json of {model} is not a JSON object", "it holds another kind of value", "tell its author"
        )
    refuse_redirections(config, names, str(model))
    specs: list[TensorSpec] = []
    for file, header in sorted(found.files_metadata.items()):

        def damaged(why: str, file: str = inside(file, str(model))) -> BadCheckpointError:
            return BadCheckpointError(f"the file {file} is damaged", why, "tell its author")

        for name, entry in header.tensors.items():
            fields = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": entry.data_offsets}
            specs.append(tensor_spec(name, fields, file, 0, damaged))
    if not specs:
        raise UsageError(f"{model} holds no tensors", "its weight files are empty", "check the id and the revision")
    tensors = by_name(specs, found.weight_map)
    sizes = {file: names.get(file, 0) for file in sorted(found.files_metadata)}
    present = tuple(file for file in TOKENIZER_FILES if file in names)
    return without_images(Source(repository, folder, info.sha, config, tensors, sizes, present))


def http_errors() -> tuple[type[Exception], ...]:
    """What the hub client raises for requests that fail: its own errors, and those of the HTTP client beneath, which it passes
    on when a server cannot be reached and which has another name from one version to the next.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ in {"HTTPError", "HfHubHTTPError"})
