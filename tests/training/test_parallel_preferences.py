"""Pairs, single answers and rewards over several processes: the losses, metrics and factors of one, and runs
that go on with another number of processes after one was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deltaw.data.example import RowGroup
from deltaw.data.row_store import digest_of_rows
from deltaw.runs.fit import fit
from deltaw.runtime.packed import packed_rows
from deltaw.task_settings import PreferenceSettings
from deltaw.training.parallel.group import Group, Told, deal
from deltaw.training.tasks.causal import PreferenceTask, UnpairedMicroBatcher
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.conftest import write_rows
from tests.training.loops import example
from tests.training.parallel_runs import assert_same_run, needs_gloo, train_all, train_until_one_dies, trains_as_one
from tests.training.runs import metrics
from tests.training.test_preference import moved

pytestmark = needs_gloo
MORE = {"dpo": {"label_smoothing": 0.1}, "ipo": {}, "orpo": {}, "simpo": {}, "kto": {"undesirable_weight": 0.7}}
KINDS = {loss: {"task": "preference", "preference": {"loss": loss, **more}} for loss, more in MORE.items()}
KINDS["reward"] = {"task": "sequence-classification"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Fifteen pairs and as many answers of 10 to 90 tokens, by kind: eleven to train on, four held out."""
    folder = tmp_path_factory.mktemp("answers")
    pairs, answers, rewards = [], [], []
    for n in range(15):
        texts = {"chosen": "word " * (1 + 5 * n % 9), "rejected": "no " * (1 + 3 * n % 4) + str(n)}
        prompt = {"prompt": f"say {'very ' * (7 * n % 11)}{n}"}
        pairs.append(prompt | texts)
        answers.append(prompt | {"completion": texts["chosen" if n % 3 else "rejected"], "label": bool(n % 3)})
        rewards.append(pairs[-1] | {"margin": 0.25 * (n % 3)})

    def written(name, rows):
        return (write_rows(folder / f"{name}.jsonl", rows[:11]), write_rows(folder / f"{name}-eval.jsonl", rows[11:]))

    of_pairs = written("pairs", pairs)
    return dict.fromkeys(KINDS, of_pairs) | {"kto": written("answers", answers), "reward": written("rewards", rewards)}


@pytest.fixture
def made(settings, files):
    def of(kind: str, output: Path, **of_train) -> dict:
        rows, held_out = files[kind]
        found = settings(output, data={"train": str(rows), "eval": str(held_out)}, **KINDS[kind])
        found["train"] |= {"batch_size": 5, "epochs": 2, "eval_every": 2, "checkpoint_every": 1} | of_train
        return found

    return of


def assert_same_training(one: Path, other: Path) -> None:
    """Also what each step counts beside its loss, once rewards are more than rounding."""
    assert_same_run(one, other)
    told = [(a, b) for a, b in zip(metrics(one), metrics(other), strict=True) if a.get("step", 0) > 1]
    keys = ("chosen_reward", "rejected_reward", "margin", "kl", "accuracy")
    seen = [(key, a[key], b[key]) for a, b in told for key in keys if key in b]
    assert len(seen) >= 5 * 4
    for key, ours, theirs in seen:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), key


def compared(made, kind: str, folder: Path, size: int, **of_train) -> None:
    one, several = (made(kind, folder / name, **of_train) for name in ("one", "several"))
    trains_as_one(one, several, size, same=assert_same_training)
    if kind == "kto":  # else its distance, bounded by 0, would say nothing
        assert max(line.get("kl", 0.0) for line in metrics(folder / "one")) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_on_answers_as_one(made, tmp_path, kind):
    compared(made, kind, tmp_path, 2, tokens_per_pass=128)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto", "reward"])
def test_four_processes_train_as_one_though_a_step_has_fewer_rows(made, tmp_path, kind):
    compared(made, kind, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "killed", "size"), [("dpo", 1, 4), ("kto", 0, 1), ("reward", 1, 1)])
