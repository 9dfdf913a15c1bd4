"""Rendering and loss masks are compared with text offsets, and unsuitable templates are rejected."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation
from deltaw.data.templates import Encoded, Encoder, group_by_prefix
from tests.data.conftest import CHATML, assistant, make_tokenizer, refusal, user
from tests.data.test_masks import marked

STRIPS_THOUGHT = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
STRIPS_HISTORY = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_END += "{% if add_generation_prompt %}assistant:{% endif %}"
CLOSES = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}<|end|><s><|im_end|></s>")
OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NO_SYSTEM = CHATML.replace("messages %}", "messages if m.role != 'system' %}")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
JOINS = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
WRITES_END = NO_END.replace("{{ m.content }}", "{{ m.content }} ###")
HARMONY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<s>final{% endif %}\n"
    "{{ m.content }}{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def talk(*contents: str, system: str | None = None, learned: tuple[bool, ...] | None = None) -> Conversation:
    """Create a conversation of alternating user and assistant turns."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(tuple(messages), learned or tuple(message["role"] == "assistant" for message in messages))


def encode_all(record: Record, template: str | None = CHATML, labels: str = "all-turns", **kind) -> list[Encoded]:
    """Return the examples of a record."""
    tokenizer = make_tokenizer(template, **kind)  # type: ignore[arg-type]
    return Encoder(tokenizer, "auto", labels).encode([record], ["data.jsonl, row 7"])[0]  # type: ignore[arg-type]


def encode(record: Record, *arguments: object, **kind: object) -> Encoded:
    """Return the only example of a record."""
    (encoded,) = encode_all(record, *arguments, **kind)  # type: ignore[arg-type]
    return encoded


def render_labels(record: Record, *arguments: object, **kind: object) -> list[str]:
    """Return the examples as text, with « and » around labels."""
    return [marked(make_tokenizer(), encoded) for encoded in encode_all(record, *arguments, **kind)]  # type: ignore[arg-type]


def label_texts(examples: list[str]) -> list[list[str]]:
    """Return the text of each span of labels."""
    return [[part.partition("»")[0] for part in text.split("«")[1:]] for text in examples]


# Chat


words = st.text(alphabet="ab é\n.1<|", max_size=8).map(lambda text: text + "x")


@settings(max_examples=40)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.none() | words)
def test_mask_matches_offsets_of_the_rendered_text(turns, system):
    tokenizer = make_tokenizer()
    conversation = talk(*(content for pair in turns for content in pair), system=system)
    ((encoded,),) = Encoder(tokenizer).encode([conversation], ["row 1"])
    # Independent computation: find the answers in the text, and map characters to tokens.
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
        # A turn ends at the stop token. Some templates close the answer before the turn.
        (talk("a", "b"), CLOSES, [["b<|end|>"]]),
        (talk("a", "b", "c", "d"), CLOSES.replace("<|end|>", "</s>"), [[f"{a}</s><s><|im_end|>" for a in "bd"]]),
        (talk("a", "b"), WRITES_END, [[" b ###<|im_end|>"]]),
        # An empty thought closes the one that the prompt opens.
        (talk("a", "b"), OPENS, [["</think>b<|im_end|>"]]),
        (talk("a", "<think>hm</think>b"), STRIPS_THOUGHT, [["<think>hm</think>b<|im_end|>"]]),
    ],
)
def test_labels_are_the_rendered_answer_and_its_end(record, template, expected):
    examples = render_labels(record, template)
    assert label_texts(examples) == expected
    # Tokens after the last label are not computed.
    assert all(text.endswith("»") or "«" not in text for text in examples)


def test_answers_end_with_eos_if_the_template_has_no_end_mark() -> None:
    assert encode(talk("hi", "yes<|im_end|>")).answer == "yes"
    assert render_labels(talk("a", "b", "c", "d"), NO_END) == [
        "user: a\nassistant:« b<|im_end|>»",
        "user: a\nassistant: b\nuser: c\nassistant:« d<|im_end|>»",
    ]


