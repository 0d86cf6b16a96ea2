"""Loading models: a source in its native form, a checkpoint in its shared form.

In: a folder or a `Source`. Out: a transformers model in evaluation mode. Never: runs code that lies beside a model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.errors import BadCheckpointError
from kvshare.verification import verify_form

Forward = Callable[[Tensor], Tensor]  # token ids (rows, length) to logits (rows, length, vocabulary)


def load(
    checkpoint: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
) -> Any:
    """A kvshare checkpoint as a transformers model that caches one tensor where the source caches two: half the bytes.

    Args:
        checkpoint: a folder that kvshare wrote.
        dtype: of the weights; `auto` is the stored one.
        device_map, attn_implementation: as for transformers' `from_pretrained`.

    Raises:
        BadCheckpointError: not a kvshare checkpoint, missing tensors, or k_proj and v_proj that do not fit its form.
    """
    import transformers

    from kvshare.runtime.modeling_kvshare import shared_class

    folder = Path(checkpoint)
    verify_form(folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    native = getattr(transformers, config.architectures[0])
    return _strict(shared_class(native), folder, dtype=dtype, device_map=device_map, attn_implementation=attn_implementation)


def load_native(folder: Path, *, dtype: torch.dtype | str = "auto", device_map: Any = None) -> Any:
    """A model folder, shared or not, through transformers' own class.

    Raises:
        BadCheckpointError: missing tensors.
    """
    import transformers

    return _strict(transformers.AutoModelForCausalLM, folder, dtype=dtype, device_map=device_map, trust_remote_code=False)


def plain_forward(model: Any) -> Forward:
    """A model's own forward, without a cache."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


def _strict(loader: Any, folder: Path, **options: Any) -> Any:
    """Load, and treat a tensor that is missing as the error it is: transformers would fill it with random numbers."""
    given = {name: value for name, value in options.items() if value is not None}
    model, info = loader.from_pretrained(folder, local_files_only=True, output_loading_info=True, **given)
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadCheckpointError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}",
            "the model would compute with random numbers in their place",
            "download or convert the model again",
        )
    return model.eval()
