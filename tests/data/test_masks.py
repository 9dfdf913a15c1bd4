"""Loss masks for templates of published models cover the assistant's text and its end of turn only.

Every expectation is written by hand: the text that the model sees, with labels between « and ».
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deltaw.data.bad_rows import BadRowError
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation, Message, conversation
from deltaw.data.templates import Encoded, Encoder
from tests.data.chat_templates import tokenizer_of
from tests.data.conftest import assistant, refusal, user
from tests.training.runs import slow_except

DATE = "2026-01-31"
QUESTIONS = ("Capital of Peru?", "Chile?")
ANSWERS = ("Lima.", "Santiago.")
THOUGHTS = ("<think>\nSouth.\n</think>\n\nLima.", "<think>\nFar south.\n</think>\n\nSantiago.")
CLOCK = {"name": "clock", "description": "the time", "parameters": {}}
TOOLS: tuple[Message, ...] = ({"type": "function", "function": CLOCK},)


def exchange(*turns: tuple[str, str], system: str | None = None) -> Conversation:
    """Create a conversation of questions and answers."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [message for question, answer in turns for message in (user(question), assistant(answer))]
    return conversation([], messages, "row 1")


def talk(*answers: str, system: str | None = None) -> Conversation:
    """Create a conversation of questions on capitals with these answers."""
    return exchange(*zip(QUESTIONS, answers, strict=False), system=system)


def call(**thought: str) -> Conversation:
    """Create a conversation in which a tool is called."""
    calls = [{"id": "abcdefghi", "type": "function", "function": {"name": "clock", "arguments": {"zone": "PET"}}}]
    result = {"role": "tool", "content": "12:00", "tool_call_id": "abcdefghi"}
    first = assistant("", tool_calls=calls, **thought)
    last = assistant("Noon.", **thought)
    return conversation([], [user("Time in Lima?"), first, result, last], "row 1", TOOLS)


def marked(tokenizer: PreTrainedTokenizerFast, encoded: Encoded) -> str:
    """Return the text of an example with « and » around labels."""

    def text(count: int) -> str:
        return str(tokenizer.decode(encoded.tokens[:count], clean_up_tokenization_spaces=False))

    output = ""
    position = 0
    for start, stop in encoded.spans:
        output += f"{text(start)[len(text(position)) :]}«{text(stop)[len(text(start)) :]}»"
        position = stop
    return output + text(len(encoded.tokens))[len(text(position)) :]


def examples(family: str, record: Record, **settings: object) -> list[str]:
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, date=DATE, **settings)  # type: ignore[arg-type]
    return [marked(tokenizer, encoded) for encoded in encoder.encode([record], ["row 1"])[0]]


def turns(prefix: str, question: str, answer: str, between: str = "") -> str:
    """Render two questions Q and two answers A, with « and » around labels."""
    answers = [answer.replace("A", f"{text}", 1) for text in ANSWERS]
    return prefix + between.join(question.replace("Q", q) + a for q, a in zip(QUESTIONS, answers, strict=True))


# The formats of each family: question, answer and separator of turns.
IM = ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "«A<|im_end|>»", "\n")
HEADERS = (
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "«A<|eot_id|>»",
)
GEMMA = ("<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", "«A<end_of_turn>»", "\n")
SEP = ("<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>", "«A<|im_end|>»")
DATED = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
DATED += "Today Date: 31 Jan 2026\n\n"
ZEPHYR = ("<|user|>\nQ</s> \n<|assistant|>\n", "«A</s>»", " \n")
FIRST = "<|im_start|>user\nCapital of Peru?<|im_end|>\n<|im_start|>assistant\n"
SECOND_PROMPT = "\n<|im_start|>user\nChile?<|im_end|>\n<|im_start|>assistant\n"
TWO_TURNS = {
    "chatml": [turns("", *IM)],
    "generation": [turns("", *IM)],
    "llama2": [turns("", "<s> [INST] Q [/INST]", "« A </s>»")],
    "llama3": [turns("<|begin_of_text|>", *HEADERS)],
    "llama3.2": [turns(DATED + "<|eot_id|>", *HEADERS)],
    "qwen2.5": [turns("<|im_start|>system\nYou are a default assistant.<|im_end|>\n", *IM)],
    "qwen3": [
        FIRST + "«<think>\n\n</think>\n\nLima.<|im_end|>»",
        FIRST + "Lima.<|im_end|>" + SECOND_PROMPT + "«<think>\n\n</think>\n\nSantiago.<|im_end|>»",
    ],
    "gemma2": [turns("<bos>", *GEMMA)],
    "gemma3": [turns("<bos>", *GEMMA)],
    "mistral1": [turns("<s>", " [INST] Q [/INST]", "« A</s>»")],
    "mistral3": [turns("<s>", "[INST] Q[/INST]", "« A</s>»")],
    "phi3": [turns("", "<|user|> \nQ<|end|> \n<|assistant|> \n", "«A<|end|>»", " \n")],
    "phi4": [turns("", *SEP)],
    "phi4-mini": [turns("", "<|user|>Q<|end|><|assistant|>", "«A<|end|>»")],
    "zephyr": [turns("", *ZEPHYR)],
    "base": [turns("", "Q\n", "«A<|endoftext|>»")],
}


