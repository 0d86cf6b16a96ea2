"""Heads that a checkpoint holds several times, because layers of one native model all have equally many.

In: a checkpoint's config, the bytes of a projection. Out: how many heads of each layer differ; refusals.
Never: reads files, changes weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvshare.errors import BadCheckpointError


def shapes_of(checkpoint: Path, config: dict[str, Any], stored: int, head_dim: int) -> dict[int, tuple[int, int]]:
    """How many KV heads of a shared layer differ, and their head_dim, by layer, in the order of the kvshare block's layers.

    Args:
        checkpoint: what to call it.
        config: its config.json, with a kvshare block; one without `kv_heads` repeats nothing.
        stored: how many KV heads its weights have.
        head_dim: of all layers.

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
    return {layer: (count, head_dim) for layer, count in zip(layers, heads, strict=True)}


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
