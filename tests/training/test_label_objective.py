"""The objective of labeled rows on encoders, decoders and image models, and how they are judged."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from deltaw.data.example import LabeledExample
from deltaw.data.images import ImageEncoder, LabelBatch, LabelMicroBatcher
from deltaw.data.pixels import ImageExample
from deltaw.errors import UserError
from deltaw.training.tasks.labels import LabelObjective, choose_label_batcher, evaluate_labels, start_at_mean
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
    return [
        LabeledExample(i + 1, generator.integers(3, 97, length).astype(np.int32), float(i) if number else i % 3)
        for i, length in enumerate(lengths)
    ]


def alone(model, example: LabeledExample) -> torch.Tensor:
    """The model's own logits of one row without padding."""
    return model(input_ids=torch.from_numpy(example.tokens.astype(np.int64))[None]).logits[0]


def losses_alone(model, rows: list[LabeledExample], loss_of=F.cross_entropy) -> torch.Tensor:
    return torch.stack([loss_of(alone(model, row), torch.tensor(row.label)) for row in rows])


@pytest.mark.each_value
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("budget", [1, 1000])
def test_the_loss_is_the_sum_over_rows_seen_alone_without_padding(family: str, budget: int):
    model, rows = model_of(family), examples_of()
    objective = LabelObjective(model, "sequence-classification")
    assert objective.pooled == (family in DECODERS)
    loss = sum(objective(batch) for batch in LabelMicroBatcher(budget, "cpu", segments=False).batches(rows))
    expected = losses_alone(model, rows).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_padding_id_that_is_a_real_token_too_changes_nothing(family: str):
    model = model_of(family, pad=2)
    objective = LabelObjective(model, "sequence-classification")
    tokens = ([5, 2, 9, 2], [7, 8, 9, 2, 2, 11])
    rows = [LabeledExample(n, np.array(row, np.int32), n) for n, row in enumerate(tokens)]
    (batch,) = LabelMicroBatcher(100, "cpu", pad_id=2).batches(rows)
    model.config.pad_token_id = None
    for place, row in enumerate(rows):
        torch.testing.assert_close(objective.predictions(batch)[place], alone(model, row))


def whole(rows: list[LabeledExample]) -> LabelBatch:
    """All rows in one batch."""
    return LabelMicroBatcher(1000, "cpu", segments=False)._texts(sorted(rows, key=len), 16)


def test_a_model_that_sees_its_padding_is_refused():
    config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=1, n_head=4, d_inner=48, num_labels=3)
    with pytest.raises(UserError, match="change when padding follows"):
        LabelObjective(AutoModelForSequenceClassification.from_config(config).eval(), "sequence-classification")


def test_a_decoder_in_16_bits_is_read_at_its_last_token_though_a_cache_changes_its_rounding():
    class Rounding(transformers.LlamaForSequenceClassification):
        def forward(self, use_cache=True, **inputs):
            found = super().forward(use_cache=use_cache, **inputs)
            found.logits = found.logits * (1.2 if use_cache else 1.0)
            return found

    config = DECODERS["llama"]()
    config.num_labels = 2
    torch.manual_seed(0)
    model = Rounding(config).to(torch.bfloat16).eval()
    assert LabelObjective(model, "sequence-classification").pooled


def test_an_encoder_in_16_bits_may_round_differently_behind_padding_but_not_see_it():
    class Seeing(transformers.BertForSequenceClassification):
        share = 0.0

        def forward(self, input_ids, attention_mask, **inputs):
            found = super().forward(input_ids=input_ids, attention_mask=attention_mask, **inputs)
            seen = super().forward(input_ids=input_ids, **inputs).logits
            found.logits = found.logits + self.share * (seen - found.logits)
            return found

    torch.manual_seed(0)
    config = ENCODERS["bert"]()
    config.initializer_range = 0.5
    model = Seeing(config).to(torch.bfloat16).eval()
    model.share = 0.07
    LabelObjective(model, "sequence-classification")
    model.share = 0.5
    with pytest.raises(UserError, match="change when padding follows"):
        LabelObjective(model, "sequence-classification")


HEADS = {"bert": ["classifier"], "roberta": ["classifier.dense", "classifier.out_proj"], "llama": ["score"]}


