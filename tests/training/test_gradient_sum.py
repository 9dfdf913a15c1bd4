"""Gradients that are reduced during the backward pass are bit-identical to a reduction after it.

Processes are simulated by threads that are connected by gloo, each with its own model.
"""

from __future__ import annotations

import concurrent.futures
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltaw.training.parallel import gradient_sum
from deltaw.training.parallel.gradient_sum import GradientSum, _ranges
from deltaw.training.state import MasterWeights
from tests.training.parallel_runs import free_port, needs_gloo

pytestmark = needs_gloo


@pytest.fixture(autouse=True)
def small_message_parts(monkeypatch):
    monkeypatch.setattr(gradient_sum, "PART_BYTES", 64)


def run_ranks(size, work):
    """Run ``work(rank, group)`` for each rank concurrently and return the results."""
    port = free_port()

    def run_rank(rank):
        limit = timedelta(seconds=60)
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, limit, multi_tenant=True)
        group = dist.ProcessGroupGloo(store, rank, size, limit)
        result = work(rank, group)
        group.barrier().wait()
        return result, store

    with concurrent.futures.ThreadPoolExecutor(size) as threads:
        return [result for result, _ in threads.map(run_rank, range(size))]


class Blocks(nn.Module):
    """Sequence of layers, of which one is used twice and one only if ``odd`` is set."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=dtype) for _ in range(6))
        self.odd = nn.Linear(8, 8, dtype=dtype)
        generator = torch.Generator().manual_seed(0)  # the global generator is shared by all threads
        for parameter in self.parameters():
            parameter.data.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, x, *, odd, recomputed):
        for layer in [*self.layers, self.layers[2]]:
            run = torch.nn.Sequential(layer, nn.Tanh())
            x = checkpoint(run, x, use_reentrant=False) if recomputed else run(x)
        return self.odd(x) if odd else x


def reduce_and_count_early(reducer, used):
    """Reduce the gradients and return the number of ranges that were sent early."""
    reducer.send_all()
    early = reducer.num_early
    reducer.wait()
    reducer.assign(used)
    return early


def gradients(size, *, early, dtype, recomputed, microbatches=2, steps=3):
    """Return the reduced gradients of the last step and the number of early ranges per step, for each process."""

    def work(rank, group):
        model = Blocks(dtype)
        sources = list(model.parameters())
        early_counts = []
        with MasterWeights(sources) as masters:
            reducer = GradientSum(masters.trained, sources, lambda flat: group.allreduce([flat]), size=size)
            generator = torch.Generator().manual_seed(rank)
            for _ in range(steps):
                for parameter in masters.trained:
                    parameter.grad = None
                rows = [torch.randn(3, 8, generator=generator).to(dtype) for _ in range(microbatches)]
                for batch in reducer.microbatches(rows) if early else rows:
                    model(batch, odd=rank == 0, recomputed=recomputed).float().square().sum().backward()
                early_counts.append(reduce_and_count_early(reducer, [True] * len(sources)))
            return [p.grad.clone() for p in masters.trained], early_counts

    return run_ranks(size, work)


@pytest.mark.each_value
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_early_reduction_is_bit_identical(size, recomputed, dtype):
    after, during = (gradients(size, early=early, recomputed=recomputed, dtype=dtype) for early in (False, True))
    for (late_gradients, late_counts), (early_gradients, early_counts) in zip(after, during, strict=True):
        assert late_counts == [0, 0, 0] and early_counts[0] == 0, "the first step only records the order"
        assert all(torch.equal(a, b) for a, b in zip(late_gradients, early_gradients, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(during[0][0], early_gradients, strict=True))
        # Master weights receive the sum in fp32.
        assert {gradient.dtype for gradient in early_gradients} == {torch.float32}
    # Ranges are sent during the backward pass only in the process that uses the last layer.
    assert during[0][1][1] > 2 and during[1][1][1] == 0


def test_process_without_rows_contributes_zeros():
    def work(rank, group):
        layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        parameters = list(layers.parameters())
        reducer = GradientSum(parameters, parameters, lambda flat: group.allreduce([flat]), size=2)
        local_gradients = []
        for _ in range(2):
            layers.zero_grad()
            for batch in reducer.microbatches([torch.ones(1, 8)] * (1 - rank)):
                layers(batch).sum().backward()
            local_gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            reduce_and_count_early(reducer, [True, False, True, True])
        return local_gradients, [p.grad for p in parameters]

    (local_gradients, zero), (_, other) = run_ranks(2, work)
    assert zero[1] is None and other[1] is None
    for number in (0, 2, 3):
        assert all(torch.equal(reduced[number], local_gradients[number]) for reduced in (zero, other))


def test_partial_gradients_are_reduced_after_backward():
    layer = nn.Linear(4, 4)
    reducer = GradientSum([*layer.parameters()], [*layer.parameters()], lambda flat: mock.Mock(), size=1)
    for _ in range(3):
        layer.zero_grad()
        for batch in reducer.microbatches([torch.ones(2, 4, requires_grad=True)]):
            for _ in range(2):  # reentrant checkpointing runs a nested backward pass
                batch = checkpoint(layer, batch, use_reentrant=True)
            batch.sum().backward()
        expected = [p.grad.clone() for p in layer.parameters()]
        assert reduce_and_count_early(reducer, [True, True]) == 0
        assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), expected, strict=True))


def test_ranges_partition_parameters_by_minimum_size(monkeypatch):
    monkeypatch.setattr(gradient_sum, "PART_BYTES", 1000)
    counts = [7, 900, 3, 250, 4000, 10, 10, 2000]
    ranges = _ranges(counts, 2, 4)
    assert [n for indices in ranges for n in indices] == list(reversed(range(8)))
    assert all(sum(counts[n] for n in indices) * 4 >= 2000 for indices in ranges)
    assert 1 < len(ranges) <= gradient_sum.MAX_RANGES and _ranges([100] * 50, 1000, 4) == [list(reversed(range(50)))]
    assert _ranges([], 2, 4) == []
