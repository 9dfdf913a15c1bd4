"""Ten kinds of hostile requests, and the memory of the server that receives them."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import string
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.serving.http.api_requests import CHAT, COMPLETIONS

SECONDS = 120
# Allowed statuses: an error, 200 if the request is only expensive, or 0 for no response.
ALLOWED_STATUSES = {0, 200, 400, 408, 429}


def slow_to_compile_grammar(number: int) -> str:
    """Return a grammar that exceeds any time limit of compilation."""
    return f"start: A\nA: /[a-z]*a[a-z]{{{60 + number}}}/ & ~/.*b[a-z]{{{60 + number}}}.*/"


def slow_to_match_grammar(number: int, after: int = 5) -> str:
    """Return a grammar that compiles quickly, but takes minutes for token number ``after``."""

    def expression(seed: int) -> str:
        chance = random.Random(seed)
        choices = []
        all_letters = string.ascii_lowercase[1:]
        for length in range(3, 28):
            letters = "".join(chance.sample(all_letters, 6))
            choices.append(f"[a{letters}][a{letters[:-3:-1]}]{{1,{length}}}[{all_letters[length % 25]}a]+")
        return "/(" + "|".join(choices) + ")/"

    parts = "\n".join(f"R{n}: {expression(number * 10 + n)}" for n in range(6))
    both = " & ".join(f"R{n}" for n in range(6))
    return f"start: A\nA: /x*y/ | P\nP: /x{{{after}}}/ C\nC: {both}\n{parts}"


def nested(depth: int) -> dict[str, Any]:
    """Return a JSON schema of nested arrays."""
    return {"type": "array", "items": nested(depth - 1), "minItems": 1} if depth else {"type": "string"}


class HostileClient:
    """Client that sends hostile requests.

    Args:
        x: Token id of the letter x.
    """

    def __init__(self, url: str, model: str, x: int, headers: dict[str, str]) -> None:
        self.url = url
        self.headers = headers
        self._x = x
        self._chat = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}
        self._completion = {"model": model, "prompt": "hi", "max_tokens": 200}

    @property
    def kinds(self) -> dict[str, Callable[[int], int]]:
        """Functions that send their nth request and return the status, or 0 if the server does not respond."""
        return {
            "grammars with & and ~": self.grammar,
            "grammars that explode later": self.late_grammar,
            "nested quantifiers": self.quantifiers,
            "deep and branching schemas": self.deep_schema,
            "huge numbers": self.huge_numbers,
            "tools with hostile schemas": self.tools,
            "bodies of a million wrong elements": self.wrong_elements,
            "prompts of megabytes": self.long_prompt,
            "clients that are slow to ask": self.slow_to_send,
            "clients that do not read": self.not_reading,
        }

    def grammar(self, number: int) -> int:
        return self._request(CHAT, self._chat, guided_grammar=slow_to_compile_grammar(number))

    def late_grammar(self, number: int) -> int:
        sampling = {"logit_bias": {str(self._x): 100}, "temperature": 0}
        return self._request(CHAT, self._chat, guided_grammar=slow_to_match_grammar(number), **sampling)

    def quantifiers(self, number: int) -> int:
        first = ("(a{1000}){1000}", "((a|b|ab){1,50}c?){1,50}z", "(.*a.{500}){20}")
        expressions = (*first, "(((x+x+)+y)+){300}z", "([a-z]{1,99}[0-9]?){1,99}q")
        expression = f"{number}{expressions[number % len(expressions)]}"
        return self._request(COMPLETIONS, self._completion, guided_regex=expression)

    def deep_schema(self, number: int) -> int:
        pattern = "^[a-z]*a[a-z]{%d}$"
        both = {f"a{n}": [{"$ref": f"#/$defs/a{n + 1}"}] * 10 for n in range(8)}
        branches = {name: {"anyOf": choices, "allOf": choices} for name, choices in both.items()}
        schemas: tuple[dict[str, Any], ...] = (
            nested(25),
            {"$defs": branches | {"a8": {"type": "string"}}, "$ref": "#/$defs/a0"},
            {"type": "string", "allOf": [{"pattern": pattern % n} for n in range(50, 60)]},
            {"allOf": [{"anyOf": [{"required": [f"a{n}"]}, {"required": [f"b{n}"]}]} for n in range(20)]},
            {"type": "object", "patternProperties": {f"(a|b)*{n}": nested(3) for n in range(200)}},
        )
        return self._request(CHAT, self._chat, guided_json=schemas[number % len(schemas)])

    def huge_numbers(self, number: int) -> int:
        schemas = (
            '{"type": "array", "minItems": 100000000}',
            '{"type": "integer", "maximum": ' + "9" * 4000 + "}",
            '{"type": "number", "multipleOf": 1e-300}',
            '{"type": "string", "minLength": 4000000000}',
            '{"type": "number", "minimum": 1e999}',
        )
        body = json.dumps(self._chat | {"guided_json": "here"}).replace('"here"', schemas[number % len(schemas)])
        return self._send(CHAT, body.encode())

    def tools(self, number: int) -> int:
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(.*a.{300}){9}$"}}}
        function = {"name": f"f{number}", "parameters": schema | {"required": ["a"]}}
        tools = [{"type": "function", "function": function}]
        return self._request(CHAT, self._chat, tools=tools, tool_choice="required")

    def wrong_elements(self, number: int) -> int:
        wrong = ("{}", "[]", "1.5", "null", '"\\ud800"')[number % 5]
        content = "[" + ",".join([wrong] * (4_000_000 // (len(wrong) + 1))) + "]"
        return self._send(CHAT, json.dumps(self._chat).replace('"hi"', content).encode())

    def long_prompt(self, number: int) -> int:
        text = ("1", "a", " ", "x y", "\u0300")[number % 5]
        fields = {"prompt": text * (3_900_000 // len(text.encode()))}
        return self._send(COMPLETIONS, json.dumps(self._completion | fields, ensure_ascii=False).encode())

    def slow_to_send(self, number: int) -> int:
        """Send a header or a body slowly, byte by byte."""
        body = json.dumps(self._chat).encode()
        message = self._head(len(body)) + body
        with self._connect() as client, contextlib.suppress(OSError):
            offset = 20 if number % 2 else len(message) - 30
            client.sendall(message[:offset])
            client.settimeout(0.2)
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    answer = client.recv(4096)
                    return int(answer.split()[1]) if answer else 0
                client.sendall(b"x")
        return 0

    def not_reading(self, number: int) -> int:
        """Request a long response and never read it."""
        fields = self._chat | {"stream": number % 2 == 0, "n": 4, "logprobs": True, "top_logprobs": 20}
        body = json.dumps(fields).encode()
        with self._connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(self._head(len(body)) + body)
            time.sleep(1)
        return 0

    def _request(self, path: str, body: dict[str, Any], **fields: Any) -> int:
        return self._send(path, json.dumps(body | fields).encode())

    def _send(self, path: str, body: bytes) -> int:
        import httpx

        headers = self.headers | {"Content-Type": "application/json"}
        with httpx.Client(base_url=self.url, timeout=SECONDS) as client:
            return client.post(path, content=body, headers=headers).status_code

    def _connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((str(address.hostname), int(address.port or 80)), timeout=SECONDS)

    def _head(self, length: int) -> bytes:
        headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": length, **self.headers}
        lines = [f"POST {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def memory(process: int) -> int:
    """Return the resident memory of a process and its descendants in bytes."""
    total = 0
    parent = psutil.Process(process)
    for member in [parent, *parent.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total
