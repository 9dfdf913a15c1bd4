"""Selection of target modules, and errors for settings that match none."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, attach
from deltaw.lora.select import layer_index, select
from tests.lora.models import FAMILIES, peft_factors, tiny, with_peft
from tests.tiny_models import causal_model


def _names(model: nn.Module, **settings: object) -> list[str]:
    return [target.names[0] for target in select(model, LoRAConfig(**settings)).targets]


def _last_components(model: nn.Module, **settings: object) -> set[str]:
    return {name.rpartition(".")[2] for name in _names(model, **settings)}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_matches_peft_and_excludes_classifier(family):
    model = tiny(family)
    task = {"task_type": "SEQ_CLS"} if family in ("bert", "albert", "vit") else {}
    assert _names(model) == list(peft_factors(with_peft(model, r=2, target_modules="all-linear", **task)))


_ATTENTION_AND_MLP = [
    ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
    ("gpt2", {"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
    ("neox", {"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
    ("phi3", {"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
    ("bert", {"query", "key", "value", "dense"}, {"dense"}),
    ("albert", {"query", "key", "value", "dense"}, {"ffn", "ffn_output"}),
    ("t5", {"q", "k", "v", "o"}, {"wi", "wo"}),
    ("vit", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"fc1", "fc2"}),
]


@pytest.mark.parametrize(("family", "attention", "mlp"), _ATTENTION_AND_MLP)
def test_attention_and_mlp_select_by_name(family, attention, mlp):
    model = tiny(family)
    assert _last_components(model, target_modules="attention") == attention
    assert _last_components(model, target_modules="mlp") == mlp
    both = _names(model, target_modules="attention") + _names(model, target_modules="mlp")
    assert len(both) == len(set(both))


def test_list_matches_suffixes_and_string_matches_full_names():
    model = tiny("llama")
    assert len(_names(model, target_modules=["self_attn.q_proj", "model.layers.1.mlp.up_proj"])) == 3
    names = _names(model, target_modules=r".*\.1\..*(q|v)_proj")
    assert names == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_excluded_modules_and_their_children_are_skipped():
    model = tiny("llama")
    assert _last_components(model, exclude_modules=["mlp"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "up_proj" not in _last_components(model, exclude_modules=["up_proj"])
    assert all(".0." not in n for n in _names(model, exclude_modules=r".*layers\.0\..*"))


def test_layers_select_by_first_number_in_name():
    model = tiny("llama")
    assert all(".1." in n for n in _names(model, layers="1-"))
    assert all(".0." in n for n in _names(model, layers=[0]))
    assert layer_index("encoder.block.3.layer.0.SelfAttention.q") == 3
    assert layer_index("lm_head") is None


def test_first_matching_pattern_key_applies():
    model = tiny("llama")
    attach(model, LoRAConfig(rank=4, rank_pattern={r"layers\.0\..*q_proj": 2, "q_proj": 3}))
    ranks = [layer.self_attn.q_proj.rank for layer in model.model.layers]
    assert ranks == [2, 3] and model.model.layers[0].mlp.up_proj.rank == 4


def _make_model(model_type: str, **overrides: object) -> nn.Module:
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **overrides)
    return transformers.AutoModelForCausalLM.from_config(config)


_JAMBA = {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 1, "use_mamba_kernels": False}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "overrides"), [("mamba", {}), ("falcon_mamba", {}), ("jamba", {**_JAMBA, **_HEADS})]
)
def test_mamba_step_projection_is_rejected_by_name(model_type, overrides):
    model = _make_model(model_type, **overrides)
    for targets in (["dt_proj"], ["in_proj", "dt_proj"], r".*\.dt_proj", "all-linear"):
        message = _rejection_message(model, target_modules=targets)
        assert re.search(r"dt_proj' cannot be adapted: .*without calling", message)
    message = _rejection_message(model, target_modules=[], target_parameters=["dt_proj.weight"])
    assert re.search(r"dt_proj\.weight' cannot be adapted: .*without calling", message)
    attach(model, LoRAConfig(rank=2, target_modules=["in_proj", "x_proj"]))


def test_called_layer_of_same_name_is_adapted():
    model = _make_model("doge", num_attention_heads=2, num_key_value_heads=1)
    assert attach(model, LoRAConfig(rank=2, target_modules=["dt_proj"])).adapted == 2


def _linear_layers(count: int) -> nn.Module:
    """Create a model of ``count`` bias-free linear layers, each next to an ``nn.Identity``."""
    layer = [nn.Linear(2, 2, bias=False) for _ in range(count)]
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"a": x, "b": nn.Identity()}) for x in layer)})


def _lines_and_calls(work: Callable[[], object]) -> int:
    """Count the lines and calls of Python that ``work`` runs. Unlike time, it is independent of the machine's load."""
    total = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal total
        total += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        work()
    finally:
        sys.settrace(before)
    return total


def test_attach_work_is_linear_in_number_of_layers():
    attach(_linear_layers(1), LoRAConfig(rank=1))  # fill caches and import modules
    small = _linear_layers(20)
    large = _linear_layers(200)
    twenty = _lines_and_calls(lambda: attach(small, LoRAConfig(rank=1)))
    two_hundred = _lines_and_calls(lambda: attach(large, LoRAConfig(rank=1)))
    assert two_hundred - twenty < 1.05 * 180 * (twenty / 20)  # quadratic work would add 99 times ``twenty``


