"""Fused blocks match the model's own blocks in forward and backward, and leave no state in the model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from deltaw.kernels import loader
from deltaw.kernels.block import Block
from deltaw.kernels.layout import Layout
from deltaw.lora import adapter_parameters
from deltaw.memory.simulation import fake_tensors
from deltaw.runtime.fused import FusedBlock
from deltaw.runtime.fused_blocks import _reject_call
from deltaw.runtime.packed import fused_blocks, outputs_at, packed_rows
from deltaw.runtime.quantized_weights import quantize_int8
from tests.runtime.families import (
    PACKED,
    SIZES,
    BlockResult,
    assert_as_accurate,
    assert_near,
    assert_same,
    attach_adapter,
    checkpoint_blocks,
    layers_of,
    model_of,
    relative_error,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
compiled_only = pytest.mark.skipif(loader.library() is None, reason=loader.unavailable_reason() or "")
LENGTHS = [(20, 9, 6, 11), (391, 9, 130, 310)]
few_or_many_rows = pytest.mark.parametrize("lengths", LENGTHS, ids=["few rows", "many rows"])
TOKENS = torch.randint(0, 120, (2, 40), generator=torch.Generator().manual_seed(0))


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one per run of a fused block, except during recognition."""
    runs: list[int] = []
    run = FusedBlock._run

    def counted(self: FusedBlock, *args: object) -> torch.Tensor:
        if self.original_forward is not _reject_call:
            runs.append(1)
        return run(self, *args)

    monkeypatch.setattr(FusedBlock, "_run", counted)
    return runs


def inputs_of(lengths: tuple[int, ...]) -> dict[str, object]:
    """Return a packed row of segments, of which the second and third continue the first."""
    layout = Layout.of_lengths(lengths, [-1, 0, 0, -1])
    tokens = torch.randint(0, 120, (1, layout.length), generator=torch.Generator().manual_seed(1))
    positions = torch.from_numpy(layout.positions())[None]
    return {"input_ids": tokens, "position_ids": positions, "packed_layout": layout, "use_cache": False}


