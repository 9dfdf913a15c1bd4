"""Rows of an embedding that no row's tokens touch stay on the disk, and a plan knows it."""

from __future__ import annotations

import pytest

from deltaw.settings import RunConfig
from deltaw.training.planning.plan_run import REGION, plan
from tests.byte_models import saved, tiny_llama

ENTRIES, WIDTH = 40_000, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("wide")
    for name, tied in (("untied", False), ("tied", True)):
        model = tiny_llama(hidden_size=WIDTH, vocab_size=ENTRIES, tie_word_embeddings=tied)
        saved(model, made / name)
    rows = "".join(f'{{"prompt": "row {n}", "completion": "answer {n}"}}\n' for n in range(20))
    (made / "rows.jsonl").write_text(rows)
    return made


def unread(folder, name: str, *, method: str = "lora", precision: str = "fp32", drift: bool = False) -> int:
    settings = {
        "model": str(folder / name),
        "data": {"train": str(folder / "rows.jsonl"), "eval": None},
        "method": method,
        "precision": precision,
        "train": {"max_steps": 2, "drift": drift, "keep_features": False},
        "device": "cpu",
        "threads": 1,
    }
    made = plan(RunConfig.read(settings))
    return made.peak_bytes - made.resident["tensors"]


def test_rows_of_a_mapped_embedding_that_do_not_occur_are_not_counted(folder, monkeypatch):
    monkeypatch.setattr("deltaw.training.planning.plan_run.mapped_around", lambda stored: REGION)
    weight = ENTRIES * WIDTH * 4
    # Byte tokens and the few special ones all lie in the first 64 KiB, or the next.
    assert weight - 2 * REGION <= unread(folder, "untied") <= weight - REGION


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "tied"},
        {"name": "untied", "method": "input"},
        {"name": "untied", "precision": "bf16"},
        {"name": "untied", "drift": True},
    ],
    ids=["tied to the head", "trained", "converted", "read by general prompts"],
)
def test_an_embedding_that_is_read_as_a_whole_counts(folder, changes):
    assert unread(folder, **changes) == 0
