"""JSON and YAML of strangers as plain values.

In: a file, bytes, text. Out: dictionaries, lists, strings, numbers; or a ValueError that says in one line what is wrong.
Never: reads more than a limit, waits for what is no file, builds objects of other kinds, returns what is nested so deeply or holds
numbers so long that whoever walks through it fails.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 100_000_000  # of a JSON file; it is what safetensors sets for its headers
MAX_YAML = 1_000_000  # bytes; the parser takes seconds for as many
MAX_DEPTH = 64
MAX_DIGITS = 100


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file; a path that no file can have (too long, with a NUL) is none, too."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; a path that none can have is none, too."""
    return os.path.isdir(path)


def read_bytes(file: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is larger than `most` bytes.
    """
    if not is_file(file):
        raise FileNotFoundError(f"there is no file {file}")
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return content


def parse_json(raw: bytes, unique: bool = False) -> Any:
    """JSON in UTF-8.

    Args:
        raw: the bytes.
        unique: refuse a key that occurs twice in one object; otherwise the last one counts, as it does for others.

    Raises:
        ValueError: it is not JSON, or nested too deeply, or holds a number that is too long.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_int=_integer, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


class _Loader(yaml.SafeLoader):
    """Plain values, and none of them twice: a few aliases of aliases stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def parse_yaml(raw: bytes) -> Any:
    """YAML in UTF-8, without aliases.

    Raises:
        ValueError: it is not YAML, or too large, nested too deeply, or holds something that is no plain value.
    """
    if len(raw) > MAX_YAML:
        raise ValueError(f"it is larger than {MAX_YAML:,} bytes")
    try:
        value = yaml.load(raw.decode("utf-8-sig"), Loader=_Loader)
        _check_depth(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # the parser fails in its own ways on values that are not what their tag or their look says, such as 2001-99-99
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple | set) else ()


def shown(value: Any) -> str:
    """A value for an error message, cut short."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
