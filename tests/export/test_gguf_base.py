"""Exported GGUF files as base models: they are read exactly, or rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaw.hub.gguf import convert_in_process
from deltaw.hub.loading import load
from deltaw.lora import disabled
from tests.export import models

FAST = ("llama3-published", "yarn", "qwen3.5")
SLOW = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "lfm2", "qwen3-moe", "qwen3.5-moe")


@pytest.mark.parametrize("family", [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_exported_file_is_read_as_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    model, run = models.saved_run(tmp_path, family)
    loaded = load(str(models.base_gguf(run)), precision="fp32", log=lambda line: None)
    prompts = torch.tensor(models.random_prompts(models.VOCABULARY, count=2, length=40))
    with torch.no_grad(), disabled(model):
        expected = model(input_ids=prompts).logits
        actual = loaded.model(input_ids=prompts).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "dtype", "message"),
    [
        ("granite-hybrid", "fp32", "granitehybrid is not supported"),
        ("llama3", "fp32", "other divisors"),
        ("qwen3.5", "gguf", "cannot remain in the blocks"),
        pytest.param("gemma4", "fp32", "cannot be", marks=pytest.mark.slow),
        pytest.param("gpt2", "fp32", "other sizes", marks=pytest.mark.slow),
    ],
)
def test_other_files_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, dtype: str, message: str
) -> None:
    _, run = models.saved_run(tmp_path, family)
    base = models.base_gguf(run)
    capsys.readouterr()
    assert convert_in_process(str(base), dtype, str(tmp_path / "converted")) == 2
    assert message in json.loads(capsys.readouterr().out)["what"]
