"""Search for settings that fit a memory budget, with synthetic and real plans."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from deltaw.errors import UserError
from deltaw.memory.plan import KINDS, FittingPlan, Plan, parse_bytes
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.config import RunConfig
from deltaw.training.planning.budget import TOKENS_PER_PASS, fitting_settings
from deltaw.training.session import read_data
from tests.conftest import refusal

RANKS = (16, 8, 4)


def size_of(rank: int, tokens: int, checkpointing: bool) -> int:
    return 1000 + 100 * rank + tokens * (3 if checkpointing else 9)


def synthetic_plan(config: RunConfig, *_: object, processes: int = 1) -> Plan:
    """Return a plan whose memory grows with pass length and rank. Checkpointing needs a third of the memory and more
    work.
    """
    if config.method == "prompt":
        raise UserError("images have no prompt")
    tokens = int(config.train.tokens_per_pass)
    checkpointing = config.train.checkpointing
    rank = config.lora.rank if config.method == "lora" else {"bias": 2, "full": 200}[config.method]
    size = size_of(rank, tokens, checkpointing)
    header = {"method": config.method, "total_parameters": 10_000, "trained_parameters": rank, "precision": "fp32"}
    memory = {"peak_bytes": size, "peak_resident_bytes": size, "resident": {"tensors": size}}
    work = {"operations": 10**9 * (4 if checkpointing else 3), "operators": 200_000 // tokens}
    parts = {**dict.fromkeys(KINDS, 0), "workspace": size}
    return Plan(**header, **memory, **work, parts=parts, phase="backward", module="")


@pytest.fixture
def planner(monkeypatch) -> mock.Mock:
    """Return a mock that replaces ``plan_run``."""
    plan_run = mock.Mock(side_effect=synthetic_plan)
    monkeypatch.setattr("deltaw.training.planning.budget.plan_run", plan_run)
    return plan_run


@pytest.fixture
def find(settings, tmp_path) -> Callable[..., list[FittingPlan]]:
    config = RunConfig.read(settings(tmp_path / "run", lora={"rank": RANKS[0]}))

    def make(budget: int, *methods: str, log: LogFunction = ignore_line) -> list[FittingPlan]:
        return fitting_settings(config, None, None, budget, methods, log=log)  # type: ignore[arg-type]

    return make


def test_sizes_accept_decimal_and_binary_units_only():
    sizes = {"6GB": 6 * 10**9, "512MB": 512 * 10**6, "8GiB": 8 * 2**30, "1.5 gb": 1_500_000_000}
    sizes |= {" 64 KiB ": 65_536, ".5TB": 5 * 10**11, "1000": 1000, "7B": 7}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "much", "GB", "6 gigabytes", "-1GB", "0", "0.0MB", "1e9", "6,5GB", "nan", "6GB8", "1.2.3GB"):
        error = refusal(parse_bytes, text, match="not a valid size")
        assert error.location == "--fit-memory" and "6GB" in error.hint


def expected_settings(budget: int) -> set[tuple[int, int, bool]]:
    """Return the expected settings by exhaustive search.

    For the largest rank that fits, these are the longest passes without and with checkpointing. Checkpointing is
    included only if the longest pass does not fit without it.
    """
    for rank in RANKS:
        sizes = {saves: [(t, size_of(rank, t, saves)) for t in TOKENS_PER_PASS] for saves in (False, True)}
        fitting = {saves: [t for t, size in options if size <= budget] for saves, options in sizes.items()}
        if TOKENS_PER_PASS[0] in fitting[False]:
            return {(rank, TOKENS_PER_PASS[0], False)}
        best = {(rank, max(tokens), checkpointing) for checkpointing, tokens in fitting.items() if tokens}
        if best:
            return best
    return set()


def test_search_finds_every_setting_that_fits(planner, find):
    for budget in range(2_000, 12_500, 500):
        expected = expected_settings(budget)
        if not expected:
            refusal(find, budget, "lora")
            continue
        results = find(budget, "lora")
        assert {(f.rank, f.tokens_per_pass, f.checkpointing) for f in results} == expected
        assert all(f.plan.peak_resident_bytes <= budget for f in results)


def test_settings_are_sorted_by_estimated_time(planner, find):
    results = find(9_000, "lora", "bias")
    seconds = [f.seconds for f in results]
    assert seconds == sorted(seconds) and seconds[0] > 0 and not results[0].checkpointing
    assert sorted((f.method, f.rank or 0) for f in results) == [("bias", 0)] * 2 + [("lora", 16)] * 2
    summary = results[0].as_dict()
    assert summary["peak_resident_bytes"] == results[0].plan.peak_resident_bytes <= 9_000
    assert summary["estimated_seconds_per_step"] == seconds[0]


def test_large_budget_needs_one_plan_per_method(planner, find):
    assert [f.tokens_per_pass for f in find(10**9, "lora", "bias", "full")] == [TOKENS_PER_PASS[0]] * 3
    assert planner.call_count == 3


def test_budget_error_reports_minimum_with_two_plans_per_setting(planner, find):
    error = refusal(find, 100, "lora", "bias")
    minimum = size_of(2, TOKENS_PER_PASS[-1], True)
    assert f"{minimum:,} bytes" in error.message and "100 bytes" in error.message and "--methods" in error.hint
    configs = [call.args[0] for call in planner.call_args_list]
    tried = {(c.method, c.lora.rank, c.train.checkpointing) for c in configs}
    assert tried == {*itertools.product(["lora"], RANKS, [False, True]), ("bias", 16, False), ("bias", 16, True)}
    assert len(configs) == 2 * len(tried)


def test_incompatible_method_is_reported_and_skipped(planner, find):
    lines = []
    assert [f.method for f in find(10**9, "prompt", "bias", log=lines.append)] == ["bias"]
    assert "prompt: images have no prompt" in lines
    refusal(find, 10**9, "prompt", match="no plan could be computed")


def test_real_plans_fit_the_requested_budget(settings, tmp_path):
    torch.set_num_threads(1)
    config = RunConfig.read(settings(tmp_path / "run", train={"batch_size": 8}))
    task, data = read_data(config)
    results = fitting_settings(config, task, data, 100 * 10**9, ["lora", "head"])
    assert {f.method for f in results} == {"lora", "head"} and not any(f.checkpointing for f in results)
    assert [f.seconds for f in results] == sorted(f.seconds for f in results)
    assert results[0].method == "head"  # its backward pass is almost free
    assert not list(tmp_path.iterdir())
