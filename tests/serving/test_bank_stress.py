"""Threads that add, remove, swap and request adapters at once: nobody gets another adapter than its name
stands for, and memory stays within the budget."""

from __future__ import annotations

import random
import shutil
import threading
import time
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.errors import UserError
from deltaw.serving import bank as bank_module
from deltaw.serving.bank import AdapterBank
from tests.byte_models import tiny_llama
from tests.serving.adapter_folders import write_lora
from tests.serving.http.waiting import at_once

NAMES, CONTENTS = 8, 12
OPERATIONS = 600


class Packed:
    """Factors, all of one number, by which an adapter is told from others."""

    alive: ClassVar[weakref.WeakSet[Packed]] = weakref.WeakSet()

    def __init__(self, layers: dict) -> None:
        self.factors = [f.lora_A for f in layers.values()]
        Packed.alive.add(self)

    @property
    def bytes(self) -> int:
        return sum(factor.nbytes for factor in self.factors)

    @property
    def number(self) -> float:
        numbers = torch.cat([factor.flatten() for factor in self.factors]).unique().tolist()
        assert len(numbers) == 1, "factors of different adapters"
        return numbers[0]


class Log:
    """What a name was to stand for, in order; written before it does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # one change of a name at a time
        self.intended: list[int | None] = [None]
        self.done = 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Adapters whose factors are all 0, all 1, and so on."""
    root = tmp_path_factory.mktemp("adapters")
    first = write_lora(tiny_llama(), root / "first", rank=8)
    made = [shutil.copytree(first, root / f"number {number}") for number in range(CONTENTS)]
    for number, folder in enumerate(made):
        tensors = load_file(first / "adapter_model.safetensors")
        filled = {name: torch.full_like(tensor, float(number)) for name, tensor in tensors.items()}
        save_file(filled, folder / "adapter_model.safetensors")
    return made


class Stress:
    """A bank with room for ``room`` adapters, and threads that use it."""

    def __init__(self, folders: list[Path], room: int) -> None:
        self.folders, self.room = folders, room
        probe = AdapterBank(tiny_llama(), None, Packed, budget_bytes=1 << 30)
        probe.add("probe", folders[0])
        self.size = probe.status().bytes
        probe.remove("probe")
        self.bank = AdapterBank(tiny_llama(), None, Packed, budget_bytes=room * self.size)
        self.logs = {f"name {n}": Log() for n in range(NAMES)}
        self.served = self.most = 0
        self.numbers: dict[int, float] = {}

    def change(self, draw: random.Random) -> None:
        name = draw.choice(list(self.logs))
        log, content = self.logs[name], draw.randrange(CONTENTS)
        with log.lock:
            stands = log.intended[log.done]
            remove = stands is not None and draw.random() < 0.3
            log.intended.append(None if remove else content)
            if remove:
                self.bank.remove(name)
            elif stands is None:
                self.bank.add(name, self.folders[content])
            else:
                self.bank.swap(name, self.folders[content])
            log.done = len(log.intended) - 1

    def request(self, draw: random.Random) -> None:
        name = draw.choice(list(self.logs))
        log = self.logs[name]
        start = log.done
        try:
            patience = time.monotonic() + draw.choice([0.0, 0.0, 5.0])
            while (active := self.bank.acquire(name)) is None and time.monotonic() < patience:
                time.sleep(0.001)
        except UserError as error:
            assert "no adapter" in error.what and None in set(log.intended[start:]), error.what
            return
        if active is None:
            return
        number, meant = active.packed.number, set(log.intended[start:])
        assert number in meant, f"{name} was {number}, not one of {meant}"
        assert self.numbers.setdefault(active.number, number) == number, "one version, two contents"
        for _ in range(draw.randrange(3)):
            assert active.packed.number == number, "an adapter changed in use"
        self.served += 1
        self.bank.release(active)

    def watch(self, draw: random.Random) -> None:
        self.most = max(self.most, self.bank.status().bytes)
        # Beside the budget: one that is being read, and one that gave way and is not freed yet, a thread.
        held = len(Packed.alive)
        assert held <= self.room + 1 + self.threads, f"{held} adapters in memory"

    def run(self) -> None:
        kinds = [self.change] * 2 + [self.request] * 6 + [self.watch]
        self.threads = len(kinds)

        def repeat(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(OPERATIONS // (5 if kinds[seed] == self.change else 1)):
                kinds[seed](draw)

        at_once(repeat, range(self.threads))


@pytest.mark.slow
@pytest.mark.parametrize("room", [1, 3])
def test_names_that_change_meanwhile_never_give_another_adapter(folders, room, monkeypatch):
    # Requests here often do not come back for what they asked for.
    monkeypatch.setattr(bank_module, "STAYS", 0.02)
    stress = Stress(folders, room)
    bank = stress.bank
    stress.run()
    assert stress.served > OPERATIONS / 2 and stress.most <= room * stress.size
    assert len(stress.numbers) > CONTENTS, "names were swapped meanwhile"
    assert bank.status().dropped > 0, "some had to give way"
    for name in bank.names():
        bank.remove(name)
    assert bank.status().bytes == 0 and bank.status().versions == 0
    bank.close()
