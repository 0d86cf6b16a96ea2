"""Which job a saved training state belongs to, so that no two are ever mixed.

In: settings, a source, rows of tokens. Out: a refusal that names the first field that differs, or nothing.
Never: changes a training state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kvshare.checkpoint import sha256, write_json
from kvshare.errors import UsageError
from kvshare.source import Source, read_json

JOB, ROWS = "job.json", "rows.json"
MISSING = "absent"


def identity(source: Source) -> dict[str, Any]:
    """What tells one source from another: its commit, or the SHA-256 of each weight file of a local folder, wherever it lies."""
    if source.commit is not None:
        return {"name": source.name, "commit": source.commit}
    return {"files": {file: sha256(source.path / file) for file in source.file_bytes}}


def check_state(state: Path, job: dict[str, Any]) -> None:
    """Refuse to resume what is not there or was another job; nothing is touched.

    Raises:
        UsageError: there is nothing to resume, or it belongs to a job with other settings; the first field is named.
    """
    if not (state / JOB).is_file():
        raise UsageError("there is nothing to resume", f"{state} holds no training state", "run the command without --resume")
    earlier, now = dict(_fields(read_json(state / JOB))), dict(_fields(job))
    for field in [*now, *(field for field in earlier if field not in now)]:
        was, is_now = earlier.get(field, MISSING), now.get(field, MISSING)
        if was != is_now:
            raise UsageError(
                f"the saved training state is of another job: {field} differs",
                f"it was {was!r} and is now {is_now!r}",
                "repeat the earlier settings, or run without --resume to start again",
            )


def check_rows(state: Path, rows: Tensor) -> None:
    """Refuse to resume on other text than the training state has seen; a new state takes note of its text.

    Args:
        state: the folder of the training state.
        rows: token ids (rows, length), in the order of training.

    Raises:
        UsageError: the text under the same name has changed.
    """
    found = {"rows": list(rows.shape), "sha256": hashlib.sha256(rows.contiguous().numpy().data).hexdigest()}
    if not (state / ROWS).is_file():
        write_json(state / ROWS, found)
        return
    earlier = read_json(state / ROWS)
    for field, value in found.items():
        if earlier.get(field) != value:
            raise UsageError(
                "the saved training state is of another text: heal.data has the same name, and its tokens differ",
                f"{field} was {earlier.get(field)!r} and is now {value!r}",
                "put the earlier text back, or run without --resume to start again",
                keeps_work=True,
            )


def _fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
