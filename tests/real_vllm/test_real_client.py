"""A client of `serve` gets, word for word, what the real vLLM behind it answers."""

import json
from collections.abc import Iterator

import openai
import pytest
from client_cases import CASES, outcome
from gateway_process import Gateway

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def clients(fleet: Gateway) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    members = json.loads((fleet.folder / ".autopoiesis/run/fleet.json").read_text())
    with (
        openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="-", max_retries=0) as ours,
        openai.OpenAI(
            base_url=f"http://{members[0]['address']}/v1", api_key="-", max_retries=0
        ) as its,
    ):
        yield ours, its


@pytest.mark.parametrize("name", CASES)
def test_the_gateway_answers_as_vllm(clients: tuple[openai.OpenAI, openai.OpenAI], name: str):
    ours, its = (outcome(CASES[name], client, "tiny") for client in clients)
    assert its == ours
