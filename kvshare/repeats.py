"""Heads that a checkpoint holds several times, because layers of one native model all have equally many.

In: a checkpoint's config, the bytes of a projection. Out: how often each layer holds each of its heads; refusals.
Never: reads files, changes weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvshare.errors import BadCheckpointError


def repeats_of(checkpoint: Path, config: dict[str, Any], stored: int) -> list[int]:
    """How often every shared layer holds each of its heads, in the order of the kvshare block's layers.

    Args:
        checkpoint: what to call it.
        config: its config.json, with a kvshare block; one without `kv_heads` repeats nothing.
        stored: how many KV heads its weights have.

    Raises:
        BadCheckpointError: `kv_heads` does not fit the layers, or does not divide the stored heads.
    """
    block = config["kvshare"]
    layers = block["layers"]
    heads = block.get("kv_heads", [stored] * len(layers))
    if (
        not isinstance(heads, list)
        or len(heads) != len(layers)
        or not all(type(count) is int and count > 0 and stored % count == 0 for count in heads)
    ):
        raise BadCheckpointError(
            f"the kvshare block of {checkpoint} cannot be used",
            f"its kv_heads {heads!r} do not fit its {len(layers)} layers of {stored!r} stored heads",
            "convert the model again",
        )
    return [stored // count for count in heads]


def shapes_of(checkpoint: Path, config: dict[str, Any], stored: int, head_dim: int) -> dict[int, tuple[int, int]]:
    """KV heads that differ, and head_dim, of every shared layer; for the arguments and errors see `repeats_of`."""
    repeats = zip(config["kvshare"]["layers"], repeats_of(checkpoint, config, stored), strict=True)
    return {layer: (stored // repeat, head_dim) for layer, repeat in repeats}


def check_repeats(name: str, rows: bytes, repeat: int, heads: int) -> None:
    """Check that the `heads` heads of a projection come in runs of `repeat` equal ones.

    Args:
        name: of the tensor.
        rows: its bytes; heads are equally long parts of them.
        repeat: divides `heads`.
        heads: how many are stored.

    Raises:
        BadCheckpointError: two heads that should be equal differ.
    """
    size = len(rows) // heads
    parts = [rows[place * size : (place + 1) * size] for place in range(heads)]
    for place, part in enumerate(parts):
        if part != parts[place - place % repeat]:
            raise BadCheckpointError(
                f"{name} does not hold each of its heads {repeat} times: head {place} differs from the one before it",
                "the shared cache keeps one of each and would compute another function than the stored weights",
                "convert the model again; train shared models through kvshare only",
            )
