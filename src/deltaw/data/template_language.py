"""What a chat template may use besides Jinja's own language, as transformers gives it, and how it is ended.

It knows Jinja; not conversations, nor what anything costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import SecurityError
from jinja2.utils import Namespace

from deltaw.errors import UserError


class TemplateLimitError(UserError):
    """A chat template does more than a rendering may cost."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template was ended: {what}",
            where="the chat template",
            hint="do without it (data.template: plain), or name one of your own in data.chat_template",
        )


class Attributes(Namespace):
    """What ``namespace()`` gives: as in transformers, without names that begin with an underscore; and
    without another one inside, so that its size is that of its values."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        if isinstance(value, Namespace):
            raise TemplateLimitError("it puts a namespace into another")
        super().__setitem__(name, value)


class Dictionary:
    """``dict`` in a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class GenerationTag(Extension):
    """``{% generation %}``, which marks the assistant's text: its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        return caller()