@pytest.mark.parametrize("family", HEADS)
def test_a_regression_starts_at_the_mean_where_its_head_has_a_bias(family: str):
    model, has_bias = model_of(family, outputs=1), family != "llama"
    assert start_at_mean(model, HEADS[family], [70.0, 90.0]) == has_bias
    predictions = LabelObjective(model, "regression").predictions(whole(examples_of(number=True)))
    assert ((predictions - 80).abs().max() < 2) == has_bias


@pytest.mark.parametrize(("family", "limit"), [("bert", 64), ("roberta", 62), ("llama", 256)])
def test_rows_longer_than_the_models_positions_are_refused(family: str, limit: int):
    model = model_of(family)
    longest = examples_of([limit])
    batcher, chosen = choose_label_batcher(model, longest, device="cpu")
    assert chosen["train.tokens_per_pass"].value == 1024
    (batch,) = batcher.batches(longest)
    LabelObjective(model, "sequence-classification")(batch)
    with pytest.raises(UserError) as caught:
        choose_label_batcher(model, longest, device="cpu", virtual_tokens=4)
    assert f"data.max_length: {limit - 4}" in str(caught.value.hint)


def image_model(folder):
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **_SHAPE)
    config.save_pretrained(folder)
    return AutoModelForImageClassification.from_config(config).eval()


def images_of(count: int) -> list[ImageExample]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [ImageExample(i + 1, image, i % 3, (8, 8)) for i, image in enumerate(pixels)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_go_through_in_microbatches_of_the_budget(tmp_path, dtype):
    model = image_model(tmp_path).to(dtype)
    rows = images_of(7)
    batcher, _ = choose_label_batcher(model, rows, device="cpu", tokens_per_pass=16, encoder=ImageEncoder(tmp_path))
    batches = list(batcher.batches(rows))
    assert [batch.rows for batch in batches] == [3, 2, 2]
    objective = LabelObjective(model, "image-classification")
    pixels = torch.from_numpy(np.stack([row.image for row in rows])).permute(0, 3, 1, 2) / 127.5 - 1
    logits = model(pixel_values=pixels.to(dtype)).logits.float()
    loss = F.cross_entropy(logits, torch.tensor([row.label for row in rows]), reduction="sum")
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(sum(map(objective, batches)), loss, rtol=tolerance, atol=tolerance)


def test_images_of_another_size_than_the_models_are_refused_in_words(tmp_path):
    model = image_model(tmp_path / "model")
    transformers.ViTConfig(image_size=12, patch_size=4).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="does not take its images"):
        choose_label_batcher(model, images_of(2), device="cpu", encoder=ImageEncoder(tmp_path / "other"))


def test_an_evaluation_is_in_the_order_of_the_rows_however_they_are_cut_and_refused_where_it_is_not_finite():
    model, rows = model_of("bert"), examples_of()
    objective = LabelObjective(model, "sequence-classification")
    found = evaluate_labels(objective, rows, LabelMicroBatcher(20, "cpu"), ("a", "b", "c"))
    expected = torch.stack([alone(model, row) for row in rows]).detach()
    np.testing.assert_allclose(found.predictions, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.metrics["loss"] == pytest.approx(losses_alone(model, rows).mean().item(), rel=1e-4)
    assert found.per_row.tolist() == [float(one.argmax() == row.label) for one, row in zip(expected, rows, strict=True)]
    assert found.confusion.sum() == len(rows) and found.confusion.trace() == found.per_row.sum()
    assert (found.main, found.metrics["accuracy"]) == ("accuracy", found.per_row.mean())
    assert found.interval[0] <= found.metrics["accuracy"] <= found.interval[1]
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        evaluate_labels(objective, rows, LabelMicroBatcher(20, "cpu"))


def test_squared_errors_of_numbers_are_summed():
    model, rows = model_of("bert", outputs=1), examples_of(number=True)
    objective = LabelObjective(model, "regression")
    loss = sum(objective(batch) for batch in LabelMicroBatcher(30, "cpu").batches(rows))
    torch.testing.assert_close(loss, losses_alone(model, rows, lambda one, label: (one[0] - label) ** 2).sum())
    with pytest.raises(UserError, match="a regression has one"):
        LabelObjective(model_of("bert"), "regression")
    found = evaluate_labels(objective, rows, LabelMicroBatcher(20, "cpu"))
    assert found.metrics["rmse"] ** 2 == pytest.approx(found.per_row.mean())
    assert found.metrics[found.main] == pytest.approx(found.per_row.mean()) and not found.higher_is_better
