"""Fused blocks give what the model's own blocks give, forward and backward, and leave nothing behind."""

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
from deltaw.runtime.fused_blocks import _own_code_instead
from deltaw.runtime.packed import fused_blocks, outputs_at, packed_rows
from deltaw.runtime.quantized_weights import quantize_int8
from tests.runtime.families import (
    PACKED,
    SIZES,
    Found,
    adapted,
    assert_as_near,
    assert_near,
    assert_same,
    checkpoint_blocks,
    layers_of,
    model_of,
    off,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
compiled_only = pytest.mark.skipif(loader.library() is None, reason=loader.why_not() or "")
LENGTHS = [(20, 9, 6, 11), (391, 9, 130, 310)]
few_or_many_rows = pytest.mark.parametrize("lengths", LENGTHS, ids=["few rows", "many rows"])
TOKENS = torch.randint(0, 120, (2, 40), generator=torch.Generator().manual_seed(0))


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each fused block that runs from here on, recognition left out."""
    ran: list[int] = []
    run = FusedBlock._run

    def counted(self: FusedBlock, *args: object) -> torch.Tensor:
        if self.own is not _own_code_instead:
            ran.append(1)
        return run(self, *args)

    monkeypatch.setattr(FusedBlock, "_run", counted)
    return ran


def inputs_of(lengths: tuple[int, ...]) -> dict[str, object]:
    """A packed row of segments; the second and third continue the first."""
    layout = Layout.of_lengths(lengths, [-1, 0, 0, -1])
    tokens = torch.randint(0, 120, (1, layout.length), generator=torch.Generator().manual_seed(1))
    positions = torch.from_numpy(layout.positions())[None]
    return {"input_ids": tokens, "position_ids": positions, "packed_layout": layout, "use_cache": False}


def outputs_and_gradients(model: nn.Module, fused: bool, lengths: tuple[int, ...] = LENGTHS[0]) -> Found:
    factors = [factor for _, factor in adapter_parameters(model)]
    with packed_rows(model, fused=fused):
        out = model.base_model(**inputs_of(lengths)).last_hidden_state
        toward = torch.linspace(-1, 1, out.numel()).view(out.shape)
        grads = torch.autograd.grad((out.float() * toward).sum(), factors, allow_unused=True, materialize_grads=True)
    return out.detach(), list(grads)


def assert_as_the_own(model: nn.Module, output: float = 1e-5, gradient: float = 2e-4) -> None:
    """Fused blocks run, and give what the model's own code gives."""
    expected = outputs_and_gradients(model, fused=False)
    assert_near(outputs_and_gradients(model, fused=True), expected, output, gradient)
    assert fused_blocks(model).choice.value


def assert_recognized(model: nn.Module) -> None:
    with packed_rows(model):
        assert fused_blocks(model).choice.value


@pytest.mark.parametrize("family", PACKED)
def test_fused_blocks_equal_the_models_own(family, monkeypatch):
    model = adapted(model_of(family))
    expected = outputs_and_gradients(model, fused=False)
    assert fused_blocks(model).choice.value, fused_blocks(model).choice.why
    ran = count_runs(monkeypatch)
    with counted_calls(monkeypatch) as calls:
        for runs in (3, 9):
            assert_near(outputs_and_gradients(model, fused=True), expected)
            assert len(ran) == runs
            checkpoint_blocks(model)
    assert calls.count("forward") == (0 if loader.library() is None else len(ran))
    assert all("forward" not in vars(block) for block in layers_of(model))
    assert all(fused._whole is None and not fused._factors for fused in fused_blocks(model).blocks)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_in_bf16_fused_blocks_are_as_near_to_fp32_as_the_models_own(family):
    draws = []
    for seed in range(3):
        model, exact = (adapted(model_of(family, dtype), seed) for dtype in (torch.bfloat16, torch.float32))
        asked = ((model, True), (model, False), (exact, False))
        draws.append(tuple(outputs_and_gradients(each, fused=fused) for each, fused in asked))
    assert_as_near(draws)


PARTS = [("Llama", {"target_modules": ["q_proj", "down_proj"]}), ("Llama", {"target_modules": "mlp", "layers": [2]})]


@pytest.mark.parametrize(("family", "settings"), [*PARTS, ("Gemma3", {"layers": [1, 2]})])
def test_adapters_in_some_layers_only_and_in_upper_blocks_only(family, settings, monkeypatch):
    model, blocks = adapted(model_of(family), **settings), len(settings.get("layers", range(3)))
    assert_as_the_own(model)
    if loader.library() is not None:
        assert_same_in_one_call(lambda: outputs_and_gradients(model, True), monkeypatch, backward=blocks)


def test_without_the_compiled_kernels_all_is_the_same(monkeypatch):
    model = adapted(model_of("Qwen3"))
    expected = outputs_and_gradients(model, fused=True)
    monkeypatch.setattr("deltaw.kernels.loader.library", lambda: None)
    assert_near(outputs_and_gradients(model, fused=True), expected)


def test_a_block_with_more_in_it_runs_its_own_code():
    with_more, changed = model_of("Llama"), model_of("Llama")
    with_more.base_model.layers[1].mlp.extra = nn.Linear(4, 4)
    assert "block 1 (LlamaDecoderLayer) is of no kind" in _why(with_more)
    experts = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    assert "no MLP" in _why(transformers.MixtralForCausalLM(experts).eval())
    attention = changed.base_model.layers[0].self_attn
    attention.__class__ = type("Doubled", (Doubled, type(attention)), {})
    assert "block 0 (LlamaDecoderLayer) is of no kind" in _why(changed)


class Doubled(nn.Module):
    def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, None]:
        return 2 * super().forward(*args, **kwargs)[0], None


