"""Preference and reward-model runs with several processes match one process and resume with another process count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deltaw.data.example import RowGroup
from deltaw.data.row_store import digest_of_rows
from deltaw.runs.fit import fit
from deltaw.runtime.packed import packed_rows
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.tasks.preference.task import PreferenceTask, UnpairedMicroBatcher
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.launch_environment import LaunchEnvironment
from deltaw.training.parallel.row_distribution import distribute_rows
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.conftest import write_rows
from tests.training.loops import example
from tests.training.parallel_runs import (
    assert_same_as_one_process,
    assert_same_run,
    needs_gloo,
    train_all,
    train_until_killed,
)
from tests.training.runs import metrics
from tests.training.test_preference import perturbed_copy

pytestmark = needs_gloo
LOSS_OPTIONS = {"dpo": {"label_smoothing": 0.1}, "ipo": {}, "orpo": {}, "simpo": {}, "kto": {"undesirable_weight": 0.7}}
KINDS = {loss: {"task": "preference", "preference": {"loss": loss, **LOSS_OPTIONS[loss]}} for loss in LOSS_OPTIONS}
KINDS["reward"] = {"task": "sequence-classification"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return (train, eval) files of 11 and 4 rows by kind, with answers of 10 to 90 tokens."""
    folder = tmp_path_factory.mktemp("answers")
    pairs = []
    answers = []
    rewards = []
    for n in range(15):
        texts = {"chosen": "word " * (1 + 5 * n % 9), "rejected": "no " * (1 + 3 * n % 4) + str(n)}
        prompt = {"prompt": f"say {'very ' * (7 * n % 11)}{n}"}
        pairs.append(prompt | texts)
        answers.append(prompt | {"completion": texts["chosen" if n % 3 else "rejected"], "label": bool(n % 3)})
        rewards.append(pairs[-1] | {"margin": 0.25 * (n % 3)})

    def write_files(name, rows):
        return (write_rows(folder / f"{name}.jsonl", rows[:11]), write_rows(folder / f"{name}-eval.jsonl", rows[11:]))

    pair_files = write_files("pairs", pairs)
    files = {"kto": write_files("answers", answers), "reward": write_files("rewards", rewards)}
    return dict.fromkeys(KINDS, pair_files) | files


@pytest.fixture
def make_config(settings, files):
    def make(kind: str, output: Path, **train) -> dict:
        rows, eval_rows = files[kind]
        config = settings(output, data={"train": str(rows), "eval": str(eval_rows)}, **KINDS[kind])
        config["train"] |= {"batch_size": 5, "epochs": 2, "eval_every": 2, "checkpoint_every": 1} | train
        return config

    return make


def assert_same_training(run: Path, reference: Path) -> None:
    """Also compare the metrics of steps after the first, in which rewards exceed rounding errors."""
    assert_same_run(run, reference)
    step_pairs = [(a, b) for a, b in zip(metrics(run), metrics(reference), strict=True) if a.get("step", 0) > 1]
    keys = ("chosen_reward", "rejected_reward", "margin", "kl", "accuracy")
    compared = [(key, a[key], b[key]) for a, b in step_pairs for key in keys if key in b]
    assert len(compared) >= 5 * 4
    for key, ours, theirs in compared:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), key


def assert_processes_match(make_config, kind: str, folder: Path, size: int, **train_options) -> None:
    single, several = (make_config(kind, folder / name, **train_options) for name in ("one", "several"))
    assert_same_as_one_process(single, several, size, compare=assert_same_training)
    if kind == "kto":  # a divergence clamped to 0 would make the comparison meaningless
        assert max(line.get("kl", 0.0) for line in metrics(folder / "one")) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [*((kind, 2) for kind in KINDS), ("dpo", 4), ("kto", 4), ("reward", 4)])
def test_several_processes_match_one(make_config, tmp_path, kind, size):
    assert_processes_match(make_config, kind, tmp_path, size, **({"tokens_per_pass": 128} if size == 2 else {}))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "killed", "size"), [("dpo", 1, 4), ("kto", 0, 1), ("reward", 1, 1)])
