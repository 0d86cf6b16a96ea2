"""The merge keeps a function where it can, and is the best of its kind where it cannot. All in float64, on random layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from kvshare.calibrate import MomentSums, OutputSums
from kvshare.merge import AttentionWeights, Moments
from kvshare.merge.mean import merge_mean
from kvshare.merge.refit import refit_output
from kvshare.merge.regroup import Grouping, MergeReport, _Problems, choose_grouping, merge_svd
from kvshare.merge.svd import _gauge, _project, _readers, gauge_matrix, solve_group, to_complex, to_real

HIDDEN, WIDTH, TOKENS = 48, 8, 400
KINDS = ["plain", "biases", "norms"]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_layer(seed: int, kv_heads: int = 4, per_head: int = 2, kind: str = "plain") -> AttentionWeights:
    """Unrelated random projections; `biases` as in qwen2, `norms` as in qwen3."""
    g = torch.Generator().manual_seed(seed)
    rows, queries = kv_heads * WIDTH, kv_heads * per_head * WIDTH
    scale = HIDDEN**-0.5
    extra: dict[str, Tensor] = {}
    if kind == "biases":
        extra = {"q_bias": normal(g, queries), "k_bias": 2 * normal(g, rows), "v_bias": normal(g, rows)}
    if kind == "norms":
        extra = {"query_norm": 0.5 + normal(g, WIDTH).abs(), "key_norm": 0.5 + normal(g, WIDTH).abs()}
    q, k, v, o = (scale * normal(g, *shape) for shape in ((queries, HIDDEN), (rows, HIDDEN), (rows, HIDDEN), (HIDDEN, queries)))
    return AttentionWeights(q, k, v, o, WIDTH, **extra)


def planted_layer(seed: int, grouping: Grouping, per_head: int = 2, kind: str = "plain") -> AttentionWeights:
    """Heads of a group are the same numbers in disguise: keys another complex scale per rope pair, values another basis."""
    heads = sum(len(group) for group in grouping)
    layer = random_layer(seed, heads, per_head, kind)
    g = torch.Generator().manual_seed(seed + 1000)
    k, v = layer.k.clone().view(heads, WIDTH, HIDDEN), layer.v.clone().view(heads, WIDTH, HIDDEN)
    k_bias, v_bias = torch.zeros(heads, WIDTH, dtype=torch.float64), torch.zeros(heads, WIDTH, dtype=torch.float64)
    for group in grouping:
        shared, key_offset, value_offset = normal(g, WIDTH, HIDDEN) * HIDDEN**-0.5, normal(g, WIDTH), normal(g, WIDTH)
        for head in group:
            half = WIDTH // 2
            z = torch.complex(normal(g, half), normal(g, half))
            if kind == "norms":  # a norm lets nothing but signs through
                z = torch.complex(z.real.sign(), torch.zeros_like(z.real))
            gauge, basis = gauge_matrix(z), normal(g, WIDTH, WIDTH)
            k[head], v[head] = gauge @ shared, basis @ shared
            k_bias[head], v_bias[head] = gauge @ key_offset, basis @ value_offset
    layer = replace(layer, k=k.reshape(-1, HIDDEN), v=v.reshape(-1, HIDDEN))
    return replace(layer, k_bias=k_bias.flatten(), v_bias=v_bias.flatten()) if kind == "biases" else layer


def inputs(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """Attention inputs (tokens, hidden) with a mean and unequal directions, as trained models have."""
    g = torch.Generator().manual_seed(seed + 77)
    return normal(g, tokens, HIDDEN) @ (torch.eye(HIDDEN, dtype=torch.float64) + 0.3 * normal(g, HIDDEN, HIDDEN)) + normal(
        g, HIDDEN
    )


def moments(layer: AttentionWeights, x: Tensor | None = None) -> Moments:
    sums = MomentSums(layer)
    sums.add(inputs() if x is None else x)
    return sums.moments()


def merge(layer: AttentionWeights, kv_heads: int, grouping: Grouping | None = None) -> tuple[AttentionWeights, MergeReport]:
    return merge_svd(layer, moments(layer), kv_heads, grouping=grouping)


def heads_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(tokens, heads, head_dim)"""
    out = x @ weight.T
    return (out if bias is None else out + bias).view(len(x), -1, WIDTH)


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x / x.square().mean(-1, keepdim=True).sqrt() * weight


