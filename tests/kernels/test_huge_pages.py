"""Tests of memory in huge pages."""

from pathlib import Path

import pytest
import torch

from deltaw.kernels import huge_pages
from deltaw.kernels.huge_pages import copy_contiguous, empty_in_huge_pages, huge_page_bytes

VARIANTS = "none"


def test_copies_are_contiguous_and_cache_line_aligned():
    parts = [torch.randn(3, 5), torch.randn(2, 2, 9).bfloat16(), torch.randn(7, 1)]
    copies = copy_contiguous(parts)
    for part, copy in zip(parts, copies, strict=True):
        assert copy.dtype == part.dtype and torch.equal(copy, part)
    assert copy_contiguous([]) == []
    offsets = [copy.data_ptr() - copies[0].data_ptr() for copy in copies]
    assert offsets == [0, 64, 192]  # 60 bytes and 72 bytes, each padded to cache lines of 64 bytes


def test_large_memory_is_page_aligned_and_fully_usable():
    count = huge_pages.MIN_BYTES // 2 + 11
    page = huge_page_bytes()
    buffer = empty_in_huge_pages(count, torch.bfloat16)
    assert buffer.shape == (count,) and (not page or buffer.data_ptr() % page == 0)
    buffer.fill_(3)
    view = buffer[-5:]
    del buffer  # a view keeps the memory alive
    assert view.tolist() == [3.0] * 5
    assert empty_in_huge_pages(0, torch.float32).numel() == 0


@pytest.mark.parametrize(
    ("mode", "expected"), [("always [madvise] never", 1 << 21), ("always madvise [never]", 0), (None, 0)]
)
def test_huge_page_size_is_read_from_the_system(tmp_path: Path, mode: str | None, expected: int):
    if mode is not None:
        (tmp_path / "enabled").write_text(mode + "\n")
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert huge_page_bytes(tmp_path) == expected
