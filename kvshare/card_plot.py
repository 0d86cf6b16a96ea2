"""The figure of a model card, drawn from the report alone.

In: the data of report.json. Out: the bytes of a PNG, or None where the report holds nothing to draw.
Never: writes a file, draws a number that is not in the report, gives other bytes for the same report.

PNG, not SVG: model pages show it wherever they are read, and an SVG may be served as text. Nothing in the file depends on when or
where it was drawn: matplotlib's own style instead of the user's, no version or date in the metadata.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # its import takes a second, and most commands draw nothing
    from matplotlib.axes import Axes

PLOT = "report.png"
WIDTH, HEIGHT, LEFT = 4.5, 3.2, 0.8  # of a panel, and what its labels take of it, in inches
BY_LAYER = {  # keys of a layer's report: how the figure names them
    "lost": "energy dropped by the closed form (predicted)",
    "error": "error of the attention output (measured)",
    "value_error": "error of values made of cached keys (predicted)",
}


def draw_plot(report: dict[str, Any]) -> bytes | None:
    """Perplexity of both models, errors by layer, the KL during healing: what of these the report holds, side by side.

    Args:
        report: as in report.json; keys that are missing leave their panel out.
    """
    panels = [panel for panel in (_perplexity(report), _layers(report), _healing(report)) if panel is not None]
    if not panels:
        return None
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"):
        figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), dpi=100)
        # room for labels as they are: measuring them takes longer than drawing
        width = WIDTH * len(panels)
        figure.subplots_adjust(LEFT / width, 0.5 / HEIGHT, 1 - 0.15 / width, 1 - 0.35 / HEIGHT, LEFT / (WIDTH - LEFT - 0.15))
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _perplexity(report: dict[str, Any]) -> Callable[[Axes], None] | None:
    if report.get("perplexity") is None or report.get("source_perplexity") is None:  # not measured, or not finite
        return None

    def draw(axes: Axes) -> None:
        values = [report["source_perplexity"], report["perplexity"]]
        errors = [report["source_perplexity_error"], report["perplexity_error"]]
        bars = [error or 0.0 for error in errors]  # one row of text has no standard error
        axes.bar(["source", "this model"], values, yerr=bars, capsize=4, color=["tab:gray", "tab:blue"])
        axes.set_ylabel("perplexity")
        axes.set_title("held-out text")

    return draw


def _layers(report: dict[str, Any]) -> Callable[[Axes], None] | None:
    layers = report.get("layers") or []
    series = {
        label: [(layer["layer"], layer[key]) for layer in layers if (layer.get(key) or 0) > 0] for key, label in BY_LAYER.items()
    }
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        for label, points in series.items():
            axes.semilogy(*zip(*points, strict=True), marker="o", label=label)
        axes.minorticks_off()
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("fraction")
        axes.set_title("the merge, layer by layer")
        axes.legend(fontsize="x-small")

    return draw


def _healing(report: dict[str, Any]) -> Callable[[Axes], None] | None:
    losses = (report.get("heal") or {}).get("losses") or []
    if len(losses) < 2:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*losses, strict=True))
        axes.set_xlabel("step")
        axes.set_ylabel("KL to the source, nats per token")
        axes.set_title("healing, on its own text")

    return draw
