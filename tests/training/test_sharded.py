"""A sharded base model trains like an unsharded one and takes less memory per process.

The tests start processes (see :mod:`tests.training.parallel_runs`), which takes seconds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaw.hub.stored_weights import StoredWeights, assign_values, meta_model
from deltaw.kernels import loader
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.runs.fit import fit
from deltaw.settings.config import RunConfig
from deltaw.training.parallel.joining import apply_sharding
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.session import read_data
from tests.conftest import deep_merge, refusal, write_rows
from tests.training.parallel_runs import (
    assert_same_as_one_process,
    assert_same_run,
    needs_gloo,
    train,
    train_all,
    train_until_killed,
)
from tests.training.runs import adapter, losses, metrics, stopped_run

pytestmark = needs_gloo


@pytest.fixture
def sharded(make_config):
    return lambda output, **changes: make_config(output, **deep_merge({"train": {"sharding": "base"}}, changes))


def shares(shares_file):
    """Return for each step of a process that stores about half of the base model whether its blocks ran fused."""
    records = [json.loads(line) for line in shares_file.read_text().splitlines()]
    return [fused for share, total, fused in records if share <= 0.51 * total]


def test_two_processes_with_half_of_base_match_one(make_config, sharded, tmp_path):
    """Small microbatches give one process more of them than the other."""
    small_passes = {"train": {"tokens_per_pass": 60}}
    shares_file = tmp_path / "held"
    single = make_config(tmp_path / "one", **small_passes)
    several = sharded(tmp_path / "two", **small_passes)
    assert_same_as_one_process(single, several, HELD=str(shares_file))
    assert shares(shares_file) == [True] * (2 * 6)  # six steps, without those of the dry run


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_processes_match_one_with_checkpointing(make_config, sharded, tmp_path, checkpointing):
    changes = {"train": {"checkpointing": checkpointing}}
    assert_same_as_one_process(make_config(tmp_path / "one", **changes), sharded(tmp_path / "four", **changes), 4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_low_precision_weights_are_sharded(make_config, sharded, tmp_path, precision):
    """Each process rounds less exactly than fp32, so losses agree only within a tolerance."""

    def agree(sharded_run, single):
        assert losses(sharded_run) == pytest.approx(losses(single), rel=2e-2)
        assert adapter(sharded_run).keys() == adapter(single).keys()

    makers = {"one": make_config, "two": sharded}
    single, sharded_run = (make(tmp_path / name, precision=precision) for name, make in makers.items())
    shares_file = tmp_path / "held"
    output = assert_same_as_one_process(single, sharded_run, compare=agree, HELD=str(shares_file))
    if precision == "bf16" and loader.library() is not None:  # compared with fp32, one gathered block at a time
        assert "approximate: gradients of frozen layers in int8" in output, output
    assert len(shares(shares_file)) == 2 * 6


@pytest.mark.slow
def test_run_with_killed_process_resumes_with_other_process_count(make_config, sharded, tmp_path):
    fit(make_config(tmp_path / "whole"))
    config = sharded(tmp_path / "run", train={"checkpoint_every": 1000})
    train_until_killed(config, 3)
    assert "resumes from step 3" in train_all(config, 3)[0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    # A single process with the full model can start the run over.
    assert fit(config | {"output": str(tmp_path / "run")}, fresh=True).resumed_from_step is None


@pytest.mark.slow
def test_generation_gathers_while_other_processes_wait(sharded, tmp_path):
    """Only process 0 generates, so the order of gather operations must match in all processes."""
    train_all(sharded(tmp_path / "run", train={"eval_answers": 2, "samples": 2}))
    assert any("generated_exact_match" in line.get("eval", {}) for line in metrics(tmp_path / "run"))


@pytest.mark.slow
def test_checkpoint_of_another_run_is_rejected(sharded, tmp_path):
    """Process 0 rejects other rows and another model before it writes. The other processes exit with it."""
    config = sharded(tmp_path / "run")
    stopped_run(config, 2)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    rows = write_rows(tmp_path / "other.jsonl", ({"prompt": f"p{n}", "completion": "c"} for n in range(11)))
    other_model = shutil.copytree(config["model"], tmp_path / "model")
    tensors = {name: tensor * 2 for name, tensor in load_file(other_model / "model.safetensors").items()}
    save_file(tensors, other_model / "model.safetensors", {"format": "pt"})
    changes = {"rows": {"data": {**config["data"], "train": str(rows)}}, "model": {"model": str(other_model)}}
    for message, change in {**changes, "lora.rank": {"lora": {"rank": 2}}}.items():
        first, second = train(config | change)
        assert first[0] == 2 and message in first[2] and "Traceback" not in first[2], (first, second)
        assert second[0] == 2 and "Traceback" not in second[2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_settings_that_need_full_weights_are_rejected(settings, tmp_path):
    for setting, changes in {
        "method full": {"method": "full"},
        "lora.dora": {"lora": {"dora": True}},
        "lora.init": {"lora": {"init": "pissa"}},
        "train.keep_general": {"train": {"keep_general": 1.0}},
    }.items():
        error = refusal(apply_sharding, RunConfig.read(settings(tmp_path / "run", **changes)), lambda line: None)
        assert setting in f"{error.message} {error.location}"


@pytest.mark.slow
def test_rejected_settings_stop_all_processes_before_loading(sharded, tmp_path):
    first, second = train(sharded(tmp_path / "run", lora={"dora": True}))
    assert first[0] == 2 and "lora.dora" in first[2] and "Traceback" not in first[2]
    assert second == (2, "", "") and not (tmp_path / "run").exists()


def test_weight_rows_read_from_files_match_model(model_folder):
    in_memory = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected = dict(in_memory.named_parameters())
    model = meta_model(model_folder, dtype="fp32", task="causal-lm", attention="sdpa", trust_remote_code=False)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    weights = StoredWeights(model_folder, model)
    name = max(expected, key=lambda n: expected[n].numel())
    assert torch.equal(weights.read({name: (1, 3)})[name], expected[name][1:3])
    assert base_fingerprint(model) == base_fingerprint(in_memory)
    assign_values(model, weights.read(dict.fromkeys(dict(model.named_parameters()))))
    assert all(torch.equal(p, expected[full_name]) for full_name, p in model.named_parameters())


def test_plan_counts_share_of_process(sharded, tmp_path):
    config = RunConfig.read(sharded(tmp_path / "run"))
    task, data = read_data(config)
    full, sharded_plan = (plan_run(config, task, data, processes=count) for count in (1, 8))
    blocks, largest = full.block_bytes
    assert largest < blocks <= full.parts["weights"]
    saved = max(0, blocks - blocks // 8 - largest)
    assert saved and full.parts["weights"] - sharded_plan.parts["weights"] == saved
    assert sum(sharded_plan.resident.values()) == sharded_plan.peak_resident_bytes
    assert sum(sharded_plan.parts.values()) == sharded_plan.peak_bytes
    assert sharded_plan.tokens < full.tokens  # a process gets about one of eight rows of a step


@pytest.mark.slow
def test_peak_memory_is_base_share_plus_one_block(tmp_path, monkeypatch):
    """All processes have the number of rows of the single process, so that the rest of their memory is equal.

    The tolerance of half a block is far below an entire base model and less than a second gathered block. The allocator
    varies by several MB.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from sharded import run_processes, write_model

    blocks, largest, _ = write_model(tmp_path, 768, 12, "fp32")
    (single,) = run_processes(tmp_path, "fp32", 1)
    for processes in (2, 4):
        results = run_processes(tmp_path, "fp32", processes)
        peak = max(result["peak"] for result in results)
        vector = 4 * results[0]["trained"] / 1e6
        expected = single["peak"] - blocks + blocks / processes + largest + vector
        assert peak == pytest.approx(expected, abs=largest / 2)
        assert results[0]["planned"] == pytest.approx(peak, rel=0.07)
