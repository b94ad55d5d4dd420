"""Whatever the API's own description allows or forbids, no request is answered 500."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from octavo.serve import page
from octavo.serve.app import create_app
from octavo.serve.openapi import document
from tests.serve.conftest import Running

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
API = schemathesis.openapi.from_dict(document())
# The field of each route that bounds its answers, which are kept short; other routes have none.
LIMITS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
OPERATIONS = [result.ok() for result in API.get_all_operations()]


def test_every_route_is_described_with_its_methods_and_no_other_is() -> None:
    """Routes and their descriptions stand in two places: none can be forgotten in one of them."""
    service: Any = None  # no request is answered
    own = {route.path for route in page.routes()} | {"/openapi.json"}
    served = {
        re.sub("{.*}", "{}", route.path): {method.lower() for method in route.methods} - {"head"}  # type: ignore[attr-defined]
        for route in create_app(service).routes
        if route.path not in own  # type: ignore[attr-defined]
    }
    served["/ping"].remove("post")  # for SageMaker alone, the same
    assert served == {re.sub("{.*}", "{}", path): set(methods) for path, methods in document()["paths"].items()}


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_is_answered_500(running: Running, operation: schemathesis.APIOperation, mode: GenerationMode):
    posts, limit = operation.method == "post", LIMITS.get(operation.path)
    if mode is GenerationMode.NEGATIVE and not posts:
        pytest.skip("a request without a body has nothing to get wrong")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=(20 if limit else 8) if posts else 3,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            if limit and case.body.get(limit) is None and case.body.get("max_tokens") is None:
                case.body[limit] = 4
            for name in {limit, "max_tokens"}:
                if isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 8)
            if isinstance(case.body.get("n"), int):
                case.body["n"] = min(case.body["n"], 2)
        case.call_and_validate(base_url=running.url, checks=CHECKS, timeout=60)

    check()
