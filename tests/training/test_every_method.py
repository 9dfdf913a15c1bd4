"""Whole runs of every method on every task: trained, saved, opened again, judged as at the end."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, ViTConfig, ViTModel

from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.training.origin import score_run
from tests.byte_models import saved
from tests.conftest import write_rows
from tests.training.runs import METHODS, adapter, held_out_rows, often, opened

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"good": "fine great lovely superb neat", "bad": "poor dull awful weak sad"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two base models, and rows of words, of lengths and of pixels with their labels."""
    made = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=259, max_position_embeddings=64, initializer_range=0.2, **SHAPE)
    saved(BertModel(bert), made / "bert")
    torch.manual_seed(0)
    vit = ViTConfig(image_size=8, patch_size=4, num_channels=1, initializer_range=0.2, **SHAPE)
    ViTModel(vit).save_pretrained(made / "vit")
    words = ({"text": f"it is {w}", "label": label} for label, words in WORDS.items() for w in words.split())
    write_rows(made / "feelings.jsonl", words)
    write_rows(made / "lengths.jsonl", ({"text": "ab" * (1 + n), "label": float(n)} for n in range(10)))
    odd = torch.arange(12)[:, None] % 2
    pixels = torch.randint(0, 100, (12, 64), generator=torch.Generator().manual_seed(0)) + 150 * odd
    rows = torch.cat([pixels, odd], 1).tolist()
    (made / "pixels.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return made


@pytest.fixture
def of_task(settings, tmp_path):
    def made(task, model, rows, method):
        data = {"train": str(rows), "eval": 3}
        return settings(tmp_path / "run", model=str(model), task=task, data=data, **METHODS[method])

    return made


def trains_and_opens_again(settings):
    result = fit(settings)
    run = opened(result.output)
    held_out = held_out_rows(run)
    again = score_run(run, held_out).evaluation
    assert again.metrics.keys() == result.evaluation.metrics.keys()
    for name, value in result.evaluation.metrics.items():
        assert again.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    with run.base():
        base = score_run(run, held_out).evaluation.metrics
    # Were nothing trained, the same numbers would come back from an empty file.
    assert base != pytest.approx(result.evaluation.metrics, rel=2e-4, nan_ok=True)
    return result, run


@pytest.mark.parametrize("method", METHODS)
def test_text_to_be_generated(method, of_task, model_folder, rows_file):
    result, run = trains_and_opens_again(of_task("causal-lm", model_folder, rows_file, method))
    assert result.trained_parameters > 0 and run.method.name == method


@pytest.mark.parametrize("method", often("head"))
def test_classes_of_text(method, of_task, folder, tmp_path):
    asked = of_task("sequence-classification", folder / "bert", folder / "feelings.jsonl", method)
    result, run = trains_and_opens_again(asked)
    assert run.classes == ("bad", "good")
    assert {"accuracy", "macro_f1", "matthews", "loss"} <= result.evaluation.metrics.keys()
    assert result.evaluation.confusion.sum() == 3
    if method == "head":  # a label never seen in training is refused
        other = write_rows(tmp_path / "other.jsonl", [{"text": "so so", "label": "middling"}])
        with pytest.raises(UserError, match="middling"):
            run.task.read_file(str(other), run.data, run.classes)


@pytest.mark.parametrize("method", often("lora", "full", "prompt"))
def test_classes_of_images(method, of_task, folder):
    asked = of_task("image-classification", folder / "vit", folder / "pixels.csv", method)
    if method == "prompt":
        with pytest.raises(UserError, match=r"images|tokens"):
            fit(asked)
    else:
        assert trains_and_opens_again(asked)[1].classes == ("0", "1")


@pytest.mark.each_pair
@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("task", ["sequence-classification", "regression"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_peft_loads_the_adapter_with_its_head(kind, task, method, of_task, folder, model_folder):
    model = folder / "bert" if kind == "encoder" else model_folder
    rows = folder / ("feelings.jsonl" if task == "sequence-classification" else "lengths.jsonl")
    result, run = trains_and_opens_again(of_task(task, model, rows, method))
    if task == "regression":
        assert {"rmse", "pearson", "spearman"} <= result.evaluation.metrics.keys() and run.classes is None
    example = run.example(held_out_rows(run)[0])
    how = {"device": "cpu", "tokens_per_pass": "auto", "share": "auto", "method_shares": True, "virtual_tokens": 0}
    batcher, _ = run.task.batcher(run.model, [example], **how)
    labels = 1 if task == "regression" else 2
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels, dtype=torch.float32)
    base.config.pad_token_id = 0
    theirs = PeftModel.from_pretrained(base.eval(), result.output)
    tokens = torch.from_numpy(example.tokens[run.virtual_tokens :].astype("int64"))[None]
    with torch.no_grad():
        ours = run.task.objective(run.model).predictions(next(iter(batcher.batches([example]))))
        logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(ours.flatten(), logits.flatten(), rtol=1e-4, atol=1e-5)


def test_lora_plus_trains_b_faster(settings, tmp_path):
    norms = []
    for ratio in (1.0, 16.0):
        tensors = adapter(fit(settings(tmp_path / str(ratio), train={"b_rate": ratio, "max_steps": 1})).output)
        norms.append(sum(float(t.norm()) for name, t in tensors.items() if "lora_B" in name))
    assert norms[1] > 8 * norms[0]
