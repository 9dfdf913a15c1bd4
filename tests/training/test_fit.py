"""Whole runs on a tiny model: the folder that they leave, and that settings do what they say."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import deltaw
from deltaw.data.example import Example
from deltaw.errors import UserError
from deltaw.lora import LoRAConfig
from deltaw.methods.lora import LoRA
from deltaw.reports.progress import TerminalCallback
from deltaw.runtime.packed import packed_rows
from deltaw.settings import RunConfig
from deltaw.training.fit import fit
from deltaw.training.preparation import checkpoint_blocks
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from tests.byte_models import saved
from tests.conftest import write_rows
from tests.tiny_models import causal_model
from tests.training.runs import ADAPTER, fit_aloud, metrics, opened


def test_a_run_leaves_a_folder_with_everything(settings, tmp_path):
    result, said = fit_aloud(settings(tmp_path / "run", train={"epochs": 2}))
    assert {path.name for path in result.output.iterdir()} == {
        "README.md",
        ADAPTER,
        "adapter_config.json",
        "chat_template.jinja",
        "checkpoints",
        "metrics.jsonl",
        "run.yaml",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (result.outcome.steps, result.outcome.rows) == (6, 16)
    assert {"loss", "perplexity", "exact_match"} == result.evaluation.metrics.keys()
    measured = result.evaluation.metrics
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    answer = result.as_dict()
    json.dumps(answer, allow_nan=False)
    assert answer["eval"] == result.evaluation.as_dict() and answer["output"] == str(tmp_path / "run")
    assert "6 steps of 3 rows" in said and "padding-free packing" in said
    assert "device: cpu (as asked)" in said and "10 rows read as prompt-completion" in said
    card = (result.output / "README.md").read_text()
    assert "base_model:" in card and "| optimizer steps | 6 |" in card and "interrupted" not in card


def test_the_run_reads_back_as_it_was_told(settings, finished_run):
    told_before = RunConfig.read(settings(finished_run, train={"epochs": 4}))
    assert RunConfig.read(finished_run / "run.yaml") == told_before


def test_deltaw_fit_takes_a_dictionary(settings, tmp_path):
    result = deltaw.fit(settings(tmp_path / "run", train={"max_steps": 1}))
    assert result.outcome.steps == 1 and (tmp_path / "run" / ADAPTER).exists()


def test_the_model_learns_its_rows(settings, tmp_path):
    changes = {"epochs": 25, "batch_size": 10, "schedule": "constant"}
    result = fit(settings(tmp_path / "run", data={"eval": None}, train=changes))
    losses = [line["loss"] for line in metrics(result.output)]
    assert losses[-1] < 0.2 * losses[0]
    assert result.evaluation.metrics == {} and result.as_dict()["eval"] is None


def test_the_same_seed_gives_the_same_adapter_to_the_byte(settings, tmp_path):
    def weights(name, **train):
        return (fit(settings(tmp_path / name, train=train)).output / ADAPTER).read_bytes()

    assert weights("one", seed=5) == weights("two", seed=5)
    assert weights("one", seed=5) != weights("three", seed=6)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_adapter_gives_the_same_logits_in_peft(finished_run, model_folder):
    tokens = torch.arange(20)[None] + 5
    run = opened(finished_run)
    with torch.no_grad():
        ours = run.model(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        before = base(tokens).logits.clone()
        theirs = PeftModel.from_pretrained(base, str(finished_run)).eval()(tokens).logits
        with run.base():
            torch.testing.assert_close(run.model(tokens).logits, before)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-2)


def test_evaluations_on_the_way_stand_among_the_steps(settings, tmp_path):
    result = fit(settings(tmp_path / "run", train={"eval_every": 1, "epochs": 1}))
    lines = metrics(result.output)
    assert [(line["step"], "eval" in line) for line in lines] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
        (3, False),
        (3, True),
    ]
    assert lines[-1]["eval"] == result.evaluation.as_dict()


def test_splits_into_passes_give_the_same_run(settings, tmp_path):
    losses = {}
    for budget, share in [("auto", "auto"), (40, True), (1, False)]:
        train = {"tokens_per_pass": budget, "share_prefixes": share}
        result = fit(settings(tmp_path / "run", train=train))
        losses[budget] = [line["loss"] for line in metrics(result.output) if "loss" in line]
    assert losses[40] == pytest.approx(losses["auto"], abs=1e-4)
    assert losses[1] == pytest.approx(losses["auto"], abs=1e-4)


def test_a_model_that_cannot_run_flat_rows_is_trained_on_padded_ones_and_the_run_says_so(settings, tmp_path):
    model = tmp_path / "bloom"
    torch.manual_seed(0)
    bloom = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0)
    saved(BloomForCausalLM(bloom), model)
    result, said = fit_aloud(settings(tmp_path / "run", model=str(model), train={"epochs": 3}))
    assert "padded rows" in said and "common beginnings" not in said
    losses = [line["loss"] for line in metrics(result.output) if "loss" in line]
    assert losses[-1] < losses[0]
    assert "share_prefixes: auto  # False: BloomForCausalLM" in (result.output / "run.yaml").read_text()


def test_dropout_turns_sharing_off_unless_it_is_asked_for(settings, tmp_path):
    result, said = fit_aloud(settings(tmp_path / "run", lora={"dropout": 0.1}))
    assert "common beginnings" not in said
    assert "share_prefixes: auto  # False: dropout would" in (result.output / "run.yaml").read_text()
    shared, said = fit_aloud(settings(tmp_path / "run", lora={"dropout": 0.1}, train={"share_prefixes": True}))
    assert "shared prefixes computed once" in said
    assert shared.outcome.computed_tokens < result.outcome.computed_tokens == result.outcome.tokens


def test_dropout_changes_the_training(settings, tmp_path):
    def second_loss(name, **lora):
        share = {"share_prefixes": False}
        return metrics(fit(settings(tmp_path / name, lora=lora, train=share)).output)[1]["loss"]

    assert second_loss("without") != second_loss("with", dropout=0.5)


def test_a_run_in_bf16_trains_factors_in_fp32(settings, tmp_path):
    result, said = fit_aloud(settings(tmp_path / "run", precision="bf16", train={"epochs": 3}))
    assert "precision: bf16" in said
    losses = [line["loss"] for line in metrics(result.output) if "loss" in line]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in load_file(result.output / ADAPTER).values()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputing_blocks_gives_the_same_gradients(family):
    tokens = np.arange(3, 23, dtype=np.int32)
    rows = [Example(n, np.append(tokens, n).astype(np.int32), np.arange(21) > 8, 9, None) for n in (30, 40)]
    found = []
    for recompute in (False, True):
        model = causal_model(family)
        method = LoRA(LoRAConfig(rank=4, init="orthogonal"))
        method.prepare(model, seed=0)
        with torch.no_grad():
            for name, parameter in method.parameters(model):
                torch.manual_seed(len(name))
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        objective = CausalObjective(model)
        if recompute:
            checkpoint_blocks(model)
        with packed_rows(model):
            for batch in CausalMicroBatcher(1000, True, False, "cpu").batches(rows):
                objective(batch).backward()
        found.append({name: parameter.grad for name, parameter in method.parameters(model)})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_a_run_that_recomputes_blocks_is_the_same_run(settings, tmp_path):
    plain, recomputed = (fit(settings(tmp_path / str(on), train={"checkpointing": on})) for on in (False, True))
    assert recomputed.outcome.loss == pytest.approx(plain.outcome.loss, abs=1e-5)
    assert recomputed.evaluation.metrics["loss"] == pytest.approx(plain.evaluation.metrics["loss"], abs=1e-5)


def test_a_run_that_diverges_is_refused_and_keeps_a_finite_adapter(settings, tmp_path):
    train = {"learning_rate": 1e6, "epochs": 30, "max_grad_norm": None, "schedule": "constant"}
    said = Console(file=io.StringIO(), width=500)
    with pytest.raises(UserError) as refused:
        fit(settings(tmp_path / "run", lora={"alpha": 1e20}, train=train), callback=TerminalCallback(said))
    assert "diverged" in refused.value.what and "learning_rate" in (refused.value.hint or "")
    assert f"is in {tmp_path / 'run'}" in said.file.getvalue()
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "run" / ADAPTER).values())


def test_weights_that_are_infinite_are_noticed_at_the_first_step(settings, model_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    model.save_pretrained(broken)
    with pytest.raises(UserError, match="diverged") as refused:
        fit(settings(tmp_path / "run", model=str(broken)))
    assert (refused.value.where or "").startswith("step 1 of")
    factors = load_file(tmp_path / "run" / ADAPTER)
    assert all(bool(t.isfinite().all()) for t in factors.values())
    assert not any(t.any() for name, t in factors.items() if "lora_B" in name)


def test_rows_beyond_the_models_positions_are_refused_before_anything_is_written(settings, tmp_path, gpt2_folder):
    rows = write_rows(tmp_path / "long.jsonl", [{"text": "a" * 200}, {"text": "b" * 20}])
    for share in (None, 1):
        with pytest.raises(UserError, match="128 positions") as refused:
            fit(settings(tmp_path / "run", model=str(gpt2_folder), data={"train": str(rows), "eval": share}))
        assert "data.max_length: 128" in (refused.value.hint or "")
    assert not (tmp_path / "run").exists()
