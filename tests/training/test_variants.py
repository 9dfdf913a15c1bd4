"""Every adapter type and data format in a complete run: the opened run reproduces the trained one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deltaw.lora.layers import LoRAConv1D
from deltaw.runs.fit import fit
from tests.conftest import write_rows
from tests.training.runs import RecordingCallback, load_eval_rows, open_on_cpu


def loss_when_opened(folder):
    """Return the evaluation loss of a run opened from disk like in ``deltaw eval``, and the opened run."""
    run = open_on_cpu(folder)
    return run.score(load_eval_rows(run)).metrics["loss"], run


EXPRESSION = {"target_modules": r"model\.layers\.\d\.mlp\..*_proj", "exclude_modules": ["up_proj"]}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
ADAPTERS = {
    "pissa": {"init": "pissa"},
    "olora, dropout": {"init": "olora", "dropout": 0.3},
    "eva": {"init": "eva"},
    "orthogonal, attention of the upper block": {"init": "orthogonal", "target_modules": "attention", "layers": "1-"},
    "gaussian, ranks of their own": {"init": "gaussian", **PATTERNS},
    "dora, an expression": {"dora": True, **EXPRESSION},
    "rslora, embedding": {"rslora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "whole head and norm": {"train_modules": ["lm_head", "norm"]},
    "whole embedding": {"train_modules": ["embed_tokens"]},
    "PEFT's names": {"r": 4, "lora_alpha": 4, "use_rslora": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_opened_adapter_matches_trained_one(settings, tmp_path, kind):
    config = settings(tmp_path / "run", train={"max_steps": 3, "loraplus_lr_ratio": 4.0})
    config["lora"] = {"rank": 4, "alpha": 8} | ADAPTERS[kind] if "r" not in ADAPTERS[kind] else ADAPTERS[kind]
    result = fit(config)
    loss, run = loss_when_opened(result.output)
    assert loss == pytest.approx(result.evaluation.metrics["loss"], abs=1e-4)
    tokens = torch.arange(16)[None] + 3
    with torch.no_grad():
        ours = run.model(tokens).logits
        with run.base():
            base = run.model(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
        torch.testing.assert_close(base, plain(tokens).logits)
        theirs = PeftModel.from_pretrained(plain, str(result.output)).eval()(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, base, rtol=1e-3, atol=1e-3)


def test_opened_model_with_tied_head_matches_trained_one(settings, tmp_path, gpt2_folder):
    result = fit(settings(tmp_path / "run", model=str(gpt2_folder), train={"share_prefixes": True}))
    assert loss_when_opened(result.output)[0] == pytest.approx(result.evaluation.metrics["loss"], abs=1e-4)


def test_gpt2_trains_in_int8_and_opens_in_fp32(settings, tmp_path, gpt2_folder):
    losses = {}
    for precision in ("bf16", "int8"):
        lines = RecordingCallback()
        changes = {"train": {"epochs": 2}, "model": str(gpt2_folder), "precision": precision}
        result = fit(settings(tmp_path / precision, **changes), callback=lines)
        losses[precision], run = loss_when_opened(result.output)
        assert ("of 8 layers are int8-quantized" in lines) is (precision == "int8")
        layer = run.model.base_model.h[0].attn.c_attn
        assert type(layer) is LoRAConv1D and layer.weight.dtype == torch.float32
        assert float(layer.lora_B.detach().norm()) > 0
    assert losses["int8"] != losses["bf16"] and losses["int8"] == pytest.approx(losses["bf16"], rel=0.05)


ROLES = ("system", "user", "assistant", "user", "assistant")
CHAT = [{"messages": [{"role": r, "content": f"{r[0]}{n}{k}"} for k, r in enumerate(ROLES)]} for n in range(8)]
QUESTIONS = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(8)]
TEXTS = [{"text": "x" * 10 * (n // 2) + str(n // 2)} for n in range(2, 18)]
RENAMED = {"columns": {"prompt": "question", "completion": "answer"}, "template": "plain"}
COSINE = {"schedule": "cosine", "warmup": 3, "weight_decay": 0.1, "checkpointing": True, "tokens_per_pass": 30}
CONSTANT = {"schedule": "constant", "warmup": 0, "betas": [0.8, 0.9], "max_grad_norm": None, "max_steps": 2}
# Rows, data settings and training settings.
DATA = {
    "last answers": (CHAT, {"labels": "last"}, COSINE),
    "columns of other names, without a template": (QUESTIONS, RENAMED, CONSTANT),
    "cut": (TEXTS, {"long_rows": "cut", "max_length": 30, "duplicates": "keep"}, {"batch_size": 100, "epochs": 0.5}),
}


@pytest.mark.parametrize("kind", DATA)
def test_opened_run_reproduces_evaluation_for_any_data(settings, tmp_path, kind):
    rows, data_settings, train = DATA[kind]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = fit(settings(tmp_path / "run", data={"train": str(path), **data_settings}, train=train))
    assert loss_when_opened(result.output)[0] == pytest.approx(result.evaluation.metrics["loss"], abs=1e-4)
