"""Which modules a config means, and what is said where it means none."""

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


def _lasts(model: nn.Module, **settings: object) -> set[str]:
    return {name.rpartition(".")[2] for name in _names(model, **settings)}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("bert", "albert", "vit")])
def test_all_linear_is_what_peft_takes(family):
    model = tiny(family)
    theirs = peft_factors(with_peft(model, r=2, target_modules="all-linear"))
    assert _names(model) == list(theirs)


@pytest.mark.parametrize("family", ["bert", "albert", "vit"])
def test_all_linear_leaves_a_classifier_out_as_peft_does(family):
    model = tiny(family)
    peft = with_peft(model, r=2, target_modules="all-linear", task_type="SEQ_CLS")
    assert _names(model) == list(peft_factors(peft))


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
        ("neox", {"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
        ("phi3", {"qkv_proj", "o_proj"}, {"gate_up_proj", "down_proj"}),
        ("bert", {"query", "key", "value", "dense"}, {"dense"}),
        ("albert", {"query", "key", "value", "dense"}, {"ffn", "ffn_output"}),
        ("t5", {"q", "k", "v", "o"}, {"wi", "wo"}),
        ("vit", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"fc1", "fc2"}),
    ],
)
def test_attention_and_mlp_are_known_by_name(family, attention, mlp):
    model = tiny(family)
    assert _lasts(model, target_modules="attention") == attention
    assert _lasts(model, target_modules="mlp") == mlp
    both = _names(model, target_modules="attention") + _names(model, target_modules="mlp")
    assert len(both) == len(set(both))


def test_fused_experts_are_no_linear_layers():
    model = causal_model("mixtral")
    assert _lasts(model) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UserError, match="MixtralExperts"):
        attach(model, LoRAConfig(target_modules=["experts"]))


def test_a_list_matches_endings_after_a_dot_only():
    model = tiny("llama")
    assert len(_names(model, target_modules=["self_attn.q_proj", "model.layers.1.mlp.up_proj"])) == 3
    with pytest.raises(UserError, match="matches no module"):
        _names(model, target_modules=["proj"])


def test_a_text_is_a_regular_expression_for_full_names():
    model = tiny("llama")
    assert _names(model, target_modules=r".*\.1\..*(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(UserError, match=r"\['q_proj'\]"):
        _names(model, target_modules="q_proj")


@pytest.mark.parametrize(
    ("settings", "key", "nearest"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules", "v_proj"),
        ({"exclude_modules": ["up_prj"]}, "exclude_modules", "up_proj"),
        ({"rank_pattern": {"k_prj": 2}}, "rank_pattern", "k_proj"),
        ({"alpha_pattern": {"down": 2.0}}, "alpha_pattern", "down_proj"),
        ({"train_modules": ["lm_heat"]}, "train_modules", "lm_head"),
        ({"layers": "1-7"}, "layers", "0 to 1"),
        ({"layers": [5]}, "layers", "0 to 1"),
        ({"target_modules": ["all-linear"]}, "target_modules", "without a list"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"up_proj": 2}}, "rank_pattern", "q_proj"),
    ],
)
def test_an_entry_that_matches_nothing_names_the_nearest(settings, key, nearest):
    model = tiny("llama")
    before = {n: (id(m), m.training) for n, m in model.named_modules()}
    with pytest.raises(UserError) as caught:
        attach(model, LoRAConfig(**settings))
    assert key in str(caught.value) and nearest in str(caught.value)
    assert before == {n: (id(m), m.training) for n, m in model.named_modules()}
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_excluded_is_left_out_with_all_below_it():
    model = tiny("llama")
    assert _lasts(model, exclude_modules=["mlp"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "up_proj" not in _lasts(model, exclude_modules=["up_proj"])
    assert all(".0." not in n for n in _names(model, exclude_modules=r".*layers\.0\..*"))
    with pytest.raises(UserError, match="leaves nothing"):
        _names(model, target_modules=["up_proj"], exclude_modules=["mlp"])


def test_layers_choose_by_the_first_number_in_a_name():
    model = tiny("llama")
    assert all(".1." in n for n in _names(model, layers="1-"))
    assert all(".0." in n for n in _names(model, layers=[0]))
    assert layer_index("encoder.block.3.layer.0.SelfAttention.q") == 3
    assert layer_index("lm_head") is None


def test_layers_equal_pefts():
    model = tiny("t5")
    peft = with_peft(model, r=2, target_modules=["q", "wi"], layers_to_transform=[1])
    assert _names(model, target_modules=["q", "wi"], layers=[1]) == list(peft_factors(peft))


def test_the_first_key_of_a_pattern_that_matches_counts():
    model = tiny("llama")
    attach(model, LoRAConfig(rank=4, rank_pattern={r"layers\.0\..*q_proj": 2, "q_proj": 3}))
    ranks = [layer.self_attn.q_proj.rank for layer in model.model.layers]
    assert ranks == [2, 3] and model.model.layers[0].mlp.up_proj.rank == 4


def test_what_cannot_be_adapted_is_refused_by_name():
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "lin": nn.Linear(4, 4)})
    with pytest.raises(UserError, match="LayerNorm"):
        attach(model, LoRAConfig(target_modules=["norm"]))
    with pytest.raises(UserError, match="gate_proj"):
        attach(tiny("llama"), LoRAConfig(target_modules=["mlp"]))


