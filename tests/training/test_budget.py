"""Which settings fit into a budget: against plans of a known form, and against real ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from deltaw.errors import UserError
from deltaw.memory.plan import KINDS, Fitting, Plan
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Say, silent
from deltaw.training.planning.asked import parse_bytes
from deltaw.training.planning.budget import TOKENS, fitting_settings
from deltaw.training.session import read_data

RANKS = (16, 8, 4)


def made_up(config: RunConfig, *_: object) -> Plan:
    """A plan whose memory grows with passes and rank; checkpointing gives a third of it for more work."""
    tokens, again = int(config.train.tokens_per_pass), config.train.checkpointing
    rank = config.lora.rank if config.method == "lora" else {"bias": 2, "full": 200}[config.method]
    size = 1000 + 100 * rank + tokens * (3 if again else 9)
    parts = {**dict.fromkeys(KINDS, 0), "workspace": size}
    return Plan(
        method=config.method,
        total_parameters=10_000,
        trained_parameters=rank,
        peak_bytes=size,
        peak_resident_bytes=size,
        parts=parts,
        resident={"tensors": size},
        phase="backward",
        module="",
        precision="fp32",
        operations=10**9 * (4 if again else 3),
        operators=200_000 // tokens,
    )


class Planner:
    """Stands for ``plan_run``; remembers what it was asked to plan."""

    def __init__(self) -> None:
        self.asked: list[RunConfig] = []

    def __call__(self, config: RunConfig, *rest: object, processes: int = 1) -> Plan:
        self.asked.append(config)
        if config.method == "prompt":
            raise UserError("images have no prompt")
        return made_up(config, *rest)


@pytest.fixture
def planner(monkeypatch) -> Planner:
    made = Planner()
    monkeypatch.setattr("deltaw.training.planning.budget.plan_run", made)
    return made


@pytest.fixture
def find(settings, tmp_path) -> Callable[..., list[Fitting]]:
    config = RunConfig.read(settings(tmp_path / "run", lora={"rank": RANKS[0]}))

    def make(budget: int, *methods: str, say: Say = silent) -> list[Fitting]:
        return fitting_settings(config, None, None, budget, methods, say=say)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6 * 10**9),
        ("512MB", 512 * 10**6),
        ("8GiB", 8 * 2**30),
        ("1.5 gb", 1_500_000_000),
        (" 64 KiB ", 65_536),
        (".5TB", 5 * 10**11),
        ("1000", 1000),
        ("7B", 7),
    ],
)
def test_sizes_are_read_with_decimal_and_binary_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "much", "GB", "6 gigabytes", "-1GB", "0", "0.0MB", "1e9", "6,5GB", "nan", "6GB8", "1.2.3GB"]
)
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(UserError, match="not a valid size") as refused:
        parse_bytes(text)
    assert refused.value.where == "--budget" and "6GB" in refused.value.hint


def wanted(budget: int, ranks: tuple[int, ...]) -> set[tuple[int, int, bool]]:
    """By trying everything: of the largest rank that fits at all, the longest passes without and with
    checkpointing; with it only where the longest of all do not fit without."""

    def size(rank: int, tokens: int, again: bool) -> int:
        return 1000 + 100 * rank + tokens * (3 if again else 9)

    for rank in ranks:
        found = set()
        for again in (False, True):
            fitting = [t for t in TOKENS if size(rank, t, again) <= budget]
            if fitting and (rank, TOKENS[0], False) not in found:
                found.add((rank, max(fitting), again))
        if found:
            return found
    return set()


@pytest.mark.parametrize("budget", range(2_000, 12_500, 500))
def test_nothing_that_fits_is_overlooked(budget, planner, find):
    expected = wanted(budget, RANKS)
    if not expected:
        with pytest.raises(UserError):
            find(budget, "lora")
        return
    found = find(budget, "lora")
    assert {(f.rank, f.tokens_per_pass, f.checkpointing) for f in found} == expected
    assert all(f.plan.peak_resident_bytes <= budget for f in found)


def test_settings_come_by_their_estimated_time_with_what_they_need(planner, find):
    found = find(9_000, "lora", "bias")
    assert len(found) == 4 and {f.method for f in found} == {"lora", "bias"}
    seconds = [f.seconds for f in found]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert not found[0].checkpointing
    assert {f.rank for f in found if f.method == "bias"} == {None}
    told = found[0].as_dict()
    assert told["peak_resident_bytes"] == found[0].plan.peak_resident_bytes <= 9_000
    assert told["estimated_seconds_per_step"] == seconds[0]


def test_a_large_budget_takes_one_plan_a_method(planner, find):
    found = find(10**9, "lora", "bias", "full")
    assert [f.tokens_per_pass for f in found] == [TOKENS[0]] * 3
    assert len(planner.asked) == 3


def test_where_nothing_fits_the_least_is_said_after_few_plans(planner, find):
    with pytest.raises(UserError) as refused:
        find(100, "lora", "bias")
    least = 1000 + 100 * 2 + TOKENS[-1] * 3
    assert f"{least:,} bytes" in refused.value.what and "100 bytes" in refused.value.what
    assert "--methods" in refused.value.hint
    tried = {(c.method, c.lora.rank, c.train.checkpointing) for c in planner.asked}
    assert tried == {*itertools.product(["lora"], RANKS, [False, True]), ("bias", 16, False), ("bias", 16, True)}
    assert len(planner.asked) == 2 * len(tried)


def test_a_method_that_does_not_fit_the_task_is_named_and_left_out(planner, find):
    said = []
    assert [f.method for f in find(10**9, "prompt", "bias", say=said.append)] == ["bias"]
    assert "prompt: images have no prompt" in said
    with pytest.raises(UserError, match="nothing can be planned"):
        find(10**9, "prompt")


def test_real_plans_fit_the_budget_that_is_asked_for(settings, tmp_path):
    torch.set_num_threads(1)
    config = RunConfig.read(settings(tmp_path / "run", train={"batch_size": 8}))
    task, data = read_data(config)
    found = fitting_settings(config, task, data, 100 * 10**9, ["lora", "head"])
    assert {f.method for f in found} == {"lora", "head"} and not any(f.checkpointing for f in found)
    assert [f.seconds for f in found] == sorted(f.seconds for f in found)
    assert found[0].method == "head"  # it has next to no backward
    assert not list(tmp_path.iterdir())
