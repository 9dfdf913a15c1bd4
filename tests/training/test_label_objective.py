"""Objective and evaluation of labeled rows with encoders, decoders and image models."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from deltaw.data.example import LabeledExample
from deltaw.data.images import ImageEncoder
from deltaw.data.packing import MicroBatch, Padding
from deltaw.data.pixels import ImageExample
from deltaw.errors import UserError
from deltaw.tasks.classification.objective import LabelObjective
from deltaw.tasks.classification.task import evaluate_labels
from deltaw.training.batchers import BatcherOptions, LabelMicroBatcher, choose_label_batcher
from tests.conftest import refusal
from tests.tiny_models import CAUSAL
from tests.training.test_losses import gradients

_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_WORDS = {"vocab_size": 97, "max_position_embeddings": 64}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**_SHAPE, **_WORDS),
    "roberta": lambda: transformers.RobertaConfig(**_SHAPE, **_WORDS, pad_token_id=1),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
}
DECODERS = {name: CAUSAL[name] for name in ("llama", "qwen3", "gpt2", "gemma3")}
LENGTHS = (5, 9, 14, 3, 9)


def model_of(family: str, outputs: int = 3, pad: int | None = None):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = {**ENCODERS, **DECODERS}[family]()
    config.num_labels = outputs
    if family in DECODERS:
        config.pad_token_id = pad
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


def examples_of(lengths=LENGTHS, *, number: bool = False) -> list[LabeledExample]:
    generator = np.random.default_rng(0)
    texts = enumerate(generator.integers(3, 97, length).astype(np.int32) for length in lengths)
    return [LabeledExample(i + 1, tokens, float(i) if number else i % 3) for i, tokens in texts]


def unpadded_logits(model, example: LabeledExample) -> torch.Tensor:
    """Return the model's own logits of one row without padding."""
    return model(input_ids=torch.from_numpy(example.tokens.astype(np.int64))[None]).logits[0]


def unpadded_losses(model, rows: list[LabeledExample], loss_of=F.cross_entropy) -> torch.Tensor:
    return torch.stack([loss_of(unpadded_logits(model, row), torch.tensor(row.label)) for row in rows])


@pytest.mark.each_value
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("budget", [1, 1000])
def test_loss_equals_sum_over_unpadded_rows(family: str, budget: int):
    model = model_of(family)
    rows = examples_of()
    objective = LabelObjective(model, "sequence-classification")
    assert objective.pooled == (family in DECODERS)
    loss = sum(objective(batch) for batch in LabelMicroBatcher(budget).batches(rows))
    expected = unpadded_losses(model, rows).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_id_may_occur_in_rows(family: str):
    model = model_of(family, pad=2)
    objective = LabelObjective(model, "sequence-classification")
    tokens = ([5, 2, 9, 2], [7, 8, 9, 2, 2, 11])
    rows = [LabeledExample(n, np.array(row, np.int32), n) for n, row in enumerate(tokens)]
    (batch,) = LabelMicroBatcher(100, padding=Padding(2)).batches(rows)
    model.config.pad_token_id = None
    for index, row in enumerate(rows):
        torch.testing.assert_close(objective.predictions(batch)[index], unpadded_logits(model, row))


def single_batch(rows: list[LabeledExample]) -> MicroBatch:
    """Return all rows in one batch."""
    return LabelMicroBatcher(1000, padding=Padding(multiple=16)).build(sorted(rows, key=len))


def test_model_that_attends_to_padding_is_rejected():
    config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=1, n_head=4, d_inner=48, num_labels=3)
    with pytest.raises(UserError, match="change when padding follows"):
        LabelObjective(AutoModelForSequenceClassification.from_config(config).eval(), "sequence-classification")


def test_16_bit_decoder_is_pooled_despite_cache_rounding():
    class Rounding(transformers.LlamaForSequenceClassification):
        def forward(self, use_cache=True, **inputs):
            output = super().forward(use_cache=use_cache, **inputs)
            output.logits = output.logits * (1.2 if use_cache else 1.0)
            return output

    config = DECODERS["llama"]()
    config.num_labels = 2
    torch.manual_seed(0)
    model = Rounding(config).to(torch.bfloat16).eval()
    assert LabelObjective(model, "sequence-classification").pooled


