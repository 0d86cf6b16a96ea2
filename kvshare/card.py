"""The model card of a converted checkpoint.

In: the checkpoint's config, the report, the source's own card. Out: the text of README.md.
Never: claims a figure that was not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvshare.evaluation import Report
from kvshare.families import family_of
from kvshare.source import Source

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML front matter of a model card; empty where there is none or it cannot be read."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        values = yaml.safe_load(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def card_matter(source: Source) -> dict[str, Any]:
    """The front matter that a conversion of `source` carries on: licence and language follow the weights."""
    origin = front_matter(source.path / "README.md")
    matter: dict[str, Any] = {key: origin[key] for key in CARRIED if key in origin}
    if source.commit is not None:
        matter["base_model"] = source.name
    return matter | {"library_name": "transformers", "tags": ["kvshare", "kv-cache"]}


def write_card(config: dict[str, Any], matter: dict[str, Any], report: Report | None) -> str:
    """The card: front matter, what was done, what it measured, how to load it.

    Args:
        config: the checkpoint's config.json, with its kvshare block.
        matter: the front matter.
        report: the evaluation of these very weights, or None when there was none.
    """
    block = config["kvshare"]
    heads = config.get("num_key_value_heads", block["source"]["num_key_value_heads"])
    tokens = block["healed_tokens"]
    if block["form"] == "exact":
        title = "half the cache"
        story = (
            f"Prepared by kvshare: the weights are the source's own, bit for bit. The cache keeps the keys of all {heads} heads,\n"
            "and values are made of them by `W_V W_K^-1`, at the price of more arithmetic in decoding."
        )
        training = "It trains\nas any model of its family does; a cache that was filled before a weight changed is void."
    else:
        title = "a shared K and V"
        healing = f"healed with {tokens:,} tokens of distillation" if tokens else "not healed"
        story = f"Converted by kvshare: {_form(config)}, `{block['recipe']['init']}` initialisation, {healing}."
        training = "Fine-tune it through kvshare only: training K and V apart\nbreaks what the smaller cache relies on."
    figures = "These weights have not been measured: `kvshare eval` does." if report is None else _figures(report)
    return f"""---
{yaml.safe_dump(matter, sort_keys=True).strip()}
---
# {block["source"]["name"]}, with {title}

{story}

{figures}

With the smaller cache:

    AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)   # runs modeling_kvshare.py of this folder
    kvshare.load("<this folder>")                                                    # the same, without remote code

Without `trust_remote_code` it loads as an ordinary `{config["model_type"]}` model that computes the same function with a
full-size cache ({heads} KV heads for K and for V). {training}
"""


def _form(config: dict[str, Any]) -> str:
    """What became of the KV heads."""
    block = config["kvshare"]
    layers, source_heads = block["layers"], block["source"]["num_key_value_heads"]
    stored = config.get("num_key_value_heads", source_heads)
    every = config[family_of(config["model_type"]).field("num_hidden_layers")]
    heads = block.get("kv_heads", [stored] * len(layers))
    if len(layers) == every and set(heads) == {stored}:
        return f"K and V are one projection, {source_heads} KV heads became {stored}"
    if not layers:
        return "no layer was changed"
    kept = ", ".join(f"{layer}: {count}" for layer, count in zip(layers, heads, strict=True))
    where = f"{len(layers)} of {every} layers"
    return f"K and V are one projection in {where} (KV heads by layer: {kept}; the source has {source_heads} in each)"


def _figures(report: Report) -> str:
    r = report
    return f"""| on {r.tokens:,} tokens ({r.data}) | source | this model |
|---|---|---|
| perplexity | {r.source_perplexity:.3f} ± {r.source_perplexity_error:.3f} | {r.perplexity:.3f} ± {r.perplexity_error:.3f} |
| perplexity increase | | {r.perplexity_increase:+.2%} ± {r.perplexity_increase_error:.2%} |
| KL to the source, nats per token | | {r.kl:.4f} ± {r.kl_error:.4f} |
| next-token agreement | | {r.token_agreement:.1%} |
| KV cache, bytes per token | {r.source_cache_bytes_per_token:,.0f} | {r.cache_bytes_per_token:,.0f} (-{r.cache_reduction:.1%}) |"""
