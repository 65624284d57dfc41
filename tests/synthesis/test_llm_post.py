"""Whatever an endpoint does, a question ends in time with a reply, a reason and settled books."""

import asyncio
import time
from email.utils import formatdate
from pathlib import Path

import orjson
import pytest
from scripted_endpoint import (
    GOOD,
    ScriptedEndpoint,
    completion,
    drips,
    drops,
    fenced,
    hangs,
    refuses,
    repeats_the_key,
    says,
    sends,
)

from autopoiesis.synthesis.letter import Message
from autopoiesis.synthesis.llm.choice import ModelChoice
from autopoiesis.synthesis.llm.conversation import Ask, Fault, Reply
from autopoiesis.synthesis.llm.exchange import Recorder
from autopoiesis.synthesis.llm.ledger import Ledger
from autopoiesis.synthesis.llm.post import Models, Post
from autopoiesis.synthesis.llm.settings import LlmSettings

KEY = "sk-test-0123456789abcdef"
ASK = Ask((Message("system", "Write policies."), Message("user", "Now.")))


class Desk:
    """A post office with its books in a folder, and a clock that does not wait."""

    def __init__(self, folder: Path, url: str, key: str = KEY, **settings) -> None:
        given = {
            "base_url": url,
            "models": ("small",),
            "prices": {"small": (1.0, 4.0)},
            "timeout_s": 20.0,
        }
        self.settings = LlmSettings(**{**given, **settings})
        self.folder, self.key = folder, key
        self.waits: list[float] = []

    def ask(self, ask: Ask = ASK, within_s: float = 30.0) -> Reply:
        return asyncio.run(self._ask(ask, within_s))

    async def _ask(self, ask: Ask, within_s: float) -> Reply:
        choice = ModelChoice(self.folder / "models.json", self.settings)
        models = Models(self.settings, self.key, choice)
        self.ledger = Ledger(self.folder / "ledger.json", self.settings)
        recorder = Recorder(self.folder / "exchanges", "cycle", 1 << 20)
        recorder.begin(b"{}", "openai")

        async def wait(seconds: float) -> None:
            self.waits.append(seconds)

        try:
            return await Post(self.settings, models, self.ledger, choice, recorder, 0, wait).ask(
                ask, within_s
            )
        finally:
            await models.close()

    @property
    def books(self) -> dict:
        return orjson.loads((self.folder / "ledger.json").read_bytes())

    @property
    def written(self) -> bytes:
        return b"".join(p.read_bytes() for p in self.folder.rglob("*") if p.is_file())


def test_an_answer_comes_with_its_price_and_is_recorded(tmp_path):
    with ScriptedEndpoint(says(fenced(GOOD))) as endpoint:
        desk = Desk(tmp_path, endpoint.url)
        reply = desk.ask()
    assert (reply.fault, reply.model, reply.counted) == (None, "small", True)
    assert GOOD in reply.texts[0]
    assert (reply.tokens, reply.cost_usd) == (1200, pytest.approx(0.0018))
    assert desk.books["settled"] == {"tokens": 1200, "usd": pytest.approx(0.0018)}
    assert desk.books["reserved"] == {}
    (body,) = endpoint.bodies
    assert body["messages"][1] == {"role": "user", "content": "Now."}
    assert (body["model"], body["max_completion_tokens"]) == ("small", 4096)
    assert endpoint.keys == [f"Bearer {KEY}"]
    line = orjson.loads((tmp_path / "exchanges" / "cycle.jsonl").read_bytes().splitlines()[1])
    assert Reply.of(line["reply"]) == reply
    assert Ask.of(line["ask"]) == ASK
    assert line["attempts"][0]["parameters"]["temperature"] == 0.8


