"""An exported program writes the tokens of the model, over buffers of the shared form's size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

import kvshare
from kvshare.errors import UnsupportedModelError, UsageError
from kvshare.exporting import shared_cache
from kvshare.timing import cache_bytes

IDS = torch.arange(100, 112)[None]
SLOTS = 32
# torch tells of what transformers collects while it exports, of native models, too
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")


def exportable(model: Any) -> Any:
    model.generation_config.cache_implementation = "static"
    return TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=SLOTS)


def bytes_of_cache(program: torch.export.ExportedProgram) -> int:
    return sum(buffer.nbytes for name, buffer in program.named_buffers() if name.split(".")[-1].startswith(("key_", "value_")))


@pytest.mark.parametrize(("key", "mixed", "bits"), [("llama-gqa", False, None), ("qwen2", True, 8)])
@torch.no_grad()
def test_a_program_with_a_small_cache(
    converted_folder: Callable[..., Path],
    mixed_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    mixed: bool,
    bits: int | None,
) -> None:
    monkeypatch.setattr("kvshare.runtime.kvshare_attention.LONG", 1)
    folder = mixed_folder(key) if mixed else converted_folder(key)
    model = kvshare.load(folder, dtype=torch.float32, cache_bits=bits)
    run = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert model.get_decoder().kvshare_choice.backend == "compiled"  # which no device has
    program = shared_cache(exportable(model)).export(input_ids=IDS[:, :1], cache_position=torch.tensor([0]))
    assert not [node for node in program.graph.nodes if node.op == "call_function" and "attend" in str(node.target)]

    module, tokens = program.module(), IDS[0].tolist()
    for position in range(IDS.shape[1] + 11):
        logits = module(input_ids=torch.tensor([[tokens[position]]]), cache_position=torch.tensor([position]))
        if position >= IDS.shape[1] - 1:
            tokens.append(int(logits[0, -1].argmax()))
    assert tokens == run.sequences[0].tolist()
    assert bytes_of_cache(program) * (IDS.shape[1] + 11) == cache_bytes(run.cache) * SLOTS


def test_what_has_no_small_cache_is_refused(converted_folder: Callable[..., Path]) -> None:
    native = AutoModelForCausalLM.from_pretrained(converted_folder("llama-gqa"), dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="no cache that could be smaller"):
        shared_cache(exportable(native))
    with pytest.raises(UsageError, match="holds 0 static caches"):
        shared_cache(native)
