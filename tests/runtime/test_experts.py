"""Tests of mixture-of-experts models whose experts run as grouped products."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runtime.experts import FusedExperts, experts_form
from deltaw.runtime.fused_parts import fused_parts
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.packing_checks import can_pack
from deltaw.runtime.recognition import blocks_of

SIZES = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 3}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 32, "shared_intermediate_size": 32}
ERNIE = {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "moe_layer_start_index": 0}
FAMILIES = {
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "mixtral": EXPERTS,
    "granitemoe": EXPERTS,
    "granitemoehybrid": EXPERTS | SHARED | {"layer_types": ["attention"] * 2},
    "lfm2_moe": EXPERTS | {"num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "gpt_oss": EXPERTS,
    "ernie4_5_moe": ERNIE,
    "qwen3_5_moe_text": EXPERTS | SHARED | {"layer_types": ["full_attention"] * 2},
}
LENGTHS = (21, 3, 18, 1, 40)
PARENTS = (-1, 0, 0, -1, -1)


def moe_model(family, implementation="eager", dtype=torch.float32, **changes):
    """Create a frozen model whose experts have an effect."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    config._experts_implementation = implementation
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval().requires_grad_(False)


def adapted(model, **settings):
    attach(model, LoRAConfig(rank=4, alpha=8, **settings), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, [parameter for _, parameter in adapter_parameters(model)]


def router_of(model):
    """Return the names of the router weights."""
    return [name for name, _ in model.named_parameters() if "gate.weight" in name or "router.weight" in name]


@contextlib.contextmanager
def fused_experts(model, fallback=False):
    """Context in which only the experts are replaced. Without ``fallback``, running the model's code is an error."""
    blocks = blocks_of(model.base_model)[1]
    parts = [part for block in blocks for part in fused_parts(block) if isinstance(part, FusedExperts)]
    assert parts
    for part in parts:
        part.module.forward = part
        part.original_forward = part.original_forward if fallback else None
    try:
        yield
    finally:
        for part in parts:
            del vars(part.module)["forward"]


def assert_close(actual, expected, tolerance):
    for left, right in zip(actual, expected, strict=True):
        assert float((left - right).detach().abs().max()) <= tolerance * float(right.detach().abs().max())


def step(model, trained, tokens, **inputs):
    """Return the hidden states and the gradients of the trained parameters."""
    hidden = model.base_model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
    slopes = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.dtype)
    return hidden.detach(), torch.autograd.grad((hidden * slopes).sum(), trained)


TOKENS = torch.randint(3, 120, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :1]], ids=["rows", "one token"])
def test_outputs_and_gradients_equal_transformers(family, tokens):
    model, factors = adapted(moe_model(family), target_modules="all-linear")
    trained = [*factors, *(model.get_parameter(name).requires_grad_() for name in router_of(model))]
    expected = step(model, trained, tokens)
    with fused_experts(model):
        computed = step(model, trained, tokens)
    assert_close(computed[:1], expected[:1], 1e-5)
    largest = max(float(grad.abs().max()) for grad in expected[1])
    moving = [index for index, grad in enumerate(expected[1]) if grad.abs().max() > 1e-4 * largest]
    assert_close([computed[1][i] for i in moving], [expected[1][i] for i in moving], 5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_of_experts_equal_updated_weights(family):
    names = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
    model, factors = adapted(moe_model(family), **names)
    expected = step(model, factors, TOKENS)
    with fused_experts(model):
        computed = step(model, factors, TOKENS)
    assert_close(computed[:1], expected[:1], 1e-5)
    assert_close(computed[1], expected[1], 5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_separate_rows(family):
    model, factors = adapted(moe_model(family), target_modules="all-linear")
    if not can_pack(model).value:
        pytest.skip("the attention of this family is not packed")
    layout = Layout.of_lengths(LENGTHS, PARENTS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 120, (layout.length,), generator=generator)
    slopes = torch.randn(layout.length, 64, generator=generator)
    parts = torch.split(torch.arange(layout.length), LENGTHS)
    outputs = torch.empty_like(slopes)
    total = torch.zeros(())
    for part, parent in zip(parts, PARENTS, strict=True):
        places = part if parent < 0 else torch.cat([parts[parent], part])
        hidden = model.base_model(input_ids=tokens[places][None], use_cache=False).last_hidden_state[0, -len(part) :]
        outputs[part] = hidden.detach()
        total = total + (hidden * slopes[part]).sum()
    expected = torch.autograd.grad(total, factors)
    inputs = {"position_ids": torch.from_numpy(layout.positions())[None], "packed_layout": layout}
    with packed_rows(model):
        assert any(isinstance(vars(m).get("forward"), FusedExperts) for m in model.modules())
        hidden = model.base_model(input_ids=tokens[None], use_cache=False, **inputs).last_hidden_state[0]
        computed = torch.autograd.grad((hidden * slopes).sum(), factors)
    assert_close([hidden], [outputs], 1e-5)
    assert_close(computed, expected, 5e-5)


def test_checkpointing_gives_the_same_gradients():
    names = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    model, factors = adapted(moe_model("qwen3_moe"), **names)
    with fused_experts(model):
        expected = step(model, factors, TOKENS)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        computed = step(model, factors, TOKENS)
    assert_close([computed[0], *computed[1]], [expected[0], *expected[1]], 1e-6)


def test_bf16_is_as_exact_as_transformers():
    exact, factors = adapted(moe_model("qwen3_moe"), target_modules=["q_proj"])
    exact.to(torch.bfloat16).float()
    expected = step(exact, factors, TOKENS)
    model, factors = adapted(moe_model("qwen3_moe", "grouped_mm", torch.bfloat16), target_modules=["q_proj"])
    theirs = step(model, factors, TOKENS)
    with fused_experts(model):
        ours = step(model, factors, TOKENS)
    for index in range(len(factors)):
        error, reference = ((side[1][index] - expected[1][index]).norm() for side in (ours, theirs))
        assert error <= 1.2 * reference


def test_trained_weights_run_the_model_code():
    model = moe_model("olmoe")
    experts = model.model.layers[0].mlp.experts
    weight = experts.down_proj.requires_grad_()
    expected = step(model, [weight], TOKENS)[1]
    with fused_experts(model, fallback=True):
        assert_close(step(model, [weight], TOKENS)[1], expected, 5e-5)


def test_unsupported_calls_run_the_model_code_with_updated_weights():
    model, factors = adapted(moe_model("olmoe"), target_parameters=["experts.down_proj"], target_modules=[])
    expected = step(model, factors, TOKENS)
    for layer in model.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    with fused_experts(model, fallback=True):
        computed = step(model, factors, TOKENS)
    assert torch.equal(computed[0], expected[0])


def test_unknown_formulas_have_no_form():
    model = moe_model("olmoe")
    experts = model.model.layers[0].mlp.experts
    assert experts_form(experts) is not None
    assert experts_form(model.model.layers[0].mlp) is None
    experts.act_fn = torch.nn.Tanh()
    assert experts_form(experts) is None
