"""What an inspection says is so: planted figures are found, none depends on the basis, the damage is that of the merge."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from common import TINY_FOLDER
from kvshare.cli.render import print_inspection
from safetensors.torch import load_file, save_file
from test_merge import HIDDEN, WIDTH, key_gauge, moments, normal, random_layer, singles
from torch import Tensor

import kvshare
from kvshare.activations import first_inputs
from kvshare.budget import head_units
from kvshare.errors import UsageError
from kvshare.evaluation import cache_numbers_per_token
from kvshare.findings import Inspection, LayerFigures, LayerOption, listed, notes
from kvshare.inspection import inspect_layers
from kvshare.layerwise import solve_alone
from kvshare.loading import load_native
from kvshare.merge import AttentionWeights, readers
from kvshare.merge.readers import GroupProblem
from kvshare.merge.regroup import divided, layer_problems, merge_svd, solve_layer
from kvshare.merge.svd import solve_group
from kvshare.page import render_page
from kvshare.planning import plan
from kvshare.plots import Plot, draw, inline_svg, svg
from kvshare.progress import silent
from kvshare.recipe import Recipe
from kvshare.sensitivity import measure_sensitivity
from kvshare.spectra import HeadFigures, effective_rank, head_figures, joint_energies, overlap, pair_energy
from kvshare.streaming import open_skeleton

CPU = torch.device("cpu")
D = 6


def problem(second: Tensor, **changes: Any) -> GroupProblem:
    """One head of D numbers whose (k, v) have this second moment (2 D, 2 D), keys and values weighing alike."""
    targets, metric = torch.eye(2 * D, dtype=torch.float64).view(2, 1, D, 2 * D), torch.eye(D, dtype=torch.float64)[None]
    return replace(GroupProblem(second[None], second[None], targets[0], targets[1], metric, metric, D), **changes)


def spanned(keys: Tensor, values: Tensor) -> Tensor:
    """E[u u^T] of u = (keys x, values x) for round x; both (D, inputs)."""
    both = torch.cat([keys, values])
    return both @ both.T


def directions(seed: int, count: int) -> Tensor:
    """Orthonormal rows (count, 4 D)."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(normal(g, 4 * D, 4 * D)).Q[:count]


def figures_of(layer: AttentionWeights) -> list[HeadFigures]:
    found = moments(layer, singles(layer.kv_heads))
    problems, solutions = layer_problems(layer, found), solve_layer(layer, found, iterations=4)
    return [head_figures(head, *pair) for head, pair in enumerate(zip(problems, solutions, strict=True))]


@pytest.mark.parametrize("rank", [1, 2, D])
def test_planted_ranks_are_found(rank: int) -> None:
    rows = torch.eye(4 * D, dtype=torch.float64)
    g = torch.Generator().manual_seed(rank)
    mixed = normal(g, D, rank)
    values = torch.cat([rows[:rank], torch.zeros(D - rank, 4 * D)])  # equal singular values
    planted = problem(spanned(mixed @ rows[D : D + rank], values))
    found = head_figures(0, planted, solve_group(planted, 0))
    assert found.value_rank == pytest.approx(rank)
    assert 1 <= found.key_rank <= rank + 1e-9
    assert found.key_rank == pytest.approx(exp_entropy(torch.linalg.svdvals(mixed) ** 2))
    equal = problem(spanned(values.roll(2 * D, 1), values))
    assert effective_rank(joint_energies(equal)) == pytest.approx(2 * rank)  # unrelated, and of equal energy
    assert effective_rank(torch.zeros(3)) == 0


def exp_entropy(values: Tensor) -> float:
    shares = [float(value) / float(values.sum()) for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))


