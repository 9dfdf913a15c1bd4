"""Training on rows with images: a tiny LLaVA learns the color of an image."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import deltaw
from deltaw.cache.keys import root
from deltaw.data.row_images import RowImage
from deltaw.export.merge import merge_run
from deltaw.hub import vision
from deltaw.hub.vision_parts import fold_statistics
from deltaw.inference.open_run import open_run
from deltaw.progress import ignore_line
from deltaw.settings.config import RunConfig
from deltaw.training.features import images as features_module
from deltaw.training.features.images import RowImages
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.session import read_data
from tests.byte_models import save_model, tiny_llama
from tests.conftest import refusal
from tests.hub.test_vision_parts import save_encoder
from tests.training.parallel_runs import assert_same_as_one_process
from tests.training.runs import Snapshots, adapter, assert_same_run, metrics
from tests.vision_models import save_vision_model

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny LLaVA, images, and two questions about each image."""
    folder = tmp_path_factory.mktemp("vision")
    save_vision_model("llava", folder / "model")
    random = np.random.default_rng(0)
    rows = []
    for number in range(16):
        name, color = list(COLORS.items())[number % 2]
        pixels = (np.array(color) + random.integers(-20, 20, (28, 28, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        for question in ("Color?", "Say its color:"):
            rows.append({"image": f"{number}.png", "prompt": question, "completion": name})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def settings(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache" / "packages"))

    def make(output: Path, rows: str = "rows.jsonl", **changes: object) -> dict:
        data = {"train": str(folder / rows), "eval": 8, "group": "image"}
        train = {"learning_rate": 0.01, "batch_size": 8, "epochs": 15, "drift": False}
        common = {"model": str(folder / "model"), "precision": "fp32", "threads": 1, "output": str(output)}
        return {**common, "data": data, "train": train, **changes}

    return make


def exact_match(run: Path) -> float:
    return json.loads((run / "run.json").read_text())["result"]["eval"]["exact_match"]


def test_adapter_learns_from_images(settings, folder, tmp_path):
    deltaw.fit(settings(tmp_path / "run"))
    assert exact_match(tmp_path / "run") == 1.0
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    blind = [{**row, "image": "0.png", "prompt": f"{row['prompt']} {n}"} for n, row in enumerate(rows)]
    (folder / "blind.jsonl").write_text("".join(json.dumps(row) + "\n" for row in blind))
    changed = settings(tmp_path / "blind", "blind.jsonl")
    changed["data"]["group"] = None
    deltaw.fit(changed)
    assert exact_match(tmp_path / "blind") < 1.0  # all rows have the same image


def test_connector_is_trained_alone(settings, tmp_path):
    before = load_file(Path(settings(tmp_path)["model"]) / "model.safetensors")
    deltaw.fit(settings(tmp_path / "run", method="input"))
    saved = adapter(tmp_path / "run")
    assert {name.rpartition("multi_modal_projector.")[2] for name in saved} == {
        f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }
    for name, tensor in saved.items():
        original = before["multi_modal_projector." + name.rpartition("multi_modal_projector.")[2]]
        assert tensor.shape == original.shape and not torch.equal(tensor, original.to(tensor.dtype))


def test_features_are_computed_once_for_all_runs(settings, tmp_path, monkeypatch):
    deltaw.fit(settings(tmp_path / "first", train={"max_steps": 2, "batch_size": 8, "drift": False}))
    files = sorted((root() / "images").glob("*.safetensors"))
    assert len(files) == 16
    loaded = []
    features = vision.VisionTower.features
    monkeypatch.setattr(vision.VisionTower, "features", lambda self, inputs: loaded.append(1) or features(self, inputs))
    again = settings(tmp_path / "second", train={"max_steps": 2, "batch_size": 8, "drift": False})
    deltaw.fit(again)
    assert not loaded and sorted((root() / "images").glob("*.safetensors")) == files
    content = bytearray(files[3].read_bytes())
    content[-5] ^= 1
    files[3].write_bytes(content)
    files[4].write_bytes(b"")
    deltaw.fit({**again, "output": str(tmp_path / "third")})
    assert len(loaded) == 2
    for name in ("second", "third"):
        assert_same_run(tmp_path / name, tmp_path / "first")


@pytest.mark.parametrize("method", [{"method": "lora"}, {"method": "input"}, {"lora": {"vision_tower": True}}], ids=str)
def test_killed_run_resumes_bit_identically(settings, tmp_path, method):
    run = tmp_path / "run"
    train = {"learning_rate": 0.01, "batch_size": 8, "epochs": 4, "drift": False}
    changes = {**method, "train": {**train, "checkpoint_every": 2, "checkpoint_minutes": None}}
    snapshots = Snapshots(run, tmp_path, ["step 5"])
    deltaw.fit(settings(run, **changes), callback=snapshots)
    (copied,) = snapshots.copies.values()
    assert deltaw.fit(settings(copied, **changes)).resumed_from_step
    assert_same_run(copied, run)


def test_trained_tower_is_loaded_and_merged(settings, folder, tmp_path):
    train = {"learning_rate": 0.01, "batch_size": 8, "max_steps": 3, "drift": False}
    lora = {"vision_tower": True, "train_modules": ["multi_modal_projector"]}
    deltaw.fit(settings(tmp_path / "run", lora=lora, train=train))
    assert not [*(root() / "images").glob("*.safetensors")]
    tensors = adapter(tmp_path / "run")
    assert any(tensors[name].any() for name in tensors if "vision_tower" in name and "lora_B" in name)
    merge_run(tmp_path / "run", tmp_path / "merged")
    merged, base = (_complete(path) for path in (tmp_path / "merged", folder / "model"))
    peft = PeftModel.from_pretrained(_complete(folder / "model"), tmp_path / "run")
    session = open_run(str(tmp_path / "run"), precision="fp32", log=ignore_line)
    images = session.task.images
    for number in (0, 1):
        picture = Image.open(folder / f"{number}.png").convert("RGB")
        tokens = torch.from_numpy(session.encode("Color?", [folder / f"{number}.png"]).astype(np.int64))[None]
        ids = tokens.where(tokens < images.first_id, torch.tensor(images.token_id))
        pixels = images._processor.encode(picture)[1]["pixel_values"]
        with torch.no_grad():
            trained = session.model(input_ids=tokens).logits
            expected = base(ids, pixels).logits
            assert (trained - expected).norm() > 0.1 * expected.norm()
            with session.base():
                torch.testing.assert_close(session.model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
            for complete in (merged, peft):
                logits = complete(input_ids=ids, pixel_values=pixels).logits
                torch.testing.assert_close(trained, logits, rtol=1e-4, atol=1e-4)


def _complete(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def test_tower_of_a_text_model_is_rejected(settings, folder, tmp_path):
    save_model(tiny_llama(), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    changes = {"model": str(tmp_path / "model"), "data": {"train": str(tmp_path / "rows.jsonl"), "duplicates": "keep"}}
    error = refusal(deltaw.fit, settings(tmp_path / "run", lora={"vision_tower": True}, **changes))
    assert error.location == "lora.vision_tower" and "no vision tower" in error.message


def test_plan_includes_the_trained_tower(settings, tmp_path):
    peaks = []
    for lora in ({}, {"vision_tower": True}):
        config = RunConfig(**settings(tmp_path / "run", lora=lora))
        plan = plan_run(config, *read_data(config))
        peaks.append(plan.peak_bytes)
    assert peaks[1] > peaks[0] + 50_000


def test_another_image_is_not_resumed(settings, folder, tmp_path):
    run = tmp_path / "run"
    snapshots = Snapshots(run, tmp_path, ["step 5"])
    train = {"batch_size": 8, "epochs": 4, "drift": False, "checkpoint_every": 2, "checkpoint_minutes": None}
    deltaw.fit(settings(run, train=train), callback=snapshots)
    (copied,) = snapshots.copies.values()
    original = (folder / "2.png").read_bytes()
    try:
        shutil.copy(folder / "1.png", folder / "2.png")
        error = refusal(deltaw.fit, settings(copied, train=train))
    finally:
        (folder / "2.png").write_bytes(original)
    assert "rows" in error.message


def test_soft_prompt_is_rejected(settings, tmp_path):
    error = refusal(deltaw.fit, settings(tmp_path / "run", method="prompt"))
    assert "a soft prompt cannot be trained on rows with images" in error.message


def test_rows_with_deleted_images_are_not_resumed(settings, folder, tmp_path):
    run = tmp_path / "run"
    rows = (folder / "rows.jsonl").read_text()
    image = (folder / "2.png").read_bytes()
    snapshots = Snapshots(run, tmp_path, ["step 5"])
    train = {"batch_size": 8, "epochs": 4, "drift": False, "checkpoint_every": 2, "checkpoint_minutes": None}
    deltaw.fit(settings(run, train=train), callback=snapshots)
    (copied,) = snapshots.copies.values()
    try:
        (folder / "2.png").unlink()
        deleted = refusal(deltaw.fit, settings(copied, train=train))
        (folder / "2.png").write_bytes(image)
        (folder / "rows.jsonl").write_text("\n".join(rows.splitlines()[::-1]) + "\n")
        reordered = refusal(deltaw.fit, settings(copied, train=train))
    finally:
        (folder / "2.png").write_bytes(image)
        (folder / "rows.jsonl").write_text(rows)
    assert "the image is not a file" in deleted.message and "2.png" in deleted.location
    assert "rows" in reordered.message


@pytest.mark.slow
def test_two_processes_equal_one(settings, tmp_path):
    train = {"learning_rate": 0.01, "batch_size": 8, "epochs": 2, "drift": False}
    single, several = (settings(tmp_path / name, train=train) for name in ("one", "two"))
    assert_same_as_one_process(single, several)


@pytest.fixture(scope="module")
def parts(folder):
    """A reference to a tiny language model and a vision encoder, whose connector is new."""
    language = save_model(tiny_llama(tie_word_embeddings=True), folder / "language")
    return f"parts:{language} + {save_encoder('dinov2', folder / 'encoder')}"


def write_mixed(folder: Path, num_images: int) -> str:
    """Write 14 rows, of which the last ones have an image, and return the name of the file."""
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(14 - num_images)]
    rows += [{"image": f"{n}.png", "prompt": "q", "completion": "b"} for n in range(num_images)]
    (folder / f"mixed-{num_images}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"mixed-{num_images}.jsonl"


def test_rows_with_images_are_counted(settings, folder, tmp_path):
    changed = settings(tmp_path / "run", write_mixed(folder, 2))
    changed["data"] |= {"eval": None, "group": None, "duplicates": "keep"}
    task, data = read_data(RunConfig.read(changed))
    assert task.inputs.describe(data.all_rows)[0].startswith("2 distinct images in 2 of 14 rows, ")


@pytest.mark.parametrize("two_processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_connector_is_trained_on_steps_without_images(settings, folder, tmp_path, two_processes):
    train = {"learning_rate": 0.01, "batch_size": 2, "epochs": 1, "drift": False}
    one, two = (settings(tmp_path / name, write_mixed(folder, 2), method="input", train=train) for name in "ab")
    for changed in (one, two):
        changed["data"] |= {"eval": None, "group": None, "duplicates": "keep"}
    if two_processes:
        assert_same_as_one_process(one, two)
    else:
        deltaw.fit(one)
    norms = [line["gradient_norm"] for line in metrics(tmp_path / "a")]
    assert len(norms) == 7 and norms.count(0.0) >= 5 and any(norms)


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ({"method": "head"}, ["lm_head.weight"]),
        ({"method": "input", "input": {"tokens": ["<|im_start|>"]}}, ["embed_tokens.weight.values"]),
        ({"method": "lora", "precision": "bf16"}, ["q_proj.lora_B.weight"]),
    ],
    ids=lambda value: value.get("method", "") if isinstance(value, dict) else None,
)
@pytest.mark.slow
def test_methods_train_a_new_connector_and_their_own_parameters(settings, parts, tmp_path, method, trained):
    deltaw.fit(settings(tmp_path / "run", model=parts, **method))
    tensors = adapter(tmp_path / "run")
    for ending in (*trained, "multi_modal_projector.linear_1.weight"):
        assert any(name.endswith(ending) for name in tensors), [*tensors]
    precision = method.get("precision", "fp32")
    session = open_run(str(tmp_path / "run"), precision=precision, log=ignore_line)
    loss = json.loads((tmp_path / "run" / "run.json").read_text())["result"]["eval"]["loss"]
    rows = session.task.read(RunConfig.read(tmp_path / "run" / "run.yaml").data, seed=0).held_out
    assert session.score(rows).metrics["loss"] == pytest.approx(loss, rel=1e-5 if precision == "fp32" else 0.02)


def test_default_rate_of_a_connector_that_is_trained_already_is_a_tenth(settings, parts, tmp_path):
    train = {"max_steps": 2, "batch_size": 8, "drift": False}

    def chosen(name: str, **changes: object) -> dict:
        deltaw.fit(settings(tmp_path / name, train=train, **changes))
        return json.loads((tmp_path / name / "run.json").read_text())["chosen"]["train.learning_rate"]

    new = chosen("new", model=parts)
    started = chosen("started", model=parts, start_from=str(tmp_path / "new"))
    assert started["value"] == pytest.approx(new["value"] / 10) and "connector is trained already" in started["why"]
    assert chosen("complete")["value"] == new["value"], "its connector is frozen"
    both = chosen("both", lora={"train_modules": ["multi_modal_projector"]})
    assert both["value"] == started["value"] and "trained already" not in new["why"]


def test_new_connector_without_images_is_rejected(settings, folder, parts, tmp_path):
    changed = settings(tmp_path / "run", write_mixed(folder, 0), model=parts)
    changed["data"] |= {"group": None, "duplicates": "keep"}
    error = refusal(deltaw.fit, changed)
    assert "rows without images" in error.message and "language model alone" in error.hint


def test_only_the_connector_is_loaded_if_features_are_stored(settings, tmp_path, monkeypatch):
    train = {"max_steps": 2, "batch_size": 8, "drift": False}
    loaded = []
    deltaw.fit(settings(tmp_path / "first", method="input", train=train))
    load = vision.VisionTower.load
    monkeypatch.setattr(
        vision.VisionTower, "load", lambda self, folder, prefix="": loaded.append(prefix) or load(self, folder, prefix)
    )
    deltaw.fit(settings(tmp_path / "second", method="input", train=train))
    assert loaded == ["model.multi_modal_projector."]
    assert_same_run(tmp_path / "second", tmp_path / "first")


@pytest.fixture
def images(folder, settings):
    """The images of the model, with an empty cache."""
    config = AutoConfig.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return RowImages(folder / "model", config, tokenizer, "fp32")


def test_changed_file_is_rejected(images, folder, tmp_path):
    file = shutil.copy(folder / "0.png", tmp_path / "image.png")
    placed = images.place(RowImage(Path(file), "row 1"))
    shutil.copy(folder / "1.png", file)
    error = refusal(images.rows, torch.tensor([placed.ids[0]]))
    assert "changed after its row was read" in error.message and not [*(root() / "images").glob("*.safetensors")]


def test_files_of_other_features_are_computed_again(images, folder):
    images.place(RowImage(folder / "0.png", "row 1"))
    images.compute()
    (file,) = (root() / "images").glob("*.safetensors")
    content = file.read_bytes()
    values = load_file(file)["features"]
    for name, changed in (("bf16", values.bfloat16()), ("width", values[:, :16]), ("3-d", values[None])):
        checksum = {"checksum": features_module._checksum(changed, file.name)}
        save_file({"features": changed.contiguous()}, file, checksum)
        again = _same_images(images, folder)
        assert torch.equal(again.rows(torch.tensor(again._first_ids)), values[:1]) and file.read_bytes() == content, (
            name
        )
    other = file.with_name(f"{'1' if file.name.startswith('0') else '0'}{file.name[1:]}")
    save_file({"features": values + 1}, file, {"checksum": features_module._checksum(values + 1, other.name)})
    again = _same_images(images, folder)
    assert torch.equal(again.rows(torch.tensor(again._first_ids)), values[:1])


def _same_images(images: RowImages, folder: Path) -> RowImages:
    config = AutoConfig.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    again = RowImages(folder / "model", config, tokenizer, "fp32")
    again.place(RowImage(folder / "0.png", "row 1"))
    return again


def test_folded_connector_ignores_constant_features():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(200, 4, generator=random)
    weight = torch.randn(3, 4, generator=random)
    features[:, 1] = 5.3
    features[:, 2] = 20 + features[:, 2] / 100
    table = features_module._Table()
    table.append(features)
    mean, std = table.statistics()
    expected = ((features - mean) / std) @ weight.T
    folded, bias = (tensor.bfloat16() for tensor in fold_statistics(weight, torch.zeros(3), mean, std))
    actual = features.bfloat16() @ folded.T + bias
    assert folded[:, 1:3].eq(0).all() and expected.std() > 0.5
    torch.testing.assert_close(actual.float(), expected, rtol=0.02, atol=0.05)


def test_unfinished_files_are_removed(images, folder, monkeypatch):
    cache = root() / "images"
    cache.mkdir(parents=True)
    old, new = (cache / f".{name}.part" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (0, 0))
    placed = images.place(RowImage(folder / "0.png", "row 1"))

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(features_module, "write_tensors", fail)
    images.rows(torch.tensor([placed.ids[0]]))
    assert [file.name for file in cache.iterdir()] == [new.name]


def test_unused_images_are_discarded(images, folder):
    images.limit_bytes = 1 << 20
    placed = [images.place(RowImage((folder / f"{n}.png").read_bytes(), "request")) for n in (0, 1)]
    tokens = np.array([5, *placed[0].ids, 6])
    images.retain(tokens)
    images.discard_unused()
    assert images.contains(np.array(placed[0].ids)).all() and not images.contains(np.array(placed[1].ids)).any()


def test_only_image_processors_are_created(folder, tmp_path):
    copy = shutil.copytree(folder / "model", tmp_path / "copy")
    (copy / "preprocessor_config.json").unlink()
    settings = {"image_processor": {"image_processor_type": "pipeline", "task": "text-generation", "model": "x"}}
    (copy / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **settings}))
    config = AutoConfig.from_pretrained(copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert "pipeline is not an image processor" in refusal(RowImages, copy, config, tokenizer, "fp32").message