def test_answers_changed_by_later_turns_are_separate_examples() -> None:
    conversation = talk("a", "final", "c", "final")
    first, second = encode_all(conversation, HARMONY)
    assert label_texts(render_labels(conversation, HARMONY)) == [["<s>finalfinal</s>"]] * 2
    assert first.turns == (1,) and second.turns == (3,) and encode_all(conversation, HARMONY, labels="last") == [second]
    # The prompt for generating each answer equals the tokens before its label.
    for example, turn in ((first, 1), (second, 3)):
        prompt = Encoder(make_tokenizer(HARMONY)).prompt(conversation.messages[:turn])
        assert example.tokens[: example.prompt_length] == prompt
        assert example.spans == [(len(prompt), len(example.tokens))]


def test_turns_share_an_example_until_rewritten() -> None:
    examples = render_labels(talk("a", "<think>hm</think>b", "c", "d", "e", "f"), STRIPS_HISTORY)
    assert label_texts(examples) == [["<think>hm</think>b<|im_end|>"], ["d<|im_end|>", "f<|im_end|>"]]
    assert "hm" not in examples[1]
    first, second = render_labels(talk("a", "b", "c", "d"), "{{ messages | length }}" + CHATML)
    assert first.startswith("1<|im_start|>user") and second.startswith("3<|im_start|>user")
    assert label_texts([first, second]) == [["b<|im_end|>"], ["d<|im_end|>"]]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([[1, 2], [1, 2, 3], [1, 2, 3, 4]], [[0, 1, 2]]),
        ([[1, 9], [1, 2, 3], [1, 2, 3, 4]], [[0], [1, 2]]),
        ([[1], [2], [1, 3]], [[1], [0, 2]]),
        ([[1], [1, 2], [3]], [[0, 1], [2]]),
    ],
)
def test_turns_are_grouped_by_common_prefix(turns, expected):
    assert group_by_prefix(turns) == expected


CLOCK = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
CALLED = Conversation((user("time?"), assistant("", tool_calls=[CLOCK])), (False, True))


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (talk("a", "b"), CHATML.partition("{% if")[0] + "<|im_start|>assistant\n", "adds text after the answer"),
        (talk("a", "b", system="Speak French."), NO_SYSTEM, "omits the content of turn 1 ('system')"),
        (talk("a", "b"), CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"), "is not found in the rendered"),
        (talk("a", "b", system="s"), STRICT, "no system here"),
        (CALLED, CHATML, "changes the answer in turn 2"),
    ],
)
def test_unsuitable_template_is_rejected_with_the_row(record, template, message):
    error = refusal(encode, record, template)
    assert message in error.message and str(error.location).startswith("data.jsonl, row 7")


def test_answer_tokens_do_not_merge_with_the_prompt() -> None:
    newlines = [("Ċ", "Ċ")]
    tokenizer = make_tokenizer(merges=newlines)
    encoded = encode(talk("a", "\nb"), merges=newlines)
    assert tokenizer.decode(encoded.tokens[slice(*encoded.spans[0])]) == "\nb<|im_end|>"
    assert encoded.tokens[: encoded.prompt_length] == Encoder(tokenizer).prompt("a")
    (other,) = encode(talk("a", "b"), merges=newlines).spans
    assert other[0] == encoded.prompt_length


def test_template_can_receive_call_arguments_as_text() -> None:
    joins = CHATML.replace("{{ m.content }}", JOINS)
    assert label_texts(render_labels(CALLED, joins)) == [['clock{"zone": "UTC"}<|im_end|>']]


def test_prompt_and_completion_are_encoded_as_a_conversation() -> None:
    for system in (None, "s"):
        assert encode(Pair("hi", "yes", system=system)) == encode(talk("hi", "yes", system=system))


def test_identity_depends_on_template_labels_and_date() -> None:
    def identity(template: str | None = CHATML, labels: str = "all-turns", date: str | None = None) -> str:
        return Encoder(make_tokenizer(template), "auto", labels, date).identity  # type: ignore[arg-type]

    dated = [identity("{{ strftime_now('%d %b %Y') }}" + CHATML, date=f"2026-0{month}-01") for month in (1, 2)]
    assert identity() == identity(date="2026-01-31")
    assert len({identity(), identity(NO_END), identity(None), identity(labels="last"), *dated}) == 6


# Plain


