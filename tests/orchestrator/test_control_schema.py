"""A fuzzer reads the control API's own description and tries to break a real controller with it."""

from collections.abc import Iterator

import pytest
import schemathesis
from controller_process import Controlled, controlled
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.specs.openapi import checks

from autopoiesis.orchestrator.control_contract import ROUTES
from autopoiesis.orchestrator.control_openapi import openapi

LEFT_OUT = ("/live", "/syntheses")
"""The first never ends; to draw the account of a whole cycle takes minutes (`test_control.py` has some)."""
WANTED = (
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    with controlled(tmp_path_factory.mktemp("fuzzed"), window_s=600.0) as running:
        yield running


OPERATIONS = {
    f"{one.method} {one.path}": one
    for one in (
        found.ok() for found in schemathesis.openapi.from_dict(openapi(ROUTES)).get_all_operations()
    )
    if one.path not in LEFT_OUT
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_sent_the_answer_is_as_described(name: str, control: Controlled):
    operation = OPERATIONS[name]

    @settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def sent(case: Case) -> None:
        response = case.call(base_url=control.settings.control_url, headers=control.bearer())
        unready = operation.path == "/ready" and response.status_code == 503
        assert response.status_code < 500 or unready, response.text
        case.validate_response(response, checks=list(WANTED))

    sent()
