"""Log-probabilities of tokens as the two APIs write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deltaw.serving.request import TokenLogprob

# What stands for a probability of zero, whose logarithm JSON cannot write.
LEAST = -9999.0
TokenBytes = Callable[[int], bytes]


def chat_logprobs(told: Sequence[TokenLogprob], token_bytes: TokenBytes) -> dict[str, object]:
    """As in an answer of ``/v1/chat/completions``."""

    def entry(token: int, logprob: float) -> dict[str, object]:
        raw = token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    content = []
    for one in told:
        top = [entry(token, logprob) for token, logprob in one.top]
        content.append({**entry(one.token, one.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    told: Sequence[TokenLogprob], token_bytes: TokenBytes, *, offset: int = 0, first: int | None = None
) -> dict[str, object]:
    """As in an answer of ``/v1/completions``.

    Args:
        offset: characters of the text before these tokens.
        first: a token before them that has no log-probability, since nothing precedes it.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []

    def place(token: int) -> str:
        nonlocal offset
        text = _name_of(token_bytes(token))
        tokens.append(text)
        offsets.append(offset)
        offset += len(token_bytes(token).decode("utf-8", "ignore"))
        return text

    if first is not None:
        place(first)
        values.append(None)
        tops.append(None)
    for one in told:
        text = place(one.token)
        values.append(_finite(one.logprob))
        likely = {_name_of(token_bytes(t)): _finite(value) for t, value in one.top}
        likely.setdefault(text, _finite(one.logprob))
        tops.append(likely if one.top else None)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _name_of(raw: bytes) -> str:
    """A token's text; one that is a part of a character is named by its bytes, so that names differ."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(value: float) -> float:
    return max(float(value), LEAST) if value == value else LEAST