@pytest.mark.parametrize("bos", [False, True])
def test_plain_pairs_are_tokenized_separately_with_bos_and_eos(bos: bool) -> None:
    pair = Pair("ab", "cd")
    (text,) = render_labels(pair, None, bos=bos, merges=[("b", "c")])
    assert text == ("<s>" if bos else "") + "ab«cd<|im_end|>»"
    encoded = encode(pair, None, bos=bos, merges=[("b", "c")])
    assert (encoded.prompt_length, encoded.spans, encoded.answer) == (2 + bos, [(2 + bos, 5 + bos)], "cd")
    pair_with_end = Pair("ab", "cd<|im_end|>")
    assert (render_labels(pair_with_end, None), encode(pair_with_end, None).answer) == (["ab«cd<|im_end|>»"], "cd")
    assert render_labels(pair, None, eos=None) == ["ab«cd»"]
    # The first token is never a label.
    assert encode(Pair("", "cd"), None, bos=bos).spans == [(1, 3 + bos)]


def test_plain_text_labels_are_all_tokens_but_the_first() -> None:
    encoded = encode(Text("abc"))
    assert render_labels(Text("abc")) == ["a«bc<|im_end|>»"] and (encoded.prompt_length, encoded.answer) == (0, None)
    assert encode(Text("abc<|im_end|>")) == encoded
    assert render_labels(Text("<s>abc"), bos=True) == ["<s>«abc<|im_end|>»"] and encode(Text(" \n")).spans == []


def test_plain_conversation_answers_end_with_eos() -> None:
    assert render_labels(talk("a", "b", "c", "d", system="s"), None) == ["s\na\n«b<|im_end|>»c\n«d<|im_end|>»"]
    assert label_texts(render_labels(talk("a", "b", "c", "d"), None, labels="last")) == [["d<|im_end|>"]]
    tokenizer = make_tokenizer(None, bos=True)
    conversation = talk("a", "b", "c", "d", system="s")
    ((encoded,),) = Encoder(tokenizer).encode([conversation], ["row 1"])
    prompt = Encoder(tokenizer).prompt(conversation.messages[:-1])
    assert tokenizer.decode(prompt) == "<s>s\na\nb<|im_end|>c\n" and encoded.tokens[: encoded.prompt_length] == prompt


def test_mixed_chat_and_plain_rows_remain_in_order() -> None:
    records = [Text("one"), talk("a", "b"), Pair("c", "d"), Text("two")]
    encoder = Encoder(make_tokenizer())
    batch = encoder.encode(records, [f"row {i}" for i in range(4)])
    assert batch == [encoder.encode([record], ["row"])[0] for record in records]


# Templates without add_generation_prompt, and the header that is added to prompts.
HEADER = "<|im_start|>assistant\n"
WITHOUT_PROMPT = {
    CHATML.partition("{% if add_generation_prompt")[0]: HEADER,
    CHATML.partition("{% if add_generation_prompt")[0] + "\n": HEADER,
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + CHATML.partition("{% if add_generation_prompt")[0]: HEADER,
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}": "assistant: ",
}


@pytest.mark.parametrize("template", WITHOUT_PROMPT, ids=range(len(WITHOUT_PROMPT)))
def test_role_header_of_template_without_generation_prompt_is_part_of_the_prompt(template):
    record = talk("Hi", "Yes", "Why?", "So", system="Be brief.")
    tokenizer = make_tokenizer(template)
    encoder = Encoder(tokenizer)
    assert encoder.added_prefix == WITHOUT_PROMPT[template]
    (encoded,) = encoder.encode([record], ["row"])[0]
    labels = [tokenizer.decode(encoded.tokens[start:stop]) for start, stop in encoded.spans]
    assert [re.sub(r"<.*", "", label) for label in labels] == ["Yes", "So"]
    assert tokenizer.decode(encoded.tokens[: encoded.prompt_length]).endswith(WITHOUT_PROMPT[template])
    assert encoder.prompt(record.messages[:-1]) == encoded.tokens[: encoded.prompt_length]


# The answer follows the question without a header, as in Mistral's template.
INST = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
INST += "{% else %} {{ m.content + eos_token }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [CHATML, INST, NO_END, STRICT, OPENS, HARMONY])
def test_template_with_generation_prompt_gets_no_other_header(template):
    assert Encoder(make_tokenizer(template)).added_prefix is None
