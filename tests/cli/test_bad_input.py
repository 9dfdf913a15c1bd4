"""Whatever a user gets wrong ends with status 2 and one message, and leaves nothing behind.

The message says what is wrong, where, and how to hint it; there is no traceback, no half-made folder, and an
earlier run in the output folder is not touched.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTModel

from tests.byte_models import saved, tiny_llama
from tests.cli.conftest import assert_refused, changed, tree
from tests.conftest import write_rows

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def refuses(call, flags, tmp_path):
    """``deltaw train`` refuses the flags, and makes no folder."""

    def check(*words, settings=None, **instead):
        around = sorted(tmp_path.iterdir())
        file = [] if settings is None else [settings]
        assert_refused(call("train", *file, *flags(tmp_path / "new" / "run", **instead)), *words, "  hint:  ")
        assert sorted(tmp_path.iterdir()) == around

    return check


LINES = {
    "not JSON": ('{"text": "a"}\n{"text": \n', ["line 2", "rows.jsonl"]),
    "an empty file": ("", ["empty"]),
    "columns that nobody knows": ('{"left": "a", "right": "b"}\n', ["left", "rows.jsonl"]),
    "a column missing in a row": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ["row 2", "completion"]),
    "no turn of an assistant": ('{"messages": [{"role": "user", "content": "x"}]}', ["row 1", "assistant"]),
    "no answer at all": ('{"prompt": "a", "completion": ""}\n' * 2, []),
}


def test_rows_that_cannot_be_used(refuses, tmp_path):
    for text, words in LINES.values():
        (tmp_path / "rows.jsonl").write_text(text)
        refuses(*words, data=tmp_path / "rows.jsonl")


def test_files_that_are_not_there_or_no_data(refuses, tmp_path, rows_file):
    refuses("colors.json", "did you mean 'colors.jsonl'", data=rows_file.with_name("colors.json"))
    refuses(tmp_path / "none", data=tmp_path / "none" / "rows.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "ok"}\n{"text": "é"}'.encode("latin-1"))
    refuses("UTF-8", "line 2", data=tmp_path / "latin.jsonl")
    (tmp_path / "rows.docx").write_text("x")
    refuses(".docx", "jsonl", data=tmp_path / "rows.docx")
    (tmp_path / "folder").mkdir()
    refuses("no data file", data=tmp_path / "folder")
    refuses("eval.jsonl", data__eval=tmp_path / "eval.jsonl")


def test_a_row_that_is_too_long_is_named_with_the_length_that_would_fit(refuses, tmp_path):
    rows = write_rows(tmp_path / "long.jsonl", [{"text": "a"}, {"text": "b" * 90}])
    refuses("long.jsonl, row 2", "data.max_length: 91", "long_rows", data=rows, data__max_length=20)
    refuses("128 positions", "data.max_length: 128", data=write_rows(rows, [{"text": "b" * 200}] * 2))


def labeled(path, *labels):
    return write_rows(path, ({"text": f"row {n}", "label": label} for n, label in enumerate(labels)))


def test_labels_that_do_not_fit_a_models_head_or_that_training_has_never_seen(refuses, tmp_path):
    model = BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=3, **SHAPE))
    classifier = saved(model, tmp_path / "classifier")
    rows = labeled(tmp_path / "rows.jsonl", *["good", "bad"] * 4)
    task = {"model": classifier, "data": rows, "task": "sequence-classification"}
    refuses("3 outputs", "2 classes", "'bad', 'good'", classifier, **task)
    refuses("3 outputs", "4 classes", data__classes="[a, bad, c, good]", **task)
    numbers = labeled(tmp_path / "numbers.jsonl", *range(8))
    refuses("3 outputs", "regression", classifier, **{**task, "data": numbers, "task": "regression"})
    labeled(rows, *["a", "b", "c"] * 3)
    other = labeled(tmp_path / "eval.jsonl", "a", "d")
    refuses("'d' was not seen", "eval.jsonl, row 2", "'a', 'b', 'c'", data__eval=other, **task)


def test_images_of_mixed_sizes_and_classes_without_any(refuses, tmp_path):
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SHAPE)).save_pretrained(tmp_path / "vit")
    preprocessor = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (16, 16), (n, 9, 9)).save(tmp_path / "pets" / name / f"{n}.png")
    task = {"model": tmp_path / "vit", "data": tmp_path / "pets", "task": "image-classification"}
    (tmp_path / "pets" / "emu").mkdir()
    refuses("'emu' has no image", tmp_path / "pets" / "emu", **task)
    (tmp_path / "pets" / "emu").rmdir()
    Image.new("RGB", (16, 24)).save(tmp_path / "pets" / "dog" / "3.png")
    refuses("24×16", "16×16", "3.png", "resize", **task)


# One of each kind of flag; the generated bad inputs take more.
VALUES = [
    ({"train__learning_rate": "fast"}, ["train.learning_rate", "fast", "number"]),
    ({"lora__rank": 2.5}, ["lora.rank", "whole number"]),
    ({"lora__target_modules": "[q_proj, qq_proj]"}, ["qq_proj", "q_proj"]),
    ({"data__eval": 10}, ["data.eval", "10"]),
    ({"data__columns": "{promt: a}"}, ["promt", "'prompt'"]),
    ({"device": "cude"}, ["device", "'cuda'"]),
    ({"task": "summarizing"}, ["task", "'causal-lm'"]),
    ({"method": "qlora"}, ["method", "'lora'"]),
    ({"model": None}, ["model"]),
    ({"data": None}, ["--data DATA"]),
]


def test_values_that_do_not_fit(refuses, call, flags, tmp_path):
    for flag, words in VALUES:
        refuses(*words, **flag)
    assert_refused(call("train", *flags(tmp_path / "run", train="fast")), "--train")  # a section is no flag


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which this test wants absent")
def test_a_device_that_is_not_there(refuses, call, finished_run):
    refuses("CUDA", "cpu", device="cuda")
    assert_refused(call("generate", finished_run, "--prompt", "x", "--device", "cuda"), "CUDA")


FILES = {
    "trian: {epochs: 1}": ["unknown key 'trian'", "'train'"],
    "lora: 4": ["'lora'", "section"],
    "model: m\n  data: [\n": ["not YAML", "line 2"],
    "1: 2": ["'1'"],
}


def test_settings_that_cannot_be_used(refuses, tmp_path):
    path = tmp_path / "run.yaml"
    for text, words in FILES.items():
        path.write_text(text)
        refuses(path, *words, settings=path)


def test_settings_that_are_not_there(refuses, tmp_path):
    refuses("cannot read the settings", tmp_path / "no.yaml", settings=tmp_path / "no.yaml")
    refuses("cannot read the settings", tmp_path, settings=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refuses("UTF-8", settings=tmp_path / "binary.yaml")


def test_output_folders_that_cannot_be_written(call, flags, tmp_path, finished_run, monkeypatch):
    (tmp_path / "file").write_text("kept")
    assert_refused(call("train", *flags(tmp_path / "file")), "cannot write into the output folder", "hint")
    assert tree(tmp_path) == {"file": b"kept"}
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert_refused(call("train", *flags("."), "--fresh"), "earlier run", "hint")
    assert tree(tmp_path / "run") == tree(finished_run)


def test_models_that_cannot_be_used(refuses, model_folder, tmp_path):
    refuses("no model", "did you mean", "/tiny'?", model=model_folder.with_name("tinny"))
    refuses("no model", model=tmp_path / "no" / "such" / "model")
    refuses("no-such-user", model="~no-such-user/model")
    refuses("owner/no-such-model", model="owner/no-such-model")
    (tmp_path / "empty").mkdir()
    refuses("config.json", tmp_path / "empty", model=tmp_path / "empty")
    shutil.copytree(model_folder, tmp_path / "odd")
    words = {"multiple": {"num_attention_heads": 7}, "zero": {"num_attention_heads": 0}, "shapes": {"hidden_size": 64}}
    words |= {"missing": {"num_hidden_layers": 3}, "nonsense": {"model_type": "nonsense"}}
    for word, changes in words.items():
        shutil.copy(model_folder / "config.json", tmp_path / "odd")
        changed(tmp_path / "odd" / "config.json", **changes)
        refuses(word, tmp_path / "odd", model=tmp_path / "odd")


@pytest.fixture
def copied(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_a_run_without_an_adapter_says_so(call, copied):
    (copied / "adapter_config.json").unlink()
    for verb in (["eval", copied], ["generate", copied, "--prompt", "x"], ["chat", copied]):
        assert_refused(call(*verb), "no adapter", "deltaw train")
    assert_refused(call("inspect", copied), "adapter_config.json")


def test_a_model_of_other_shapes_is_refused_and_one_of_other_weights_warned_of(call, finished_run, tmp_path):
    wide, other = saved(tiny_llama(hidden_size=64), tmp_path / "wide"), saved(tiny_llama(seed=1), tmp_path / "other")
    generate = ["generate", finished_run, "--prompt", "x", "--max-new-tokens", 2]
    for verb in (["eval", finished_run], generate):
        assert_refused(call(*verb, "--model", wide), WEIGHTS, "trained on")
    ended = call(*generate, "--model", other, "--json", status=0)
    assert "warning: the adapter was trained on another base model" in ended.err
    assert ".py:" not in ended.err
    json.loads(ended.out)


def test_verbs_that_are_given_too_little(call, finished_run, model_folder, copied, tmp_path):
    assert_refused(call("eval", model_folder), "no data", "--data")
    assert_refused(call("inspect", model_folder), "adapter_config.json")
    changed(copied / "run.yaml", data={"eval": None})
    assert_refused(call("eval", copied), "held no rows out", "--data")


def test_a_loss_that_is_not_finite_is_no_result(call, model_folder, rows_file, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    saved(model, tmp_path / "nan")
    assert_refused(call("eval", tmp_path / "nan", "--data", rows_file, "--json"), "not finite", "hint")
