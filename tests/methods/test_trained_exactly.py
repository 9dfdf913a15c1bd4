"""Every method changes exactly the parameters that it reports, and no other bit of the model.

Each method runs in the real training loop, with its checks of the first two steps, on models of several families.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig
from deltaw.methods.base import Method
from deltaw.methods.lora import LoRA
from deltaw.methods.prompt import SoftPrompt
from deltaw.methods.settings import LastSettings, PromptSettings, RandomSettings
from deltaw.methods.single_weights import Input, Random
from deltaw.methods.whole_parameters import Bias, Full, Head, Last
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.recognition import blocks_of
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.loop import train
from deltaw.training.rendered_rows import render_example
from deltaw.training.trained_check import may_skip
from tests.methods.rows import random_rows
from tests.tiny_models import CAUSAL, PADDED, causal_model

METHODS: dict[str, Callable[[], Method]] = {"lora": lambda: LoRA(LoRAConfig(rank=4)), "head": Head, "input": Input}
METHODS |= {"prompt": lambda: SoftPrompt(PromptSettings(length=3)), "bias": Bias}
METHODS |= {"random": lambda: Random(RandomSettings(weights=0.2)), "last": lambda: Last(LastSettings(blocks=1))}
METHODS |= {"full": Full}
# Only the rows of a step's tokens and the experts that a router selects are trained.
PARTIALLY_TRAINED = ("embed", "wte", "wpe", "prompt", "experts", "router")

NamedTensors = dict[str, torch.Tensor]


def values_of(model: nn.Module) -> NamedTensors:
    """Copy every tensor of the model, by each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def changed_names(model: nn.Module, before: NamedTensors) -> set[str]:
    """Return the names of the base model's tensors whose bits differ."""
    current = values_of(model)
    return {name for name, tensor in before.items() if not torch.equal(current[name], tensor)}


def run(
    model: PreTrainedModel,
    method: Method,
    objective: Callable[[PreTrainedModel], Any] = CausalObjective,
    batcher: Any = None,
    rows: Sequence[Any] = (),
    extra_modules: Sequence[str] = (),
    *,
    rate: float = 1e-2,
    steps: int = 3,
) -> NamedTensors:
    """Prepare and train the model, and return the trained parameters' values before the first step."""
    packed = model.config.model_type not in PADDED and batcher is None
    method.prepare(model, seed=0, extra_modules=extra_modules)
    named = method.parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in named}
    with packed_rows(model) if packed else torch.enable_grad(), method.evaluating(model):
        train(
            objective(model),
            [parameter for _, parameter in named],
            [render_example(row, method) for row in rows or random_rows(6)],
            batcher or CausalMicroBatcher(1024, packed, not packed, "cpu"),
            learning_rate=rate,
            total_steps=steps,
            batch_size=3,
            names=[name for name, _ in named],
            may_skip=may_skip(model),
            after_step=lambda: method.after_step(model),
        )
    return start


def check_moved(model: nn.Module, method: Method, start: NamedTensors) -> None:
    """Check that every reported parameter changed. Except for tables and experts, most entries must change."""
    named = dict(method.parameters(model))
    assert named.keys() == start.keys() and named
    for name, parameter in named.items():
        moved = (parameter != start[name]).float().mean()
        min_share = 0.0 if any(part in name for part in PARTIALLY_TRAINED) or name.endswith(".values") else 0.5
        assert moved > min_share, f"{name}: {moved:.0%} of its entries moved"


def expected_names(base: PreTrainedModel, name: str) -> set[str]:
    """Return the names of the base model's parameters that a method trains, derived independently of its code."""
    names = {n for n, _ in base.named_parameters(remove_duplicate=False)}
    modules = {id(module): n for n, module in base.named_modules()}
    if name in ("lora", "prompt"):
        return set()
    if name == "head":
        return {n for n in names if n.startswith(modules[id(base.get_output_embeddings())] + ".")}
    if name == "input":
        return {modules[id(base.get_input_embeddings())] + ".weight"}
    if name == "bias":
        return {n for n in names if n.endswith(".bias")}
    if name == "last":
        path, blocks = blocks_of(base) or ("", nn.ModuleList())
        return {n for n in names if n.startswith(f"{path}.{len(blocks) - 1}.")}
    return names


