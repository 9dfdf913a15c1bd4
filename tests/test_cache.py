"""The cache: an entry is found again only as long as nothing that it was made from or made by has changed."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from deltaw import cache
from deltaw.cache import Cache, file_digest, key, of_files, recall, remember, stamp, versions
from deltaw.errors import UserError
from tests.caches import other_text, other_version
from tests.test_structure import SOURCE, all_imports

MAKERS = ("numpy", "deltaw.errors", "deltaw.hub")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Keys


@pytest.mark.parametrize("change", ["version", "errors.py", "hub/quiet.py"])
def test_what_makes_an_entry_is_part_of_its_key(change, tmp_path, monkeypatch):
    before = key("kind", {"a": 1}, MAKERS)
    remember("kind", {"a": 1}, [1, 2], MAKERS)
    assert recall("kind", {"a": 1}, MAKERS) == [1, 2]
    if change == "version":
        other_version(monkeypatch, "numpy")
    else:
        other_text(monkeypatch, tmp_path / "source", change)
    assert key("kind", {"a": 1}, MAKERS) != before
    assert recall("kind", {"a": 1}, MAKERS) is None and stamp("kind", {"a": 1}, MAKERS) is None


def test_a_compiled_library_of_a_package_counts_as_its_text_does(tmp_path, monkeypatch):
    other_text(monkeypatch, tmp_path / "source", "version.py")
    before = key("kind", [], ["deltaw.kernels"])
    (tmp_path / "source" / "kernels" / "_native_new.so").write_bytes(b"another")
    cache._hash_of_module.cache_clear()
    assert key("kind", [], ["deltaw.kernels"]) != before


def test_kind_and_parts_count_and_other_makers_do_not(tmp_path, monkeypatch):
    own = key("kind", {"a": 1, "b": 2}, MAKERS)
    assert own == key("kind", {"b": 2, "a": 1}, MAKERS)
    assert len({own, key("other", {"a": 1, "b": 2}, MAKERS), key("kind", {"a": 2, "b": 2}, MAKERS)}) == 3
    other_version(monkeypatch, "torch")
    other_text(monkeypatch, tmp_path / "source", "kernels/rows.py")
    assert key("kind", {"a": 1, "b": 2}, MAKERS) == own


def test_every_maker_that_is_named_is_there():
    """A name with a slip would never change."""
    found = [path for path in cache.SOURCE.rglob("*.py") if re.search(r"(?m)^MADE_BY = ", path.read_text())]
    assert len(found) > 6
    for path in found:
        name = ".".join(["deltaw", *path.relative_to(cache.SOURCE).with_suffix("").parts])
        for maker, state in versions(importlib.import_module(name).MADE_BY).items():
            assert state != "absent", f"{path}: {maker}"


def test_rows_are_made_by_all_that_reads_them():
    """What ``data`` imports of deltaw, but what makes batches, finds files, counts processors or declares settings."""
    from deltaw.data.stored_rows import MADE_BY

    apart = {"kernels", "errors", "durable", "cache", "contained", "working", "registry", "private_names", "platforms"}
    apart |= {"local_names"}
    apart |= {"hub.packages", "hub.folders", "hub.refusals", "machine.processor", "machine.memory", "lora.config"}
    used = {i.target for i in all_imports(SOURCE)[1] if i.module.startswith("deltaw.data")}
    used -= {"deltaw.hub"}  # of which a name is imported
    for target in sorted(target for target in used if target.startswith("deltaw.")):
        bare = target.removeprefix("deltaw.")
        known = any(target == maker or target.startswith(f"{maker}.") for maker in MADE_BY)
        assert known or bare in apart or bare.partition(".")[0] in apart, target


# Files


def test_what_a_file_says_is_remembered_until_it_changes_and_refused_if_it_does_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    file = tmp_path / "file"
    file.write_text("one")
    times = file.stat()
    make = Mock(side_effect=file.read_text)
    assert [of_files("kind", [file], make) for _ in range(3)] == ["one"] * 3 and make.call_count == 1
    time.sleep(0.02)
    with file.open("r+") as out:
        out.write("two")  # as long, in the same inode, and at the same time of change
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert of_files("kind", [file], make) == "two"
    with pytest.raises(UserError, match="changes while it is read"):
        of_files("other", [file], lambda: file.write_text("longer"))


def test_a_digest_is_that_of_the_whole_file_however_large(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    own = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(file) == own
    monkeypatch.setattr(cache, "SMALL", 0)
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    assert file_digest(file) == file_digest(file) == own
    assert len(list((cache.root() / "remembered" / "files").glob("*.json"))) == 1


def test_a_folder_that_cannot_be_written_to_is_as_if_nothing_had_been_remembered(folder):
    folder.write_text("a file")
    remember("kind", [], 1)
    assert recall("kind", []) is None


# Large entries


def entry(cache: Cache, name: str, age: int) -> None:
    """A folder of 100 bytes that was used some time ago."""
    path = cache.folder / name
    path.mkdir(parents=True)
    (path / "values").write_bytes(bytes(100))
    os.utime(path, (1000 - age, 1000 - age))


def names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.is_dir())


def test_the_longest_unused_make_room_but_none_that_is_in_use():
    large = Cache("large", 250, mark="{}")
    for age, name in enumerate(["new", "middle", "old", "oldest"]):
        entry(large, name, age)
    lock = large.lock("oldest")
    large.used("old")
    assert large.make_room() == 200 and names(large) == ["old", "oldest"]
    lock.release()
    assert large.make_room(needed=200, but="oldest") == 100 and names(large) == ["oldest"]
    assert large.make_room(spare=2**62) == 0 and names(large) == []


def test_what_killed_processes_left_is_removed_unless_one_works_on_it():
    large = Cache("large", 250, mark="{}")
    lock = large.lock("working")
    for name in (".gone.x.part", ".working.x.part"):
        (large.folder / name).mkdir()
    large.make_room()
    assert names(large) == [".working.x.part"]
    assert large.try_lock("working") is None
    lock.release()
    lock = large.lock("working")
    large.make_room(but="working")
    lock.release()
    assert names(large) == []


def test_who_comes_second_is_told_and_waits():
    large = Cache("large", 250)
    first, told = large.lock("a"), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(large.lock, "a", told.set)
        assert told.wait(20) and not second.done()
        first.release()
        second.result(20).release()