def test_a_run_whose_process_was_killed_goes_on_with_another_number(made, tmp_path, kind, killed, size):
    fit(made(kind, tmp_path / "whole"))
    run = made(kind, tmp_path / "run")
    train_until_one_dies(run, 3, killed)
    if size > 1:
        train_all(run, size)
    else:
        assert fit(run).resumed_from_step in (2, 3)
    assert [line["step"] for line in metrics(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]
    assert_same_training(tmp_path / "run", tmp_path / "whole")


class Apart(Group):
    """A process that computes its part and meets no others."""

    def __init__(self, rank: int, size: int):
        super().__init__(Told(rank, size, 0, size, "", 0, False, "0", 1.0), None, None)
        self.sent = None

    def add(self, numbers, *, patient=False):
        self.sent = numbers.clone()
        return numbers


def groups_of(count: int, seed: int = 0) -> list[RowGroup]:
    """Pairs of uneven rows that share a prompt; as answers, the first is judged and the second mismatched."""
    draw = np.random.default_rng(seed)
    found = []
    for n in range(count):
        prompt = draw.integers(1, 90, draw.integers(5, 40))
        texts = [[*prompt, *draw.integers(1, 90, draw.integers(1, 20))] for _ in range(2)]
        judged, other = (example(n, tokens, len(prompt)) for tokens in texts)
        found.append(RowGroup((replace(judged, desired=bool(n % 2)), other)))
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_each_reference_is_computed_by_one_process_with_the_bits_of_one_alone(loss, size):
    model, groups = tiny_llama(initializer_range=0.3), groups_of(9)
    task = PreferenceTask(byte_tokenizer(), settings=PreferenceSettings(loss=loss))
    batcher = (UnpairedMicroBatcher if loss == "kto" else CausalMicroBatcher)(70, True, False, "cpu")
    processes = [Apart(rank, size) for rank in range(size)]
    for process in processes:
        task.referenced(model, groups, batcher, process)
    parts = [process.sent for process in processes]
    alone = task.referenced(model, groups, batcher)
    assert all((part != 0).any() for part in parts)
    assert (sum((part != 0).int() for part in parts) == 1).all()
    assert sum(parts).tolist() == [row.reference for group in alone for row in group.rows]


@pytest.mark.parametrize("size", [2, 4])
def test_ktos_distance_is_that_of_the_whole_step(size):
    policy, groups = tiny_llama(initializer_range=0.3), groups_of(5)
    base = moved(policy)
    task = PreferenceTask(byte_tokenizer(), settings=PreferenceSettings(loss="kto"))
    batcher = UnpairedMicroBatcher(70, True, False, "cpu")
    answers, objective = task.referenced(base, groups, batcher), task.objective(policy)
    sums = []
    with packed_rows(policy):
        for rank in range(size):
            process = Apart(rank, size)
            objective.begin(answers, batcher, process)
            sums.append(process.sent)
        objective.begin(answers, batcher)
    alone = float(objective.unpaired.divergence)
    objective.unpaired.estimate(sum(sums))
    assert sum(sums)[1] == 5 and sum(int(part[1] > 0) for part in sums) == size
    assert float(objective.unpaired.divergence) == pytest.approx(alone, rel=1e-5)
    parts = [float(part[0] / part[1]) for part in sums]
    assert max(parts) - min(parts) > 0.1 * abs(alone) > 1e-3  # no part of the step would do


@pytest.mark.each_value
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pairs", [True, False])
def test_rows_and_whole_pairs_are_dealt_once_by_what_they_cost(parts, share, pairs):
    groups = groups_of(30) if pairs else [group.rows[0] for group in groups_of(30)]
    dealt = deal(groups, parts, share=share)
    assert sorted(place for part in dealt for place in part) == list(range(30)) and len(dealt) == parts
    batcher = CausalMicroBatcher(10**6, share, False, "cpu", fill=False)
    loads = [sum(length for _, length in batcher.shapes([groups[n] for n in part])) for part in dealt]
    assert max(loads) - min(loads) <= max(length for g in groups for _, length in batcher.shapes([g]))


def test_a_prompt_that_both_answers_share_counts_once():
    draw = np.random.default_rng(0)

    def pair(prompt: int, answer: int) -> RowGroup:
        given = draw.integers(1, 90, prompt)
        return RowGroup(tuple(example(1, [*given, *draw.integers(1, 90, answer)], prompt) for _ in range(2)))

    # Computed, 110 tokens of 210, and 100, 60, 50: balanced only where the prompt counts once.
    groups = [pair(100, 5), pair(0, 50), pair(0, 30), pair(0, 25)]
    assert sorted(deal(groups, 2, share=True)) == [[0, 3], [1, 2]]
    assert sorted(deal(groups, 2, share=False)) == [[0], [1, 2, 3]]


def test_of_single_answers_the_judged_row_alone_is_dealt_for_its_gradients():
    groups = groups_of(40)
    batcher = UnpairedMicroBatcher(10**6, True, False, "cpu", fill=False)
    own = [Apart(rank, 4).deal(groups, batcher) for rank in range(4)]
    assert sorted(id(group) for part in own for group in part) == sorted(map(id, groups))
    loads = [sum(len(group.rows[0]) for group in part) for part in own]
    assert max(loads) - min(loads) <= max(len(group.rows[0]) for group in groups)


def test_answers_that_are_judged_otherwise_are_other_rows():
    """So that a resumed run, or another process, with another label is refused."""
    ours = groups_of(4)
    theirs = [RowGroup((replace(first, desired=not first.desired), other)) for first, other in (g.rows for g in ours)]
    assert digest_of_rows(ours) == digest_of_rows(groups_of(4)) != digest_of_rows(theirs)
