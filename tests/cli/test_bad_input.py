"""Invalid input exits with status 2 and one message, and leaves no files.

The message states the problem, its location and a hint. A traceback is not shown, and an earlier run in the output
folder is unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTModel

from tests.byte_models import save_model, tiny_llama
from tests.cli.conftest import assert_refused, tree, update_file
from tests.conftest import write_rows

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def assert_train_rejects(call, flags, tmp_path):
    """Assert that ``deltaw train`` rejects the flags and creates no folder."""

    def check(*words, settings=None, **overrides):
        existing = sorted(tmp_path.iterdir())
        settings_arguments = [] if settings is None else [settings]
        result = call("train", *settings_arguments, *flags(tmp_path / "new" / "run", **overrides))
        assert_refused(result, *words, "  hint:  ")
        assert sorted(tmp_path.iterdir()) == existing

    return check


BAD_FILES = {
    "not JSON": ('{"text": "a"}\n{"text": \n', ["line 2", "rows.jsonl"]),
    "an empty file": ("", ["empty"]),
    "columns that nobody knows": ('{"left": "a", "right": "b"}\n', ["left", "rows.jsonl"]),
    "a column missing in a row": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ["row 2", "completion"]),
    "no turn of an assistant": ('{"messages": [{"role": "user", "content": "x"}]}', ["row 1", "assistant"]),
    "no answer at all": ('{"prompt": "a", "completion": ""}\n' * 2, []),
}


def test_unusable_rows_are_rejected(assert_train_rejects, tmp_path):
    for text, words in BAD_FILES.values():
        (tmp_path / "rows.jsonl").write_text(text)
        assert_train_rejects(*words, data=tmp_path / "rows.jsonl")


def test_missing_and_unreadable_data_files_are_rejected(assert_train_rejects, tmp_path, rows_file):
    assert_train_rejects("colors.json", "did you mean 'colors.jsonl'", data=rows_file.with_name("colors.json"))
    assert_train_rejects(tmp_path / "none", data=tmp_path / "none" / "rows.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "ok"}\n{"text": "é"}'.encode("latin-1"))
    assert_train_rejects("UTF-8", "line 2", data=tmp_path / "latin.jsonl")
    (tmp_path / "rows.docx").write_text("x")
    assert_train_rejects(".docx", "jsonl", data=tmp_path / "rows.docx")
    (tmp_path / "folder").mkdir()
    assert_train_rejects("no data file", data=tmp_path / "folder")
    assert_train_rejects("eval.jsonl", data__eval=tmp_path / "eval.jsonl")
    for reference in ("pypi:", "pypi:x==1/../../y", "no such thing", "http://x/y.jsonl", "a\nb.jsonl"):
        assert_train_rejects(data=reference)
    assert_train_rejects("caf", data=tmp_path / os.fsdecode(b"caf\xe9.jsonl"))  # not UTF-8


def test_error_for_long_row_suggests_sufficient_max_length(assert_train_rejects, tmp_path):
    rows = write_rows(tmp_path / "long.jsonl", [{"text": "a"}, {"text": "b" * 90}])
    assert_train_rejects("long.jsonl, row 2", "data.max_length: 91", "long_rows", data=rows, data__max_length=20)
    assert_train_rejects("128 positions", "data.max_length: 128", data=write_rows(rows, [{"text": "b" * 200}] * 2))


def write_labeled(path, *labels):
    return write_rows(path, ({"text": f"row {n}", "label": label} for n, label in enumerate(labels)))


def test_labels_must_match_model_head_and_training_classes(assert_train_rejects, tmp_path):
    model = BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=3, **SHAPE))
    classifier = save_model(model, tmp_path / "classifier")
    rows = write_labeled(tmp_path / "rows.jsonl", *["good", "bad"] * 4)
    task = {"model": classifier, "data": rows, "task": "sequence-classification"}
    assert_train_rejects("3 outputs", "2 classes", "'bad', 'good'", classifier, **task)
    assert_train_rejects("3 outputs", "4 classes", data__classes="[a, bad, c, good]", **task)
    numbers = write_labeled(tmp_path / "numbers.jsonl", *range(8))
    assert_train_rejects("3 outputs", "regression", classifier, **{**task, "data": numbers, "task": "regression"})
    write_labeled(rows, *["a", "b", "c"] * 3)
    other = write_labeled(tmp_path / "eval.jsonl", "a", "d")
    assert_train_rejects("'d' was not seen", "eval.jsonl, row 2", "'a', 'b', 'c'", data__eval=other, **task)


def test_mixed_image_sizes_and_empty_classes_are_rejected(assert_train_rejects, tmp_path):
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SHAPE)).save_pretrained(tmp_path / "vit")
    preprocessor = {"image_processor_type": "ViTImageProcessor", "do_resize": False}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (16, 16), (n, 9, 9)).save(tmp_path / "pets" / name / f"{n}.png")
    task = {"model": tmp_path / "vit", "data": tmp_path / "pets", "task": "image-classification"}
    (tmp_path / "pets" / "emu").mkdir()
    assert_train_rejects("'emu' has no image", tmp_path / "pets" / "emu", **task)
    (tmp_path / "pets" / "emu").rmdir()
    Image.new("RGB", (16, 24)).save(tmp_path / "pets" / "dog" / "3.png")
    assert_train_rejects("24×16", "16×16", "3.png", "resize", **task)


# One case per kind of flag. The generated inputs cover more.
BAD_VALUES = [
    ({"train__learning_rate": "fast"}, ["train.learning_rate", "fast", "number"]),
    ({"lora__rank": 2.5}, ["lora.rank", "an integer"]),
    ({"lora__target_modules": "[q_proj, qq_proj]"}, ["qq_proj", "q_proj"]),
    ({"data__eval": 10}, ["data.eval", "10"]),
    ({"data__columns": "{promt: a}"}, ["promt", "'prompt'"]),
    ({"device": "cude"}, ["device", "'cuda'"]),
    ({"task": "summarizing"}, ["task", "'causal-lm'"]),
    ({"method": "qlora"}, ["method", "'lora'"]),
    ({"model": None}, ["model"]),
    ({"data": None}, ["--data DATA"]),
]


def test_invalid_flag_values_are_rejected(assert_train_rejects, call, flags, tmp_path):
    for flag, words in BAD_VALUES:
        assert_train_rejects(*words, **flag)
    assert_refused(call("train", *flags(tmp_path / "run", train="fast")), "--train")  # a section is not a flag


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without a CUDA device")
def test_unavailable_device_is_rejected(assert_train_rejects, call, finished_run):
    assert_train_rejects("CUDA", "cpu", device="cuda")
    assert_refused(call("generate", finished_run, "--prompt", "x", "--device", "cuda"), "CUDA")


BAD_SETTINGS = {"trian: {epochs: 1}": ["unknown key 'trian'", "'train'"], "lora: 4": ["'lora'", "section"]}
BAD_SETTINGS |= {"model: m\n  data: [\n": ["not YAML", "line 2"], "1: 2": ["'1'"]}


def test_invalid_settings_are_rejected(assert_train_rejects, tmp_path):
    path = tmp_path / "run.yaml"
    for text, words in BAD_SETTINGS.items():
        path.write_text(text)
        assert_train_rejects(path, *words, settings=path)


def test_missing_and_unreadable_settings_are_rejected(assert_train_rejects, tmp_path):
    assert_train_rejects("cannot read the settings", tmp_path / "no.yaml", settings=tmp_path / "no.yaml")
    assert_train_rejects("cannot read the settings", tmp_path, settings=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert_train_rejects("UTF-8", settings=tmp_path / "binary.yaml")


def test_unusable_output_folders_are_rejected(call, flags, tmp_path, finished_run, monkeypatch):
    (tmp_path / "file").write_text("kept")
    assert_refused(call("train", *flags(tmp_path / "file")), "cannot write into the output folder", "hint")
    assert tree(tmp_path) == {"file": b"kept"}
    shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert_refused(call("train", *flags("."), "--fresh"), "earlier run", "hint")
    assert tree(tmp_path / "run") == tree(finished_run)


def test_unusable_models_are_rejected(assert_train_rejects, model_folder, tmp_path):
    assert_train_rejects("no model", "did you mean", "/tiny'?", model=model_folder.with_name("tinny"))
    assert_train_rejects("no model", model=tmp_path / "no" / "such" / "model")
    assert_train_rejects("no-such-user", model="~no-such-user/model")
    assert_train_rejects("owner/no-such-model", model="owner/no-such-model")
    (tmp_path / "empty").mkdir()
    assert_train_rejects("config.json", tmp_path / "empty", model=tmp_path / "empty")
    shutil.copytree(model_folder, tmp_path / "odd")
    words = {"multiple": {"num_attention_heads": 7}, "zero": {"num_attention_heads": 0}, "shapes": {"hidden_size": 64}}
    words |= {"missing": {"num_hidden_layers": 3}, "nonsense": {"model_type": "nonsense"}}
    for word, changes in words.items():
        shutil.copy(model_folder / "config.json", tmp_path / "odd")
        update_file(tmp_path / "odd" / "config.json", **changes)
        assert_train_rejects(word, tmp_path / "odd", model=tmp_path / "odd")
    shutil.copy(model_folder / "config.json", tmp_path / "odd")
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        for content in (b"\x00" * 64, b"null"):
            (tmp_path / "odd" / name).write_bytes(content)
            assert_train_rejects(tmp_path / "odd", model=tmp_path / "odd")
        shutil.copy(model_folder / name, tmp_path / "odd")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def test_run_without_adapter_is_reported(call, run_copy):
    (run_copy / "adapter_config.json").unlink()
    for verb in (["eval", run_copy], ["generate", run_copy, "--prompt", "x"], ["chat", run_copy]):
        assert_refused(call(*verb), "no adapter", "deltaw train")
    assert_refused(call("inspect", run_copy), "adapter_config.json")


def test_damaged_settings_of_run_are_reported(call, run_copy):
    for text in ("{", "- a", "model: 5", "modl: m", "data: {form: novel}"):
        (run_copy / "run.yaml").write_text(text)
        for verb in (["eval", run_copy], ["train", "--resume", run_copy]):
            assert_refused(call(*verb), "run.yaml")


def test_base_model_with_other_shapes_fails_and_other_weights_warn(call, finished_run, tmp_path):
    folders = (tmp_path / "wide", tmp_path / "other")
    wide, other = map(save_model, (tiny_llama(hidden_size=64), tiny_llama(seed=1)), folders)
    generate = ["generate", finished_run, "--prompt", "x", "--max-new-tokens", 2]
    for verb in (["eval", finished_run], generate):
        assert_refused(call(*verb, "--model", wide), WEIGHTS, "trained on")
    result = call(*generate, "--model", other, "--json", status=0)
    assert "warning: the adapter was trained on another base model" in result.err
    assert ".py:" not in result.err
    json.loads(result.out)


def test_missing_arguments_are_reported(call, finished_run, model_folder, run_copy, tmp_path):
    assert_refused(call("eval", model_folder), "no data", "--data")
    assert_refused(call("inspect", model_folder), "adapter_config.json")
    update_file(run_copy / "run.yaml", data={"eval": None})
    assert_refused(call("eval", run_copy), "has no held-out rows", "--data")


def test_non_finite_loss_is_an_error(call, model_folder, rows_file, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    save_model(model, tmp_path / "nan")
    assert_refused(call("eval", tmp_path / "nan", "--data", rows_file, "--json"), "not finite", "hint")
