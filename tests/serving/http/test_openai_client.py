"""Every call of the API through the official client, against a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.serving.http.waiting import until

openai = pytest.importorskip("openai", reason="the official client is not installed: it is in 'dev'")

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/count"}}}
COUNT = {"$defs": {"count": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY | COUNT}}


@pytest.fixture(scope="module")
def client(shared):
    return openai.OpenAI(base_url=shared.url + "/v1", api_key="any", max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def chat(client):
    """Asks for an answer to one message of the user."""

    def ask(text: str = "hello", model: str = "base", **asked: Any) -> Any:
        settings = {"messages": [{"role": "user", "content": text}], "temperature": 0, **asked}
        return client.chat.completions.create(model=model, **settings)

    return ask


@pytest.fixture(scope="module")
def complete(client):
    """Asks for texts behind a prompt."""

    def ask(prompt: object, **asked: Any) -> Any:
        return client.completions.create(**{"model": "base", "prompt": prompt, "temperature": 0, **asked})

    return ask


def streamed(events: Any) -> list[str]:
    """The texts of a stream, by their index."""
    texts: dict[int, str] = {}
    for choice in [choice for event in events for choice in event.choices]:
        new = choice.text if hasattr(choice, "text") else choice.delta.content
        texts[choice.index] = texts.get(choice.index, "") + (new or "")
    return [texts[index] for index in sorted(texts)]


def written(answer: Any) -> list[str]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.text if hasattr(choice, "text") else choice.message.content for choice in answer.choices]


def test_models_are_the_base_and_its_adapters(client):
    assert [model.id for model in client.models.list().data] == ["base", "clerk", "poet", "tools"]
    assert client.models.retrieve("poet").parent == "base"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nobody")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(("model", "text"), [("base", "HELLO"), ("poet", "poet: HELLO")])
def test_the_model_names_the_adapter(chat, model, text):
    answer = chat(model=model)
    [choice] = answer.choices
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", model, "assistant")
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    usage = answer.usage
    assert usage.completion_tokens == len(text) == usage.total_tokens - usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


def test_a_stream_says_the_same_as_the_whole_answer(chat):
    asked = "say Grüße, 東京 🙂"
    whole = chat(asked)
    *events, last = chat(asked, stream=True, stream_options={"include_usage": True})
    assert events[0].choices[0].delta.role == "assistant"
    assert streamed(events) == written(whole) == ["Grüße, 東京 🙂"]
    assert events[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.usage == whole.usage and last.id == events[0].id
    for event in (*events, *chat(stream=True)):  # no usage unless asked for
        assert event.usage is None and event.choices


def test_several_choices_have_seeds_of_their_own(chat, shared):
    drawn = ["HELLO 41", "HELLO 42", "HELLO 43"]
    answer = chat(n=3, seed=41, temperature=1)
    assert written(answer) == drawn == streamed(chat(n=3, seed=41, stream=True, temperature=1))
    count = len(shared.engine.submitted[-1].tokens)
    assert answer.usage.prompt_tokens == count  # once, not for each choice
    assert answer.usage.prompt_tokens_details.cached_tokens == count // 2
    assert written(chat(temperature=1)) != written(chat(temperature=1)), "without a seed texts are drawn anew"


def test_settings_reach_the_engine(chat, shared):
    drawing = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": -1}
    limits = {"logit_bias": {"65": -100, "66": 1.5}, "stop": ["\n", "END"], "max_completion_tokens": 5}
    of_vllm = {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    chat(model="clerk", user="someone", store=False, extra_body={"ignore_eos": True, **of_vllm}, **drawing, **limits)
    request = shared.engine.submitted[-1]
    assert request.adapter == "clerk" and request.stop == ("\n", "END") and request.max_new_tokens == 5
    assert request.stop_ids == () and request.seconds == 600
    expected = {**drawing, **of_vllm, "logit_bias": {65: -100.0, 66: 1.5}, "seed": 2**63 - 1}
    assert {name: getattr(request.sampling, name) for name in expected} == expected


def test_the_defaults_are_those_of_openai(client, chat, complete, shared):
    client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hello"}])
    request = shared.engine.submitted[-1]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (1, 1, 0)
    assert request.max_new_tokens == 4096 - len(request.tokens)  # what the model's positions leave
    answer = chat(max_tokens=3)
    assert answer.choices[0].finish_reason == "length" and written(answer) == ["HEL"]
    complete("x")
    assert shared.engine.submitted[-1].max_new_tokens == 16


def test_logprobs_name_tokens_and_bytes(chat):
    asked = {"logprobs": True, "top_logprobs": 2}
    streaming = chat("say aé", stream=True, **asked)
    parts = [entry for event in streaming if (told := event.choices[0].logprobs) for entry in told.content]
    for content in (parts, chat("say aé", **asked).choices[0].logprobs.content):
        assert [bytes(one.bytes) for one in content] == [b"a", b"\xc3", b"\xa9"]
        assert (content[0].token, content[0].logprob) == ("a", -0.5)
        assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    content = chat("say " + "ab" * 200, logprobs=True).choices[0].logprobs.content
    assert "".join(one.token for one in content) == "ab" * 200


def test_a_response_format_becomes_a_constraint(chat, shared):
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    assert written(chat(response_format={"type": "json_object"})) == ["{}"]
    assert written(chat(response_format=form)) == ['{"age": 7}']
    assert json.loads(shared.engine.submitted[-1].constraint.value) == schema
    chat(extra_body={"guided_regex": "[a-z]+"})
    constraint = shared.engine.submitted[-1].constraint
    assert (constraint.kind, constraint.value) == ("regex", "[a-z]+")


def test_completions_take_texts_and_tokens(complete, shared):
    tokens = shared.engine.tokens_of("xy")
    assert complete("abc").object == "text_completion"
    assert written(complete(["abc", "de"], n=2, best_of=2)) == ["ABC", "ABC", "DE", "DE"]
    assert written(complete(tokens)) == ["XY"]
    assert written(complete([tokens, tokens[:1]], echo=True)) == ["xyXY", "xX"]


def test_completions_stream(complete):
    asked = {"stream": True, "stream_options": {"include_usage": True}, "echo": True}
    *events, last = complete(["a", "b"], model="poet", **asked)
    assert streamed(events) == ["apoet: A", "bpoet: B"]
    assert (last.usage.completion_tokens, last.usage.prompt_tokens) == (14, 2)


def test_echo_scores_a_prompt(complete):
    """How evaluation programs ask for the log-probabilities of a text: no new token, and the prompt's own."""
    [choice] = complete("abc", echo=True, logprobs=1, max_tokens=0).choices
    told = choice.logprobs
    assert choice.text == "abc" and choice.finish_reason == "length"
    assert told.tokens == ["a", "b", "c"] and told.token_logprobs == [None, -0.5, -0.5]
    assert told.text_offset == [0, 1, 2] and told.top_logprobs[:2] == [None, {"b": -0.5}]
    told = complete("ab", echo=True, logprobs=0, max_tokens=2).choices[0].logprobs
    assert told.tokens == ["a", "b", "A", "B"] and told.token_logprobs == [None, -0.5, -0.5, -0.5]