def test_a_class_that_computes_something_else_is_noticed(monkeypatch):
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 1.001 * own(self, x))
    # Named anew, so that what was verified of the class before does not count.
    changed = model_of("Llama", max_position_embeddings=333)
    assert "differ from the model's own" in _why(changed.to(torch.bfloat16))


@pytest.mark.each_value
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi3", "GPTNeoX", "GPT2"])
def test_outputs_at_some_places_are_the_same_there_and_their_gradients(family, checkpointing):
    model = adapted(model_of(family))
    factors = [factor for _, factor in adapter_parameters(model)]
    places = torch.tensor([2, 19, 20, 28, 45])
    weights = torch.randn(len(places), 64, generator=torch.Generator().manual_seed(2))
    if checkpointing:
        checkpoint_blocks(model)
    found, equal = [], []
    for asked in (contextlib.nullcontext(), outputs_at(model, places)):
        with packed_rows(model), asked:
            out = model.base_model(**inputs_of(LENGTHS[0])).last_hidden_state[0]
            grads = torch.autograd.grad((out[places] * weights).sum(), factors)
        equal.append(int((out == out[0]).all(-1).sum()))  # the first is not asked for
        found.append((out[places].detach(), list(grads)))
    assert equal == [1, 46 - len(places)]
    assert_near(found[1], found[0], gradient=1e-5)
    assert fused_blocks(model).blocks[-1].picked is None


