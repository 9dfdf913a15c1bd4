"""Complete runs of models with recurrent layers: settings, precisions, resuming, several processes and merging."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.export.merge import merge_run
from deltaw.machine.choices import Choice
from deltaw.training import batchers
from tests.byte_models import save_model
from tests.conftest import deep_merge
from tests.runtime.recurrent_families import recurrent_model
from tests.training.parallel_runs import assert_same_as_one_process, distance, needs_gloo, train_until_killed
from tests.training.parallel_runs import assert_same_run as assert_same_up_to_rounding
from tests.training.runs import RecordingCallback, Snapshots, assert_same_run, losses, open_on_cpu, slow_except

FAMILIES = ("lfm2", "qwen3_5_text", "granitemoehybrid")
BYTES = {"vocab_size": 259, "hidden_size": 64, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
CHANGES = {"granitemoehybrid": {"mamba_n_heads": 8}}
KINDS = {
    "lora": {},
    "checkpointing": {"train": {"checkpointing": True, "tokens_per_pass": 64}},
    "dora": {"lora": {"dora": True}},
    "rslora": {"lora": {"rslora": True}},
    "tokens": {"lora": {"trainable_token_indices": [5, 9, 100]}},
    "embeddings": {"lora": {"train_modules": ["embed_tokens"]}},
    "activated": {"lora": {"active": "completion", "invocation_tokens": [85, 67, 91]}},  # "say"
    "upper layers": {"lora": {"layers": "2-"}},
    "prompt": {"method": "prompt", "prompt": {"length": 4}},
    "full": {"method": "full", "train": {"learning_rate": 1e-4}},
    "int8": {"precision": "int8"},
    "nf4": {"precision": "nf4"},
    "bf16": {"precision": "bf16"},
}
# Relative differences of a step's loss. Rows in other microbatches are rounded differently.
TOLERANCES = {"int8": 2e-2, "nf4": 2e-2, "bf16": 2e-2}
QUICK = {("lfm2", "lora")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a model of each family and a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("recurrent")
    models = {name: recurrent_model(name, std=0.1, **BYTES, **CHANGES.get(name, {})) for name in FAMILIES}
    return {name: save_model(model, root / name) for name, model in models.items()}


@pytest.fixture
def make(make_config, folders):
    """Return a factory of run settings for a family."""
    return lambda family, output, **changes: make_config(output, **deep_merge({"model": str(folders[family])}, changes))


@pytest.mark.parametrize(("family", "kind"), slow_except(*QUICK, names=[(f, k) for f in FAMILIES for k in KINDS]))
def test_packed_run_equals_padded_run(make, tmp_path, monkeypatch, family, kind):
    deltaw.fit(make(family, tmp_path / "packed", **KINDS[kind]))
    monkeypatch.setattr(batchers, "can_pack", lambda *_: Choice(False, "for this test"))
    deltaw.fit(make(family, tmp_path / "padded", **KINDS[kind]))
    tolerance = TOLERANCES.get(kind, 1e-5)
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=tolerance)
    difference, norm = distance(tmp_path / "packed", tmp_path / "padded")
    # Adam's first updates depend only on the signs of gradients, also of those that are almost zero.
    assert difference <= (0.15 if kind in TOLERANCES else 1e-3) * norm


def test_activated_adapter_runs_whole_rows_with_a_reason(make, tmp_path):
    recorder = RecordingCallback()
    deltaw.fit(make("lfm2", tmp_path / "run", **KINDS["activated"]), callback=recorder)
    (line,) = [line for line in recorder.lines if "whole rows" in line]
    assert "a recurrent layer needs all tokens of a row" in line


@pytest.mark.parametrize("family", slow_except("qwen3_5_text", names=FAMILIES))
def test_killed_run_resumes_bit_identically(make, tmp_path, family):
    changes = {"lora": {"dropout": 0.2}, "train": {"checkpointing": True}}
    snapshots = Snapshots(tmp_path / "run", tmp_path, ["step 3"])
    deltaw.fit(make(family, tmp_path / "run", **changes), callback=snapshots)
    (copied,) = snapshots.copies.values()
    assert deltaw.fit(make(family, copied, **changes)).resumed_from_step
    assert_same_run(copied, tmp_path / "run")


@needs_gloo
@pytest.mark.parametrize("family", slow_except("granitemoehybrid", names=FAMILIES))
@pytest.mark.slow
def test_two_processes_equal_one(make, tmp_path, family):
    assert_same_as_one_process(make(family, tmp_path / "one"), make(family, tmp_path / "two"))


@needs_gloo
@pytest.mark.slow
def test_process_that_is_killed_is_resumed(make, tmp_path):
    deltaw.fit(make("lfm2", tmp_path / "whole"))
    config = make("lfm2", tmp_path / "run")
    train_until_killed(config, 3)
    assert deltaw.fit(config).resumed_from_step == 3
    assert_same_up_to_rounding(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("family", slow_except("lfm2", names=FAMILIES))
@pytest.mark.slow
def test_continued_adapter_merges_to_a_model_with_its_logits(make, folders, tmp_path, family):
    deltaw.fit(make(family, tmp_path / "first"))
    deltaw.fit(make(family, tmp_path / "run", start_from=str(tmp_path / "first")))
    assert losses(tmp_path / "run")[0] < losses(tmp_path / "first")[0]
    merge_run(tmp_path / "run", tmp_path / "merged")
    base, merged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (folders[family], tmp_path / "merged")
    )
    tokens = torch.randint(3, 259, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = open_on_cpu(tmp_path / "run").model(input_ids=tokens).logits
        assert (base(tokens).logits - expected).norm() > 0.01 * expected.norm()
        for model in (merged, PeftModel.from_pretrained(base, tmp_path / "run")):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
