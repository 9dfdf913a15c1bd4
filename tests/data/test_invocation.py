"""Invocation tokens of adapters, and the position from which an adapter is active."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data.chat_template import acts_before_labels, ending_of_prompts, opening_of_answer, with_activation
from deltaw.data.example import Example
from deltaw.data.packing import pack, packed_length, pad, split_into_microbatches
from tests.byte_models import byte_tokenizer


def row(prompt: list[int], answer: list[int], number: int = 1) -> Example:
    tokens = np.asarray([*prompt, *answer], np.int32)
    return Example(number, tokens, np.arange(len(tokens)) >= len(prompt), len(prompt), "answer")


def test_answer_opening_and_common_prompt_ending():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(opening_of_answer(tokenizer)) == "<|im_start|>assistant\n"
    without_header = "{% for m in messages %}{{ '[INST]' + m.content if m.role == 'user' else m.content }}{% endfor %}"
    for template in (without_header, "{{ nothing.like.this }}"):
        tokenizer.chat_template = template
        assert opening_of_answer(tokenizer) == []
    for prompts, ending in (
        ([[1, 2, 3], [4, 2, 3], [5, 5, 2, 3]], [2, 3]),
        ([[1, 2], [1, 3]], []),
        ([[1, 2], []], []),
        ([list(range(50))], list(range(34, 50))),
    ):
        assert ending_of_prompts([row(prompt, [9]) for prompt in prompts]) == ending


def test_last_occurrence_before_the_answer_activates():
    assert with_activation(row([7, 8, 1, 7, 8, 2], [3]), [7, 8]).active_from == 3
    assert with_activation(row([7, 8, 1], [7, 8]), [7, 8]).active_from == 0
    absent, present, early = (with_activation(row(prompt, [3]), [7, 8]) for prompt in ([7, 1, 8], [1, 7, 8], [1, 7, 8]))
    early.is_label[1] = True  # an earlier answer, before the adapter is active
    assert absent.active_from == 4
    assert [acts_before_labels(example) for example in (absent, present, early)] == [False, True, False]


@pytest.mark.parametrize("share", [True, False])
def test_rows_share_only_inactive_tokens(share):
    stem = list(range(10, 20))
    quoting = row([*stem, 7, 8, 30, 31, 40, 7, 8], [33])  # a prompt that quotes another row's answer
    rows = [row([*stem, 7, 8], [30, 31]), row([*stem, 7, 8], [30, 32]), quoting]
    rows = [with_activation(example, [7, 8]) for example in rows]
    batch = pack(rows, share=share, fill=False)
    active = batch.inputs["adapter_active"].numpy()[0]
    tokens = batch.inputs["input_ids"].numpy()[0]
    for member in batch.members:
        start = member.example.active_from
        np.testing.assert_array_equal(tokens[member.indices], member.example.tokens)
        np.testing.assert_array_equal(active[member.indices], np.arange(len(member.indices)) >= start)
    assert active.sum() == 4 + 4 + 3 and len(tokens) == (10 + 4 + 4 + 8 if share else 14 + 14 + 18)
    assert packed_length(rows, share=share, fill=False) == len(tokens)


def test_padded_rows_have_an_activation_mask():
    rows = [with_activation(row([1, 2, 7], [3]), [7]), with_activation(row([7], [3, 4, 5, 6]), [7])]
    assert pad(rows).inputs["adapter_active"].int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert "adapter_active" not in pad([row([1], [2])]).inputs


def test_inactive_tokens_can_cost_less():
    rows = [with_activation(row([*range(10 + n, 50 + n), 7], [3, 4]), [7]) for n in range(4)]
    assert len(split_into_microbatches(rows, 50)) == 4
    assert len(split_into_microbatches(rows, 50, inactive_cost=0.1)) == 1
    assert packed_length(rows, inactive_cost=0.1, fill=False) == 4 * (3 + 4)
