"""Complete runs of a tiny model: files in the run folder and effects of settings."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.runs.part_timer import PartTimer
from deltaw.runtime.packed import packed_rows
from deltaw.settings.config import RunConfig
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.preparation import checkpoint_blocks
from tests.byte_models import save_model
from tests.conftest import write_rows
from tests.training.loops import examples
from tests.training.runs import ADAPTER, fit_with_output, losses
from tests.training.test_losses import METHODS, adapted, assert_gradients, gradients


def test_fit_writes_all_files(settings, tmp_path):
    result, output = fit_with_output(settings(tmp_path / "run", train={"epochs": 2}))
    file_names = {"README.md", ADAPTER, "adapter_config.json", "chat_template.jinja", "checkpoints", "metrics.jsonl"}
    file_names |= {
        "prompts.json",
        "trained_rows.bin",
        "run.yaml",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in result.output.iterdir()} == file_names
    assert (result.outcome.steps, result.outcome.rows) == (6, 16)
    assert {"loss", "perplexity", "exact_match"} == result.evaluation.metrics.keys()
    assert result.evaluation.metrics["perplexity"] == pytest.approx(math.exp(result.evaluation.metrics["loss"]))
    values = result.as_dict()
    json.dumps(values, allow_nan=False)
    assert values["eval"] == result.evaluation.as_dict() and values["output"] == str(tmp_path / "run")
    assert "2 held-out rows are few: a score such as accuracy is known to ± 4" in output
    assert "6 steps are few to learn from; train.epochs: 10 and train.batch_size: 4 give 20" in output
    assert "| held-out exact_match | 0.0% (95 % interval 0.0% to 65.8%) |" in (result.output / "README.md").read_text()
    assert "6 steps of 3 rows" in output and "padding-free packing" in output
    assert "device: cpu (as requested)" in output and "read as prompt-completion" in output
    card = (result.output / "README.md").read_text()
    assert "base_model:" in card and "| optimizer steps | 6 |" in card and "interrupted" not in card
    assert "| rows | 8 used, 2 held out |" in card  # 16 were read in two epochs


def test_result_contains_time_by_part(settings, tmp_path, monkeypatch):
    now = itertools.count()
    with monkeypatch.context() as patched:  # every clock read advances by one second
        patched.setattr("deltaw.runs.part_timer.time", SimpleNamespace(monotonic=lambda: float(next(now))))
        clock = PartTimer()
        with clock.part("loading"), clock.part("planning"):
            clock.add("training", 0.25)
        assert clock.parts() == {"planning": 0.75, "training": 0.25, "loading": 2.0, "other": 2.0}
    result = fit(settings(tmp_path / "run", train={"samples": 1}))
    parts = result.as_dict()["seconds_by_part"]
    assert {"loading", "planning", "training", "evaluating", "other"} <= parts.keys()
    assert parts["training"] == pytest.approx(result.outcome.seconds, abs=1e-3)
    assert json.loads((result.output / "run.json").read_text())["result"]["seconds_by_part"] == parts


def test_attention_fallback_during_training_is_a_line_and_a_note(settings, tmp_path, monkeypatch):
    line = "attention of 4/2 heads: computed in tiles (a reason)"
    calls = itertools.count()
    monkeypatch.setattr("deltaw.runs.run_callback.gpu_attention.notes", lambda: [line] if next(calls) else [])
    result, output = fit_with_output(settings(tmp_path / "run"))
    assert output.count(line) == 1
    assert json.loads((result.output / "run.json").read_text())["notes"].count(line) == 1


def test_run_settings_round_trip(settings, finished_run):
    assert RunConfig.read(finished_run / "run.yaml") == RunConfig.read(settings(finished_run, train={"epochs": 4}))


def test_training_fits_rows(settings, tmp_path):
    changes = {"epochs": 25, "batch_size": 10, "schedule": "constant"}
    result = fit(settings(tmp_path / "run", data={"eval": None}, train=changes))
    loss_values = losses(result.output)
    assert loss_values[-1] < 0.2 * loss_values[0]
    assert result.evaluation.metrics == {} and result.as_dict()["eval"] is None


def test_equal_seed_gives_identical_adapter(settings, tmp_path):
    def weights(name, **train):
        return (fit(settings(tmp_path / name, train=train)).output / ADAPTER).read_bytes()

    assert weights("one", seed=5) == weights("two", seed=5) != weights("three", seed=6)


def test_model_without_packing_support_trains_on_padded_rows(settings, tmp_path):
    model = tmp_path / "bloom"
    torch.manual_seed(0)
    bloom = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0)
    save_model(BloomForCausalLM(bloom), model)
    result, output = fit_with_output(settings(tmp_path / "run", model=str(model), train={"epochs": 3}))
    assert "padded rows" in output and "common beginnings" not in output
    loss_values = losses(result.output)
    assert loss_values[-1] < loss_values[0]
    assert "share_prefixes: auto  # False: BloomForCausalLM" in (result.output / "run.yaml").read_text()


def test_dropout_disables_prefix_sharing_by_default(settings, tmp_path):
    result, output = fit_with_output(settings(tmp_path / "run", lora={"dropout": 0.1}))
    assert "common beginnings" not in output
    assert "share_prefixes: auto  # False: dropout would" in (result.output / "run.yaml").read_text()
    changes = {"lora": {"dropout": 0.1}, "train": {"share_prefixes": True}}
    shared, output = fit_with_output(settings(tmp_path / "shared", **changes))
    assert "shared prefixes computed once" in output
    assert shared.outcome.computed_tokens < result.outcome.computed_tokens == result.outcome.tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_equal_gradients(family):
    all_gradients = []
    for recompute in (False, True):
        model = adapted(family, METHODS["frozen head"]())
        objective = CausalObjective(model)
        if recompute:
            checkpoint_blocks(model)
        with packed_rows(model):
            (batch,) = CausalMicroBatcher(1000, True, False, "cpu").batches(examples())
            all_gradients.append(gradients(model, objective(batch)))
    assert_gradients(*all_gradients, 1e-5)


def test_rows_longer_than_model_are_rejected_before_writing(settings, tmp_path, gpt2_folder):
    rows = write_rows(tmp_path / "long.jsonl", [{"text": "a" * 200}, {"text": "b" * 20}])
    for share in (None, 1):
        with pytest.raises(UserError, match="128 positions") as exc_info:
            fit(settings(tmp_path / "run", model=str(gpt2_folder), data={"train": str(rows), "eval": share}))
        assert "data.max_length: 128" in (exc_info.value.hint or "")
    assert not (tmp_path / "run").exists()
