"""Models in the stores of Ollama and LM Studio are found in place, or rejected with a hint that names the model."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from deltaw.hub import app_stores
from deltaw.hub.app_stores import find_stored_model, list_stored_models
from deltaw.hub.folders import find_cached, resolve, resolve_hub_id
from deltaw.hub.local_models import describe_model, list_local_models
from tests.data.conftest import refusal
from tests.hub.app_stores import add_blob, add_model, layer_of, write_manifest

MODEL = b"GGUF" + bytes(range(200))
OTHERS = {"template": b"{{ .Prompt }}", "params": b"{}", "license": b"MIT", "system": b"Be brief.", "messages": b"[]"}
LINKS = pytest.mark.skipif(os.name != "posix", reason="requires links")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of Ollama, and a home folder without LM Studio."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: tmp_path / "home"))
    (tmp_path / "ollama").mkdir()
    return tmp_path / "ollama"


def lm_studio_file(name: str, content: bytes = MODEL) -> Path:
    file = app_stores.lm_studio_folder() / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def assert_rejected(reference: str, message: str, hint: str) -> None:
    error = refusal(find_stored_model, reference)
    assert message in error.message and hint in str(error.hint) and error.location, error
    assert find_cached(reference) is None


@pytest.mark.parametrize(
    ("name", "tag", "parts", "short_name"),
    [
        ("llama3.2", "latest", ("registry.ollama.ai", "library"), "llama3.2"),
        ("llama3.2:1b", "1b", ("registry.ollama.ai", "library"), "llama3.2-1b"),
        ("user/llama3.2:1b", "1b", ("registry.ollama.ai", "user"), "llama3.2-1b"),
        ("hf.co/owner/llama3.2:Q4_K_M", "Q4_K_M", ("hf.co", "owner"), "llama3.2-Q4_K_M"),
        ("localhost:5000/owner/llama3.2", "latest", ("localhost:5000", "owner"), "llama3.2"),
    ],
)
def test_ollama_model_is_found_in_place(
    store: Path, name: str, tag: str, parts: tuple[str, str], short_name: str
) -> None:
    if os.name != "posix" and ":" in parts[0]:
        pytest.skip("Windows does not allow such a folder")
    blob = add_model(store, f"llama3.2:{tag}", MODEL, OTHERS, parts)
    stored = find_stored_model(f"ollama:{name}")
    assert stored == list_stored_models()[0]
    assert (stored.name, stored.short_name, stored.path) == (name, short_name, blob.resolve())
    assert stored.digest == f"sha256:{hashlib.sha256(MODEL).hexdigest()}" and stored.is_in_ollama
    source = resolve(f"ollama:{name}")
    assert (source.kind, source.path, source.name, source.stored) == ("gguf", stored.path, short_name, stored)
    assert find_cached(f"ollama:{name}") == f"ollama:{name}" and resolve_hub_id(f"ollama:{name}") is None


def test_default_folder_and_explicit_default_names_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_MODELS")
    add_model(tmp_path / "home/.ollama/models", "tiny:latest", MODEL)
    names = ("tiny", "tiny:latest", "library/tiny", "registry.ollama.ai/library/tiny:latest")
    assert {find_stored_model(f"ollama:{name}").name for name in names} == {"tiny"}


def test_tags_are_separate_models(store: Path) -> None:
    add_model(store, "tiny:1b", MODEL)
    add_model(store, "tiny:3b", MODEL + b"3")
    assert [model.reference for model in list_stored_models()] == ["ollama:tiny:1b", "ollama:tiny:3b"]
    assert find_stored_model("ollama:tiny:1b").digest != find_stored_model("ollama:tiny:3b").digest
    assert_rejected("ollama:tiny", "no model 'tiny'", "ollama:tiny:1b")
    assert_rejected("ollama:tiny:1B", "no model 'tiny:1B'", "did you mean 'ollama:tiny:1b'")


@pytest.mark.parametrize("name", ["../tiny", "a/../tiny", "/etc/tiny", "a\\tiny", "tiny:..", "a..b"])
@pytest.mark.parametrize("scheme", app_stores.SCHEMES)
def test_names_that_are_paths_are_rejected(scheme: str, name: str) -> None:
    assert_rejected(f"{scheme}{name}", f"'{name}' is not a model name", "lists")


@pytest.mark.parametrize("name", ["", "a b", "a/b/c/d", "tiny:", "tiny:a:b", "ti\0ny", "~/tiny", "a//b", "x" * 200])
def test_malformed_names_of_ollama_are_rejected(name: str) -> None:
    assert_rejected(f"ollama:{name}", "is not a model name", "NAME[:TAG]")


def test_missing_store_is_reported_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "none"))
    error = refusal(find_stored_model, "ollama:tiny")
    assert error.location == str(tmp_path / "none") and "OLLAMA_MODELS" in str(error.hint)
    error = refusal(find_stored_model, "lmstudio:me/tiny")
    assert error.location == str(tmp_path / "home/.lmstudio/models") and "'me/tiny'" in str(error.hint)
    assert list_stored_models() == []


def test_damaged_blobs_are_rejected(store: Path) -> None:
    blob = add_model(store, "tiny:latest", MODEL)
    blob.write_bytes(MODEL[:-1])
    assert_rejected("ollama:tiny", "incomplete: 203 of 204 bytes", "ollama pull tiny")
    blob.write_bytes(MODEL[:-1] + b"x")
    assert_rejected("ollama:tiny", "is damaged", "ollama pull tiny")
    blob.unlink()
    assert_rejected("ollama:tiny", "is missing", "ollama pull tiny")
    add_model(store, "other:latest", b"PK" + MODEL)
    assert_rejected("ollama:other", "is not a GGUF file", "'other'")


def test_invalid_manifests_are_rejected(store: Path) -> None:
    manifest = write_manifest(store, "tiny:latest", [])
    layer = layer_of(store, "model", MODEL)
    contents = ["", "[]", "{}", '{"layers": {}}', "[" * 100_000, '{"layers": [1]}', '{"layers": [{"mediaType": 1}]}']
    padding = " " * (1 << 20)
    for content in (*contents, json.dumps({"layers": [layer]}) + padding):
        manifest.write_text(content)
        assert_rejected("ollama:tiny", "the manifest of 'tiny' is not valid", "ollama pull tiny")
    manifest.unlink()
    manifest.mkdir()
    assert_rejected("ollama:tiny", "the manifest of 'tiny' is not valid", "ollama pull tiny")


@pytest.mark.parametrize(
    "digest", ["sha256:../../secret", "/etc/passwd", "sha256:" + "A" * 64, "md5:" + "a" * 64, None]
)
def test_digests_that_are_paths_are_rejected(store: Path, digest: object) -> None:
    layer = layer_of(store, "model", MODEL)
    write_manifest(store, "tiny:latest", [{**layer, "digest": digest}])
    assert_rejected("ollama:tiny", "no valid digest", "ollama pull tiny")
    write_manifest(store, "tiny:latest", [{**layer, "size": "200"}])
    assert_rejected("ollama:tiny", "no valid digest and size", "ollama pull tiny")


def test_models_other_than_one_gguf_file_are_rejected(store: Path) -> None:
    model = layer_of(store, "model", MODEL)
    add_model(store, "base:1b", MODEL)
    for name, layers, message in (
        ("split", [model, layer_of(store, "model", MODEL + b"2")], "consists of 2 files"),
        ("tensors", [layer_of(store, "tensor", b"safetensors")], "is stored as safetensors tensors"),
        ("cloud", [], "has no weights on this machine"),
    ):
        layers = layers or [layer_of(store, "license", b"MIT")]
        write_manifest(store, f"{name}:latest", layers)
        assert_rejected(f"ollama:{name}", f"'{name}' {message}", f"instead of '{name}'")
    write_manifest(store, "tuned:latest", [model, layer_of(store, "adapter", b"GGUF adapter")])
    assert_rejected("ollama:tuned", "'tuned' is a base model with an adapter", "'tuned': ollama:base:1b")
    assert [stored.name for stored in list_stored_models()] == ["base:1b"]


@LINKS
def test_links_that_leave_the_store_are_rejected(store: Path, tmp_path: Path) -> None:
    blob = add_model(store, "tiny:latest", MODEL)
    outside = tmp_path / "outside"
    blob.rename(outside)
    blob.symlink_to(outside)
    assert_rejected("ollama:tiny", "link that leaves the store", "replace")
    blob.unlink()
    add_blob(store, MODEL)
    manifest = store / "manifests/registry.ollama.ai/library/tiny/latest"
    manifest.rename(tmp_path / "manifest")
    manifest.symlink_to(tmp_path / "manifest")
    assert_rejected("ollama:tiny", "link that leaves the store", "replace")
    file = lm_studio_file("me/tiny/tiny.gguf")
    file.unlink()
    file.symlink_to(outside)
    assert_rejected("lmstudio:me/tiny", "link that leaves the store", "replace")


@LINKS
def test_linked_store_and_links_inside_of_it_are_followed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = add_model(store, "tiny:latest", MODEL)
    blob.rename(store / "moved")
    blob.symlink_to(store / "moved")
    (tmp_path / "link").symlink_to(store)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "link"))
    assert find_stored_model("ollama:tiny").path == (store / "moved").resolve()


def test_unreadable_store_is_reported(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = add_model(store, "tiny:latest", MODEL)

    def deny(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(app_stores, "file_digest", deny)
    assert_rejected("ollama:tiny", "cannot be read: Permission denied", "'tiny'")
    assert refusal(find_stored_model, "ollama:tiny").location == str(blob.resolve())


def test_lm_studio_models_are_found_by_each_of_their_names() -> None:
    file = lm_studio_file("me/tiny-GGUF/tiny.Q8_0.gguf")
    lm_studio_file("me/tiny-GGUF/mmproj-tiny.gguf")
    names = ("me/tiny-GGUF", "tiny-GGUF", "me/tiny-GGUF/tiny.Q8_0.gguf")
    models = [find_stored_model(f"lmstudio:{name}") for name in names]
    assert {model.path for model in models} == {file.resolve()}
    assert [model.short_name for model in models] == ["tiny-GGUF", "tiny-GGUF", "tiny.Q8_0"]
    assert not models[0].is_in_ollama and models[0].digest == f"sha256:{hashlib.sha256(MODEL).hexdigest()}"
    assert [model.reference for model in list_stored_models()] == ["lmstudio:me/tiny-GGUF"]
    assert_rejected("lmstudio:me/tiny-GGUF/mmproj-tiny.gguf", "no model", "tiny-GGUF")
    assert_rejected("lmstudio:me/tiny", "no model 'me/tiny'", "did you mean 'lmstudio:me/tiny-GGUF'")


def test_ambiguous_and_split_models_of_lm_studio_are_rejected() -> None:
    lm_studio_file("me/tiny/a.gguf")
    lm_studio_file("me/tiny/b.gguf")
    lm_studio_file("you/tiny/c.gguf")
    assert_rejected("lmstudio:me/tiny", "2 models 'me/tiny'", "lmstudio:me/tiny/a.gguf, lmstudio:me/tiny/b.gguf")
    assert_rejected("lmstudio:tiny", "3 models 'tiny'", "lmstudio:you/tiny/c.gguf")
    assert find_stored_model("lmstudio:you/tiny").path.name == "c.gguf"
    for part in (1, 2):
        lm_studio_file(f"me/large/large-{part:05}-of-00002.gguf")
    assert_rejected("lmstudio:me/large", "'me/large' is split into several files", "'me/large'")
    lm_studio_file("me/other/other.gguf", b"not a model")
    assert_rejected("lmstudio:other", "is not a GGUF file", "'other'")
    references = ["lmstudio:me/tiny/a.gguf", "lmstudio:me/tiny/b.gguf", "lmstudio:you/tiny"]
    assert [model.reference for model in list_stored_models()] == references


def test_stored_models_are_listed_and_described(store: Path, tmp_path: Path) -> None:
    add_model(store, "tiny:1b", MODEL)
    (model,) = list_local_models(tmp_path / "home")
    assert (model.reference, model.name, model.kind, model.bytes) == ("ollama:tiny:1b", "tiny-1b", "gguf", len(MODEL))
    assert describe_model("ollama:tiny:1b") == model
