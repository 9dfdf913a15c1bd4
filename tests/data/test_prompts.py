"""Rows of prompts: formats, optional answers, and columns available to rewards."""

from __future__ import annotations

import pytest

from deltaw.data.prompts import PromptReader, prompt_messages
from deltaw.settings.data import DataSettings
from tests.byte_models import byte_tokenizer
from tests.conftest import refusal, write_rows

PROMPT = "<|im_start|>user\npaint it<|im_end|>\n<|im_start|>assistant\n"
USER = {"role": "user", "content": "paint it"}


@pytest.fixture
def read(tmp_path):
    def make(rows, **settings):
        path = write_rows(tmp_path / "prompts.jsonl", rows)
        return PromptReader(DataSettings(train=str(path), eval=None, **settings), byte_tokenizer()).prepare()

    return make


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "paint it"}, None),
        ({"prompt": "paint it", "answer": "red"}, "red"),
        ({"prompt": "paint it", "completion": "red"}, "red"),
        ({"prompt": [USER]}, None),
        ({"messages": [USER]}, None),
        ({"messages": [USER], "answer": 7}, "7"),
        ({"messages": [USER, {"role": "assistant", "content": "red"}]}, "red"),
        ({"input": [USER], "ideal": "red"}, "red"),
    ],
)
def test_prompts_of_every_format_are_rendered_equally(read, row, answer):
    (prompt,) = read([row]).train
    assert byte_tokenizer().decode(prompt.tokens) == PROMPT
    assert (prompt.answer, prompt.label_count, prompt.prompt_length) == (answer, 0, len(prompt.tokens))


def test_rewards_can_read_every_column(read):
    (prompt,) = read([{"question": "paint it", "color": "red", "n": 3}], columns={"prompt": "question"}).train
    assert prompt.columns == {"question": "paint it", "color": "red", "n": 3, "prompt": "paint it"}
    assert read([{"prompt": "paint it", "color": "red"}]).report.unused_columns == ()


def test_row_without_a_prompt_is_rejected(read):
    error = refusal(read, [{"prompt": "paint it"}, {"prompt": None, "answer": "red"}], match="no prompt")
    assert "line 2" in str(error) or "row 2" in str(error)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Name it", "input": ""},
        {"input": "Name it"},
        {"conversations": [{"from": "human", "value": "Name it"}]},
        {"messages": [{"role": "user", "content": "Name it"}]},
        {"chosen": [{"role": "user", "content": "Name it"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "Name it"}, {"role": "assistant", "content": "b"}]},
    ],
)  # fmt: skip
def test_prompts_of_every_format_are_read_without_an_answer(row):
    assert prompt_messages(row, "here")[0] == [{"role": "user", "content": "Name it"}]
