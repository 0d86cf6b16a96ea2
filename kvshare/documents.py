"""The documents of a DATA argument, one after the other.

In: a `.txt` (documents separated by `<|endoftext|>`), `.jsonl` or `.parquet` file with a `text` field, or a `datasets` id
(`org/name[/config][:split]`). Out: their texts. Never: holds a whole file, runs code that lies beside a data set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvshare.errors import UsageError
from kvshare.mixture import ENDINGS, parts_of
from kvshare.parsing import MAX_BYTES, is_file, parse_json
from kvshare.sections import SELF

if TYPE_CHECKING:
    from datasets import IterableDataset

SEPARATOR = "<|endoftext|>"
SHUFFLE_DOCUMENTS = 10_000
LONGEST_DOCUMENT = 1 << 23  # characters
FORMS = "a .txt, .jsonl or .parquet file, a datasets id org/name[/config][:split], or 'self'; or several with weights, a=3,b=1"


def check_data(data: str) -> None:
    """Refuse a DATA argument that cannot be read, before anything is spent on it.

    Raises:
        UsageError: no such file, an unknown ending, not of the form of a datasets id, or a mixture that cannot be read.
    """
    for part in parts_of(data):
        _check_text(part.data)


def _check_text(data: str) -> None:
    path, exists = Path(data), os.path.exists(data)
    identifier = re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", data)
    # A configuration may hold a dot, as in wikimedia/wikipedia/20231101.en; elsewhere a dot is the ending of a file.
    if data == SELF or (identifier and not exists and (not path.suffix or (identifier[1] and path.suffix not in ENDINGS))):
        return
    if path.suffix not in ENDINGS:
        raise UsageError(f"the data {data!r} is of no known form", f"kvshare reads {FORMS}", "name one of these")
    if not is_file(data):
        raise UsageError(f"there is no file {data}", f"DATA is {FORMS}", "check the path")


def documents(data: str, seed: int | None = None) -> Iterator[str]:
    """The documents of a data set in their order, or shuffled by `seed` within a window of 10,000 documents. A document of more
    than 8 million characters, such as a large file without separators, comes as several: no tokenizer takes it at once.

    Args:
        data: any DATA argument but `self` and mixtures.

    Raises:
        UsageError: the data cannot be read or has no `text` field.
    """
    _check_text(data)
    try:
        stream = _stream(data)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_DOCUMENTS)
        for record in stream:
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UsageError(
                    f"a record of {data} has no text",
                    "every record needs a field 'text' that holds a string",
                    "rename the field, or give a .txt file",
                )
            text.encode()  # half a surrogate pair is no text
            while len(text) > LONGEST_DOCUMENT:
                part = _part(text)
                yield part
                text = text[len(part) :]
            if text.strip():
                yield text
    except UsageError:
        raise
    except Exception as error:  # the datasets library raises many kinds, all of them about the data
        raise UsageError(
            f"the data {data} cannot be read", (str(error).splitlines() or [type(error).__name__])[0], f"give {FORMS}"
        ) from error


def _stream(data: str) -> IterableDataset:
    from datasets import IterableDataset, load_dataset

    if data.endswith(".txt"):
        return IterableDataset.from_generator(_text_documents, gen_kwargs={"path": data})
    if data.endswith(".jsonl"):
        return IterableDataset.from_generator(_json_documents, gen_kwargs={"path": data})
    if data.endswith(".parquet"):
        return load_dataset("parquet", data_files=data, split="train", streaming=True)
    identifier, _, split = data.partition(":")
    organisation, name, *config = identifier.split("/")
    return load_dataset(f"{organisation}/{name}", *config, split=split or "train", streaming=True)


def _text_documents(path: str) -> Iterator[dict[str, str]]:
    """Documents of a text file; the file is read in pieces, so its size does not matter."""
    pending = ""
    with open(path, encoding="utf-8") as stream:
        while piece := stream.read(1 << 20):
            *complete, pending = (pending + piece).split(SEPARATOR)
            for document in complete:
                yield {"text": document.strip()}
            while len(pending) > LONGEST_DOCUMENT + len(SEPARATOR):  # part of a separator may stand at the end
                part = _part(pending)
                yield {"text": part.strip()}
                pending = pending[len(part) :]
    yield {"text": pending.strip()}


def _json_documents(path: str) -> Iterator[dict[str, Any]]:
    """The records of a file with one JSON value per line. Arrow's own reader ends the process where one is nested deeply."""
    with open(path, "rb") as stream:
        while line := stream.readline(MAX_BYTES + 1):
            if len(line) > MAX_BYTES:
                raise ValueError(f"a line is longer than {MAX_BYTES:,} bytes")
            if line.strip():
                record = parse_json(line)
                yield {"text": record.get("text") if isinstance(record, dict) else None}


def _part(text: str) -> str:
    """The beginning of a very long document, up to a space or the end of a line."""
    end = max(text.rfind(sign, LONGEST_DOCUMENT // 2, LONGEST_DOCUMENT) for sign in (" ", "\n"))
    return text[: LONGEST_DOCUMENT if end < 0 else end]
