"""Images on the command line: generate, chat and predict with a vision-language model."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deltaw.inference import predicting
from tests.cli.conftest import Call, assert_refused
from tests.conftest import write_rows
from tests.vision_models import chat_prompt, png, reference_text, save_vision_model

GENERATE = ("generate", "--max-new-tokens", 6, "--precision", "fp32")
RED = png((220, 10, 10))
BLUE = png((10, 10, 220))


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model, with two images next to it."""
    folder = tmp_path_factory.mktemp("vision")
    (folder / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)
    return save_vision_model("llava", folder / "model").parent


def completions(call: Call, *arguments: object) -> list[str]:
    result = call(*GENERATE, *arguments, "--json", status=0)
    return [row["completion"] for row in json.loads(result.out)["completions"]]


def test_generated_text_equals_that_of_the_complete_model(call: Call, vision_folder: Path) -> None:
    model, red, blue = (vision_folder / name for name in ("model", "red.png", "blue.png"))
    expected = [reference_text(model, chat_prompt(f"<image>{text}"), RED) for text in ("color?", "name it")]
    assert completions(call, model, "--image", red, "-p", "color?", "-p", "name it") == expected
    question = "is <image> like <image>?"
    expected, swapped = (reference_text(model, chat_prompt(question), *pair) for pair in ((BLUE, RED), (RED, BLUE)))
    assert completions(call, model, "--image", blue, "--image", red, "-p", question) == [expected]
    assert expected != swapped


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_text_generated_from_images_with_grid_positions(call: Call, tmp_path: Path, family: str) -> None:
    model = save_vision_model(family, tmp_path / "model")
    wide = png((220, 10, 10), (48, 16))
    square = BLUE
    (tmp_path / "wide.png").write_bytes(wide)
    (tmp_path / "square.png").write_bytes(square)
    images = ("--image", tmp_path / "wide.png", "--image", tmp_path / "square.png")
    questions = ("is <image> like <image>?", "what is the difference between <image> and <image>")
    expected = [reference_text(model, chat_prompt(question), wide, square) for question in questions]
    assert completions(call, model, *images, "-p", questions[0], "-p", questions[1]) == expected
    assert completions(call, model, "-p", "color?") == [reference_text(model, chat_prompt("color?"))]


