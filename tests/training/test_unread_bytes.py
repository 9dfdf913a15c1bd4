"""The number of bytes that the system loads when a page of a mapped file is accessed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaw.tensor_files import read_header, save_tensors
from deltaw.training.planning.unread_rows import MIN_REGION_BYTES, NUM_TOUCHES, TOUCH_DISTANCE, mapped_page_bytes
from tests.mapped_files import resident_bytes

ROW = 1024  # fp32 numbers: a page of 4 KiB


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident pages from Linux's /proc")
def test_mapped_page_bytes_predicts_memory_of_rows(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    rows = 64 * 256
    save_tensors(file, {"rows": torch.arange(rows * ROW).view(rows, ROW).float()}, {})
    region = mapped_page_bytes(read_header(file)["rows"])
    assert MIN_REGION_BYTES <= region <= TOUCH_DISTANCE
    weight = load_file(file)["rows"]
    before = resident_bytes(file)
    indices = torch.arange(5) * (rows // 5) + 777
    assert torch.equal(weight[indices][:, 0], (indices * ROW).float())
    loaded_bytes = resident_bytes(file) - before
    # Pages have different sizes, and a row can overlap two pages.
    assert loaded_bytes <= 2 * len(indices) * region
    assert region == MIN_REGION_BYTES or loaded_bytes >= len(indices) * region / 8


def test_small_tensor_uses_minimum_region(tmp_path: Path) -> None:
    save_tensors(tmp_path / "weights", {"rows": torch.ones(8, 8)}, {})
    assert mapped_page_bytes(read_header(tmp_path / "weights")["rows"]) == MIN_REGION_BYTES
    assert NUM_TOUCHES * TOUCH_DISTANCE < 64 << 20  # the file of the other test covers all touches
