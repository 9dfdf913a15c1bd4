"""Counted operations match closed forms, and kernel memory follows from the counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from deltaw.memory import work as work_module
from deltaw.memory.simulation import fake_tensors
from deltaw.memory.work import DEFAULT_CAPACITY, WorkCounter, kernel_bytes


def count_work(function: Callable[[], object]) -> WorkCounter:
    with WorkCounter() as work:
        function()
    return work


ones = torch.ones
PRODUCTS: dict[str, tuple[Callable[[], object], int]] = {
    "mm": (lambda: ones(3, 4) @ ones(4, 5), 2 * 3 * 4 * 5),
    "addmm": (lambda: torch.addmm(ones(5), ones(3, 4), ones(4, 5)), 2 * 3 * 4 * 5),
    "addmm_": (lambda: ones(3, 5).addmm_(ones(3, 4), ones(4, 5)), 2 * 3 * 4 * 5),
    "bmm": (lambda: torch.bmm(ones(2, 3, 4), ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "baddbmm_": (lambda: ones(2, 3, 5).baddbmm_(ones(2, 3, 4), ones(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
    "linear": (lambda: F.linear(ones(3, 4), ones(5, 4)), 2 * 3 * 4 * 5),
    "convolution": (lambda: F.conv2d(ones(1, 2, 8, 8), ones(6, 2, 4, 4), stride=4), 2 * 4 * 6 * 32),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_counts_two_operations_per_multiplication(name: str) -> None:
    run, operations = PRODUCTS[name]
    assert count_work(run).operations == operations


def test_backward_counts_twice_forward_and_elementwise_counts_zero() -> None:
    weight, values = (torch.ones(*shape, requires_grad=True) for shape in ((5, 4), (3, 4)))
    work = count_work(lambda: F.linear(values, weight).sum().backward())
    assert work.operations == 3 * (2 * 3 * 4 * 5) and work.operators > 3
    work = count_work(lambda: torch.ones(8).exp().sum())
    assert work.operators >= 3 and work.operations == 0 and work.products == []


def test_repeated_product_shape_counts_as_one_kernel() -> None:
    def run() -> None:
        for rows in (2, 3, 3, 2):
            for dtype in (torch.float32, torch.bfloat16):
                ones(rows, 4, dtype=dtype) @ ones(4, 5, dtype=dtype)
        ones(2, 4) @ ones(5, 4).t()  # different memory layout

    assert [count_product.half for count_product in count_work(run).products].count(True) == 2
    assert len(count_work(run).products) == 5


@pytest.mark.parametrize(("dtype", "lengths"), [(torch.bfloat16, {7, 9}), (torch.float32, set())])
def test_attention_lengths_are_recorded_in_half_precision(dtype: torch.dtype, lengths: set[int]) -> None:
    def run() -> None:
        for length in (7, 9, 7):
            q = ones(1, 2, length, 8, dtype=dtype, requires_grad=True)
            F.scaled_dot_product_attention(q, q, q).sum().backward()

    assert count_work(run).lengths == lengths


def test_counts_are_equal_on_fake_tensors() -> None:
    def run() -> None:
        q = ones(1, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True)
        rows = F.scaled_dot_product_attention(q, q, q).flatten(0, 2)
        (rows @ ones(8, 3, dtype=torch.bfloat16)).float().sum().backward()

    real = count_work(run)
    with fake_tensors():
        planned = count_work(run)
    assert planned.operations == real.operations > 0
    assert planned.products == real.products and planned.lengths == real.lengths == {6}


@pytest.fixture(autouse=True)
def _kernel_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the sizes of kernels. On some CPUs torch caches no kernels."""
    monkeypatch.setattr(work_module, "product_bytes", lambda half: 500_000 if half else 20_000)
    monkeypatch.setattr(work_module, "attention_bytes", lambda long: 900_000 if long else 300_000)


def count_product(rows: int, dtype: torch.dtype = torch.bfloat16) -> WorkCounter:
    return count_work(lambda: ones(rows, 4, dtype=dtype) @ ones(4, 5, dtype=dtype))


def test_kernel_bytes_grow_with_token_counts_up_to_capacity() -> None:
    half = count_product(2)
    full = count_product(2, torch.float32)
    counts = (1, 10, 2 * DEFAULT_CAPACITY, 3 * DEFAULT_CAPACITY)
    single, tenfold, at_capacity, above_capacity = (kernel_bytes(half, varying=[({2}, n)]) for n in counts)
    assert tenfold == pytest.approx(10 * single) and single > kernel_bytes(full, varying=[({2}, 1)])
    assert 100 * single < at_capacity == above_capacity < 2 * DEFAULT_CAPACITY * single
    assert kernel_bytes(count_work(lambda: None), varying=[({2}, 5)], lengths=3) == 0


def test_product_shapes_vary_with_row_counts_or_tiles() -> None:
    varying = [({2}, 10.0), ({3}, 7.0)]
    tokens, rows, others = (kernel_bytes(count_product(n), varying=varying) for n in (2, 3, 9))
    assert tokens == pytest.approx(10 * others) and rows == pytest.approx(7 * others)
    batched = count_work(lambda: torch.bmm(ones(3, 2, 4, dtype=torch.bfloat16), ones(3, 4, 5, dtype=torch.bfloat16)))
    assert batched.products[0].batched
    single, sextuple = (kernel_bytes(batched, varying=[({9}, 4)], tiles=tiles) for tiles in (1.0, 6.0))
    assert sextuple == pytest.approx(6 * single)


@pytest.mark.parametrize("length", [16, 128])
def test_each_attention_length_adds_kernels(length: int) -> None:
    q = ones(1, 1, length, 8, dtype=torch.bfloat16, requires_grad=True)
    work = count_work(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    single, double = (kernel_bytes(work, varying=[({16, 128}, 1)], lengths=lengths) for lengths in (1, 2))
    assert double > single
