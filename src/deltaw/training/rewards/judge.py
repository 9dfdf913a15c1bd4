"""The reward ``judge``: a model behind an address with OpenAI's API gives each completion a number.

Knows the API's one route for chats. The key is read from an environment variable by name and appears in no message.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from deltaw.errors import UserError, first_line
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards.base import Scored, place_of, right_answer
from deltaw.training.rewards.texts import last_number

_TEMPLATE = """Rate the answer to the question on a scale from {low} to {high}. Reply with the number alone.

Question:
{prompt}

Answer:
{completion}"""
_NAMED = re.compile(r"\{(prompt|completion|answer|low|high)\}")
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
    """What the judge gives, from 0 at the lower end of ``scale`` to 1 at the upper; None where it gives no number.

    Raises:
        UserError: the address cannot be reached or refuses, the key is missing, or the judge gives none of the
            completions a number of the scale.
    """
    key = None
    if settings.key_from is not None and not (key := os.environ.get(settings.key_from)):
        hint = f"set {settings.key_from}, or leave 'key_from' out"
        raise UserError(f"{settings.key_from} is not set", where=place_of(settings), hint=hint)
    until = time.monotonic() + _SHARE * settings.seconds
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        said = list(pool.map(partial(_asked, settings, key, until), given))
    found = [_number(settings, text) for text in said]
    if all(value is None for value in found):
        low, high = settings.scale
        what = f"the judge gives no number from {low:g} to {high:g}; it says {said[0][:100]!r}"
        raise UserError(what, where=place_of(settings), hint="ask for the number alone in 'template'")
    return found


def _number(settings: RewardFunction, text: str) -> float | None:
    low, high = settings.scale
    value = last_number(text)
    return None if value is None or not low <= value <= high else (value - low) / (high - low)


def _asked(settings: RewardFunction, key: str | None, until: float, one: Scored) -> str:
    """What the judge says of a completion.

    Args:
        until: when it must have answered, by the monotonic clock.
    """
    values = {"prompt": one.prompt, "completion": one.text, "answer": right_answer(settings, one) or ""}
    values |= {"low": f"{settings.scale[0]:g}", "high": f"{settings.scale[1]:g}"}
    content = _NAMED.sub(lambda found: values[found[1]], settings.template or _TEMPLATE)
    body = {"model": settings.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    url = f"{str(settings.url).rstrip('/').removesuffix('/chat/completions')}/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    failed = "it does not answer in time"
    for attempt in range(settings.retries + 1):
        left = until - time.monotonic()
        if left <= 0:
            break
        try:
            with _OPENER.open(request, timeout=left) as answer:
                return _content(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            failed = f"status {error.code}: {said.replace(key, '…') if key else said}"
            if error.code < 500 and error.code not in _MAY_PASS:
                break
        except OSError as error:
            failed = first_line(error)
        time.sleep(min(0.2 * 2**attempt, max(0.0, until - time.monotonic())))
    what = f"the judge cannot be asked about row {one.row}: {failed}"
    raise UserError(what, where=url, hint="check 'url', 'model' and 'key_from', or raise 'seconds'")


def _content(answer: bytes) -> str:
    """The text of an answer; empty where there is none, as where the judge only thought."""
    try:
        return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
