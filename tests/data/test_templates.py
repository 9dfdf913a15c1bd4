"""Rendering and loss masks, checked against the text's own offsets and against what must be refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.formats import Conversation, Pair, Record, Text
from deltaw.data.report import BadRowError
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError
from tests.data.conftest import CHATML, make_tokenizer

PHI = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_THOUGHT = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
STRIPS_HISTORY = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ALWAYS_PROMPTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
WRITES_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} ###\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<s>final{% endif %}\n"
    "{{ m.content }}{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def talk(*contents: str, system: str | None = None, learned: tuple[bool, ...] | None = None) -> Conversation:
    """A conversation of user and assistant in turns."""
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    default = tuple(message["role"] == "assistant" for message in messages)
    return Conversation(tuple(messages), learned or default)


def unrolled(record: Record, template: str | None = CHATML, labels: str = "all-turns", **kind: object) -> list[Encoded]:
    """The examples that a record becomes."""
    tokenizer = make_tokenizer(template, **kind)  # type: ignore[arg-type]
    return Encoder(tokenizer, "auto", labels).encode([record], ["data.jsonl, row 7"])[0]  # type: ignore[arg-type]


def encode(record: Record, *arguments: object, **kind: object) -> Encoded:
    """The only example that a record becomes."""
    (encoded,) = unrolled(record, *arguments, **kind)  # type: ignore[arg-type]
    return encoded


def labeled(encoded: Encoded) -> list[str]:
    """The text of each span of labels."""
    tokenizer = make_tokenizer()
    return [tokenizer.decode(encoded.tokens[start:end]) for start, end in encoded.spans]


def text_of(tokens: list[int]) -> str:
    return make_tokenizer().decode(tokens)


# Chat


words = st.text(alphabet="ab é\n.1<|", max_size=8).map(lambda text: text + "x")


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.none() | words)
def test_the_mask_is_what_the_offsets_of_the_rendered_text_say(turns, system):
    tokenizer = make_tokenizer()
    conversation = talk(*(content for pair in turns for content in pair), system=system)
    ((encoded,),) = Encoder(tokenizer).encode([conversation], ["row 1"])
    # An independent way: find the answers in the text, and map characters to tokens.
    text = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
    tokenized = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
    expected = [any(a <= left and right <= b for a, b in spans) for left, right in tokenized["offset_mapping"]]
    mask = np.zeros(len(encoded.tokens), dtype=bool)
    for start, end in encoded.spans:
        mask[start:end] = True
    assert encoded.tokens == tokenized["input_ids"][: len(encoded.tokens)]
    assert not any(expected[len(encoded.tokens) :])
    assert mask.tolist() == expected[: len(encoded.tokens)]
    assert encoded.answer == turns[-1][1]


def test_answers_that_belong_to_the_prompt_are_not_learned() -> None:
    assert labeled(encode(talk("a", "b", "c", "d", learned=(False, False, False, True)))) == ["d<|im_end|>"]


def test_an_end_mark_that_the_answer_already_has_is_not_learned_twice() -> None:
    encoded = encode(talk("hi", "yes<|im_end|>"))
    assert labeled(encoded) == ["yes<|im_end|>"]
    assert encoded.answer == "yes"


def test_a_turn_ends_with_the_token_at_which_generation_stops() -> None:
    """Some templates close the answer first, and then the turn."""
    closes = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}<|end|><s><|im_end|></s>")
    tokenizer = make_tokenizer(closes)
    assert labeled(encode(talk("a", "b", "c", "d"), closes.replace("<|end|>", "</s>"))) == [
        "b</s><s><|im_end|>",
        "d</s><s><|im_end|>",
    ]
    assert labeled(encode(talk("a", "b"), closes)) == ["b<|end|>"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_without_an_end_mark_every_answer_learns_to_end_with_eos() -> None:
    first, second = unrolled(talk("a", "b", "c", "d"), NO_END)
    assert text_of(first.tokens) == "user: a\nassistant: b<|im_end|>"
    assert labeled(first) == [" b<|im_end|>"]
    assert text_of(second.tokens) == "user: a\nassistant: b\nuser: c\nassistant: d<|im_end|>"
    assert labeled(second) == [" d<|im_end|>"]


def test_an_end_written_in_plain_letters_is_learned() -> None:
    assert labeled(encode(talk("a", "b"), WRITES_END)) == [" b ###<|im_end|>"]


@pytest.mark.parametrize("template", [THINKS_LAST, HARMONY])
def test_answers_that_are_rendered_otherwise_when_more_follows_are_examples_of_their_own(template: str) -> None:
    conversation = talk("a", "final", "c", "final")
    first, second = unrolled(conversation, template)
    assert labeled(first) == labeled(second)
    assert labeled(second)[0].rstrip("/s<>im_end|").endswith("final")
    assert first.turns == (1,) and second.turns == (3,)
    assert unrolled(conversation, template, labels="last") == [second]
    # What the model is given to write each of them is what precedes the label.
    tokenizer = make_tokenizer(template)
    for example, turn in ((first, 1), (second, 3)):
        given_prompt = Encoder(tokenizer).prompt(conversation.messages[:turn])
        assert example.tokens[: example.prompt_length] == given_prompt
        assert example.spans == [(len(given_prompt), len(example.tokens))]


def test_turns_are_one_example_up_to_where_the_template_rewrites_them() -> None:
    """Only the last answer is rendered with a thought: those before it agree with each other."""
    first, second, third = unrolled(talk("a", "b", "c", "d", "e", "f"), THINKS_LAST)
    assert [text_of(e.tokens).count("<think>") for e in (first, second, third)] == [1, 1, 1]
    conversation = talk("a", "<think>hm</think>b", "c", "d", "e", "f")
    thought, rest = unrolled(conversation, STRIPS_HISTORY)
    assert labeled(thought) == ["<think>hm</think>b<|im_end|>"]
    assert labeled(rest) == ["d<|im_end|>", "f<|im_end|>"]
    assert "hm" not in text_of(rest.tokens)


def test_a_thought_that_a_template_strips_is_learned_before_its_answer() -> None:
    assert labeled(encode(talk("a", "<think>hm</think>b"), STRIPS_THOUGHT)) == ["<think>hm</think>b<|im_end|>"]
    first, second = unrolled(talk("a", "<think>hm</think>b", "c", "<think>oh</think>d"), STRIPS_THOUGHT)
    assert labeled(first) == ["<think>hm</think>b<|im_end|>"]
    assert labeled(second) == ["<think>oh</think>d<|im_end|>"]
    assert "hm" not in text_of(second.tokens)


def test_a_template_that_prompts_when_it_is_not_asked_to_is_refused() -> None:
    with pytest.raises(UserError, match="adds text after the answer"):
        encode(talk("a", "b"), ALWAYS_PROMPTS)


def test_a_template_that_leaves_the_system_message_out_is_refused() -> None:
    deaf = CHATML.replace("messages %}", "messages if m.role != 'system' %}")
    with pytest.raises(UserError, match=r"omits the content of turn 1 \('system'\)"):
        encode(talk("a", "b", system="Speak French."), deaf)


def test_an_answer_is_learned_after_its_own_prompt_if_the_template_renders_it_differently_later() -> None:
    counts = "{{ messages | length }}" + CHATML
    first, second = unrolled(talk("a", "b", "c", "d"), counts)
    assert text_of(first.tokens).startswith("1<|im_start|>user")
    assert text_of(second.tokens).startswith("3<|im_start|>user")
    assert (labeled(first), labeled(second)) == (["b<|im_end|>"], ["d<|im_end|>"])


def test_a_template_whose_prompt_is_not_in_the_text_is_refused() -> None:
    renamed = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")
    with pytest.raises(BadRowError, match="is not found in the rendered turn"):
        encode(talk("a", "b"), renamed)


def test_an_answer_whose_tokens_would_merge_with_the_prompt_is_tokenized_apart_as_when_it_is_written() -> None:
    newlines = [("Ċ", "Ċ")]
    encoded = encode(talk("a", "\nb"), merges=newlines)
    assert labeled(encoded) == ["\nb<|im_end|>"]
    tokenizer = make_tokenizer(merges=newlines)
    assert encoded.tokens[: encoded.prompt_length] == Encoder(tokenizer).prompt("a")
    assert labeled(encode(talk("a", "b"), merges=newlines)) == ["b<|im_end|>"]


def test_what_a_template_raises_is_said_with_the_row() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="no system here") as refused:
        encode(talk("a", "b", system="s"), strict)
    assert refused.value.where == "data.jsonl, row 7"


def test_empty_answers_are_not_learned() -> None:
    encoded = encode(talk("a", " ", "c", ""))
    assert encoded.spans == []
    assert labeled(encode(talk("a", "", "c", "d"))) == ["d<|im_end|>"]


def test_calls_of_tools_are_learned_where_the_template_renders_them() -> None:
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    messages = (
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": '{"now": 12}'},
        {"role": "assistant", "content": "noon"},
    )
    conversation = Conversation(messages, (False, True, False, True))
    renders = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}",
    )
    first, last = labeled(encode(conversation, renders))
    assert first.startswith('<call>{"name": "clock"')
    assert last == "noon<|im_end|>"
    with pytest.raises(UserError, match="changes the answer in turn 2"):
        encode(conversation, CHATML)


def test_arguments_of_calls_are_given_as_text_to_a_template_that_wants_it() -> None:
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    messages = ({"role": "user", "content": "time?"}, {"role": "assistant", "content": "", "tool_calls": calls})
    joins = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}",
    )
    encoded = encode(Conversation(messages, (False, True)), joins)
    assert labeled(encoded) == ['clock{"zone": "UTC"}<|im_end|>']


def test_an_empty_thought_closes_the_one_that_the_prompt_opens() -> None:
    opens = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    encoded = encode(talk("a", "b"), opens)
    assert labeled(encoded) == ["</think>b<|im_end|>"]
    assert text_of(encoded.tokens).count("<think>") == 1


def test_a_prompt_and_its_completion_become_a_question_and_its_answer() -> None:
    assert encode(Pair("hi", "yes")) == encode(talk("hi", "yes"))
    assert encode(Pair("hi", "yes", system="s")) == encode(talk("hi", "yes", system="s"))


def test_rows_that_cannot_be_used_are_told_of_and_the_others_encoded() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    told: list[tuple[int, str]] = []
    records = [talk("a", "b"), talk("a", "b", system="s"), None, talk("c", "d")]
    encoded = Encoder(make_tokenizer(strict)).encode(
        records, ["1", "2", "3", "4"], lambda place, error: told.append((place, error.reason))
    )
    assert [len(examples) for examples in encoded] == [1, 0, 0, 1]
    assert told == [(1, "refused by the chat template")]


def test_what_rows_become_has_an_identity() -> None:
    def identity(template: str | None = CHATML, labels: str = "all-turns", date: str | None = None) -> str:
        return Encoder(make_tokenizer(template), "auto", labels, date).identity  # type: ignore[arg-type]

    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert identity() == identity(date="2026-01-31")
    assert len({identity(), identity(PHI), identity(None), identity(labels="last")}) == 4
    assert identity(dated, date="2026-01-31") != identity(dated, date="2026-02-01")


def test_a_chat_template_that_is_not_there_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match="no chat template"):
        Encoder(make_tokenizer(None), "chat")


# Plain


@pytest.mark.parametrize("bos", [False, True])
def test_plain_pairs_are_tokenised_apart_with_bos_before_and_eos_after(bos: bool) -> None:
    encoded = encode(Pair("ab", "cd"), None, bos=bos, merges=[("b", "c")])
    assert text_of(encoded.tokens) == ("<s>" if bos else "") + "abcd<|im_end|>"
    assert encoded.prompt_length == 2 + bos
    assert encoded.spans == [(2 + bos, 5 + bos)]
    assert encoded.answer == "cd"
    ended = encode(Pair("ab", "cd<|im_end|>"), None)
    assert (text_of(ended.tokens), ended.answer) == ("abcd<|im_end|>", "cd")
    assert text_of(encode(Pair("ab", "cd"), None, eos=None).tokens) == "abcd"
    # The first token is never a label.
    assert encode(Pair("", "cd"), None, bos=bos).spans == [(1, 3 + bos)]


def test_of_plain_text_all_but_the_first_token_is_learned() -> None:
    encoded = encode(Text("abc"))
    assert (text_of(encoded.tokens), encoded.spans) == ("abc<|im_end|>", [(1, 4)])
    assert (encoded.prompt_length, encoded.answer) == (0, None)
    assert encode(Text("abc<|im_end|>")) == encoded
    assert text_of(encode(Text("<s>abc"), bos=True).tokens) == "<s>abc<|im_end|>"
    assert encode(Text(" \n")).spans == []


def test_plain_conversations_end_each_answer_with_eos() -> None:
    encoded = encode(talk("a", "b", "c", "d", system="s"), None)
    assert text_of(encoded.tokens) == "s\na\nb<|im_end|>c\nd<|im_end|>"
    assert labeled(encoded) == ["b<|im_end|>", "d<|im_end|>"]
    assert labeled(encode(talk("a", "b", "c", "d"), None, labels="last")) == ["d<|im_end|>"]


def test_a_plain_prompt_with_earlier_answers_is_what_the_row_has_before_the_next() -> None:
    tokenizer = make_tokenizer(None, bos=True)
    conversation = talk("a", "b", "c", "d", system="s")
    ((encoded,),) = Encoder(tokenizer).encode([conversation], ["row 1"])
    given_prompt = Encoder(tokenizer).prompt(conversation.messages[:-1])
    assert text_of(given_prompt) == "<s>s\na\nb<|im_end|>c\n"
    assert encoded.tokens[: encoded.prompt_length] == given_prompt


def test_chat_and_plain_rows_keep_their_places_in_a_batch() -> None:
    records = [Text("one"), talk("a", "b"), Pair("c", "d"), Text("two")]
    places = [f"row {i}" for i in range(4)]
    tokenizer = make_tokenizer()
    together = Encoder(tokenizer).encode(records, places)
    assert together == [Encoder(tokenizer).encode([record], ["row"])[0] for record in records]