def test_torch_attention_counts_as_one_linear_module():
    summary = attach(_encoder(), LoRAConfig(rank=2))
    assert summary.matches["target_modules 'all-linear'"] == ("self_attn", "linear1", "linear2")
    assert summary.adapted == 4  # two projections in the attention
    assert attach(_encoder(), LoRAConfig(rank=2, target_modules="attention")).adapted == 2


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 3, 4))
        self.flat = nn.Parameter(torch.randn(4))
        self.integers = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Parameter(torch.randn(3, 3))
        self.embed = nn.Embedding(7, 4, padding_idx=1)
        self.holder = _Holder()
        self.lin = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.config = types.SimpleNamespace(tie_word_embeddings=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def _llama() -> nn.Module:
    return tiny("llama")


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16)


def _module_dict(**modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict(modules)


def _rejection_message(model: nn.Module, **settings: object) -> str:
    """Check that these settings raise and leave the model unchanged, and return the message."""
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    with pytest.raises(UserError) as raised:
        attach(model, LoRAConfig(**{"rank": 2, **settings}))
    assert before == {name: (id(module), module.training) for name, module in model.named_modules()}
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return str(raised.value)


_LIN = {"target_modules": ["lin"]}
_NO_MODULES = {"target_modules": []}


_UNSUPPORTED_TARGETS = [
    (_llama, {"target_modules": ["q_proj", "v_porj"]}, "target_modules.*v_proj"),
    (_llama, {"target_modules": ["proj"]}, "matches no module"),
    (_llama, {"target_modules": "q_proj"}, r"\['q_proj'\]"),
    (_llama, {"target_modules": ["mlp"]}, "gate_proj"),
    (_llama, {"target_modules": ["up_proj"], "exclude_modules": ["mlp"]}, "leaves nothing"),
    (_llama, {"exclude_modules": ["up_prj"]}, "exclude_modules.*up_proj"),
    (_llama, {"rank_pattern": {"k_prj": 2}}, "rank_pattern.*k_proj"),
    (_llama, {"alpha_pattern": {"down": 2.0}}, "alpha_pattern.*down_proj"),
    (_llama, {"train_modules": ["lm_heat"]}, "train_modules.*lm_head"),
    (_llama, {"layers": "1-7"}, "layers.*0 to 1"),
    (_llama, {"layers": [5]}, "layers.*0 to 1"),
    (_llama, {"target_modules": ["all-linear"]}, "target_modules.*without a list"),
    (_llama, {"target_modules": ["q_proj"], "rank_pattern": {"up_proj": 2}}, "rank_pattern.*q_proj"),
    (lambda: causal_model("mixtral"), {"target_modules": ["experts"]}, "MixtralExperts"),
    (lambda: causal_model("mamba"), {"target_modules": ["out_proj"]}, "fused kernels"),
    (lambda: nn.Linear(3, 3), {}, "from_linear"),
    (_module_dict(norm=nn.LayerNorm(4), lin=nn.Linear(4, 4)), {"target_modules": ["norm"]}, "LayerNorm"),
    (_module_dict(layer=_encoder()), {"target_modules": ["out_proj"]}, r"as a whole: 'layer\.self_attn'"),
    (_module_dict(layer=_encoder()), {**_NO_MODULES, "target_parameters": ["out_proj.weight"]}, "without calling it"),
    (_encoder, {"dora": True}, r"nn\.MultiheadAttention has no dora"),
    (_Parts, {**_LIN, "target_parameters": ["holder.frist"]}, "'holder.frist' matches no parameter.*holder.first"),
    (_Parts, {**_LIN, "target_parameters": ["direct"]}, "a parameter of the model itself"),
    (_Parts, {**_LIN, "target_parameters": ["first"]}, "has no forward that uses it"),
    (_Parts, {**_LIN, "target_parameters": ["flat"]}, "1 dimensions"),
    (_Parts, {**_LIN, "target_parameters": ["integers"]}, "int64"),
    (_Parts, {**_LIN, "target_parameters": ["lin.weight"]}, "target_modules adapts its module"),
    (_Parts, {**_NO_MODULES, "target_parameters": ["lin.weight"], "train_modules": ["lin"]}, "in full"),
    (_Parts, {**_NO_MODULES, "target_parameters": ["embed.weight"], "init": "pissa"}, "init 'pissa'"),
    (_Parts, {**_LIN, "trainable_token_indices": [7]}, "token 7 is not in 'embed', which has 7 rows"),
    (_Parts, {**_LIN, "trainable_token_indices": [1]}, "padding"),
    (_Parts, {**_LIN, "trainable_token_indices": {"embedd": [2]}}, "matches no module.*embed"),
    (_Parts, {**_LIN, "trainable_token_indices": {"holder": [2]}}, "neither an embedding nor a linear head"),
    (_Parts, {"trainable_token_indices": [2], "target_modules": ["embed"]}, "adapts it already"),
    (_Parts, {"trainable_token_indices": [2], "target_modules": ["tied"]}, "'embed' is tied to 'tied'"),
    (_Parts, {**_LIN, "trainable_token_indices": [2], "train_modules": ["embed"]}, "trains it in full"),
    (_Parts, {"target_modules": ["embed"], "lora_bias": True}, "lora_bias does not support embeddings"),
]


@pytest.mark.parametrize(("make", "settings", "pattern"), _UNSUPPORTED_TARGETS)
def test_unsupported_target_error_names_closest_match(make, settings, pattern):
    assert re.search(pattern, message := _rejection_message(make(), **settings), re.DOTALL), message
