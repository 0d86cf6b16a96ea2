"""Where each family keeps its attention: one entry per `model_type`.

In: a `model_type`. Out: a `Family`, which names the tensors of a decoder layer and says how its keys are made.
Never: reads weights, knows a model by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvshare.errors import UnsupportedModelError, closest

Part = Literal["q", "k", "v", "o"]
PARTS: tuple[Part, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Family:
    """How one `model_type` lays out the attention of a decoder layer.

    `attention` is the prefix of the layer's attention tensors with `{layer}` for the index; `q`, `k`, `v` and `o`
    are the names of the projections below it. `key_norm` is the name of a norm over the head_dim of each key head,
    applied before rope, with its query counterpart `query_norm`; None where the family has none. `rotates` is the name of an
    attribute of the attention module that says whether rope turns the keys of this layer; None where it turns those of all.
    How many numbers of a head it turns is seen in the width of its tables; without tables, none.

    Where `q`, `k` and `v` are one name, they are a third each of the rows of one tensor. `transposed` families store weights as
    (in, out), which is transformers' Conv1D. `kv_heads` is the config's field for the number of KV heads; without one, heads
    cannot be merged. `fields` are other fields of the config by their usual names, and `only` the values that some must have,
    where they are present.
    """

    model_type: str
    attention: str = "model.layers.{layer}.self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    rotates: str | None = None
    transposed: bool = False
    kv_heads: str | None = "num_key_value_heads"
    fields: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether one tensor holds q, k and v."""
        return self.k == self.v

    @property
    def stack(self) -> str:
        """What the decoder calls the list of its layers."""
        return self.attention.partition(".{layer}")[0].rpartition(".")[2]

    def field(self, name: str) -> str:
        """What the config calls a field."""
        return self.fields.get(name, name)

    def located(self, tensors: Collection[str]) -> Family:
        """The family with the names that these tensors have: a base model's checkpoint lacks the first part of each."""
        if self.weight(0, "k") in tensors:
            return self
        bare = replace(self, attention=self.attention.partition(".")[2])
        return bare if bare.weight(0, "k") in tensors else self

    def stored_shape(self, part: Part, shapes: Mapping[Part, tuple[int, int]], bias: bool = False) -> tuple[int, ...]:
        """The shape of the tensor that holds projection `part`, or its bias, from the (out, in) shapes of all projections."""
        rows = sum(shapes[other][0] for other in PARTS if getattr(self, other) == getattr(self, part))
        columns = shapes[part][1]
        return (rows,) if bias else (columns, rows) if self.transposed else (rows, columns)

    def tensor(self, layer: int, name: str) -> str:
        """The full name of a tensor that is called `name` in the attention module of decoder layer `layer`."""
        return f"{self.attention.format(layer=layer)}.{name}"

    def weight(self, layer: int, part: Part) -> str:
        """The name of the weight of projection `part` in decoder layer `layer`."""
        return self.tensor(layer, f"{getattr(self, part)}.weight")

    def bias(self, layer: int, part: Part) -> str:
        """The name that the bias of projection `part` has where there is one."""
        return self.tensor(layer, f"{getattr(self, part)}.bias")


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2"),
        Family("qwen3", query_norm="q_norm", key_norm="k_norm"),
        Family("smollm3", rotates="use_rope"),
        Family("phi", o="dense", only={"qk_layernorm": False}),
        Family(
            "gpt2",
            attention="transformer.h.{layer}.attn",
            q="c_attn",
            k="c_attn",
            v="c_attn",
            o="c_proj",
            transposed=True,
            kv_heads=None,
            fields={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
            only={"add_cross_attention": False},
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`.

    Raises:
        UnsupportedModelError: no such family; the message lists the families and names the closest one.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported",
            f"kvshare knows the attention of: {', '.join(sorted(FAMILIES))}",
            f"{closest(model_type, FAMILIES)} (CONTRIBUTING.md shows how to add a family)",
        )
    return FAMILIES[model_type]
