"""Images on the command line: generate, chat and predict with a vision-language model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, LlavaProcessor

from tests.cli.conftest import Call, assert_refused
from tests.vision_models import save_vision_model

GENERATE = ("generate", "--max-new-tokens", 6, "--precision", "fp32")


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model, with two images next to it."""
    folder = tmp_path_factory.mktemp("vision")
    for name, color in (("red", (220, 10, 10)), ("blue", (10, 10, 220))):
        pixels = np.random.default_rng(0).integers(0, 30, (28, 28, 3)) + np.array(color)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}.png")
    return save_vision_model("llava", folder / "model").parent


def reference_text(folder: Path, prompt: str, *images: str) -> str:
    """Return the greedy answer of the complete model."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    settings = json.loads((folder / "model" / "processor_config.json").read_text())
    settings.pop("processor_class")
    vision = AutoImageProcessor.from_pretrained(folder / "model", backend="pil")
    processor = LlavaProcessor(vision, tokenizer, chat_template=tokenizer.chat_template, **settings)
    pixels = [Image.open(folder / f"{name}.png") for name in images]
    inputs = processor(text=[prompt], images=pixels, return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def chat_prompt(content: str) -> str:
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_generated_text_equals_that_of_the_complete_model(call: Call, vision_folder: Path) -> None:
    red, blue = ("--image", vision_folder / "red.png"), ("--image", vision_folder / "blue.png")
    run = vision_folder / "model"
    result = call(*GENERATE, run, *red, "-p", "color?", "-p", "name it", "--json", status=0)
    completions = [row["completion"] for row in json.loads(result.out)["completions"]]
    expected = [reference_text(vision_folder, chat_prompt(f"<image>{text}"), "red") for text in ("color?", "name it")]
    assert completions == expected
    result = call(*GENERATE, run, *blue, *red, "-p", "is <image> like <image>?", "--json", status=0)
    expected = [reference_text(vision_folder, chat_prompt("is <image> like <image>?"), "blue", "red")]
    assert [row["completion"] for row in json.loads(result.out)["completions"]] == expected
    assert expected != [reference_text(vision_folder, chat_prompt("is <image> like <image>?"), "red", "blue")]


def test_unusable_images_of_prompts_are_refused(call: Call, vision_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes((vision_folder / "red.png").read_bytes()[:200])
    run = vision_folder / "model"
    assert_refused(call(*GENERATE, run, "--image", tmp_path / "bad.png", "color?"), "cannot be decoded")
    assert_refused(call(*GENERATE, run, "--image", tmp_path / "no.png", "color?"), "not a file")
    image = ("--image", vision_folder / "red.png")
    assert_refused(call(*GENERATE, run, *image, "is <image> like <image>?"), "<image>")
    assert_refused(call(*GENERATE, run, "is this <image>?"), "<image>")


def test_text_models_refuse_images(call: Call, finished_run: Path, vision_folder: Path) -> None:
    result = call(*GENERATE, finished_run, "--image", vision_folder / "red.png", "color?")
    assert_refused(result, "text only")


def test_content_parts_and_separate_images_are_encoded_alike(vision_folder: Path) -> None:
    from deltaw.training.open_run import open_run

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
    first = reference_text(vision_folder, chat_prompt("<image>color?"), "red")
    conversation = chat_prompt("<image>color?") + f"{first}<|im_end|>\n" + chat_prompt("and now?")
    second = reference_text(vision_folder, conversation, "red")
    assert result.out.endswith(f"model: {first}\nmodel: {second}\n")