@pytest.mark.parametrize("family", TWO_TURNS)
def test_labels_are_all_answers_or_the_last_one(family: str) -> None:
    expected = TWO_TURNS[family]
    assert examples(family, talk(*ANSWERS)) == expected
    before, _, answer = expected[-1].rpartition("«")
    assert examples(family, talk(*ANSWERS), labels="last") == [re.sub("[«»]", "", before) + "«" + answer]
    # A single turn is a prefix of two turns.
    first = expected[0][: expected[0].index("»") + 1]
    assert examples(family, talk(ANSWERS[0])) == [first]
    assert examples(family, Pair("Capital of Peru?", "Lima."))[0] in (first, "Capital of Peru?«Lima.<|endoftext|>»")


@pytest.mark.parametrize("family", [family for family in TWO_TURNS if family != "base"])
def test_answer_whitespace_is_a_label_if_rendered(family: str) -> None:
    (rendered,) = examples(family, talk("Lima. \n"))
    answer = rendered[rendered.index("«") + 1 : rendered.index("»")]
    trims = family in ("llama2", "llama3", "llama3.2", "gemma2", "gemma3")
    assert answer.replace("Lima. \n", "Lima.") == TWO_TURNS[family][0].partition("«")[2].partition("»")[0]
    assert ("Lima. \n" in answer) is not trims


# With a system message.
BRIEF = "<s> [INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nCapital of Peru? [/INST]« Lima. </s>»"
SYSTEM = {
    "llama2": [BRIEF + "<s> [INST] Chile? [/INST]« Santiago. </s>»"],
    "llama3.2": [turns(DATED + "Be brief.<|eot_id|>", *HEADERS)],
    "qwen2.5": [turns("<|im_start|>system\nBe brief.<|im_end|>\n", *IM)],
    "gemma3": [turns("<bos>", *GEMMA).replace("Capital", "Be brief.\n\nCapital")],
    # The system message is rendered in the current question only.
    "mistral3": [
        "<s>[INST] Be brief.\n\nCapital of Peru?[/INST]« Lima.</s>»",
        "<s>[INST] Capital of Peru?[/INST] Lima.</s>[INST] Be brief.\n\nChile?[/INST]« Santiago.</s>»",
    ],
    "phi4": [turns("<|im_start|>system<|im_sep|>Be brief.<|im_end|>", *SEP)],
    "zephyr": [turns("<|system|>\nBe brief.</s> \n", *ZEPHYR)],
    "base": [turns("Be brief.\n", "Q\n", "«A<|endoftext|>»")],
}


@pytest.mark.parametrize("family", SYSTEM)
def test_system_message_is_never_a_label(family: str) -> None:
    assert examples(family, talk(*ANSWERS, system="Be brief.")) == SYSTEM[family]


# Reasoning before the answers.
R1 = "<｜begin▁of▁sentence｜><｜User｜>Capital of Peru?<｜Assistant｜>"
SOUTH, FAR = (f"«{thought}<|im_end|>»" for thought in THOUGHTS)
THINKING = {
    "chatml": [FIRST + SOUTH + SECOND_PROMPT + FAR],
    "qwen3": [FIRST + SOUTH, FIRST + "Lima.<|im_end|>" + SECOND_PROMPT + FAR],
    "deepseek-r1": [
        R1 + "<think>\n«South.\n</think>\n\nLima.<｜end▁of▁sentence｜>»",
        R1 + "\n\nLima.<｜end▁of▁sentence｜>"
        "<｜User｜>Chile?<｜Assistant｜><think>\n«Far south.\n</think>\n\nSantiago.<｜end▁of▁sentence｜>»",
    ],
}


@pytest.mark.parametrize("family", THINKING)
def test_thoughts_are_labels_in_their_original_context(family: str) -> None:
    assert examples(family, talk(*THOUGHTS)) == THINKING[family]
    if family != "chatml":  # reasoning in a separate field has equal labels
        separate = talk(*ANSWERS)
        for message, thought in zip(separate.messages[1::2], ("South.", "Far south."), strict=True):
            message["reasoning_content"] = thought
        rendered = examples(family, separate)
        assert [text.partition("«")[2] for text in rendered] == [text.partition("«")[2] for text in THINKING[family]]


