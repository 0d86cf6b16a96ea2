"""About how long a conversion takes on this machine.

In: a `Plan`; a product of matrices of the model's own size, timed. Out: seconds by stage. Never: reads weights, knows what else the
machine has to do: the figure is there to tell minutes from days.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable

from kvshare.budget import divisors
from kvshare.mixture import share_of_self
from kvshare.planning import Plan
from kvshare.recipe import calibrates, data_used

TIMED = 4e9  # operations of the product that is timed
ROWS = (32, 2_048)  # of it, least and most
REPEATS = 8
EFFICIENCY = 0.4  # of that product's speed that products within a model reach
POINTWISE = 4_000  # multiplications in whose time norms, rope, softmax and the like treat one number of a hidden state
STEP_SECONDS = 1e-3  # of a step of the closed form, beyond its products
WRITING = 4  # times a forward of the same tokens, where a model writes text token by token
HEALING = 4  # forwards: teacher, student, and the backward pass for two
CHOSEN_ON = 8_192  # tokens that the damage of each choice is measured on
STREAMS = 3  # through each layer: the source's targets, the source, the converted layers before it
SEARCH_STEPS = 60  # of the closed form at the first balance, and about two thirds of that at each other one
PAIR_STEPS, STATISTICS_STEPS = 20, 12
BYTES_PER_SECOND = 5e8  # copied and synced
START = 8.0  # seconds until the libraries are there


def estimate_seconds(plan: Plan) -> dict[str, float]:
    """Seconds by stage, `starting` and `copying` among them; a stage that does not happen is left out."""
    rate = EFFICIENCY * product_rate(plan.family.number("hidden_size", plan.config))
    seconds = {stage: operations / rate for stage, operations in stage_operations(plan).items() if operations}
    if "merging" in seconds:
        seconds["merging"] += STEP_SECONDS * plan.layers * sum(closed_form_steps(plan).values())
    return {"starting": START, "copying": (plan.bytes_read + plan.bytes_written) / 2 / BYTES_PER_SECOND} | seconds


def product_rate(hidden: int) -> float:
    """Floating-point operations per second of (rows, hidden) times (hidden, 4 hidden) in float32, the best of a few.

    On the GPU, if there is one; else on the CPU, without torch, whose import takes longer than the plan.
    """
    rows = min(max(int(TIMED / (8 * hidden**2)), ROWS[0]), ROWS[1])
    product = _product_on_gpu(rows, hidden) if shutil.which("nvidia-smi") else _product_on_cpu(rows, hidden)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 8 * rows * hidden**2 / best


def _product_on_cpu(rows: int, hidden: int) -> Callable[[], object]:
    import numpy

    left, right = numpy.ones((rows, hidden), numpy.float32), numpy.ones((hidden, 4 * hidden), numpy.float32)
    return lambda: left @ right


def _product_on_gpu(rows: int, hidden: int) -> Callable[[], object]:
    import torch

    from kvshare.tensors import best_device

    device = best_device()
    left, right = torch.ones(rows, hidden, device=device), torch.ones(hidden, 4 * hidden, device=device)
    return lambda: float((left @ right)[-1, -1])  # reading a number waits for the device


def stage_operations(plan: Plan) -> dict[str, float]:
    """Floating-point operations of each stage, those in float64 counted twice."""
    recipe = plan.recipe
    config = {name: plan.family.number(name, plan.config) for name in ("hidden_size", "num_attention_heads")}
    matrices = [tensor.source for tensor in plan.tensors if len(tensor.source.shape) > 1]
    layers = [spec for spec in matrices if plan.family.stack in spec.name.split(".")]
    weights = sum(math.prod(spec.shape) for spec in layers)
    head = max((math.prod(spec.shape) for spec in matrices), default=0)  # the embedding, tied or not

    def forward(tokens: int, length: int) -> float:
        attending = length * config["num_attention_heads"] * plan.head_dim
        return 2 * tokens * (weights + plan.layers * (attending + POINTWISE * config["hidden_size"]))

    def step(group: int) -> float:
        width, numbers = plan.head_dim, 2 * group * plan.head_dim
        return 8 * width * numbers**2 + 14 * width**2 * numbers

    calibration, heal, evaluation = recipe.calibration, recipe.heal, recipe.evaluation
    written = [
        (round(settings.tokens * share_of_self(settings.data)), settings.sequence_length)
        for settings, happens in (
            (calibration, calibrates(recipe)),
            (heal, heal.enabled),
            (evaluation, evaluation.mode != "off"),
        )
        if happens
    ]
    operations = {
        "writing text": WRITING * sum(forward(tokens, length) + 2 * tokens * head for tokens, length in written),
        "merging": 2 * plan.layers * sum(steps * step(group) for group, steps in closed_form_steps(plan).items()),
        "choosing heads": 0.0,
        "healing": 0.0,
        "measuring": 0.0,
    }
    if calibrates(recipe):
        operations["merging"] += STREAMS * forward(calibration.tokens, calibration.sequence_length)
    if recipe.cache_budget is not None:
        # each layer with each number of heads, and all layers behind it: half of them on average
        choices = plan.layers * len(divisors(plan.source_kv_heads))
        operations["choosing heads"] = choices * forward(min(CHOSEN_ON, calibration.tokens), calibration.sequence_length) / 2
    if recipe.init == "learned":
        tokens = plan.layers * recipe.fit.steps * recipe.fit.batch_tokens
        operations["merging"] += 6 * tokens * (4 * config["hidden_size"] + POINTWISE) * config["hidden_size"]
    if heal.enabled:
        operations["healing"] = HEALING * (forward(heal.tokens, heal.sequence_length) + 2 * heal.tokens * head)
    if data_used(recipe) and evaluation.mode != "off":
        operations["measuring"] = 2 * (forward(evaluation.tokens, evaluation.sequence_length) + 2 * evaluation.tokens * head)
    return operations


def closed_form_steps(plan: Plan) -> dict[int, float]:
    """Steps of the searches of a layer's closed forms, by the number of heads that become one in each."""
    recipe = plan.recipe
    if recipe.init not in ("svd", "learned"):
        return {}
    group = plan.source_kv_heads // plan.kv_heads
    each = SEARCH_STEPS * (1 + 2 * (len(recipe.merge.balance) - 1) / 3) if calibrates(recipe) else STATISTICS_STEPS
    steps = {group: each * plan.kv_heads}
    if group > 1 and recipe.merge.grouping == "search":
        pairs = plan.source_kv_heads * (plan.source_kv_heads - 1) // 2
        steps[2] = steps.get(2, 0.0) + PAIR_STEPS * pairs
    return steps
