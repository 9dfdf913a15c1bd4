"""Images that rows refer to: rows of an agent, of a web page, or from a download stay inside of their folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from deltaw.data import image_files
from deltaw.data.image_files import image_of, read_content
from deltaw.data.pixels import image_rows
from deltaw.data.row_images import take_images
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import open_source, read_rows
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.untrusted_paths import AllowedFolders
from tests.conftest import write_rows
from tests.vision_models import png

PRIVATE = png((220, 10, 10))
OWN = png((10, 10, 220))
OUTSIDE = "outside of the folders that are allowed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with an image, next to a private folder, and a link to it."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "p.png").write_bytes(PRIVATE)
    folder = tmp_path / "agent"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "own.png").write_bytes(OWN)
    (folder / "link.png").symlink_to(tmp_path / "private" / "p.png")
    (folder / "away").symlink_to(tmp_path / "private")
    (folder / "rows").mkdir()
    (folder / "rows" / "d.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def restricted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, to which this process is restricted."""
    for name, value in AllowedFolders((folder.resolve(),)).environment().items():
        monkeypatch.setenv(name, value)
    return folder


def contents(row: dict[str, object], file: Path) -> list[bytes]:
    """Return the encoded images of a row."""
    rows = NumberedRows(str(file), [(str(file), [1], [row])])
    _, images = take_images(row, rows.folder(0), "row 1")
    return [read_content(image.content, image.location) for image in images]


def forms(path: str) -> list[dict[str, object]]:
    """Return rows of all forms that refer to an image."""
    parts = [{"type": "image", name: path} for name in ("image", "path", "url")]
    parts += [{"type": "image_url", "image_url": path}, {"type": "image_url", "image_url": {"url": path}}]
    rows: list[dict[str, object]] = [{"prompt": "q", "image": path}, {"prompt": "q", "images": [path]}]
    rows += [{"prompt": "q", "image": {"path": path, "bytes": None}}, {"prompt": "<image> q", "images": [path]}]
    return rows + [{"messages": [{"role": "user", "content": [part]}]} for part in parts]


def paths(folder: Path, private: str) -> list[str]:
    outside = str(folder.parent / private)
    texts = [outside, f"../{private}", f"../../{private}", f"../rows/../../{private}", f"./images/../../../{private}"]
    texts += [f"../away/{Path(private).name}", os.path.relpath(outside), f"{folder}/../{private}"]
    return [*texts, f"file:{outside}", f"file://{outside}", f"FILE://localhost{outside}", f"//host/{private}", "a\0b"]


def test_images_outside_are_rejected_in_every_form(restricted: Path) -> None:
    file = restricted / "rows" / "d.jsonl"
    for path in [*paths(restricted, "private/p.png"), "../link.png"]:
        for row in forms(path):
            with pytest.raises(UserError):
                contents(row, file)


def test_message_does_not_tell_whether_an_outside_path_exists(restricted: Path) -> None:
    def message(row: dict[str, object]) -> str:
        with pytest.raises(UserError) as caught:
            contents(row, restricted / "rows" / "d.jsonl")
        return str(caught.value).replace("/n.png", "/p.png")

    existing, missing = (paths(restricted, f"private/{name}.png") for name in ("p", "n"))
    for pair in zip(existing, missing, strict=True):
        for rows in zip(*map(forms, pair), strict=True):
            assert message(rows[0]) == message(rows[1])
    assert OUTSIDE in message({"prompt": "q", "image": existing[0]})


def test_images_inside_are_read(restricted: Path) -> None:
    inside = ["../images/own.png", str(restricted / "images" / "own.png"), f"../../{restricted.name}/images/own.png"]
    (restricted / "rows" / "inner.png").symlink_to(restricted / "images" / "own.png")
    for path in [*inside, "inner.png"]:
        assert all(contents(row, restricted / "rows" / "d.jsonl") == [OWN] for row in forms(path))


def test_hidden_images_are_rejected_for_a_web_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "own.png").write_bytes(OWN)
    row = {"prompt": "q", "image": "../.git/own.png"}
    for allow_hidden in (True, False):
        for name, value in AllowedFolders((folder.resolve(),), allow_hidden).environment().items():
            monkeypatch.setenv(name, value)
        if allow_hidden:
            assert contents(row, folder / "rows" / "d.jsonl") == [OWN]
        else:
            with pytest.raises(UserError, match=OUTSIDE):
                contents(row, folder / "rows" / "d.jsonl")


