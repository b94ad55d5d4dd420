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
OPERATIONS = [result.ok() for result in API.get_all_operations()]


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_request_is_answered_500(running: Running, operation: schemathesis.APIOperation, mode: GenerationMode):
    posts = operation.method == "post"
    if mode is GenerationMode.NEGATIVE and not posts:
        pytest.skip("a request without a body has nothing to get wrong")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=60 if posts else 3,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            if not any(case.body.get(limit) for limit in ("max_tokens", "max_completion_tokens")):
                case.body["max_tokens"] = 4
            for limit in ("max_tokens", "max_completion_tokens"):
                if isinstance(case.body.get(limit), int):
                    case.body[limit] = min(case.body[limit], 8)
            if isinstance(case.body.get("n"), int):
                case.body["n"] = min(case.body["n"], 2)
        case.call_and_validate(base_url=running.url, checks=CHECKS, timeout=60)

    check()
