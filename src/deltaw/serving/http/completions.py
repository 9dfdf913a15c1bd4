"""`/v1/completions`: plain prompts, continued whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltaw.serving.http.answering import Choice, Counted, answered
from deltaw.serving.http.body import described, read_json
from deltaw.serving.http.completion_request import CompletionRequest
from deltaw.serving.http.documented import ANSWERS
from deltaw.serving.http.logprobs import completion_logprobs
from deltaw.serving.http.preparing import adapter_named, check_choices, completion_requests
from deltaw.serving.http.record import Record, record_of
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import ServerSettings
from deltaw.serving.http.texts import Desk, Texts
from deltaw.serving.request import Piece
from deltaw.serving.request import Request as TextRequest


class _Completion:
    """One completion that is being answered."""

    def __init__(
        self, asked: CompletionRequest, requests: Sequence[TextRequest], prompts: Prompts, record: Record
    ) -> None:
        self.asked = asked
        self.record = record
        self._requests = requests
        self._prompts = prompts
        self._created = int(time.time())

    def head(self) -> dict[str, object]:
        """What begins each object of the answer."""
        return {
            "id": f"cmpl-{self.record.id}",
            "object": "text_completion",
            "created": self._created,
            "model": self.asked.model,
        }

    def whole(self) -> dict[str, object]:
        """The answer at once, without its choices."""
        return {**self.head(), "usage": self.record.usage()}

    def choice(self, index: int, choice: Choice) -> dict[str, object]:
        """A choice of the answer."""
        text = self._echoed(index) + choice.text
        told = self._logprobs(index, Piece("", choice.tokens, choice.logprobs), 0, first=True)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": choice.finish}

    async def events(self, texts: Texts, counted: Counted) -> AsyncIterator[dict[str, object]]:
        """The answer in events."""
        said = [0] * len(self._requests)
        begun = [False] * len(self._requests)
        async for index, piece in texts.pieces():
            counted.count(index, piece)
            text = piece.text if begun[index] else self._echoed(index) + piece.text
            told = None
            if piece.logprobs:
                told = self._logprobs(index, piece, said[index], first=not begun[index])
            begun[index] = True
            said[index] += len(text)
            if text or told or piece.finish is not None:
                choice = {"index": index, "text": text, "logprobs": told, "finish_reason": piece.finish}
                event = {**self.head(), "choices": [choice]}
                yield {**event, "usage": None} if self.asked.with_usage else event
        if self.asked.with_usage:
            yield {**self.head(), "choices": [], "usage": self.record.usage()}

    def _echoed(self, index: int) -> str:
        """What stands before a text: its prompt, where that is to be repeated."""
        if not self.asked.echo:
            return ""
        prompt = self.asked.prompts[index // self.asked.choices]
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self._prompts.token_bytes, prompt)).decode("utf-8", "replace")

    def _logprobs(self, index: int, piece: Piece, offset: int, *, first: bool) -> dict[str, object] | None:
        if self.asked.logprobs is None:
            return None
        # With echo, log-probabilities of the prompt's tokens precede the text's; its first token has none.
        of_prompt = len(piece.logprobs) > len(piece.tokens) or self.asked.max_tokens == 0
        starts = self.asked.echo and first and of_prompt
        token = int(self._requests[index].tokens[0]) if starts else None
        return completion_logprobs(piece.logprobs, self._prompts.token_bytes, offset=offset, first=token)


def completions_router(served: Served, desk: Desk, settings: ServerSettings) -> APIRouter:
    """The route of completions."""
    router = APIRouter()
    limits = settings.limits

    @router.post(
        "/v1/completions",
        summary="Continue prompts",
        openapi_extra=described(CompletionRequest),
        responses=ANSWERS,
        response_class=Response,
    )
    async def completions(request: Request) -> Response:
        asked = await read_json(request, CompletionRequest, limits)
        record = record_of(request.scope)
        adapter = adapter_named(served, asked.model)
        record.model, record.stream = asked.model, bool(asked.stream)
        if settings.log_prompts:
            record.asked = asked.prompt
        count = asked.choices * len(asked.prompts)
        check_choices(count, limits)
        desk.check_room(count)
        requests = await desk.elsewhere(
            lambda: completion_requests(asked, adapter, served, limits, record.owner)
        )
        record.prompt_tokens = sum(len(r.tokens) for r in requests[:: asked.choices])
        answer = _Completion(asked, requests, served.prompts(adapter), record)
        counted = Counted(record, desk, asked.choices)
        texts = await desk.write(requests)
        stream = bool(asked.stream)
        return await answered(request, answer, texts, len(requests), counted, desk, stream=stream)

    return router
