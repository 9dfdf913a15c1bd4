"""Change global state of the process during training, and restore it.

deltaw can be imported into other programs. Threads, random numbers, kernel arithmetic, signal handlers and the garbage
collector are restored when a call returns. Only the command line changes the allocator
(:func:`deltaw.machine.memory.retain_freed_memory`), which cannot be restored.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

import torch
from torch import Tensor

from deltaw import platforms
from deltaw.kernels import loader


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's generators by device, as uint8 tensors. GPUs are included only if they are in use.

    deltaw does not use the global generators of numpy or Python.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restore the result of :func:`random_state`. Devices that are not available are skipped."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif device == "mps":
            if torch.backends.mps.is_available():
                torch.mps.set_rng_state(state)
        elif torch.cuda.is_available() and int(device.partition(":")[2]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Seed torch's generators inside this context and restore their states afterwards.

    Args:
        seed: Seed, or None to start from the current state.
    """
    initial = random_state()
    try:
        if seed is not None:
            torch.manual_seed(seed)
        yield
    finally:
        set_random_state(initial)


@contextlib.contextmanager
def preserved_process_state() -> Iterator[None]:
    """Restore the thread count, the random numbers and the kernel arithmetic of the process on exit."""
    threads = torch.get_num_threads()
    try:
        with isolated_random_state(), loader.temporary_arithmetic():
            yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


# Python 3.12 itself freezes several hundred objects at startup. A program that freezes its heap has far more.
FROZEN_BY_PYTHON = 2000


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Exclude existing objects from garbage collection inside this context.

    Scanning the objects of the libraries takes as long as a step of short rows. Has no effect if the program has frozen
    objects itself, because they could not be distinguished afterwards.
    """
    if gc.get_freeze_count() > FROZEN_BY_PYTHON:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Request a stop on the first Ctrl-C, Ctrl-Break or SIGTERM. A second signal interrupts immediately.

    Yields:
        A function that returns True after the first signal. Signals can be handled only in the main thread. In other
        threads, handlers are not changed. A handler that was not installed from Python cannot be restored and is not
        replaced.
    """
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested.is_set
        return

    def request_stop(number: int, frame: FrameType | None) -> None:
        if stop_requested.is_set():
            raise KeyboardInterrupt
        stop_requested.set()

    numbers = [n for n in platforms.stop_signals() if signal.getsignal(n) is not None]
    previous_handlers = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield stop_requested.is_set
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
