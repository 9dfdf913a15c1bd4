"""Rendering and loss masks, checked against the text's own offsets and against what must be refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data.formats import Conversation, Pair, Record, Text
from deltaw.data.templates import Encoded, Encoder, fewest
from tests.data.conftest import CHATML, assistant, make_tokenizer, refusal, user
from tests.data.test_masks import marked

STRIPS_THOUGHT = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
STRIPS_HISTORY = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CLOSES = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}<|end|><s><|im_end|></s>")
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
JOINS = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
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
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(tuple(messages), learned or tuple(message["role"] == "assistant" for message in messages))


def unrolled(record: Record, template: str | None = CHATML, labels: str = "all-turns", **kind: object) -> list[Encoded]:
    """The examples that a record becomes."""
    tokenizer = make_tokenizer(template, **kind)  # type: ignore[arg-type]
    return Encoder(tokenizer, "auto", labels).encode([record], ["data.jsonl, row 7"])[0]  # type: ignore[arg-type]


def encode(record: Record, *arguments: object, **kind: object) -> Encoded:
    """The only example that a record becomes."""
    (encoded,) = unrolled(record, *arguments, **kind)  # type: ignore[arg-type]
    return encoded


def shown(record: Record, *arguments: object, **kind: object) -> list[str]:
    """The examples as text with « and » around what is trained on."""
    return [marked(make_tokenizer(), encoded) for encoded in unrolled(record, *arguments, **kind)]  # type: ignore[arg-type]


def labeled(examples: list[str]) -> list[list[str]]:
    """The text of each span of labels."""
    return [[part.partition("»")[0] for part in text.split("«")[1:]] for text in examples]


# Chat


words = st.text(alphabet="ab é\n.1<|", max_size=8).map(lambda text: text + "x")


@settings(max_examples=40)
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
    assert mask.tolist() == expected[: len(encoded.tokens)] and not any(expected[len(encoded.tokens) :])
    assert encoded.answer == turns[-1][1]


@pytest.mark.parametrize(
    ("record", "template", "expected"),
    [
        (talk("a", "b", "c", "d", learned=(False, False, False, True)), CHATML, [["d<|im_end|>"]]),
        (talk("a", "b", "c", "d", "e", "f", learned=(*[False] * 3, True, False, False)), CHATML, [["d<|im_end|>"]]),
        (talk("hi", "yes<|im_end|>"), CHATML, [["yes<|im_end|>"]]),
        (talk("a", " ", "c", ""), CHATML, [[]]),
        (talk("a", "", "c", "d"), CHATML, [["d<|im_end|>"]]),
        # A turn ends where generation stops; some templates close the answer first, and then the turn.
        (talk("a", "b"), CLOSES, [["b<|end|>"]]),
        (talk("a", "b", "c", "d"), CLOSES.replace("<|end|>", "</s>"), [[f"{a}</s><s><|im_end|>" for a in "bd"]]),
        (talk("a", "b"), WRITES_END, [[" b ###<|im_end|>"]]),
        # An empty thought closes the one that the prompt opens.
        (talk("a", "b"), OPENS, [["</think>b<|im_end|>"]]),
        (talk("a", "<think>hm</think>b"), STRIPS_THOUGHT, [["<think>hm</think>b<|im_end|>"]]),
    ],
)
def test_an_answer_and_its_end_are_learned_as_the_template_renders_them(record, template, expected):
    examples = shown(record, template)
    assert labeled(examples) == expected
    # Nothing is learned from what follows the last label, so it is not computed.
    assert all(text.endswith("»") or "«" not in text for text in examples)


def test_without_an_end_mark_every_answer_learns_to_end_with_eos() -> None:
    assert encode(talk("hi", "yes<|im_end|>")).answer == "yes"
    assert shown(talk("a", "b", "c", "d"), NO_END) == [
        "user: a\nassistant:« b<|im_end|>»",
        "user: a\nassistant: b\nuser: c\nassistant:« d<|im_end|>»",
    ]


def test_answers_that_are_rendered_otherwise_when_more_follows_are_examples_of_their_own() -> None:
    conversation = talk("a", "final", "c", "final")
    first, second = unrolled(conversation, HARMONY)
    assert labeled(shown(conversation, HARMONY)) == [["<s>finalfinal</s>"]] * 2
    assert first.turns == (1,) and second.turns == (3,)
    assert unrolled(conversation, HARMONY, labels="last") == [second]
    # What the model is given to write each of them is what precedes the label.
    for example, turn in ((first, 1), (second, 3)):
        given_prompt = Encoder(make_tokenizer(HARMONY)).prompt(conversation.messages[:turn])
        assert example.tokens[: example.prompt_length] == given_prompt
        assert example.spans == [(len(given_prompt), len(example.tokens))]


def test_turns_are_one_example_up_to_where_the_template_rewrites_them() -> None:
    examples = shown(talk("a", "<think>hm</think>b", "c", "d", "e", "f"), STRIPS_HISTORY)
    assert labeled(examples) == [["<think>hm</think>b<|im_end|>"], ["d<|im_end|>", "f<|im_end|>"]]
    assert "hm" not in examples[1]
    first, second = shown(talk("a", "b", "c", "d"), "{{ messages | length }}" + CHATML)
    assert first.startswith("1<|im_start|>user") and second.startswith("3<|im_start|>user")
    assert labeled([first, second]) == [["b<|im_end|>"], ["d<|im_end|>"]]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([[1, 2], [1, 2, 3], [1, 2, 3, 4]], [[0, 1, 2]]),
        ([[1, 9], [1, 2, 3], [1, 2, 3, 4]], [[0], [1, 2]]),
        ([[1], [2], [1, 3]], [[1], [0, 2]]),
        ([[1], [1, 2], [3]], [[0, 1], [2]]),
    ],
)
def test_turns_share_the_example_of_a_turn_that_continues_them(turns, expected):
    assert fewest(turns) == expected


CLOCK = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLED = Conversation((user("time?"), assistant("", tool_calls=[CLOCK])), (False, True))


@pytest.mark.parametrize(
    ("record", "template", "said"),
    [
        (talk("a", "b"), CHATML.partition("{% if")[0] + "<|im_start|>assistant\n", "adds text after the answer"),
        (
            talk("a", "b", system="Speak French."),
            CHATML.replace("messages %}", "messages if m.role != 'system' %}"),
            "omits the content of turn 1 ('system')",
        ),
        (talk("a", "b"), CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"), "is not found in the rendered"),
        (talk("a", "b", system="s"), STRICT, "no system here"),
        (CALLED, CHATML, "changes the answer in turn 2"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_row(record, template, said):
    refused = refusal(encode, record, template)
    assert said in refused.what and str(refused.where).startswith("data.jsonl, row 7")


def test_an_answer_whose_tokens_would_merge_with_the_prompt_is_tokenized_apart_as_when_it_is_written() -> None:
    newlines = [("Ċ", "Ċ")]
    tokenizer = make_tokenizer(merges=newlines)
    encoded = encode(talk("a", "\nb"), merges=newlines)
    assert tokenizer.decode(encoded.tokens[slice(*encoded.spans[0])]) == "\nb<|im_end|>"
    assert encoded.tokens[: encoded.prompt_length] == Encoder(tokenizer).prompt("a")
    (other,) = encode(talk("a", "b"), merges=newlines).spans
    assert other[0] == encoded.prompt_length


def test_arguments_of_calls_are_given_as_text_to_a_template_that_wants_it() -> None:
    joins = CHATML.replace("{{ m.content }}", JOINS)
    assert labeled(shown(CALLED, joins)) == [['clock{"zone": "UTC"}<|im_end|>']]


def test_a_prompt_and_its_completion_become_a_question_and_its_answer() -> None:
    for system in (None, "s"):
        assert encode(Pair("hi", "yes", system=system)) == encode(talk("hi", "yes", system=system))


def test_what_rows_become_has_an_identity() -> None:
    def identity(template: str | None = CHATML, labels: str = "all-turns", date: str | None = None) -> str:
        return Encoder(make_tokenizer(template), "auto", labels, date).identity  # type: ignore[arg-type]

    dated = [identity("{{ strftime_now('%d %b %Y') }}" + CHATML, date=f"2026-0{month}-01") for month in (1, 2)]
    assert identity() == identity(date="2026-01-31")
    assert len({identity(), identity(NO_END), identity(None), identity(labels="last"), *dated}) == 6


# Plain


@pytest.mark.parametrize("bos", [False, True])
def test_plain_pairs_are_tokenised_apart_with_bos_before_and_eos_after(bos: bool) -> None:
    pair = Pair("ab", "cd")
    (text,) = shown(pair, None, bos=bos, merges=[("b", "c")])
    assert text == ("<s>" if bos else "") + "ab«cd<|im_end|>»"
    encoded = encode(pair, None, bos=bos, merges=[("b", "c")])
    assert (encoded.prompt_length, encoded.spans, encoded.answer) == (2 + bos, [(2 + bos, 5 + bos)], "cd")
    ended = Pair("ab", "cd<|im_end|>")
    assert (shown(ended, None), encode(ended, None).answer) == (["ab«cd<|im_end|>»"], "cd")
    assert shown(pair, None, eos=None) == ["ab«cd»"]
    # The first token is never a label.
    assert encode(Pair("", "cd"), None, bos=bos).spans == [(1, 3 + bos)]


def test_of_plain_text_all_but_the_first_token_is_learned() -> None:
    encoded = encode(Text("abc"))
    assert shown(Text("abc")) == ["a«bc<|im_end|>»"] and (encoded.prompt_length, encoded.answer) == (0, None)
    assert encode(Text("abc<|im_end|>")) == encoded
    assert shown(Text("<s>abc"), bos=True) == ["<s>«abc<|im_end|>»"]
    assert encode(Text(" \n")).spans == []


def test_plain_conversations_end_each_answer_with_eos() -> None:
    assert shown(talk("a", "b", "c", "d", system="s"), None) == ["s\na\n«b<|im_end|>»c\n«d<|im_end|>»"]
    assert labeled(shown(talk("a", "b", "c", "d"), None, labels="last")) == [["d<|im_end|>"]]
    tokenizer = make_tokenizer(None, bos=True)
    conversation = talk("a", "b", "c", "d", system="s")
    ((encoded,),) = Encoder(tokenizer).encode([conversation], ["row 1"])
    given_prompt = Encoder(tokenizer).prompt(conversation.messages[:-1])
    assert tokenizer.decode(given_prompt) == "<s>s\na\nb<|im_end|>c\n"
    assert encoded.tokens[: encoded.prompt_length] == given_prompt


def test_chat_and_plain_rows_keep_their_places_in_a_batch() -> None:
    records = [Text("one"), talk("a", "b"), Pair("c", "d"), Text("two")]
    encoder = Encoder(make_tokenizer())
    together = encoder.encode(records, [f"row {i}" for i in range(4)])
    assert together == [encoder.encode([record], ["row"])[0] for record in records]
