"""Calls with unusual arguments, and losses that read outputs at padding: equal to the model's original code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

import deltaw
from deltaw.acceleration.report import Report
from tests.acceleration.batches import adapted, largest_difference, padded_batch

TOLERANCE = 1e-5
NUM_TOKENS = 64
SIZES = {"vocab_size": NUM_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

Loss = Callable[[nn.Module], Tensor]


def llama(model_class: type[PreTrainedModel] = LlamaForCausalLM, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, **settings}
    return model_class(LlamaConfig(**options)).train()


def bert(model_class: type[PreTrainedModel] = BertModel, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_class(BertConfig(**SIZES, intermediate_size=48, **rates, **settings)).train()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=NUM_TOKENS, n_embd=32, n_layer=2, n_head=4, **rates)).train()


def with_adapter() -> nn.Module:
    return adapted(llama())


def ordinary(model: nn.Module) -> Tensor:
    return model(**padded_batch(NUM_TOKENS)).loss


def unlabeled(*, left: bool = False) -> dict[str, Tensor]:
    batch = padded_batch(NUM_TOKENS, left=left)
    del batch["labels"]
    return batch


def labels_at_padding(model: nn.Module, *, left: bool = False) -> Tensor:
    batch = unlabeled(left=left)
    return model(**batch, labels=batch["input_ids"]).loss


def gradients_of(model: nn.Module, loss: Loss) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = loss(model)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(value.detach()), gradients


def assert_equal(model: nn.Module, losses: Sequence[Loss], **options: bool) -> Report:
    """Check that losses and gradients are those of the original code, and return the report."""
    expected = [gradients_of(model, loss) for loss in losses]
    with deltaw.accelerate(model, **options) as report:
        for loss, (value, gradients) in zip(losses, expected, strict=True):
            computed, found = gradients_of(model, loss)
            assert computed == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
            assert largest_difference(found, gradients) < TOLERANCE
    return report


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("logits", [True, False])
def test_labels_at_padding(logits, left):
    report = assert_equal(
        with_adapter(), [ordinary, lambda m: labels_at_padding(m, left=left), ordinary], logits=logits
    )
    assert report.fallbacks == {"labels at padding": 1}


@pytest.mark.parametrize(
    ("model_class", "targets"),
    [
        (BertForQuestionAnswering, {"start_positions": torch.arange(1, 5), "end_positions": torch.arange(4, 8)}),
        (BertForTokenClassification, {"labels": torch.arange(96).view(4, 24) % 2}),
    ],
)
def test_losses_of_models_that_read_padding(model_class, targets):
    report = assert_equal(bert(model_class), [lambda m: m(**unlabeled(), **targets).loss] * 3)
    assert report.fallbacks == {"the loss depends on outputs at padding": 2}
    with_padding_ignored = {"labels": torch.where(unlabeled()["attention_mask"] == 1, 1, -100)}
    model = bert(BertForTokenClassification)
    report = assert_equal(model, [lambda m: m(**unlabeled(), **with_padding_ignored).loss] * 3)
    assert not report.fallbacks


def mean_of_all(model: nn.Module) -> Tensor:
    return model(**unlabeled()).last_hidden_state.sin().mean()


def mean_of_tokens(model: nn.Module) -> Tensor:
    batch = unlabeled()
    return (model(**batch).last_hidden_state.sin() * batch["attention_mask"][..., None]).mean()


def test_own_loss_that_reads_padding():
    for model in (llama(LlamaModel), bert()):
        assert assert_equal(model, [mean_of_all] * 2).fallbacks == {"the loss depends on outputs at padding": 1}
        assert not assert_equal(model, [mean_of_tokens] * 2).fallbacks


def test_loss_that_reads_padding_later_fails():
    model = llama(LlamaModel)
    with deltaw.accelerate(model), pytest.raises(RuntimeError, match="the loss depends on outputs at padding"):
        gradients_of(model, mean_of_tokens)
        gradients_of(model, mean_of_all)


def test_frozen_backbone_below_an_own_head():
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = llama(LlamaModel)
            self.backbone.embed_tokens.weight.requires_grad_(False)
            self.backbone.layers.requires_grad_(False)
            torch.manual_seed(1)
            self.head = nn.Linear(32, 1)

    def loss_at_padding(model: nn.Module) -> Tensor:
        return model.head(model.backbone(**unlabeled()).last_hidden_state).square().mean()

    assert_equal(Scored(), [loss_at_padding] * 2)


@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification])
def test_outputs_without_gradient_are_equal_at_padding(model_class):
    model = bert(model_class).eval()
    for batch in (unlabeled(), unlabeled(left=True)):
        with torch.no_grad():
            expected = model(**batch)[0]
            with deltaw.accelerate(model) as report:
                torch.testing.assert_close(model(**batch)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    with torch.no_grad(), deltaw.accelerate(model, padding=False) as report:
        hidden = model(**unlabeled())[0]
        assert not report.fallbacks
    is_padding = unlabeled()["attention_mask"] == 0
    assert model_class is BertForSequenceClassification or not bool(hidden[is_padding].any())


def test_classification_without_gradient_is_accelerated():
    model = bert(BertForSequenceClassification).eval()
    batch = unlabeled()
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    with torch.no_grad(), deltaw.accelerate(model) as report:
        model(**batch)
        assert not report.fallbacks


def test_positions_of_absolute_models():
    def shifted(start: int, *, left: bool = False) -> Loss:
        positions = (torch.arange(24) + start)[None].expand(4, -1)
        return lambda m: m(**padded_batch(NUM_TOKENS, left=left), position_ids=positions).loss

    report = assert_equal(gpt2(), [shifted(0), shifted(7), shifted(0, left=True), shifted(0)])
    assert sum(report.fallbacks.values()) == 2


def test_padding_tokens_that_have_no_position():
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(**SIZES, intermediate_size=48, pad_token_id=1, **rates)).train()

    def visible_padding(model: nn.Module) -> Tensor:
        tokens = unlabeled()["input_ids"]
        tokens[:, 5] = 1
        return model(input_ids=tokens).last_hidden_state.sin().sum()

    report = assert_equal(model, [mean_of_tokens, visible_padding])
    assert sum(report.fallbacks.values()) == 1


def test_token_types_of_shared_prefixes():
    kinds = torch.zeros(4, 24, dtype=torch.long)
    kinds[1] = 3
    model = gpt2()
    assert not assert_equal(
        model, [ordinary, lambda m: m(**padded_batch(NUM_TOKENS), token_type_ids=kinds).loss]
    ).refused


def test_rotary_positions_that_depend_on_the_length():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = llama(rope_parameters=rope, max_position_embeddings=26)

    def wide(model: nn.Module) -> Tensor:
        batch = {name: nn.functional.pad(values, (0, 12)) for name, values in padded_batch(NUM_TOKENS).items()}
        batch["labels"][:, 24:] = -100
        return model(**batch).loss

    report = assert_equal(model, [ordinary, wide, ordinary])
    assert sum(report.fallbacks.values()) == 1


def test_keys_and_values():
    def in_two_parts(model: nn.Module) -> Tensor:
        tokens = unlabeled()["input_ids"]
        first = model(input_ids=tokens[:, :12], use_cache=True)
        second = model(input_ids=tokens[:, 12:], past_key_values=first.past_key_values, use_cache=True)
        return second.logits.sin().sum()

    model = llama()
    assert_equal(model, [in_two_parts])
    tokens = unlabeled()["input_ids"]
    with deltaw.accelerate(model):
        with torch.no_grad():
            assert model(input_ids=tokens, use_cache=True).past_key_values.get_seq_length() == 24
        implicit = model(input_ids=tokens).past_key_values
        with pytest.raises(RuntimeError, match="use_cache=True"):
            model(input_ids=tokens, past_key_values=implicit)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_that_the_configuration_requests(name):
    model = llama(attn_implementation="eager")
    with deltaw.accelerate(model):
        ordinary(model).backward()
        setattr(model.config, name, True)
        outputs = model(**padded_batch(NUM_TOKENS))
        assert len(outputs[name.removeprefix("output_")]) >= 2


def test_tuples_are_returned():
    model = bert()
    with deltaw.accelerate(model):
        hidden, pooled = model(**unlabeled(), return_dict=False)
    assert hidden.shape == (4, 24, 32) and pooled.shape == (4, 32)


def test_masks_of_four_dimensions():
    mask = torch.ones(24, 24).tril().bool()[None, None].expand(4, 1, 24, 24)
    full = padded_batch(NUM_TOKENS)
    report = assert_equal(
        llama(), [lambda m: m(full["input_ids"], attention_mask=mask, labels=full["labels"]).loss] * 2
    )
    assert sum(report.fallbacks.values()) == 2


def test_values_before_the_comparison_can_be_differentiated():
    def regularized(model: nn.Module) -> Tensor:
        size = sum((p.square().sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))
        return ordinary(model) + size

    def regularized_before(model: nn.Module) -> Tensor:
        size = sum((p.square().sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))
        return size + ordinary(model)

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    assert not assert_equal(model, [regularized_before, regularized]).fallbacks


def test_autocast_to_float16_runs_the_original_code():
    model = with_adapter()
    with torch.autocast("cpu", torch.float16):
        report = assert_equal(model, [ordinary])
    assert report.fallbacks == {"products in float16": 1}


def test_function_transforms_run_the_original_code():
    model = with_adapter()
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, kwargs=padded_batch(NUM_TOKENS)).loss

    values = {name: model.get_parameter(name).detach() for name in names}
    expected = torch.func.grad(loss)(values)
    with deltaw.accelerate(model) as report:
        torch.testing.assert_close(torch.func.grad(loss)(values), expected)
        assert report.fallbacks == {"torch.func": 1}


def test_acceleration_continues_after_another_type_was_refused():
    model = with_adapter()
    with deltaw.accelerate(model) as report:
        ordinary(model).backward()
        model.to(torch.float64)
        ordinary(model).backward()
        model.to(torch.float32)
        fallbacks = sum(report.fallbacks.values())
        ordinary(model).backward()
        assert sum(report.fallbacks.values()) == fallbacks


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_model_repeats_dropout(reentrant):
    model = adapted(llama(), lora_dropout=0.3)
    batch = padded_batch(NUM_TOKENS)
    anchor = torch.zeros((), requires_grad=True)

    def call(unused: Tensor) -> Tensor:
        return model(**batch).loss + unused

    with deltaw.accelerate(model):
        for _ in range(2):
            torch.manual_seed(3)
            expected, gradients = gradients_of(model, lambda m: call(anchor))
        torch.manual_seed(3)
        computed, found = gradients_of(model, lambda m: checkpoint(call, anchor, use_reentrant=reentrant))
    assert computed == pytest.approx(expected)
    assert largest_difference(found, gradients) < TOLERANCE