def test_run_with_killed_process_resumes_with_another_process_count(make_config, tmp_path, kind, killed, size):
    fit(make_config(kind, tmp_path / "whole"))
    run = make_config(kind, tmp_path / "run")
    train_until_killed(run, 3, killed)
    if size > 1:
        train_all(run, size)
    else:
        assert fit(run).resumed_from_step in (2, 3)
    assert [line["step"] for line in metrics(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]
    assert_same_training(tmp_path / "run", tmp_path / "whole")


class IsolatedGroup(Group):
    """Process that computes its share without communication and records the tensor it would send."""

    def __init__(self, rank: int, size: int):
        super().__init__(LaunchEnvironment(rank, size, 0, size, "", 0, False, "0", 1.0), None, None)
        self.sent = None

    def add(self, numbers, *, long_wait=False):
        self.sent = numbers.clone()
        return numbers


def make_groups(count: int, seed: int = 0) -> list[RowGroup]:
    """Return pairs of rows that share a prompt. For KTO, the second row of a pair is the mismatched one."""
    random = np.random.default_rng(seed)
    groups = []
    for n in range(count):
        prompt = random.integers(1, 90, random.integers(5, 40))
        texts = [[*prompt, *random.integers(1, 90, random.integers(1, 20))] for _ in range(2)]
        first, mismatched = (example(n, tokens, len(prompt)) for tokens in texts)
        groups.append(RowGroup((replace(first, desired=bool(n % 2)), mismatched)))
    return groups


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_each_reference_is_computed_once_and_bit_identical(loss, size):
    model = tiny_llama(initializer_range=0.3)
    groups = make_groups(9)
    task = PreferenceTask(byte_tokenizer(), settings=PreferenceSettings(loss=loss))
    batcher = (UnpairedMicroBatcher if loss == "kto" else CausalMicroBatcher)(70, True, False, "cpu")
    processes = [IsolatedGroup(rank, size) for rank in range(size)]
    for process in processes:
        task.add_reference_log_probs(model, groups, batcher, process)
    parts = [process.sent for process in processes]
    expected = task.add_reference_log_probs(model, groups, batcher)
    assert all((part != 0).any() for part in parts) and (sum((part != 0).int() for part in parts) == 1).all()
    assert sum(parts).tolist() == [row.reference for group in expected for row in group.rows]


@pytest.mark.parametrize("size", [2, 4])
def test_kto_divergence_covers_entire_step(size):
    policy = tiny_llama(initializer_range=0.3)
    groups = make_groups(5)
    base = perturbed_copy(policy)
    task = PreferenceTask(byte_tokenizer(), settings=PreferenceSettings(loss="kto"))
    batcher = UnpairedMicroBatcher(70, True, False, "cpu")
    answers = task.add_reference_log_probs(base, groups, batcher)
    objective = task.objective(policy)
    sums = []
    with packed_rows(policy):
        for rank in range(size):
            process = IsolatedGroup(rank, size)
            objective.start_step(answers, batcher, process)
            sums.append(process.sent)
        objective.start_step(answers, batcher)
    expected = float(objective.unpaired.divergence)
    objective.unpaired.estimate(sum(sums))
    assert sum(sums)[1] == 5 and sum(int(part[1] > 0) for part in sums) == size
    assert float(objective.unpaired.divergence) == pytest.approx(expected, rel=1e-5)
    parts = [float(part[0] / part[1]) for part in sums]
    assert max(parts) - min(parts) > 0.1 * abs(expected) > 1e-3  # a single process differs from the step


@pytest.mark.each_value
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_rows_and_pairs_are_distributed_once_by_cost(parts, share, pairs):
    groups = make_groups(30) if pairs else [group.rows[0] for group in make_groups(30)]
    assignment = distribute_rows(groups, parts, share=share)
    assert sorted(index for part in assignment for index in part) == list(range(30)) and len(assignment) == parts
    batcher = CausalMicroBatcher(10**6, share, False, "cpu", fill=False)
    loads = [sum(length for _, length in batcher.shapes([groups[n] for n in part])) for part in assignment]
    assert max(loads) - min(loads) <= max(length for g in groups for _, length in batcher.shapes([g]))


def test_prompt_shared_by_pair_counts_once():
    random = np.random.default_rng(0)

    def pair(prompt: int, answer: int) -> RowGroup:
        prompt_tokens = random.integers(1, 90, prompt)
        return RowGroup(tuple(example(1, [*prompt_tokens, *random.integers(1, 90, answer)], prompt) for _ in range(2)))

    # The pairs cost 110, 100, 60 and 50 tokens. Without prefix sharing, the first costs 210.
    groups = [pair(100, 5), pair(0, 50), pair(0, 30), pair(0, 25)]
    assert sorted(distribute_rows(groups, 2, share=True)) == [[0, 3], [1, 2]]
    assert sorted(distribute_rows(groups, 2, share=False)) == [[0], [1, 2, 3]]


def test_kto_groups_are_distributed_by_judged_row():
    groups = make_groups(40)
    batcher = UnpairedMicroBatcher(10**6, True, False, "cpu", fill=False)
    local_groups = [IsolatedGroup(rank, 4).local_rows(groups, batcher) for rank in range(4)]
    assert sorted(id(group) for part in local_groups for group in part) == sorted(map(id, groups))
    loads = [sum(len(group.rows[0]) for group in part) for part in local_groups]
    assert max(loads) - min(loads) <= max(len(group.rows[0]) for group in groups)


def test_changed_label_changes_row_digest():
    """Resuming a run, or joining it from another process, with changed labels is rejected."""
    ours = make_groups(4)
    theirs = [RowGroup((replace(g.rows[0], desired=not g.rows[0].desired), g.rows[1])) for g in ours]
    assert digest_of_rows(ours) == digest_of_rows(make_groups(4)) != digest_of_rows(theirs)
