"""Links in folders, and references named by the user, which decide which files are read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deltaw import user_references
from deltaw.errors import UserError
from deltaw.hub.shards import shard_names
from deltaw.untrusted_paths import is_inside, require_contained
from deltaw.user_references import record_reference, was_referenced


def _tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    return root


def assert_rejected(folder: Path, name: str, **options: object) -> None:
    with pytest.raises(UserError, match=f"'{re.escape(name)}' is a link"):
        require_contained(folder, **options)


def test_links_inside_a_folder_are_accepted_and_outside_rejected(tmp_path):
    folder = _tree(tmp_path / "folder", "a", "inside/b", "additional_chat_templates/rag.jinja")
    _tree(tmp_path, "c")
    (folder / "link").symlink_to("inside/b")
    (folder / "dangling").symlink_to("nowhere")
    (tmp_path / "other").symlink_to(folder)  # the folder itself may be a link
    for path in (folder, tmp_path / "other", tmp_path / "not there"):
        require_contained(path)
    for name, target in {
        "out": "../c",
        "self": "self",
        "gone": "../gone",
        "additional_chat_templates/other.jinja": "../../c",
    }.items():
        (folder / name).symlink_to(target)
        assert_rejected(folder, name)
        (folder / name).unlink()
    (folder / "chain").symlink_to("inside/out")
    (folder / "inside" / "out").symlink_to(tmp_path / "c")
    assert_rejected(folder, "chain")
    (folder / "chain").unlink()
    require_contained(folder)  # subfolders are not read
    assert_rejected(folder, "inside/out", recursive=True)
    require_contained(folder, only=[folder / "a", folder / "link"])


def test_hub_cache_layout_is_accepted(tmp_path):
    model = _tree(tmp_path / "models--owner--name", "blobs/1", "snapshots/abc/README.md", "secret")
    snapshot = model / "snapshots" / "abc"
    (snapshot / "config.json").symlink_to("../../blobs/1")
    require_contained(snapshot)
    (model / "blobs" / "2").symlink_to("../secret")
    (snapshot / "weights").symlink_to("../../blobs/2")
    assert_rejected(snapshot, "weights")
    (snapshot / "weights").unlink()
    model.rename(tmp_path / "something--else")
    assert_rejected(tmp_path / "something--else" / "snapshots" / "abc", "config.json")


def test_is_inside_checks_names(tmp_path):
    folder = _tree(tmp_path / "folder", "a")
    (folder / "out").symlink_to(tmp_path)
    assert is_inside(folder, "a") and is_inside(folder, "inside/not there")
    for name in ("../folder/a", str(folder / "a"), "inside/../../x", "out/x"):
        assert not is_inside(folder, name)


def test_references_match_any_spelling_of_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    _tree(tmp_path, "base/config.json")
    (tmp_path / "other").symlink_to("base")
    record_reference("model", "base")
    record_reference("model", "base")
    for spelling in ("base", "./base", str(tmp_path / "base"), "other"):
        assert was_referenced("model", spelling)
    assert not was_referenced("model", "owner/base") and not was_referenced("data", "base")
    record_reference("data", [{"from": "a.jsonl", "weight": 2}])
    assert was_referenced("data", [{"weight": 2, "from": "a.jsonl"}])
    stored = (tmp_path / "cache" / "named").read_text()
    assert len(stored.splitlines()) == 2 and "base" not in stored


def test_unusable_cache_records_no_references(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "file"))
    record_reference("model", "base")
    assert not was_referenced("model", "base")


def test_network_share_is_not_accessed(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(user_references.os.path, "exists", lambda path: pytest.fail(path))
    for name in ("//host/share", "\\\\host\\share"):
        assert not was_referenced("model", name)


def test_shards_must_be_in_the_folder_of_the_index(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one", "b": "two", "c": "one"}}))
    assert shard_names(index) == ["one", "two"]
    for name in ("/etc/passwd", "../one", "inside/one", "..", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="not in the model's folder"):
            shard_names(index)