# With a tool.
CALL = '{"name": "clock", "arguments": {"zone": "PET"}}'
TRAINED_CALLS = {
    "qwen2.5": [[f"<tool_call>\n{CALL}\n</tool_call><|im_end|>", "Noon.<|im_end|>"]],
    "qwen3": [
        [f"<think>\n\n</think>\n\n<tool_call>\n{CALL}\n</tool_call><|im_end|>"],
        ["<think>\n\n</think>\n\nNoon.<|im_end|>"],
    ],
    "llama3.2": [['{"name": "clock", "parameters": {"zone": "PET"}}<|eot_id|>', "Noon.<|eot_id|>"]],
    "mistral3": [[f'[TOOL_CALLS] [{CALL[:-1]}, "id": "abcdefghi"}}]</s>', " Noon.</s>"]],
}


@pytest.mark.parametrize("family", TRAINED_CALLS)
def test_tool_call_is_a_label_and_its_result_is_not(family: str) -> None:
    rendered = examples(family, call())
    assert [[part.partition("»")[0] for part in text.split("«")[1:]] for text in rendered] == TRAINED_CALLS[family]
    assert all("clock" in text.partition("«")[0] and "the time" in text.partition("«")[0] for text in rendered)


def with_tools() -> Conversation:
    single = talk("Lima.")
    return Conversation(single.messages, single.learned, tools=TOOLS)


def with_reasoning() -> Conversation:
    separate = talk("Lima.")
    separate.messages[1]["reasoning_content"] = "South."
    return separate


@pytest.mark.parametrize(
    ("family", "record", "message"),
    [
        ("gemma2", talk(*ANSWERS, system="Be brief."), "does not accept this conversation"),
        ("mistral1", talk(*ANSWERS, system="Be brief."), "does not accept this conversation"),
        ("llama3", with_reasoning(), "drops the reasoning of turn 2"),
        ("deepseek-r1", talk("Lima."), "opens a thought, and turn 2 has no reasoning"),
        *((family, with_tools(), "omits the tool 'clock'") for family in ("chatml", "gemma3", "zephyr")),
    ],
)
def test_unsupported_or_omitted_content_is_rejected(family, record, message):
    error = refusal(examples, family, record)
    assert isinstance(error, BadRowError) and message in error.message
    assert error.reason == "refused by the chat template" or "accept" not in message


@pytest.mark.parametrize(
    ("family", "record", "expected"),
    [
        ("base-bos", Text("Lima is old."), "<s>« Lima is old.</s>»"),
        ("base-bos", Text("<s>Lima is old."), "<s>« Lima is old.</s>»"),
        ("base-bos", Pair("Q: Peru?\nA:", " Lima."), "<s> Q: Peru?\nA:«  Lima.</s>»"),
        ("base", Text("Lima is old."), "L«ima is old.<|endoftext|>»"),
    ],
)
def test_base_models_have_one_bos_and_a_final_eos(family, record, expected):
    assert examples(family, record) == [expected]


def test_mask_matches_generation_blocks_of_the_template() -> None:
    tokenizer = tokenizer_of("generation")
    record = talk(*ANSWERS, system="Be brief.")
    theirs = tokenizer.apply_chat_template(list(record.messages), return_dict=True, return_assistant_tokens_mask=True)
    (ours,) = Encoder(tokenizer).encode([record], ["row 1"])[0]
    mask = [0] * len(theirs["input_ids"])
    for start, stop in ours.spans:
        mask[start:stop] = [1] * (stop - start)
    assert theirs["input_ids"][: len(ours.tokens)] == ours.tokens and theirs["assistant_masks"] == mask


# Any text without names of special tokens, which would be tokenized as such.
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<>[]|"), min_size=1, max_size=30)


@pytest.mark.parametrize("family", slow_except("llama2", "llama3.2", "qwen3", "gemma3", names=TWO_TURNS))
@settings(max_examples=15, deadline=None)
@given(question=ANY_TEXT, answers=st.lists(ANY_TEXT, min_size=1, max_size=3))
def test_only_answers_and_their_ends_are_labels_for_any_text(family, question, answers):
    record = exchange(*((question, answer) for answer in answers))
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, date=DATE)
    trained = []
    for example in encoder.encode([record], ["row 1"])[0]:
        for (start, stop), turn in zip(example.spans, example.turns, strict=True):
            # Each answer follows the prompt from which it would be generated.
            assert example.tokens[:start] == encoder.prompt(record.messages[:turn])
            trained.append("".join(str(tokenizer.decode(example.tokens[start:stop])).split()))
    end = TWO_TURNS[family][0].partition("Lima.")[2].partition("»")[0].strip()
    thought = "<think></think>" if family == "qwen3" else ""
    expected = [thought + "".join(answer.split()) + end for answer in answers if answer.strip()]
    assert trained == expected
