"""Rows of an embedding that no row's tokens touch stay on the disk, and a plan knows it."""

from __future__ import annotations

import pytest

from deltaw.training.planning.plan_run import REGION, plan
from tests.byte_models import saved, tiny_llama
from tests.conftest import write_rows

ENTRIES, WIDTH = 40_000, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("wide")
    for name, tied in (("untied", False), ("tied", True)):
        saved(tiny_llama(hidden_size=WIDTH, vocab_size=ENTRIES, tie_word_embeddings=tied), made / name)
    write_rows(made / "rows.jsonl", ({"prompt": f"row {n}", "completion": f"answer {n}"} for n in range(20)))
    return made


@pytest.fixture
def unread(settings, folder, tmp_path):
    def made(name: str = "untied", *, drift: bool = False, **changes: str) -> int:
        changes |= {"model": str(folder / name), "data": {"train": str(folder / "rows.jsonl"), "eval": None}}
        train = {"max_steps": 2, "drift": drift, "keep_features": False}
        found = plan(settings(tmp_path / "run", train=train, **changes))
        return found.peak_bytes - found.resident["tensors"]

    return made


def test_rows_of_a_mapped_embedding_that_do_not_occur_are_not_counted(unread, monkeypatch):
    monkeypatch.setattr("deltaw.training.planning.plan_run.mapped_around", lambda stored: REGION)
    weight = ENTRIES * WIDTH * 4
    # Byte tokens and the few special ones all lie in the first 64 KiB, or the next.
    assert weight - 2 * REGION <= unread() <= weight - REGION


@pytest.mark.parametrize(
    "changes",
    [{"name": "tied"}, {"method": "input"}, {"precision": "bf16"}, {"drift": True}],
    ids=["tied to the head", "trained", "converted", "read by general prompts"],
)
def test_an_embedding_that_is_read_as_a_whole_counts(unread, changes):
    assert unread(**changes) == 0
