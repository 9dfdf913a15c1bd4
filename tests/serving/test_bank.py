"""Adapters by name: what is in memory, what a request keeps, and what a change of a name does to it."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass

import pytest
import torch

from deltaw.errors import UserError
from deltaw.serving import bank as bank_module
from deltaw.serving.adapters import ActiveAdapter
from deltaw.serving.bank import AdapterBank
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.serving.adapter_folders import write_lora, write_soft_prompt
from tests.serving.http.waiting import at_once, until


@dataclass(frozen=True)
class Packed:
    """Factors as they are, which stands for a decoder's form of them."""

    layers: dict

    @property
    def bytes(self) -> int:
        return sum(f.lora_A.nbytes + f.lora_B.nbytes for f in self.layers.values())


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """Four adapters of the same size, "a" to "d"."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: write_lora(model, root / name, seed=seed) for seed, name in enumerate("abcd")}


@pytest.fixture(scope="module")
def size(model, folders):
    """Bytes of one of them."""
    bank = AdapterBank(model, None, Packed, budget_bytes=1 << 30)
    bank.add("a", folders["a"])
    return bank.status().bytes


@pytest.fixture
def bank_of(model, folders):
    """Makes banks with some of the adapters, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(names: str = "", budget: int = 1 << 30) -> AdapterBank:
            bank = AdapterBank(model, byte_tokenizer(), Packed, budget_bytes=budget)
            stack.enter_context(contextlib.closing(bank))
            for name in names:
                bank.add(name, folders[name])
            return bank

        yield make


def had(bank: AdapterBank, name: str) -> ActiveAdapter:
    """An adapter, as soon as it is in memory."""
    found: list[ActiveAdapter] = []
    assert until(lambda: (active := bank.acquire(name)) is not None and not found.append(active))
    return found[0]


def first_factor(active) -> torch.Tensor:
    return next(iter(active.packed.layers.values())).lora_A


def same(one, other) -> bool:
    return torch.equal(first_factor(one), first_factor(other))


def test_a_soft_prompt_has_rows_and_no_factors(bank_of, model, tmp_path):
    bank = bank_of()
    bank.add("soft", write_soft_prompt(model, tmp_path, length=4))
    active = had(bank, "soft")
    assert active.facts is bank.facts("soft") and active.facts.folder == tmp_path
    assert active.packed is None and active.soft_prompt.shape == (4, 32)
    assert bank.status().bytes == 4 * 32 * 4


def test_what_is_refused_changes_nothing(bank_of, model, folders, tmp_path):
    bank = bank_of()
    bank.add("alpha", folders["a"])
    before, status = had(bank, "alpha"), bank.status()
    dora = write_lora(model, tmp_path, dora=True)
    b = folders["b"]
    wrong = [(bank.add, (name, b), "cannot name an adapter") for name in ("", " alpha", "a\nb", "x" * 300)]
    wrong += [(bank.acquire, ("alpa",), "did you mean 'alpha'"), (bank.remove, ("beta",), "no adapter 'beta'")]
    wrong += [(bank.swap, ("beta", b), "no adapter 'beta'"), (bank.swap, ("alpha", dora), "DoRA")]
    wrong += [(bank.add, ("alpha", b), "already"), (bank.add, ("b", dora), "DoRA")]
    for ask, given, says in wrong:
        with pytest.raises(UserError, match=says):
            ask(*given)
    assert (bank.names(), bank.status(), had(bank, "alpha").number) == (("alpha",), status, before.number)


def test_the_least_recently_used_leaves_and_comes_back_as_it_was(bank_of, folders, size):
    bank = bank_of("ab", 2 * size)
    a = had(bank, "a")
    bank.release(a)
    bank.add("c", folders["c"])  # "b" was used before "a"
    assert (bank.status().loaded, bank.status().dropped) == (2, 1)
    loads = bank.status().loads
    for name, read in (("a", 0), ("b", 1), ("c", 2)):  # "a" never left; "c" drives it out
        bank.release(had(bank, name))
        assert bank.status().loads == loads + read
    again = had(bank, "a")
    assert again.number == a.number, "the same content is the same version"
    assert same(again, a) and again.packed is not a.packed and bank.status().bytes <= 2 * size


