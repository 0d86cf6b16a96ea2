"""A checkpoint in other tools' hands: adapters, FSDP2, continuous batching, offloaded caches, saving and loading again."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import prepared
import pytest
import torch
import torch.distributed as dist
from common import SMALL, random_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.continuous_batching import cache as paged

import kvshare
from kvshare.errors import UnsupportedModelError
from kvshare.paged import shared_pages
from kvshare.timing import cache_bytes
from kvshare.verification import verify_form

IDS = torch.arange(100, 130)[None]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("qwen2", {}),
    "window": ("mistral", {"sliding_window": 12}),
    # neither of these configs has a number of KV heads
    "pairs": ("gptj", {"rotary_dim": 4, "n_inner": 48, "num_key_value_heads": ...}),
    "one tensor": ("gpt_neox", {"partial_rotary_factor": 0.5, "hidden_dropout": 0.0, "num_key_value_heads": ...}),
    "both kinds": ("qwen3", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
}


@pytest.fixture(scope="module")
def folder(once: Callable[[str, Callable[[Path], Any]], Path]) -> Callable[[str], Path]:
    """A checkpoint with random weights by its key in KEYS; those of K and V were averaged."""

    def make(key: str, folder: Path) -> None:
        model_type, fields = KEYS[key]
        kvshare.convert(
            random_model(folder / "source", model_type, **(SMALL | fields)),
            folder / "out",
            init="mean",
            heal=False,
            eval_mode="off",
        )

    return lambda key: once(f"tools-{key}", lambda folder: make(key, folder)) / "out"


def native(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The paged caches that are made."""
    made: list[Any] = []
    begin = paged.PagedAttentionCache.__init__

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(paged.PagedAttentionCache, "__init__", keep)
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("key", [*KEYS])
def test_continuous_batching(
    folder: Callable[[str], Path], pages: list[Any], key: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are as many slots as kernels are worth it for: these know no pages."""
    monkeypatch.setattr("kvshare.runtime.kvshare_attention.LONG", 1)
    prompts = [list(range(100, 130)), list(range(200, 207)), list(range(300, 351))]
    config = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=-1)
    tokens = []
    for load, pages_for in ((native, nullcontext), (kvshare.load, nullcontext), (kvshare.load, shared_pages)):
        model = load(folder(key)).float()
        model.set_attn_implementation(attention)
        # requests are longer than a page, and than what a forward takes
        settings = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32)
        with pages_for(model):
            outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=settings, warmup=False)
        tokens.append([output.generated_tokens for output in outputs.values()])
    assert tokens[0] == tokens[1] == tokens[2]
    sizes = [{kind: allocator.bytes_per_page for kind, allocator in cache.cache_allocators.items()} for cache in pages]
    assert sizes[0] == sizes[1]
    assert sizes[2] == {kind: size // 2 if kind == "full_attention" else size for kind, size in sizes[0].items()}


def test_models_without_shared_pages_are_refused(
    mixed_folder: Callable[[str], Path], converted_folder: Callable[..., Path], folder: Callable[[str], Path]
) -> None:
    for model, why in (
        (kvshare.load(mixed_folder("qwen3")), "do not all share"),
        (kvshare.load(converted_folder("gpt2")), "gpt2 models"),
        (native(folder("biases")), "shared form"),
    ):
        with pytest.raises(UnsupportedModelError, match=why), shared_pages(model):
            pass


class Stream:
    """What stands for a CUDA stream where there is none."""

    def wait_stream(self, _other: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_offloaded_caches(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", lambda *_, **__: Stream())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Stream())
    outputs = []
    for load in (native, kvshare.load):
        model = load(folder("biases"))
        outputs.append(model.generate(IDS, cache=DynamicCache(config=model.config, offloading=True), **SETTINGS))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    sizes = [cache_bytes(output.cache) for output in outputs]
    assert 2 * sizes[1] == sizes[0]


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2(folder: Callable[[str], Path], mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    whole, sharded = (kvshare.load(folder("biases"), dtype=torch.float32) for _ in range(2))
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mesh=mesh)
    for model in (whole, sharded):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = dict(whole.named_parameters())
    for name, value in sharded.named_parameters():
        torch.testing.assert_close(value.grad.full_tensor(), expected[name].grad, atol=1e-6, rtol=0)
    assert torch.equal(sharded.generate(IDS, **SETTINGS).sequences, whole.generate(IDS, **SETTINGS).sequences)


# Forks of a process that has everything imported take a half of each model's heads.
SPLIT = """
import json
import sys
from pathlib import Path

import torch.distributed as dist
from killing import run_together
from test_tools import IDS, SETTINGS
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kvshare.timing import cache_bytes

out, folders = Path(sys.argv[1]), sys.argv[2:]

def job(again):
    dist.init_process_group("gloo")
    found = []
    for folder in folders:
        split = DistributedConfig(tp_size=2, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32", distributed_config=split)
        run = model.eval().generate(IDS, **SETTINGS)
        found.append((run.sequences.tolist(), cache_bytes(run.cache)))
    Path(out / str(dist.get_rank())).write_text(json.dumps(found))

print(run_together(job, out)[0])
"""


def test_tensor_parallelism(
    folder: Callable[[str], Path],
    mixed_folder: Callable[[str], Path],
    converted_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Biases, and copies of heads, are shared out with the rows of k_proj; what is no rows of k_proj is whole in both processes."""
    parts = {
        folder("biases"): 2,
        mixed_folder("llama-mha"): None,  # both have the head of a layer that has one
        converted_folder("llama-bias", form="rotated"): 2,
        converted_folder("phi3"): 1,
        converted_folder("square-bias", init="exact"): 1,
    }
    run = prepared.run(SPLIT, tmp_path, *parts)
    assert run.stdout.endswith("[0, 0]\n"), run.stderr
    for rank in (0, 1):
        for (path, share), (tokens, size) in zip(parts.items(), json.loads((tmp_path / str(rank)).read_text()), strict=True):
            whole = kvshare.load(path, dtype=torch.float32).generate(IDS, **SETTINGS)
            assert tokens == whole.sequences.tolist()
            held = cache_bytes(whole.cache)
            assert size * share == held if share else held < 2 * size < 1.1 * held


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_and_saved(folder: Callable[[str], Path], tmp_path: Path, dora: bool) -> None:
    targets = ["q_proj", "k_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(kvshare.load(folder("biases"), dtype=torch.float32), config)
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained, before = model(IDS).logits, kvshare.load(folder("biases"), dtype=torch.float32)(IDS).logits
    tokens = model.generate(input_ids=IDS, **SETTINGS).sequences
    assert float((trained - before).abs().max()) > 0.1
    model.merge_and_unload().save_pretrained(tmp_path / "merged")

    assert verify_form(tmp_path / "merged") == 2
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["auto_map"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True, dtype=torch.float32).eval()
    outputs = [loaded.generate(IDS, **SETTINGS) for loaded in (native(tmp_path / "merged"), again)]
    with torch.no_grad():
        torch.testing.assert_close(native(tmp_path / "merged")(IDS).logits, trained, atol=1e-4, rtol=0)
    assert torch.equal(outputs[0].sequences, tokens)
    assert torch.equal(outputs[1].sequences, tokens)
    sizes = [cache_bytes(output.cache) for output in outputs]
    assert 2 * sizes[1] == sizes[0]


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["k_proj"], lora_bias=True),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.HRAConfig(target_modules=["k_proj", "down_proj"], r=4),
    ],
    ids=lambda config: config.peft_type.value,
)
@torch.no_grad()
def test_adapters_that_have_to_do_with_biases(folder: Callable[[str], Path], config: peft.PeftConfig) -> None:
    """One adds a bias, one scales that of k_proj, one adds it itself: as when they are merged."""
    plain = kvshare.load(folder("biases"), dtype=torch.float32)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    for value in model.parameters():
        if value.requires_grad:
            value.add_(torch.randn_like(value), alpha=0.3)
    unmerged = model(IDS).logits
    assert float((unmerged - plain(IDS).logits).abs().max()) > 0.1
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, unmerged, atol=1e-4, rtol=0)


