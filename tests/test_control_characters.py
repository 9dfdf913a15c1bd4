"""Control characters in messages, which come from files, models and other libraries, do not reach a terminal."""

from __future__ import annotations

import base64
import io
import json
import pickle
from urllib.parse import quote

import pytest

from deltaw.cli import faults
from deltaw.errors import UserError, as_message, checked_key, escape_control_characters, first_line
from deltaw.reports.tables import Output

ATTACKS = {
    "escape sequence": ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    "C1": ("\x9b31m\x85", r"\x9b31m\x85"),
    "bidirectional override": ("\u202eexe.txt\u2066", r"\u202eexe.txt\u2066"),
    "carriage return": ("safe\rrm -rf", r"safe\rrm -rf"),
    "delete and backspace": ("a\x7f\x08", r"a\x7f\x08"),
    "line separator": ("a\u2028b", r"a\u2028b"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_control_characters_are_escaped_wherever_an_error_is_shown(name):
    text, escaped = ATTACKS[name]
    error = UserError(f"no {text}", where=text, hint=text)
    assert (error.what, error.where, error.hint) == (f"no {escaped}", escaped, escaped)
    stream = io.StringIO()
    Output(file=stream).say(f"tracker failed: {text}")
    _, shown = faults.explained(ValueError(f"bad {text}"), traceback=True)
    copied = pickle.loads(pickle.dumps(error))
    for place in (str(error), as_message(error), str(copied), copied.what, stream.getvalue(), shown):
        assert not any(c in place for c in text if not c.isprintable()), place
    assert first_line(ValueError(text)) in escaped


@pytest.mark.parametrize(
    "form",
    [
        str,
        quote,
        lambda key: json.dumps(key).replace("/", r"\/"),
        lambda key: base64.b64encode(key.encode()).decode(),
        lambda key: base64.b64encode(f"Bearer {key}".encode()).decode(),
        lambda key: key.encode().hex(),
    ],
)
def test_key_is_removed_from_errors_in_every_common_form(form):
    key = checked_key("abcDEF123!xyz/QRS+tuv==", "KEY")
    shown = first_line(ValueError(f"status 401: <{form(key)}>"))
    assert not any(part in shown for part in ("DEF123", "QRS", "tuv", form(key)[8:]))


@pytest.mark.parametrize("url", ["https://user:p@ss@host/x", "//user:p@ss@host/x", "http://host/x?a=1&api_key=p@ss"])
def test_passwords_and_keys_in_urls_are_removed(url):
    shown = first_line(ValueError(f"cannot open {url}"))
    assert "p@ss" not in shown and "ss@" not in shown and "host/x" in shown


def test_ordinary_text_in_any_script_is_unchanged():
    for text in ("a\tb\nc", "日本語 עברית عربي", "👩\u200d👩\u200d👧", "non\u00a0breaking, soft\u00adhyphen"):
        assert escape_control_characters(text) == text
    assert escape_control_characters("a\r\nb") == "a\nb"
