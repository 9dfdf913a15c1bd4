"""Data sets of reasoning-gym as rows."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from deltaw.data.sources import read_rows
from tests.conftest import refusal

# The package is imported by the first test only, because that takes seconds.
pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="the extra reward is not installed")


def rows(reference: str) -> list[dict]:
    return [row for _, row in read_rows(reference)]


def test_rows_are_determined_by_name_seed_and_configuration():
    first = rows("reasoning-gym:chain_sum?size=5&seed=3&min_digits=1&max_digits=1")
    assert len(first) == 5 and first == rows("reasoning-gym:chain_sum?size=5&seed=3&min_digits=1&max_digits=1")
    assert first != rows("reasoning-gym:chain_sum?size=5&seed=4&min_digits=1&max_digits=1")
    assert len(rows("reasoning-gym:chain_sum?size=7")) == 7
    # With the seeding of the package, these would be the same problems shifted by one.
    reference = "reasoning-gym:chain_sum?size=50&min_digits=6&max_digits=6&seed="
    ones, twos = ({row["prompt"] for row in rows(reference + seed)} for seed in "12")
    assert len(ones) == 50 and not ones & twos and all(row["prompt"] and row["answer"] for row in first)
    assert {json.loads(row["metadata"])["difficulty"]["num_digits"][1] for row in first} == {1}
    assert json.loads(first[0]["metadata"])["source_dataset"] == "chain_sum"


INVALID = [("chain_sums", "no data set 'chain_sums'"), ("chain_sum?size=0", "size must be")]
INVALID += [("chain_sum?size=x", "size must be"), ("chain_sum?seed=x", "seed must be")]
INVALID += [("chain_sum?size", "'size' is no key=value"), ("chain_sum?colour=1", "configuration does not fit")]
INVALID += [("chain_sum?min_terms=0", "configuration does not fit"), ("arc_agi?size=1", "cannot read the metadata")]


@pytest.mark.parametrize(("reference", "message"), INVALID)
def test_invalid_data_sets_are_rejected(reference, message):
    refusal(rows, f"reasoning-gym:{reference}", match=message)
