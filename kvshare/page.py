"""The page of an inspection: one HTML file that opens from disk.

In: an `Inspection` and its plots. Out: HTML as text, with the plots in it. Never: refers to anything outside itself, runs scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from kvshare.findings import BudgetPoint, Inspection, LayerFigures, listed, notes
from kvshare.plots import Plot, inline_svg

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --soft: #f3f4f6; --line: #d8dbe0; --quiet: #5a626c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #14171a; --soft: #1e2226; --line: #363c43; --quiet: #9aa3ad; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { max-width: 72ch; margin: .5rem 0; }
.quiet, figcaption, caption { color: var(--quiet); font-size: .87rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: .75rem; margin: 1.25rem 0; padding: 0; }
.facts div { background: var(--soft); border-radius: 6px; padding: .6rem .8rem; }
.facts dt { color: var(--quiet); font-size: .8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figure h3 { font-size: 1rem; margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 600px; margin: .4rem 0; color: var(--ink); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; border-bottom-color: var(--quiet); }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""
TERMS = (
    (
        "effective rank",
        "exp of the entropy of the shares that orthogonal directions have in the energy; r directions of equal energy make r.",
    ),
    (
        "weighted",
        "keys count by what queries see of them, values by what the output projection sees of them, tokens by what attention makes "
        "of them.",
    ),
    (
        "dropped",
        "the part of the weighted energy of keys and values that one shared projection of head_dim numbers does not keep: the "
        "predicted damage of K = V to a head, before the output is refitted and the model healed.",
    ),
    (
        "overlap",
        "mean squared cosine of the principal angles between the subspaces of K and V over tokens. Linear CKA counts directions by "
        "their energy.",
    ),
    (
        "predicted damage",
        "the squared error of a layer's attention output that the closed form expects, relative to the hidden state. It ranks "
        "layers and options; it is not a perplexity, and layers are added up as if each were converted alone.",
    ),
)


def render_page(inspection: Inspection, drawn: Mapping[Plot, str]) -> str:
    """The page, complete.

    Args:
        inspection: what was found.
        drawn: the plots of the same inspection, each as `svg` draws it.
    """
    i = inspection
    of = f"{i.model}{f' at {i.commit}' if i.commit else ''}, {i.model_type}"
    figures = "".join(
        f"<figure><h3>{escape(plot.title)}</h3>{inline_svg(plot, text)}<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot, text in drawn.items()
    )
    said = "".join(f"<li>{escape(note)}</li>" for note in notes(i))
    terms = "".join(f"<p><b>{term}</b>: {escape(text)}</p>" for term, text in TERMS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(i.model)}: K and V before sharing</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(i.model)}: K and V before sharing</h1>
<p class="quiet">{escape(of)}. {i.tokens:,} tokens of {escape(i.text)}, seed {i.seed}. Nothing was converted.</p>
<dl class="facts">{_facts(i)}</dl>
{f"<ul>{said}</ul>" if said else ""}
<h2>The model</h2>
<div class="plots">{figures}</div>
<h2>What a cache budget would choose</h2>
<p>By predicted damage; <code>kvshare convert MODEL -o OUT --cache-budget 0.5</code> chooses so by measured damage.</p>
{_budgets(i)}
<h2>Cache of one token</h2>
{_cache(i)}
<h2>Layers</h2>
{_layers(i)}
<h2>Heads</h2>
{"".join(_heads(layer) for layer in i.convertible)}
<h2>Terms</h2>
{terms}
</main>
</body>
</html>
"""


def _facts(i: Inspection) -> str:
    even = i.even
    facts = [
        ("layers", f"{len(i.layers)}"),
        ("query / KV heads", f"{i.query_heads} / {i.kv_heads}"),
        ("head_dim", f"{i.head_dim}"),
        ("cache per token", f"{i.bytes_per_token:,.0f} B in {i.stored_bits} bits"),
    ]
    if even:
        worst = max(i.convertible, key=lambda layer: layer.dropped)
        dropped = sum(layer.mean("dropped") for layer in i.convertible) / len(i.convertible)
        facts += [
            ("energy dropped by K = V, mean", f"{dropped:.2%}"),
            ("and at most", f"{worst.dropped:.2%} in layer {worst.layer}"),
            ("predicted damage of K = V", f"{even[0].predicted:.2e}"),
        ]
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)


def _budgets(i: Inspection) -> str:
    def row(name: str, point: BudgetPoint) -> tuple[str, ...]:
        heads = ", ".join("-" if count is None else str(count) for count in point.heads)
        return (name, f"{point.kept:.2%}", f"{point.predicted:.2e}", heads)

    rows = [row(f"{budget:.2%}", point) for budget, point in listed(i.frontier())]
    if not rows:
        return "<p>No budget leaves a choice.</p>"
    columns = ("budget", "cache kept", "predicted damage", "heads")
    return _table("Shared heads layer by layer; - is an untouched layer.", columns, rows)


def _cache(i: Inspection) -> str:
    rows = [
        (
            f"{'K = V' if form.shared else 'K and V'}, {form.heads} head{'s' * (form.heads > 1)}",
            f"{form.bits}",
            f"{form.bytes_per_token:,.1f}".removesuffix(".0"),
            f"{form.saved:.2%}",
        )
        for form in i.cache
    ]
    return _table("What kvshare writes is K = V in the stored width; narrower caches multiply with it.", CACHE, rows)


CACHE = ("cached", "bits", "bytes", "saved")
FIGURES = ("rank K", "rank V", "rank [K;V]", "overlap", "CKA", "dropped")


def _layers(i: Inspection) -> str:
    counts = [option.heads for option in i.convertible[0].options] if i.convertible else []
    columns = ("layer", "rope", *FIGURES, "worst head")
    rows, damages = [], []
    for layer in i.layers:
        first = (str(layer.layer), f"{layer.rotary_dim} of {i.head_dim}")
        if layer.refused is not None:
            rows.append((*first, *["-"] * (len(columns) - 2)))
            continue
        ranks = [f"{layer.mean(name):.2f}" for name in ("key_rank", "value_rank", "joint_rank")]
        overlap = [f"{layer.mean(name):.3f}" for name in ("overlap", "cka")]
        dropped = (f"{layer.mean('dropped'):.3%}", f"{layer.dropped:.3%}")
        rows.append((*first, *ranks, *overlap, *dropped))
        damages.append((str(layer.layer), *(f"{option.predicted:.2e}" for option in layer.options)))
    named = ("layer", *(f"{count} head{'s' * (count > 1)}" for count in counts))
    means = _table("Means over heads.", columns, rows)
    return f"{means}<br>{_table('Predicted damage of the layer alone, by how many heads it shares.', named, damages)}"


def _heads(layer: LayerFigures) -> str:
    rows = []
    for head in layer.heads:
        angles = "-" if head.angles is None else " / ".join(f"{angle:.0f}" for angle in head.angles)
        pairs = "-"
        if head.pair_energy:
            strongest = sorted(enumerate(head.pair_energy), key=lambda pair: -pair[1])[:3]
            pairs = ", ".join(f"{pair} ({share:.0%})" for pair, share in strongest)
        ranks = [f"{value:.2f}" for value in (head.key_rank, head.value_rank, head.joint_rank)]
        rows.append((str(head.head), *ranks, f"{head.overlap:.3f}", f"{head.cka:.3f}", f"{head.dropped:.3%}", angles, pairs))
    columns = ("head", *FIGURES, "principal angles °: least, quartiles, greatest", "strongest rope pairs")
    return f"<details><summary>Layer {layer.layer}</summary>{_table('', columns, rows)}</details>"


def _table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
