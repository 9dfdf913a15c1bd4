"""Links in folders, and names that the user gave: small things that decide what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaw import contained
from deltaw.contained import lies_in, remember_named, require_contained, was_named
from deltaw.errors import UserError


def _tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    return root


def test_links_inside_a_folder_may_be_and_those_out_of_it_may_not(tmp_path):
    folder = _tree(tmp_path / "folder", "a", "inside/b")
    _tree(tmp_path, "c")
    (folder / "link").symlink_to("inside/b")
    (folder / "dangling").symlink_to("nowhere")
    require_contained(folder)
    (folder / "out").symlink_to("../c")
    with pytest.raises(UserError, match="'out' is a link"):
        require_contained(folder)
    (folder / "out").unlink()
    (folder / "chain").symlink_to("inside/out")
    (folder / "inside" / "out").symlink_to(tmp_path / "c")
    with pytest.raises(UserError, match="'chain' is a link"):
        require_contained(folder)
    (folder / "chain").unlink()
    require_contained(folder)  # what lies deeper is not read
    with pytest.raises(UserError, match="'inside/out' is a link"):
        require_contained(folder, all_of_it=True)
    require_contained(folder, among=[folder / "a", folder / "link"])


def test_a_link_to_itself_and_one_to_nowhere_outside_are_refused(tmp_path):
    folder = _tree(tmp_path / "folder", "a")
    (folder / "self").symlink_to("self")
    with pytest.raises(UserError, match="'self' is a link"):
        require_contained(folder)
    (folder / "self").unlink()
    (folder / "gone").symlink_to("../gone")
    with pytest.raises(UserError, match="'gone' is a link"):
        require_contained(folder)


def test_a_folder_may_itself_be_reached_by_a_link(tmp_path):
    folder = _tree(tmp_path / "folder", "a")
    (folder / "link").symlink_to(folder / "a")
    (tmp_path / "other").symlink_to(folder)
    require_contained(tmp_path / "other")
    require_contained(tmp_path / "not there")


def test_templates_in_a_folder_of_their_own_are_looked_at(tmp_path):
    folder = _tree(tmp_path / "folder", "additional_chat_templates/rag.jinja")
    _tree(tmp_path, "text")
    require_contained(folder)
    (folder / "additional_chat_templates" / "other.jinja").symlink_to(tmp_path / "text")
    with pytest.raises(UserError, match=r"other\.jinja"):
        require_contained(folder)


def test_the_layout_of_a_hubs_cache_is_known(tmp_path):
    model = _tree(tmp_path / "models--owner--name", "blobs/1", "snapshots/abc/README.md", "secret")
    snapshot = model / "snapshots" / "abc"
    (snapshot / "config.json").symlink_to("../../blobs/1")
    require_contained(snapshot)
    (model / "blobs" / "2").symlink_to("../secret")
    (snapshot / "weights").symlink_to("../../blobs/2")
    with pytest.raises(UserError, match="'weights' is a link"):
        require_contained(snapshot)
    (snapshot / "weights").unlink()
    model.rename(tmp_path / "something--else")
    with pytest.raises(UserError, match=r"'config\.json' is a link"):
        require_contained(tmp_path / "something--else" / "snapshots" / "abc")


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

    def asked(path: str) -> bool:
        raise AssertionError(path)

    monkeypatch.setattr(contained.os.path, "exists", asked)
    for name in ("//host/share", "\\\\host\\share"):
        assert not was_named("model", name)


def test_shards_are_beside_their_index(tmp_path):
    from deltaw.hub.folders import shards_of

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one", "b": "two", "c": "one"}}))
    assert shards_of(index) == ["one", "two"]
    for name in ("/etc/passwd", "../one", "inside/one", "..", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="not in the model's folder"):
            shards_of(index)
