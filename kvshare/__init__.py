"""kvshare: take a pretrained Hugging Face model and give it back with half the KV cache or less.

The public API is the verbs: `inspect`, `plan`, `calibrate`, `convert`, `heal`, `evaluate`, `bench`, `verify`, `push`, `load`. They
are loaded when first used, so that importing kvshare costs nothing.
"""

from __future__ import annotations

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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"kvshare.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'kvshare' has no attribute {name!r}")