@pytest.mark.parametrize("key", ["biases", "window"])
def test_adapters_of_values_are_refused(folder: Callable[[str], Path], key: str) -> None:
    """An adapter of another form would lose its half: v_proj is what most are made for beside q_proj."""
    model = kvshare.load(folder(key), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"ValueBias\(k_proj makes keys and values\) is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


class InEightBits(torch.nn.Module):
    """What libraries put in the place of linear layers: it adds its bias itself."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.weight * self.scale, self.bias)


def in_eight_bits(model: Any) -> Any:
    for name, module in list(model.get_decoder().named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.get_decoder().set_submodule(name, InEightBits(module))
    return model


@pytest.mark.parametrize("key", ["qwen2", "phi", "llama-bias", "gpt_oss"])
@torch.no_grad()
def test_weights_in_few_bits(converted_folder: Callable[..., Path], key: str) -> None:
    """Whose modules add a bias that the shared form adds to keys alone, and behind the cache."""
    source = converted_folder(key)
    expected, got = in_eight_bits(native(source)), in_eight_bits(kvshare.load(source, dtype=torch.float32))
    torch.testing.assert_close(got(IDS).logits, expected(IDS).logits, atol=1e-4, rtol=0)
    outputs = [model.generate(IDS, **SETTINGS) for model in (expected, got)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    full, small = (cache_bytes(output.cache) for output in outputs)
    assert 2 * small == full


@pytest.mark.parametrize("key", ["phi3", "gpt_neox", "falcon"])
def test_a_fused_projection_in_few_bits_is_refused(converted_folder: Callable[..., Path], key: str) -> None:
    model = in_eight_bits(kvshare.load(converted_folder(key), dtype=torch.float32))
    with pytest.raises(ValueError, match="a InEightBits has taken the place of a projection"):
        model(IDS)


@pytest.mark.parametrize("key", ["qwen3", "phi3", "gpt2", "falcon", "gptj", "gemma4_text"])
@torch.no_grad()
def test_models_can_be_pickled_and_copied(converted_folder: Callable[..., Path], key: str) -> None:
    """As `torch.save` of a whole model and processes that are spawned need it."""
    model = kvshare.load(converted_folder(key, "all", "mean"), dtype=torch.float32)
    wanted = model.generate(IDS, **SETTINGS).sequences  # after which it holds what a forward keeps
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert torch.equal(other.generate(IDS, **SETTINGS).sequences, wanted)
        assert {type(module) for module in other.modules()} == {type(module) for module in model.modules()}
