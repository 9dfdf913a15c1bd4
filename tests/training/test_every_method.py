"""Complete runs of every method on every task: train, save, load, and evaluate with equal results."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, ViTConfig, ViTModel

from deltaw.runs.fit import fit
from deltaw.training.batchers import BatcherOptions
from tests.byte_models import save_model
from tests.conftest import refusal, write_rows
from tests.training.runs import METHODS, adapter, load_eval_rows, open_on_cpu, slow_except

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {"good": "fine great lovely superb neat", "bad": "poor dull awful weak sad"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two base models and labeled rows of words, lengths and pixels."""
    path = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=259, max_position_embeddings=64, initializer_range=0.2, **SHAPE)
    save_model(BertModel(bert), path / "bert")
    torch.manual_seed(0)
    vit = ViTConfig(image_size=8, patch_size=4, num_channels=1, initializer_range=0.2, **SHAPE)
    ViTModel(vit).save_pretrained(path / "vit")
    words = ({"text": f"it is {w}", "label": label} for label, words in WORDS.items() for w in words.split())
    write_rows(path / "feelings.jsonl", words)
    write_rows(path / "lengths.jsonl", ({"text": "ab" * (1 + n), "label": float(n)} for n in range(10)))
    odd = torch.arange(12)[:, None] % 2
    pixels = torch.randint(0, 100, (12, 64), generator=torch.Generator().manual_seed(0)) + 150 * odd
    rows = torch.cat([pixels, odd], 1).tolist()
    (path / "pixels.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.fixture
def make_config(settings, tmp_path):
    def make(task, model, rows, method):
        data = {"train": str(rows), "eval": 3}
        return settings(tmp_path / "run", model=str(model), task=task, data=data, **METHODS[method])

    return make


def fit_and_reload(settings):
    result = fit(settings)
    run = open_on_cpu(result.output)
    eval_rows = load_eval_rows(run)
    reloaded = run.score(eval_rows).evaluation
    assert reloaded.metrics.keys() == result.evaluation.metrics.keys()
    for name, value in result.evaluation.metrics.items():
        assert reloaded.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    with run.base():
        base = run.score(eval_rows).evaluation.metrics
    # Without training, an empty adapter file would give the same numbers.
    assert base != pytest.approx(result.evaluation.metrics, rel=2e-4, nan_ok=True)
    return result, run


@pytest.mark.parametrize("method", slow_except("lora", "input", "last", "random", "bias"))
def test_causal_lm(method, make_config, model_folder, rows_file):
    result, run = fit_and_reload(make_config("causal-lm", model_folder, rows_file, method))
    assert result.trained_parameters > 0 and run.method.name == method


@pytest.mark.parametrize("method", slow_except("head"))
def test_text_classification(method, make_config, folder, tmp_path):
    config = make_config("sequence-classification", folder / "bert", folder / "feelings.jsonl", method)
    result, run = fit_and_reload(config)
    assert run.classes == ("bad", "good")
    assert {"accuracy", "macro_f1", "matthews", "loss"} <= result.evaluation.metrics.keys()
    assert result.evaluation.confusion.sum() == 3
    if method == "head":  # a label that is not in the training rows is rejected
        other = write_rows(tmp_path / "other.jsonl", [{"text": "so so", "label": "middling"}])
        refusal(run.task.read_file, str(other), run.data, run.classes, match="middling")


@pytest.mark.parametrize("method", slow_except("full", "prompt"))
def test_image_classification(method, make_config, folder):
    config = make_config("image-classification", folder / "vit", folder / "pixels.csv", method)
    if method == "prompt":
        refusal(fit, config, match=r"images|tokens")
    else:
        assert fit_and_reload(config)[1].classes == ("0", "1")


@pytest.mark.each_value
@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("task", ["sequence-classification", "regression"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_peft_loads_adapter_with_head(kind, task, method, make_config, folder, model_folder):
    model = folder / "bert" if kind == "encoder" else model_folder
    rows = folder / ("feelings.jsonl" if task == "sequence-classification" else "lengths.jsonl")
    result, run = fit_and_reload(make_config(task, model, rows, method))
    if task == "regression":
        assert {"rmse", "pearson", "spearman"} <= result.evaluation.metrics.keys() and run.classes is None
    example = run.example(load_eval_rows(run)[0])
    batcher, _ = run.task.batcher(run.model, [example], BatcherOptions("cpu"))
    labels = 1 if task == "regression" else 2
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels, dtype=torch.float32)
    base.config.pad_token_id = 0
    theirs = PeftModel.from_pretrained(base.eval(), result.output)
    tokens = torch.from_numpy(example.tokens[run.virtual_tokens :].astype("int64"))[None]
    with torch.no_grad():
        ours = run.task.objective(run.model).predictions(next(iter(batcher.batches([example]))))
        logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(ours.flatten(), logits.flatten(), rtol=1e-4, atol=1e-5)


def test_lora_plus_increases_learning_rate_of_b(settings, tmp_path):
    norms = []
    for ratio in (1.0, 16.0):
        train = {"loraplus_lr_ratio": ratio, "max_steps": 1}
        tensors = adapter(fit(settings(tmp_path / str(ratio), data={"eval": None}, train=train)).output)
        norms.append(sum(float(t.norm()) for name, t in tensors.items() if "lora_B" in name))
    assert norms[1] > 8 * norms[0]
