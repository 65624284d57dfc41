"""The fleet is asked only while it is idle, and let go as soon as traffic comes."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from scripted_endpoint import GOOD, ScriptedEndpoint, hangs, refuses, says

from autopoiesis.synthesis.letter import Message
from autopoiesis.synthesis.llm.choice import ModelChoice
from autopoiesis.synthesis.llm.conversation import Ask, Fault
from autopoiesis.synthesis.llm.exchange import Recorder
from autopoiesis.synthesis.llm.fleet import Fleet
from autopoiesis.synthesis.llm.ledger import Ledger
from autopoiesis.synthesis.llm.post import Post
from autopoiesis.synthesis.llm.settings import LlmSettings

ASK = Ask((Message("user", "Now."),), 4, grammar=True)
SETTINGS = LlmSettings(api_key_env="", timeout_s=20.0)


class Control:
    """A control port that says whether the fleet is idle."""

    def __init__(self, *states: bool) -> None:
        self.states, self.looks = list(states), 0

    async def tell(self, _request: web.Request) -> web.Response:
        self.looks += 1
        idle = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return web.json_response({"idle": idle, "why": "as told", "replica": "r0" if idle else ""})


@asynccontextmanager
async def posting(tmp_path, endpoint: ScriptedEndpoint, *states: bool, settings=SETTINGS):
    """Lend a post that asks the fleet behind a control port, and that control port."""
    control = Control(*states)
    app = web.Application()
    app.router.add_get("/spare", control.tell)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    fleet = Fleet(settings, "", url, {"r0": endpoint.url.removesuffix("/v1")})
    recorder = Recorder(tmp_path / "exchanges", "cycle", 1 << 20)
    recorder.begin(b"{}", "fleet")
    ledger = Ledger(tmp_path / "l.json", settings)
    try:
        yield (
            Post(settings, fleet, ledger, ModelChoice(tmp_path / "m.json", settings), recorder),
            control,
        )
    finally:
        await fleet.close()
        await runner.cleanup()


async def test_an_idle_fleet_is_asked_at_the_lowest_priority_in_the_languages_grammar(tmp_path):
    with ScriptedEndpoint(says(GOOD, GOOD)) as endpoint:
        async with posting(tmp_path, endpoint, True) as (post, _):
            reply = await post.ask(ASK, 10.0)
    assert (reply.fault, reply.model, reply.grammar) == (None, "tiny", True)
    (body,) = endpoint.bodies
    assert (body["model"], body["n"], body["priority"]) == ("tiny", 4, 1_000_000)
    assert body["max_completion_tokens"] == 1024  # a quarter of the model's context
    assert body["structured_outputs"]["grammar"].startswith("root ::= ")
    assert endpoint.keys == ["Bearer none"]


async def test_it_waits_until_the_fleet_is_idle(tmp_path):
    with ScriptedEndpoint(says(GOOD)) as endpoint:
        async with posting(tmp_path, endpoint, False, False, True) as (post, control):
            reply = await post.ask(ASK, 10.0)
            assert control.looks >= 3
    assert reply.fault is None


async def test_a_fleet_that_stays_busy_is_left_alone(tmp_path):
    with ScriptedEndpoint(says(GOOD)) as endpoint:
        async with posting(tmp_path, endpoint, False) as (post, _):
            reply = await post.ask(ASK, 1.2)
    assert (reply.fault, endpoint.bodies, reply.tokens) == (Fault.LATE, [], 0)
    assert "no time to spare: as told" in reply.reason


async def test_a_question_is_called_off_when_traffic_comes(tmp_path):
    with ScriptedEndpoint(hangs(60.0)) as endpoint:
        async with posting(tmp_path, endpoint, True, True, False) as (post, _):
            started_s = time.monotonic()
            reply = await post.ask(ASK, 60.0)
            took_s = time.monotonic() - started_s
        end = time.monotonic() + 10.0
        while endpoint.open:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
    assert (reply.fault, len(endpoint.bodies)) == (Fault.TRAFFIC, 1)
    assert took_s < 15.0
    assert "traffic has come" in reply.reason


async def test_an_engine_without_grammar_or_priority_is_asked_without(tmp_path):
    script = (
        refuses(400, "Got priority 1000000 but Priority scheduling is not enabled."),
        refuses(400, "Failed to compile the EBNF grammar"),
    )
    with ScriptedEndpoint(*script, says(GOOD)) as endpoint:
        async with posting(tmp_path, endpoint, True) as (post, _):
            reply = await post.ask(ASK, 10.0)
    assert (reply.fault, reply.grammar) == (None, False)
    assert not {"priority", "structured_outputs"} & set(endpoint.bodies[-1])


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:1/x"])
async def test_without_news_the_fleet_counts_as_busy(url):
    fleet = Fleet(SETTINGS, "", url, {})
    with pytest.raises(RuntimeError, match="does not answer"):
        await fleet.addressee("", 0.0)
