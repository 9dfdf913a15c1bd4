"""Loading tiny models from folders, and refusing those that are not whole."""

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

from deltaw.hub.loading import LoadedModel, attention_of, load, ordinary_attention
from deltaw.hub.tokenizers import load_tokenizer
from deltaw.hub.transformers_private import attention_name
from tests.byte_models import tiny_gpt2, tiny_llama
from tests.data.conftest import refusal
from tests.tiny_models import causal_model


def quietly(reference: Path | str, **settings: object) -> LoadedModel:
    given = {"precision": "fp32", "threads": torch.get_num_threads(), "say": lambda line: None}
    return load(str(reference), **given | settings)  # type: ignore[arg-type]


@pytest.fixture
def copied(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "copy"))


def changed(folder: Path, **settings: object) -> Path:
    """The model, with other values in its configuration."""
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | settings))
    return folder


def test_loaded_model_is_frozen_in_eval_mode_and_the_same(llama_folder, monkeypatch, capfd) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    loaded = quietly(llama_folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before and capfd.readouterr() == ("", "")
    assert set(loaded.choices) == {"device", "precision", "threads", "attention", "kernels"}
    assert loaded.choices["precision"].value == "fp32" and all(choice.why for choice in loaded.choices.values())
    assert loaded.tokenizer is not None and len(loaded.tokenizer) == 259  # no token is added for padding
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    for (name, one), (_, other) in zip(loaded.model.named_parameters(), tiny_llama().named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert loaded.name == "tiny-llama"
    assert loaded.new_modules == []


def test_precision_is_the_type_of_the_weights_and_threads_are_set(llama_folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        loaded = quietly(llama_folder, precision="bf16", threads=1)
        assert loaded.choices["threads"].value == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_a_tokenizer_alone_and_a_model_without_one(llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(llama_folder))
    assert tokenizer("a")["input_ids"]
    tokenizer.save_pretrained(tmp_path / "run")
    assert load_tokenizer(str(tmp_path / "run")).chat_template == tokenizer.chat_template
    tiny_gpt2().save_pretrained(tmp_path / "none")
    assert quietly(tmp_path / "none").tokenizer is None
    assert "no tokenizer" in refusal(load_tokenizer, str(tmp_path / "none")).what


def test_truncated_weights_are_refused(copied: Path) -> None:
    file = sorted(copied.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    refused = refusal(quietly, copied)
    assert "damaged" in refused.what and file.name in str(refused)


def test_weights_of_another_shape_or_missing_tensors_are_refused_and_not_made_up(copied: Path) -> None:
    refusal(quietly, changed(copied, intermediate_size=64))
    refused = refusal(quietly, changed(copied, intermediate_size=48, num_hidden_layers=3))
    assert re.search(r"missing .*layers\.2", refused.what)


@pytest.mark.parametrize("text", ["{", '{"model_type": "never-heard-of"}'])
def test_config_that_cannot_be_used_is_refused(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    assert "config.json" in str(refusal(quietly, copied))


def test_architecture_without_causal_model_is_refused_with_what_it_fits(tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    refused = refusal(quietly, tmp_path)
    assert "t5 model does not generate text" in refused.what and "features" in str(refused.hint)


def test_encoder_gets_a_new_head_for_classification_and_says_so(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path)
    said: list[str] = []
    loaded = quietly(tmp_path, task="sequence-classification", num_labels=3, say=said.append)
    assert loaded.new_modules == ["classifier"] and any("classifier" in line for line in said)
    assert loaded.model.config.num_labels == 3
    assert quietly(tmp_path, task="regression").model.config.problem_type == "regression"
    assert quietly(tmp_path, task="features").new_modules == []
    assert "missing" in refusal(quietly, tmp_path).what


def test_code_that_came_with_a_model_is_not_run_unasked(copied: Path) -> None:
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}
    (copied / "code.py").write_text("raise SystemExit('was run')")
    refused = refusal(quietly, changed(copied, model_type="mine", auto_map=code))
    assert "not run unasked" in refused.what and "trust_remote_code" in str(refused.hint)


def test_hub_that_cannot_be_reached_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused = refusal(quietly, "someone/some-model")
    assert "cannot be reached" in refused.what and "local folder" in str(refused.hint)


def test_attention_is_switched_and_restored() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    with pytest.raises(KeyError), attention_of(model, "eager"):
        assert model.config._attn_implementation == "eager"
        raise KeyError
    assert model.config._attn_implementation == before


def test_a_cap_of_scores_is_never_left_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model("gemma2")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "_supports_sdpa", True)  # as transformers 5.20 has it
    loaded = quietly(tmp_path)
    assert loaded.choices["attention"].value == attention_name(loaded.model.config) == "eager"
    assert ordinary_attention(loaded.model) == "eager"


def test_unknown_task_and_reference_are_refused(llama_folder: Path) -> None:
    for reference in ("no/such/folder", ""):
        refusal(quietly, reference)
    assert "no task" in refusal(quietly, llama_folder, task="causal_lm").what
