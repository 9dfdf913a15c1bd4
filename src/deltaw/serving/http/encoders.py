"""Routes of models without generation.

``/v1/embeddings`` is from the OpenAI API, ``/v1/classify`` and ``/v1/rerank`` are from vLLM. ``/v1/predict`` returns
the numbers of a regression.
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
from deltaw.serving.encoders import Classifier, Embedder, Encoders, Regressor, Reranker, Row, RowModel
from deltaw.serving.http.errors import (
    ApiError,
    blame_field,
    error_responses,
    json_response,
    success_response,
    unknown_model_error,
)
from deltaw.serving.http.prompts import far_exceeds
from deltaw.serving.http.requests import Fields, ModelName, Record, Tokens, read_json, record_of, request_body_schema
from deltaw.serving.http.served import Served, TokenizedPrompts
from deltaw.serving.http.settings import Limits

# Maximum number of texts per request, as in the OpenAI API.
MAX_INPUTS = 2048
Input = (
    str
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    | Tokens
    | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
)
_ERROR_RESPONSES = error_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
InputValue = str | list[str] | list[int] | list[list[int]]


class InputRequest(Fields):
    """Common fields of the request bodies."""

    model: ModelName
    input: Input
    user: str | None = Field(None, max_length=512)


class EmbeddingRequest(InputRequest):
    """Body of ``/v1/embeddings``."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=1 << 20)


class ClassifyRequest(InputRequest):
    """Body of ``/v1/classify``."""


class PredictRequest(InputRequest):
    """Body of ``/v1/predict``."""


class RerankDocument(Fields):
    """Document in object form."""

    text: str


