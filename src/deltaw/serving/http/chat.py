"""`/v1/chat/completions`: conversations, answered whole or as a stream, with calls of tools."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.serving.http.answering import Choice, Counted, answered
from deltaw.serving.http.body import described, read_json
from deltaw.serving.http.chat_request import ChatRequest
from deltaw.serving.http.documented import ANSWERS
from deltaw.serving.http.logprobs import chat_logprobs
from deltaw.serving.http.preparing import adapter_named, chat_requests, check_choices
from deltaw.serving.http.record import Record, record_of
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import ServerSettings
from deltaw.serving.http.texts import Desk, Texts
from deltaw.serving.http.tool_calls import FORCED, CallForm, CallScan


class _Chat:
    """One chat that is being answered."""

    def __init__(self, asked: ChatRequest, prompts: Prompts, record: Record) -> None:
        self.asked = asked
        self.record = record
        self._prompts = prompts
        self._created = int(time.time())
        self._names = [tool.function.name for tool in asked.offered]
        self._form: CallForm | None = None
        if asked.forced:
            self._form = FORCED
        elif self._names:
            self._form = prompts.call_form

    def head(self, kind: str) -> dict[str, object]:
        """What begins each object of the answer."""
        return {
            "id": f"chatcmpl-{self.record.id}",
            "object": kind,
            "created": self._created,
            "model": self.asked.model,
            "system_fingerprint": None,
        }

    def whole(self) -> dict[str, object]:
        """The answer at once, without its choices."""
        return {**self.head("chat.completion"), "usage": self.record.usage()}

    async def events(self, texts: Texts, counted: Counted) -> AsyncIterator[dict[str, object]]:
        """The answer in events."""
        scans = [self._scan() for _ in range(self.asked.choices)]
        called = [0] * self.asked.choices
        for index in range(self.asked.choices):
            yield self._event(index, {"role": "assistant", "content": ""})
        async for index, piece in texts.pieces():
            counted.count(index, piece)
            scan = scans[index]
            text = piece.text if scan is None else scan.feed(piece.text, piece.tokens)
            calls: list[dict[str, object]] = []
            if piece.finish is not None and scan is not None:
                rest, found = scan.end()
                text += rest
                calls = [call.as_dict() for call in found[: self._most_calls]]
                called[index] = len(calls)
            logprobs = None
            if piece.logprobs:
                logprobs = chat_logprobs(piece.logprobs, self._prompts.token_bytes)
            if text or logprobs:
                yield self._event(index, {"content": text}, logprobs=logprobs)
            for number, call in enumerate(calls):
                yield self._event(index, {"tool_calls": [{"index": number, **call}]})
            if piece.finish is not None:
                yield self._event(index, {}, finish="tool_calls" if called[index] else piece.finish)
        if self.asked.with_usage:
            yield {**self.head("chat.completion.chunk"), "choices": [], "usage": self.record.usage()}

    @property
    def _most_calls(self) -> int | None:
        return 1 if self.asked.parallel_tool_calls is False else None

    def _scan(self) -> CallScan | None:
        return None if self._form is None else CallScan(self._form, self._names)

    def _event(
        self, index: int, delta: dict[str, object], *, finish: str | None = None, logprobs: object = None
    ) -> dict[str, object]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        event = {**self.head("chat.completion.chunk"), "choices": [choice]}
        return {**event, "usage": None} if self.asked.with_usage else event

    def choice(self, index: int, choice: Choice) -> dict[str, object]:
        """A choice of the answer."""
        text: str | None = choice.text
        finish: str | None = choice.finish
        message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
        if (scan := self._scan()) is not None:
            said = "".join(scan.feed(piece.text, piece.tokens) for piece in choice.pieces)
            rest, calls = scan.end()
            if calls:
                finish = "tool_calls"
                message["content"] = (said + rest).strip() or None
                message["tool_calls"] = [call.as_dict() for call in calls[: self._most_calls]]
        logprobs = None
        if self.asked.logprobs:
            logprobs = chat_logprobs(choice.logprobs, self._prompts.token_bytes)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}


def chat_router(served: Served, desk: Desk, settings: ServerSettings) -> APIRouter:
    """The route of chats."""
    router = APIRouter()
    limits = settings.limits

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        openapi_extra=described(ChatRequest),
        responses=ANSWERS,
        response_class=Response,
    )
    async def chat(request: Request) -> Response:
        asked = await read_json(request, ChatRequest, limits)
        record = record_of(request.scope)
        adapter = adapter_named(served, asked.model)
        record.model, record.stream = asked.model, bool(asked.stream)
        if settings.log_prompts:
            record.asked = [message.as_turn() for message in asked.messages]
        check_choices(asked.choices, limits)
        desk.check_room(asked.choices)
        requests = await desk.elsewhere(lambda: chat_requests(asked, adapter, served, limits, record.owner))
        record.prompt_tokens = len(requests[0].tokens)
        answer = _Chat(asked, served.prompts(adapter), record)
        counted = Counted(record, desk, asked.choices)
        texts = await desk.write(requests)
        stream = bool(asked.stream)
        return await answered(request, answer, texts, len(requests), counted, desk, stream=stream)

    return router
