"""Library calls restore the state of the calling process on return and on errors."""

from __future__ import annotations

import gc
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rich.style  # noqa: F401 (its first import uses a random number)
import torch

import deltaw
from deltaw.runtime.packed import packed_rows
from deltaw.training.callbacks import FunctionCallback
from deltaw.training.process import FROZEN_BY_PYTHON, frozen_heap, stop_signals
from tests.conftest import refusal
from tests.training.loops import Training


def process_state():
    """Return all process state that a call could change."""
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
def _unfreeze_heap(monkeypatch):
    """Unfreeze the heap that the test suite freezes, because a run does not freeze an already frozen heap."""
    monkeypatch.setattr("deltaw.training.loop.frozen_heap", frozen_heap)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture
def custom_state():
    """Change the process state to values that a run does not use."""
    threads = torch.get_num_threads()
    handler = signal.getsignal(signal.SIGTERM)
    torch.set_num_threads(2)
    signal.signal(signal.SIGTERM, lambda *_: None)
    torch.manual_seed(1234)
    torch.rand(5)
    yield process_state()
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_plan_run_and_failed_run_restore_process_state(custom_state, settings, tmp_path):
    deltaw.plan(settings(tmp_path / "run", threads=1))
    assert process_state() == custom_state
    state_in_run = {}
    callback = FunctionCallback(on_begin=lambda state: state_in_run.update(process_state()))
    deltaw.fit(settings(tmp_path / "run", threads=1, lora={"dropout": 0.2}), callback=callback)
    assert process_state() == custom_state
    # The test is meaningful only if the run changes the state while it is active.
    assert all(state_in_run[key] != custom_state[key] for key in ("threads", "torch", "frozen", "handlers"))
    refusal(deltaw.fit, settings(tmp_path / "broken", threads=1, lora={"alpha": 1e20}), match="diverged")
    assert process_state() == custom_state


def test_training_loop_restores_process_state(custom_state):
    run = Training()  # initializing the model uses random numbers
    torch.rand(5)
    with packed_rows(run.model):  # the first use verifies the model's blocks
        before = process_state()
        run.run()
        assert process_state() == before


def test_objects_frozen_by_process_remain_frozen():
    gc.freeze()
    count = gc.get_freeze_count()
    with frozen_heap():
        pass
    assert gc.get_freeze_count() > count // 2 > 0  # other threads may release some objects


def test_first_signal_requests_stop_and_second_interrupts():
    def in_thread():
        with stop_signals() as stopped:
            return signal.getsignal(signal.SIGINT), stopped()

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(in_thread).result() == (signal.getsignal(signal.SIGINT), False)
    with stop_signals() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