def test_unusable_images_of_prompts_are_refused(call: Call, vision_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes((vision_folder / "red.png").read_bytes()[:200])
    run = vision_folder / "model"
    assert_refused(call(*GENERATE, run, "--image", tmp_path / "bad.png", "color?"), "cannot be decoded")
    assert_refused(call(*GENERATE, run, "--image", tmp_path / "no.png", "color?"), "not a file")
    image = ("--image", vision_folder / "red.png")
    assert_refused(call(*GENERATE, run, *image, "is <image> like <image>?"), "<image>")


def test_markers_without_images_are_text(call: Call, vision_folder: Path) -> None:
    model = vision_folder / "model"
    text = "is this <image>?"
    written = "is this <\u200bimage>?"
    assert completions(call, model, text) == [reference_text(model, chat_prompt(written))]
    lines = (f"/image {vision_folder / 'red.png'}", "color?", text)
    chat = ("chat", "--max-new-tokens", 6, "--precision", "fp32", model)
    result = call(*chat, stdin="\n".join(lines), status=0)
    first = reference_text(model, chat_prompt("<image>color?"), RED)
    conversation = chat_prompt("<image>color?") + f"{first}<|im_end|>\n" + chat_prompt(written)
    assert result.out.endswith(f"model: {reference_text(model, conversation, RED)}\n")


def test_text_models_refuse_images(call: Call, finished_run: Path, vision_folder: Path) -> None:
    result = call(*GENERATE, finished_run, "--image", vision_folder / "red.png", "color?")
    assert_refused(result, "text only")


def test_content_parts_and_separate_images_are_encoded_alike(vision_folder: Path) -> None:
    from deltaw.inference.open_run import open_run

    session = open_run(str(vision_folder / "model"), precision="fp32", log=lambda line: None)
    path = vision_folder / "red.png"
    for image in ({"type": "image", "path": str(path)}, {"type": "image", "image": path.read_bytes()}):
        content = [image, {"type": "text", "text": "color?"}]
        parts = session.encode([{"role": "user", "content": content}])
        np.testing.assert_array_equal(parts, session.encode("color?", [path]))
    assert (parts >= session.model.config.vocab_size).sum() == 4


def test_chat_attaches_an_image_to_the_next_message(call: Call, vision_folder: Path) -> None:
    lines = (f"/image {vision_folder / 'none.png'}", f"/image {vision_folder / 'red.png'}", "color?", "and now?")
    chat = ("chat", "--max-new-tokens", 6, "--precision", "fp32", vision_folder / "model")
    result = call(*chat, stdin="\n".join(lines), status=0)
    assert "not a file" in result.err
    first = reference_text(vision_folder / "model", chat_prompt("<image>color?"), RED)
    conversation = chat_prompt("<image>color?") + f"{first}<|im_end|>\n" + chat_prompt("and now?")
    second = reference_text(vision_folder / "model", conversation, RED)
    assert result.out.endswith(f"model: {first}\nmodel: {second}\n")


def test_rows_with_images_are_predicted_as_prompts(
    call: Call, vision_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicting, "COMPLETION_ROWS", 2)  # several chunks
    for name in ("red", "blue"):
        shutil.copy(vision_folder / f"{name}.png", tmp_path)
    (tmp_path / "bad.png").write_bytes(RED[:200])
    rows = [{"image": f"{name}.png", "prompt": "color?"} for name in ("red", "bad", "none", "blue")]
    content = [{"type": "text", "text": "name it "}, {"type": "image"}]
    rows += [{"images": ["red.png"], "messages": [{"role": "user", "content": content}]}, {"prompt": "color?"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    predict = ("predict", vision_folder / "model", tmp_path / "rows.jsonl", "--precision", "fp32")
    output = [json.loads(line) for line in call(*predict, "--max-new-tokens", 6, status=0).out.splitlines()]
    prompts = ("<image>color?", RED), ("<image>color?", BLUE), ("name it <image>", RED), ("color?",)
    expected = [reference_text(vision_folder / "model", chat_prompt(text), *images) for text, *images in prompts]
    assert [row["completion"] for row in output if row["error"] is None] == expected
    assert "cannot be decoded" in output[1]["error"] and "not a file" in output[2]["error"]


def test_report_shows_images_of_held_out_rows(call: Call, vision_folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png((20 * number, 10, 10), (200, 100)))
    rows = [{"image": f"{number}.png", "prompt": "color?", "completion": "red"} for number in range(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    train = ("--train.max_steps", 1, "--train.samples", 2, "--train.drift", "false", "--data.eval", 2)
    data = ("--model", vision_folder / "model", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "run")
    call("train", *data, *train, "--precision", "fp32", status=0)
    urls = re.findall('<img src="data:image/jpeg;base64,(.+?)"', (tmp_path / "run" / "report.html").read_text())
    assert [Image.open(io.BytesIO(base64.b64decode(url))).size for url in urls] == [(96, 48)] * 2
    assert urls[0] != urls[1]


def test_init_finds_the_column_of_images_and_counts_their_tokens(call: Call, vision_folder: Path) -> None:
    rows = [{"Photo": f"{name}.png", "prompt": "color?", "completion": name} for name in ("red", "blue") * 2]
    file = write_rows(vision_folder / "photos.jsonl", rows)
    settings = vision_folder / "photos.yaml"
    command = ("init", settings, "--data", file, "--model", vision_folder / "model", "--yes", "--force")
    out = call(*command, status=0).out
    assert "columns: {image: Photo}" in settings.read_text()
    checked = json.loads(call("data", "check", settings, "--json").out)
    assert f"the longest of {checked['lengths']['longest']} tokens" in out
    settings.write_text(settings.read_text().replace("columns: {image: Photo}", "columns: {}"))
    unread = json.loads(call("data", "check", settings, "--json").out)
    assert unread["lengths"]["longest"] < checked["lengths"]["longest"]
    (finding,) = (finding for finding in unread["findings"] if finding["name"] == "unused_columns")
    assert finding["level"] == "warning" and "{image: Photo}" in finding["hint"]
