"""A fuzzer reads the control API's own description and tries to break a real controller with it."""

from collections.abc import Iterator

import pytest
import schemathesis
from controller_process import Controlled, controlled
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.specs.openapi import checks

NEVER_ENDS = "/live"
WANTED = (
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    with controlled(tmp_path_factory.mktemp("fuzzed"), window_s=600.0) as running:
        yield running


@pytest.fixture(scope="module")
def described(control: Controlled) -> schemathesis.BaseSchema:
    url = f"{control.settings.control_url}/openapi.json"
    return schemathesis.openapi.from_url(url).exclude(path=NEVER_ENDS)


api = schemathesis.pytest.from_fixture("described")


@api.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_whatever_is_sent_the_answer_is_as_described(case: Case, control: Controlled):
    response = case.call(base_url=control.settings.control_url, headers=control.bearer())
    unready = case.operation.path == "/ready" and response.status_code == 503
    assert response.status_code < 500 or unready, response.text
    case.validate_response(response, checks=list(WANTED))
