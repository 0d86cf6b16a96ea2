"""Where each family keeps its attention: one entry per `model_type`.

In: a `model_type`. Out: a `Family`, which names the tensors of a decoder layer and says how its keys are made.
Never: reads weights, knows a model by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvshare.errors import UnsupportedModelError, closest
from kvshare.runtime import ROTATED

Part = Literal["q", "k", "v", "o"]
PARTS: tuple[Part, ...] = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Family:
    """How one `model_type` lays out the attention of a decoder layer.

    `attention` is the prefix of the layer's attention tensors with `{layer}` for the index; `q`, `k`, `v` and `o`
    are the names of the projections below it. `key_norm` is the name of a root-mean-square norm of keys before rope, with its
    query counterpart `query_norm`; None where the family has none. It goes over the head_dim of each head, or, where `wide_norm`
    says so, over all heads as one. `norm_offset` is what the norm adds to the weights that are stored. `post_norm` families norm
    the output of attention before they add it to the residual stream.

    `rotates` says in which layers rope turns keys: None, all; `use_rope`, those whose attention module has an attribute of that
    name that is true; `windows`, those with a sliding window, all where the config has none. How many numbers of a head it
    turns is seen in the width of its tables (twice that in `half_tables` families); without tables, none. Tables are cosines and
    sines, in `sines_first` families the other way round. Numbers are turned in pairs that lie half of them apart, or side by side
    in `interleaved` families.

    Where `q`, `k` and `v` are one name, they are rows of one tensor in this order; in `grouped_rows` families KV head by KV head,
    each with the rows of its query heads, its own of k and its own of v. Where `k` and `v` alone are one name, layers of full
    attention make both by that one projection, if the config says `attention_k_eq_v`; these alone share a cache, and no weight
    changes. `transposed` families store weights as (in, out), which is
    transformers' Conv1D. `kv_heads` is the config's field for the number of KV heads; without one, or with a wide norm, heads
    cannot be merged. It counts where the field `kv_heads_where` is true; where that is false, there is one KV head if
    `multi_query` is true, and otherwise one per query head. `fields` are what older configs call a field, by its usual name, and
    `only` the values that some must have, where they are present. `without` are the kinds of layers, as `layer_types` names them,
    that have no K and V: they are left untouched. `rotated_form` is true where the rotated form is known to compute what it should.
    """

    model_type: str
    attention: str = "model.layers.{layer}.self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    wide_norm: bool = False
    norm_offset: float = 0.0
    post_norm: bool = False
    rotates: Literal["use_rope", "windows"] | None = None
    interleaved: bool = False
    half_tables: bool = False
    sines_first: bool = False
    grouped_rows: bool = False
    transposed: bool = False
    kv_heads: str | None = "num_key_value_heads"
    kv_heads_where: str | None = None
    without: tuple[str, ...] = ()
    rotated_form: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether one tensor holds q, k and v."""
        return self.q == self.k == self.v

    @property
    def tied(self) -> bool:
        """Whether K and V of the layers that attend are made by one projection natively."""
        return self.k == self.v != self.q

    def merges_heads(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this config may have fewer KV heads."""
        counts = self.kv_heads is not None and (self.kv_heads_where is None or bool(config.get(self.kv_heads_where)))
        return counts and not self.wide_norm

    def kv_heads_of(self, config: Mapping[str, Any], query_heads: int) -> Any:
        """The KV heads of a model, from its config; whatever stands there, if it is no number."""
        if self.kv_heads_where is not None and not config.get(self.kv_heads_where):
            return 1 if config.get("multi_query", True) else query_heads
        return (config.get(self.kv_heads) if self.kv_heads else None) or query_heads

    def attends(self, config: Mapping[str, Any], layer: int) -> bool:
        """Whether a layer of a model has K and V; in a tied family, whether one projection makes them."""
        kinds, attending = config.get("layer_types"), config.get("full_attn_idxs")
        if self.tied:
            full = isinstance(kinds, list) and layer < len(kinds) and kinds[layer] == "full_attention"
            return full and bool(config.get("attention_k_eq_v")) and not self.borrows(config, layer)
        if self.without and kinds is None and isinstance(attending, list):  # as older configs say it
            return layer in attending
        return not self.without or not isinstance(kinds, list) or layer >= len(kinds) or kinds[layer] not in self.without

    def borrows(self, config: Mapping[str, Any], layer: int) -> bool:
        """Whether a layer of a model reads the keys and values of an earlier one, and caches none."""
        layers, last = config.get(self.field("num_hidden_layers", config)), config.get("num_kv_shared_layers")
        return type(layers) is type(last) is int and layer >= layers - last

    @property
    def stack(self) -> str:
        """What the decoder calls the list of its layers."""
        return self.attention.partition(".{layer}")[0].rpartition(".")[2]

    def field(self, name: str, config: Mapping[str, Any]) -> str:
        """What this config calls a field."""
        older = self.fields.get(name, name)
        return older if older in config else name

    def number(self, name: str, config: Mapping[str, Any]) -> int:
        """What a config says of a field that it must have, as `geometry_of` finds out; `name` as for `field`."""
        return int(config[self.field(name, config)])

    def located(self, tensors: Collection[str]) -> Family:
        """The family with the names that these tensors have: a base model's checkpoint lacks the first part of each."""
        bare = replace(self, attention=self.attention.partition(".")[2])
        whole, rest = (family.attention.partition("{layer}")[0] for family in (self, bare))
        found = any(name.startswith(whole) for name in tensors) or not any(name.startswith(rest) for name in tensors)
        return self if found else bare

    def stored_shape(self, part: Part, shapes: Mapping[Part, tuple[int, int]], bias: bool = False) -> tuple[int, ...]:
        """The shape of the tensor that holds projection `part`, or its bias, from the (out, in) shapes of all projections."""
        held = [other for other in PARTS if getattr(self, other) == getattr(self, part)] if self.fused else [part]
        rows = sum(shapes[other][0] for other in held)
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
        Family("llama", rotated_form=True),
        Family("mistral", rotated_form=True),
        Family("ministral"),
        Family("ministral3"),
        Family("mixtral"),
        Family("qwen2", rotated_form=True),
        Family("qwen2_moe"),
        Family("qwen3", query_norm="q_norm", key_norm="k_norm", rotated_form=True),
        Family("qwen3_moe", query_norm="q_norm", key_norm="k_norm"),
        Family("mellum", query_norm="q_norm", key_norm="k_norm"),
        Family("dots1", query_norm="q_norm", key_norm="k_norm"),
        Family("glm4_moe", query_norm="q_norm", key_norm="k_norm"),
        Family("gemma", rotated_form=True),
        Family("gemma2", post_norm=True, only={"use_bidirectional_attention": False}),
        Family("vaultgemma"),
        Family(
            "gemma3_text",
            query_norm="q_norm",
            key_norm="k_norm",
            norm_offset=1.0,
            post_norm=True,
            only={"use_bidirectional_attention": False},
        ),
        Family("gemma4_text", v="k_proj", query_norm="q_norm", key_norm="k_norm", post_norm=True, kv_heads=None),
        Family("phi3", q="qkv_proj", k="qkv_proj", v="qkv_proj"),
        Family("phimoe"),
        Family("olmo"),
        Family("olmo2", query_norm="q_norm", key_norm="k_norm", wide_norm=True, post_norm=True),
        Family("olmo3", query_norm="q_norm", key_norm="k_norm", wide_norm=True, post_norm=True),
        Family("olmoe", query_norm="q_norm", key_norm="k_norm", wide_norm=True),
        Family("flex_olmo", query_norm="q_norm", key_norm="k_norm", wide_norm=True, post_norm=True),
        Family("minimax_m2", query_norm="q_norm", key_norm="k_norm", wide_norm=True),
        Family("granite", rotated_form=True),
        Family("granitemoe"),
        Family("granitemoeshared"),
        Family("granitemoehybrid", without=("mamba", "linear_attention")),
        Family("smollm3", rotates="use_rope", rotated_form=True),
        Family("stablelm", only={"qk_layernorm": False}),
        Family("starcoder2", rotated_form=True),
        Family("gpt_oss", half_tables=True),
        Family("exaone4", query_norm="q_norm", key_norm="k_norm", rotates="windows", post_norm=True),
        Family("exaone_moe", query_norm="q_norm", key_norm="k_norm", rotates="windows"),
        Family("nemotron"),
        Family("jais2"),
        Family("hyperclovax", post_norm=True),
        Family("apertus", query_norm="q_norm", key_norm="k_norm"),
        Family("hy_v3", query_norm="q_norm", key_norm="k_norm"),
        Family("arcee", rotated_form=True),
        Family("seed_oss", rotated_form=True),
        Family("cwm"),
        Family("solar_open"),
        Family("cohere", interleaved=True, only={"use_qk_norm": False}, rotated_form=True),
        Family("cohere2", interleaved=True, rotates="windows"),
        Family("glm", interleaved=True, rotated_form=True),
        Family("glm4", interleaved=True, post_norm=True),
        Family("ernie4_5", interleaved=True),
        Family("ernie4_5_moe", interleaved=True),
        Family("helium", interleaved=True),
        Family("opt", attention="model.decoder.layers.{layer}.self_attn", o="out_proj", kv_heads=None),
        Family(
            "gpt_neox",
            attention="gpt_neox.layers.{layer}.attention",
            q="query_key_value",
            k="query_key_value",
            v="query_key_value",
            o="dense",
            grouped_rows=True,
            kv_heads=None,
        ),
        Family("phi", o="dense", only={"qk_layernorm": False}, rotated_form=True),
        Family(
            "falcon",
            attention="transformer.h.{layer}.self_attention",
            q="query_key_value",
            k="query_key_value",
            v="query_key_value",
            o="dense",
            grouped_rows=True,
            kv_heads="num_kv_heads",
            kv_heads_where="new_decoder_architecture",
            fields={"hidden_size": "n_embed"},
        ),
        Family(
            "bloom",
            attention="transformer.h.{layer}.self_attention",
            q="query_key_value",
            k="query_key_value",
            v="query_key_value",
            o="dense",
            grouped_rows=True,
            kv_heads=None,
            fields={"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
            only={"slow_but_exact": False},
        ),
        Family(
            "gptj",
            attention="transformer.h.{layer}.attn",
            o="out_proj",
            interleaved=True,
            half_tables=True,
            sines_first=True,
            kv_heads=None,
            fields={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        ),
        Family("lfm2", o="out_proj", query_norm="q_layernorm", key_norm="k_layernorm", without=("conv",)),
        Family("lfm2_moe", o="out_proj", query_norm="q_layernorm", key_norm="k_layernorm", without=("conv",)),
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


# model types whose layers cache one latent vector per token, of which K and V are both made
LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2", "longcat_flash", "minicpm3")


def family_of(model_type: str) -> Family:
    """The family of a `model_type`, or of that of a checkpoint in rotated form.

    Raises:
        UnsupportedModelError: no such family; the message lists the families and names the closest one.
    """
    model_type = model_type.removeprefix(ROTATED)
    if model_type in LATENT:
        raise UnsupportedModelError(
            f"a {model_type} model has no K and V to share",
            "it caches one latent vector per token, of which both are made (MLA): what sharing would save is saved already",
            "use it as it is, or convert a model with grouped or multi-head attention",
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported",
            f"kvshare knows the attention of: {', '.join(sorted(FAMILIES))}",
            f"{closest(model_type, FAMILIES)} (CONTRIBUTING.md shows how to add a family)",
        )
    return FAMILIES[model_type]
