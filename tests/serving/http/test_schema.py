"""The OpenAPI schema, and what schemathesis finds when it makes requests from it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import hypothesis
import pytest

EXAMPLES = 3
QUIET = hypothesis.settings(database=None, suppress_health_check=list(hypothesis.HealthCheck))


def test_every_route_is_described(shared):
    paths = shared.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/ready", "/metrics"} <= set(paths)
    post = paths["/v1/chat/completions"]["post"]
    fields = post["requestBody"]["content"]["application/json"]["schema"]
    assert fields["additionalProperties"] is False and "messages" in fields["required"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(post["responses"])
    assert "$ref" not in json.dumps(fields)


@pytest.mark.parametrize("count", [EXAMPLES, pytest.param(300, marks=pytest.mark.slow)])
def test_no_generated_request_is_a_fault(start, tmp_path, count):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: it is in 'dev'")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as of_schema

    checks = [not_a_server_error, of_schema.content_type_conformance, of_schema.response_schema_conformance]
    (tmp_path / "poet").mkdir()
    (tmp_path / "poet" / "adapter_config.json").write_text("{}")
    server = start("fixed", adapters_from=tmp_path)
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:

        @hypothesis.settings(QUIET, max_examples=count)
        @hypothesis.given(case=operation.as_strategy(), known=hypothesis.strategies.booleans())
        def ask(case: Any, known: bool) -> None:
            if known and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "base"  # which chance would not find
            response = case.call(base_url=server.url)
            seen[(case.path, response.status_code)] += 1
            case.validate_response(response, checks=[*checks, of_schema.status_code_conformance])

        ask()
    assert seen[("/v1/models", 200)] and seen[("/v1/chat/completions", 400)]
    assert not server.desk.in_hand
