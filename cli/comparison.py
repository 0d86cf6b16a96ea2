"""Reports of one or several checkpoints as tables, side by side with their source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvshare.cli.render import print_table

if TYPE_CHECKING:
    from kvshare.evaluation import QuantisedFigures, Report
    from kvshare.retrieval import PasskeyFigures, RecallFigures

    Answered = RecallFigures | PasskeyFigures

Row = tuple[str, ...]


def print_reports(reports: Sequence[tuple[str, Report]]) -> None:
    """What was measured: a column for the source, which all share, and one for each named report."""
    names, found = [name for name, _ in reports], [report for _, report in reports]
    first = found[0]
    columns = ("", "source", *names)
    print_table(f"{first.tokens:,} tokens of {first.data}", _figures(found), columns)
    for index, context in enumerate(first.probed.contexts):
        each = [r.probed.contexts[index] for r in found]
        rows = [
            (
                "perplexity",
                _real(context.source_perplexity, context.source_perplexity_error),
                *(_real(c.perplexity, c.perplexity_error) for c in each),
            ),
            ("increase", "", *(_change(c.perplexity_increase, c.perplexity_increase_error) for c in each)),
        ]
        print_table(f"sliding windows of {context.context} tokens, {context.tokens:,} tokens scored", rows, columns)
    if first.positions:
        rows = [
            (
                f"{p.first} to {p.last}",
                *(f"{_real(q.kl, q.kl_error, 4)}, {_share(q.token_agreement, q.token_agreement_error)}" for q in each),
            )
            for p, *each in zip(first.positions, *(r.positions for r in found), strict=True)
        ]
        print_table("KL to the source and next-token agreement by tokens before", rows, ("", *names))
    if first.probed.recall:
        rows = [
            _answered(f"{q.pairs} pairs", q, each)
            for q, *each in zip(first.probed.recall, *(r.probed.recall for r in found), strict=True)
        ]
        print_table(f"recall of key-value pairs, {first.probed.recall[0].questions} questions each", rows, columns)
    if first.probed.passkey:
        rows = [
            _answered(f"{k.context} tokens, depth {k.depth:.0%}", k, each)
            for k, *each in zip(first.probed.passkey, *(r.probed.passkey for r in found), strict=True)
        ]
        print_table(f"passkeys found, {first.probed.passkey[0].keys} each", rows, columns)
    if first.probed.tasks:
        rows = [
            (
                f"{t.task}, {t.metric}",
                _real(t.source_value, t.source_value_error, 4),
                *(_real(r.value, r.value_error, 4) for r in each),
            )
            for t, *each in zip(first.probed.tasks, *(r.probed.tasks for r in found), strict=True)
        ]
        print_table("lm-eval", rows, columns)
    for index, source in enumerate(first.source_quantised):
        rows = _quantised([source, *(r.quantised[index] for r in found)])
        print_table(f"with the cache in {source.bits} bits, against the source as it is", rows, columns)


def _figures(found: Sequence[Report]) -> list[Row]:
    s = found[0]
    return [
        (
            "perplexity",
            _real(s.source_perplexity, s.source_perplexity_error),
            *(_real(r.perplexity, r.perplexity_error) for r in found),
        ),
        ("perplexity increase", "", *(_change(r.perplexity_increase, r.perplexity_increase_error) for r in found)),
        ("KL to the source (nats per token)", "", *(_real(r.kl, r.kl_error, 4) for r in found)),
        ("next-token agreement", "", *(_share(r.token_agreement, r.token_agreement_error) for r in found)),
        (
            "KV cache, bytes per token",
            f"{s.source_cache_bytes_per_token:,.0f}",
            *(f"{r.cache_bytes_per_token:,.0f}" for r in found),
        ),
        ("KV cache saved", "", *(f"{r.cache_reduction:.2%}" for r in found)),
    ]


def _quantised(found: Sequence[QuantisedFigures]) -> list[Row]:
    return [
        ("perplexity increase", *(_change(q.perplexity_increase, q.perplexity_increase_error) for q in found)),
        ("KL to the source (nats per token)", *(_real(q.kl, q.kl_error, 4) for q in found)),
        ("next-token agreement", *(_share(q.token_agreement, q.token_agreement_error) for q in found)),
        ("KV cache, bytes per token", *(f"{q.cache_bytes_per_token:,.0f}" for q in found)),
        ("KV cache saved", *(f"{q.cache_reduction:.2%}" for q in found)),
    ]


def _answered(name: str, source: Answered, found: Sequence[Answered]) -> Row:
    shares = (_share(figures.accuracy, figures.accuracy_error) for figures in found)
    return (name, _share(source.source_accuracy, source.source_accuracy_error), *shares)


def _real(value: float, error: float, digits: int = 3) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _change(value: float, error: float) -> str:
    return f"{value:+.2%} ± {error:.2%}"


def _share(value: float, error: float) -> str:
    return f"{value:.1%} ± {error:.1%}"
