"""The cache returns an entry only if its inputs and dependencies are unchanged."""

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

from deltaw.cache import keys, results
from deltaw.cache.entries import Cache
from deltaw.cache.keys import key, versions
from deltaw.cache.results import compute_for_files, file_digest, load_result, result_digest, store_result
from deltaw.errors import UserError
from tests.caches import fake_version, modify_source
from tests.test_structure import SOURCE, all_imports

DEPENDENCIES = ("numpy", "deltaw.errors", "deltaw.hub")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Keys


@pytest.mark.parametrize("change", ["version", "errors.py", "hub/transformers_private.py"])
def test_key_includes_dependencies(change, tmp_path, monkeypatch):
    before = key("kind", {"a": 1}, DEPENDENCIES)
    store_result("kind", {"a": 1}, [1, 2], DEPENDENCIES)
    assert load_result("kind", {"a": 1}, DEPENDENCIES) == [1, 2]
    if change == "version":
        fake_version(monkeypatch, "numpy")
    else:
        modify_source(monkeypatch, tmp_path / "source", change)
    assert key("kind", {"a": 1}, DEPENDENCIES) != before
    assert load_result("kind", {"a": 1}, DEPENDENCIES) is None and result_digest("kind", {"a": 1}, DEPENDENCIES) is None


def test_key_includes_compiled_libraries(tmp_path, monkeypatch):
    modify_source(monkeypatch, tmp_path / "source", "version.py")
    before = key("kind", [], ["deltaw.kernels"])
    (tmp_path / "source" / "kernels" / "_native_new.so").write_bytes(b"another")
    keys._hash_of_module.cache_clear()
    assert key("kind", [], ["deltaw.kernels"]) != before


def test_key_depends_on_kind_parts_and_listed_dependencies_only(tmp_path, monkeypatch):
    expected = key("kind", {"a": 1, "b": 2}, DEPENDENCIES)
    assert expected == key("kind", {"b": 2, "a": 1}, DEPENDENCIES)
    others = {key("other", {"a": 1, "b": 2}, DEPENDENCIES), key("kind", {"a": 2, "b": 2}, DEPENDENCIES)}
    assert len({expected} | others) == 3
    fake_version(monkeypatch, "torch")
    modify_source(monkeypatch, tmp_path / "source", "kernels/rows.py")
    assert key("kind", {"a": 1, "b": 2}, DEPENDENCIES) == expected


def test_every_listed_dependency_exists():
    """A misspelled name would never change."""
    paths = [path for path in keys.SOURCE.rglob("*.py") if re.search(r"(?m)^CACHE_DEPENDENCIES = ", path.read_text())]
    assert len(paths) > 6
    for path in paths:
        name = ".".join(["deltaw", *path.relative_to(keys.SOURCE).with_suffix("").parts])
        for dependency, state in versions(importlib.import_module(name).CACHE_DEPENDENCIES).items():
            assert state != "absent", f"{path}: {dependency}"


def test_row_dependencies_include_all_modules_that_read_rows():
    """Modules that ``data`` imports must be dependencies, except those for batches, file lookup, CPUs and settings."""
    from deltaw.data.row_cache_keys import CACHE_DEPENDENCIES

    exempt = {
        "kernels",
        "errors",
        "atomic_files",
        "cache",
        "untrusted_paths",
        "user_references",
        "progress",
        "platforms",
    }
    exempt |= {"settings.registry", "settings.task_registry", "settings.fields", "settings.local_names"}
    exempt |= {"child_process", "worker_process", "hub.packages", "hub.folders", "hub.hub_errors"}
    exempt |= {"machine.choices", "machine.memory", "lora.config"}
    used = {i.target for i in all_imports(SOURCE)[1] if i.module.startswith("deltaw.data")}
    used -= {"deltaw.hub"}  # only a name is imported
    for target in sorted(target for target in used if target.startswith("deltaw.")):
        bare = target.removeprefix("deltaw.")
        is_dependency = any(f"{target}.".startswith(f"{dependency}.") for dependency in CACHE_DEPENDENCIES)
        assert is_dependency or bare in exempt or bare.partition(".")[0] in exempt, target


# Files


def test_file_result_is_cached_until_change_and_rejects_concurrent_change(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "MIN_FILE_AGE", -1.0)
    file = tmp_path / "file"
    file.write_text("one")
    times = file.stat()
    make = Mock(side_effect=file.read_text)
    assert [compute_for_files("kind", [file], make) for _ in range(3)] == ["one"] * 3 and make.call_count == 1
    time.sleep(0.02)
    with file.open("r+") as out:
        out.write("two")  # same size, inode and modification time
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert compute_for_files("kind", [file], make) == "two"
    with pytest.raises(UserError, match="changes while it is read"):
        compute_for_files("other", [file], lambda: file.write_text("longer"))


def test_digest_covers_the_full_file_at_any_size(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(file) == expected
    monkeypatch.setattr(results, "MIN_CACHED_BYTES", 0)
    monkeypatch.setattr(results, "MIN_FILE_AGE", -1.0)
    assert file_digest(file) == file_digest(file) == expected
    assert len(list((keys.root() / "remembered" / "files").glob("*.json"))) == 1


def test_unwritable_folder_disables_the_cache(folder):
    folder.write_text("a file")
    store_result("kind", [], 1)
    assert load_result("kind", []) is None


# Large entries


def make_entry(cache: Cache, name: str, age: int) -> None:
    """Create an entry of 100 bytes with the given age of its last use."""
    path = cache.folder / name
    path.mkdir(parents=True)
    (path / "values").write_bytes(bytes(100))
    os.utime(path, (1000 - age, 1000 - age))


def entry_names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.is_dir())


def test_eviction_removes_least_recently_used_unlocked_entries():
    large = Cache("large", 250, mark="{}")
    for age, name in enumerate(["new", "middle", "old", "oldest"]):
        make_entry(large, name, age)
    lock = large.lock("oldest")
    large.touch("old")
    assert large.evict() == 200 and entry_names(large) == ["old", "oldest"]
    lock.release()
    assert large.evict(needed=200, exclude="oldest") == 100 and entry_names(large) == ["oldest"]
    assert large.evict(min_free_bytes=2**62) == 0 and entry_names(large) == []


def test_eviction_removes_unlocked_temporary_folders():
    large = Cache("large", 250, mark="{}")
    lock = large.lock("working")
    for name in (".gone.x.part", ".working.x.part"):
        (large.folder / name).mkdir()
    large.evict()
    assert entry_names(large) == [".working.x.part"]
    assert large.try_lock("working") is None
    lock.release()
    lock = large.lock("working")
    large.evict(exclude="working")
    lock.release()
    assert entry_names(large) == []


def test_second_lock_owner_is_notified_and_waits():
    large = Cache("large", 250)
    first = large.lock("a")
    notified = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(large.lock, "a", notified.set)
        assert notified.wait(20) and not second.done()
        first.release()
        second.result(20).release()
