"""Tests of every API call with the official client against a real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.serving.http.concurrency import wait_until

openai = pytest.importorskip("openai", reason="the official client is not installed: it is in 'dev'")

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/count"}}}
COUNT = {"$defs": {"count": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY | COUNT}}


@pytest.fixture(scope="module")
def client(shared):
    return openai.OpenAI(base_url=shared.url + "/v1", api_key="any", max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def chat(client):
    """Return a function that sends a chat with one user message."""

    def send(text: str = "hello", model: str = "base", **fields: Any) -> Any:
        settings = {"messages": [{"role": "user", "content": text}], "temperature": 0, **fields}
        return client.chat.completions.create(model=model, **settings)

    return send


@pytest.fixture(scope="module")
def complete(client):
    """Return a function that completes a prompt."""

    def send(prompt: object, **fields: Any) -> Any:
        return client.completions.create(**{"model": "base", "prompt": prompt, "temperature": 0, **fields})

    return send


def streamed(events: Any) -> list[str]:
    """Return the texts of a stream in order of their index."""
    texts: dict[int, str] = {}
    for choice in [choice for event in events for choice in event.choices]:
        delta = choice.text if hasattr(choice, "text") else choice.delta.content
        texts[choice.index] = texts.get(choice.index, "") + (delta or "")
    return [texts[index] for index in sorted(texts)]


def contents(answer: Any) -> list[str]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.text if hasattr(choice, "text") else choice.message.content for choice in answer.choices]


def test_models_lists_base_and_adapters(client):
    assert [model.id for model in client.models.list().data] == ["base", "clerk", "poet", "tools"]
    assert client.models.retrieve("poet").parent == "base"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("unknown")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(("model", "text"), [("base", "HELLO"), ("poet", "poet: HELLO")])
def test_model_field_selects_adapter(chat, model, text):
    answer = chat(model=model)
    [choice] = answer.choices
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", model, "assistant")
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    usage = answer.usage
    assert usage.completion_tokens == len(text) == usage.total_tokens - usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


def test_stream_equals_full_response(chat):
    prompt = "say Grüße, 東京 🙂"
    full = chat(prompt)
    *events, last = chat(prompt, stream=True, stream_options={"include_usage": True})
    assert events[0].choices[0].delta.role == "assistant"
    assert streamed(events) == contents(full) == ["Grüße, 東京 🙂"]
    assert events[-1].choices[0].finish_reason == "stop"
    assert last.choices == [] and last.usage == full.usage and last.id == events[0].id
    for event in (*events, *chat(stream=True)):  # no usage unless requested
        assert event.usage is None and event.choices


def test_choices_have_consecutive_seeds(chat, shared):
    expected = ["HELLO 41", "HELLO 42", "HELLO 43"]
    answer = chat(n=3, seed=41, temperature=1)
    assert contents(answer) == expected == streamed(chat(n=3, seed=41, stream=True, temperature=1))
    count = len(shared.engine.submitted[-1].tokens)
    assert answer.usage.prompt_tokens == count  # once, not for each choice
    assert answer.usage.prompt_tokens_details.cached_tokens == count // 2
    assert contents(chat(temperature=1)) != contents(chat(temperature=1)), "without a seed, completions must differ"


def test_sampling_fields_are_passed_to_engine(chat, shared):
    sampling = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": -1}
    limits = {"logit_bias": {"65": -100, "66": 1.5}, "stop": ["\n", "END"], "max_completion_tokens": 5}
    vllm_fields = {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
    extra_body = {**vllm_fields, "ignore_eos": True}
    chat(model="clerk", user="someone", store=False, extra_body=extra_body, **sampling, **limits)
    request = shared.engine.submitted[-1]
    assert request.adapter == "clerk" and request.stop == ("\n", "END") and request.max_new_tokens == 5
    assert request.stop_ids == () and request.seconds == 600
    expected = {**sampling, **vllm_fields, "logit_bias": {65: -100.0, 66: 1.5}, "seed": 2**63 - 1}
    assert {name: getattr(request.sampling, name) for name in expected} == expected


def test_defaults_match_openai(client, chat, complete, shared):
    client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hello"}])
    request = shared.engine.submitted[-1]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (1, 1, 0)
    assert request.max_new_tokens == 4096 - len(request.tokens)  # the remaining positions
    answer = chat(max_tokens=3)
    assert answer.choices[0].finish_reason == "length" and contents(answer) == ["HEL"]
    complete("x")
    assert shared.engine.submitted[-1].max_new_tokens == 16


def test_logprobs_contain_tokens_and_bytes(chat):
    fields = {"logprobs": True, "top_logprobs": 2}
    streaming = chat("say aé", stream=True, **fields)
    parts = [entry for event in streaming if (logprobs := event.choices[0].logprobs) for entry in logprobs.content]
    for content in (parts, chat("say aé", **fields).choices[0].logprobs.content):
        assert [bytes(item.bytes) for item in content] == [b"a", b"\xc3", b"\xa9"]
        assert (content[0].token, content[0].logprob) == ("a", -0.5)
        assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    content = chat("say " + "ab" * 200, logprobs=True).choices[0].logprobs.content
    assert "".join(item.token for item in content) == "ab" * 200


def test_response_format_becomes_constraint(chat, shared):
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    assert contents(chat(response_format={"type": "json_object"})) == ["{}"]
    assert contents(chat(response_format=response_format)) == ['{"age": 7}']
    assert json.loads(shared.engine.submitted[-1].constraint.value) == schema
    chat(extra_body={"guided_regex": "[a-z]+"})
    constraint = shared.engine.submitted[-1].constraint
    assert (constraint.kind, constraint.value) == ("regex", "[a-z]+")


def test_completions_accept_texts_and_tokens(complete, shared):
    tokens = shared.engine.tokens_of("xy")
    assert complete("abc").object == "text_completion"
    assert contents(complete(["abc", "de"], n=2, best_of=2)) == ["ABC", "ABC", "DE", "DE"]
    assert contents(complete(tokens)) == ["XY"]
    assert contents(complete([tokens, tokens[:1]], echo=True)) == ["xyXY", "xX"]


def test_completions_are_streamed(complete):
    fields = {"stream": True, "stream_options": {"include_usage": True}, "echo": True}
    *events, last = complete(["a", "b"], model="poet", **fields)
    assert streamed(events) == ["apoet: A", "bpoet: B"]
    assert (last.usage.completion_tokens, last.usage.prompt_tokens) == (14, 2)


def test_echo_returns_prompt_logprobs(complete):
    """Evaluation programs request the log-probabilities of a prompt this way, without new tokens."""
    [choice] = complete("abc", echo=True, logprobs=1, max_tokens=0).choices
    logprobs = choice.logprobs
    assert choice.text == "abc" and choice.finish_reason == "length"
    assert logprobs.tokens == ["a", "b", "c"] and logprobs.token_logprobs == [None, -0.5, -0.5]
    assert logprobs.text_offset == [0, 1, 2] and logprobs.top_logprobs[:2] == [None, {"b": -0.5}]
    logprobs = complete("ab", echo=True, logprobs=0, max_tokens=2).choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "A", "B"] and logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]


def test_forced_tool_call_follows_schema(chat, shared):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        [answer] = chat(model="tools", tools=[WEATHER], tool_choice=choice).choices
        [call] = answer.message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] == "text"
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
    schema = json.loads(shared.engine.submitted[-1].constraint.value)
    # References to definitions are relative to the schema's root.
    assert schema["$defs"] == COUNT["$defs"] and schema["properties"]["name"]


def test_tool_calls_are_parsed_from_text(chat, shared):
    call = '<tool_call>\\n{"name": "weather", "arguments": {"city": "Bern"}}\\n</tool_call>'
    text = f"say Let me see.{call}{call}"

    def send(**fields: Any) -> Any:
        return chat(text, "tools", tools=[WEATHER], **fields).choices[0].message

    message = send()
    assert message.content == "Let me see." and len(message.tool_calls) == 2
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Bern"}
    assert "weather" in shared.engine.text_of(shared.engine.submitted[-1].tokens)
    # The next request contains the assistant message and the result of the tool.
    result = {"role": "tool", "content": "sunny", "tool_call_id": message.tool_calls[0].id}
    send(messages=[{"role": "user", "content": text}, message.model_dump(), result])
    assert "sunny" in shared.engine.text_of(shared.engine.submitted[-1].tokens)
    assert len(send(parallel_tool_calls=False).tool_calls) == 1
    without_tools = send(tool_choice="none")
    assert without_tools.tool_calls is None and "<tool_call>" in without_tools.content


def test_streamed_tool_call_is_complete(chat):
    prompt = 'say Let me < see.<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    events = list(chat(prompt, "tools", tools=[WEATHER], stream=True))
    assert streamed(events) == ["Let me < see."] and events[-1].choices[0].finish_reason == "tool_calls"
    [call] = [call for event in events for call in event.choices[0].delta.tool_calls or []]
    assert call.index == 0 and json.loads(call.function.arguments) == {"city": "Bern"}


def test_engine_errors_do_not_reveal_details(chat, shared):
    with pytest.raises(openai.InternalServerError) as error:
        chat("fail")
    with pytest.raises(openai.APIError, match="engine failed") as in_stream:
        list(chat("fail", stream=True))
    assert "secret" not in f"{error.value} {in_stream.value}"
    assert contents(chat()) == ["HELLO"] and wait_until(lambda: not shared.request_queue.pending)


def test_async_client_runs_concurrent_streams(shared):
    names = ["base", "poet", "clerk"]

    async def send_all() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=shared.url + "/v1", api_key="any") as client:

            async def send_one(number: int) -> list[str]:
                messages = [{"role": "user", "content": f"n{number}"}]
                fields = {"messages": messages, "temperature": 0, "stream": True}
                stream = await client.chat.completions.create(model=names[number % 3], **fields)
                return streamed([event async for event in stream])

            return list(await asyncio.gather(*(send_one(number) for number in range(24))))

    prefixes = ["", "poet: ", "clerk: "]
    assert asyncio.run(send_all()) == [[f"{prefixes[number % 3]}N{number}"] for number in range(24)]
