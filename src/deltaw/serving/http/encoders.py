"""`/v1/embeddings` as in the OpenAI API, `/v1/classify` and `/v1/rerank` as in vLLM, over models that read rows.

Knows fields, counts and forms of numbers; not models.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field
from torch import Tensor

from deltaw.errors import UserError
from deltaw.serving.encoders import Classifier, Embedder, Encoders, Reranker, Row, RowModel
from deltaw.serving.http.errors import ApiError, answer, concerning, json_response, no_model, refusals
from deltaw.serving.http.preparing import surely_longer
from deltaw.serving.http.requests import Fields, ModelName, Record, Tokens, described, read_json, record_of
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import Limits

# As in the OpenAI API: texts of one request.
MOST_INPUTS = 2048
Input = (
    str
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    | Tokens
    | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
)
_REFUSED = refusals(400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
Given = str | list[str] | list[int] | list[list[int]]


class InputRequest(Fields):
    """What all bodies have."""

    model: ModelName
    input: Input
    user: str | None = Field(None, max_length=512)


class EmbeddingRequest(InputRequest):
    """The body of ``/v1/embeddings``."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=1 << 20)


class ClassifyRequest(InputRequest):
    """The body of ``/v1/classify``."""


class Document(Fields):
    """A document that is an object."""

    text: str


class RerankRequest(Fields):
    """The body of ``/v1/rerank``."""

    model: ModelName
    query: str
    documents: Annotated[list[str | Document], Field(fail_fast=True, min_length=1, max_length=MOST_INPUTS)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    user: str | None = Field(None, max_length=512)


def encoders_served(encoders: Encoders, name: str, reference: str, limits: Limits) -> Served:
    """What an application serves of row models: those that embed, those that classify, and those that rerank.

    Args:
        name: of the base model in requests; adapters are the other names.
    """
    first = name if name in encoders.models else next(iter(encoders.models))
    path, fields, what = _offered(encoders.models[first])
    router = APIRouter()

    async def respond(request: Request) -> Response:
        asked = await read_json(request, fields, limits)
        record = record_of(request.scope)
        if asked.model not in encoders.models:
            raise no_model(asked.model)
        model = encoders.models[asked.model]
        width = _width(model, asked.dimensions) if isinstance(asked, EmbeddingRequest) else 0
        if isinstance(asked, RerankRequest):
            found = await _computed(encoders, asked.model, partial(_pairs, model, asked), record, limits, "documents")
            return json_response(_ranked(asked, found[:, 0], record))
        found = await _computed(encoders, asked.model, partial(_rows, model, asked.input), record, limits, "input")
        usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
        told: dict[str, object] = {"object": "list", "model": asked.model, "usage": usage}
        if isinstance(asked, EmbeddingRequest):
            if width < found.shape[1]:
                # The beginning of a vector of length 1 is shorter.
                found = torch.nn.functional.normalize(found[:, :width], dim=-1)
            told["data"] = [
                {"object": "embedding", "index": index, "embedding": _form(vector, asked.encoding_format)}
                for index, vector in enumerate(found.numpy())
            ]
            return await asyncio.get_running_loop().run_in_executor(None, json_response, told)
        assert isinstance(model, Classifier)
        data, count = [], len(model.classes)
        for index, row in enumerate(found):
            label = model.classes[int(row.argmax())]
            probs = row.tolist()
            named = dict(zip(model.classes, probs, strict=True))
            told_row = {"index": index, "label": label, "probs": probs, "num_classes": count}
            data.append(told_row | {"probabilities": named})
        told["data"] = data
        told |= {"id": f"classify-{record.id}", "created": int(time.time())}
        return json_response(told | {"usage": {**usage, "completion_tokens": 0}})

    how: dict[str, Any] = {"openapi_extra": described(fields), "responses": answer(f"The {what}") | _REFUSED}
    router.post(path, name=path.removeprefix("/v1/"), summary=f"Give {what} of texts", **how)(respond)
    others = tuple(other for other in encoders.models if other not in (name, first))
    return Served(first, None, _no_prompts, reference, close=encoders.close, routers=(router,), others=others)


def _offered(model: RowModel) -> tuple[str, type[EmbeddingRequest | ClassifyRequest | RerankRequest], str]:
    """The route of a model, the body that it takes, and what it gives."""
    if isinstance(model, Reranker):
        return "/v1/rerank", RerankRequest, "scores"
    if isinstance(model, Embedder):
        return "/v1/embeddings", EmbeddingRequest, "vectors"
    return "/v1/classify", ClassifyRequest, "classes"


async def _computed(
    encoders: Encoders, name: str, make: Callable[[Limits], Sequence[Row]], record: Record, limits: Limits, param: str
) -> Tensor:
    """The outputs of all texts of a request, (texts, width); ``make`` gives their rows, made of the field ``param``."""
    record.model = name
    rows = await asyncio.get_running_loop().run_in_executor(None, make, limits)
    record.prompt_tokens = sum(len(row) for row in rows)
    with concerning(param):
        future = encoders.submit(name, rows)
    if future is None:
        raise ApiError(429, "too many texts are waiting", code="queue_full", retry_after=1)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), limits.seconds)
    except asyncio.TimeoutError:
        raise ApiError(504, f"not done within {limits.seconds:g} s", code="timeout") from None


