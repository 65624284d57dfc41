"""A client of `serve` sees what it would see of the replica, simulated ones here."""

import json
from collections.abc import Iterator

import openai
import pytest
from client_cases import CASES, outcome, shape
from gateway_process import Gateway, serving

MODEL = "simulated"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("cases")
    with serving(folder, "--simulate", "2", "--synthesizer", "none") as running:
        yield running


@pytest.fixture(scope="module")
def clients(gateway: Gateway) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    """The gateway's, and one of a replica."""
    fleet = json.loads((gateway.folder / ".autopoiesis/run/fleet.json").read_text())
    url = f"http://{fleet[0]['address']}"
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="-", max_retries=0) as ours,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as its,
    ):
        yield ours, its


@pytest.mark.parametrize("name", CASES)
def test_the_gateway_answers_as_the_replica(
    clients: tuple[openai.OpenAI, openai.OpenAI], name: str
):
    ours, its = (outcome(CASES[name], client, MODEL) for client in clients)
    if isinstance(its, tuple):  # an error
        assert ours[:2] == its[:2]
        assert ours[0] != "InternalServerError"
    assert shape(its) == shape(ours)


def test_most_cases_are_answered(clients: tuple[openai.OpenAI, openai.OpenAI]):
    answered = [
        name
        for name, one in CASES.items()
        if not isinstance(outcome(one, clients[0], MODEL), tuple)
    ]
    assert len(answered) >= 20, answered
