"""The simulated caching allocator of CUDA."""

from __future__ import annotations

import random

from deltaw.memory.caching import MIB, CachingAllocator


def test_segments_have_the_sizes_of_torch() -> None:
    for size, segment in [(1, 2), (MIB, 2), (MIB + 1, 20), (9 * MIB, 20), (10 * MIB, 10), (33 * MIB + 5, 34)]:
        allocator = CachingAllocator()
        allocator.allocate(size)
        assert allocator.reserved_bytes == segment * MIB


def test_blocks_are_split_reused_and_merged() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved_bytes == 20 * MIB
    for block in (blocks[0], blocks[2], blocks[1]):
        allocator.free(*block)
    allocator.allocate(15 * MIB)  # the merged block
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(2 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_small_remainder_belongs_to_the_block() -> None:
    assert CachingAllocator().allocate(20 * MIB - 5)[1] == 20 * MIB
    assert CachingAllocator().allocate(19 * MIB)[1] == 20 * MIB
    assert CachingAllocator().allocate(9 * MIB)[1] == 9 * MIB


def test_small_and_large_blocks_are_in_separate_segments() -> None:
    allocator = CachingAllocator()
    allocator.free(*allocator.allocate(8 * MIB))
    small = [allocator.allocate(512) for _ in range(4096)]
    assert allocator.reserved_bytes == 22 * MIB and {size for _, size in small} == {512}
    allocator.allocate(512)
    assert allocator.reserved_bytes == 24 * MIB


def test_freeing_everything_leaves_whole_segments() -> None:
    allocator = CachingAllocator()
    randomness = random.Random(0)
    blocks = [allocator.allocate(randomness.randint(1, 12 * MIB)) for _ in range(200)]
    reserved = allocator.reserved_bytes
    assert reserved >= sum(size for _, size in blocks)
    randomness.shuffle(blocks)
    for block in blocks:
        allocator.free(*block)
    free = [block for blocks in allocator._pools.values() for block in blocks]
    assert sum(size for size, _ in free) == reserved and {size for size, _ in free} >= {20 * MIB}
    assert not any(start + size in allocator._sizes for size, start in free)
