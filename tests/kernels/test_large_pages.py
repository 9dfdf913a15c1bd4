"""Memory in the system's larger pages."""

from pathlib import Path

import pytest
import torch

from deltaw.kernels import large_pages
from deltaw.kernels.large_pages import in_one_piece, large_empty, large_page_bytes

VARIANTS = "none"


def test_copies_lie_one_behind_another_at_lines_of_the_cache():
    parts = [torch.randn(3, 5), torch.randn(2, 2, 9).bfloat16(), torch.randn(7, 1)]
    copies = in_one_piece(parts)
    for part, copy in zip(parts, copies, strict=True):
        assert copy.dtype == part.dtype and torch.equal(copy, part)
    assert in_one_piece([]) == []
    places = [copy.data_ptr() - copies[0].data_ptr() for copy in copies]
    assert places == [0, 64, 192]  # 60 bytes and 72 bytes, each filled up to whole lines


def test_large_memory_begins_where_a_large_page_does_and_is_written_and_read_to_its_end():
    numbers, page = large_pages.WORTH // 2 + 11, large_page_bytes()
    room = large_empty(numbers, torch.bfloat16)
    assert room.shape == (numbers,) and (not page or room.data_ptr() % page == 0)
    room.fill_(3)
    part = room[-5:]
    del room  # the memory lives as long as a view of it
    assert part.tolist() == [3.0] * 5
    assert large_empty(0, torch.float32).numel() == 0


@pytest.mark.parametrize(
    ("mode", "expected"), [("always [madvise] never", 1 << 21), ("always madvise [never]", 0), (None, 0)]
)
def test_what_the_system_says_of_large_pages(tmp_path: Path, mode: str | None, expected: int):
    if mode is not None:
        (tmp_path / "enabled").write_text(mode + "\n")
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert large_page_bytes(tmp_path) == expected
