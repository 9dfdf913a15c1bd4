"""Which settings fit into a budget: against plans of a known form, and against real ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

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


def size_of(rank: int, tokens: int, again: bool) -> int:
    return 1000 + 100 * rank + tokens * (3 if again else 9)


def made_up(config: RunConfig, *_: object, processes: int = 1) -> Plan:
    """A plan whose memory grows with passes and rank; checkpointing gives a third of it for more work."""
    if config.method == "prompt":
        raise UserError("images have no prompt")
    tokens, again = int(config.train.tokens_per_pass), config.train.checkpointing
    rank = config.lora.rank if config.method == "lora" else {"bias": 2, "full": 200}[config.method]
    size = size_of(rank, tokens, again)
    known = {"method": config.method, "total_parameters": 10_000, "trained_parameters": rank, "precision": "fp32"}
    memory = {"peak_bytes": size, "peak_resident_bytes": size, "resident": {"tensors": size}}
    work = {"operations": 10**9 * (4 if again else 3), "operators": 200_000 // tokens}
    parts = {**dict.fromkeys(KINDS, 0), "workspace": size}
    return Plan(**known, **memory, **work, parts=parts, phase="backward", module="")


@pytest.fixture
def planner(monkeypatch) -> mock.Mock:
    """Stands for ``plan_run``."""
    made = mock.Mock(side_effect=made_up)
    monkeypatch.setattr("deltaw.training.planning.budget.plan_run", made)
    return made


@pytest.fixture
def find(settings, tmp_path) -> Callable[..., list[Fitting]]:
    config = RunConfig.read(settings(tmp_path / "run", lora={"rank": RANKS[0]}))

    def make(budget: int, *methods: str, say: Say = silent) -> list[Fitting]:
        return fitting_settings(config, None, None, budget, methods, say=say)  # type: ignore[arg-type]

    return make


def test_sizes_are_read_with_decimal_and_binary_units_and_others_refused_with_examples():
    sizes = {"6GB": 6 * 10**9, "512MB": 512 * 10**6, "8GiB": 8 * 2**30, "1.5 gb": 1_500_000_000}
    sizes |= {" 64 KiB ": 65_536, ".5TB": 5 * 10**11, "1000": 1000, "7B": 7}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "much", "GB", "6 gigabytes", "-1GB", "0", "0.0MB", "1e9", "6,5GB", "nan", "6GB8", "1.2.3GB"):
        with pytest.raises(UserError, match="not a valid size") as refused:
            parse_bytes(text)
        assert refused.value.where == "--budget" and "6GB" in refused.value.hint


def wanted(budget: int) -> set[tuple[int, int, bool]]:
    """By trying everything: of the largest rank that fits at all, the longest passes without and with
    checkpointing; with it only where the longest of all do not fit without."""
    for rank in RANKS:
        fitting = {again: [t for t in TOKENS if size_of(rank, t, again) <= budget] for again in (False, True)}
        if TOKENS[0] in fitting[False]:
            return {(rank, TOKENS[0], False)}
        found = {(rank, max(tokens), again) for again, tokens in fitting.items() if tokens}
        if found:
            return found
    return set()


def test_nothing_that_fits_is_overlooked(planner, find):
    for budget in range(2_000, 12_500, 500):
        expected = wanted(budget)
        if not expected:
            with pytest.raises(UserError):
                find(budget, "lora")
            continue
        found = find(budget, "lora")
        assert {(f.rank, f.tokens_per_pass, f.checkpointing) for f in found} == expected
        assert all(f.plan.peak_resident_bytes <= budget for f in found)


def test_settings_come_by_their_estimated_time_with_what_they_need(planner, find):
    found = find(9_000, "lora", "bias")
    seconds = [f.seconds for f in found]
    assert seconds == sorted(seconds) and seconds[0] > 0 and not found[0].checkpointing
    assert sorted((f.method, f.rank or 0) for f in found) == [("bias", 0)] * 2 + [("lora", 16)] * 2
    told = found[0].as_dict()
    assert told["peak_resident_bytes"] == found[0].plan.peak_resident_bytes <= 9_000
    assert told["estimated_seconds_per_step"] == seconds[0]


def test_a_large_budget_takes_one_plan_a_method(planner, find):
    assert [f.tokens_per_pass for f in find(10**9, "lora", "bias", "full")] == [TOKENS[0]] * 3
    assert planner.call_count == 3


def test_where_nothing_fits_the_least_is_said_after_few_plans(planner, find):
    with pytest.raises(UserError) as refused:
        find(100, "lora", "bias")
    least = size_of(2, TOKENS[-1], True)
    assert f"{least:,} bytes" in refused.value.what and "100 bytes" in refused.value.what
    assert "--methods" in refused.value.hint
    asked = [call.args[0] for call in planner.call_args_list]
    tried = {(c.method, c.lora.rank, c.train.checkpointing) for c in asked}
    assert tried == {*itertools.product(["lora"], RANKS, [False, True]), ("bias", 16, False), ("bias", 16, True)}
    assert len(asked) == 2 * len(tried)


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