@pytest.mark.parametrize(
    ("act", "fault", "words", "attempts"),
    [
        (hangs(), Fault.TIME, "no answer within 0.5 s", 3),
        (drips(), Fault.TIME, "no answer within 0.5 s", 3),
        (drops(), Fault.BROKEN, "connection", 3),
        (drops(b'{"choices": [{"mess'), Fault.BROKEN, "connection", 3),
        (refuses(500, "oops"), Fault.BROKEN, "answered 500", 3),
        (refuses(503, "overloaded"), Fault.BUSY, "answered 503", 3),
        (refuses(429, "slow down"), Fault.BUSY, "slow down", 3),
        (refuses(429, "pay first", "insufficient_quota"), Fault.REFUSED, "pay first", 1),
        (refuses(401, "who are you"), Fault.KEY, "who are you", 1),
        (refuses(404, "no such model"), Fault.REFUSED, "no such model", 1),
        (refuses(400, "maximum context length is 2048 tokens"), Fault.TOO_LONG, "2048", 1),
        (sends(b"<html>Bad gateway</html>", 302, Location="http://127.0.0.1:1/"), Fault.REFUSED, "302", 1),
        (sends(b"\xff\xfe\x00 not text"), Fault.NONSENSE, "no chat completion", 1),
        (sends(b'{"choices": [{"message": {"content": "hal'), Fault.NONSENSE, "no chat completion", 1),
        (sends(b"[]"), Fault.NONSENSE, "no chat completion", 1),
        (sends(b"null"), Fault.NONSENSE, "no chat completion", 1),
        (sends(b'{"choices": []}'), Fault.NONSENSE, "empty", 1),
        (sends(b'{"choices": null}'), Fault.NONSENSE, "no chat completion", 1),
        (sends(b'{"choices": [{"message": null}]}'), Fault.NONSENSE, "no chat completion", 1),
        (sends(orjson.dumps(completion(""))), Fault.NONSENSE, "empty", 1),
        (says("x" * (1 << 20)), Fault.NONSENSE, "more than 512 KiB", 1),
        (sends(b"z" * (1 << 20), 500), Fault.BROKEN, "answered 500", 3),
    ],
)  # fmt: skip
def test_every_bad_answer_becomes_a_reason(tmp_path, act, fault, words, attempts):
    with ScriptedEndpoint(act) as endpoint:
        timeout_s = 0.5 if fault is Fault.TIME else 20.0
        desk = Desk(tmp_path, endpoint.url, attempts=3, timeout_s=timeout_s)
        reply = desk.ask()
    assert (reply.fault, reply.texts) == (fault, ())
    assert words in reply.reason
    assert "\n" not in reply.reason
    assert len(reply.reason) < 1500
    assert len(endpoint.bodies) == attempts
    assert desk.books["reserved"] == {}
    assert desk.books["settled"]["tokens"] == reply.tokens


