"""Whatever the API's own description allows or forbids, no request is answered 500."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

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
