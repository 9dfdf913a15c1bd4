"""Accelerated models in a loop of one's own: equal losses and gradients, and an exact way back."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import deltaw
from deltaw.acceleration.peft_layers import Factor
from deltaw.acceleration.verification import AccelerationWarning, Differences, measure, rounding_differences
from deltaw.kernels.dropout import constant_dropout
from deltaw.lora.stored import stored_form
from deltaw.runtime.block_roles import dropout_rates
from tests.acceleration.batches import (
    adapted,
    assert_equal_gradients,
    fill_factors,
    largest_difference,
    loss_and_gradients,
    padded_batch,
    peft_model,
)
from tests.tiny_models import causal_model

TOLERANCE = 1e-5


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "neox", "qwen3", "mistral", "cohere"])
def test_loss_and_gradients_equal_peft(family, logits):
    model = peft_model(family)
    batch = padded_batch(model.config.vocab_size)
    loss, gradients = loss_and_gradients(model, batch)
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    with deltaw.accelerate(model, logits=logits) as report:
        for _ in range(2):
            assert_equal_gradients(model, batch, (loss, gradients))
        assert not report.fallbacks and "blocks" in report.parts
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == names
    restored_loss, restored = loss_and_gradients(model, batch)
    assert restored_loss == loss and all(torch.equal(restored[name], gradients[name]) for name in gradients)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"bias": "all"},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=str,
)
def test_kinds_of_adapters_equal_peft(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(**settings)
    batch = padded_batch(model.config.vocab_size)
    expected = loss_and_gradients(model, batch)
    report = deltaw.accelerate(model, logits=False)
    assert_equal_gradients(model, batch, expected)
    assert not report.fallbacks


def test_plain_and_deltaw_models_equal_transformers():
    batch = padded_batch(causal_model("llama").config.vocab_size)
    for with_adapter in (False, True):
        model = causal_model("llama").train()
        if with_adapter:
            deltaw.attach(model, deltaw.LoRAConfig(rank=4, target_modules="all-linear"), seed=0)
            fill_factors(model)
        expected = loss_and_gradients(model, batch)
        report = deltaw.accelerate(model)
        assert_equal_gradients(model, batch, expected)
        assert not report.fallbacks


def test_adapters_are_switched_disabled_merged_and_saved(tmp_path):
    model = peft_model()
    batch = padded_batch(model.config.vocab_size)
    model.add_adapter("other", model.peft_config["default"])
    fill_factors(model, seed=1)

    def losses() -> list[float]:
        values = []
        for name in ("default", "other"):
            model.set_adapter(name)
            values.append(float(model(**batch).loss))
        with model.disable_adapter():
            values.append(float(model(**batch).loss))
        model.merge_adapter()
        values.append(float(model(**batch).loss))
        model.unmerge_adapter()
        return values

    expected = losses()
    assert len(set(expected)) == 3  # a merged adapter has the same loss
    report = deltaw.accelerate(model, logits=False)
    assert losses() == pytest.approx(expected, rel=TOLERANCE)
    assert not report.fallbacks
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert float(merged(**batch).loss) == pytest.approx(expected[1], rel=TOLERANCE)
    base = causal_model("llama")
    loaded = type(model).from_pretrained(base, tmp_path / "adapter" / "other")
    assert float(loaded(**batch).loss) == pytest.approx(expected[1], rel=TOLERANCE)


def test_rows_padded_on_the_left_and_rows_without_padding_equal_peft():
    model = peft_model()
    vocabulary = model.config.vocab_size
    joined = padded_batch(vocabulary)
    lengths = [24, 10, 14]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = {name: joined[name].reshape(1, -1)[:, : sum(lengths)] for name in ("input_ids", "labels")}
    batches = [padded_batch(vocabulary, left=True), {**packed, "position_ids": positions, "use_cache": False}]
    for batch in batches:
        expected = loss_and_gradients(model, batch)
        with deltaw.accelerate(model, logits=False) as report:
            assert_equal_gradients(model, batch, expected)
            assert not report.fallbacks


def test_autocast_computes_in_bf16():
    model = peft_model()
    batch = padded_batch(model.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
        report = deltaw.accelerate(model, logits=False)
        computed_loss, computed = loss_and_gradients(model, batch)
    assert not report.fallbacks
    assert computed_loss != loss and computed_loss == pytest.approx(loss, rel=1e-2)
    assert largest_difference(computed, gradients) < 0.05
    assert all(g.dtype == torch.float32 for g in computed.values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [True, False], ids=["adapter", "all weights"])
def test_gradient_checkpointing_equals_peft(reentrant, frozen):
    model = peft_model() if frozen else causal_model("llama").train()
    batch = padded_batch(model.config.vocab_size)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected = loss_and_gradients(model, batch)
    report = deltaw.accelerate(model, logits=False)
    assert_equal_gradients(model, batch, expected)
    assert not report.fallbacks


def test_hooks_run_own_code():
    calls = []
    model = peft_model()
    batch = padded_batch(model.config.vocab_size)
    layer = model.get_base_model().model.layers[0].mlp
    loss, _ = loss_and_gradients(model, batch)
    report = deltaw.accelerate(model, logits=False)
    handle = layer.register_forward_hook(lambda *arguments: calls.append(1))
    with pytest.warns(AccelerationWarning, match="hooks"):
        assert loss_and_gradients(model, batch)[0] == loss
    assert calls and report.fallbacks
    handle.remove()
    assert loss_and_gradients(model, batch)[0] == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_dropout_is_applied_at_the_sites_of_the_model(family):
    model = peft_model(family, lora_dropout=0.2)
    model.set_attn_implementation("eager")  # torch's attention has a dropout of its own
    rates = dropout_rates_of(model)
    assert rates
    for table, name in rates:
        table[name] = 0.3
    batch = padded_batch(model.config.vocab_size)
    plain = loss_and_gradients(model.eval(), batch)[0]
    model.train()
    with constant_dropout():
        expected = loss_and_gradients(model, batch)
        report = deltaw.accelerate(model, logits=False)
        assert_equal_gradients(model, batch, expected)
    assert not report.fallbacks and abs(expected[0] - plain) > 1e-3
    assert len({loss_and_gradients(model, batch)[0] for _ in range(3)}) == 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rates_of_dropout_that_change_later_are_used(family):
    model = peft_model(family, lora_dropout=0.3)
    batch = padded_batch(model.config.vocab_size)
    deltaw.accelerate(model, logits=False)
    loss_and_gradients(model, batch)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    computed = loss_and_gradients(model, batch)
    deltaw.restore(model)
    assert_equal_gradients(model, batch, computed)


def dropout_rates_of(model):
    """Return the rates of all modules except adapters, each as a table of attributes and a name."""
    modules = [module for name, module in model.named_modules() if "lora" not in name]
    return [(vars(module), name) for module in modules for name in dropout_rates(vars(module))]


def test_dropout_of_the_adapter_is_random_and_has_gradients():
    torch.manual_seed(0)
    model = peft_model(lora_dropout=0.5)
    batch = padded_batch(model.config.vocab_size)
    report = deltaw.accelerate(model, logits=False)
    losses = {loss_and_gradients(model, batch)[0] for _ in range(4)}
    assert len(losses) == 4 and not report.fallbacks
    model.eval()
    expected = float(model(**batch).loss)
    deltaw.restore(model)
    assert float(model(**batch).loss) == pytest.approx(expected, rel=TOLERANCE)


def test_generation_between_steps_is_unchanged():
    model = peft_model()
    batch = padded_batch(model.config.vocab_size, left=True)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompts, **options)
    deltaw.accelerate(model)
    loss_and_gradients(model, padded_batch(model.config.vocab_size))
    assert torch.equal(model.generate(**prompts, **options), expected)


def test_copies_are_not_accelerated():
    model = peft_model()
    batch = padded_batch(model.config.vocab_size)
    loss, gradients = loss_and_gradients(model, batch)
    deltaw.accelerate(model, logits=False)
    loss_and_gradients(model, batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            next(p for p in copied.parameters() if p.requires_grad).zero_()
        changed, _ = loss_and_gradients(copied, batch)
        assert changed != pytest.approx(loss, rel=TOLERANCE)
        with deltaw.accelerate(copied, logits=False) as report:
            assert loss_and_gradients(copied, batch)[0] == pytest.approx(changed, rel=TOLERANCE)
            assert not report.fallbacks
        computed_loss, computed = loss_and_gradients(model, batch)
        assert computed_loss == pytest.approx(loss, rel=TOLERANCE)
        assert largest_difference(computed, gradients) < TOLERANCE


def test_two_models_in_one_process():
    models = [peft_model("llama"), peft_model("qwen3")]
    batch = padded_batch(min(model.config.vocab_size for model in models))
    expected = [loss_and_gradients(model, batch) for model in models]
    for model in models:
        deltaw.accelerate(model, logits=False)
    for _ in range(2):
        for model, values in zip(models, expected, strict=True):
            assert_equal_gradients(model, batch, values)


def test_difference_from_own_code_disables_acceleration():
    model = peft_model()
    batch = padded_batch(model.config.vocab_size)
    report = deltaw.accelerate(model, logits=False)
    attention = model.get_base_model().model.layers[0].self_attn
    attention.scaling *= 1.5  # after the copy was created
    with pytest.warns(AccelerationWarning, match="differ"):
        computed_loss, computed = loss_and_gradients(model, batch)
    deltaw.restore(model)
    loss, gradients = loss_and_gradients(model, batch)
    assert computed_loss == loss and largest_difference(computed, gradients) == 0
    assert "loss of labels" in report.refused


def test_environment_disables_everything(monkeypatch):
    monkeypatch.setenv("DELTAW_ACCELERATE", "0")
    model = peft_model()
    batch = padded_batch(model.config.vocab_size)
    loss, gradients = loss_and_gradients(model, batch)
    report = deltaw.accelerate(model, logits=False)
    computed_loss, computed = loss_and_gradients(model, batch)
    assert computed_loss == loss and largest_difference(computed, gradients) == 0 and not report.parts


def test_module_without_a_model_is_refused():
    with pytest.raises(deltaw.UserError, match="no model"):
        deltaw.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(deltaw.UserError, match="neither"):
        deltaw.accelerate("model")


def test_model_of_auto_class_from_files(tmp_path):
    causal_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = padded_batch(model.config.vocab_size)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        with deltaw.accelerate(model, padding=False) as report:
            computed = model(**batch, use_cache=False).logits
            assert not report.fallbacks
    assert torch.allclose(computed[batch["attention_mask"] == 1], expected[batch["attention_mask"] == 1], atol=1e-5)


def test_gradients_reach_the_reducer_of_ddp():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = peft_model()
        batch = padded_batch(model.config.vocab_size)
        loss, gradients = loss_and_gradients(model, batch)
        deltaw.accelerate(model, logits=False)
        parallel = DistributedDataParallel(model)
        computed_loss, computed = loss_and_gradients(parallel, batch)
        assert computed_loss == pytest.approx(loss, rel=TOLERANCE)
        assert largest_difference({n.removeprefix("module."): g for n, g in computed.items()}, gradients) < TOLERANCE
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantized_weights_are_used_by_own_and_accelerated_code(precision):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = adapted(LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).to(torch.bfloat16))
    batch = padded_batch(model.config.vocab_size)
    exact, _ = loss_and_gradients(model, batch)
    report = deltaw.accelerate(model, precision=precision, rows=batch["input_ids"].tolist(), logits=False)
    computed_loss, computed = loss_and_gradients(model, batch)
    assert not report.fallbacks and precision in report.parts["weights"]
    assert computed_loss != exact and computed_loss == pytest.approx(exact, rel=0.05)
    deltaw.restore(model)
    loss, gradients = loss_and_gradients(model, batch)
    assert computed_loss == pytest.approx(loss, rel=0.01) and largest_difference(computed, gradients) < 0.1
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert stored_form(layer) is not None
    with pytest.raises(deltaw.UserError, match="merged"):
        model.merge_adapter()


def test_trained_weights_are_not_quantized():
    with pytest.raises(deltaw.UserError, match="trained"):
        deltaw.accelerate(causal_model("llama").train(), precision="int8")
    with pytest.raises(deltaw.UserError, match="int4"):
        deltaw.accelerate(peft_model(), precision="int4")


def test_gradient_that_is_not_a_number_is_a_difference():
    parameter = torch.nn.Parameter(torch.ones(3))

    class WithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return 2 * values

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    differences = measure(lambda: 2 * parameter, lambda: WithoutGradient.apply(parameter), [parameter])
    assert differences.exceed(torch.float32) and not Differences(0.0, 0.0).exceed(torch.float32)


def test_larger_differences_are_rounding_if_another_rounding_causes_them():
    differences = Differences(0.06, 0.1, 0.2)
    assert differences.exceed(torch.bfloat16) and differences.exceed(torch.bfloat16, Differences(0.02, 0.1, 0.2))
    assert not differences.exceed(torch.bfloat16, Differences(0.04, 0.1, 0.2))
    assert Differences(float("nan")).exceed(torch.bfloat16, Differences(0.04, 0.1, 0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_differences_are_those_of_the_type(dtype):
    model = causal_model("llama").to(dtype)
    parameters = [p for p in model.parameters() if p.dim() > 1]
    batch = padded_batch(model.config.vocab_size)
    differences = rounding_differences(model, lambda: model(**batch, use_cache=False).logits, parameters)
    if dtype == torch.float32:
        assert differences == Differences(0.0, 0.0, 0.0)
    else:
        # Each of about 30 modules rounds once, by up to 2^-8.
        assert all(2**-11 < value < 30 * 2**-8 for value in (differences.outputs, differences.gradients))
    assert not any(module._forward_hooks for module in model.modules())


def test_comparison_includes_factors_whose_other_factor_is_zero():
    model = peft_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    batch = padded_batch(model.config.vocab_size)
    report = deltaw.accelerate(model, logits=False)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    gradient = Factor.gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Factor, "gradient", lambda factor, g: gradient(factor, g) * (0 if factor.attribute == "lora_A" else 1)
        )
        with pytest.warns(AccelerationWarning, match="differ"):
            loss_and_gradients(model, batch)
    assert "loss of labels" in report.refused
    assert not any(layer.lora_B["default"].weight.detach().flatten())


def test_changed_modules_and_values_are_used():
    model = peft_model()
    batch = padded_batch(model.config.vocab_size)
    deltaw.accelerate(model, logits=False)
    loss, _ = loss_and_gradients(model, batch)
    block = model.get_base_model().model.layers[0]
    block.mlp.act_fn = torch.nn.ReLU()
    changed, _ = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = loss_and_gradients(model, batch)
        block.mlp.down_proj.base_layer.weight.data.mul_(3)
        scaled, _ = loss_and_gradients(model, batch)
        deltaw.restore(model)
        expected, _ = loss_and_gradients(model, batch)
    assert changed != loss
    assert rounded != scaled and scaled == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_of_all_weights_under_autocast(dropout):
    model = causal_model("llama").train()
    for table, name in dropout_rates_of(model):
        table[name] = dropout
    batch = padded_batch(model.config.vocab_size)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
        report = deltaw.accelerate(model, logits=False)
        computed_loss, computed = loss_and_gradients(model, batch)
    assert not report.fallbacks
    assert computed_loss == pytest.approx(loss, rel=1e-2 if dropout == 0.0 else 0.1)
    assert dropout > 0.0 or largest_difference(computed, gradients) < 0.05
    assert all(g.dtype == torch.float32 for g in computed.values())


def test_trained_head_of_a_classifier_under_autocast():
    torch.manual_seed(0)
    config = causal_model("llama").config
    config.pad_token_id = 0
    model = adapted(AutoModelForSequenceClassification.from_config(config), task_type="SEQ_CLS")
    batch = padded_batch(config.vocab_size)
    batch["input_ids"] *= batch["attention_mask"]  # padding is found by its token
    batch["labels"] = torch.tensor([0, 1, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
        report = deltaw.accelerate(model)
        computed_loss, computed = loss_and_gradients(model, batch)
    assert not report.fallbacks and "fused" in report.parts["blocks"]
    assert any("score" in name for name in computed)
    assert computed_loss == pytest.approx(loss, rel=1e-2)
    assert largest_difference(computed, gradients) < 0.05


def test_second_backward_pass_is_refused():
    model = peft_model()
    deltaw.accelerate(model, logits=False)
    loss = model(**padded_batch(model.config.vocab_size)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_model_is_freed_without_restore():
    model = causal_model("llama").train()
    batch = padded_batch(model.config.vocab_size)
    deltaw.accelerate(model, logits=False)
    loss_and_gradients(model, batch)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
