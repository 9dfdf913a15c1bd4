"""Functions and tags that transformers provides to chat templates."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace

from deltaw import platforms


class Attributes(Namespace):
    """Result of ``namespace()`` in a template. As in transformers, names with a leading underscore are rejected."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        super().__setitem__(name, value)


class Dictionary:
    """``dict`` in a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class GenerationTag(Extension):
    """``{% generation %}``, which marks the assistant's text. Its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        return caller()


def to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """``tojson`` in a template, without HTML escapes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_template_error(message: str) -> None:
    """``raise_exception`` in a template."""
    raise jinja2.TemplateError(message)


def format_date(moment: datetime.datetime, format: str) -> str:
    """Format a date with ``strftime``. ``%-d`` and similar codes also work on Windows.

    Raises:
        jinja2.TemplateError: if the platform does not support the format.
    """
    try:
        if platforms.WINDOWS:
            format = re.sub("%%|%-", lambda match: match[0].replace("-", "#"), format)
        return moment.strftime(format)
    except ValueError as error:
        raise jinja2.TemplateError(f"its date format '{format}' cannot be used: {error}") from error