@pytest.mark.each_value
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", [*CAUSAL, *PADDED])
def test_method_changes_exactly_its_reported_parameters(family: str, name: str) -> None:
    base = causal_model(family)
    model = copy.deepcopy(base)
    before = values_of(base)
    method = METHODS[name]()
    if (family, name) == ("mamba", "lora"):  # the model uses the other layers' weights without calling the layers
        method = LoRA(LoRAConfig(rank=4, target_modules=["in_proj", "x_proj"]))
    check_moved(model, method, run(model, method))
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = expected_names(base, name)
    moved = changed_names(model, before)
    assert moved == trained or (name == "random" and moved <= trained)
    replaced = {n for replacement in getattr(method, "_replacements", []) for n in replacement.names}
    assert trained <= replaced or name == "random"
    if not method.can_restore_base(model):
        assert name in ("head", "input", "bias", "last", "full")
        with pytest.raises(UserError, match=rf"'{name}' trained the base model's parameters in place"):
            method.base_model_active(model).__enter__()
        return
    with method.base_model_active(model):
        assert changed_names(model, before) == set()
    assert changed_names(model, before) == moved


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_random_changes_only_chosen_weights(family: str) -> None:
    base = causal_model(family)
    model = copy.deepcopy(base)
    method = Random(RandomSettings(weights=0.1))
    run(model, method)
    tensors = method.tensors()
    current = values_of(model)
    moved = 0
    chosen = sum(t.numel() for name, t in tensors.items() if name.endswith(".indices"))
    assert chosen == round(0.1 * sum(p.numel() for p in base.parameters()))
    for name, weight in base.named_parameters():
        differs = (current[name] != weight).flatten()
        moved += int(differs.sum())
        differs[tensors.get(f"{name}.indices", torch.zeros(0)).long()] = False
        assert not differs.any(), name
    assert moved > chosen / 3


# Modules that are trained in addition to A and B, by family and suffix of their names.
_TWO = ("input_layernorm", "post_attention_layernorm")
_TABLE = ("embed_tokens",)
EXTRAS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {"norms": (*_TWO, "norm"), "embeddings": _TABLE},
    "qwen3": {"norms": (*_TWO, "q_norm", "k_norm"), "embeddings": _TABLE},
    "gemma3": {"norms": ("pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"), "embeddings": _TABLE},
    "gpt2": {"norms": ("ln_1", "ln_2", "ln_f"), "embeddings": ("wte", "wpe")},
    "neox": {"norms": _TWO, "embeddings": ("embed_in",)},
    "phi3": {"norms": _TWO, "embeddings": _TABLE},
}
TARGETS = {"gpt2": ["c_attn"], "neox": ["query_key_value"], "phi3": ["qkv_proj"], "phi": ["q_proj", "dense"]}


def lora_with(family: str, **settings: object) -> LoRA:
    """Create LoRA with target modules of this family."""
    targets = TARGETS.get(family, ["q_proj", "v_proj"])
    return LoRA(LoRAConfig(rank=4, target_modules=targets, **settings))  # type: ignore[arg-type]


def check_extras(family: str, method: LoRA, is_trained: Callable[[str], bool]) -> None:
    """Check that LoRA changes its factors and the base parameters selected by ``is_trained``, and no others."""
    base = causal_model(family)
    model = copy.deepcopy(base)
    before = values_of(base)
    start = run(model, method)
    check_moved(model, method, start)
    extra = {name for name, _ in base.named_parameters(remove_duplicate=False) if is_trained(name)}
    assert extra and changed_names(model, before) == extra
    factors = {name for name in start if name.endswith(("lora_A", "lora_B"))}
    assert factors and set(start) - factors == extra
    with method.base_model_active(model):
        assert changed_names(model, before) == set()


@pytest.mark.each_value
@pytest.mark.parametrize("family", EXTRAS)
@pytest.mark.parametrize("extra", ["norms", "mlp", "lm_head", "embeddings"])
def test_lora_changes_only_factors_and_extra_modules(extra: str, family: str) -> None:
    modules = EXTRAS[family].get(extra, (extra,))
    method = lora_with(family, train_modules=list(modules))
    check_extras(family, method, lambda name: any(f".{module}." in f".{name}" for module in modules))


@pytest.mark.each_value
@pytest.mark.parametrize("family", ["gpt2", "neox", "phi"])
@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_lora_changes_only_factors_and_biases(kind: str, family: str) -> None:
    method = lora_with(family, bias=kind)
    adapted = tuple(f".{target}.bias" for target in TARGETS[family])
    check_extras(family, method, lambda name: name.endswith(".bias" if kind == "all" else adapted))
