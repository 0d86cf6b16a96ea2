"""The processes that `accelerate launch` (or torchrun) started together, if it did.

In: what the launcher says in the environment. Out: how many there are, which one this is, and a point where all meet.
Never: starts a process; imports accelerate where there is one alone.
"""

from __future__ import annotations

import os

from kvshare.errors import UsageError


def count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes; alone, it always is."""
    return int(os.environ.get("RANK", "0")) == 0


def meet() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def require_one(verb: str) -> None:
    """Refuse work that one process does alone.

    Raises:
        UsageError: there are several.
    """
    if count() > 1:
        raise UsageError(
            f"{verb} was started in {count()} processes",
            "they would all do the same and write the same output; healing alone is shared among processes",
            f"run {verb} by itself with --no-heal, and start `kvshare heal` with accelerate launch",
        )


def require_copies() -> None:
    """Refuse launchers that cut a model into parts.

    Raises:
        UsageError: accelerate was told to use FSDP or DeepSpeed.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"healing does not run under {name}",
                "LoRA is merged and the shared projections are read from whole weights in every process",
                "start it with DDP (distributed_type: MULTI_GPU), which holds a copy of both models on every device",
            )
