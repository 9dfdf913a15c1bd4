"""Several processes share one feature cache per machine and produce the run of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaw.runs.fit import fit
from deltaw.training.features import store as stores
from deltaw.training.features.shared_store import Sharing
from deltaw.training.features.store import Shape, open_store
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.launch_environment import LaunchEnvironment
from tests.conftest import deep_merge, refusal, write_rows
from tests.training.parallel_runs import assert_same_run, needs_gloo, train_all

pytestmark = needs_gloo
KINDS = {
    "every token": {"lora": {"layers": [1]}},
    "predictors": {"method": "head"},
    "head": {"method": "head", "task": "sequence-classification"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_share_features_and_match_one(make_config, tmp_path, kind, monkeypatch):
    config = make_config(tmp_path / "one", **deep_merge(KINDS[kind], {"train": {"keep_features": True, "samples": 0}}))
    if kind == "head":
        rows = ({"text": "word " * (1 + n % 7) + "no" * (n % 2), "label": "ab"[n % 2]} for n in range(14))
        config["data"] = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 5}
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "of one"))
    fit(config)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "of two"))
    assert (
        "features computed once for each row"
        in train_all(config | {"output": str(tmp_path / "two")}, flags=["--verbose"])[0]
    )
    assert_same_run(tmp_path / "two", tmp_path / "one")
    folders = (tmp_path / name / "features" for name in ("of one", "of two"))
    (single,), (pair,) = ([path for path in folder.iterdir() if path.is_dir()] for folder in folders)
    assert sorted(p.name for p in pair.iterdir()) == sorted(p.name for p in single.iterdir())
    assert np.fromfile(pair / stores.DONE, np.uint8).all()  # including rows computed only by the other process
    assert single.name == pair.name
    values = [np.fromfile(folder / stores.VALUES, np.float32) for folder in (single, pair)]
    assert np.linalg.norm(values[0] - values[1]) <= 1e-5 * np.linalg.norm(values[0]) > 0


class SharedTextGroup(Group):
    """Process group that exchanges texts through a dictionary."""

    def __init__(self, rank, texts_by_rank):
        super().__init__(LaunchEnvironment(rank, 2, rank, 2, "", 0, False, "0", 1.0), None, None)
        self.texts_by_rank = texts_by_rank

    def texts(self, text):
        self.texts_by_rank[self.rank] = text
        return [self.texts_by_rank.get(rank, "") for rank in range(2)]


def test_processes_read_features_stored_by_each_other(tmp_path):
    shape = Shape.of(4, 8, 3, torch.float32)
    texts = {}
    lead = Sharing(SharedTextGroup(0, texts))
    follower = Sharing(SharedTextGroup(1, texts))
    assert lead.is_leader and not follower.is_leader
    assert not lead.exchange(has_store=False) and not follower.exchange(has_store=False)
    first = open_store("a", shape, folder=tmp_path)
    lead.publish(first)
    assert lead.exchange(has_store=True) and follower.exchange(has_store=False)
    second = follower.join(shape)
    values = torch.arange(6.0).view(2, 3)
    second.write(np.array([1]), np.array([2, 3]), values)
    assert first.done.tolist() == [False, True, False, False] and torch.equal(first.read(np.array([2, 3])), values)
    first.write(np.array([3]), np.array([6, 7]), values + 1)
    assert second.done.tolist() == [False, True, False, True]
    first.close()
    second.close()
    reopened = open_store("a", shape, folder=tmp_path)
    assert reopened.done.tolist() == [False, True, False, True] and not list(reopened.folder.glob("seen*"))
    reopened.close()
    refusal(follower.join, Shape.of(4, 9, 3, torch.float32), match="do not match those of this process")
