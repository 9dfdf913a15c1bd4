"""Every call of the API through the official client, against a real server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving.http.waiting import until

if TYPE_CHECKING:
    from tests.serving.http.running import Running

openai = pytest.importorskip("openai", reason="the official client is not installed: it is in 'dev'")

HELLO = [{"role": "user", "content": "hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/count"}}}
COUNT = {"$defs": {"count": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY | COUNT}}


@pytest.fixture(scope="module")
def client(shared: Running) -> Any:
    return openai.OpenAI(base_url=shared.url + "/v1", api_key="any", max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def chat(client: Any) -> Any:
    """Asks for an answer to one message of the user."""

    def ask(text: str = "hello", model: str = "base", **asked: Any) -> Any:
        settings = {"messages": [{"role": "user", "content": text}], "temperature": 0, **asked}
        return client.chat.completions.create(model=model, **settings)

    return ask


def test_models_are_the_base_and_its_adapters(client: Any) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["base", "clerk", "poet", "tools"]
    assert client.models.retrieve("poet").parent == "base"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nobody")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(("model", "text"), [("base", "HELLO"), ("poet", "poet: HELLO")])
def test_the_model_names_the_adapter(chat: Any, model: str, text: str) -> None:
    answer = chat(model=model)
    assert answer.object == "chat.completion" and answer.model == model
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, "stop")
    usage = answer.usage
    assert usage.completion_tokens == len(text)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2


def test_a_stream_says_the_same_as_the_whole_answer(chat: Any) -> None:
    asked = "say Grüße, 東京 🙂"
    whole = chat(asked)
    events = list(chat(asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content == "Grüße, 東京 🙂"
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "stop"
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert all(event.usage is None for event in events[:-1])
    assert len({event.id for event in events}) == 1
    events = list(chat(stream=True))
    assert all(event.usage is None and event.choices for event in events), "no usage unless asked for"


def test_several_choices_have_seeds_of_their_own(chat: Any, shared: Running) -> None:
    answer = chat(n=3, seed=41, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["HELLO 41", "HELLO 42", "HELLO 43"]
    prompt = shared.engine.submitted[-1].tokens
    assert answer.usage.prompt_tokens == len(prompt)  # once, not for each choice
    assert answer.usage.prompt_tokens_details.cached_tokens == len(prompt) // 2
    texts = ["", "", ""]
    for event in chat(n=3, seed=41, stream=True, temperature=1):
        texts[event.choices[0].index] += event.choices[0].delta.content or ""
    assert texts == ["HELLO 41", "HELLO 42", "HELLO 43"]
    drawn = {chat(temperature=1).choices[0].message.content for _ in "ab"}
    assert len(drawn) == 2, "without a seed texts are drawn anew"


def test_settings_reach_the_engine(chat: Any, shared: Running) -> None:
    drawing = {"temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.25, "frequency_penalty": -0.5, "seed": -1}
    limits = {"logit_bias": {"65": -100, "66": 1.5}, "stop": ["\n", "END"], "max_completion_tokens": 5}
    of_vllm = {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": True}
    chat(model="clerk", user="someone", store=False, extra_body=of_vllm, **drawing, **limits)
    request = shared.engine.submitted[-1]
    sampling = request.sampling
    assert request.adapter == "clerk" and request.stop == ("\n", "END") and request.max_new_tokens == 5
    assert request.stop_ids == () and request.seconds == 600
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.05)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (1.1, 0.25, -0.5)
    assert sampling.logit_bias == {65: -100.0, 66: 1.5} and sampling.seed == 2**63 - 1


def test_the_defaults_are_those_of_openai(client: Any, chat: Any, shared: Running) -> None:
    client.chat.completions.create(model="base", messages=HELLO)
    request = shared.engine.submitted[-1]
    assert request.sampling.temperature == 1 and request.sampling.top_p == 1 and request.sampling.top_k == 0
    assert request.max_new_tokens == 4096 - len(request.tokens)  # what the model's positions leave
    answer = chat(max_tokens=3)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content == "HEL"
    client.completions.create(model="base", prompt="x")
    assert shared.engine.submitted[-1].max_new_tokens == 16


def test_logprobs_name_tokens_and_bytes(chat: Any) -> None:
    for stream in (False, True):
        answer = chat("say aé", logprobs=True, top_logprobs=2, stream=stream)
        if stream:
            content = [t for e in answer if e.choices[0].logprobs for t in e.choices[0].logprobs.content]
        else:
            content = answer.choices[0].logprobs.content
        assert [bytes(one.bytes) for one in content] == [b"a", b"\xc3", b"\xa9"]
        assert content[0].token == "a" and content[0].logprob == -0.5
        assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    answer = chat("say " + "ab" * 200, logprobs=True)
    assert "".join(one.token for one in answer.choices[0].logprobs.content) == "ab" * 200


def test_a_response_format_becomes_a_constraint(chat: Any, shared: Running) -> None:
    answer = chat(response_format={"type": "json_object"})
    assert answer.choices[0].message.content == "{}"
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = chat(response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"age": 7}
    constraint = shared.engine.submitted[-1].constraint
    assert constraint is not None and json.loads(constraint.value) == schema
    chat(extra_body={"guided_regex": "[a-z]+"})
    constraint = shared.engine.submitted[-1].constraint
    assert constraint is not None and (constraint.kind, constraint.value) == ("regex", "[a-z]+")


def test_completions_take_texts_and_tokens(client: Any) -> None:
    def texts(**asked: Any) -> list[str]:
        answer = client.completions.create(model="base", temperature=0, **asked)
        assert answer.object == "text_completion"
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    assert texts(prompt="abc") == ["ABC"]
    assert texts(prompt=["abc", "de"], n=2, best_of=2) == ["ABC", "ABC", "DE", "DE"]
    from tests.serving.http.fake_engine import FakeEngine

    tokens = FakeEngine.tokens_of("xy")
    assert texts(prompt=tokens) == ["XY"]
    assert texts(prompt=[tokens, tokens[:1]], echo=True) == ["xyXY", "xX"]


def test_completions_stream(client: Any) -> None:
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "echo": True}
    events = list(client.completions.create(model="poet", prompt=["a", "b"], temperature=0, **streamed))
    texts = ["", ""]
    for event in events[:-1]:
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == ["apoet: A", "bpoet: B"]
    assert events[-1].usage.completion_tokens == 14 and events[-1].usage.prompt_tokens == 2


def test_echo_scores_a_prompt(client: Any) -> None:
    """How evaluation programs ask for the log-probabilities of a text: no new token, and the prompt's own."""
    answer = client.completions.create(model="base", prompt="abc", echo=True, logprobs=1, max_tokens=0)
    [choice] = answer.choices
    told = choice.logprobs
    assert choice.text == "abc" and choice.finish_reason == "length"
    assert told.tokens == ["a", "b", "c"] and told.token_logprobs == [None, -0.5, -0.5]
    assert told.text_offset == [0, 1, 2] and told.top_logprobs[0] is None
    assert told.top_logprobs[1] == {"b": -0.5}
    answer = client.completions.create(model="base", prompt="ab", echo=True, logprobs=0, max_tokens=2, temperature=0)
    told = answer.choices[0].logprobs
    assert told.tokens == ["a", "b", "A", "B"] and told.token_logprobs == [None, -0.5, -0.5, -0.5]


