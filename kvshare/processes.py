"""The processes that `accelerate launch` (or torchrun) started together, if it did.

In: what the launcher says in the environment. Out: how many there are, which one this is, and a point where all meet.
Never: starts a process; imports accelerate where there is one alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from kvshare.errors import UsageError

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
PATIENCE = timedelta(days=7)  # how long one waits for the others; that one of them has died, the launcher sees at once


def count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which of those on this machine this is, from 0: the number of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that publishes; alone, it always is."""
    return rank() == 0


def is_own(place: int) -> bool:
    """Whether this process does the work at a place of a list that is dealt out in turn."""
    return place % count() == rank()


def meet() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        state = PartialState(timeout=PATIENCE)  # joins them and takes this one's device
        # its own waiting does not wait where there are several processes and no GPU
        torch.distributed.barrier(device_ids=[local_rank()] if state.device.type == "cuda" else None)


def require_one(what: str, why: tuple[str, str] | None) -> None:
    """Refuse work that one process does alone.

    Args:
        what: was started.
        why: it is for one process, and what to do; None where it is for any number.

    Raises:
        UsageError: there are several, and there is a reason.
    """
    if count() > 1 and why is not None:
        raise UsageError(f"{what} was started in {count()} processes, and takes one", *why)


def require_known_launcher() -> None:
    """Refuse launchers whose way of sharing the work healing does not know.

    Raises:
        UsageError: accelerate was told to use the first FSDP, FSDP with weights in the memory of the CPU, or DeepSpeed with what
            the recipe decides or with weights that are cut.
    """
    if _says(DEEPSPEED):
        _require_known_deepspeed()
    if not _says(FSDP):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "healing does not run under the first FSDP",
            "it flattens weights that are trained and weights that are not into one tensor",
            "set fsdp_version: 2, or start it with recipes/accelerate/fsdp2.yaml",
        )
    if _says("FSDP_OFFLOAD_PARAMS"):
        raise UsageError(
            "healing does not move weights to the memory of the CPU",
            "fsdp_offload_params is set, and cut weights stay on the devices",
            "set fsdp_offload_params: false; heal.teacher_top_k and heal.gradient_checkpointing save memory, too",
        )


def _require_known_deepspeed() -> None:
    """See `require_known_launcher`."""
    remedy = "start it with recipes/accelerate/deepspeed.yaml, or cut frozen weights with fsdp2.yaml"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        raise UsageError(
            "healing takes no configuration file of DeepSpeed",
            "optimizer, schedule, precision and batches are the recipe's, and such a file may say otherwise",
            remedy,
        )
    if stage not in ("0", "1", "2"):
        raise UsageError(
            f"healing does not run under DeepSpeed's ZeRO-{stage}",
            "it cuts the weights of one model, and student and teacher hold most of theirs together",
            remedy,
        )
    for variable, field, plain in (
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "offload_optimizer_device", "none"),
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision", "no"),
    ):
        if os.environ.get(variable, plain) != plain:
            raise UsageError(
                f"healing under DeepSpeed does not take {field}: {os.environ[variable]}",
                "it would change the optimizer, or the dtype of the weights that are trained",
                f"set {field}: {plain!r}; the recipe's heal.dtype says in what forwards compute",
            )


def partitions() -> bool:
    """Whether DeepSpeed trains, which keeps gradients and the optimizer's means in one part per process."""
    return _says(DEEPSPEED)


def cuts() -> bool:
    """Whether the launcher wants weights cut, so that each process holds its part of them."""
    return count() > 1 and _says(FSDP)


@contextmanager
def uncut() -> Iterator[None]:
    """Within, libraries find several processes, and nothing of FSDP: they would read weights in the first process alone, cut what
    they are given, and not let weights be trained beside those that are cut.
    """
    said = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[FSDP] = said


def _says(name: str) -> bool:
    """Whether the launcher has set a variable."""
    return os.environ.get(name, "false").lower() == "true"
