"""The sections of a recipe and the kinds of their values: the defaults of calibration, merge, fit, healing and evaluation.

In: values. Out: frozen, validated settings. Never: ignores a key it does not know, reads a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

SELF = "self"  # text that the source model writes


def _kv_heads(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 1:
            raise ValueError("kv_heads must be at least 1")
        return value
    if value == "all":
        return value
    numerator, slash, denominator = value.partition("/")
    if numerator == "1" and slash and denominator.isdigit() and int(denominator) > 0:
        return value
    if value.isdigit() and int(value) > 0:
        return int(value)
    raise ValueError("kv_heads is a number of heads, a fraction of the source's such as 1/4, or 'all'")


KVHeads = Annotated[int | str, AfterValidator(_kv_heads)]
Form = Literal["shared", "rotated"]  # what values are: the keys before rope, or the rotated keys, turned back behind attention
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _data(value: Any) -> Any:
    """A mixture that YAML holds as a mapping of texts to weights, in the one form that the rest of kvshare knows."""
    if not isinstance(value, dict) or not value:
        return value
    for name, weight in value.items():
        if not isinstance(name, str) or "," in name or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError("a mixture maps texts, whose names hold no comma, to weights")
    return ",".join(f"{name}={weight!r}" for name, weight in value.items())


Data = Annotated[str, BeforeValidator(_data)]
"""A DATA argument: one text, or a mixture `a.jsonl=3,b.txt=1`, which a recipe may also write as `{a.jsonl: 3, b.txt: 1}`."""


class Section(BaseModel):
    """Settings that refuse an unknown key and do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Calibration(Section):
    """The text on which the second moments of activations are taken."""

    data: Data = SELF
    tokens: Positive = 65_536
    sequence_length: Positive = 512
    statistics: str | None = None
    """A folder of `kvshare calibrate`, in place of text: svd is then the closed form alone, and the model runs no forward."""


class Merge(Section):
    """What the closed form does beyond its formula (method.md, section 2)."""

    balance: tuple[PositiveReal, ...] = Field((8.0, 4.0, 2.0, 1.0), min_length=1)
    """Weights of the key error against the value error to try per layer; the one with the least output error is kept."""
    refit: bool = True
    """Refit the output projection of every layer by ridge regression."""
    sequential: bool = True
    """Take each layer's statistics behind the converted layers before it, so that later layers correct earlier ones."""
    moment_tokens: Positive = 65_536
    """The most calibration tokens that moments are taken on; refit and `learned` use all there are."""
    weighting: Literal["attention", "projections", "none"] = "attention"
    """Errors weigh as they move the attention output, as queries and the output projection see them, or all alike."""
    grouping: Literal["search", "neighbours"] = "search"
    """Which heads are merged: those that lose least, or those that stand side by side."""
    joint: bool = True
    """Solve the merging of heads and the sharing of K and V together, not one after the other."""


class Fit(Section):
    """Per-layer attention transfer, `init: learned` (method.md, section 3)."""

    steps: Positive = 1_200
    batch_tokens: Positive = 1_024
    learning_rate: PositiveReal = 1e-2
    """Relative to the root mean square of each tensor. Of a projection, where a step moves every number, it is 0.4 of this."""


class Heal(Section):
    """The distillation that follows the merge (method.md, section 4)."""

    enabled: bool = True
    data: Data = SELF
    tokens: Positive = 655_360
    sequence_length: Positive = 512
    batch_tokens: Positive = 2_048
    learning_rate: PositiveReal | None = None
    """None: 2e-3 for a hidden_size of 128, falling with its square root and, above 16, with that of the rank; times the square
    root of the KL to the source at the start over 0.05 nats per token, at most 1. A rate that is given is used as it is."""
    shared_rate: PositiveReal = 0.05
    """Learning rate of the shared projections, as a fraction of the others'."""
    lora_rank: Positive = 16
    lora_targets: tuple[str, ...] = Field(
        (
            *("q_proj", "o_proj", "out_proj", "dense", "gate_proj", "up_proj", "gate_up_proj", "down_proj"),
            *("fc1", "fc2", "fc_in", "fc_out", "c_fc", "c_proj", "dense_h_to_4h", "dense_4h_to_h"),
            *("w1", "w2", "w3", "input_linear", "output_linear"),
        ),
        min_length=1,
    )
    """Names in all families together; a model has some of them."""
    temperature: PositiveReal = 1.0
    kl: NonNegative = 1.0
    """Weight of the KL to the teacher."""
    cross_entropy: NonNegative = 0.0
    """Weight of the cross-entropy of the text itself."""
    attention_matching: NonNegative = 0.0
    """Weight of the squared error of every shared layer's attention output, relative to the teacher's."""
    progressive: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The part of training over which attention passes from the source's to the shared one; 0: it is the shared one throughout."""
    teacher_top_k: Positive | None = None
    """Keep so many of the teacher's probabilities per token, and the sum of the others, on the disk before training begins: the
    teacher then takes no part in it. None: it runs beside the student."""
    shared: Literal["full", "lora"] = "full"
    """How the projections are trained that K and V share."""
    attention: Literal["lora", "full"] = "lora"
    """How the projections of queries and outputs are trained, of every layer; `lora` where `lora_targets` names them."""
    norms: bool = False
    """Whether norms are trained too. Embeddings and the head never are."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """In what forwards compute; weights that are trained are float32. `auto` is bfloat16 on a GPU and float32 elsewhere."""
    compile: bool = False
    """Compile the student with torch.compile."""
    gradient_checkpointing: bool = False
    """Keep no activations within layers and compute them again in the backward pass: less memory, more time."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the loss and its terms at every step, as the transformers Trainer knows them: tensorboard, wandb, ..."""
    save_steps: Positive = 50
    divergence_factor: Annotated[float, Field(gt=1)] = 4.0
    """Training stops when the mean loss of ten steps is more than this many times that of the first step."""


class Evaluation(Section):
    """The held-out text of the final measurement."""

    data: Data = SELF
    tokens: Positive = 65_536
    sequence_length: Positive = 512
    mode: Literal["whole", "layers", "off"] = "whole"
    """`whole` loads both models and runs the converted one as it will be used; `layers` sends the text through both layer by layer
    while the merge does, for models that do not fit into memory; `off` measures nothing."""
    max_perplexity_increase: NonNegative | None = None
    """The quality gate, such as 0.05: a result whose perplexity is more than 5 % above the source's is not published."""
