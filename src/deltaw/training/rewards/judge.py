"""The reward ``judge``: a model behind an address with OpenAI's API gives each completion a number.

Knows the API's one route for chats. The key is read from an environment variable by name and appears in no message.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from typing import Any

from deltaw.errors import UserError, first_line, read_key, redact
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards.base import Scored, place_of, right_answer

_TEMPLATE = """Rate the answer to the question on a scale from {low} to {high}. Reply with the number alone.

Question:
{prompt}

Answer:
{completion}"""
_NAMED = re.compile(r"\{(prompt|completion|answer|low|high)\}")
_THOUGHT = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_NUMBER = r"[-+]?(?:\d{1,12}(?:[.,]\d{1,12}){0,3}|\.\d{1,12})"
# The scale itself, as in "on a scale from 0 to 10".
_RANGE = re.compile(rf"(?<![\w.,])({_NUMBER})\s*(?:to|and|-|–)\s*({_NUMBER})(?!\w|[.,]\d)", re.IGNORECASE)
# A number that may be a fraction: "7", "7/10", "7 out of 10", "70 %".
_FRACTION = (
    rf"(?<![\w.,/])(?P<value>{_NUMBER})(?!\w|[.,]\d)(?:\s*(?P<percent>%)|(?:\s*(?:points?|stars?|marks?))?"
    rf"\s*(?:/|(?:out\s+)?of(?:\s+a\s+possible)?)\s*(?P<of>{_NUMBER})(?!\w|[.,]\d))?"
)
_WORD = r"\b(?:scores?|scored|ratings?|rated?|grades?|graded|marks?)\b[^\d\n]{0,40}?"
_SCORE, _MARKED = re.compile(_FRACTION, re.IGNORECASE), re.compile(_WORD + _FRACTION, re.IGNORECASE)
_FINAL = re.compile(rf"\b(?:final|overall|total)\W+(?:{_WORD}|answer\W{{1,9}}){_FRACTION}", re.IGNORECASE)
_ALONE = re.compile(rf"[^\w+.-]*(?:[-+]\s+)?(?:{_WORD})?{_FRACTION}[^\w%]*(?:points?|stars?)?\W*", re.IGNORECASE)
# Requests at a time, bytes of an answer that are read, and the share of the call's time that requests may take.
_AT_ONCE, _MOST_BYTES, _SHARE = 8, 1 << 20, 0.9
# Statuses that may pass: too many requests, and what servers report of themselves.
_MAY_PASS = (408, 409, 425, 429)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that the settings name, and to no other."""

    def redirect_request(self, *given: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def judge(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """Return the judge's scores, from 0 at the lower end of ``scale`` to 1 at the upper end.

    Raises:
        UserError: if the address cannot be reached or refuses, if the key is missing, or if the judge gives a
            completion no score of the scale.
    """
    key = None if settings.key_from is None else read_key(settings.key_from, place_of(settings))
    until = time.monotonic() + _SHARE * settings.seconds
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(partial(_ask, settings, key, until), given))


def score_in(text: str, low: float, high: float) -> float | None:
    """Return the score that a judge's reply gives on the scale from ``low`` to ``high``, or None if it is not clear.

    Candidates, in this order: the final score; a first or last line that is a score alone; numbers behind a word such
    as "score" and fractions of the upper end; all numbers. All of them must agree, and a range such as "7-8" is not
    clear. "3/5" is 6 on a scale from 0 to 10.
    """
    text = re.sub(r"[*_`#$]+", "", _THOUGHT.sub("", text)).replace("−", "-").strip()
    text = _RANGE.sub(lambda found: "" if (_value(found[1]), _value(found[2])) == (low, high) else found[0], text)
    lines = text.splitlines() or [""]
    alone = [found for line in (lines[0], lines[-1]) if (found := _ALONE.fullmatch(line.strip()))]
    finals, marked, every = (list(pattern.finditer(text)) for pattern in (_FINAL, _MARKED, _SCORE))
    fractions = [found for found in every if found["of"] and _value(found["of"]) == high]
    ranges = {found.start(1) for found in _RANGE.finditer(text)}
    candidates = finals or alone or [*marked, *fractions] or every
    scores = {_on_scale(found, low, high) for found in candidates}
    if len(scores) != 1 or (candidates is not alone and ranges & {found.start("value") for found in candidates}):
        return None
    return scores.pop()


def _on_scale(found: re.Match[str], low: float, high: float) -> float | None:
    """Return a matched score on the scale, or None if it is outside the scale or a fraction of another scale."""
    value, of = _value(found["value"], high), 100.0 if found["percent"] else _value(found["of"] or f"{high}", high)
    if of != high:
        value = value * high / of if low == 0 and of > 0 else math.nan
    return value if low <= value <= high else None


def _value(text: str, high: float = 0.0) -> float:
    """Return a number that may have a decimal comma or, on a large scale, commas between thousands."""
    if high >= 1000 and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return float(text.replace(",", ""))
    return float(text.replace(",", ".")) if len(re.findall(r"[.,]", text)) < 2 else math.nan


def _ask(settings: RewardFunction, key: str | None, until: float, one: Scored) -> float:
    """Return the judge's score of a completion, from 0 to 1.

    A request that fails and a reply without a score are repeated.

    Args:
        until: Time of the monotonic clock at which requests end.
    """
    low, high = settings.scale
    values = {"prompt": one.prompt, "completion": one.text, "answer": right_answer(settings, one) or ""}
    values |= {"low": f"{low:g}", "high": f"{high:g}"}
    content = _NAMED.sub(lambda found: values[found[1]], settings.template or _TEMPLATE)
    body = {"model": settings.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    url = f"{str(settings.url).rstrip('/').removesuffix('/chat/completions')}/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    failed, hint = "it does not answer in time", "check 'url', 'model' and 'key_from', or raise 'seconds'"
    for attempt in range(settings.retries + 1):
        left = until - time.monotonic()
        if left <= 0:
            break
        try:
            with _OPENER.open(request, timeout=left) as answer:
                reply = json.loads(answer.read(_MOST_BYTES))["choices"][0]["message"]["content"]
            if (score := score_in(reply if isinstance(reply, str) else "", low, high)) is not None:
                return (score - low) / (high - low)
            failed = f"it gives no clear number from {low:g} to {high:g}: it says {str(reply)[:100]!r}"
            hint = "ask for the number alone in 'template'"
        except urllib.error.HTTPError as error:
            said = b""
            with contextlib.suppress(OSError, HTTPException):
                said = error.read(2000)
            failed = f"status {error.code}: {redact(' '.join(said.decode('utf-8', 'replace').split()))[:200]}"
            if error.code < 500 and error.code not in _MAY_PASS:
                break
        except (OSError, HTTPException) as error:
            failed = f"{type(error).__name__}: {first_line(error)}"
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            failed = f"the answer is not that of a chat completion, or is truncated: {first_line(error)}"
        if attempt < settings.retries:
            time.sleep(min(0.2 * 2**attempt, max(0.0, until - time.monotonic())))
    raise UserError(f"the judge gives row {one.row} no score: {failed}", where=url, hint=hint)
