"""What a training changes in the process that it runs in, and how all of it is put back.

Somebody who imports the library has a process of their own: threads, random numbers, the way products are
computed, signal handlers and the garbage collector are as before once a call returns. Only the command line,
whose process is deltaw's, changes the allocator (:func:`deltaw.machine.memory.keep_freed_memory`), which cannot
be put back.
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
    """The states of torch's generators, by device: uint8 tensors. CUDA's only where CUDA is in use.

    Nothing in deltaw draws from the global generators of numpy or Python.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put back what :func:`random_state` gave; devices that are not here are skipped."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(device.partition(":")[2]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def own_random_numbers(seed: int | None = None) -> Iterator[None]:
    """While open, random numbers are the block's own, from ``seed`` where one is given; then as before."""
    before = random_state()
    try:
        if seed is not None:
            torch.manual_seed(seed)
        yield
    finally:
        set_random_state(before)


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """While open, torch may compute with another number of threads; then with as many as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextlib.contextmanager
def guest() -> Iterator[None]:
    """Around a whole call: the threads, the random numbers and the arithmetic of the process are its own
    again afterwards."""
    with own_threads(), own_random_numbers(), loader.computing():
        yield


# Python 3.12 freezes some hundred objects of its own as it starts; a program that freezes its heap, many more.
FROZEN_BY_PYTHON = 2000


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """While open, the garbage collector skips the objects that exist already: walking through all those of
    the libraries takes as long as a step of short rows. Nothing happens where the process has frozen objects
    itself, since they could not be told apart afterwards."""
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
    """While open, the first Ctrl-C, Ctrl-Break or SIGTERM only asks to stop; a second one interrupts at once.

    Signals can be caught in the main thread alone; elsewhere nothing changes. A handler that was not set from
    Python could not be put back, and stays.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    numbers = [n for n in platforms.stop_signals() if signal.getsignal(n) is not None]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