def test_a_forced_tool_call_follows_its_schema(chat, shared):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        [answer] = chat(model="tools", tools=[WEATHER], tool_choice=choice).choices
        [call] = answer.message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] == "text"
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
    schema = json.loads(shared.engine.submitted[-1].constraint.value)
    # References to definitions count from the schema's root.
    assert schema["$defs"] == COUNT["$defs"] and schema["properties"]["name"]


def test_tool_calls_are_found_in_the_text(chat, shared):
    call = '<tool_call>\\n{"name": "weather", "arguments": {"city": "Bern"}}\\n</tool_call>'
    text = f"say Let me see.{call}{call}"

    def ask(**more: Any) -> Any:
        return chat(text, "tools", tools=[WEATHER], **more).choices[0].message

    message = ask()
    assert message.content == "Let me see." and len(message.tool_calls) == 2
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Bern"}
    assert "weather" in shared.engine.text_of(shared.engine.submitted[-1].tokens)
    # The answer goes back to the model with the tool's, as the client has it.
    result = {"role": "tool", "content": "sunny", "tool_call_id": message.tool_calls[0].id}
    ask(messages=[{"role": "user", "content": text}, message.model_dump(), result])
    assert "sunny" in shared.engine.text_of(shared.engine.submitted[-1].tokens)
    assert len(ask(parallel_tool_calls=False).tool_calls) == 1
    none = ask(tool_choice="none")
    assert none.tool_calls is None and "<tool_call>" in none.content


def test_tool_calls_in_a_stream_come_whole(chat):
    asked = 'say Let me < see.<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    events = list(chat(asked, "tools", tools=[WEATHER], stream=True))
    assert streamed(events) == ["Let me < see."] and events[-1].choices[0].finish_reason == "tool_calls"
    [call] = [call for event in events for call in event.choices[0].delta.tool_calls or []]
    assert call.index == 0 and json.loads(call.function.arguments) == {"city": "Bern"}


def test_failures_of_the_engine_are_not_told_in_full(chat, shared):
    with pytest.raises(openai.InternalServerError) as error:
        chat("fail")
    with pytest.raises(openai.APIError, match="engine failed") as in_stream:
        list(chat("fail", stream=True))
    assert "secret" not in f"{error.value} {in_stream.value}"
    assert written(chat()) == ["HELLO"] and until(lambda: not shared.desk.in_hand)


def test_the_asynchronous_client_runs_many_at_once(shared):
    names = ["base", "poet", "clerk"]

    async def ask() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=shared.url + "/v1", api_key="any") as client:

            async def one(number: int) -> list[str]:
                messages = [{"role": "user", "content": f"n{number}"}]
                asked = {"messages": messages, "temperature": 0, "stream": True}
                stream = await client.chat.completions.create(model=names[number % 3], **asked)
                return streamed([event async for event in stream])

            return list(await asyncio.gather(*(one(number) for number in range(24))))

    before = ["", "poet: ", "clerk: "]
    assert asyncio.run(ask()) == [[f"{before[number % 3]}N{number}"] for number in range(24)]
