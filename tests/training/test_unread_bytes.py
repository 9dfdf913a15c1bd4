"""What a page of a mapped file brings into memory with it, as the system does it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaw.tensor_files import read_header, save_tensors
from deltaw.training.planning.plan_run import APART, REGION, TOUCHED, mapped_around
from tests.mapped_files import resident_of

ROW = 1024  # fp32 numbers: a page of 4 KiB


@pytest.mark.skipif(sys.platform != "linux", reason="what is resident is read from Linux's /proc")
def test_it_foretells_what_rows_of_a_mapped_weight_take(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    rows = 64 * 256
    save_tensors(file, {"rows": torch.arange(rows * ROW).view(rows, ROW).float()}, {})
    region = mapped_around(read_header(file)["rows"])
    assert REGION <= region <= APART
    weight = load_file(file)["rows"]
    before = resident_of(file)
    places = torch.arange(5) * (rows // 5) + 777
    assert torch.equal(weight[places][:, 0], (places * ROW).float())
    taken = resident_of(file) - before
    # Pages of several sizes lie side by side, and rows at their ends touch two.
    assert taken <= 2 * len(places) * region
    assert region == REGION or taken >= len(places) * region / 8


def test_a_small_tensor_is_not_worth_a_look(tmp_path: Path) -> None:
    save_tensors(tmp_path / "weights", {"rows": torch.ones(8, 8)}, {})
    assert mapped_around(read_header(tmp_path / "weights")["rows"]) == REGION
    assert TOUCHED * APART < 64 << 20  # else the file above shows less than all
