"""A base model that is divided among processes trains as a whole one does, and takes less of their memory.

The tests start processes of their own, which takes seconds; :mod:`tests.training.test_parallel` says how.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaw.errors import UserError
from deltaw.hub.stored_weights import StoredWeights, fill, unfilled
from deltaw.kernels import loader
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.runs.fit import fit
from deltaw.settings import RunConfig
from deltaw.training.parallel.joining import as_sharded
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.session import read_data
from tests.conftest import laid_over, write_rows
from tests.training.parallel_runs import (
    assert_same_run,
    needs_gloo,
    train,
    train_all,
    train_until_one_dies,
    trains_as_one,
)
from tests.training.runs import adapter, losses, metrics, stopped_run

pytestmark = needs_gloo


@pytest.fixture
def sharded(of):
    return lambda output, **changes: of(output, **laid_over({"train": {"sharding": "base"}}, changes))


def shares(held):
    """Of each step in each process that holds about half of the base: whether its blocks run fused."""
    noted = [json.loads(line) for line in held.read_text().splitlines()]
    return [fused for own, whole, fused in noted if own <= 0.51 * whole]


def test_two_processes_with_half_of_the_base_each_train_as_one(of, sharded, tmp_path):
    """Microbatches of few tokens, so that one process has more of them than the other."""
    few, held = {"train": {"tokens_per_pass": 60}}, tmp_path / "held"
    trains_as_one(of(tmp_path / "one", **few), sharded(tmp_path / "two", **few), HELD=str(held))
    assert shares(held) == [True] * (2 * 6)  # six steps; others are of the dry run


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_processes_and_blocks_that_run_twice(of, sharded, tmp_path, checkpointing):
    twice = {"train": {"checkpointing": checkpointing}}
    trains_as_one(of(tmp_path / "one", **twice), sharded(tmp_path / "four", **twice), 4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_weights_are_divided_as_they_are_stored(of, sharded, tmp_path, precision):
    """Each process rounds less exactly than fp32; losses agree as far as that."""

    def agree(two, one):
        assert losses(two) == pytest.approx(losses(one), rel=2e-2)
        assert adapter(two).keys() == adapter(one).keys()

    one, two = (made(tmp_path / name, precision=precision) for made, name in ((of, "one"), (sharded, "two")))
    held = tmp_path / "held"
    said = trains_as_one(one, two, same=agree, HELD=str(held))
    if precision == "bf16" and loader.library() is not None:  # compared with fp32 a gathered block at a time
        assert "\napproximate: gradients of frozen layers in int8" in said, said
    assert len(shares(held)) == 2 * 6


@pytest.mark.slow
def test_a_killed_process_and_another_number_without_sharding(of, sharded, tmp_path):
    fit(of(tmp_path / "whole"))
    made = sharded(tmp_path / "run", train={"checkpoint_every": 1000})
    train_until_one_dies(made, 3)
    assert "resumes from step 3" in train_all(made, 3)[0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    # One process, and the whole model in it, takes the same run further.
    assert fit(made | {"output": str(tmp_path / "run")}, fresh=True).resumed_from_step is None


@pytest.mark.slow
def test_answers_and_drift_gather_while_the_others_wait(sharded, tmp_path):
    """Process 0 writes answers by itself: each gathering is ordered."""
    train_all(sharded(tmp_path / "run", train={"eval_answers": 2, "samples": 2}))
    assert any("written_exact_match" in line.get("eval", {}) for line in metrics(tmp_path / "run"))


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_in_words(sharded, tmp_path):
    """Of other rows, and of another model: by process 0, before it writes; the others end with it."""
    made = sharded(tmp_path / "run")
    stopped_run(made, 2)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    rows = write_rows(tmp_path / "other.jsonl", ({"prompt": f"p{n}", "completion": "c"} for n in range(11)))
    other = shutil.copytree(made["model"], tmp_path / "model")
    tensors = {name: tensor * 2 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    changes = {"rows": {"data": {**made["data"], "train": str(rows)}}, "model": {"model": str(other)}}
    for said, change in {**changes, "lora.rank": {"lora": {"rank": 2}}}.items():
        zero, one = train(made | change)
        assert zero[0] == 2 and said in zero[2] and "Traceback" not in zero[2], (zero, one)
        assert one[0] == 2 and "Traceback" not in one[2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_what_needs_whole_weights_is_refused_by_name(settings, tmp_path):
    for named, changes in {
        "method full": {"method": "full"},
        "lora.dora": {"lora": {"dora": True}},
        "lora.init": {"lora": {"init": "pissa"}},
        "train.keep_general": {"train": {"keep_general": 1.0}},
        "task sequence-classification": {"task": "sequence-classification"},
    }.items():
        with pytest.raises(UserError) as refused:
            as_sharded(RunConfig.read(settings(tmp_path / "run", **changes)), lambda line: None)
        assert named in f"{refused.value.what} {refused.value.where}"


@pytest.mark.slow
def test_a_refusal_ends_all_processes_before_anything_loads(sharded, tmp_path):
    zero, one = train(sharded(tmp_path / "run", lora={"dora": True}))
    assert zero[0] == 2 and "lora.dora" in zero[2] and "Traceback" not in zero[2]
    assert one == (2, "", "") and not (tmp_path / "run").exists()


def test_rows_read_from_the_files_are_those_of_the_model(model_folder):
    in_memory = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    whole = dict(in_memory.named_parameters())
    model = unfilled(model_folder, dtype="fp32", task="causal-lm", attention="sdpa", trust_remote_code=False)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    weights = StoredWeights(model_folder, model)
    name = max(whole, key=lambda n: whole[n].numel())
    assert torch.equal(weights.read({name: (1, 3)})[name], whole[name][1:3])
    assert base_fingerprint(model) == base_fingerprint(in_memory)
    fill(model, weights.read(dict.fromkeys(dict(model.named_parameters()))))
    assert all(torch.equal(p, whole[own]) for own, p in model.named_parameters())


def test_a_plan_knows_the_share_of_a_process(sharded, tmp_path):
    config = RunConfig.read(sharded(tmp_path / "run"))
    task, data = read_data(config)
    whole, each = (plan_run(config, task, data, processes=count) for count in (1, 8))
    blocks, largest = whole.block_bytes
    assert largest < blocks <= whole.parts["weights"]
    saved = max(0, blocks - blocks // 8 - largest)
    assert saved and whole.parts["weights"] - each.parts["weights"] == saved
    assert sum(each.resident.values()) == each.peak_resident_bytes
    assert sum(each.parts.values()) == each.peak_bytes
    assert each.tokens < whole.tokens  # of eight rows a step, a process has about one


@pytest.mark.slow
def test_the_peak_of_a_process_falls_as_base_over_processes_and_one_block(tmp_path, monkeypatch):
    """Each process has as many rows as the one alone, so that all else stays as it is.

    Half a block is less than what a second gathered block would add, and much less than what a whole base
    would; what else differs between runs is the allocator's, a few MB.
    """
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from sharded import made, started

    blocks, largest, _ = made(tmp_path, 768, 12, "fp32")
    (alone,) = started(tmp_path, "fp32", 1)
    for processes in (2, 4):
        told = started(tmp_path, "fp32", processes)
        peak, vector = max(one["peak"] for one in told), 4 * told[0]["trained"] / 1e6
        expected = alone["peak"] - blocks + blocks / processes + largest + vector
        assert peak == pytest.approx(expected, abs=largest / 2)
        assert told[0]["planned"] == pytest.approx(peak, rel=0.05)
