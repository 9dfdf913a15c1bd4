"""Counted work against closed forms, and how the libraries' kernels follow from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from deltaw.memory import work as work_module
from deltaw.memory.simulation import fake_tensors
from deltaw.memory.work import DEFAULT_CAPACITY, WorkCounter, kernel_bytes


def counted(run: Callable[[], object]) -> WorkCounter:
    with WorkCounter() as work:
        run()
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
def test_a_product_takes_two_operations_for_each_pair_of_factors(name: str) -> None:
    run, operations = PRODUCTS[name]
    assert counted(run).operations == operations


def test_a_backward_takes_twice_the_forward_and_elementwise_operators_are_no_operations() -> None:
    weight, values = (torch.ones(*shape, requires_grad=True) for shape in ((5, 4), (3, 4)))
    work = counted(lambda: F.linear(values, weight).sum().backward())
    assert work.operations == 3 * (2 * 3 * 4 * 5) and work.operators > 3
    work = counted(lambda: torch.ones(8).exp().sum())
    assert work.operators >= 3 and work.operations == 0 and work.products == []


def test_each_shape_of_a_product_is_one_kernel_however_often_it_comes() -> None:
    def run() -> None:
        for rows in (2, 3, 3, 2):
            for dtype in (torch.float32, torch.bfloat16):
                ones(rows, 4, dtype=dtype) @ ones(4, 5, dtype=dtype)
        ones(2, 4) @ ones(5, 4).t()  # laid out differently

    assert [product.half for product in counted(run).products].count(True) == 2
    assert len(counted(run).products) == 5


@pytest.mark.parametrize(("dtype", "lengths"), [(torch.bfloat16, {7, 9}), (torch.float32, set())])
def test_lengths_of_attention_are_noted_in_half_precision(dtype: torch.dtype, lengths: set[int]) -> None:
    def run() -> None:
        for length in (7, 9, 7):
            q = ones(1, 2, length, 8, dtype=dtype, requires_grad=True)
            F.scaled_dot_product_attention(q, q, q).sum().backward()

    assert counted(run).lengths == lengths


def test_work_is_the_same_on_fake_tensors() -> None:
    def run() -> None:
        q = ones(1, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True)
        rows = F.scaled_dot_product_attention(q, q, q).flatten(0, 2)
        (rows @ ones(8, 3, dtype=torch.bfloat16)).float().sum().backward()

    real = counted(run)
    with fake_tensors():
        planned = counted(run)
    assert planned.operations == real.operations > 0
    assert planned.products == real.products and planned.lengths == real.lengths == {6}


@pytest.fixture(autouse=True)
def _sizes_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of known sizes: torch's own products on some processors keep none."""
    monkeypatch.setattr(work_module, "product_bytes", lambda half: 500_000 if half else 20_000)
    monkeypatch.setattr(work_module, "attention_bytes", lambda long: 900_000 if long else 300_000)


def product(rows: int, dtype: torch.dtype = torch.bfloat16) -> WorkCounter:
    return counted(lambda: ones(rows, 4, dtype=dtype) @ ones(4, 5, dtype=dtype))


def test_kernels_grow_with_numbers_of_tokens_up_to_as_many_as_are_kept() -> None:
    half, full = product(2), product(2, torch.float32)
    one, ten, most, more = (
        kernel_bytes(half, varying=[({2}, n)]) for n in (1, 10, 2 * DEFAULT_CAPACITY, 3 * DEFAULT_CAPACITY)
    )
    assert ten == pytest.approx(10 * one) and one > kernel_bytes(full, varying=[({2}, 1)])
    assert 100 * one < most == more < 2 * DEFAULT_CAPACITY * one
    assert kernel_bytes(counted(lambda: None), varying=[({2}, 5)], lengths=3) == 0


def test_products_come_in_as_many_shapes_as_there_are_numbers_of_rows_or_attentions_tiles() -> None:
    varying = [({2}, 10.0), ({3}, 7.0)]
    tokens, rows, others = (kernel_bytes(product(n), varying=varying) for n in (2, 3, 9))
    assert tokens == pytest.approx(10 * others) and rows == pytest.approx(7 * others)
    batched = counted(lambda: torch.bmm(ones(3, 2, 4, dtype=torch.bfloat16), ones(3, 4, 5, dtype=torch.bfloat16)))
    assert batched.products[0].batched
    one, six = (kernel_bytes(batched, varying=[({9}, 4)], tiles=tiles) for tiles in (1.0, 6.0))
    assert six == pytest.approx(6 * one)


@pytest.mark.parametrize("length", [16, 128])
def test_each_length_of_an_attention_brings_kernels_of_its_own(length: int) -> None:
    q = ones(1, 1, length, 8, dtype=torch.bfloat16, requires_grad=True)
    work = counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    one, two = (kernel_bytes(work, varying=[({16, 128}, 1)], lengths=lengths) for lengths in (1, 2))
    assert two > one
