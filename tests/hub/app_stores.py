"""Fake stores of Ollama and LM Studio."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

LAYER = "application/vnd.ollama.image."
DEFAULTS = ("registry.ollama.ai", "library")


def add_blob(store: Path, content: bytes) -> tuple[str, int]:
    """Add a blob to Ollama's store. Return its digest and size."""
    digest = hashlib.sha256(content).hexdigest()
    blob = store / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    return f"sha256:{digest}", len(content)


def write_manifest(store: Path, name: str, layers: object, parts: tuple[str, str] = DEFAULTS) -> Path:
    """Write the manifest of a model ``NAME:TAG``."""
    manifest = store.joinpath("manifests", *parts, *name.split(":"))
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}), encoding="utf-8")
    return manifest


def layer_of(store: Path, kind: str, content: bytes) -> dict[str, object]:
    digest, size = add_blob(store, content)
    return {"mediaType": f"{LAYER}{kind}", "digest": digest, "size": size}


def add_model(
    store: Path, name: str, content: bytes, others: Mapping[str, bytes] | None = None, parts: tuple[str, str] = DEFAULTS
) -> Path:
    """Add a model with further layers to Ollama's store. Return its blob."""
    layers = [layer_of(store, kind, text) for kind, text in {"model": content, **(others or {})}.items()]
    write_manifest(store, name, layers, parts)
    return store / "blobs" / str(layers[0]["digest"]).replace(":", "-")
