"""Features of frozen layers over several processes: one store a machine, and the run of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.training.features import store as stores
from deltaw.training.features.prefix_cache import Sharing
from deltaw.training.features.store import Shape, open_store
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.group import Told as Processes
from tests.conftest import laid_over, write_rows
from tests.training.parallel_runs import assert_same_run, needs_gloo, train_all

pytestmark = needs_gloo
KINDS = {
    "every token": {"lora": {"layers": [1]}},
    "predictors": {"method": "head"},
    "head": {"method": "head", "task": "sequence-classification"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_share_the_features_of_a_machine_and_train_as_one(of, tmp_path, kind, monkeypatch):
    made = of(tmp_path / "one", **laid_over(KINDS[kind], {"train": {"keep_features": True, "samples": 0}}))
    if kind == "head":
        rows = ({"text": "word " * (1 + n % 7) + "no" * (n % 2), "label": "ab"[n % 2]} for n in range(14))
        made["data"] = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 5}
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "of one"))
    fit(made)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "of two"))
    assert "features computed once for each row" in train_all(made | {"output": str(tmp_path / "two")})[0]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    (one,), (two,) = (
        [p for p in (tmp_path / name / "features").iterdir() if p.is_dir()] for name in ("of one", "of two")
    )
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert np.fromfile(two / stores.DONE, np.uint8).all()  # also rows that the other process alone met
    assert one.name == two.name
    values = [np.fromfile(folder / stores.VALUES, np.float32) for folder in (one, two)]
    assert np.linalg.norm(values[0] - values[1]) <= 1e-5 * np.linalg.norm(values[0]) > 0


class Told(Group):
    """A process whose texts are those of all."""

    def __init__(self, rank, of_all):
        super().__init__(Processes(rank, 2, rank, 2, "", 0, False, "0", 1.0), None, None)
        self.of_all = of_all

    def texts(self, text):
        self.of_all[self.rank] = text
        return [self.of_all.get(rank, "") for rank in range(2)]


def test_what_one_process_stores_another_reads_and_marks(tmp_path):
    shape, texts = Shape.of(4, 8, 3, torch.float32), {}
    lead, other = Sharing(Told(0, texts)), Sharing(Told(1, texts))
    assert lead.leads and not other.leads
    assert not lead.tell(keeps=False) and not other.tell(keeps=False)
    first = open_store("a", shape, folder=tmp_path)
    lead.opened(first)
    assert lead.tell(keeps=True) and other.tell(keeps=False)
    second = other.join(shape)
    values = torch.arange(6.0).view(2, 3)
    second.write(np.array([1]), np.array([2, 3]), values)
    assert first.done.tolist() == [False, True, False, False]
    assert torch.equal(first.read(np.array([2, 3])), values)
    first.write(np.array([3]), np.array([6, 7]), values + 1)
    assert second.done.tolist() == [False, True, False, True]
    first.close()
    second.close()
    again = open_store("a", shape, folder=tmp_path)
    assert again.done.tolist() == [False, True, False, True] and not list(again.folder.glob("seen*"))
    again.close()
    with pytest.raises(UserError, match="not those of this one"):
        other.join(Shape.of(4, 9, 3, torch.float32))