def outputs_and_gradients(model: nn.Module, fused: bool, lengths: tuple[int, ...] = LENGTHS[0]) -> BlockResult:
    factors = [factor for _, factor in adapter_parameters(model)]
    with packed_rows(model, fused=fused):
        out = model.base_model(**inputs_of(lengths)).last_hidden_state
        output_weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        loss = (out.float() * output_weights).sum()
        options = {"allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(loss, factors, **options)
    return out.detach(), list(grads)


def assert_matches_model_code(model: nn.Module, output: float = 1e-5, gradient: float = 2e-4) -> None:
    """Assert that fused blocks run and match the model's own code."""
    expected = outputs_and_gradients(model, fused=False)
    assert_near(outputs_and_gradients(model, fused=True), expected, output, gradient)
    assert fused_blocks(model).choice.value


def assert_recognized(model: nn.Module) -> None:
    with packed_rows(model):
        assert fused_blocks(model).choice.value


@pytest.mark.parametrize("family", PACKED)
def test_fused_blocks_match_model_code(family, monkeypatch):
    model = attach_adapter(model_of(family))
    expected = outputs_and_gradients(model, fused=False)
    assert fused_blocks(model).choice.value, fused_blocks(model).choice.why
    runs = count_runs(monkeypatch)
    with record_calls(monkeypatch) as calls:
        for expected_runs in (3, 9):
            assert_near(outputs_and_gradients(model, fused=True), expected)
            assert len(runs) == expected_runs
            checkpoint_blocks(model)
    assert calls.count("forward") == (0 if loader.library() is None else len(runs))
    assert all("forward" not in vars(block) for block in layers_of(model))
    assert all(fused._compiled is None and not fused._factors for fused in fused_blocks(model).blocks)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_bf16_error_of_fused_blocks_is_no_larger_than_model_code(family):
    samples = []
    for seed in range(3):
        model, exact = (attach_adapter(model_of(family, dtype), seed) for dtype in (torch.bfloat16, torch.float32))
        cases = ((model, True), (model, False), (exact, False))
        samples.append(tuple(outputs_and_gradients(each, fused=fused) for each, fused in cases))
    assert_as_accurate(samples)


PARTS = [("Llama", {"target_modules": ["q_proj", "down_proj"]}), ("Llama", {"target_modules": "mlp", "layers": [2]})]


@pytest.mark.parametrize(("family", "settings"), [*PARTS, ("Gemma3", {"layers": [1, 2]})])
def test_adapters_in_subset_of_layers_match_model_code(family, settings, monkeypatch):
    model = attach_adapter(model_of(family), **settings)
    blocks = len(settings.get("layers", range(3)))
    assert_matches_model_code(model)
    if loader.library() is not None:
        assert_same_in_one_call(lambda: outputs_and_gradients(model, True), monkeypatch, backward=blocks)


def test_fused_blocks_match_without_compiled_kernels(monkeypatch):
    model = attach_adapter(model_of("Qwen3"))
    expected = outputs_and_gradients(model, fused=True)
    monkeypatch.setattr("deltaw.kernels.loader.library", lambda: None)
    assert_near(outputs_and_gradients(model, fused=True), expected)


def test_block_with_unknown_modules_is_not_fused():
    extended = model_of("Llama")
    changed = model_of("Llama")
    extended.base_model.layers[1].mlp.extra = nn.Linear(4, 4)
    assert "block 1 (LlamaDecoderLayer) has an unverified kind" in _rejection_reason(extended)
    experts = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    assert "no MLP" in _rejection_reason(transformers.MixtralForCausalLM(experts).eval())
    attention = changed.base_model.layers[0].self_attn
    attention.__class__ = type("Doubled", (DoubledOutput, type(attention)), {})
    assert "block 0 (LlamaDecoderLayer) has an unverified kind" in _rejection_reason(changed)


class DoubledOutput(nn.Module):
    def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        return 2 * super().forward(*args, **kwargs)[0], None


def test_changed_forward_of_class_is_detected(monkeypatch):
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    original = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 1.001 * original(self, x))
    # A new config, so that the cached verification of the class does not apply.
    changed = model_of("Llama", max_position_embeddings=333)
    assert "differ from the model's code" in _rejection_reason(changed.to(torch.bfloat16))


@pytest.mark.each_value
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi3", "GPTNeoX", "GPT2"])
def test_outputs_at_indices_match_full_outputs_and_gradients(family, checkpointing):
    model = attach_adapter(model_of(family))
    factors = [factor for _, factor in adapter_parameters(model)]
    indices = torch.tensor([2, 19, 20, 28, 45])
    weights = torch.randn(len(indices), 64, generator=torch.Generator().manual_seed(2))
    if checkpointing:
        checkpoint_blocks(model)
    results = []
    equal = []
    for context in (contextlib.nullcontext(), outputs_at(model, indices)):
        with packed_rows(model), context:
            out = model.base_model(**inputs_of(LENGTHS[0])).last_hidden_state[0]
            grads = torch.autograd.grad((out[indices] * weights).sum(), factors)
        equal.append(int((out == out[0]).all(-1).sum()))  # the first index is not selected
        results.append((out[indices].detach(), list(grads)))
    assert equal == [1, 46 - len(indices)]
    assert_near(results[1], results[0], gradient=1e-5)
    assert fused_blocks(model).blocks[-1].output_indices is None