@contextlib.contextmanager
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """While open, gathers the calls of whole blocks, forward and backward; afterwards none can be had."""
    calls: list[str] = []

    def counting(name: str, own: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: calls.append(name) or own(*args)

    for name in ("forward", "backward"):
        monkeypatch.setattr(Block, name, counting(name, getattr(Block, name)))
    yield calls
    monkeypatch.setattr("deltaw.runtime.fused.serves_block", lambda *args: False)


def assert_same_in_one_call(
    run: Callable[[], Found], monkeypatch: pytest.MonkeyPatch, forward: int = 3, backward: int = 3
) -> Found:
    """Blocks in one call, so many of them, give to the bit what they give in two halves."""
    with counted_calls(monkeypatch) as calls:
        found = run()
    assert (calls.count("forward"), calls.count("backward")) == (forward, backward)
    assert_same(found, run())
    assert calls.count("forward") == forward
    return found


@compiled_only
@pytest.mark.each_value
@few_or_many_rows
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3", "GPT2"])
def test_gradients_in_int8_of_a_block_in_one_call_are_the_same_to_the_bit(family, lengths, monkeypatch):
    model = adapted(model_of(family, torch.bfloat16))
    with loader.computing(replace(loader.arithmetic(), int8_gradients=False)):
        usual = outputs_and_gradients(model, True, lengths)
    with loader.computing(replace(loader.arithmetic(), int8_gradients=True)):
        found = assert_same_in_one_call(lambda: outputs_and_gradients(model, True, lengths), monkeypatch)
    assert torch.equal(found[0], usual[0])
    off_by = [off(ours, exact) for ours, exact in zip(found[1], usual[1], strict=True)]
    # The last layers' gradients come from no product of the blocks.
    assert max(off_by) > 1e-3 and sum(off_by) / len(off_by) < 0.05


@compiled_only
@pytest.mark.each_pair
@few_or_many_rows
@pytest.mark.parametrize("picked", ["", "picked"])
@pytest.mark.parametrize("int8", ["", "int8"])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", PACKED)
def test_a_block_in_one_call_is_the_same_to_the_bit(family, name, int8, picked, lengths, monkeypatch):
    model, places = model_of(family, DTYPES[name]), torch.arange(1, sum(lengths), 2)
    if int8:
        assert quantize_int8(model.base_model, lambda: model(TOKENS)).layers
    adapted(model)
    assert fused_blocks(model).choice.value  # recognition makes calls of its own
    with outputs_at(model, places) if picked else contextlib.nullcontext():
        out, _ = assert_same_in_one_call(lambda: outputs_and_gradients(model, True, lengths), monkeypatch)
    assert (out[0, places] != 0).any()


@compiled_only
@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2"])
def test_with_checkpointing_one_call_runs_again_and_gives_the_same(family, monkeypatch):
    model = adapted(model_of(family, torch.bfloat16))
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
def test_what_is_changed_between_two_forwards_is_noticed(change):
    model = adapted(model_of("Llama"))
    before, _ = outputs_and_gradients(model, fused=True)
    CHANGES[change](model.base_model.layers[1])
    assert_as_the_own(model, gradient=1e-3)
    assert off(outputs_and_gradients(model, fused=True)[0], before) > 1e-4


def test_a_block_that_was_changed_from_outside_runs_its_own_code():
    model = adapted(model_of("Llama"))
    attention = model.base_model.layers[0].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: (2 * own(*args, **kwargs)[0], None)
    assert_as_the_own(model)


def _why(model: nn.Module) -> str:
    with packed_rows(model):
        fused = fused_blocks(model)
    assert not fused.choice.value and not fused.blocks
    return fused.choice.why


def test_dropout_and_trained_weights_go_the_models_own_way(monkeypatch):
    model = adapted(model_of("Llama"), dropout=0.5)
    assert_recognized(model)
    model.base_model.layers.train()
    for block in layers_of(model):
        block.self_attn.attention_dropout = 0.0
    ran = count_runs(monkeypatch)
    outputs_and_gradients(model, fused=True)
    assert not ran


@pytest.mark.parametrize(
    ("family", "layers", "one"), [("Llama", 21, "layers.0.self_attn.q_proj"), ("GPT2", 12, "h.0.attn.c_attn")]
)
def test_weights_in_int8_stay_near_and_say_what_they_cost(family, layers, one):
    model = model_of(family, hidden_size=128, intermediate_size=256)
    expected = model(TOKENS).logits
    report = quantize_int8(model.base_model, lambda: model(TOKENS))
    assert report.layers == layers and f"{layers} of {layers} layers" in str(report)
    assert off(model(TOKENS).logits, expected) < 0.05
    assert model.base_model.get_submodule(one).weight.dtype == torch.int8
    # Gradients are rounded to bytes too: they agree on the whole, not to the last digit.
    assert_as_the_own(adapted(model), 0.05, 0.3)


def error_in_int8(model: nn.Module, names: list[str], **settings: object) -> float:
    """The largest error of these layers' outputs in int8, with other settings of the rounding."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LARGEST_ERROR": 1.0, **settings}.items():
            patch.setattr(f"deltaw.runtime.quantized_weights.{name}", value)
        report = quantize_int8(model.base_model, lambda: model(TOKENS))
    return max(report.errors[name] for name in names)


def test_columns_of_a_conv1d_move_outliers_into_its_weight():
    model, names = model_of("GPT2", hidden_size=128), [f"h.{n}.attn.c_attn" for n in range(3)]
    with torch.no_grad():
        for block in model.base_model.h:
            block.ln_1.weight[5] = 300.0  # an input that is large and hardly counts
            block.attn.c_attn.weight[5] = 1e-4
    kept, moved = (error_in_int8(copy.deepcopy(model), names, MOVED=by) for by in ((0.0,), (0.0, 0.5, 0.7)))
    assert moved < 0.04 < kept


@pytest.mark.parametrize(("family", "down"), [("Llama", "layers.{}.mlp.down_proj"), ("GPT2", "h.{}.mlp.c_proj")])
def test_inputs_with_outliers_get_a_scale_for_each_block(family, down):
    """A few units of an MLP that are far larger than all others, and no column that could take that."""
    model = model_of(family, hidden_size=128, **{"intermediate_size" if family == "Llama" else "n_inner": 512})
    with torch.no_grad():
        for block in layers_of(model):
            up = block.mlp.up_proj.weight if family == "Llama" else block.mlp.c_fc.weight.t()
            up[::171] *= 30
    names, errors = [down.format(n) for n in range(3)], []
    for worth in (0.0, 0.85):
        copied = copy.deepcopy(model)
        errors.append(error_in_int8(copied, names, MOVED=(0.0,), WORTH_BLOCKS=worth))
        assert [copied.base_model.get_submodule(name).in_blocks for name in names] == [worth > 0] * 3
    assert errors[1] < 0.85 * errors[0]
    assert_as_the_own(adapted(copied), 0.02, 0.3)


def test_a_layer_that_loses_too_much_keeps_its_weights(monkeypatch):
    monkeypatch.setattr("deltaw.runtime.quantized_weights.MOVED", (0.0,))
    model = model_of("Llama")
    with torch.no_grad():
        block = model.base_model.layers[1]
        block.input_layernorm.weight[5] = 300.0
        for name in "qkv":  # an input that is large and hardly counts
            getattr(block.self_attn, f"{name}_proj").weight[:, 5] = 1e-4
    report = quantize_int8(model.base_model, lambda: model(TOKENS))
    assert set(report.kept) >= {f"layers.1.self_attn.{name}_proj" for name in "qkv"}
    assert type(model.base_model.layers[1].self_attn.q_proj) is nn.Linear
    assert "left as they were" in str(report)


WHOLE_MODULES = [
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


@pytest.mark.parametrize(("family", "trained", "target"), WHOLE_MODULES)
def test_whole_modules_trained_inside_a_block_get_their_gradients(family, trained, target):
    model = model_of(family)
    assert_recognized(model)
    assert_as_the_own(adapted(model, target_modules=[target], train_modules=[trained]))


def test_a_block_that_is_put_in_later_runs_fused_and_one_of_another_kind_its_own_code(monkeypatch):
    model = model_of("Llama")
    assert_recognized(model)
    layers = model.base_model.layers
    layers[1] = copy.deepcopy(layers[2])
    layers[0].input_layernorm = nn.LayerNorm(64).requires_grad_(False)
    ran = count_runs(monkeypatch)
    assert_as_the_own(adapted(model))
    assert len(ran) == 2
    layers[1].mlp.down_proj = nn.Sequential(layers[1].mlp.down_proj)
    assert_as_the_own(model)
    assert len(ran) == 3


def test_recognition_leaves_the_random_state_alone_and_the_model_too():
    model = model_of("GPTNeoX", max_position_embeddings=77)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert_recognized(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("Gemma3", "GPT2") else pytest.mark.slow) for f in PACKED]
)
def test_a_dry_run_on_fake_tensors_decides_alike(family):
    with packed_rows(real := model_of(family, torch.bfloat16)):
        expected = fused_blocks(real)
    with fake_tensors(), packed_rows(dry := model_of(family, torch.bfloat16)):
        found = fused_blocks(dry)
    assert found.choice.value == expected.choice.value is True
    assert [b.roles for b in found.blocks] == [b.roles for b in expected.blocks]
    assert [b.told for b in found.blocks] == [b.told for b in expected.blocks]


@compiled_only
def test_weights_that_lie_elsewhere_when_the_backward_comes_are_found():
    """As where they are let go of after the forward and gathered again."""
    model, left = adapted(model_of("Llama")), []
    expected = outputs_and_gradients(model, fused=True)

    def move(block: nn.Module, inputs: object, output: object) -> None:
        for parameter in (p for p in block.parameters() if not p.requires_grad):
            left.append(parameter.data)  # keeps the place that was left from being used again
            parameter.data = parameter.detach().clone()
            left[-1].fill_(float("nan"))

    for block in layers_of(model):
        block.register_forward_hook(move)
    assert_same(outputs_and_gradients(model, fused=True), expected)
