"""Ollama's API on this machine over llama.cpp's server from the package ``xllamacpp``, or over a function.

The templates that are understood are those that deltaw writes: a loop over messages, and one condition.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# The answer to a text: of a GGUF file, the text and the options.
Answer = Callable[[Path, str, dict[str, Any], list[str]], str]


@dataclass
class Models:
    url: str = ""
    blobs: dict[str, Path] = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refused: str = ""


@contextlib.contextmanager
def running(folder: Path, answer: Answer) -> Iterator[Models]:
    models = Models()
    handler = type("Bound", (_Handler,), {"models": models, "folder": folder, "answer": staticmethod(answer)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    models.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield models
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    models: Models
    folder: Path
    answer: Answer

    def log_message(self, *_: object) -> None:
        pass

    def _say(self, status: int, value: object = None) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._say(200 if self.path.rpartition("/")[2] in self.models.blobs else 404)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._say(200, {"data": [{"id": name} for name in self.models.made]})
        self._say(200, {"version": "0.12.0"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/blobs/"):
            digest = self.path.rpartition("/")[2]
            if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
                return self._say(400, {"error": "digest mismatch"})
            self.models.blobs[digest] = self.folder / digest.replace(":", "-")
            self.models.blobs[digest].write_bytes(body)
            return self._say(201)
        asked = json.loads(body)
        self.models.requests.append((self.path, asked))
        if self.path == "/api/create":
            if self.models.refused or set(asked["files"].values()) - set(self.models.blobs):
                return self._say(400, {"error": self.models.refused or "no such blob"})
            self.models.made[asked["model"]] = asked
            return self._say(200, {"status": "success"})
        made = self.models.made.get(asked["model"])
        if made is None:
            return self._say(404, {"error": "model not found"})
        if self.path == "/api/show":
            return self._say(200, {"template": made["template"]})
        if self.path == "/v1/completions":
            return self._say(200, {"choices": [{"text": self._answered(made, asked["prompt"], asked)}]})
        system = [{"role": "system", "content": made["system"]}] if made.get("system") else []
        text = self._answered(made, rendered(made["template"], [*system, *asked["messages"]]), asked)
        self._say(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def _answered(self, made: dict[str, Any], prompt: str, options: dict[str, Any]) -> str:
        (blob,) = made["files"].values()
        return type(self).answer(self.models.blobs[blob], prompt, options, made.get("parameters", {}).get("stop", []))


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """A conversation by a template of the form that deltaw writes."""
    found = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S)
    assert found is not None, template
    turns = (found[1].replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages)
    return "".join(turns) + found[2]


class LlamaCpp:
    """Answers by llama.cpp, which keeps one model, in a process of its own since it may abort it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __call__(self, file: Path, prompt: str, options: dict[str, Any], stops: list[str]) -> str:
        with self._lock:
            if self._process is None:
                command = [sys.executable, __file__, str(file)]
                how: dict[str, Any] = {
                    "stdin": subprocess.PIPE,
                    "stdout": subprocess.PIPE,
                    "stderr": subprocess.DEVNULL,
                }
                self._process = subprocess.Popen(command, text=True, **how)
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps({"prompt": prompt, "options": options, "stops": stops}) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith('{"answer":'):
                    return str(json.loads(line)["answer"])
            raise RuntimeError(f"llama.cpp ended with {self._process.wait()}")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _serve(file: str) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity, parameters.warmup = 2048, 1, 0, False
    # Keys and values as exact as the weights: by default they are rounded to fp16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    for line in sys.stdin:
        asked = json.loads(line)
        how = {"n_predict": asked["options"]["max_tokens"], "temperature": 0, "stop": asked["stops"]}
        found = server.handle_completions({"prompt": asked["prompt"], "cache_prompt": False, **how})
        found = found if isinstance(found, dict) else json.loads(found)
        print(json.dumps({"answer": found["choices"][0]["text"]}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
