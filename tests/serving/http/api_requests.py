"""Requests of the server tests, and a check of error responses."""

from __future__ import annotations

from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def chat_body(content: object = "hi", **fields: Any) -> dict[str, Any]:
    """Return a chat request with one user message for greedy decoding."""
    return {"model": "base", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


GOOD = chat_body()
# The fake engine generates this completion slowly.
SLOW = chat_body("be slow")


def expect_error(response: Any, status: int) -> dict[str, Any]:
    """Check that a response is an OpenAI-style error with this status, and return the error object."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def load(server: Any, name: object, path: object = "poet", **fields: object) -> Any:
    """Request that the server load an adapter."""
    return server.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def unload(server: Any, name: str) -> Any:
    return server.post("/v1/unload_lora_adapter", json={"lora_name": name})
