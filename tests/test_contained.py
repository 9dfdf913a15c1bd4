"""Links in folders, and names that the user gave: small things that decide what is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deltaw import contained
from deltaw.contained import lies_in, remember_named, require_contained, was_named
from deltaw.errors import UserError
from deltaw.hub.folders import shards_of


def _tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    return root


def refused(folder: Path, name: str, **how: object) -> None:
    with pytest.raises(UserError, match=f"'{re.escape(name)}' is a link"):
        require_contained(folder, **how)


def test_links_inside_a_folder_may_be_and_those_out_of_it_may_not(tmp_path):
    folder = _tree(tmp_path / "folder", "a", "inside/b", "additional_chat_templates/rag.jinja")
    _tree(tmp_path, "c")
    (folder / "link").symlink_to("inside/b")
    (folder / "dangling").symlink_to("nowhere")
    (tmp_path / "other").symlink_to(folder)  # a folder may itself be reached by a link
    for whole in (folder, tmp_path / "other", tmp_path / "not there"):
        require_contained(whole)
    for name, target in {
        "out": "../c",
        "self": "self",
        "gone": "../gone",
        "additional_chat_templates/other.jinja": "../../c",
    }.items():
        (folder / name).symlink_to(target)
        refused(folder, name)
        (folder / name).unlink()
    (folder / "chain").symlink_to("inside/out")
    (folder / "inside" / "out").symlink_to(tmp_path / "c")
    refused(folder, "chain")
    (folder / "chain").unlink()
    require_contained(folder)  # what lies deeper is not read
    refused(folder, "inside/out", all_of_it=True)
    require_contained(folder, among=[folder / "a", folder / "link"])


def test_the_layout_of_a_hubs_cache_is_known(tmp_path):
    model = _tree(tmp_path / "models--owner--name", "blobs/1", "snapshots/abc/README.md", "secret")
    snapshot = model / "snapshots" / "abc"
    (snapshot / "config.json").symlink_to("../../blobs/1")
    require_contained(snapshot)
    (model / "blobs" / "2").symlink_to("../secret")
    (snapshot / "weights").symlink_to("../../blobs/2")
    refused(snapshot, "weights")
    (snapshot / "weights").unlink()
    model.rename(tmp_path / "something--else")
    refused(tmp_path / "something--else" / "snapshots" / "abc", "config.json")


def test_what_lies_in_a_folder_by_name(tmp_path):
    folder = _tree(tmp_path / "folder", "a")
    (folder / "out").symlink_to(tmp_path)
    assert lies_in(folder, "a") and lies_in(folder, "inside/not there")
    for name in ("../folder/a", str(folder / "a"), "inside/../../x", "out/x"):
        assert not lies_in(folder, name)


def test_names_are_known_in_any_spelling_of_their_path(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    _tree(tmp_path, "base/config.json")
    (tmp_path / "other").symlink_to("base")
    remember_named("model", "base")
    remember_named("model", "base")
    for spelling in ("base", "./base", str(tmp_path / "base"), "other"):
        assert was_named("model", spelling)
    assert not was_named("model", "owner/base") and not was_named("data", "base")
    remember_named("data", [{"from": "a.jsonl", "weight": 2}])
    assert was_named("data", [{"weight": 2, "from": "a.jsonl"}])
    kept = (tmp_path / "cache" / "named").read_text()
    assert len(kept.splitlines()) == 2 and "base" not in kept


def test_without_a_cache_nothing_is_known_and_nothing_fails(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "file"))
    remember_named("model", "base")
    assert not was_named("model", "base")


def test_a_host_is_not_asked_for_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contained.os.path, "exists", lambda path: pytest.fail(path))
    for name in ("//host/share", "\\\\host\\share"):
        assert not was_named("model", name)


def test_shards_are_beside_their_index(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one", "b": "two", "c": "one"}}))
    assert shards_of(index) == ["one", "two"]
    for name in ("/etc/passwd", "../one", "inside/one", "..", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="not in the model's folder"):
            shards_of(index)
