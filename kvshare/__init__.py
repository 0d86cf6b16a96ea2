"""kvshare: take a pretrained Hugging Face model and give it back with half the KV cache or less.

The public API is the verbs: `inspect`, `plan`, `calibrate`, `convert`, `heal`, `evaluate`, `bench`, `verify`, `push`, `load`. They
are loaded when first used, so that importing kvshare costs nothing. What a program has made torch's default dtype and device does
not reach them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvshare.benching import bench as bench
    from kvshare.conversion import convert as convert
    from kvshare.errors import KVShareError as KVShareError
    from kvshare.evaluation import evaluate as evaluate
    from kvshare.healing import heal as heal
    from kvshare.inspection import inspect as inspect
    from kvshare.loading import load as load
    from kvshare.planning import plan as plan
    from kvshare.publishing import push as push
    from kvshare.recipe import load_recipe as load_recipe
    from kvshare.statistics import calibrate as calibrate
    from kvshare.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "bench": "benching",
    "calibrate": "statistics",
    "convert": "conversion",
    "evaluate": "evaluation",
    "heal": "healing",
    "inspect": "inspection",
    "KVShareError": "errors",
    "load": "loading",
    "load_recipe": "recipe",
    "plan": "planning",
    "push": "publishing",
    "verify": "verification",
}

__all__ = [*_HOMES]


@functools.cache
def _with_own_defaults(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that computes by torch's own default dtype and device, and leaves those of the program as they are."""

    @functools.wraps(verb)
    def called(*arguments: Any, **named: Any) -> Any:
        torch: Any = sys.modules.get("torch")
        if torch is None:  # then nobody has changed them
            return verb(*arguments, **named)
        with ExitStack() as outside:
            if torch.get_default_dtype() != torch.float32:
                outside.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(torch.float32)
            if torch.get_default_device().type != "cpu":
                outside.enter_context(torch.device("cpu"))
            return verb(*arguments, **named)

    return called


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvshare' has no attribute {name!r}")
    found = getattr(import_module(f"kvshare.{_HOMES[name]}"), name)
    return found if isinstance(found, type) else _with_own_defaults(found)
