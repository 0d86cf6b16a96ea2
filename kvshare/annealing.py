"""Progressive sharing: attention passes from the source's to the student's over the first part of healing.

In: the attention modules of student and teacher that correspond, and how far training is. Out: hooks that mix their outputs.
Never: changes a weight, costs anything once the passage is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def passage(step: int, steps: int, part: float) -> float:
    """How much of attention is the student's own at a step, from 0 at the first step to 1 after `part` of all steps."""
    return 1.0 if part == 0 else min(1.0, step / (part * steps))


@contextmanager
def annealed(layers: Sequence[tuple[nn.Module, nn.Module]], own: Callable[[], float]) -> Iterator[None]:
    """Within, attention gives a * student + (1 - a) * teacher, both of the student's hidden states; gradients pass through both.

    The outputs are mixed, not K and V: the merge turns the basis of K and V and joins their heads, the outputs stay comparable.

    Args:
        layers: attention modules of student and teacher, whose outputs are (rows, length, hidden).
        own: gives a, in 0 to 1, at every forward.
    """

    def mix(teacher: nn.Module) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            share = own()
            if share >= 1:
                return None
            first = output[0] if isinstance(output, tuple) else output
            wanted = teacher(*args, **kwargs)
            mixed: Tensor = share * first + (1 - share) * (wanted[0] if isinstance(wanted, tuple) else wanted)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    handles = [student.register_forward_hook(mix(teacher), with_kwargs=True) for student, teacher in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