@contextlib.contextmanager
def record_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record calls of complete blocks, forward and backward, while open. Disable such calls on exit."""
    calls: list[str] = []

    def recorder(name: str, original: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: calls.append(name) or original(*args)

    for name in ("forward", "backward"):
        monkeypatch.setattr(Block, name, recorder(name, getattr(Block, name)))
    yield calls
    monkeypatch.setattr("deltaw.runtime.fused.serves_block", lambda *args: False)


def assert_same_in_one_call(
    run: Callable[[], BlockResult], monkeypatch: pytest.MonkeyPatch, forward: int = 3, backward: int = 3
) -> BlockResult:
    """Assert that the given number of blocks run in one call and are bit-identical to blocks in two halves."""
    with record_calls(monkeypatch) as calls:
        result = run()
    assert (calls.count("forward"), calls.count("backward")) == (forward, backward)
    assert_same(result, run())
    assert calls.count("forward") == forward
    return result


@compiled_only
@pytest.mark.each_value
@few_or_many_rows
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3", "GPT2"])
def test_int8_gradients_in_one_call_are_bit_identical(family, lengths, monkeypatch):
    model = attach_adapter(model_of(family, torch.bfloat16))
    with loader.temporary_arithmetic(replace(loader.arithmetic(), int8_gradients=False)):
        expected = outputs_and_gradients(model, True, lengths)
    with loader.temporary_arithmetic(replace(loader.arithmetic(), int8_gradients=True)):
        result = assert_same_in_one_call(lambda: outputs_and_gradients(model, True, lengths), monkeypatch)
    assert torch.equal(result[0], expected[0])
    errors = [relative_error(ours, exact) for ours, exact in zip(result[1], expected[1], strict=True)]
    # The last layers' gradients do not depend on products of the blocks.
    assert max(errors) > 1e-3 and sum(errors) / len(errors) < 0.05


@compiled_only
@pytest.mark.each_pair
@few_or_many_rows
@pytest.mark.parametrize("selected", ["", "picked"])
@pytest.mark.parametrize("int8", ["", "int8"])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", PACKED)
def test_block_in_one_call_is_bit_identical(family, name, int8, selected, lengths, monkeypatch):
    model = model_of(family, DTYPES[name])
    indices = torch.arange(1, sum(lengths), 2)
    if int8:
        assert quantize_int8(model.base_model, lambda: model(TOKENS)).layers
    attach_adapter(model)
    assert fused_blocks(model).choice.value  # recognition also makes calls
    with outputs_at(model, indices) if selected else contextlib.nullcontext():
        out, _ = assert_same_in_one_call(lambda: outputs_and_gradients(model, True, lengths), monkeypatch)
    assert (out[0, indices] != 0).any()


@compiled_only
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2"])
def test_one_call_with_checkpointing_is_bit_identical(family, monkeypatch):
    model = attach_adapter(model_of(family, torch.bfloat16))
    expected = outputs_and_gradients(model, True)
    checkpoint_blocks(model)
    assert_same(assert_same_in_one_call(lambda: outputs_and_gradients(model, True), monkeypatch, forward=6), expected)


CHANGES = {
    "scaling": lambda block: setattr(block.mlp.up_proj, "scaling", 5.0),
    "enabled": lambda block: setattr(block.mlp.up_proj, "enabled", False),
    "factor": lambda block: setattr(block.mlp.up_proj.lora_A, "data", torch.full((64, 4), 0.1)),
    "weight": lambda block: setattr(block.mlp.up_proj.weight, "data", torch.full((96, 64), 0.1)),
    "norm": lambda block: setattr(block.input_layernorm.weight, "data", torch.full((64,), 0.5)),
    "layer": lambda block: setattr(block.mlp, "up_proj", nn.Linear(64, 96, False).requires_grad_(False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_forwards_take_effect(change):
    model = attach_adapter(model_of("Llama"))
    before, _ = outputs_and_gradients(model, fused=True)
    CHANGES[change](model.base_model.layers[1])
    assert_matches_model_code(model, gradient=1e-3)
    assert relative_error(outputs_and_gradients(model, fused=True)[0], before) > 1e-4


def test_block_with_patched_forward_runs_model_code():
    model = attach_adapter(model_of("Llama"))
    attention = model.base_model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: (2 * original(*args, **kwargs)[0], None)
    assert_matches_model_code(model)


def _rejection_reason(model: nn.Module) -> str:
    with packed_rows(model):
        fused = fused_blocks(model)
    assert not fused.choice.value and len(fused.blocks) < 3
    return fused.choice.why


def test_adapter_dropout_runs_fused(monkeypatch):
    model = attach_adapter(model_of("Llama"), dropout=0.5)
    assert_recognized(model)
    model.base_model.layers.train()
    for block in layers_of(model):
        block.self_attn.attention_dropout = 0.0
    runs = count_runs(monkeypatch)
    outputs_and_gradients(model, fused=True)
    assert runs


@pytest.mark.parametrize(
    ("family", "layers", "layer_name"), [("Llama", 21, "layers.0.self_attn.q_proj"), ("GPT2", 12, "h.0.attn.c_attn")]
)
def test_int8_weights_are_accurate_and_reported(family, layers, layer_name):
    model = model_of(family, hidden_size=128, intermediate_size=256)
    expected = model(TOKENS).logits
    report = quantize_int8(model.base_model, lambda: model(TOKENS))
    assert report.layers == layers and f"{layers} of {layers} layers" in str(report)
    assert relative_error(model(TOKENS).logits, expected) < 0.05
    assert model.base_model.get_submodule(layer_name).weight.dtype == torch.int8
    # Gradients are rounded to int8 too, so they agree only approximately.
    assert_matches_model_code(attach_adapter(model), 0.05, 0.3)


def error_in_int8(model: nn.Module, names: list[str], **settings: object) -> float:
    """Return the largest int8 output error of these layers under the given quantization settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MAX_OUTPUT_ERROR": 1.0, **settings}.items():
            patch.setattr(f"deltaw.runtime.quantized_weights.{name}", value)
        report = quantize_int8(model.base_model, lambda: model(TOKENS))
    return max(report.errors[name] for name in names)