def test_a_forced_tool_call_follows_its_schema(chat: Any, shared: Running) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = chat(model="tools", tools=[WEATHER], tool_choice=choice)
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "weather" and answer.choices[0].finish_reason == "tool_calls"
        assert json.loads(call.function.arguments)["city"] == "text"
        assert answer.choices[0].message.content is None
    constraint = shared.engine.submitted[-1].constraint
    assert constraint is not None
    schema = json.loads(constraint.value)
    # References to definitions count from the schema's root.
    assert schema["$defs"] == {"count": {"type": "integer"}} and schema["properties"]["name"]


def test_tool_calls_are_found_in_the_text(chat: Any, shared: Running) -> None:
    call = '<tool_call>\\n{"name": "weather", "arguments": {"city": "Bern"}}\\n</tool_call>'
    text = f"say Let me see.{call}{call}"
    answer = chat(text, "tools", tools=[WEATHER])
    message = answer.choices[0].message
    assert message.content == "Let me see." and len(message.tool_calls) == 2
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Bern"}
    assert "weather" in shared.engine.text_of(shared.engine.submitted[-1].tokens)
    # The answer goes back to the model with the tool's, as the client has it.
    result = {"role": "tool", "content": "sunny", "tool_call_id": message.tool_calls[0].id}
    again = [{"role": "user", "content": text}, message.model_dump(), result]
    chat(model="tools", messages=again, tools=[WEATHER])
    assert "sunny" in shared.engine.text_of(shared.engine.submitted[-1].tokens)
    one = chat(text, "tools", tools=[WEATHER], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1
    none = chat(text, "tools", tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message.tool_calls is None and "<tool_call>" in none.choices[0].message.content


def test_tool_calls_in_a_stream_come_whole(chat: Any) -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'
    text, calls, finish = "", [], None
    for event in chat(f"say Let me < see.{call}", "tools", tools=[WEATHER], stream=True):
        delta = event.choices[0].delta
        text += delta.content or ""
        calls += delta.tool_calls or []
        finish = event.choices[0].finish_reason or finish
    assert text == "Let me < see." and finish == "tool_calls"
    [call] = calls
    assert call.index == 0 and json.loads(call.function.arguments) == {"city": "Bern"}


def test_failures_of_the_engine_are_not_told_in_full(chat: Any, shared: Running) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        chat("fail")
    assert "secret" not in str(error.value)
    with pytest.raises(openai.APIError) as streamed:
        list(chat("fail", stream=True))
    assert "secret" not in str(streamed.value) and "engine failed" in str(streamed.value)
    assert chat().choices[0].message.content == "HELLO"
    assert until(lambda: not shared.desk.in_hand)


def test_the_asynchronous_client_runs_many_at_once(shared: Running) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=shared.url + "/v1", api_key="any") as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=["base", "poet", "clerk"][number % 3],
                    messages=[{"role": "user", "content": f"n{number}"}],
                    temperature=0,
                    stream=True,
                )
                return "".join([event.choices[0].delta.content or "" async for event in stream])

            return list(await asyncio.gather(*(one(number) for number in range(48))))

    names = ["", "poet: ", "clerk: "]
    assert asyncio.run(ask()) == [f"{names[number % 3]}N{number}" for number in range(48)]