def test_what_may_have_been_billed_is_booked_and_what_was_refused_is_not(tmp_path):
    for act, billed in (
        (hangs(), True),
        (drops(), True),
        (refuses(500), False),
        (refuses(401), False),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with ScriptedEndpoint(act) as endpoint:
            reply = Desk(folder, endpoint.url, attempts=1, timeout_s=0.2).ask()
        assert (reply.tokens > 4096, reply.cost_usd > 0.016) == (billed, billed)


def test_it_waits_longer_each_time_or_as_long_as_it_is_asked_to(tmp_path):
    script = (refuses(500), refuses(429, Retry_After="7"), refuses(429, Retry_After="junk"))
    with ScriptedEndpoint(*script, says(GOOD)) as endpoint:
        desk = Desk(tmp_path, endpoint.url)
        assert desk.ask().fault is None
    first, second, third = desk.waits
    assert 0.5 <= first <= 1.0
    assert second == 7.0
    assert 2.0 <= third <= 4.0


def test_it_does_not_wait_beyond_its_time(tmp_path):
    later = formatdate(time.time() + 3600, usegmt=True)
    for retry_after in ("31", later):
        with ScriptedEndpoint(refuses(429, "busy", Retry_After=retry_after)) as endpoint:
            desk = Desk(tmp_path / retry_after[:2], endpoint.url)
            reply = desk.ask(within_s=30.0)
        assert (reply.fault, desk.waits, len(endpoint.bodies)) == (Fault.BUSY, [], 1)
        assert "asks to wait" in reply.reason


def test_without_time_nothing_is_sent(tmp_path):
    with ScriptedEndpoint(says(GOOD)) as endpoint:
        reply = Desk(tmp_path, endpoint.url).ask(within_s=0.0)
    assert (reply.fault, endpoint.bodies) == (Fault.LATE, [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget_usd": 0.01}, "llm.budget_usd allows 0.01"),
        ({"budget_usd_per_day": 0.01}, "llm.budget_usd_per_day"),
        ({"budget_tokens": 4000}, "llm.budget_tokens allows 4000"),
        ({"budget_tokens_per_day": 4000}, "llm.budget_tokens_per_day"),
        ({"models": ()}, "llm.models"),
    ],
)
def test_without_budget_or_model_nothing_is_sent(tmp_path, settings, words):
    with ScriptedEndpoint(says(GOOD)) as endpoint:
        given = {"prices": {}} if "models" in settings else {}
        reply = Desk(tmp_path, endpoint.url, **settings, **given).ask()
    assert endpoint.bodies == []
    assert reply.fault in {Fault.BUDGET, Fault.REFUSED}
    assert words in reply.reason
    assert (reply.tokens, reply.cost_usd) == (0, 0.0)


def test_without_a_key_nothing_is_sent_unless_none_is_wanted(tmp_path):
    with ScriptedEndpoint(says(GOOD)) as endpoint:
        reply = Desk(tmp_path, endpoint.url, key="").ask()
        assert (reply.fault, endpoint.bodies) == (Fault.KEY, [])
        assert "OPENAI_API_KEY" in reply.reason
        assert Desk(tmp_path, endpoint.url, key="", api_key_env="").ask().fault is None


def test_the_key_comes_to_rest_nowhere(tmp_path):
    leaking = says(fenced(GOOD.replace("Less", f"{KEY} less")))
    for act in (repeats_the_key(), leaking, drops(b"x")):
        with ScriptedEndpoint(act) as endpoint:
            reply = Desk(tmp_path, endpoint.url, attempts=1).ask()
        assert endpoint.keys == [f"Bearer {KEY}"]
        assert KEY not in str(reply)
    assert KEY.encode() not in Desk(tmp_path, endpoint.url).written


def test_without_usage_the_bytes_are_counted(tmp_path):
    for usage in (None, (-1, 5), ("many", None)):
        with ScriptedEndpoint(says(GOOD, usage=usage)) as endpoint:
            reply = Desk(tmp_path / str(usage)[:3], endpoint.url).ask()
        assert reply.fault is None
        assert reply.tokens >= len(GOOD) / 2
    assert not reply.counted


def test_an_unknown_price_counts_as_tokens_only(tmp_path):
    with ScriptedEndpoint(says(GOOD)) as endpoint:
        reply = Desk(tmp_path, endpoint.url, prices={}, budget_usd=0.0).ask()
    assert (reply.fault, reply.tokens, reply.cost_usd) == (None, 1200, 0.0)


def test_parameters_that_the_endpoint_does_not_know_are_left_out(tmp_path):
    script = (
        refuses(400, "Unsupported parameter: 'structured_outputs'"),
        refuses(400, "Unsupported value: 'temperature' must be 1"),
        refuses(400, "Unrecognized request argument: max_completion_tokens"),
    )
    with ScriptedEndpoint(*script, says(GOOD)) as endpoint:
        reply = Desk(tmp_path, endpoint.url, attempts=1).ask(Ask(ASK.messages, 2, grammar=True))
    assert (reply.fault, reply.grammar) == (None, False)
    first, *_, last = endpoint.bodies
    assert first["structured_outputs"]["grammar"].startswith("root ::= ")
    assert (last["n"], last["max_tokens"]) == (2, 4096)
    assert not {"structured_outputs", "temperature", "max_completion_tokens"} & set(last)


def test_where_exchanges_cannot_be_recorded_nothing_is_sent(tmp_path):
    (tmp_path / "exchanges").write_text("in the way")
    with ScriptedEndpoint(says(GOOD)) as endpoint:
        reply = Desk(tmp_path, endpoint.url).ask()
    assert (reply.fault, endpoint.bodies) == (Fault.BUDGET, [])
    assert "cannot be recorded" in reply.reason
