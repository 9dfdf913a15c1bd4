"""`/v1/embeddings` as in the OpenAI API, and `/v1/classify` as in vLLM, over models that read rows of tokens.

Knows fields, counts and forms of numbers; not models.
"""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field
from torch import Tensor

from deltaw.errors import UserError
from deltaw.serving.encoders import Classifier, Embedder, Encoders, RowModel
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


def encoders_served(encoders: Encoders, name: str, reference: str, limits: Limits) -> Served:
    """What an application serves of row models: those that embed and those that classify.

    Args:
        name: of the base model in requests; adapters are the other names.
    """
    first = name if name in encoders.models else next(iter(encoders.models))
    embeds = isinstance(encoders.models[first], Embedder)
    router = APIRouter()
    path, fields = ("/v1/embeddings", EmbeddingRequest) if embeds else ("/v1/classify", ClassifyRequest)

    async def respond(request: Request) -> Response:
        asked = await read_json(request, fields, limits)
        record = record_of(request.scope)
        if asked.model not in encoders.models:
            raise no_model(asked.model)
        model = encoders.models[asked.model]
        width = _width(model, asked.dimensions) if isinstance(asked, EmbeddingRequest) else 0
        found = await _computed(encoders, asked.model, asked.input, record, limits)
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
            data.append({"index": index, "label": label, "probs": row.tolist(), "num_classes": count})
        told["data"] = data
        told |= {"id": f"classify-{record.id}", "created": int(time.time())}
        return json_response(told | {"usage": {**usage, "completion_tokens": 0}})

    what = "vectors" if embeds else "classes"
    how: dict[str, Any] = {"openapi_extra": described(fields), "responses": answer(f"The {what}") | _REFUSED}
    router.post(path, name=path.removeprefix("/v1/"), summary=f"Give {what} of texts", **how)(respond)
    others = tuple(other for other in encoders.models if other not in (name, first))
    return Served(first, None, _no_prompts, reference, close=encoders.close, routers=(router,), others=others)


async def _computed(encoders: Encoders, name: str, given: Given, record: Record, limits: Limits) -> Tensor:
    """The outputs of all texts of a request, (texts, width)."""
    record.model = name
    rows = await asyncio.get_running_loop().run_in_executor(None, _rows, encoders, name, given, limits)
    record.prompt_tokens = sum(len(row) for row in rows)
    with concerning("input"):
        future = encoders.submit(name, rows)
    if future is None:
        raise ApiError(429, "too many texts are waiting", code="queue_full", retry_after=1)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), limits.seconds)
    except asyncio.TimeoutError:
        raise ApiError(504, f"not done within {limits.seconds:g} s", code="timeout") from None


def _rows(encoders: Encoders, name: str, given: Given, limits: Limits) -> list[np.ndarray]:
    """The texts of a request as tokens, as far as there may be so many.

    Raises:
        ApiError: there are too many.
    """
    model = encoders.models[name]
    listed = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    most = min(limits.prompt, model.limit or limits.prompt)
    rows: list[np.ndarray] = []
    left = limits.prompt
    for one in listed:
        if isinstance(one, str) and surely_longer(one, most, model.tokens):
            raise ApiError(400, f"a text has far more than {most:,} tokens", param="input")
        rows.append(model.tokens(one) if isinstance(one, str) else np.asarray(one, dtype=np.int32))
        left -= len(rows[-1])
        if left < 0:
            raise ApiError(400, f"the texts have more than {limits.prompt:,} tokens", param="input")
    return rows


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
