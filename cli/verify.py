"""`kvshare verify`: is a checkpoint what kvshare wrote?"""

from __future__ import annotations

from kvshare.cli import options


def run(checkpoint: options.Checkpoint, quiet: options.Quiet = False) -> None:
    """Recompute every checksum, and check that the weights of K and V fit the form: equal bit for bit, or exact."""
    from kvshare import verify

    result = verify(checkpoint)
    print(f"{checkpoint}: {result.files} files, {result.bytes:,} bytes, {result.layers} {result.form} layers, all as written")
