"""Exact value of the last number in a text.

The last text that looks like a number must be one. It includes all adjacent digits, points and separators, exponents,
superscripts and denominators, so that no part of it is read as a separate number. A sign after a letter or a digit is a
hyphen.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER_LIKE = re.compile(
    r"(?:\^\{?|\}\{)?(?:(?<!\w)[-+\u2212\u2013])?\.?\d[\d.,\u00a0\u202f]*(?:(?<=\d)[eE][-+\u2212]?\d+)?(?:/\d[\d.,/]*)?"
    r"[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u207e\u2150-\u215f]*"
)
# Digits in groups of three after the first group, or without separators.
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212\u2013]?)"
    r"(?P<digits>(?!0)\d{1,3}(?P<separator>[,\u00a0\u202f])\d{3}(?:(?P=separator)\d{3})*|\d*)"
    r"(?P<decimals>(?:\.\d+)?)(?:[eE](?P<exponent>[-+\u2212]?\d{1,3}))?(?:/(?P<denominator>\d+))?"
)


def last_number(text: str | None) -> Fraction | None:
    """Return the exact value of the last number of a text, or None if there is none or it is ambiguous.

    Ambiguous are for example ``1,2,3``, ``1.5.2``, ``1.234,5``, ``2^3`` and ``5²``.
    """
    candidates = _NUMBER_LIKE.findall(text or "")
    match = _NUMBER.fullmatch(candidates[-1].rstrip(".,/\u00a0\u202f")) if candidates else None
    if match is None:
        return None
    digits = match["digits"].replace(match["separator"] or ",", "")
    sign, exponent = (re.sub("[\u2212\u2013]", "-", match[name] or "") for name in ("sign", "exponent"))
    try:
        return Fraction(f"{sign}{digits}{match['decimals']}e{exponent or 0}") / int(match["denominator"] or 1)
    except (ValueError, ZeroDivisionError):  # too many digits, or a denominator of 0
        return None
