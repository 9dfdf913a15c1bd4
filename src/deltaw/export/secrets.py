"""Removal of secrets from published texts, with the patterns of detect-secrets and additional ones.

Only patterns of known secret types are used. Keywords such as "password" and entropy checks are not, because settings
and cards contain hashes.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from deltaw.errors import redact

MARK = "REMOVED"
# Secret types that detect-secrets does not detect or detects only partially.
_PATTERNS = {
    "private key": r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----"
    r"(?:(?s:.{0,20000}?)-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----|(?:[\s\\rn]*[A-Za-z0-9+/=]{20,})*)",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "GitHub token": r"\b(?:gh[pousr]_\w{16,}|github_pat_\w{16,})",
    "AWS secret key": r"(?i:aws.{0,40}?[\s:=\"'])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])",
    "Google API key": r"\bAIza[\w-]{30,}",
    "Stripe key": r"\b(?:[sr]k|whsec)_(?:live|test)_\w{16,}",
    "Slack token": r"\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}",
    "npm token": r"\bnpm_[A-Za-z0-9]{30,}|(?<=_authToken=)[^\s\"']{8,}",
    "JSON web token": r"\beyJ[\w=-]{8,}\.[\w=-]{8,}(?:\.[\w.+/=-]*)?",
    "bearer token": r"(?i:\bbearer\s+)[\w.~+/-]{20,}=*",
    "API key": r"\b(?:sk-|gsk_|r8_|xai-|pplx-|nvapi-|tvly-|dop_v1_|dapi|hvs\.|glpat-)[\w-]{16,}",
}
_TOP_FOLDERS = "home|Users|root|srv|mnt|media|data|opt|var|tmp|private|Volumes|work"
_PATH = re.compile(rf"(?<![\w.:/~-])(?:~/|/(?:{_TOP_FOLDERS})/|[A-Za-z]:\\)[\w./\\-]+")
# Detectors of other information, or of secrets covered above.
_IGNORED = ("Public IP (ipv4)", "Basic Auth Credentials")


def remove_secrets(text: str) -> tuple[str, list[str]]:
    """Replace each secret by :data:`MARK`, and return the text and the types of the secrets.

    Values of environment variables such as HF_TOKEN, and user information in URLs, also count as secrets.
    """
    redacted = redact(text, MARK)
    kinds: list[str] = ["key or password from this machine's environment or a URL"] * (redacted != text)
    text = redacted
    for kind, pattern in _patterns():
        text, count = pattern.subn(_replacement, text)
        kinds += [kind] * bool(count)
    return text, list(dict.fromkeys(kinds))


def path_in(text: str) -> str | None:
    """Return the first text that looks like a path in a user's file system, or None."""
    match = _PATH.search(text)
    return None if match is None else match[0].rstrip()


def _replacement(match: re.Match[str]) -> str:
    """Return the replacement of a match. Leading and trailing quotes and white space are retained."""
    return re.sub(r"(?s)\A([\s:=\"']*).*?([\s\"']*)\Z", rf"\1{MARK}\2", match[0])


@functools.cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    kinds: Any = get_mapping_from_secret_type_to_class().items()
    detectors = {kind: cls for kind, cls in kinds if issubclass(cls, RegexBasedDetector) and kind not in _IGNORED}
    patterns = [(kind, re.compile(pattern)) for kind, pattern in _PATTERNS.items()]
    return patterns + [(kind, pattern) for kind, cls in detectors.items() for pattern in cls.denylist]