def test_user_may_refer_to_any_image(folder: Path) -> None:
    for path in (str(folder.parent / "private" / "p.png"), "../../private/p.png", "../link.png"):
        assert contents({"prompt": "q", "image": path}, folder / "rows" / "d.jsonl") == [PRIVATE]


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_image_replaced_by_a_link_later_is_rejected(restricted: Path, linked: str) -> None:
    row = {"prompt": "q", "image": "../images/own.png"}
    file = restricted / "rows" / "d.jsonl"
    rows = NumberedRows(str(file), [(str(file), [1], [row])])
    _, (image,) = take_images(row, rows.folder(0), "row 1")
    images = restricted / "images"
    (images / "own.png").unlink()
    if linked == "file":
        (images / "own.png").symlink_to(restricted.parent / "private" / "p.png")
    else:
        images.rmdir()
        (restricted.parent / "private" / "p.png").rename(restricted.parent / "private" / "own.png")
        images.symlink_to(restricted.parent / "private")
    with pytest.raises(UserError, match=OUTSIDE):
        image.decoded()


def test_links_in_class_folders_are_rejected(restricted: Path) -> None:
    classes = restricted / "classes"
    for name in ("cat", "dog"):
        (classes / name).mkdir(parents=True)
        (classes / name / "own.png").write_bytes(OWN)
    (classes / "dog" / "x.png").symlink_to(restricted.parent / "private" / "p.png")
    for labeled in (True, False):
        rows, _ = image_rows(str(classes), labeled=labeled)
        images = [row["image"] for _, row in rows]
        assert len(images) == 3
        for index, image in enumerate(images):
            if image.name == "x.png":
                with pytest.raises(UserError, match=OUTSIDE):
                    image_of(image, rows.folder(index), "row 1")
            else:
                assert read_content(image_of(image, rows.folder(index), "row 1"), "row 1") == OWN


@pytest.mark.parametrize("read", [read_rows, lambda file: open_source(file).scan()])
def test_rows_replaced_by_a_link_are_rejected(restricted: Path, read: Callable[[str], object]) -> None:
    write_rows(restricted.parent / "private" / "d.jsonl", [{"text": "secret"}])
    link = restricted / "link.jsonl"
    link.symlink_to(restricted.parent / "private" / "d.jsonl")
    with pytest.raises(UserError, match=OUTSIDE):
        read(str(link))


def test_rows_of_a_package_are_confined_to_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "member", lambda reference: folder / "rows" / "d.jsonl")
    (folder / "rows" / "own.png").write_bytes(OWN)
    file = Path("pypi:pictures==1.0")
    assert contents({"prompt": "q", "image": "own.png"}, file) == [OWN]
    for path in paths(folder, "private/p.png"):
        with pytest.raises(UserError):
            contents({"prompt": "q", "image": path}, file)


@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_a_hub_are_confined_to_its_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    monkeypatch.setattr(image_files.AllowedFolders, "of_process", staticmethod(lambda: None))
    monkeypatch.setattr("deltaw.data.rows.constants.HF_HUB_CACHE", str(folder))
    feature = datasets.List(datasets.Image()) if nested else datasets.Image()

    def rows_of(path: Path) -> list[NumberedRows]:
        values = {"prompt": ["q"], "image": [[str(path)] if nested else str(path)]}
        features = datasets.Features({"prompt": datasets.Value("string"), "image": feature})
        data = datasets.Dataset.from_dict(values, features=features)
        monkeypatch.setattr(datasets, "load_dataset", lambda identity, split: data)
        stream = open_source(f"owner/{path.stem}-{nested}")
        stream.scan()
        return [read_rows(f"owner/{path.stem}-{nested}"), *stream.chunks()]

    for rows in rows_of(folder / "images" / "own.png"):
        _, (image,) = take_images(rows[0][1], rows.folder(0), "row 1")
        assert read_content(image.content, "row 1") == OWN
    for path in (folder.parent / "private" / "p.png", folder / "link.png", Path("https://127.0.0.1:9/a.png")):
        for rows in rows_of(path):
            with pytest.raises(UserError):
                take_images(rows[0][1], rows.folder(0), "row 1")


def test_paths_in_parquet_files_obey_the_rules(restricted: Path) -> None:
    file = restricted / "rows" / "d.parquet"
    rows = [{"prompt": "q", "image": {"bytes": None, "path": str(restricted.parent / "private" / "p.png")}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    ((_, row),) = read_rows(str(file))
    with pytest.raises(UserError, match=OUTSIDE):
        contents(dict(row), file)
