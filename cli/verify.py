"""`kvshare verify`: is a checkpoint what kvshare wrote?"""

from __future__ import annotations

from kvshare.cli import options


def run(checkpoint: options.Checkpoint) -> None:
    """Recompute every checksum, and check that the weights of K and V are equal bit for bit."""
    from kvshare import verify

    result = verify(checkpoint)
    print(f"{checkpoint}: {result.files} files, {result.bytes:,} bytes, {result.layers} shared layers, all as written")
