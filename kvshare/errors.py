"""Errors that a user can act on.

In: what happened, why, and what to do about it. Out: an exception whose text is those three lines.
Never: wraps a bug of our own; those stay ordinary tracebacks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 2_000  # characters of a line


class KVShareError(Exception):
    """A refusal or a failure with its reason and its remedy. `exit_code` is what the command line returns.

    Each of the three is one line: names in it may come from a stranger's file, and are neither obeyed by a terminal nor endless.
    `keeps_work` says that unfinished work is worth going on with, where a command can.
    """

    exit_code = 2

    def __init__(self, what: str, why: str, fix: str, keeps_work: bool = False) -> None:
        self.what, self.why, self.fix = (_one_line(text) for text in (what, why, fix))
        self.keeps_work = keeps_work
        super().__init__(f"{self.what}\n  why: {self.why}\n  do:  {self.fix}")


class UsageError(KVShareError):
    """An argument, a recipe or a data set that cannot be used (exit code 2)."""


class TrainingError(KVShareError):
    """Training that cannot start, or that came to nothing (exit code 2)."""


class UnfinishedWorkError(UsageError):
    """Unfinished work of another run is in the way; it is kept (exit code 2)."""


class UnsupportedModelError(KVShareError):
    """A model whose attention cannot be shared, or not by this version (exit code 3)."""

    exit_code = 3


class BadCheckpointError(KVShareError):
    """Files that are missing, damaged or inconsistent (exit code 4)."""

    exit_code = 4


class NoSpaceError(KVShareError):
    """The output does not fit on the disk (exit code 5)."""

    exit_code = 5


class QualityError(KVShareError):
    """The result is worse than what was asked for (exit code 6)."""

    exit_code = 6


def _one_line(text: str) -> str:
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in short)


def closest(name: str, known: Iterable[str]) -> str:
    """`did you mean ...?` for a misspelt name, or the known names when nothing is close."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(names)}"
