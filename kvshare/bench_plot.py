"""What was timed as one picture.

In: runs. Out: a PNG file. Never: measures, needs a screen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvshare.errors import UsageError
from kvshare.timing import Run, Timing


def check_plots() -> None:
    """Refuse to begin what could not be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "the benchmark cannot be drawn", "matplotlib is not installed", "pip install matplotlib, or leave -o out"
        ) from None


def draw_runs(runs: Sequence[Run], title: str, file: Path) -> None:
    """Ratios of prefill and decode time with quartiles, cache bytes per token and peak memory, over context, by batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(title)
    _ratios(axes[0][0], runs, "prefill time, checkpoint / source", lambda run: run.prefill)
    _ratios(axes[0][1], runs, "decode time, checkpoint / source", lambda run: run.decode)
    _bytes(axes[1][0], runs, "cache, bytes per token", lambda run: (run.cache_bytes_per_token, run.source_cache_bytes_per_token))
    _bytes(axes[1][1], runs, "peak memory, MB", lambda run: (run.peak_bytes / 1e6, run.source_peak_bytes / 1e6))
    for panel in axes.flat:
        panel.set_xlabel("context, tokens")
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
    axes[1][1].legend(fontsize="small")
    figure.savefig(file, format="png", metadata={"Software": None})  # equal figures, equal bytes


def _by_batch(runs: Sequence[Run]) -> dict[int, list[Run]]:
    sizes = sorted({run.batch_size for run in runs})
    return {size: sorted((run for run in runs if run.batch_size == size), key=lambda run: run.context) for size in sizes}


def _ratios(panel: Any, runs: Sequence[Run], title: str, pick: Callable[[Run], Timing]) -> None:
    for size, group in _by_batch(runs).items():
        ratios = [pick(run).ratio for run in group]
        below = [ratio.median - ratio.lower_quartile for ratio in ratios]
        above = [ratio.upper_quartile - ratio.median for ratio in ratios]
        contexts = [run.context for run in group]
        panel.errorbar(contexts, [r.median for r in ratios], (below, above), marker="o", capsize=3, label=f"batch {size}")
    panel.axhline(1, color="grey", linewidth=1)
    panel.set_title(title)
    panel.legend(fontsize="small")


def _bytes(panel: Any, runs: Sequence[Run], title: str, pick: Callable[[Run], tuple[float, float]]) -> None:
    for index, (size, group) in enumerate(_by_batch(runs).items()):
        contexts, colour = [run.context for run in group], f"C{index}"
        panel.plot(contexts, [pick(run)[0] for run in group], marker="o", color=colour, label=f"batch {size}")
        panel.plot(
            contexts, [pick(run)[1] for run in group], marker="x", color=colour, linestyle="--", label=f"batch {size}, source"
        )
    panel.set_title(title)
