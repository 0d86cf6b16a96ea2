"""The model card of a converted checkpoint.

In: the plan, the report, the source's own card. Out: the text of README.md. Never: claims a figure that was not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvshare.evaluation import Report
from kvshare.planning import Plan

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


def write_card(plan: Plan, report: Report, healed_tokens: int) -> str:
    """The card: front matter with the source's licence, what was done, what it measured, how to load it.

    Args:
        plan: the conversion's plan.
        report: the evaluation of the final weights.
        healed_tokens: tokens of distillation, 0 for none.
    """
    origin = front_matter(plan.source.path / "README.md")
    matter: dict[str, Any] = {key: origin[key] for key in CARRIED if key in origin}
    if plan.source.commit is not None:
        matter["base_model"] = plan.source.name
    matter |= {"library_name": "transformers", "tags": ["kvshare", "kv-cache"]}
    healing = f"healed with {healed_tokens:,} tokens of distillation" if healed_tokens else "not healed"
    r = report
    return f"""---
{yaml.safe_dump(matter, sort_keys=True).strip()}
---
# {plan.source.name}, with a shared K and V

Converted by kvshare: K and V are one projection, `{plan.recipe.init}` initialisation, {plan.source_kv_heads} KV heads became
{plan.kv_heads}, {healing}.

| on {r.tokens:,} tokens ({r.data}) | source | this model |
|---|---|---|
| perplexity | {r.source_perplexity:.3f} ± {r.source_perplexity_error:.3f} | {r.perplexity:.3f} ± {r.perplexity_error:.3f} |
| perplexity increase | | {r.perplexity_increase:+.2%} ± {r.perplexity_increase_error:.2%} |
| KL to the source, nats per token | | {r.kl:.4f} ± {r.kl_error:.4f} |
| next-token agreement | | {r.token_agreement:.1%} |
| KV cache, bytes per token | {r.source_cache_bytes_per_token:,.0f} | {r.cache_bytes_per_token:,.0f} ({r.cache_reduction:.1%} less) |

With the smaller cache:

    AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)   # runs modeling_kvshare.py of this folder
    kvshare.load("<this folder>")                                                    # the same, without remote code

Without `trust_remote_code` it loads as an ordinary `{plan.family.model_type}` model that computes the same function with a
full-size cache ({plan.kv_heads} KV heads for K and for V). Fine-tune it through kvshare only: training `k_proj` and `v_proj` apart
breaks what the smaller cache relies on.
"""
