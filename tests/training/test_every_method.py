"""Whole runs of every method on every task: trained, saved, opened again, judged as at the end."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, ViTConfig, ViTModel

from deltaw.errors import UserError
from deltaw.training.fit import fit
from deltaw.training.origin import score_run
from tests.byte_models import saved
from tests.conftest import laid_over, write_rows
from tests.training.runs import adapter, fit_aloud, opened

METHODS = ("lora", "head", "input", "prompt", "bias", "random", "last", "full")
CHANGES = {
    "last": {"last": {"blocks": 1}},
    "prompt": {"prompt": {"length": 4}},
    "random": {"random": {"weights": 0.05}},
}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return saved(BertModel(config), folder)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    ViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def feelings_file(tmp_path_factory):
    words = {"good": ["fine", "great", "lovely", "superb", "neat"], "bad": ["poor", "dull", "awful", "weak", "sad"]}
    rows = [{"text": f"it is {w}", "label": label} for label, ws in words.items() for w in ws]
    return write_rows(tmp_path_factory.mktemp("rows") / "feelings.jsonl", rows)


@pytest.fixture(scope="module")
def lengths_file(tmp_path_factory):
    rows = [{"text": "ab" * (1 + n), "label": float(n)} for n in range(10)]
    return write_rows(tmp_path_factory.mktemp("rows") / "lengths.jsonl", rows)


@pytest.fixture(scope="module")
def pixels_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "pixels.csv"
    rng = torch.Generator().manual_seed(0)
    lines = []
    for n in range(12):
        pixels = torch.randint(0, 100, (64,), generator=rng) + 150 * (n % 2)
        lines.append(",".join(map(str, [*pixels.tolist(), n % 2])))
    path.write_text("\n".join(lines) + "\n")
    return path


def of_task(task, model, rows, output, method, **more):
    plain = {
        "model": str(model),
        "task": task,
        "data": {"train": str(rows), "eval": 3},
        "method": method,
        "lora": {"rank": 2, "alpha": 4},
        "train": {"learning_rate": 1e-2, "batch_size": 3, "epochs": 2},
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "output": str(output),
    }
    return laid_over(laid_over(plain, CHANGES.get(method, {})), more)


def trains_and_opens_again(settings):
    result, said = fit_aloud(settings)
    run = opened(result.output)
    held_out = run.task.read(run.config.data, seed=0).held_out
    again = score_run(run, held_out).evaluation
    assert again.metrics.keys() == result.evaluation.metrics.keys()
    for name, value in result.evaluation.metrics.items():
        assert again.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    with run.base():
        base = score_run(run, held_out).evaluation.metrics
    # Were nothing trained, the same numbers would come back from an empty file.
    assert base != pytest.approx(result.evaluation.metrics, rel=2e-4, nan_ok=True)
    return result, run, said


@pytest.mark.parametrize("method", METHODS)
def test_text_to_be_generated(method, settings, tmp_path):
    result, run, _ = trains_and_opens_again(
        laid_over(settings(tmp_path / "run", method=method, train={"epochs": 2}), CHANGES.get(method, {}))
    )
    assert result.trained_parameters > 0 and run.method.name == method


@pytest.mark.parametrize("method", METHODS)
def test_classes_of_text(method, bert_folder, feelings_file, tmp_path):
    settings = of_task("sequence-classification", bert_folder, feelings_file, tmp_path / "run", method)
    result, run, _ = trains_and_opens_again(settings)
    assert run.classes == ("bad", "good")
    assert {"accuracy", "macro_f1", "matthews", "loss"} <= result.evaluation.metrics.keys()
    assert result.evaluation.confusion.sum() == 3


@pytest.mark.parametrize(
    "method",
    ["lora", "head", "random", "full", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bias", "last", "input"))],
)
def test_classes_of_images(method, vit_folder, pixels_file, tmp_path):
    settings = of_task("image-classification", vit_folder, pixels_file, tmp_path / "run", method)
    _, run, _ = trains_and_opens_again(settings)
    assert run.classes == ("0", "1")


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_numbers(method, bert_folder, lengths_file, tmp_path):
    settings = of_task("regression", bert_folder, lengths_file, tmp_path / "run", method)
    result, run, _ = trains_and_opens_again(settings)
    assert {"rmse", "pearson", "spearman"} <= result.evaluation.metrics.keys() and run.classes is None


def test_decoders_tell_classes_too(model_folder, feelings_file, tmp_path):
    settings = of_task("sequence-classification", model_folder, feelings_file, tmp_path / "run", "lora")
    trains_and_opens_again(settings)


def test_a_label_never_seen_in_training_is_refused(bert_folder, feelings_file, tmp_path):
    settings = of_task("sequence-classification", bert_folder, feelings_file, tmp_path / "run", "head")
    result = fit(settings)
    run = opened(result.output)
    other = write_rows(tmp_path / "other.jsonl", [{"text": "so so", "label": "middling"}])
    with pytest.raises(UserError, match="middling"):
        run.task.read_file(str(other), run.data, run.classes)


def test_images_have_no_soft_prompt(vit_folder, pixels_file, tmp_path):
    settings = of_task("image-classification", vit_folder, pixels_file, tmp_path / "run", "prompt")
    with pytest.raises(UserError, match=r"images|tokens"):
        fit(settings)


@pytest.mark.each_pair
@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("task", ["sequence-classification", "regression"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_peft_loads_the_adapter_with_its_head(
    kind, task, method, bert_folder, model_folder, feelings_file, lengths_file, tmp_path
):
    folder = bert_folder if kind == "encoder" else model_folder
    rows = feelings_file if task == "sequence-classification" else lengths_file
    result = fit(of_task(task, folder, rows, tmp_path / "run", method))
    run = opened(result.output)
    example = run.example(run.task.read(run.config.data, seed=0).held_out[0])
    batcher, _ = run.task.batcher(
        run.model, [example], device="cpu", tokens_per_pass="auto", share="auto", method_shares=True, virtual_tokens=0
    )
    objective = run.task.objective(run.model)
    with torch.no_grad():
        ours = objective.predictions(next(iter(batcher.batches([example]))))
    labels = 1 if task == "regression" else 2
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, dtype=torch.float32)
    base.config.pad_token_id = 0
    theirs = PeftModel.from_pretrained(base.eval(), result.output)
    tokens = torch.from_numpy(example.tokens[run.virtual_tokens :].astype("int64"))[None]
    with torch.no_grad():
        logits = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(ours.flatten(), logits.flatten(), rtol=1e-4, atol=1e-5)


def test_lora_plus_trains_b_faster(settings, tmp_path):
    norms = []
    for ratio in (1.0, 16.0):
        result = fit(settings(tmp_path / str(ratio), train={"b_rate": ratio, "max_steps": 3}))
        tensors = adapter(result.output)
        norms.append(sum(float(t.norm()) for name, t in tensors.items() if "lora_B" in name))
    assert norms[1] > 8 * norms[0]
