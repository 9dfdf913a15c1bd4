"""Tiny models are loaded from folders, and incomplete models are rejected."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

from deltaw.hub.loading import LoadedModel, default_attention, load, use_attention
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.hub.transformers_private import attention_name
from tests.byte_models import tiny_gpt2, tiny_llama
from tests.data.conftest import refusal
from tests.tiny_models import causal_model


def load_quietly(reference: Path | str, **settings: object) -> LoadedModel:
    options = {"precision": "fp32", "threads": torch.get_num_threads(), "log": lambda line: None}
    return load(str(reference), **options | settings)  # type: ignore[arg-type]


@pytest.fixture
def model_copy(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


def change_config(folder: Path, **settings: object) -> Path:
    """Change values in the configuration of the model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_loaded_model_is_frozen_unchanged_and_in_eval_mode(llama_folder, monkeypatch, capfd) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loaded = load_quietly(llama_folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before and capfd.readouterr() == ("", "")
    assert set(loaded.choices) == {"device", "precision", "threads", "attention", "kernels"}
    assert loaded.choices["precision"].value == "fp32" and all(choice.why for choice in loaded.choices.values())
    assert loaded.tokenizer is not None and len(loaded.tokenizer) == 259  # no token is added for padding
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    for (name, actual), (_, expected) in zip(
        loaded.model.named_parameters(), tiny_llama().named_parameters(), strict=True
    ):
        assert torch.equal(actual, expected), name
    assert loaded.name == "tiny-llama"
    assert loaded.new_modules == []
    assert not getattr(loaded.model, "use_kernels", False)  # code from the hub


def test_precision_and_threads_are_applied(llama_folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        loaded = load_quietly(llama_folder, precision="bf16", threads=1)
        assert loaded.choices["threads"].value == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_tokenizer_and_model_can_be_loaded_separately(llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(llama_folder))
    assert tokenizer("a")["input_ids"]
    tokenizer.save_pretrained(tmp_path / "run")
    assert load_tokenizer(str(tmp_path / "run")).chat_template == tokenizer.chat_template
    tiny_gpt2().save_pretrained(tmp_path / "none")
    assert load_quietly(tmp_path / "none").tokenizer is None
    assert "no tokenizer" in refusal(load_tokenizer, str(tmp_path / "none")).message


def test_truncated_weights_are_rejected(model_copy: Path) -> None:
    file = sorted(model_copy.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    error = refusal(load_quietly, model_copy)
    assert "damaged" in error.message and file.name in str(error)


def test_missing_or_mismatched_tensors_are_rejected(model_copy: Path) -> None:
    refusal(load_quietly, change_config(model_copy, intermediate_size=64))
    error = refusal(load_quietly, change_config(model_copy, intermediate_size=48, num_hidden_layers=3))
    assert re.search(r"missing .*layers\.2", error.message)


@pytest.mark.parametrize("text", ["{", '{"model_type": "never-heard-of"}'])
def test_invalid_config_is_rejected(model_copy: Path, text: str) -> None:
    (model_copy / "config.json").write_text(text)
    assert "config.json" in str(refusal(load_quietly, model_copy))


def test_non_causal_architecture_is_rejected_with_supported_tasks(tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    error = refusal(load_quietly, tmp_path)
    assert "t5 model does not generate text" in error.message and "features" in str(error.hint)


def test_encoder_gets_a_new_head_and_logs_it(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path)
    log_lines: list[str] = []
    loaded = load_quietly(tmp_path, task="sequence-classification", num_labels=3, log=log_lines.append)
    assert loaded.new_modules == ["classifier"] and any("classifier" in line for line in log_lines)
    assert loaded.model.config.num_labels == 3
    assert load_quietly(tmp_path, task="regression").model.config.problem_type == "regression"
    assert load_quietly(tmp_path, task="features").new_modules == []
    assert "missing" in refusal(load_quietly, tmp_path).message


def test_remote_code_requires_permission(model_copy: Path) -> None:
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}
    (model_copy / "code.py").write_text("raise SystemExit('was run')")
    error = refusal(load_quietly, change_config(model_copy, model_type="mine", auto_map=code))
    assert "does not run without permission" in error.message and "trust_remote_code" in str(error.hint)


def test_unreachable_hub_raises_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    error = refusal(load_quietly, "someone/some-model")
    assert "cannot be reached" in error.message and "local folder" in str(error.hint)


def test_use_attention_restores_the_implementation() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    with pytest.raises(KeyError), use_attention(model, "eager"):
        assert model.config._attn_implementation == "eager"
        raise KeyError
    assert model.config._attn_implementation == before


def test_score_capping_is_always_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model("gemma2")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "_supports_sdpa", True)  # as in transformers 5.20
    loaded = load_quietly(tmp_path)
    assert loaded.choices["attention"].value == attention_name(loaded.model.config) == "eager"
    assert default_attention(loaded.model) == "eager"


def test_unknown_task_and_reference_are_rejected(llama_folder: Path) -> None:
    for reference in ("no/such/folder", ""):
        refusal(load_quietly, reference)
    assert "unknown task" in refusal(load_quietly, llama_folder, task="causal_lm").message