def roped(x: Tensor) -> Tensor:
    """Rotate pair (j, j + half) of a token at position t by t * 10000^(-j / half)."""
    half = WIDTH // 2
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    return to_real(to_complex(x) * torch.polar(torch.ones_like(angle), angle))


def attend(layer: AttentionWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention written out: scores (query heads, tokens, tokens) and outputs (tokens, hidden)."""
    q = roped(normed(heads_of(x, layer.q, layer.q_bias), layer.query_norm))
    k = roped(normed(heads_of(x, layer.k, layer.k_bias), layer.key_norm))
    v = heads_of(x, layer.v, layer.v_bias)
    served = torch.arange(layer.query_heads) // (layer.query_heads // layer.kv_heads)
    scores = torch.einsum("qhd,khd->hqk", q, k[:, served]) * WIDTH**-0.5
    future = torch.ones(len(x), len(x)).triu(1).bool()
    heads = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v[:, served])
    return scores, heads.flatten(1) @ layer.o.T


def assert_same_function(given: AttentionWeights, wanted: AttentionWeights, tolerance: float = 1e-6) -> None:
    x = inputs(5, 24)
    torch.testing.assert_close(attend(given, x)[1], attend(wanted, x)[1], atol=tolerance, rtol=tolerance)


def assert_shared(layer: AttentionWeights, kv_heads: int) -> None:
    assert torch.equal(layer.k, layer.v)
    assert layer.kv_heads == kv_heads


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_shared_already_stays_the_same_function(kind: str) -> None:
    layer = random_layer(1, kind=kind)
    layer = replace(layer, v=layer.k)
    merged, report = merge(layer, 4)
    assert_shared(merged, 4)
    assert report.lost < 1e-9
    assert_same_function(merged, layer)
    x = inputs(5, 24)
    scores, expected = attend(merged, x)[0], attend(layer, x)[0]
    torch.testing.assert_close(scores - scores[..., :1], expected - expected[..., :1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "grouping", [((0,), (1,), (2,), (3,)), ((0, 3), (1, 2)), ((0, 1, 2, 3),)], ids=["4 to 4", "4 to 2", "4 to 1"]
)
def test_what_is_shared_in_disguise_is_found_without_loss(grouping: Grouping, kind: str) -> None:
    layer = planted_layer(2, grouping, kind=kind)
    merged, report = merge(layer, len(grouping))
    assert_shared(merged, len(grouping))
    assert report.lost < 1e-9
    assert {frozenset(group) for group in report.grouping} == {frozenset(group) for group in grouping}
    x = inputs(5, 24)
    expected = attend(layer, x)[1].view(24, HIDDEN)
    torch.testing.assert_close(attend(merged, x)[1], expected, atol=1e-5, rtol=1e-5)


def assert_merged_alike(layer: AttentionWeights, disguised: AttentionWeights, kv_heads: int) -> None:
    """One function in two disguises is merged in one way, at one loss, to one function."""
    assert_same_function(disguised, layer)
    (plain, first), (other, second) = merge(layer, kv_heads), merge(disguised, kv_heads)
    assert first.grouping == second.grouping
    assert second.lost == pytest.approx(first.lost, rel=1e-5)
    assert_same_function(other, plain, 1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_another_basis_of_the_values_changes_nothing(kv_heads: int) -> None:
    layer = random_layer(3)
    g = torch.Generator().manual_seed(4)
    bases = normal(g, 4, WIDTH, WIDTH)
    v = (bases @ layer.v.view(4, WIDTH, HIDDEN)).reshape(-1, HIDDEN)
    o = torch.einsum("ohqi,hij->ohqj", layer.o.view(HIDDEN, 4, 2, WIDTH), torch.linalg.inv(bases)).reshape(HIDDEN, -1)
    disguised = replace(layer, v=v, o=o)
    assert_merged_alike(layer, disguised, kv_heads)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_another_scale_of_every_key_pair_changes_nothing(kv_heads: int) -> None:
    layer = random_layer(3)
    g = torch.Generator().manual_seed(4)
    z = torch.complex(normal(g, 4, WIDTH // 2), normal(g, 4, WIDTH // 2))
    k = (gauge_matrix(z) @ layer.k.view(4, WIDTH, HIDDEN)).reshape(-1, HIDDEN)
    q = torch.einsum("hij,hqjd->hqid", gauge_matrix(1 / z.conj()), layer.q.view(4, 2, WIDTH, HIDDEN)).reshape(-1, HIDDEN)
    disguised = replace(layer, k=k, q=q)
    assert_merged_alike(layer, disguised, kv_heads)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_the_norms_of_queries_and_keys_share_changes_nothing(kv_heads: int) -> None:
    layer = random_layer(3, kind="norms")
    factor = torch.tensor([0.2, 5.0, 1.0, 2.0] * 2, dtype=torch.float64)  # equal within rope pairs
    assert layer.query_norm is not None
    assert layer.key_norm is not None
    moved = replace(layer, query_norm=layer.query_norm / factor, key_norm=layer.key_norm * factor)
    assert_same_function(moved, layer)
    (plain, first), (other, second) = merge(layer, kv_heads), merge(moved, kv_heads)
    assert first.grouping == second.grouping
    assert second.lost == pytest.approx(first.lost, rel=1e-5)
    assert_same_function(other, plain, 1e-4)


def loss_of(layer: AttentionWeights, x: Tensor, shared: Tensor, grouping: Grouping) -> float:
    """The weighted error of method.md that is left when each group keeps `shared` (tokens, groups, head_dim), over all energy.

    Computed from activations, with the best complex scale per rope pair and the best value readers for these numbers.
    """
    keys, values = heads_of(x, layer.k, None), heads_of(x, layer.v, None)
    queries = heads_of(x, layer.q, None).view(len(x), layer.kv_heads, -1, WIDTH)
    pairs = to_complex(queries).abs().square().mean(0).sum(1) / 2  # (kv heads, half)
    out = layer.o.view(HIDDEN, layer.kv_heads, -1, WIDTH)
    key_errors, value_errors, key_energy, value_energy = 0.0, 0.0, 0.0, 0.0
    for index, group in enumerate(grouping):
        s = shared[:, index]
        for head in group:
            wanted, kept = to_complex(keys[:, head]), to_complex(s)
            z = (wanted * kept.conj()).sum(0) / kept.abs().square().sum(0)
            key_errors += float(((wanted - z * kept).abs().square().mean(0) * pairs[head]).sum())
            key_energy += float((wanted.abs().square().mean(0) * pairs[head]).sum())
            missed = values[:, head] - s @ torch.linalg.lstsq(s, values[:, head]).solution
            value_errors += float(torch.einsum("oqi,ti->toq", out[:, head], missed).square().sum() / len(x))
            value_energy += float(torch.einsum("oqi,ti->toq", out[:, head], values[:, head]).square().sum() / len(x))
    return (key_errors / key_energy + value_errors / value_energy) / 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_nothing_simple_loses_less(seed: int, kv_heads: int) -> None:
    layer, x = random_layer(10 + seed), inputs(seed)
    merged, report = merge_svd(layer, moments(layer, x), kv_heads)
    lost = loss_of(layer, x, heads_of(x, merged.k, None), report.grouping)
    assert lost == pytest.approx(report.lost, rel=1e-3)
    keys, values = heads_of(x, layer.k, None), heads_of(x, layer.v, None)
    guess = normal(torch.Generator().manual_seed(seed), HIDDEN, kv_heads * WIDTH)
    rivals: dict[str, Callable[[list[int]], Tensor]] = {
        "first key": lambda group: keys[:, group[0]],
        "mean key": lambda group: keys[:, group].mean(1),
        "first value": lambda group: values[:, group[0]],
        "mean value": lambda group: values[:, group].mean(1),
        "mean of both": lambda group: (keys + values)[:, group].mean(1) / 2,
    }
    for name, keep in rivals.items():
        shared = torch.stack([keep(list(group)) for group in report.grouping], 1)
        assert lost < loss_of(layer, x, shared, report.grouping), name
    assert lost < loss_of(layer, x, heads_of(x, guess.T, None), report.grouping)


@pytest.mark.parametrize("kind", KINDS)
def test_one_head_cannot_be_improved_by_small_changes(kind: str) -> None:
    layer = random_layer(20, kind=kind)
    problem = _Problems(layer, moments(layer), 1.0).of((1,))
    best = solve_group(problem)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = best.projection + 1e-2 * best.projection.abs().mean() * normal(g, *best.projection.shape)
        assert _readers(problem, moved, _gauge(problem, moved, best)).loss > best.loss * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_the_alternation_makes_it_worse(kind: str, seed: int) -> None:
    layer = random_layer(30 + seed, kind=kind)
    problem = _Problems(layer, moments(layer), 1.0).of((0, 1, 3))
    current = solve_group(problem, iterations=0)
    losses = [current.loss]
    for _ in range(25):
        projection = _project(problem, current)
        current = _readers(problem, projection, _gauge(problem, projection, current), current)
        losses.append(current.loss)
    assert all(after <= before * (1 + 1e-7) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]
    assert solve_group(problem).loss <= losses[-1] * (1 + 1e-5)


def partitions(heads: tuple[int, ...], size: int) -> list[Grouping]:
    if not heads:
        return [()]
    return [
        ((heads[0], *rest), *tail)
        for rest in combinations(heads[1:], size - 1)
        for tail in partitions(tuple(head for head in heads[1:] if head not in rest), size)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [2, 3])
def test_grouping_is_the_best_of_all(groups: int, seed: int) -> None:
    table = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)).tolist()

    def cost(grouping: Grouping) -> float:
        return sum(table[i][j] for group in grouping for i, j in combinations(group, 2))

    found = choose_grouping(6, groups, lambda i, j: table[i][j])
    assert found == min(partitions(tuple(range(6)), 6 // groups), key=cost)


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (12, 3), (24, 6)])
def test_grouping_finds_families_of_heads(heads: int, groups: int) -> None:
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(heads)).tolist()
    family = {head: place % groups for place, head in enumerate(order)}
    found = choose_grouping(heads, groups, lambda i, j: 0.1 if family[i] == family[j] else 1.0)
    assert sorted(head for group in found for head in group) == list(range(heads))
    assert all(len({family[head] for head in group}) == 1 for group in found)


def test_grouping_needs_no_search_at_the_ends() -> None:
    def never(i: int, j: int) -> float:
        raise AssertionError("no pair had to be tried")

    assert choose_grouping(4, 4, never) == ((0,), (1,), (2,), (3,))
    assert choose_grouping(4, 1, never) == ((0, 1, 2, 3),)


@pytest.mark.parametrize("kind", KINDS)
def test_duplicate_heads_in_any_order_lose_nothing(kind: str) -> None:
    layer = random_layer(40, kv_heads=6, kind=kind)
    kinds = [0, 1, 2, 1, 0, 2]  # which of three heads each of the six repeats
    repeat = {
        name: value.view(6, WIDTH, -1)[kinds].reshape(value.shape)
        for name, value in layer.tensors.items()
        if name in {"k", "v", "k_bias", "v_bias"}
    }
    repeat["v"] = repeat["k"]
    layer = layer.with_tensors(repeat)
    merged, report = merge(layer, 3)
    assert report.grouping == ((0, 4), (1, 3), (2, 5))
    assert report.lost < 1e-9
    assert_same_function(merged, layer, 1e-5)


def test_a_given_grouping_is_followed() -> None:
    layer = random_layer(41)
    grouping = ((3, 0), (2, 1))
    merged, report = merge(layer, 2, grouping)
    assert report.grouping == grouping
    # the query heads of source head 3 come first now, then those of head 0: each pair of rows is a gauge away from its own
    source = to_complex(layer.q.view(4, 2, WIDTH, HIDDEN).transpose(2, 3))  # (kv heads, queries, hidden, half)
    moved = to_complex(merged.q.view(4, 2, WIDTH, HIDDEN).transpose(2, 3))
    ratio = moved / source[[3, 0, 2, 1]]
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), atol=1e-9, rtol=1e-6)


def test_the_balance_moves_the_error_between_keys_and_values() -> None:
    layer, x = random_layer(42), inputs()
    errors = []
    for balance in (0.01, 1.0, 100.0):
        merged, _ = merge_svd(layer, moments(layer), 4, balance)
        kept, wanted = heads_of(x, merged.v, None), heads_of(x, layer.v, None)
        missed = [wanted[:, h] - kept[:, h] @ torch.linalg.lstsq(kept[:, h], wanted[:, h]).solution for h in range(4)]
        errors.append(float(torch.stack(missed).square().sum()))
    assert errors[0] > errors[1] > errors[2]


def test_mean_merge_is_the_plain_average() -> None:
    layer = random_layer(50, kind="biases")
    merged = merge_mean(layer, 2)
    assert_shared(merged, 2)
    k, v = layer.k.view(4, WIDTH, HIDDEN), layer.v.view(4, WIDTH, HIDDEN)
    for output, (first, second) in enumerate(((0, 1), (2, 3))):
        expected = (k[first] + k[second] + v[first] + v[second]) / 4
        torch.testing.assert_close(merged.k.view(2, WIDTH, HIDDEN)[output], expected)
    assert layer.k_bias is not None
    assert merged.k_bias is not None
    torch.testing.assert_close(merged.k_bias, layer.k_bias.view(2, 2, WIDTH).mean(1).flatten())
    assert merged.q is layer.q
    assert merged.o is layer.o


def test_refit_lowers_the_error_and_keeps_directions_without_data() -> None:
    g = torch.Generator().manual_seed(60)
    basis = torch.linalg.qr(normal(g, 12, 12))[0]
    z = normal(g, 300, 9) @ basis[:, :9].T  # three directions never occur
    wanted, current = z @ normal(g, 12, 5) + 0.1 * normal(g, 300, 5), normal(g, 5, 12)
    sums = OutputSums()
    for part in range(3):
        sums.add(z[part::3], wanted[part::3])
    assert sums.heads is not None
    assert sums.cross is not None
    better = refit_output(current, sums.heads, sums.cross)
    measured = float((wanted - z @ better.T).square().sum() / wanted.square().sum())
    assert sums.error(better) == pytest.approx(measured, rel=1e-6)
    assert measured < 0.05 < sums.error(current)
    torch.testing.assert_close(better @ basis[:, 9:], current @ basis[:, 9:], atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_refit_never_raises_the_error(seed: int) -> None:
    g = torch.Generator().manual_seed(70 + seed)
    z, current = normal(g, 10 + 20 * seed, 16), normal(g, 6, 16)
    sums = OutputSums()
    sums.add(z, z @ current.T + 10.0**-seed * normal(g, len(z), 6))
    assert sums.heads is not None
    assert sums.cross is not None
    assert sums.error(refit_output(current, sums.heads, sums.cross)) <= sums.error(current) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_moments_do_not_depend_on_batches(kind: str) -> None:
    layer, x = random_layer(80, kind=kind), inputs()
    whole, parts = MomentSums(layer), MomentSums(layer)
    whole.add(x)
    for part in (x[:7], x[7:8], x[8:300], x[300:]):
        parts.add(part)
    assert parts.tokens == whole.tokens == TOKENS
    for name, value in vars(whole.moments()).items():
        torch.testing.assert_close(getattr(parts.moments(), name), value, atol=1e-10, rtol=1e-10)


def test_moments_are_the_moments_of_the_projections() -> None:
    layer, x = random_layer(81, kind="biases"), inputs()
    got = moments(layer)
    both = torch.stack([heads_of(x, layer.k, layer.k_bias), heads_of(x, layer.v, layer.v_bias)], 1)  # (tokens, 2, heads, dim)
    mean = both.mean(0)
    torch.testing.assert_close(got.mean, mean)
    torch.testing.assert_close(got.second, torch.einsum("tpgi,tqhj->pgiqhj", both - mean, both - mean) / TOKENS)
    queries = to_complex(heads_of(x, layer.q, layer.q_bias)).abs().square().mean(0) / 2
    torch.testing.assert_close(got.queries, queries)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_float32_gives_what_float64_gives(kv_heads: int, kind: str) -> None:
    layer, x = random_layer(90, kind=kind), inputs()
    small = layer.to(torch.float32)
    exact, report = merge_svd(layer, moments(layer, x), kv_heads)
    rough, rough_report = merge_svd(small, moments(small, x.float()), kv_heads)
    assert rough.q.dtype == torch.float64
    assert rough_report.grouping == report.grouping
    assert rough_report.lost == pytest.approx(report.lost, rel=1e-4)
    assert_same_function(rough, exact, 5e-3)
