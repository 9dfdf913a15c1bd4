"""Tests of the adapter bank: which adapters are in memory, and the effect of changes on active requests."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass

import pytest
import torch

from deltaw.decoding import bank as bank_module
from deltaw.decoding.adapters import ActiveAdapter
from deltaw.decoding.bank import AdapterBank
from deltaw.errors import UserError
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.serving.adapter_folders import write_lora, write_soft_prompt
from tests.serving.http.concurrency import run_in_threads, wait_until


@dataclass(frozen=True)
class PackedFactors:
    """Factors stored without conversion, in place of the decoder's packed form."""

    layers: dict

    @property
    def bytes(self) -> int:
        return sum(f.lora_A.nbytes + f.lora_B.nbytes for f in self.layers.values())


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Four adapters of equal size, "a" to "d"."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_lora(model, root / name, seed=seed) for seed, name in enumerate("abcd")}


@pytest.fixture(scope="module")
def size(model, folders):
    """Size of one adapter in bytes."""
    bank = AdapterBank(model, None, PackedFactors, budget_bytes=1 << 30)
    bank.add("a", folders["a"])
    return bank.status().bytes


@pytest.fixture
def make_bank(model, folders):
    """Return a factory of banks with the named adapters, which are closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(names: str = "", budget: int = 1 << 30) -> AdapterBank:
            bank = AdapterBank(model, byte_tokenizer(), PackedFactors, budget_bytes=budget)
            stack.enter_context(contextlib.closing(bank))
            for name in names:
                bank.add(name, folders[name])
            return bank

        yield make


def wait_for_adapter(bank: AdapterBank, name: str) -> ActiveAdapter:
    """Wait until the adapter is in memory and return it."""
    acquired: list[ActiveAdapter] = []
    assert wait_until(lambda: (active := bank.acquire(name)) is not None and not acquired.append(active))
    return acquired[0]


def first_factor(active) -> torch.Tensor:
    return next(iter(active.packed.layers.values())).lora_A


def have_equal_factors(first, second) -> bool:
    return torch.equal(first_factor(first), first_factor(second))


def test_soft_prompt_has_rows_and_no_factors(make_bank, model, tmp_path):
    bank = make_bank()
    bank.add("soft", write_soft_prompt(model, tmp_path, length=4))
    active = wait_for_adapter(bank, "soft")
    assert active.info is bank.info("soft") and active.info.folder == tmp_path
    assert active.packed is None and active.soft_prompt.shape == (4, 32)
    assert bank.status().bytes == 4 * 32 * 4


def test_rejected_operations_change_nothing(make_bank, model, folders, tmp_path):
    bank = make_bank()
    bank.add("alpha", folders["a"])
    before = wait_for_adapter(bank, "alpha")
    status = bank.status()
    dora = write_lora(model, tmp_path, dora=True)
    b = folders["b"]
    cases = [(bank.add, (name, b), "is not a valid adapter name") for name in ("", " alpha", "a\nb", "x" * 300)]
    cases += [(bank.acquire, ("alpa",), "did you mean 'alpha'"), (bank.remove, ("beta",), "no adapter 'beta'")]
    cases += [(bank.swap, ("beta", b), "no adapter 'beta'"), (bank.swap, ("alpha", dora), "DoRA")]
    cases += [(bank.add, ("alpha", b), "already"), (bank.add, ("b", dora), "DoRA")]
    for operation, arguments, message in cases:
        with pytest.raises(UserError, match=message):
            operation(*arguments)
    assert (bank.names(), bank.status(), wait_for_adapter(bank, "alpha").number) == (("alpha",), status, before.number)


def test_least_recently_used_adapter_is_evicted_and_reloaded(make_bank, folders, size):
    bank = make_bank("ab", 2 * size)
    a = wait_for_adapter(bank, "a")
    bank.release(a)
    bank.add("c", folders["c"])  # evicts "b", the least recently used
    assert (bank.status().loaded, bank.status().dropped) == (2, 1)
    loads = bank.status().loads
    for name, read in (("a", 0), ("b", 1), ("c", 2)):  # "a" is resident until "c" evicts it
        bank.release(wait_for_adapter(bank, name))
        assert bank.status().loads == loads + read
    again = wait_for_adapter(bank, "a")
    assert again.number == a.number, "the same content is the same version"
    assert have_equal_factors(again, a) and again.packed is not a.packed and bank.status().bytes <= 2 * size


def test_adapter_in_use_is_not_evicted(make_bank, size):
    bank = make_bank("ab", size)  # the budget allows one adapter
    a = wait_for_adapter(bank, "a")
    for _ in range(20):
        assert bank.acquire("b") is None, "memory is occupied by an adapter in use"
        time.sleep(0.005)
    assert bank.status().bytes == size
    bank.release(a)
    assert not have_equal_factors(wait_for_adapter(bank, "b"), a)


def test_concurrently_requested_adapters_do_not_evict_each_other(make_bank, size):
    bank = make_bank("abc", size)
    assert bank.acquire("a") is None, "loading must not block the caller"
    for _ in range(3):
        waiting = {"a", "b", "c"}

        def served(waiting: set[str] = waiting) -> bool:
            for name in sorted(waiting):
                if (active := bank.acquire(name)) is not None:
                    bank.release(active)
                    waiting.remove(name)
            return not waiting

        assert wait_until(served)
    assert bank.status().loads <= 3 + 9


def test_abandoned_request_does_not_block_other_adapters(make_bank, size, monkeypatch):
    monkeypatch.setattr(bank_module, "MIN_RESIDENT_SECONDS", 0.1)
    bank = make_bank("ab", size)
    bank.acquire("a")  # a request that is never repeated
    assert wait_for_adapter(bank, "b") is not None


def test_removed_adapter_is_freed_after_last_request(make_bank):
    bank = make_bank("a")
    first = wait_for_adapter(bank, "a")
    second = wait_for_adapter(bank, "a")
    bank.remove("a")
    assert bank.names() == ()
    with pytest.raises(UserError, match="no adapter 'a'"):
        bank.acquire("a")
    for active, versions in (first, 1), (second, 0):
        bank.release(active)
        assert bank.status().versions == versions and (bank.status().bytes > 0) == (versions > 0)


def test_swap_creates_new_version(make_bank, folders):
    bank = make_bank("a")
    before = wait_for_adapter(bank, "a")
    factor = first_factor(before)
    bank.swap("a", folders["b"])
    after = wait_for_adapter(bank, "a")
    assert after.number != before.number and not have_equal_factors(after, before)
    assert first_factor(before) is factor, "an active request must not change its adapter"
    assert bank.status().versions == 2
    bank.release(before)
    assert bank.status().versions == 1


def test_changed_folder_is_rejected_until_swapped(make_bank, model, folders, size, tmp_path):
    bank = make_bank(budget=size)
    bank.add("x", write_lora(model, tmp_path, seed=5))
    before = wait_for_adapter(bank, "x")
    bank.release(before)
    bank.add("a", folders["a"])  # evicts "x"
    write_lora(model, tmp_path, seed=6)
    with pytest.raises(UserError, match="changed after it was added"):
        wait_for_adapter(bank, "x")
    bank.release(wait_for_adapter(bank, "a"))  # other adapters are unaffected
    bank.swap("x", tmp_path)
    assert bank.names() == ("x", "a") and not have_equal_factors(wait_for_adapter(bank, "x"), before)


def test_recopied_folder_has_same_version(make_bank, folders, size, tmp_path):
    bank = make_bank(budget=size)
    bank.add("x", shutil.copytree(folders["a"], tmp_path / "x"))
    before = wait_for_adapter(bank, "x")
    bank.release(before)
    bank.add("b", folders["b"])  # evicts "x"
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(UserError, match="no adapter folder"):
        wait_for_adapter(bank, "x")
    shutil.copytree(folders["a"], tmp_path / "x")
    assert wait_for_adapter(bank, "x").number == before.number


def test_adapter_larger_than_budget_is_rejected(make_bank, model, folders, size, tmp_path):
    with pytest.raises(UserError, match="no room"):
        make_bank(budget=2 * size).add("wide", write_lora(model, tmp_path, rank=16))
    small = make_bank(budget=size // 8)
    with pytest.raises(UserError, match="no room"):
        small.add("a", folders["a"])
    assert small.status().loads == 0, "its files must not be read"


def test_waiting_request_fails_when_bank_closes(make_bank, size):
    bank = make_bank("ab", size)
    wait_for_adapter(bank, "a")
    assert bank.acquire("b") is None
    bank.close()
    with pytest.raises(UserError, match="the server is shutting down"):
        bank.acquire("b")


def test_concurrent_adds_of_a_name_succeed_once(make_bank, folders):
    bank = make_bank()

    def add_fails(_: int) -> bool:
        try:
            bank.add("a", folders["a"])
        except UserError:
            return True
        return False

    assert sum(run_in_threads(add_fails, range(6))) == 5 and bank.status().loads == 1
