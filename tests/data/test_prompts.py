"""Rows of prompts: their forms, with and without an answer, and what rewards can read of them."""

from __future__ import annotations

import pytest

from deltaw.data.prompts import PromptReader, asked
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from tests.byte_models import byte_tokenizer
from tests.conftest import write_rows

ASKED = "<|im_start|>user\npaint it<|im_end|>\n<|im_start|>assistant\n"
USER = {"role": "user", "content": "paint it"}


@pytest.fixture
def read(tmp_path):
    def make(rows, **settings):
        path = write_rows(tmp_path / "prompts.jsonl", rows)
        return PromptReader(DataSettings(train=str(path), eval=None, **settings), byte_tokenizer()).prepared()

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
def test_a_prompt_is_what_a_model_is_given_whatever_its_form(read, row, answer):
    (prompt,) = read([row]).train
    assert byte_tokenizer().decode(prompt.tokens) == ASKED
    assert (prompt.answer, prompt.label_count, prompt.prompt_length) == (answer, 0, len(prompt.tokens))


def test_rewards_read_every_column_under_its_own_name_or_the_tasks(read):
    (prompt,) = read([{"question": "paint it", "color": "red", "n": 3}], columns={"prompt": "question"}).train
    assert prompt.columns == {"question": "paint it", "color": "red", "n": 3, "prompt": "paint it"}
    assert read([{"prompt": "paint it", "color": "red"}]).report.unused_columns == ()


def test_a_row_without_a_prompt_is_named(read):
    with pytest.raises(UserError, match="no prompt") as refused:
        read([{"prompt": "paint it"}, {"prompt": None, "answer": "red"}])
    assert "line 2" in str(refused.value) or "row 2" in str(refused.value)


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
def test_prompts_of_every_form_are_read_without_an_answer(row):
    assert asked(row, "here")[0] == [{"role": "user", "content": "Name it"}]
