"""Train a small Qwen3 with grouped queries and key norm, so that figures do not rest on multi-head attention without norms alone.

    python benchmarks/gqa_model.py --data train.txt --out gqa-model --tokens 4000000
    python benchmarks/quality.py --model gqa-model --train-data heal.txt --eval-data val.txt --heads 4 2 1

In: the bundled model, whose weights training starts from, and text that is neither calibrated on nor measured on. Out: a normal
folder. Never: used by the library.

The bundled model has no norms on queries and keys and as many KV heads as query heads. Pairs of KV heads start as their means,
norms with the mean sizes of the queries and keys they replace; then all weights are trained on the text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from kvshare.data import load_tokenizer, token_rows
from kvshare.loading import load_native
from kvshare.source import TINY, open_source

LENGTH = 512


@torch.no_grad()
def regrouped(source: Any, rows: Tensor, kv_heads: int) -> Qwen3ForCausalLM:
    """The bundled model as a Qwen3 with fewer KV heads; `rows` (rows, tokens) show how large its queries and keys are."""
    old = source.config
    sizes: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: sizes.update({name: output.square().mean().sqrt()})

    for index, layer in enumerate(source.model.layers):
        for part in ("q", "k"):
            getattr(layer.self_attn, f"{part}_proj").register_forward_hook(keep(f"{index}.{part}"))
    source(input_ids=rows, use_cache=False)
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
    fields += ["max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id"]
    model = Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=kv_heads, **{name: getattr(old, name) for name in fields}))
    weights = dict(source.state_dict())
    for index in range(old.num_hidden_layers):
        prefix = f"model.layers.{index}.self_attn"
        for part in ("k", "v"):
            heads = weights[f"{prefix}.{part}_proj.weight"].view(kv_heads, -1, old.head_dim, old.hidden_size)
            weights[f"{prefix}.{part}_proj.weight"] = heads.mean(1).flatten(0, 1)
        for part in ("q", "k"):
            weights[f"{prefix}.{part}_norm.weight"] = sizes[f"{index}.{part}"].expand(old.head_dim)
    model.load_state_dict(weights)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=8, help="rows of 512 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.set_seed(options.seed)
    folder = open_source(TINY).path
    tokenizer = load_tokenizer(folder)
    rows = token_rows(options.data, tokenizer, options.tokens, LENGTH, options.seed)
    model = regrouped(load_native(folder, dtype=torch.float32), rows[:16], options.kv_heads)
    arguments = TrainingArguments(
        output_dir=str(options.out / "states"),
        per_device_train_batch_size=options.batch,
        num_train_epochs=1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    model.eval().to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
