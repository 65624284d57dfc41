"""A client of `serve` gets, word for word, what the real vLLM behind it answers."""

import json
from collections.abc import Iterator
from typing import Any

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
    ours, its = (whole(outcome(CASES[name], client, "tiny")) for client in clients)
    assert its == ours


TEXTS = {"content", "text", "delta", "arguments", "reasoning", "reasoning_content", "refusal"}


def whole(told: Any) -> Any:
    """Put a stream together, choice by choice, event by event; leave all else as it is.

    How many tokens vLLM puts into one piece, and whose piece is sent first, depends on how busy it is.
    """
    if not (isinstance(told, list) and told and isinstance(told[0], dict)):
        return told
    parts: dict[Any, Any] = {}
    for piece in told:
        piece.pop("sequence_number", None)
        choices = piece.pop("choices", None)
        if choices is None:  # an event of a response, or a chunk without choices
            kind = piece.get("type"), piece.get("output_index"), piece.get("content_index")
            parts[kind] = joined(parts.get(kind), piece)
            continue
        parts["chunk"] = joined(parts.get("chunk"), piece)
        for choice in choices:
            parts[choice["index"]] = joined(parts.get(choice["index"]), choice)
    return parts


def joined(first: Any, then: Any, name: str = "") -> Any:
    if first is None or then is None:
        return then if first is None else first
    if isinstance(first, dict) and isinstance(then, dict):
        names = [*first, *(n for n in then if n not in first)]
        return {n: joined(first.get(n), then.get(n), n) for n in names}
    if isinstance(first, list) and isinstance(then, list):
        return first + then
    return first + then if name in TEXTS and isinstance(first, str) else then
