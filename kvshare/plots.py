"""The plots of an inspection.

In: an `Inspection`. Out: `Plot`s, and each of them as the text of an SVG or the bytes of a PNG.
Never: writes files, changes matplotlib's global state, needs a screen.

Text and axes are drawn in one ink, `INK`, on nothing, so that a page can give them its own colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kvshare.findings import Inspection, LayerFigures

INK = "#1c2024"
KEYS, VALUES, BOTH, WORST = "#3f7fc4", "#d9822b", "#2f9e7d", "#c4524e"  # as readable on light as on dark
WIDTH, HEIGHT = 5.2, 3.2  # inches
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}


@dataclass(frozen=True)
class Plot:
    """One figure: its file's name, a title, what it shows in a sentence or two, and how to draw it on axes."""

    name: str
    title: str
    caption: str
    height: float
    paint: Callable[[Figure, Axes], None]


def draw(inspection: Inspection) -> tuple[Plot, ...]:
    """The plots that the inspection has figures for, in the order of the page."""
    layers = inspection.convertible
    heads = "mean over heads, band from the lowest to the highest head"
    plots = [
        Plot(
            "cache",
            "KV cache per token",
            "Bytes of cache for one token against the fraction saved. Fewer heads are GQA, one head is MQA; below the stored width "
            "each head of each token has a 16-bit scale.",
            max(HEIGHT, 0.9 + 0.34 * len(inspection.cache) / 3),
            lambda figure, axes: _cache(axes, inspection),
        )
    ]
    if not layers:
        return tuple(plots)
    plots += [
        Plot(
            "budget",
            "Predicted damage against cache budget",
            "The least damage that the layers' predictions add up to within a cache, and equally many shared heads in every layer.",
            HEIGHT,
            lambda figure, axes: _budget(axes, inspection),
        ),
        Plot(
            "damage",
            "Predicted damage of each layer",
            "Squared error of the attention output relative to the hidden state, the layer being converted alone.",
            HEIGHT,
            lambda figure, axes: _damage(axes, layers),
        ),
        Plot(
            "dropped",
            "Energy dropped by K = V",
            f"What the closed form loses by keeping {inspection.head_dim} of {2 * inspection.head_dim} dimensions of each head.",
            HEIGHT,
            lambda figure, axes: _dropped(figure, axes, layers),
        ),
        Plot(
            "ranks",
            "Effective rank",
            f"exp(entropy) of the weighted energies; {heads}. The line is head_dim, what one projection keeps.",
            HEIGHT,
            lambda figure, axes: _ranks(axes, layers, inspection.head_dim),
        ),
        Plot(
            "spectrum",
            "Energy beyond the first dimensions of [K;V]",
            "What is left of the weighted energy when the strongest directions are kept; mean over heads, one line per layer.",
            HEIGHT,
            lambda figure, axes: _spectrum(figure, axes, layers, inspection.head_dim),
        ),
        Plot(
            "overlap",
            "Overlap of K and V",
            f"1: the same numbers in another basis; 0: unrelated. {heads[0].upper()}{heads[1:]}.",
            HEIGHT,
            lambda figure, axes: _overlap(axes, layers),
        ),
    ]
    if any(head.pair_energy for layer in layers for head in layer.heads):
        plots.append(
            Plot(
                "rope",
                "Energy of rope pairs",
                "Share of each pair in the energy of the keys, mean over heads; pair 0 turns fastest. NoPE layers are not shown.",
                HEIGHT,
                lambda figure, axes: _rope(figure, axes, layers),
            )
        )
    return tuple(plots)


def svg(plot: Plot) -> str:
    """A plot as SVG, on white; equal figures give equal text."""
    return _rendered(plot, "svg").decode()


def png(plot: Plot) -> bytes:
    """A plot as PNG, on white."""
    return _rendered(plot, "png")


