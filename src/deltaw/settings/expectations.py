"""Wording of validation errors: the expected value of a setting, a request field or an argument.

Pydantic describes values in the terms of its parsers. All surfaces (settings, server, MCP) use the same plain phrases.
"""

from __future__ import annotations

import re

_PHRASES = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid number": "a number",
    "a valid integer": "an integer",
    "a finite number": "a finite number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "a valid array": "a list",
    "a valid dictionary": "an object",
}
# Details about the parser, or about types of Python, that do not help the user.
_DETAILS = re.compile(r"(, unable to| or instance of|, got a| after validation, not| or an object to extract).*$")


def expectation(message: str) -> str | None:
    """Return the verb phrase of a message such as "Input should be …", or None for another kind of message.

    For example, "Input should be greater than or equal to 1" becomes "be at least 1".
    """
    match = re.match(r"(?:Input|Value|[A-Z][a-z]+) should (.*)", message, re.DOTALL)
    if match is None:
        return None
    phrase = _DETAILS.sub("", match[1])
    for original, plain in _PHRASES.items():
        phrase = phrase.replace(original, plain)
    return phrase