def test_smoothing_of_conv1d_moves_outliers_into_weight():
    model = model_of("GPT2", hidden_size=128)
    names = [f"h.{n}.attn.c_attn" for n in range(3)]
    with torch.no_grad():
        for block in model.base_model.h:
            block.ln_1.weight[5] = 300.0  # a large input with little effect on the output
            block.attn.c_attn.weight[5] = 1e-4
    plain_error, smoothed_error = (
        error_in_int8(copy.deepcopy(model), names, SMOOTHING_EXPONENTS=exponents)
        for exponents in ((0.0,), (0.0, 0.5, 0.7))
    )
    assert smoothed_error < 0.04 < plain_error


@pytest.mark.parametrize(("family", "down"), [("Llama", "layers.{}.mlp.down_proj"), ("GPT2", "h.{}.mlp.c_proj")])
def test_inputs_with_outliers_get_one_scale_per_block(family, down):
    """The outliers are MLP units, so smoothing exponents cannot remove them."""
    model = model_of(family, hidden_size=128, **{"intermediate_size" if family == "Llama" else "n_inner": 512})
    with torch.no_grad():
        for block in layers_of(model):
            up = block.mlp.up_proj.weight if family == "Llama" else block.mlp.c_fc.weight.t()
            up[::171] *= 30
    names = [down.format(n) for n in range(3)]
    errors = []
    for max_ratio in (0.0, 0.85):
        copied = copy.deepcopy(model)
        errors.append(error_in_int8(copied, names, SMOOTHING_EXPONENTS=(0.0,), MAX_BLOCK_ERROR_RATIO=max_ratio))
        assert [copied.base_model.get_submodule(name).in_blocks for name in names] == [max_ratio > 0] * 3
    assert errors[1] < 0.85 * errors[0]
    assert_matches_model_code(attach_adapter(copied), 0.02, 0.3)