def test_what_is_in_use_is_not_dropped(bank_of, size):
    bank = bank_of("ab", size)  # "b" is known, but "a" had to go
    a = had(bank, "a")
    for _ in range(20):
        assert bank.acquire("b") is None, "there is no room beside what is used"
        time.sleep(0.005)
    assert bank.status().bytes == size
    bank.release(a)
    assert not same(had(bank, "b"), a)


def test_two_that_are_asked_for_do_not_drive_each_other_out(bank_of, size):
    bank = bank_of("abc", size)
    assert bank.acquire("a") is None, "it is not read on the caller's thread"
    for _ in range(3):
        waiting = {"a", "b", "c"}

        def served(waiting: set[str] = waiting) -> bool:
            for name in sorted(waiting):
                if (active := bank.acquire(name)) is not None:
                    bank.release(active)
                    waiting.remove(name)
            return not waiting

        assert until(served)
    assert bank.status().loads <= 3 + 9


def test_a_demand_that_nobody_follows_up_gives_way(bank_of, size, monkeypatch):
    monkeypatch.setattr(bank_module, "STAYS", 0.1)
    bank = bank_of("ab", size)
    bank.acquire("a")  # and never again
    assert had(bank, "b") is not None


def test_a_removed_adapter_ends_with_its_last_request(bank_of):
    bank = bank_of("a")
    first, second = had(bank, "a"), had(bank, "a")
    bank.remove("a")
    assert bank.names() == ()
    with pytest.raises(UserError, match="no adapter 'a'"):
        bank.acquire("a")
    for active, versions in (first, 1), (second, 0):
        bank.release(active)
        assert bank.status().versions == versions and (bank.status().bytes > 0) == (versions > 0)


def test_a_swapped_adapter_is_another_version(bank_of, folders):
    bank = bank_of("a")
    before = had(bank, "a")
    kept = first_factor(before)
    bank.swap("a", folders["b"])
    after = had(bank, "a")
    assert after.number != before.number and not same(after, before)
    assert first_factor(before) is kept, "a request in hand keeps what it began with"
    assert bank.status().versions == 2
    bank.release(before)
    assert bank.status().versions == 1


def test_a_folder_that_changed_is_refused_until_it_is_swapped(bank_of, model, folders, size, tmp_path):
    bank = bank_of(budget=size)
    bank.add("x", write_lora(model, tmp_path, seed=5))
    before = had(bank, "x")
    bank.release(before)
    bank.add("a", folders["a"])  # "x" leaves
    write_lora(model, tmp_path, seed=6)
    with pytest.raises(UserError, match="not those that were added"):
        had(bank, "x")
    bank.release(had(bank, "a"))  # the others go on
    bank.swap("x", tmp_path)
    assert bank.names() == ("x", "a") and not same(had(bank, "x"), before)


def test_a_folder_that_was_copied_anew_is_the_same(bank_of, folders, size, tmp_path):
    bank = bank_of(budget=size)
    bank.add("x", shutil.copytree(folders["a"], tmp_path / "x"))
    before = had(bank, "x")
    bank.release(before)
    bank.add("b", folders["b"])  # "x" leaves
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(UserError, match="no adapter folder"):
        had(bank, "x")
    shutil.copytree(folders["a"], tmp_path / "x")
    assert had(bank, "x").number == before.number


def test_what_could_never_be_in_memory_is_refused(bank_of, model, folders, size, tmp_path):
    with pytest.raises(UserError, match="no room"):
        bank_of(budget=2 * size).add("wide", write_lora(model, tmp_path, rank=16))
    small = bank_of(budget=size // 8)
    with pytest.raises(UserError, match="no room"):
        small.add("a", folders["a"])
    assert small.status().loads == 0, "its files are not even read"


def test_whoever_waits_is_told_when_the_bank_closes(bank_of, size):
    bank = bank_of("ab", size)
    had(bank, "a")
    assert bank.acquire("b") is None
    bank.close()
    with pytest.raises(UserError, match="no more adapters are loaded"):
        bank.acquire("b")


def test_one_name_is_added_once_by_many_threads(bank_of, folders):
    bank = bank_of()

    def refused(_: int) -> bool:
        try:
            bank.add("a", folders["a"])
        except UserError:
            return True
        return False

    assert sum(at_once(refused, range(6))) == 5 and bank.status().loads == 1
