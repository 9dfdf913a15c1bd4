"""Tests of log-probabilities in the formats of both APIs."""

from __future__ import annotations

import json

from deltaw.decoding.request import TokenLogprob
from deltaw.serving.http.answers import chat_logprobs, completion_logprobs

TEXTS = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: " é".encode()}
FIRST = TokenLogprob(1, -0.5, ((1, -0.5), (2, -1.0), (3, -2.0)))
ENTRIES = [FIRST, TokenLogprob(2, float("-inf"), ((4, -0.25),)), TokenLogprob(4, -1.5)]


def test_chat_logprobs_contain_bytes_of_each_token():
    content = chat_logprobs(ENTRIES, TEXTS.__getitem__)["content"]
    assert [entry["bytes"] for entry in content] == [[97], [0xC3], list(" é".encode())]
    assert [top["bytes"] for top in content[0]["top_logprobs"]] == [[97], [0xC3], [0xA9]]
    assert content[1]["logprob"] == -9999.0 and content[2]["top_logprobs"] == []
    json.dumps(content, allow_nan=False)


def test_completion_logprobs_distinguish_partial_characters():
    result = completion_logprobs(ENTRIES, TEXTS.__getitem__, offset=10, first=4)
    tops = [{"a": -0.5, "bytes:\\xc3": -1.0, "bytes:\\xa9": -2.0}, {" é": -0.25, "bytes:\\xc3": -9999.0}]
    assert result == {
        "tokens": [" é", "a", "bytes:\\xc3", " é"],
        "token_logprobs": [None, -0.5, -9999.0, -1.5],
        "top_logprobs": [None, *tops, None],
        "text_offset": [10, 12, 13, 13],
    }
