"""Embedding rows that no token uses are not read from disk, and the plan excludes them."""

from __future__ import annotations

import pytest

from deltaw.training.planning.plan_run import plan
from deltaw.training.planning.unread_rows import MIN_REGION_BYTES
from tests.byte_models import save_model, tiny_llama
from tests.conftest import write_rows

ENTRIES = 40_000
WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    for name, tied in (("untied", False), ("tied", True)):
        save_model(tiny_llama(hidden_size=WIDTH, vocab_size=ENTRIES, tie_word_embeddings=tied), root / name)
    write_rows(root / "rows.jsonl", ({"prompt": f"row {n}", "completion": f"answer {n}"} for n in range(20)))
    return root


@pytest.fixture
def unread_bytes(settings, folder, tmp_path):
    def measure(name: str = "untied", *, drift: bool = False, **changes: str) -> int:
        changes |= {"model": str(folder / name), "data": {"train": str(folder / "rows.jsonl"), "eval": None}}
        train = {"max_steps": 2, "drift": drift, "keep_features": False}
        result = plan(settings(tmp_path / "run", train=train, **changes))
        return result.peak_bytes - result.resident["tensors"]

    return measure


def test_unused_rows_of_mapped_embedding_are_not_counted(unread_bytes, monkeypatch):
    monkeypatch.setattr("deltaw.training.planning.unread_rows.mapped_page_bytes", lambda stored: MIN_REGION_BYTES)
    weight = ENTRIES * WIDTH * 4
    # The rows of byte tokens and special tokens are in the first or second 64 KiB.
    assert weight - 2 * MIN_REGION_BYTES <= unread_bytes() <= weight - MIN_REGION_BYTES


@pytest.mark.parametrize(
    "changes",
    [{"name": "tied"}, {"method": "input"}, {"precision": "bf16"}, {"drift": True}],
    ids=["tied to the head", "trained", "converted", "read by general prompts"],
)
def test_fully_read_embedding_is_counted(unread_bytes, changes):
    assert unread_bytes(**changes) == 0
