"""A server with Ollama's API, whose completions come from llama.cpp (package ``xllamacpp``) or a function.

It supports only the templates that deltaw writes: a loop over messages with one condition. An adapter is passed to the
function in the option ``adapter``.
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

# Generates a completion from a GGUF file, a prompt, the options and the stop strings.
Answer = Callable[[Path, str, dict[str, Any], list[str]], str]


@dataclass
class Models:
    url: str = ""
    blobs: dict[str, Path] = field(default_factory=dict)
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    rejection: str = ""
    # Error of requests to models with an adapter, as of an engine that does not support adapters.
    adapter_error: str = ""

    def add_base(self, name: str, blob: Path, **texts: str) -> None:
        """Add a model, as ``ollama pull`` does."""
        digest = blob.name.replace("-", ":")
        self.blobs[digest] = blob
        self.created[name] = {"template": "", **texts, "model": name, "files": {"base.gguf": digest}}


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

    def _log(self, status: int, value: object = None) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._log(200 if self.path.rpartition("/")[2] in self.models.blobs else 404)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._log(200, {"data": [{"id": name} for name in self.models.created]})
        self._log(200, {"version": "0.12.0"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/blobs/"):
            digest = self.path.rpartition("/")[2]
            if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
                return self._log(400, {"error": "digest mismatch"})
            self.models.blobs[digest] = self.folder / digest.replace(":", "-")
            self.models.blobs[digest].write_bytes(body)
            return self._log(201)
        payload = json.loads(body)
        self.models.requests.append((self.path, payload))
        if self.path == "/api/create":
            files = payload.get("files", payload.get("adapters", {}))
            base = self.models.created.get(payload.get("from", ""), {})
            unknown = set(files.values()) - set(self.models.blobs) or not (base or "files" in payload)
            if self.models.rejection or unknown:
                return self._log(400, {"error": self.models.rejection or "no such blob or model"})
            self.models.created[payload["model"]] = {**base, **payload}
            return self._log(200, {"status": "success"})
        model = self.models.created.get(payload["model"])
        if model is None:
            return self._log(404, {"error": "model not found"})
        if self.path == "/api/show":
            (blob,) = model["files"].values()
            texts = {key: model[key] for key in ("template", "system") if key in model}
            return self._log(
                200, {**texts, "modelfile": f"# FROM {model['model']}\n\nFROM {self.models.blobs[blob]}\n"}
            )
        if "adapters" in model and self.models.adapter_error:
            return self._log(500, {"error": self.models.adapter_error})
        if self.path == "/v1/completions":
            return self._log(200, {"choices": [{"text": self._complete(model, payload["prompt"], payload)}]})
        system = [{"role": "system", "content": model["system"]}] if model.get("system") else []
        text = self._complete(model, render(model["template"], [*system, *payload["messages"]]), payload)
        self._log(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def _complete(self, model: dict[str, Any], prompt: str, options: dict[str, Any]) -> str:
        (blob,) = model["files"].values()
        for adapter in model.get("adapters", {}).values():
            options = {**options, "adapter": str(self.models.blobs[adapter])}
        return type(self).answer(self.models.blobs[blob], prompt, options, model.get("parameters", {}).get("stop", []))


def render(template: str, messages: list[dict[str, str]]) -> str:
    """Render a conversation with a template in the form that deltaw writes."""
    match = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S)
    assert match is not None, template
    turns = (match[1].replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages)
    return "".join(turns) + match[2]


class LlamaCpp:
    """Completions of one model and adapter by llama.cpp, in a child process because it may abort."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __call__(self, file: Path, prompt: str, options: dict[str, Any], stops: list[str]) -> str:
        with self._lock:
            if self._process is None:
                command = [sys.executable, __file__, str(file), options.get("adapter", "")]
                pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                pipes |= {"stderr": subprocess.DEVNULL}
                self._process = subprocess.Popen(command, text=True, **pipes)
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps({"prompt": prompt, "options": options, "stops": stops}) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith('{"answer":'):
                    return str(json.loads(line)["answer"])
            raise RuntimeError(f"llama.cpp exited with status {self._process.wait()}")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _serve(file: str, adapter: str) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    if adapter:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    parameters.n_ctx = 2048
    parameters.n_parallel = 1
    parameters.verbosity = 0
    parameters.warmup = False
    # fp32 keys and values. The default rounds them to fp16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    for line in sys.stdin:
        request = json.loads(line)
        options = {"n_predict": request["options"]["max_tokens"], "temperature": 0, "stop": request["stops"]}
        response = server.handle_completions({"prompt": request["prompt"], "cache_prompt": False, **options})
        response = response if isinstance(response, dict) else json.loads(response)
        print(json.dumps({"answer": response["choices"][0]["text"]}), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