class RerankRequest(Fields):
    """Body of ``/v1/rerank``."""

    model: ModelName
    query: str
    documents: Annotated[list[str | RerankDocument], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    user: str | None = Field(None, max_length=512)

    @property
    def texts(self) -> list[str]:
        """Texts of the documents."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


# Route, class of the request body, and name of the outputs, by class of the model.
_ROUTES: dict[type[RowModel], tuple[str, type[InputRequest | RerankRequest], str]] = {
    Reranker: ("/v1/rerank", RerankRequest, "scores"),
    Embedder: ("/v1/embeddings", EmbeddingRequest, "vectors"),
    Classifier: ("/v1/classify", ClassifyRequest, "classes"),
    Regressor: ("/v1/predict", PredictRequest, "numbers"),
}


def serve_encoders(encoders: Encoders, name: str, reference: str, limits: Limits) -> Served:
    """Return the served model for embedding models, classifiers or rerankers.

    Args:
        encoders: The models.
        name: Name of the base model. The other names are adapters.
        reference: Model reference for the list of models.
        limits: Limits of the server.
    """
    first = name if name in encoders.models else next(iter(encoders.models))
    path, fields, output = _ROUTES[type(encoders.models[first])]
    router = APIRouter()

    async def respond(request: Request) -> Response:
        body = await read_json(request, fields, limits)
        record = record_of(request.scope)
        if body.model not in encoders.models:
            raise unknown_model_error(body.model)
        model = encoders.models[body.model]
        width = _width(model, body.dimensions) if isinstance(body, EmbeddingRequest) else 0
        if isinstance(body, RerankRequest):
            outputs = await _compute(encoders, body.model, partial(_pairs, model, body), record, limits, "documents")
            return json_response(_rerank_response(body, outputs[:, 0], record))
        outputs = await _compute(encoders, body.model, partial(_rows, model, body.input), record, limits, "input")
        usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
        response: dict[str, object] = {"object": "list", "model": body.model, "usage": usage}
        if isinstance(body, EmbeddingRequest):
            response["data"] = _embeddings(outputs, width, body.encoding_format)
            return await asyncio.get_running_loop().run_in_executor(None, json_response, response)
        if isinstance(body, PredictRequest):
            response["data"] = [
                {"object": "prediction", "index": index, "prediction": row if len(row) > 1 else row[0]}
                for index, row in enumerate(outputs.tolist())
            ]
            return json_response(response)
        assert isinstance(model, Classifier)
        response["data"] = _classes(outputs, model.classes)
        response |= {"id": f"classify-{record.id}", "created": int(time.time())}
        return json_response(response | {"usage": {**usage, "completion_tokens": 0}})

    responses = success_response(f"The {output}") | _ERROR_RESPONSES
    options: dict[str, Any] = {"openapi_extra": request_body_schema(fields), "responses": responses}
    router.post(path, name=path.removeprefix("/v1/"), summary=f"Compute {output} of texts", **options)(respond)
    other_names = tuple(adapter for adapter in encoders.models if adapter not in (name, first))
    return Served(first, None, _no_prompts, reference, close=encoders.close, routers=(router,), other_names=other_names)


def _embeddings(vectors: Tensor, width: int, encoding: str) -> list[dict[str, object]]:
    """Return the data of a response with the first ``width`` numbers of each vector."""
    if width < vectors.shape[1]:
        # A truncated unit vector must be normalized again.
        vectors = torch.nn.functional.normalize(vectors[:, :width], dim=-1)
    data: list[dict[str, object]] = []
    for index, vector in enumerate(vectors.numpy()):
        text = base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")
        embedding = text if encoding == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": embedding})
    return data


def _classes(probabilities: Tensor, classes: Sequence[str]) -> list[dict[str, object]]:
    """Return the data of a response with (texts, classes) probabilities."""
    data: list[dict[str, object]] = []
    for index, row in enumerate(probabilities):
        probs = row.tolist()
        item = {"index": index, "label": classes[int(row.argmax())], "probs": probs, "num_classes": len(classes)}
        data.append(item | {"probabilities": dict(zip(classes, probs, strict=True))})
    return data


async def _compute(
    encoders: Encoders, name: str, encode: Callable[[Limits], Sequence[Row]], record: Record, limits: Limits, param: str
) -> Tensor:
    """Return the (texts, width) outputs of a request.

    Args:
        encoders: The models.
        name: Name of the model.
        encode: Tokenizes the request.
        record: Record of the request.
        limits: Limits of the server.
        param: Field that contains the texts.
    """
    record.model = name
    rows = await asyncio.get_running_loop().run_in_executor(None, encode, limits)
    record.prompt_tokens = sum(len(row) for row in rows)
    with blame_field(param):
        future = encoders.submit(name, rows)
    if future is None:
        raise ApiError(429, "too many texts are waiting", code="queue_full", retry_after=1)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), limits.seconds)
    except asyncio.TimeoutError:
        raise ApiError(504, f"not finished within {limits.seconds:g} s", code="timeout") from None


def _rows(model: RowModel, value: InputValue, limits: Limits) -> list[Row]:
    """Tokenize the texts of a request.

    Raises:
        ApiError: if the texts have too many tokens.
    """
    inputs = value if isinstance(value, list) and not isinstance(value[0], int) else [value]

    def row(item: object) -> Row:
        if not isinstance(item, str):
            return np.asarray(item, dtype=np.int32)
        _check_length(model, item, "input", limits)
        return model.tokens(item)

    return _limit_tokens(map(row, inputs), "input", limits)


def _pairs(model: RowModel, body: RerankRequest, limits: Limits) -> list[Row]:
    """Tokenize the query with each document of a request. Raises as :func:`_rows`."""
    assert isinstance(model, Reranker)
    _check_length(model, body.query, "query", limits)

    def row(text: str) -> Row:
        _check_length(model, text, "documents", limits)
        return model.pair(body.query, text)

    return _limit_tokens(map(row, body.texts), "documents", limits)


def _check_length(model: RowModel, text: str, param: str, limits: Limits) -> None:
    max_tokens = min(limits.prompt, model.limit or limits.prompt)
    if far_exceeds(text, max_tokens, model.tokens):
        raise ApiError(400, f"a text has far more than {max_tokens:,} tokens", param=param)


def _limit_tokens(rows: Iterable[Row], param: str, limits: Limits) -> list[Row]:
    """Return the rows if their total number of tokens is within the limit of a request."""
    accepted: list[Row] = []
    remaining = limits.prompt
    for row in rows:
        accepted.append(row)
        remaining -= len(row)
        if remaining < 0:
            raise ApiError(400, f"the texts have more than {limits.prompt:,} tokens", param=param)
    return accepted


def _rerank_response(body: RerankRequest, scores: Tensor, record: Record) -> dict[str, object]:
    """Return the response of a rerank request. Documents are sorted by score, ties by their order."""
    results = []
    for index in scores.argsort(descending=True, stable=True)[: body.top_n].tolist():
        extra = {"document": {"text": body.texts[index]}} if body.return_documents else {}
        results.append({"index": index, "relevance_score": float(scores[index]), **extra})
    usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
    return {"id": f"rerank-{record.id}", "model": body.model, "usage": usage, "results": results}


def _width(model: RowModel, requested: int | None) -> int:
    assert isinstance(model, Embedder)
    possible = sorted({*model.nested, model.width})
    if requested is not None and requested not in possible:
        allowed = ", ".join(map(str, possible))
        raise ApiError(400, f"the model's vectors have {allowed} dimensions", param="dimensions")
    return requested or model.width


def _no_prompts(adapter: str | None) -> TokenizedPrompts:
    raise UserError("this model does not generate text")
