"""Control characters in messages, which come from files, models and other libraries, do not reach a terminal."""

from __future__ import annotations

import io
import pickle

import pytest

from deltaw.cli import faults
from deltaw.errors import UserError, as_message, escape_control_characters, first_line
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


def test_ordinary_text_in_any_script_is_unchanged():
    for text in ("a\tb\nc", "日本語 עברית عربي", "👩\u200d👩\u200d👧", "non\u00a0breaking, soft\u00adhyphen"):
        assert escape_control_characters(text) == text
    assert escape_control_characters("a\r\nb") == "a\nb"
