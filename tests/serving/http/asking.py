"""Requests that the tests of the server ask, and what a refusal looks like."""

from __future__ import annotations

from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def said(content: object = "hi", **fields: Any) -> dict[str, Any]:
    """A chat of one message of the user, of which each model makes one text alone."""
    return {"model": "base", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


GOOD = said()
# A text that takes its time.
SLOW = said("be slow")


def refusal(response: Any, status: int) -> dict[str, Any]:
    """The error object, which has OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def load(server: Any, name: object, path: object = "poet", **more: object) -> Any:
    """The answer to a request that an adapter be loaded."""
    return server.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def unload(server: Any, name: str) -> Any:
    return server.post("/v1/unload_lora_adapter", json={"lora_name": name})
