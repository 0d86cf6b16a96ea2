"""The model card of a converted checkpoint.

In: the checkpoint's config, the data of its report.json, the source's own card. Out: README.md and the figure it shows.
Never: claims a figure that is not in report.json, shows where on a disk a file lay.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from kvshare.card_plot import BY_LAYER, PLOT, draw_plot
from kvshare.errors import BadCheckpointError
from kvshare.families import family_of
from kvshare.mixture import ENDINGS, named, parts_of
from kvshare.parsing import is_file, parse_yaml, read_bytes
from kvshare.recipe import CALIBRATED, Recipe
from kvshare.runtime import MLX
from kvshare.sections import Evaluation
from kvshare.source import Source, read_json

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
# The Hub knows adapter, merge, quantized and finetune. These are complete weights of one model in their own precision, changed by
# further fitting: no adapter, no merge of several models, and no number is stored in fewer bits. So the model tree is to list
# them as finetunes; exact checkpoints, which no other word fits better, too.
RELATION = "finetune"


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML front matter of a model card; empty where there is none or it cannot be read."""
    try:
        text = read_bytes(card).decode("utf-8", errors="replace")
        values = parse_yaml(text[3:].partition("\n---")[0].encode()) if text.startswith("---") else None
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def card_matter(source: Source, recipe: Recipe | None = None) -> dict[str, Any]:
    """The front matter that a conversion of `source` carries on: licence and language follow the weights.

    The base model is the source where it came from the Hub, and otherwise what the source's own card names as its base; a name
    of a local folder means nothing to others. Data sets are those that the source's card names and those that the recipe's
    fitting read from the Hub.
    """
    origin = front_matter(source.path / "README.md")
    matter: dict[str, Any] = {key: origin[key] for key in CARRIED if key in origin}
    base = source.name if source.commit is not None else origin.get("base_model")
    if base:
        matter |= {"base_model": base, "base_model_relation": RELATION}
    if recipe is not None:
        matter = with_datasets(matter, recipe)
    return matter | {"library_name": "transformers", "tags": ["kvshare", "kv-cache"]}


def with_datasets(matter: dict[str, Any], recipe: Recipe, heals: bool | None = None) -> dict[str, Any]:
    """Front matter that also names the data sets of the Hub that the weights were fitted on."""
    used = [recipe.heal.data] if (recipe.heal.enabled if heals is None else heals) else []
    if heals is None and recipe.init in CALIBRATED:
        used.append(recipe.calibration.data)
    known = matter.get("datasets") or []
    names = list(known) if isinstance(known, list | tuple) else [known]
    for data in [part.data for mixture in used for part in parts_of(mixture)]:
        # org/name[/config][:split]; a file has an ending, and the source's own text is no data set
        if "/" in data and not data.endswith(ENDINGS):
            name = "/".join(data.partition(":")[0].split("/")[:2])
            names += [name] if name not in names else []
    return matter | ({"datasets": names} if names else {})


def carried_report(checkpoint: Path) -> dict[str, Any]:
    """What of a checkpoint's report stays true when its weights change: figures measured on others would be a lie.

    Raises:
        BadCheckpointError: there is a report, and it does not list figures by layer as kvshare does.
    """
    file = checkpoint / "report.json"
    if not is_file(file):
        return {}
    report = read_json(file)
    layers = report.get("layers", []) if isinstance(report, dict) else None
    if not isinstance(layers, list) or not all(
        isinstance(layer, dict)
        and type(layer.get("layer")) is int
        and all(isinstance(layer.get(key), int | float | None) for key in BY_LAYER)
        for layer in layers
    ):
        raise BadCheckpointError(f"{file} cannot be used", "it does not list figures by layer", "convert the model again")
    return {"layers": layers} if "layers" in report else {}


def card_files(config: dict[str, Any], matter: dict[str, Any], report: dict[str, Any]) -> dict[str, bytes | None]:
    """The card and its figure by file name; None for a figure that there is nothing to draw in. Arguments as of `write_card`."""
    plot = draw_plot(report)
    return {PLOT: plot, "README.md": write_card(config, matter, report, None if plot is None else PLOT).encode(errors="replace")}


