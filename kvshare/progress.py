"""How long work reports: a function of stage, steps done and steps in all. The library calls it, the command line draws it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""
