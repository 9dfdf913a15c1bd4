"""Memory in the system's larger pages."""

import torch

from deltaw.kernels import large_pages
from deltaw.kernels.large_pages import in_one_piece, large_empty


def test_copies_lie_one_behind_another_at_lines_of_the_cache():
    parts = [torch.randn(3, 5), torch.randn(2, 2, 9).bfloat16(), torch.randn(7, 1)]
    copies = in_one_piece(parts)
    for part, copy in zip(parts, copies, strict=True):
        assert copy.dtype == part.dtype and torch.equal(copy, part)
    places = [copy.data_ptr() - copies[0].data_ptr() for copy in copies]
    assert places == [0, 64, 192]  # 60 bytes and 72 bytes, each filled up to whole lines


def test_large_memory_is_written_and_read_to_its_end():
    numbers = large_pages.WORTH // 2 + 11
    room = large_empty(numbers, torch.bfloat16)
    assert room.shape == (numbers,)
    room.fill_(3)
    part = room[-5:]
    del room  # the memory lives as long as a view of it
    assert part.tolist() == [3.0] * 5


def test_there_may_be_nothing():
    assert in_one_piece([]) == [] and large_empty(0, torch.float32).numel() == 0