def inline_svg(plot: Plot, text: str) -> str:
    """A plot as an `<svg>` element to stand in a page: on nothing, in the page's colour, with names that are unique in the page.

    Args:
        plot: what is drawn.
        text: what `svg` makes of it.
    """
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)  # the white ground
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{plot.name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{plot.title}" ', 1)


def _rendered(plot: Plot, kind: str) -> bytes:
    with mpl.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        figure = Figure(figsize=(WIDTH, plot.height), layout="constrained", facecolor="white")
        plot.paint(figure, figure.add_subplot())
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return stream.getvalue()


def _indices(axes: Axes, layers: Sequence[LayerFigures]) -> list[int]:
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    return [layer.layer for layer in layers]


def _band(axes: Axes, layers: Sequence[LayerFigures], name: str, colour: str, label: str) -> None:
    at = [layer.layer for layer in layers]
    found = [[float(getattr(head, name)) for head in layer.heads] for layer in layers]
    axes.fill_between(at, [min(row) for row in found], [max(row) for row in found], color=colour, alpha=0.2, linewidth=0)
    axes.plot(at, [layer.mean(name) for layer in layers], marker="o", color=colour, label=label)


def _ranks(axes: Axes, layers: Sequence[LayerFigures], head_dim: int) -> None:
    _indices(axes, layers)
    for name, colour, label in (("key_rank", KEYS, "K"), ("value_rank", VALUES, "V"), ("joint_rank", BOTH, "[K;V]")):
        _band(axes, layers, name, colour, label)
    axes.axhline(head_dim, color=INK, linewidth=0.8, linestyle="--")
    axes.set_ylabel("effective rank")
    axes.set_ylim(0, None)
    _legend_above(axes)


def _overlap(axes: Axes, layers: Sequence[LayerFigures]) -> None:
    _indices(axes, layers)
    _band(axes, layers, "overlap", BOTH, "mean cos² of principal angles")
    _band(axes, layers, "cka", VALUES, "linear CKA, weighted")
    axes.set_ylim(0, 1)
    _legend_above(axes)


def _damage(axes: Axes, layers: Sequence[LayerFigures]) -> None:
    at = _indices(axes, layers)
    counts = [option.heads for option in layers[0].options]
    colours = _shades()
    for place, heads in enumerate(counts):
        values = [max(layer.options[place].predicted, 1e-12) for layer in layers]
        axes.plot(at, values, marker="o", color=colours(place / max(1, len(counts) - 1)), label=f"{heads}")
    axes.set_yscale("log")
    axes.set_ylabel("predicted damage")
    _legend_above(axes, "shared heads")


def _budget(axes: Axes, inspection: Inspection) -> None:
    points = [point for point in inspection.frontier() if point.predicted > 0]
    axes.plot([p.kept for p in points], [p.predicted for p in points], color=BOTH, drawstyle="steps-post", label="chosen by layer")
    even = [point for point in inspection.even if point.predicted > 0]
    axes.plot([p.kept for p in even], [p.predicted for p in even], "o", color=WORST, label="equal heads in all layers")
    for point in even:
        count = next(heads for heads in point.heads if heads)
        axes.annotate(str(count), (point.kept, point.predicted), xytext=(5, 3), textcoords="offset points", color=INK, fontsize=8)
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("cache kept")
    axes.set_ylabel("predicted damage, sum of layers")
    axes.grid(axis="y")
    _legend_above(axes)


def _dropped(figure: Figure, axes: Axes, layers: Sequence[LayerFigures]) -> None:
    _grid(figure, axes, layers, [[head.dropped for head in layer.heads] for layer in layers], "KV head")


def _rope(figure: Figure, axes: Axes, layers: Sequence[LayerFigures]) -> None:
    turned = [layer for layer in layers if layer.heads[0].pair_energy]
    rows = []
    for layer in turned:
        shares = [head.pair_energy or () for head in layer.heads]
        rows.append([sum(pair) / len(shares) for pair in zip(*shares, strict=True)])
    _grid(figure, axes, turned, rows, "rope pair")


def _grid(figure: Figure, axes: Axes, layers: Sequence[LayerFigures], rows: list[list[float]], label: str) -> None:
    """Colours over layers (down) and heads or pairs (across)."""
    mesh = axes.pcolormesh(rows, cmap="viridis", vmin=0)
    axes.invert_yaxis()
    for axis, names in ((axes.yaxis, [layer.layer for layer in layers]), (axes.xaxis, list(range(len(rows[0]))))):
        step = -(-len(names) // 12)
        axis.set_ticks([place + 0.5 for place in range(0, len(names), step)], [str(name) for name in names[::step]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(label)
    axes.set_ylabel("layer")
    bar = figure.colorbar(mesh, ax=axes, format=PercentFormatter(1))
    bar.outline.set_visible(False)


def _spectrum(figure: Figure, axes: Axes, layers: Sequence[LayerFigures], head_dim: int) -> None:
    colours = _shades()
    last = max(layer.layer for layer in layers)
    for layer in layers:
        left = [max(sum(layer.spectrum[kept:]), 1e-9) for kept in range(len(layer.spectrum))]
        axes.plot(range(len(left)), left, color=colours(layer.layer / max(1, last)), linewidth=1)
    axes.axvline(head_dim, color=INK, linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(max(1e-6, axes.get_ylim()[0]), 1.2)
    axes.set_xlim(0, 2 * head_dim)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("dimensions kept")
    axes.set_ylabel("energy left")
    axes.grid(axis="y")
    bar = figure.colorbar(ScalarMappable(Normalize(0, max(1, last)), colours), ax=axes, label="layer")
    bar.locator = MaxNLocator(integer=True)
    bar.update_ticks()
    bar.outline.set_visible(False)


def _cache(axes: Axes, inspection: Inspection) -> None:
    forms = inspection.cache
    names = list(dict.fromkeys((form.shared, form.heads) for form in forms))
    widths = list(dict.fromkeys(form.bits for form in forms))
    for bits, colour, marker in zip(widths, (KEYS, VALUES, BOTH), "os^", strict=False):
        chosen = [form for form in forms if form.bits == bits]
        axes.plot([form.bytes_per_token for form in chosen], range(len(chosen)), marker, color=colour, label=f"{bits} bits")
    axes.set_yticks(range(len(names)), [f"{'K = V' if shared else 'K, V'}, {heads}" for shared, heads in names])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.invert_yaxis()
    axes.grid()
    axes.set_xlabel("bytes per token")
    axes.set_ylabel("cached, KV heads")
    _legend_above(axes)
    above = axes.secondary_xaxis("top")
    above.set_xscale("log", base=2)
    source = inspection.bytes_per_token
    shares = [saved for saved in (0, 0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375) if source * (1 - saved) >= axes.get_xlim()[0]]
    above.set_xticks([source * (1 - saved) for saved in shares], [f"{saved:.3g}".lstrip("0") or "0" for saved in shares])
    above.set_xlabel("fraction saved")


def _shades() -> Colormap:
    """The part of viridis that is seen on light and on dark."""
    return LinearSegmentedColormap.from_list("shades", [mpl.colormaps["viridis"](0.25 + 0.55 * part / 15) for part in range(16)])


def _legend_above(axes: Axes, title: str | None = None) -> None:
    """A legend that hides no data."""
    entries = axes.get_legend_handles_labels()[1]
    axes.figure.legend(loc="outside upper left", ncols=min(4, len(entries) or 1), title=title, title_fontsize=9)
