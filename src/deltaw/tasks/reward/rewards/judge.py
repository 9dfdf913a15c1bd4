"""The reward ``judge``: a model behind an OpenAI-compatible API scores each completion.

The API key is read from an environment variable and does not appear in messages.
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
from deltaw.tasks.reward.rewards.functions import Completion, expected_answer, settings_location
from deltaw.tasks.reward.settings import RewardFunction

_TEMPLATE = """Rate the answer to the question on a scale from {low} to {high}. Reply with the number alone.

Question:
{prompt}

Answer:
{completion}"""
_PLACEHOLDER = re.compile(r"\{(prompt|completion|answer|low|high)\}")
_THINKING = re.compile(r"\A.*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_NUMBER = r"[-+]?(?:\d{1,12}(?:[.,]\d{1,12}){0,3}|\.\d{1,12})"
# A range of numbers, as in "on a scale from 0 to 10".
_RANGE = re.compile(rf"(?<![\w.,])({_NUMBER})\s*(?:to|and|-|–)\s*({_NUMBER})(?!\w|[.,]\d)", re.IGNORECASE)
# A number that may be a fraction: "7", "7/10", "7 out of 10", "70%".
_FRACTION = (
    rf"(?<![\w.,/])(?P<value>{_NUMBER})(?!\w|[.,]\d)(?:\s*(?P<percent>%)|(?:\s*(?:points?|stars?|marks?))?"
    rf"\s*(?:/|(?:out\s+)?of(?:\s+a\s+possible)?)\s*(?P<of>{_NUMBER})(?!\w|[.,]\d))?"
)
_KEYWORD = r"\b(?:scores?|scored|ratings?|rated?|grades?|graded|marks?)\b[^\d\n]{0,40}?"
_SCORE = re.compile(_FRACTION, re.IGNORECASE)
_MARKED = re.compile(_KEYWORD + _FRACTION, re.IGNORECASE)
_FINAL = re.compile(rf"\b(?:final|overall|total)\W+(?:{_KEYWORD}|answer\W{{1,9}}){_FRACTION}", re.IGNORECASE)
_LINE = rf"[^\w+.-]*(?:[-+]\s+)?(?:{_KEYWORD})?{_FRACTION}[^\w%]*(?:points?|stars?)?\W*"
_LINE_SCORE = re.compile(_LINE, re.IGNORECASE)
# Concurrent requests, maximum size of a response, and the share of the call's time limit for requests.
_MAX_CONCURRENT = 8
_MAX_BYTES = 1 << 20
_TIME_SHARE = 0.9
# Status codes below 500 that are retried.
_RETRYABLE = (408, 409, 425, 429)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Rejects redirects, so that the key is sent only to the configured address."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def judge(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return the judge's scores, scaled from 0 at the lower end of ``scale`` to 1 at the upper end.

    Raises:
        UserError: if the request fails, the key is missing, or a reply contains no score on the scale.
    """
    key = None if settings.key_from is None else read_key(settings.key_from, settings_location(settings))
    deadline = time.monotonic() + _TIME_SHARE * settings.seconds
    with ThreadPoolExecutor(_MAX_CONCURRENT) as pool:
        return list(pool.map(partial(_request_score, settings, key, deadline), completions))


def score_in(text: str, low: float, high: float) -> float | None:
    """Return the score in a judge's reply, on the scale from ``low`` to ``high``, or None if it is ambiguous.

    Candidates, in this order: the final score; a first or last line that consists of a score; numbers after a word such
    as "score" and fractions of the upper end; all numbers. All candidates must agree, and a range such as "7-8" is
    ambiguous. "3/5" is 6 on a scale from 0 to 10.
    """
    text = re.sub(r"[*_`#$]+", "", _THINKING.sub("", text)).replace("−", "-").strip()
    text = _RANGE.sub(lambda match: "" if (_value(match[1]), _value(match[2])) == (low, high) else match[0], text)
    lines = text.splitlines() or [""]
    line_scores = [match for line in (lines[0], lines[-1]) if (match := _LINE_SCORE.fullmatch(line.strip()))]
    finals, keyword_scores, all_scores = (list(pattern.finditer(text)) for pattern in (_FINAL, _MARKED, _SCORE))
    fractions = [match for match in all_scores if match["of"] and _value(match["of"]) == high]
    ranges = {match.start(1) for match in _RANGE.finditer(text)}
    candidates = finals or line_scores or [*keyword_scores, *fractions] or all_scores
    scores = {_on_scale(match, low, high) for match in candidates}
    if len(scores) != 1 or (candidates is not line_scores and ranges & {match.start("value") for match in candidates}):
        return None
    return scores.pop()


def _on_scale(match: re.Match[str], low: float, high: float) -> float | None:
    """Return a matched score on the scale, or None if it is outside the scale or a fraction of another scale."""
    value = _value(match["value"], high)
    maximum = 100.0 if match["percent"] else _value(match["of"] or f"{high}", high)
    if maximum != high:
        value = value * high / maximum if low == 0 and maximum > 0 else math.nan
    return value if low <= value <= high else None


def _value(text: str, high: float = 0.0) -> float:
    """Parse a number with an optional decimal comma or, on a large scale, commas between thousands."""
    if high >= 1000 and re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return float(text.replace(",", ""))
    return float(text.replace(",", ".")) if len(re.findall(r"[.,]", text)) < 2 else math.nan


def _request_score(settings: RewardFunction, key: str | None, deadline: float, completion: Completion) -> float:
    """Return the judge's score of a completion, from 0 to 1. Retry failed requests and replies without a score.

    Args:
        deadline: Time of the monotonic clock at which requests stop.
    """
    low, high = settings.scale
    answer = expected_answer(settings, completion) or ""
    values = {"prompt": completion.prompt, "completion": completion.text, "answer": answer}
    values |= {"low": f"{low:g}", "high": f"{high:g}"}
    content = _PLACEHOLDER.sub(lambda match: values[match[1]], settings.template or _TEMPLATE)
    body = {"model": settings.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    url = f"{str(settings.url).rstrip('/').removesuffix('/chat/completions')}/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    failure = "it does not answer in time"
    hint = "check 'url', 'model' and 'key_from', or raise 'seconds'"
    for attempt in range(settings.retries + 1):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            break
        try:
            with _OPENER.open(request, timeout=remaining) as answer:
                reply = json.loads(answer.read(_MAX_BYTES))["choices"][0]["message"]["content"]
            if (score := score_in(reply if isinstance(reply, str) else "", low, high)) is not None:
                return (score - low) / (high - low)
            failure = f"it gives no clear number from {low:g} to {high:g}: it says {str(reply)[:100]!r}"
            hint = "ask for the number alone in 'template'"
        except urllib.error.HTTPError as error:
            body_bytes = b""
            with contextlib.suppress(OSError, HTTPException):
                body_bytes = error.read(2000)
            failure = f"status {error.code}: {redact(' '.join(body_bytes.decode('utf-8', 'replace').split()))[:200]}"
            if error.code < 500 and error.code not in _RETRYABLE:
                break
        except (OSError, HTTPException) as error:
            failure = f"{type(error).__name__}: {first_line(error)}"
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            failure = f"the answer is not that of a chat completion, or is truncated: {first_line(error)}"
        if attempt < settings.retries:
            time.sleep(min(0.2 * 2**attempt, max(0.0, deadline - time.monotonic())))
    raise UserError(f"the judge gives row {completion.row} no score: {failure}", location=url, hint=hint)