def test_layer_with_large_int8_error_is_not_quantized(monkeypatch):
    monkeypatch.setattr("deltaw.runtime.quantized_weights.SMOOTHING_EXPONENTS", (0.0,))
    model = model_of("Llama")
    with torch.no_grad():
        block = model.base_model.layers[1]
        block.input_layernorm.weight[5] = 300.0
        for name in "qkv":  # a large input with little effect on the output
            getattr(block.self_attn, f"{name}_proj").weight[:, 5] = 1e-4
    report = quantize_int8(model.base_model, lambda: model(TOKENS))
    assert set(report.unquantized) >= {f"layers.1.self_attn.{name}_proj" for name in "qkv"}
    assert type(model.base_model.layers[1].self_attn.q_proj) is nn.Linear
    assert "not quantized because of errors" in str(report)


FULLY_TRAINED_MODULES = [
    *((family, "input_layernorm", "v_proj") for family in ("Llama", "Qwen3", "Gemma3", "Phi")),
    *((family, "mlp", "v_proj") for family in ("Llama", "Gemma3", "Phi")),
    *((family, "self_attn", "down_proj") for family in ("Llama", "Qwen3", "Gemma3", "Phi3")),
    *((family, "q_norm", "v_proj") for family in ("Qwen3", "Gemma3")),
    *((family, "down_proj", "o_proj") for family in ("Llama", "Phi3")),
    *((family, "mlp", "query_key_value") for family in ("GPTNeoX", "GPTNeoX, halves in turn")),
    ("GPTNeoX", "post_attention_layernorm", "dense"),
    ("GPT2", "ln_1", "c_proj"),
    ("GPT2", "mlp", "c_attn"),
]


@pytest.mark.parametrize(("family", "trained", "target"), FULLY_TRAINED_MODULES)
def test_fully_trained_modules_in_block_get_gradients(family, trained, target):
    model = model_of(family)
    assert_recognized(model)
    assert_matches_model_code(attach_adapter(model, target_modules=[target], train_modules=[trained]))


def test_replaced_blocks_are_fused_only_if_recognized(monkeypatch):
    model = model_of("Llama")
    assert_recognized(model)
    layers = model.base_model.layers
    layers[1] = copy.deepcopy(layers[2])
    layers[0].input_layernorm = nn.LayerNorm(64).requires_grad_(False)
    runs = count_runs(monkeypatch)
    assert_matches_model_code(attach_adapter(model))
    assert len(runs) == 2
    layers[1].mlp.down_proj = nn.Sequential(layers[1].mlp.down_proj)
    assert_matches_model_code(model)
    assert len(runs) == 3


def test_recognition_preserves_random_state_and_model():
    model = model_of("GPTNeoX", max_position_embeddings=77)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert_recognized(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("Gemma3", "GPT2") else pytest.mark.slow) for f in PACKED]
)
def test_recognition_on_fake_tensors_matches_real_run(family):
    with packed_rows(real := model_of(family, torch.bfloat16)):
        expected = fused_blocks(real)
    with fake_tensors(), packed_rows(dry := model_of(family, torch.bfloat16)):
        actual = fused_blocks(dry)
    assert actual.choice.value == expected.choice.value is True
    assert [b.roles for b in actual.blocks] == [b.roles for b in expected.blocks]
    assert [b.config for b in actual.blocks] == [b.config for b in expected.blocks]


@compiled_only
def test_weights_moved_before_backward_are_used():
    """Weights may be released after the forward pass and gathered again for the backward pass."""
    model = attach_adapter(model_of("Llama"))
    old_weights = []
    expected = outputs_and_gradients(model, fused=True)

    def move(block: nn.Module, inputs: object, output: object) -> None:
        for parameter in (p for p in block.parameters() if not p.requires_grad):
            old_weights.append(parameter.data)  # prevents reuse of the old memory
            parameter.data = parameter.detach().clone()
            old_weights[-1].fill_(float("nan"))

    for block in layers_of(model):
        block.register_forward_hook(move)
    assert_same(outputs_and_gradients(model, fused=True), expected)