def write_card(config: dict[str, Any], matter: dict[str, Any], report: dict[str, Any], plot: str | None = None) -> str:
    """The card: front matter, what was done, what it measured and how to measure it again, limits, how to load it.

    Args:
        config: the checkpoint's config.json, with its kvshare block.
        matter: the front matter.
        report: the data of report.json; without perplexity in it, these very weights were not measured.
        plot: the name of the figure beside the card, if there is one.
    """
    block = config["kvshare"]
    name, exact = block["source"]["name"], block["form"] == "exact"
    parts = [f"# {name}, with {'half the cache' if exact else 'a shared K and V'}", _story(config), "## Results"]
    parts.append(
        _results(block, report) if "perplexity" in report else "These weights have not been measured: `kvshare eval` does."
    )
    if plot is not None:
        parts.append(f"![what the report holds, drawn]({plot})")
    parts += ["## Loading", _loading(config), "## Limits", _limits(block["form"], config.get("model_file") == MLX), _recipe(block)]
    return f"---\n{yaml.safe_dump(matter, sort_keys=True).strip()}\n---\n" + "\n\n".join(parts) + "\n"


def _story(config: dict[str, Any]) -> str:
    """What was done to which model."""
    block = config["kvshare"]
    source, tokens = block["source"], block["healed_tokens"]
    commit = f", commit `{source['commit']}`" if source.get("commit") else ""
    origin = f"The source is `{source['name']}`{commit}."
    if source.get("whole"):
        origin += f" Of this {source['whole']},\nit is the text model alone: it takes no images, audio or video."
    if block["form"] == "exact":
        heads = config.get("num_key_value_heads", source["num_key_value_heads"])
        return (
            f"Prepared by kvshare {block['version']}: the weights are the source's own, bit for bit. The cache keeps the keys of\n"
            f"all {heads} heads, and values are made of them by `W_V W_K^-1`, at the price of more arithmetic.\n{origin}"
        )
    if family_of(config["model_type"]).tied:
        return (
            f"Prepared by kvshare {block['version']}: the weights are the source's own, bit for bit. {_form(config)};\n"
            f"the cache keeps that projection's output in place of both.\n{origin}"
        )
    turned = ", in rotated form" if block["form"] == "rotated" else ""
    healing = f"healed with {tokens:,} tokens of distillation" if tokens else "not healed"
    init = f"`{block['recipe']['init']}` initialisation"
    return f"Converted by kvshare {block['version']}: {_form(config)}{turned}, {init}, {healing}.\n{origin}"


def _form(config: dict[str, Any]) -> str:
    """What became of the KV heads."""
    block = config["kvshare"]
    layers, source_heads = block["layers"], block["source"]["num_key_value_heads"]
    stored = config.get("num_key_value_heads", source_heads)
    every = config[family_of(config["model_type"]).field("num_hidden_layers", config)]
    heads = block.get("kv_heads", [stored] * len(layers))
    if len(layers) == every and set(heads) == {stored}:
        return f"K and V are one projection, {source_heads} KV heads became {stored}"
    if not layers:
        return "no layer was changed"
    kept = ", ".join(f"{layer}: {count}" for layer, count in zip(layers, heads, strict=True))
    where = f"{len(layers)} of {every} layers"
    return f"K and V are one projection in {where} (KV heads by layer: {kept}; the source has {source_heads} in each)"


