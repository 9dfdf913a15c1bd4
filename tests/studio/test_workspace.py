"""Paths, uploads and drafts of a studio."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from collections import namedtuple

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
from deltaw.errors import UserError
from deltaw.studio.jobs import JobQueue
from deltaw.studio.workspace import Workspace
from tests.studio.client import connect

JSON = {"Accept": "application/json"}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    (tmp_path / "outside.csv").write_text("secret")
    return Workspace(tmp_path / "studio", 1000)


def files(workspace: Workspace) -> list[str]:
    return sorted(file.name for file in workspace.folder.iterdir() if file.is_file())


@pytest.mark.parametrize(
    "text", ["../outside.csv", "/etc/passwd", ".studio", ".studio/session", "a/../../outside.csv", "missing.csv",
             "link.csv", "hidden-link", "a\0b", "\ud800", "loop", ".", "", "a" * 5000])  # fmt: skip
def test_paths_outside_of_the_folder_are_rejected(workspace, tmp_path, text) -> None:
    (workspace.folder / ".studio").mkdir()
    (workspace.folder / ".studio" / "session").write_text("secret")
    (workspace.folder / "link.csv").symlink_to(tmp_path / "outside.csv")
    (workspace.folder / "hidden-link").symlink_to(workspace.folder / ".studio")
    (workspace.folder / "loop").symlink_to(workspace.folder / "loop")
    with pytest.raises(UserError):
        workspace.path(text)


def test_path_inside_of_the_folder(workspace) -> None:
    file = workspace.folder / "below" / "rows.csv"
    file.parent.mkdir()
    file.touch()
    assert workspace.path("below/rows.csv") == file and workspace.relative(file) == "below/rows.csv"


def test_listed_files_contain_rows(workspace, tmp_path) -> None:
    for name in (
        "rows.csv",
        "table.xlsx",
        "old.jsonl.gz",
        "notes.txt",
        ".hidden.csv",
        "runs/a/skipped.jsonl",
        "in/b.csv",
    ):
        file = workspace.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (workspace.folder / "link.csv").symlink_to(tmp_path / "outside.csv")
    names = {workspace.relative(file) for file in workspace.data_files()}
    assert names == {"rows.csv", "table.xlsx", "old.jsonl.gz", "in/b.csv"}


def test_upload_creates_a_draft_and_never_overwrites(client) -> None:
    for number in ("", "-2", "-3"):
        response = client.put("/files/my rows.csv", content=b"a,b\n1,2\n" * 10)
        assert response.status_code == 200 and response.json()["url"].endswith("/data")
        draft = client.studio.workspace.draft(response.json()["url"].split("/")[2])
        assert draft.settings == {"data": {"train": f"my rows{number}.csv"}}
        assert (client.studio.workspace.folder / draft.rows).read_bytes() == b"a,b\n1,2\n" * 10
        assert client.get(response.json()["url"]).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "%EA%9F%90" * 70 + ".csv",
        "a.exe",
        "..%2Frows.csv.sh",
        ".hidden.csv",
        "a%00.csv",
        "%3Cb%3E.csv",
        "a" * 201 + ".csv",
    ],
)
def test_names_of_uploads_are_limited(client, name) -> None:
    response = client.put(f"/files/{name}", content=b"a", headers=JSON)
    assert response.status_code in (400, 404)
    assert files(client.studio.workspace) == []


@pytest.mark.parametrize("name", ["it's; a %23 list.csv", "a" * 190 + ".csv"])
def test_unusual_names_of_uploads_are_accepted(client, name: str) -> None:
    response = client.put(f"/files/{name}", content=b"text,label\na,b\n", headers=JSON)
    assert response.status_code == 200, response.text
    assert files(client.studio.workspace) == [name.replace("%23", "#")]


@pytest.mark.parametrize(("name", "reason"), [("a%22b.csv", "contains"), ("a" * 201 + ".csv", "too long")])
def test_rejected_name_of_an_upload_has_a_reason(client, name: str, reason: str) -> None:
    response = client.put(f"/files/{name}", content=b"text,label\na,b\n", headers=JSON)
    assert response.status_code == 400 and reason in response.text


def test_large_upload_is_rejected_by_its_length_and_by_its_content(client) -> None:
    for content in (b"a" * 10_001, iter([b"a" * 1000] * 11)):
        response = client.put("/files/a.csv", content=content, headers=JSON)
        assert response.status_code == 413 and "copy it to" in response.json()["error"]["hint"]
        assert files(client.studio.workspace) == []


def test_upload_leaves_space_on_the_disk(client, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    response = client.put("/files/a.csv", content=b"a", headers=JSON)
    assert response.status_code == 400 and "almost full" in response.json()["error"]["message"]


def test_full_disk_is_reported(client, monkeypatch) -> None:
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Workspace, "create_draft", full)
    response = client.put("/files/a.csv", content=b"a", headers=JSON)
    assert response.status_code == 400 and "disk is full" in response.json()["error"]["message"]


def test_interrupted_upload_leaves_no_file(workspace) -> None:
    async def body():
        yield b"a,b\n"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        asyncio.run(workspace.save_upload("a.csv", body(), None))
    assert files(workspace) == []


def test_leftovers_are_removed_only_by_the_studio_that_locks_the_folder(workspace) -> None:
    first = JobQueue(workspace)
    second = JobQueue(Workspace(workspace.folder))
    workspace.partial_file().touch()  # of a studio that was killed
    first.start()
    assert files(workspace) == []
    upload = workspace.partial_file()
    upload.touch()
    with pytest.raises(UserError, match="another studio"):
        second.start()
    first.close()
    assert upload.is_file()


@pytest.mark.skipif(os.name != "posix", reason="locks of folders")
def test_studio_of_another_user_locks_the_folder(workspace, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache of another user"))
    first, second, third = (JobQueue(w) for w in (workspace, Workspace(workspace.folder), Workspace(workspace.folder)))
    assert first._workspace.state != second._workspace.state
    first.start()
    with pytest.raises(UserError, match="another studio"):
        second.start()
    first.close()
    third.start()
    third.close()


def test_state_is_outside_of_the_folder_and_only_readable_by_the_user(tmp_path) -> None:
    command = {"arguments": ["train", "settings.yaml"], "state": "queued", "process": None, "order": 0, "stops": 0}
    labels = {"identity": "a" * 12, "verb": "train", "title": "x", "run": None, "output": None, "draft": None}
    for name, text in (
        (f"jobs/{'a' * 12}/job.json", json.dumps({**command, **labels, "created": 0})),
        (f"drafts/{'b' * 12}.json", json.dumps({"settings": {}, "preview": None, "changed": 0})),
        ("session", "attacker-knows-this-secret"),
    ):
        file = tmp_path / ".studio" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    client = connect(tmp_path)
    workspace = client.studio.workspace
    assert JobQueue(workspace).jobs() == [] == workspace.drafts()
    assert client.cookies["deltaw-studio-7860"] != "attacker-knows-this-secret"
    assert not workspace.state.is_relative_to(workspace.folder)
    if os.name == "posix":
        assert workspace.state.stat().st_mode & 0o77 == 0
    assert Workspace(tmp_path / "other").state != workspace.state == Workspace(tmp_path / "other" / "..").state


def test_draft_keeps_its_settings(workspace) -> None:
    draft = workspace.create_draft(workspace.folder / "rows.csv")
    draft.set("train.epochs", 3)
    draft.set("model", "some/model")
    draft.set("train.seed", None)
    draft.save()
    stored = workspace.draft(draft.identity)
    assert stored.settings == {"data": {"train": "rows.csv"}, "train": {"epochs": 3}, "model": "some/model"}
    stored.set("train.epochs", None)
    stored.save()
    assert [d.settings for d in workspace.drafts()] == [
        {"data": {"train": "rows.csv"}, "train": {}, "model": "some/model"}
    ]


@pytest.mark.parametrize("identity", ["..", "000000000000", "../session", "x" * 12])
def test_missing_draft(workspace, identity) -> None:
    with pytest.raises(UserError):
        workspace.draft(identity)


def test_damaged_draft_does_not_block_the_start_page(client, capsys) -> None:
    workspace = client.studio.workspace
    for number, text in enumerate(
        (
            "",
            "[]",
            "[" * 100_000,
            '{"settings": 3}',
            '{"settings": {"data": 3}, "preview": null, "changed": 1}',
            '{"settings": {"data": {}, "model": 5}, "changed": 1}',
            '{"settings": {"data": {}, "task": ["x"]}}',
            '{"settings": {"data": {}}, "changed": "x"}',
            '{"settings": {"data": {}}, "preview": [1]}',
        )
    ):
        (workspace.state / "drafts" / f"{number:012x}.json").write_text(text)
    future = workspace.state / "drafts" / f"{'f' * 12}.json"
    future.write_text('{"settings": {"data": {"train": "later.csv"}}, "changed": 1e300}')
    for _ in range(2):
        assert "later.csv" in client.get("/").text
    assert capsys.readouterr().err.count("note: skipped ") == 9
    for page in ("data", "model", "settings"):
        assert client.get(f"/drafts/{5:012x}/{page}").status_code == 400


def test_config_has_absolute_paths_and_rejects_code(workspace) -> None:
    (workspace.folder / "rows.csv").write_text("a,b\n1,2\n")
    draft = workspace.create_draft(workspace.folder / "rows.csv")
    draft.settings |= {"model": "some/model", "output": "runs/first"}
    config = workspace.config(draft)
    assert config["data"]["train"] == str(workspace.folder / "rows.csv")
    assert config["output"] == str(workspace.folder / "runs" / "first")
    for key, value in (
        ("data.train", "../outside.csv"),
        ("data.eval", ".hidden.csv"),
        ("trust_remote_code", True),
        ("output", "/tmp/x"),
    ):
        changed = workspace.create_draft(workspace.folder / "rows.csv")
        changed.settings |= {"model": "some/model"}
        changed.set(key, value)
        with pytest.raises(UserError):
            workspace.config(changed)


def test_form_is_limited(client) -> None:
    for fields in ({"file": "a" * 2**21}, {f"f{n}": "" for n in range(600)}):
        assert client.post("/drafts", data=fields, headers=JSON).status_code == 400


def test_draft_is_deleted_and_its_file_stays(client) -> None:
    draft = client.put("/files/a.csv", content=b"a").json()["url"].split("/")[2]
    assert "a.csv" in client.get("/").text
    assert client.post(f"/drafts/{draft}/delete").status_code == 303
    assert client.studio.workspace.drafts() == [] and (client.studio.workspace.folder / "a.csv").is_file()


def test_names_are_escaped(tmp_path) -> None:
    client = connect(tmp_path)
    (tmp_path / "<script>alert(1)<").mkdir()
    (tmp_path / "<script>alert(1)<" / "a.csv").touch()
    assert "<script>alert" not in client.get("/").text