def _rows(model: RowModel, given: Given, limits: Limits) -> list[Row]:
    """The texts of a request as tokens, as far as there may be so many.

    Raises:
        ApiError: there are too many.
    """
    listed = given if isinstance(given, list) and not isinstance(given[0], int) else [given]

    def row(one: object) -> Row:
        if not isinstance(one, str):
            return np.asarray(one, dtype=np.int32)
        _check_length(model, one, "input", limits)
        return model.tokens(one)

    return _few(map(row, listed), "input", limits)


def _pairs(model: RowModel, asked: RerankRequest, limits: Limits) -> list[Row]:
    """The query with each document of a request; raises as :func:`_rows` does."""
    assert isinstance(model, Reranker)
    _check_length(model, asked.query, "query", limits)

    def row(document: str | Document) -> Row:
        text = document if isinstance(document, str) else document.text
        _check_length(model, text, "documents", limits)
        return model.pair(asked.query, text)

    return _few(map(row, asked.documents), "documents", limits)


def _check_length(model: RowModel, text: str, param: str, limits: Limits) -> None:
    most = min(limits.prompt, model.limit or limits.prompt)
    if surely_longer(text, most, model.tokens):
        raise ApiError(400, f"a text has far more than {most:,} tokens", param=param)


def _few(rows: Iterable[Row], param: str, limits: Limits) -> list[Row]:
    """Rows that together have no more tokens than a request may."""
    found: list[Row] = []
    left = limits.prompt
    for row in rows:
        found.append(row)
        left -= len(row)
        if left < 0:
            raise ApiError(400, f"the texts have more than {limits.prompt:,} tokens", param=param)
    return found


def _ranked(asked: RerankRequest, scores: Tensor, record: Record) -> dict[str, object]:
    """The answer to a request for scores: the best documents first, of equal ones in their order."""
    results = []
    for index in scores.argsort(descending=True, stable=True)[: asked.top_n].tolist():
        document = asked.documents[index]
        told = {"text": document if isinstance(document, str) else document.text}
        shown = {"document": told} if asked.return_documents else {}
        results.append({"index": index, "relevance_score": float(scores[index]), **shown})
    usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
    return {"id": f"rerank-{record.id}", "model": asked.model, "usage": usage, "results": results}


def _width(model: RowModel, asked: int | None) -> int:
    assert isinstance(model, Embedder)
    possible = sorted({*model.nested, model.width})
    if asked is not None and asked not in possible:
        shown = ", ".join(map(str, possible))
        raise ApiError(400, f"the model's vectors have {shown} dimensions", param="dimensions")
    return asked or model.width


def _form(vector: np.ndarray, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")
    return vector.tolist()  # type: ignore[no-any-return]


def _no_prompts(adapter: str | None) -> Prompts:
    raise UserError("this model writes no text")