def test_a_weight_that_is_read_past_its_module_is_refused_with_the_hint():
    model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16)})
    with pytest.raises(UserError, match=r"as a whole: 'layer\.self_attn'"):
        attach(model, LoRAConfig(rank=2, target_modules=["out_proj"]))
    with pytest.raises(UserError, match="without calling it"):
        attach(model, LoRAConfig(target_modules=[], target_parameters=["out_proj.weight"]))
    with pytest.raises(UserError, match="fused kernels"):
        attach(causal_model("mamba"), LoRAConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "jamba"])
def test_the_step_projection_of_a_mamba_block_is_refused_by_name(model_type):
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    jamba = {"attn_layer_offset": 1, "attn_layer_period": 2, "num_attention_heads": 2, "num_experts": 1}
    more = {**jamba, "num_key_value_heads": 2, "use_mamba_kernels": False} if model_type == "jamba" else {}
    config = transformers.AutoConfig.for_model(model_type, **sizes, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_modules() if name.endswith("dt_proj")]
    assert names
    before = [type(model.get_submodule(name)) for name in names]
    for targets in (["dt_proj"], ["in_proj", "dt_proj"], r".*\.dt_proj", "all-linear"):
        with pytest.raises(UserError, match=r"dt_proj' cannot be adapted: .*without calling"):
            attach(model, LoRAConfig(rank=2, target_modules=targets))
    with pytest.raises(UserError, match=r"dt_proj\.weight' cannot be adapted: .*without calling"):
        attach(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["dt_proj.weight"]))
    assert [type(model.get_submodule(name)) for name in names] == before
    attach(model, LoRAConfig(rank=2, target_modules=["in_proj", "x_proj"]))


def test_a_layer_of_the_same_name_that_its_module_calls_is_adapted():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    config = transformers.AutoConfig.for_model("doge", **sizes, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert attach(model, LoRAConfig(rank=2, target_modules=["dt_proj"])).adapted == 2


def test_a_model_that_is_one_layer_says_what_to_do():
    with pytest.raises(UserError, match="from_linear"):
        attach(nn.Linear(3, 3), LoRAConfig())


def _linear_layers(count: int) -> nn.Module:
    """A model of ``count`` bias-free linear layers, each next to a module that is none."""
    layer = [nn.Linear(2, 2, bias=False) for _ in range(count)]
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"a": x, "b": nn.Identity()}) for x in layer)})


def _lines_and_calls(work: Callable[[], object]) -> int:
    """How many lines and calls of Python ``work`` runs: no clock, so the machine's load changes nothing."""
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


def test_adapting_takes_the_same_work_for_each_layer_however_many_there_are():
    attach(_linear_layers(1), LoRAConfig(rank=1))  # what is imported and remembered at the first use
    few, many = _linear_layers(50), _linear_layers(500)
    fifty = _lines_and_calls(lambda: attach(few, LoRAConfig(rank=1)))
    five_hundred = _lines_and_calls(lambda: attach(many, LoRAConfig(rank=1)))
    assert five_hundred - fifty < 1.05 * 450 * (fifty / 50)  # a square would add 99 times fifty's


def test_an_attention_of_torch_counts_as_one_linear_module():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    summary = attach(model, LoRAConfig(rank=2))
    assert summary.matches["target_modules 'all-linear'"] == ("self_attn", "linear1", "linear2")
    assert summary.adapted == 4  # two projections in the attention
    assert attach(nn.TransformerEncoderLayer(8, 2, 16), LoRAConfig(rank=2, target_modules="attention")).adapted == 2
    with pytest.raises(UserError, match=r"nn\.MultiheadAttention has no dora"):
        attach(nn.TransformerEncoderLayer(8, 2, 16), LoRAConfig(rank=2, dora=True))


class _Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 3, 4))
        self.flat = nn.Parameter(torch.randn(4))
        self.whole = nn.Parameter(torch.arange(6).view(2, 3), requires_grad=False)


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(3, 3))
        self.embed = nn.Embedding(7, 4, padding_idx=1)
        self.holder = _Holder()
        self.lin = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.config = types.SimpleNamespace(tie_word_embeddings=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_parameters": ["holder.frist"]}, "'holder.frist' matches no parameter.*holder.first"),
        ({"target_parameters": ["own"]}, "a parameter of the model itself"),
        ({"target_parameters": ["first"]}, "no forward of its own"),
        ({"target_parameters": ["flat"]}, "1 dimensions"),
        ({"target_parameters": ["whole"]}, "int64"),
        ({"target_parameters": ["lin.weight"]}, "target_modules adapts its module"),
        ({"target_parameters": ["lin.weight"], "train_modules": ["lin"], "target_modules": []}, "in full"),
        ({"target_parameters": ["embed.weight"], "init": "pissa", "target_modules": []}, "init 'pissa'"),
        ({"trainable_token_indices": [7]}, "token 7 is not in 'embed', which has 7 rows"),
        ({"trainable_token_indices": [1]}, "padding"),
        ({"trainable_token_indices": {"embedd": [2]}}, "matches no module.*embed"),
        ({"trainable_token_indices": {"holder": [2]}}, "neither an embedding nor a linear head"),
        ({"trainable_token_indices": [2], "target_modules": ["embed"]}, "adapts it already"),
        ({"trainable_token_indices": [2], "target_modules": ["tied"]}, "'embed' is tied to 'tied'"),
        ({"trainable_token_indices": [2], "train_modules": ["embed"]}, "trains it in full"),
        ({"target_modules": ["embed"], "lora_bias": True}, "lora_bias is not for embeddings"),
    ],
)
def test_parts_that_cannot_be_adapted_are_refused_by_name(settings, said):
    model = _Parts()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UserError) as caught:
        attach(model, LoRAConfig(**{"rank": 2, "target_modules": ["lin"], **settings}))
    assert re.search(said, str(caught.value), re.DOTALL), caught.value
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
