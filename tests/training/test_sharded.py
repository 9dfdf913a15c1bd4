"""A base model divided among processes trains as a whole one does."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from deltaw import fit
from tests.training.test_parallel import (
    ADAPTER,
    assert_same_run,
    ended,
    free_port,
    of,
    start,
    train,
    uneven,
    write_settings,
)

__all__ = ["uneven"]


def sharded(settings, uneven, output, **changes) -> dict:
    made = of(settings, uneven, output, **changes)
    made["train"] |= {"sharding": "base"}
    return made


def test_two_processes_with_half_of_the_base_each_train_as_one(settings, uneven, tmp_path):
    fit(of(settings, uneven, tmp_path / "one"))
    path = write_settings(tmp_path / "run.yaml", sharded(settings, uneven, tmp_path / "two"))
    zero, one = train(path, 2)
    assert zero[0] == 0 and one == (0, "", ""), (zero, one)
    assert_same_run(tmp_path / "two", tmp_path / "one")