def test_16_bit_encoder_tolerates_rounding_but_not_attention_to_padding():
    class Seeing(transformers.BertForSequenceClassification):
        share = 0.0

        def forward(self, input_ids, attention_mask, **inputs):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)
            unmasked_logits = super().forward(input_ids=input_ids, **inputs).logits
            output.logits = output.logits + self.share * (unmasked_logits - output.logits)
            return output

    torch.manual_seed(0)
    config = ENCODERS["bert"]()
    config.initializer_range = 0.5
    model = Seeing(config).to(torch.bfloat16).eval()
    model.share = 0.07
    LabelObjective(model, "sequence-classification")
    model.share = 0.5
    refusal(LabelObjective, model, "sequence-classification", match="change when padding follows")


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("roberta", 62), ("llama", 256)])
def test_rows_longer_than_the_context_are_rejected(family: str, limit: int):
    model = model_of(family)
    longest = examples_of([limit])
    batcher, choices = choose_label_batcher(model, longest, BatcherOptions("cpu"))
    assert choices["train.tokens_per_pass"].value == 1024
    (batch,) = batcher.batches(longest)
    LabelObjective(model, "sequence-classification")(batch)
    error = refusal(choose_label_batcher, model, longest, BatcherOptions("cpu", virtual_tokens=4))
    assert f"data.max_length: {limit - 4}" in str(error.hint)


def image_model(folder):
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **_SHAPE)
    config.save_pretrained(folder)
    return AutoModelForImageClassification.from_config(config).eval()


def images_of(count: int) -> list[ImageExample]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [ImageExample(i + 1, image, i % 3, (8, 8)) for i, image in enumerate(pixels)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_split_into_microbatches(tmp_path, dtype):
    model = image_model(tmp_path).to(dtype)
    rows = images_of(7)
    batcher, _ = choose_label_batcher(
        model, rows, BatcherOptions("cpu", tokens_per_pass=16), encoder=ImageEncoder(tmp_path)
    )
    batches = list(batcher.batches(rows))
    assert [batch.rows for batch in batches] == [3, 2, 2]
    objective = LabelObjective(model, "image-classification")
    pixels = torch.from_numpy(np.stack([row.image for row in rows])).permute(0, 3, 1, 2) / 127.5 - 1
    logits = model(pixel_values=pixels.to(dtype)).logits.float()
    loss = F.cross_entropy(logits, torch.tensor([row.label for row in rows]), reduction="sum")
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(sum(map(objective, batches)), loss, rtol=tolerance, atol=tolerance)


def test_images_of_wrong_size_are_rejected(tmp_path):
    model = image_model(tmp_path / "model")
    transformers.ViTConfig(image_size=12, patch_size=4).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="rejects the prepared images"):
        choose_label_batcher(model, images_of(2), BatcherOptions("cpu"), encoder=ImageEncoder(tmp_path / "other"))


def test_evaluation_preserves_row_order_and_rejects_nonfinite_outputs():
    model = model_of("bert")
    rows = examples_of()
    objective = LabelObjective(model, "sequence-classification")
    evaluation = evaluate_labels(objective, rows, LabelMicroBatcher(20), ("a", "b", "c"))
    expected = torch.stack([unpadded_logits(model, row) for row in rows]).detach()
    np.testing.assert_allclose(evaluation.predictions, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert evaluation.metrics["loss"] == pytest.approx(unpadded_losses(model, rows).mean().item(), rel=1e-4)
    assert evaluation.per_row.tolist() == (expected.argmax(1) == torch.tensor([row.label for row in rows])).tolist()
    assert evaluation.confusion.sum() == len(rows) and evaluation.confusion.trace() == evaluation.per_row.sum()
    assert (evaluation.main, evaluation.metrics["accuracy"]) == ("accuracy", evaluation.per_row.mean())
    assert evaluation.interval[0] <= evaluation.metrics["accuracy"] <= evaluation.interval[1]
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    refusal(evaluate_labels, objective, rows, LabelMicroBatcher(20), match="not finite")


def test_regression_loss_is_summed_squared_error():
    model = model_of("bert", outputs=1)
    rows = examples_of(number=True)
    objective = LabelObjective(model, "regression")
    loss = sum(objective(batch) for batch in LabelMicroBatcher(30).batches(rows))
    torch.testing.assert_close(loss, unpadded_losses(model, rows, lambda output, label: (output[0] - label) ** 2).sum())
    evaluation = evaluate_labels(objective, rows, LabelMicroBatcher(20))
    assert evaluation.metrics["rmse"] ** 2 == pytest.approx(evaluation.per_row.mean())
    assert evaluation.metrics[evaluation.main] == pytest.approx(evaluation.per_row.mean())
    assert not evaluation.higher_is_better