def test_overlap_is_one_for_the_same_numbers_and_zero_for_unrelated_ones() -> None:
    rows = directions(1, 2 * D)
    g = torch.Generator().manual_seed(1)
    same, angles, similarity = overlap(problem(spanned(rows[:D], rows[:D])))
    assert (same, similarity) == (pytest.approx(1), pytest.approx(1))
    assert angles == pytest.approx([0] * 5, abs=1e-5)
    mixed, angles, similarity = overlap(problem(spanned(rows[:D], normal(g, D, D) @ rows[:D])))
    assert mixed == pytest.approx(1)  # another basis of the same subspace
    assert similarity < 0.99
    apart, angles, similarity = overlap(problem(spanned(rows[:D], normal(g, D, D) @ rows[D:])))
    assert (apart, similarity) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    assert angles == pytest.approx([90] * 5)
    half = torch.cat([rows[: D // 2], rows[D : D + D // 2]])
    shared, angles, _ = overlap(problem(spanned(rows[:D], half)))
    assert shared == pytest.approx(0.5)
    assert angles is not None
    assert (angles[0], angles[-1]) == (pytest.approx(0, abs=1e-5), pytest.approx(90))
    turned = math.radians(30)
    assert overlap(problem(spanned(rows[:D], math.cos(turned) * rows[:D] + math.sin(turned) * rows[D:])))[1] == pytest.approx(
        [30] * 5
    )
    assert overlap(problem(spanned(rows[:D], torch.zeros(D, 4 * D)))) == (0.0, None, 0.0)


@pytest.mark.parametrize("kind", ["plain", "biases", "norms", "nope"])
def test_a_layer_that_shares_already_overlaps_wholly_and_drops_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROUNDING", 0.0)
    layer = random_layer(1, kv_heads=2, kind=kind)
    for head in figures_of(replace(layer, v=layer.k)):
        assert head.overlap == pytest.approx(1)
        assert head.joint_rank <= WIDTH + 1e-6
        assert head.dropped < 1e-9
    assert all(head.overlap < 0.9 and head.dropped > 1e-3 for head in figures_of(layer))


@pytest.mark.parametrize("kind", ["plain", "partial", "nope"])
def test_no_figure_depends_on_the_basis(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROUNDING", 0.0)  # what is stored is rounded in its own basis
    heads, per_head = 2, 2
    layer = random_layer(3, heads, per_head, kind)
    g = torch.Generator().manual_seed(4)
    gauge, bases = key_gauge(g, kind, heads), normal(g, heads, WIDTH, WIDTH)
    k, v = ((a @ w.view(heads, WIDTH, HIDDEN)).reshape(-1, HIDDEN) for a, w in ((gauge, layer.k), (bases, layer.v)))
    back = torch.linalg.inv(gauge).transpose(1, 2)
    q = torch.einsum("hij,hqjd->hqid", back, layer.q.view(heads, per_head, WIDTH, HIDDEN)).reshape(-1, HIDDEN)
    o = torch.einsum("ohqi,hij->ohqj", layer.o.view(HIDDEN, heads, per_head, WIDTH), torch.linalg.inv(bases)).reshape(HIDDEN, -1)
    for plain, other in zip(figures_of(layer), figures_of(replace(layer, q=q, k=k, v=v, o=o)), strict=True):
        for field in fields(HeadFigures):
            wanted, given = getattr(plain, field.name), getattr(other, field.name)
            assert given == (None if wanted is None else pytest.approx(wanted, rel=1e-4)), field.name
    assert (figures_of(layer)[0].pair_energy is None) == (kind == "nope")


def test_dropped_is_the_tail_of_the_spectrum_where_keys_and_values_have_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROUNDING", 0.0)
    layer = random_layer(5, kv_heads=1)
    found = moments(layer, singles(1), weighting="projections")  # one head: keys and values weigh alike
    (one,) = layer_problems(layer, found)
    (solution,) = solve_layer(layer, found)
    shares = joint_energies(one)
    assert head_figures(0, one, solution).dropped == pytest.approx(float(shares[WIDTH:].sum() / shares.sum()), rel=1e-6)


def test_pair_energy_is_what_the_pairs_hold() -> None:
    rows = directions(2, 2 * D)
    scales = torch.tensor([3.0, 1.0, 2.0, 3.0, 1.0, 2.0], dtype=torch.float64)  # pairs (j, j + 3)
    second = spanned(scales[:, None] * rows[:D], rows[D:])
    assert pair_energy(problem(second)) == pytest.approx([9 / 14, 1 / 14, 4 / 14])
    partial = pair_energy(problem(second, rotary_dim=2))
    assert partial == pytest.approx([10 / 28])  # numbers 0 and 1 of the energies 9, 1, 4, 9, 1, 4
    assert pair_energy(problem(second, rotary_dim=0)) is None


@pytest.mark.parametrize("kind", ["plain", "biases", "norms"])
def test_the_moments_of_all_heads_hold_those_of_every_group(kind: str) -> None:
    layer = random_layer(6, kind=kind)
    whole = moments(layer, ((0, 1, 2, 3),))
    for grouping in (singles(4), ((0, 2), (1, 3))):
        given, wanted = divided(whole, grouping, WIDTH), moments(layer, grouping)
        for name in ("keys", "values"):
            for one, other in zip(getattr(given, name), getattr(wanted, name), strict=True):
                torch.testing.assert_close(one, other)
        torch.testing.assert_close(given.key_metric, wanted.key_metric)


def rows_of(count: int = 6, length: int = 40) -> Tensor:
    return torch.randint(1, 4096, (count, length), generator=torch.Generator().manual_seed(0))


def inspected(folder: Path, rows: Tensor | None = None) -> Inspection:
    """An inspection without files."""
    planned = plan(folder)
    skeleton = open_skeleton(planned.source, planned.family)
    layers = tuple(inspect_layers(skeleton, planned, rows_of() if rows is None else rows, CPU))
    config, merges = planned.source.config, planned.family.kv_heads is not None
    hidden = int(config[planned.family.field("hidden_size", config)])
    queries = int(config[planned.family.field("num_attention_heads", config)])
    shape = (planned.source_kv_heads, queries, planned.head_dim, hidden, 32, merges)
    return Inspection(folder, folder.name, None, planned.family.model_type, *shape, "self", 240, 0, layers)


def test_predicted_damage_is_that_of_a_conversion(source_folder: Callable[[str], Path]) -> None:
    folder, rows = source_folder("qwen2"), rows_of(16)
    planned = plan(folder, recipe=Recipe.model_validate({"cache_budget": 0.5, "merge": {"balance": [1.0]}}))
    model = load_native(folder, dtype=torch.float32)
    measured = measure_sensitivity(model, planned, rows, CPU, silent)
    found = inspected(folder, rows[2:6])  # an eighth is measured on, the next quarter merged on
    for layer, options in zip(found.layers, measured.layers, strict=True):
        assert [(o.heads, o.units) for o in layer.options] == [(o.heads, o.units) for o in options[1:]]
        assert [o.predicted for o in layer.options] == pytest.approx([o.predicted for o in options[1:]], rel=1e-6)
        hidden, calls = first_inputs(model, model.get_decoder().layers, rows[2:6], CPU)
    layer, call = model.get_decoder().layers[0], calls[0]
    solved_all, solved_one = (list(solve_alone(layer, planned, call, hidden, counts, CPU)) for counts in ((2, 1), (2,)))
    assert found.layers[0].mean("predicted") * 2 == pytest.approx(solved_one[0].report.loss, rel=1e-6)
    merged = merge_svd(solved_all[0].weights, solved_all[0].moments.grouping, solved_all[0].solutions)[1]
    assert sum(head.predicted for head in found.layers[0].heads) == pytest.approx(merged.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("key", "rotated", "counts"),
    [
        ("gpt2", (0, 0), (8,)),
        ("smollm3", (8, 0), (4, 2, 1)),
        ("phi", (4, 4), (4, 2, 1)),
        ("qwen3", (8, 8), (4, 2, 1)),
        ("llama-bias", (8, 8), (4, 2, 1)),
        ("mistral-window", (8, 8), (4, 2, 1)),
    ],
)
def test_every_family_has_its_figures(
    source_folder: Callable[[str], Path], key: str, rotated: tuple[int, int], counts: tuple[int, ...]
) -> None:
    found = inspected(source_folder(key))
    assert [layer.rotary_dim for layer in found.layers] == [*rotated]
    for layer in found.layers:
        assert tuple(option.heads for option in layer.options) == counts
        assert len(layer.heads) == found.kv_heads
        assert len(layer.spectrum) == 2 * found.head_dim
        assert sum(layer.spectrum) == pytest.approx(1)
        assert layer.options[0].predicted > 0
        for head in layer.heads:
            assert 1 <= head.key_rank <= found.head_dim + 1e-9
            assert 1 <= head.value_rank <= found.head_dim + 1e-9
            assert 1 <= head.joint_rank <= 2 * found.head_dim + 1e-9
            assert 0 <= head.overlap <= 1
            assert 0 <= head.cka <= 1
            assert 0 < head.dropped < 1
            assert (head.pair_energy is None) == (layer.rotary_dim == 0)
            if head.pair_energy is not None:
                assert len(head.pair_energy) == layer.rotary_dim // 2
                whole = layer.rotary_dim == found.head_dim
                assert sum(head.pair_energy) == pytest.approx(1) if whole else 0 < sum(head.pair_energy) < 1
    said = " ".join(notes(found))
    assert ("rope turns no keys in all layers" in said) == (key == "gpt2")
    assert ("rope turns no keys in layer 1" in said) == (key == "smollm3")
    assert ("rope turns 4 of 8 numbers" in said) == (key == "phi")
    assert ("heads of this family cannot be merged" in said) == (key == "gpt2")
    plots = drawn(found)
    assert ("rope" in [plot.name for plot in plots]) == (key != "gpt2")
    check_page(render_page(found, plots), found)


def drawn(found: Inspection) -> dict[Plot, str]:
    return {plot: svg(plot) for plot in draw(found)}


def filled(folder: Path, copy: Path, name: str, value: float) -> Path:
    """A copy of a model with one value all over one of its tensors."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name].fill_(value)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_layer_that_cannot_be_converted_is_named(
    source_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    found = inspected(filled(source_folder("llama-gqa"), tmp_path / "huge", name, 3e38))
    assert [layer.refused is None for layer in found.layers] == [True, False]
    assert any(note.startswith("layer 1 cannot be converted") for note in notes(found))
    assert all(point.heads[1] is None for point in found.frontier())
    assert found.even[-1].units == head_units((1, None), 4)
    print_inspection(found)
    assert "layer 1 cannot be converted" in capsys.readouterr().out
    check_page(render_page(found, drawn(found)), found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_keys_without_energy_have_no_rank_and_no_angles(source_folder: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    found = inspected(filled(source_folder("llama-gqa"), tmp_path / "empty", name, 0.0))
    for head in found.layers[0].heads:
        assert (head.key_rank, head.overlap, head.angles, head.cka) == (0.0, 0.0, None, 0.0)
        assert head.value_rank == pytest.approx(head.joint_rank)
        assert head.dropped < 1e-4  # one projection holds the values alone, but for rounding
    json.dumps(found.to_dict(), allow_nan=False)
    check_page(render_page(found, drawn(found)), found)


def test_cache_bytes_are_those_of_a_cache(source_folder: Callable[[str], Path], converted_folder: Callable[..., Path]) -> None:
    found = replace(inspected_shape(), output=Path())
    sizes = {(form.shared, form.heads, form.bits): form for form in found.cache}
    prompt = rows_of()[0, :8]
    source = load_native(TINY_FOLDER, dtype=torch.float32)
    assert cache_numbers_per_token(source, prompt) * 2 == found.bytes_per_token == sizes[False, 8, 16].bytes_per_token
    for heads in (8, 2):
        held = cache_numbers_per_token(kvshare.load(converted_folder("tiny", "all" if heads == 8 else heads, "mean")), prompt)
        assert held * 2 == sizes[True, heads, 16].bytes_per_token
    assert sizes[False, 8, 16].saved == 0
    assert sizes[False, 8, 8].saved == 0.4375  # the README's int8: a 16-bit scale for every 16 numbers
    assert sizes[True, 1, 16].saved == 1 - 1 / 16
    assert 1 - sizes[True, 2, 4].saved == pytest.approx((1 - sizes[True, 2, 16].saved) * (1 - sizes[False, 8, 4].saved))


def inspected_shape() -> Inspection:
    """An inspection of the bundled model's shape with figures that were made up."""
    head = HeadFigures(0, 3.0, 4.0, 5.0, 0.5, (1.0, 2.0, 3.0, 4.0, 5.0), 0.25, 0.01, 1e-3, (0.125,) * 8)
    heads = tuple(replace(head, head=place, dropped=0.01 * (place + 1)) for place in range(8))
    layers = []
    for layer in range(6):
        options = tuple(LayerOption(count, count, (layer + 1) / count) for count in (8, 4, 2, 1))
        layers.append(LayerFigures(layer, 16, heads, (1 / 32,) * 32, options))
    return Inspection(Path("out"), "<tiny>", None, "llama", 8, 8, 16, 128, 16, True, "self", 1024, 0, tuple(layers))


def test_budgets_are_spent_where_the_damage_is_least() -> None:
    found = inspected_shape()
    points = found.frontier()
    assert (points[0].kept, points[0].heads) == (1 / 16, (1,) * 6)
    assert (points[-1].predicted, points[-1].heads, points[-1].kept) == (0.0, (None,) * 6, 1.0)
    for even in found.even:
        assert min(point.predicted for point in points if point.units <= even.units) <= even.predicted
    for budget, point in listed(points):
        assert point.kept <= budget
    assert [point.heads for point in found.even] == [(heads,) * 6 for heads in (8, 4, 2, 1)]
    assert found.even[0].predicted == pytest.approx(sum(range(1, 7)) / 8)


class _Page(HTMLParser):
    """Everything a page refers to, and the names it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.names.append(value or "")
            if name in ("href", "xlink:href", "src", "srcset", "data", "action", "poster"):
                self.references.append(value or "")


def check_page(text: str, inspection: Inspection) -> None:
    page = _Page()
    page.feed(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "img"})
    assert len(set(page.names)) == len(page.names)
    inside = [*page.references, *re.findall(r"url\(([^)]*)\)", text)]
    outside = [one for one in inside if one.removeprefix("#") not in page.names]
    assert all(one.startswith("data:image/png;base64,") for one in outside)  # the shades of a colour bar
    assert not re.search(r"https?://|@import", text)
    assert not re.search(r"\b(nan|inf)\b", text)
    for layer in inspection.convertible:
        assert f"<summary>Layer {layer.layer}</summary>" in text
    assert "default-src 'none'" in text


def test_names_are_escaped_and_plots_repeat() -> None:
    found = inspected_shape()
    plots = drawn(found)
    text = render_page(found, plots)
    assert "&lt;tiny&gt;" in text
    assert "<tiny>" not in text
    check_page(text, found)
    assert [inline_svg(*pair) for pair in plots.items()] == [inline_svg(*pair) for pair in drawn(found).items()]
    for plot, picture in plots.items():
        assert "#ffffff" in picture.partition("</g>")[0]  # the ground
        assert "#ffffff" not in inline_svg(plot, picture).partition("</g>")[0]


@pytest.fixture(scope="module")
def command(
    tmp_path_factory: pytest.TempPathFactory, source_folder: Callable[[str], Path], text_file: str
) -> tuple[Path, list[Any], subprocess.CompletedProcess[str]]:
    """The folder that the command wrote, its arguments, and what it printed."""
    output = tmp_path_factory.mktemp("inspect") / "out"
    arguments = ["inspect", source_folder("llama-mha"), "-o", output, "--data", text_file, "--tokens", "1024"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    return output, arguments, prepared.run(prepared.COMMAND, *arguments, environment=environment)


def test_the_command_writes_page_figures_and_plots(command: tuple[Path, list[Any], subprocess.CompletedProcess[str]]) -> None:
    output, arguments, done = command
    assert done.returncode == 0, done.stderr
    names = {"cache", "budget", "damage", "dropped", "ranks", "spectrum", "overlap", "rope"}
    plots = {f"{name}.{ending}" for name in names for ending in ("svg", "png")}
    assert {file.name for file in output.iterdir()} == {"index.html", "inspection.json", "kvshare_manifest.json", *plots}
    values = json.loads((output / "inspection.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert (values["model"], values["tokens"], values["data"]) == (arguments[1].name, 1024, "text.txt")
    assert [len(layer["heads"]) for layer in values["layers"]] == [8, 8]
    assert all(0 < head["dropped"] < 1 for layer in values["layers"] for head in layer["heads"])
    text = (output / "index.html").read_text(encoding="utf-8")
    for layer in range(2):
        assert f"<summary>Layer {layer}</summary>" in text
    assert not re.search(r"https?://", text)
    for expected in ("dropped", "93.75%", "shared heads by layer", "index.html"):
        assert expected in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.isascii()  # what a log file that takes nothing else can hold
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[:-1])
    assert "inspecting layers" in done.stderr
    before = (output / "inspection.json").stat()
    again = prepared.run(prepared.COMMAND, *arguments)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert (output / "inspection.json").stat() == before


def test_what_cannot_be_read_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        kvshare.inspect(TINY_FOLDER, tmp_path / "out", data="nothing.txt")
    assert list(tmp_path.iterdir()) == []
