"""Gradients that are added up while the backward goes on: the same bits as after it, for any number of
processes. Processes are threads here, joined by gloo; each has a model of its own."""

from __future__ import annotations

import concurrent.futures
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltaw.training.parallel import group as gradient_sum
from deltaw.training.parallel.group import GradientSum, _ranges
from deltaw.training.state import MasterWeights
from tests.training.parallel_runs import free_port, needs_gloo

pytestmark = needs_gloo


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(gradient_sum, "PART_BYTES", 64)


def all_at_once(size, work):
    """What each of ``size`` processes' ``work(rank, group)`` gives."""
    port = free_port()

    def one(rank):
        limit = timedelta(seconds=60)
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, limit, multi_tenant=True)
        group = dist.ProcessGroupGloo(store, rank, size, limit)
        found = work(rank, group)
        group.barrier().wait()
        return found, store

    with concurrent.futures.ThreadPoolExecutor(size) as threads:
        return [found for found, _ in threads.map(one, range(size))]


class Blocks(nn.Module):
    """Layers one after another; one is used twice, and one only where told."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=dtype) for _ in range(6))
        self.odd = nn.Linear(8, 8, dtype=dtype)
        draw = torch.Generator().manual_seed(0)  # threads share the process's own random numbers
        for parameter in self.parameters():
            parameter.data.uniform_(-0.5, 0.5, generator=draw)

    def forward(self, x, *, odd, recomputed):
        for layer in [*self.layers, self.layers[2]]:
            run = torch.nn.Sequential(layer, nn.Tanh())
            x = checkpoint(run, x, use_reentrant=False) if recomputed else run(x)
        return self.odd(x) if odd else x


def summed(one, used):
    """How many ranges left early."""
    one.send_all()
    early = one.early
    one.wait()
    one.use(used)
    return early


def gradients(size, *, early, dtype, recomputed, microbatches=2, steps=3):
    """Of each process: the summed gradients of the last step, and how many ranges left early in each."""

    def work(rank, group):
        model = Blocks(dtype)
        sources, left_early = list(model.parameters()), []
        with MasterWeights(sources) as masters:
            one = GradientSum(masters.trained, sources, lambda flat: group.allreduce([flat]), size=size)
            draw = torch.Generator().manual_seed(rank)
            for _ in range(steps):
                for parameter in masters.trained:
                    parameter.grad = None
                rows = [torch.randn(3, 8, generator=draw).to(dtype) for _ in range(microbatches)]
                for batch in one.microbatches(rows) if early else rows:
                    model(batch, odd=rank == 0, recomputed=recomputed).float().square().sum().backward()
                left_early.append(summed(one, [True] * len(sources)))
            return [p.grad.clone() for p in masters.trained], left_early

    return all_at_once(size, work)


@pytest.mark.each_value
@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_early_sum_is_equal_to_the_bit_to_a_late_one(size, recomputed, dtype):
    after, during = (gradients(size, early=early, recomputed=recomputed, dtype=dtype) for early in (False, True))
    for (late, never), (soon, left) in zip(after, during, strict=True):
        assert never == [0, 0, 0] and left[0] == 0, "the first step only looks"
        assert all(torch.equal(a, b) for a, b in zip(late, soon, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(during[0][0], soon, strict=True))
        assert {gradient.dtype for gradient in soon} == {torch.float32}  # master weights get the sum in fp32
    # Where the last layer takes part, ranges leave while the backward goes on; elsewhere they wait for it.
    assert during[0][1][1] > 2 and during[1][1][1] == 0


def test_a_process_without_rows_sends_zeros_and_the_sum_is_that_of_the_other():
    def work(rank, group):
        layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        parameters = list(layers.parameters())
        one = GradientSum(parameters, parameters, lambda flat: group.allreduce([flat]), size=2)
        own = []
        for _ in range(2):
            layers.zero_grad()
            for batch in one.microbatches([torch.ones(1, 8)] * (1 - rank)):
                layers(batch).sum().backward()
            own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            summed(one, [True, False, True, True])
        return own, [p.grad for p in parameters]

    (own, zero), (_, other) = all_at_once(2, work)
    assert zero[1] is None and other[1] is None
    for number in (0, 2, 3):
        assert torch.equal(zero[number], own[number]) and torch.equal(other[number], own[number])


def test_gradients_that_come_in_parts_are_summed_after_the_backward():
    layer = nn.Linear(4, 4)
    one = GradientSum([*layer.parameters()], [*layer.parameters()], lambda flat: mock.Mock(), size=1)
    for _ in range(3):
        layer.zero_grad()
        for batch in one.microbatches([torch.ones(2, 4, requires_grad=True)]):
            for _ in range(2):  # reentrant recomputation runs a backward of its own
                batch = checkpoint(layer, batch, use_reentrant=True)
            batch.sum().backward()
        whole = [p.grad.clone() for p in layer.parameters()]
        assert summed(one, [True, True]) == 0
        assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), whole, strict=True))


def test_ranges_hold_each_parameter_once_and_are_no_smaller_than_their_messages(monkeypatch):
    monkeypatch.setattr(gradient_sum, "PART_BYTES", 1000)
    counts = [7, 900, 3, 250, 4000, 10, 10, 2000]
    found = _ranges(counts, 2, 4)
    assert [n for own in found for n in own] == list(reversed(range(8)))
    assert all(sum(counts[n] for n in own) * 4 >= 2000 for own in found)
    assert 1 < len(found) <= gradient_sum.MOST_RANGES
    assert _ranges([100] * 50, 1000, 4) == [list(reversed(range(50)))]
    assert _ranges([], 2, 4) == []
