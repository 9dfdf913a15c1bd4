"""Control characters from files, models and libraries are escaped in messages, so they do not reach the terminal."""

from __future__ import annotations

import base64
import io
import json
import pickle
from urllib.parse import quote

import pytest

from deltaw.cli import crash_report
from deltaw.errors import UserError, escape_control_characters, first_line, format_error, validate_key
from deltaw.reports.tables import TerminalOutput

ATTACKS = {"escape sequence": ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07")}
ATTACKS |= {"C1": ("\x9b31m\x85", r"\x9b31m\x85")}
ATTACKS |= {"bidirectional override": ("\u202eexe.txt\u2066", r"\u202eexe.txt\u2066")}
ATTACKS |= {"carriage return": ("safe\rrm -rf", r"safe\rrm -rf"), "delete and backspace": ("a\x7f\x08", r"a\x7f\x08")}
ATTACKS |= {"line separator": ("a\u2028b", r"a\u2028b")}


@pytest.mark.parametrize("name", ATTACKS)
def test_control_characters_are_escaped_in_every_error_output(name):
    text, escaped = ATTACKS[name]
    error = UserError(f"no {text}", location=text, hint=text)
    assert (error.message, error.location, error.hint) == (f"no {escaped}", escaped, escaped)
    stream = io.StringIO()
    TerminalOutput(file=stream).print_line(f"tracker failed: {text}")
    _, output = crash_report.describe(ValueError(f"bad {text}"), traceback=True)
    copied = pickle.loads(pickle.dumps(error))
    for text_output in (str(error), format_error(error), str(copied), copied.message, stream.getvalue(), output):
        assert not any(c in text_output for c in text if not c.isprintable()), text_output
    assert first_line(ValueError(text)) in escaped


ENCODINGS = [str, quote, lambda key: json.dumps(key).replace("/", r"\/")]
ENCODINGS += [lambda key: base64.b64encode(key.encode()).decode()]
ENCODINGS += [lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(), lambda key: key.encode().hex()]


@pytest.mark.parametrize("encode", ENCODINGS)
def test_key_is_removed_from_errors_in_every_common_form(encode):
    key = validate_key("abcDEF123!xyz/QRS+tuv==", "KEY")
    output = first_line(ValueError(f"status 401: <{encode(key)}>"))
    assert not any(part in output for part in ("DEF123", "QRS", "tuv", encode(key)[8:]))


@pytest.mark.parametrize("url", ["https://user:p@ss@host/x", "//user:p@ss@host/x", "http://host/x?a=1&api_key=p@ss"])
def test_passwords_and_keys_in_urls_are_removed(url):
    output = first_line(ValueError(f"cannot open {url}"))
    assert "p@ss" not in output and "ss@" not in output and "host/x" in output


def test_ordinary_text_in_any_script_is_unchanged():
    for text in ("a\tb\nc", "日本語 עברית عربي", "👩\u200d👩\u200d👧", "non\u00a0breaking, soft\u00adhyphen"):
        assert escape_control_characters(text) == text
    assert escape_control_characters("a\r\nb") == "a\nb"