def _results(block: dict[str, Any], report: dict[str, Any]) -> str:
    """The table, from the report alone, and the command that measures it again."""
    r = report
    rows = [
        (f"on {r['tokens']:,} tokens ({r['data']})", "source", "this model"),
        ("---", "---", "---"),
        ("perplexity", *(_spread(r, key, ".3f") for key in ("source_perplexity", "perplexity"))),
        ("perplexity increase", "", _spread(r, "perplexity_increase", "+.2%")),
        ("KL to the source, nats per token", "", _spread(r, "kl", ".4f")),
        ("next-token agreement", "", _spread(r, "token_agreement", ".1%")),
        (
            "KV cache, bytes per token",
            f"{r['source_cache_bytes_per_token']:,.0f}",
            f"{r['cache_bytes_per_token']:,.0f} (-{r['cache_reduction']:.1%})",
        ),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    settings = _evaluation(block)
    length, usual = settings["sequence_length"], Evaluation().sequence_length
    note = f"\n\nThe table is of rows of {length} tokens; this command measures rows of {usual}." if length != usual else ""
    return f"{table}\n\nMeasured again by\n\n    {_command(block)}{note}"


def _spread(report: dict[str, Any], key: str, form: str) -> str:
    """A figure with its standard error; one row of text has none, and a figure that is not finite is null."""
    value, error = report[key], report[f"{key}_error"]
    if value is None:
        return "not finite"
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def _command(block: dict[str, Any]) -> str:
    """The command line that repeats the results; files are named without their folders."""
    source, settings = block["source"], _evaluation(block)
    against = f"{source['name']}@{source['commit']}" if source.get("commit") else source["name"]
    words = ["--against", against, "--data", named(settings["data"]), "--tokens", str(settings["tokens"])]
    return f'kvshare eval "<this folder>" {shlex.join(words)} --seed {settings["seed"]}'


def _evaluation(block: dict[str, Any]) -> dict[str, Any]:
    """On what the figures were taken: as `heal` was told where it measured, else as the conversion was."""
    return block.get("evaluation") or {**block["recipe"]["evaluation"], "seed": block["seed"]}


def _loading(config: dict[str, Any]) -> str:
    """With half the cache, and without custom code."""
    block = config["kvshare"]
    if block["form"] == "rotated":
        return """    AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)   # runs code in this folder
    kvshare.load("<this folder>")                                                    # the same

Without `trust_remote_code` transformers refuses it: no class of its own computes this form. Fine-tune it through kvshare only."""
    heads = config.get("num_key_value_heads", block["source"]["num_key_value_heads"])
    cache = f"full-size cache ({heads} KV heads for K and for V)"
    training = "Fine-tune it through kvshare only: training K and V apart\nbreaks what the smaller cache relies on."
    if block["form"] == "exact":
        training = "It trains\nas any model of its family does; a cache that was filled before a weight changed is void."
    if family_of(config["model_type"]).tied:
        cache, training = "full-size cache", "It trains\nas any model of its family does."
    return f"""With the smaller cache:

    AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)   # runs modeling_kvshare.py of this folder
    kvshare.load("<this folder>")                                                    # the same, without remote code

Without `trust_remote_code` it loads as an ordinary `{config["model_type"]}` model that computes the same function with a
{cache}. {training}{_in_mlx(config)}"""


def _in_mlx(config: dict[str, Any]) -> str:
    """How mlx-lm is told that it may run the code that comes along, and how it does without."""
    if config.get("model_file") != MLX:
        return ""
    return f"""

With the smaller cache in mlx-lm, as it is or behind `mlx_lm.convert`:

    mlx_lm.generate --model "<this folder>" --trust-remote-code --prompt "..."   # runs {MLX} of this folder

Without `model_file` in its `config.json`, mlx-lm runs it without that code, with a full-size cache."""


def _limits(form: str, in_mlx: bool) -> str:
    """What a reader should know before relying on it; no figures, because none of them was measured on these weights."""
    lines = [
        "The cache is smaller; decoding is not faster, because keys are rebuilt on every read.",
        f"Other runtimes than transformers{' and mlx-lm' if in_mlx else ''} load the native form, with a full-size cache.",
        "Perplexity on one text says little about another task: measure yours.",
    ]
    if form == "rotated":
        lines[:2] = [
            "It is another function than the source's, fitted to it: values are rotated keys, turned back behind attention.",
            "No other runtime than transformers loads it, and it has no native form.",
        ]
    if form == "exact":
        lines.append("Full precision only: quantised weights or caches, and unmerged adapters on K or V, do not fit this form.")
    else:
        lines.append("Associative recall suffers earlier than perplexity where heads are merged.")
        lines.append(
            "At the same size of the cache, multi-head latent attention is more expressive, and an 8-bit cache loses less."
        )
    return "\n".join(f"- {line}" for line in lines)


def _recipe(block: dict[str, Any]) -> str:
    """All settings; what healing on top of it was told, where it was healed again."""
    settings = {**block["recipe"], **({"heal": block["heal"]} if "heal" in block else {})}
    text = yaml.safe_dump(_without_folders(settings), sort_keys=False).strip()
    return f"<details><summary>The recipe</summary>\n\n```yaml\n{text}\n```\n\n</details>"


def _without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_folders(value) if isinstance(value, dict) else named(value) if key == "data" else value
        for key, value in settings.items()
    }
