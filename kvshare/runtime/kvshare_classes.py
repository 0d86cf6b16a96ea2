# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Native classes with methods of the shared form.

In: a native class and what is to be other in it. Out: a class under the native name, whose objects can be pickled and copied.
Never: changes the native class; goes on with a version of transformers that it would get wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 4):
    raise ImportError(
        "the form that a kvshare checkpoint brings with it needs transformers 5.4 or later, and this is "
        f"{transformers.__version__}: update it, or load the checkpoint without trust_remote_code, in its native form, whose cache "
        "is of full size"
    )


def derived(make: Callable[[Any], Any], native: type, members: dict[str, Any]) -> Any:
    """A class that has its own name nowhere, so that its objects name the function that gives it when they are pickled.

    Args:
        make: this function of a module, which gives the class for `native`, the same one every time.
        native: the class that it derives from.
        members: methods and attributes that are added or take the place of native ones.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        if type(self) is not made:  # of a class that others have derived in turn
            return super(made, self).__reduce_ex__(protocol)
        return _blank, (make, native), self.__getstate__()

    made: Any = type(native.__name__, (native,), {"__module__": make.__module__, "__reduce_ex__": reduce, **members})
    return made


def unknown(native: Any, what: str) -> ImportError:
    """That a class of this version of transformers does something that the shared form would get wrong."""
    return ImportError(
        f"{native.__name__} of transformers {transformers.__version__} {what} that this file does not know: use another version, "
        "or load the checkpoint without trust_remote_code, in its native form, whose cache is of full size"
    )


def _blank(make: Callable[[Any], Any], native: type) -> Any:
    """An object of a derived class, before its state is set."""
    made = make(native)
    return made.__new__(made)
