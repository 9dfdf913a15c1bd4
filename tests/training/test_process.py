"""The process of somebody who imports the library is as it was once a call returns, or raises."""

from __future__ import annotations

import gc
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rich.style  # noqa: F401, which draws a random number as it is imported, once
import torch

import deltaw
from deltaw.errors import UserError
from deltaw.runtime.packed import packed_rows
from deltaw.training.callbacks import Calling
from deltaw.training.process import FROZEN_BY_PYTHON, frozen_heap, stop_signals
from tests.training.loops import Training


def everything():
    """All that a call could leave changed."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "frozen": gc.get_freeze_count() > FROZEN_BY_PYTHON,
        "collector": (gc.isenabled(), gc.get_threshold()),
        "handlers": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "grad": (torch.is_grad_enabled(), torch.get_default_dtype()),
    }


@pytest.fixture(autouse=True)
def _nothing_frozen(monkeypatch):
    """The tests' own objects are frozen for speed; with any, a run freezes none."""
    monkeypatch.setattr("deltaw.training.loop.frozen_heap", frozen_heap)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture
def own_process():
    """A process with choices of its own, which differ from what a run chooses."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(2)
    signal.signal(signal.SIGTERM, lambda *_: None)
    torch.manual_seed(1234)
    torch.rand(5)
    yield everything()
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def test_a_plan_a_run_and_one_that_fails_leave_the_process_as_it_was(own_process, settings, tmp_path):
    deltaw.plan(settings(tmp_path / "run", threads=1))
    assert everything() == own_process
    within = {}
    notes = Calling(on_begin=lambda state: within.update(everything()))
    deltaw.fit(settings(tmp_path / "run", threads=1, lora={"dropout": 0.2}), callback=notes)
    assert everything() == own_process
    # The test would say nothing if a run changed nothing on its way.
    assert all(within[key] != own_process[key] for key in ("threads", "torch", "frozen", "handlers"))
    with pytest.raises(UserError, match="diverged"):
        deltaw.fit(settings(tmp_path / "broken", threads=1, lora={"alpha": 1e20}, train={"epochs": 4}))
    assert everything() == own_process


def test_the_loop_leaves_the_process_as_it_was(own_process):
    run = Training()  # making a tiny model draws its weights
    torch.rand(5)
    with packed_rows(run.model):  # verifies the model's blocks on its first entry
        before = everything()
        run.go()
        assert everything() == before


def test_what_the_process_has_frozen_itself_stays_frozen():
    gc.freeze()
    count = gc.get_freeze_count()
    with frozen_heap():
        pass
    assert gc.get_freeze_count() > count // 2 > 0  # some may be given up meanwhile, as by other threads


def test_the_first_signal_asks_and_the_second_interrupts_and_other_threads_leave_them_alone():
    def elsewhere():
        with stop_signals() as stopped:
            return signal.getsignal(signal.SIGINT), stopped()

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(elsewhere).result() == (signal.getsignal(signal.SIGINT), False)
    with stop_signals() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
