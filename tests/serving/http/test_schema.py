"""Tests of the OpenAPI schema, also with requests that schemathesis generates from it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import hypothesis
import pytest

EXAMPLES = 3
HYPOTHESIS_SETTINGS = hypothesis.settings(database=None, suppress_health_check=list(hypothesis.HealthCheck))


def test_schema_describes_every_route(shared):
    paths = shared.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/ready", "/metrics"} <= set(paths)
    post = paths["/v1/chat/completions"]["post"]
    fields = post["requestBody"]["content"]["application/json"]["schema"]
    assert fields["additionalProperties"] is False and "messages" in fields["required"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(post["responses"])
    assert "$ref" not in json.dumps(fields)


@pytest.mark.parametrize("count", [EXAMPLES, pytest.param(300, marks=pytest.mark.slow)])
def test_generated_requests_never_cause_server_errors(start, tmp_path, count):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: it is in 'dev'")
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks as schema_checks

    checks = [not_a_server_error, schema_checks.content_type_conformance, schema_checks.response_schema_conformance]
    (tmp_path / "poet").mkdir()
    (tmp_path / "poet" / "adapter_config.json").write_text("{}")
    server = start("fixed", adapters_from=tmp_path)
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    counts: Counter[tuple[str, int]] = Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:

        @hypothesis.settings(HYPOTHESIS_SETTINGS, max_examples=count)
        @hypothesis.given(case=operation.as_strategy(), use_known_model=hypothesis.strategies.booleans())
        def send(case: Any, use_known_model: bool) -> None:
            if use_known_model and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "base"  # random names do not match
            response = case.call(base_url=server.url)
            counts[(case.path, response.status_code)] += 1
            case.validate_response(response, checks=[*checks, schema_checks.status_code_conformance])

        send()
    assert counts[("/v1/models", 200)] and counts[("/v1/chat/completions", 400)]
    assert not server.request_queue.pending
