"""The twin's profiles are fitted again when the replicas are not what they were said to be."""

import asyncio
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import replace

import aiohttp
import pytest
from gateway_process import run, serving

from autopoiesis.orchestrator.capacity import kinds_of, typical
from autopoiesis.orchestrator.refit import (
    FEWEST,
    OFF,
    PAUSE_S,
    PROBATION,
    WINDOWS_OFF,
    WORSE,
    Fit,
    Refits,
)
from autopoiesis.replicas.fleet import Member, free_ports, simulated_command
from autopoiesis.telemetry.records import TwinErrorRow
from autopoiesis.twin.latency import profile
from autopoiesis.twin.profile_files import ProfileError

NAME = "h100-llama-3-8b-tp1-bf16"
FLEET = (
    Member("a", "127.0.0.1:1", NAME, speed=2.0),
    Member("b", "127.0.0.1:2", NAME, speed=1.0),
    Member("c", "127.0.0.1:3", "a100-llama-3-8b-tp1-bf16"),
)


def fit_of(**changes):
    found = replace(profile(NAME), max_num_seqs=7)
    return replace(Fit(found, {"a": 1.0}, 100, 0.3, 0.1), **changes)


@pytest.fixture
def refits(tmp_path):
    return Refits(tmp_path, FLEET, lambda _subject, _message: None)


def errors(off, metric="tpot_mean_s"):
    return [TwinErrorRow(1, metric, 1.0, 1.0 + off)]


def test_replicas_are_as_they_were_said_to_be_until_fitted(refits):
    assert [refits.spec(m).speed for m in FLEET] == [2.0, 1.0, 1.0]
    assert refits.spec(FLEET[0]).profile == profile(NAME)


def test_drift_of_the_twins_error_asks_for_a_fit(refits):
    assert refits.wanted(0.0, [], ["context"], FEWEST) is None
    assert "drifted" in refits.wanted(0.0, [], ["context", "twin"], 0)


def test_a_few_requests_are_not_fitted_to(refits):
    assert refits.wanted(0.0, [], ["twin"], FEWEST - 1) is None
    assert "drifted" in refits.wanted(1.0, [], ["twin"], 1)


def test_latencies_that_are_off_for_long_ask_for_a_fit(refits):
    asked = [refits.wanted(float(t), errors(2 * OFF), [""], FEWEST) for t in range(WINDOWS_OFF)]
    assert asked[:-1] == [None] * (WINDOWS_OFF - 1)
    assert asked[-1] == "its latencies are 30% off"


def test_one_odd_window_or_an_odd_utility_asks_for_nothing(refits):
    for t in range(3 * WINDOWS_OFF):
        odd = 9.0 if t == WINDOWS_OFF else 0.0
        told = [*errors(odd), *errors(9.0, "utility")]
        assert refits.wanted(float(t), told, [""], FEWEST) is None


def test_a_fit_survives_a_restart_and_gives_the_class_its_speeds(refits, tmp_path):
    (tmp_path / f"{NAME}.fit.json").write_bytes(fit_of().to_bytes())
    again = Refits(tmp_path, FLEET, lambda _subject, _message: None)
    specs = [again.spec(m) for m in FLEET]
    assert [s.profile.max_num_seqs for s in specs[:2]] == [7, 7]
    assert specs[2].profile == profile(FLEET[2].profile)
    # b was not seen: it is half as fast as a, as it was said to be.
    assert [s.speed for s in specs] == [1.0, 0.5, 1.0]


def test_what_was_measured_of_replicas_does_not_make_them_of_different_kinds(tmp_path):
    """A plan would find no place for one of them where another has been."""
    equal = [replace(FLEET[0], name=name, speed=1.0) for name in "xy"]
    (tmp_path / f"{NAME}.fit.json").write_bytes(fit_of(speeds={"x": 1.0, "y": 6.0}).to_bytes())
    refits = Refits(tmp_path, equal, lambda *_: None)
    specs = [refits.spec(m) for m in equal]
    assert [s.speed for s in specs] == [1.0, 6.0]
    kinds = kinds_of(specs)
    assert kinds[0] == kinds[1]
    assert {kinds[0]: 3.5} == {kind: s.speed for kind, s in typical(specs, kinds).items()}
    slower = refits.spec(replace(equal[1], speed=0.5))
    assert kinds[0].gpu + " x0.5" == kinds_of([slower])[0].gpu


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"profile": {"name": 1}}'])
def test_a_damaged_fit_is_left(tmp_path, data):
    (tmp_path / f"{NAME}.fit.json").write_bytes(data)
    assert Refits(tmp_path, FLEET, lambda *_: None).spec(FLEET[0]).profile == profile(NAME)
    with pytest.raises(ProfileError):
        Fit.from_bytes(data)


def test_what_is_hardly_better_is_not_used():
    assert fit_of(error=0.1, error_before=0.3).better
    assert not fit_of(error=0.29, error_before=0.3).better


async def test_a_fit_without_telemetry_is_told_and_paused(tmp_path):
    told = []
    refits = Refits(tmp_path / "profiles", FLEET[:1], lambda *what: told.append(what))
    await refits.run(tmp_path, lambda: 1000.0)
    ((subject, message),) = told
    assert subject == NAME
    assert "not fitted: There is no telemetry" in message
    assert refits.wanted(1000.0 + PAUSE_S - 1.0, [], ["twin"], FEWEST) is None
    assert refits.wanted(1000.0 + PAUSE_S, [], ["twin"], FEWEST) is not None


async def with_a_new_fit(tmp_path, monkeypatch, earlier=None):
    """Return refits that have just taken a new fit, and what they have told."""
    told = []
    if earlier:
        (tmp_path / f"{NAME}.fit.json").write_bytes(earlier.to_bytes())
    refits = Refits(tmp_path, FLEET[:2], lambda *what: told.append(what))
    for t in range(WINDOWS_OFF):
        refits.wanted(float(t), errors(0.02, "utility"), [""], FEWEST)

    async def found(_argv):
        return fit_of(profile=replace(profile(NAME), max_num_seqs=9)).to_bytes()

    monkeypatch.setattr("autopoiesis.orchestrator.refit._in_process", found)
    await refits.run(tmp_path, lambda: 10.0)
    assert refits.spec(FLEET[0]).profile.max_num_seqs == 9
    return refits, told


@pytest.mark.parametrize("earlier", [None, fit_of()])
async def test_a_fit_with_which_the_twin_tells_utility_worse_is_taken_back(
    tmp_path, monkeypatch, earlier
):
    refits, told = await with_a_new_fit(tmp_path, monkeypatch, earlier)
    before = earlier.profile.max_num_seqs if earlier else profile(NAME).max_num_seqs
    for t in range(PROBATION - 1):
        refits.wanted(20.0 + t, errors(-0.9, "utility"), [""], FEWEST)
    assert refits.spec(FLEET[0]).profile.max_num_seqs == 9
    assert refits.wanted(30.0, errors(-0.9, "utility"), ["twin"], FEWEST) is None
    assert refits.spec(FLEET[0]).profile.max_num_seqs == before
    assert told[-1] == (NAME, "taken back: its utilities are 0.90 off, and were 0.02 before")
    again = Refits(tmp_path, FLEET[:2], lambda *_: None)
    assert again.spec(FLEET[0]).profile.max_num_seqs == before
    kept = Fit.from_bytes((tmp_path / f"{NAME}.fit.taken-back.json").read_bytes())
    assert kept.profile.max_num_seqs == 9
    assert refits.wanted(30.0 + PAUSE_S, [], ["twin"], FEWEST) is not None


async def test_a_fit_stands_once_the_twin_has_told_utility_as_well_with_it(tmp_path, monkeypatch):
    refits, told = await with_a_new_fit(tmp_path, monkeypatch)
    for t in range(WINDOWS_OFF):
        off = 0.9 if t == 0 else 0.02 + WORSE / 2
        refits.wanted(20.0 + t, errors(off, "utility"), [""], FEWEST)
    for t in range(WINDOWS_OFF):
        refits.wanted(40.0 + t, errors(0.9, "utility"), [""], FEWEST)
    assert refits.spec(FLEET[0]).profile.max_num_seqs == 9
    assert len(told) == 1


def test_a_fit_is_json_that_people_can_read():
    told = json.loads(fit_of().to_bytes())
    assert told["profile"]["name"] == NAME
    assert Fit.from_bytes(fit_of().to_bytes()) == fit_of()


async def send_steadily(url, rate_rps, stop):
    """Stream short answers at a steady rate until told to stop."""
    body = {
        "model": "simulated", "stream": True, "max_tokens": 20,
        "messages": [{"role": "user", "content": "What is the time? " * 40}],
    }  # fmt: skip

    async with aiohttp.ClientSession() as session:

        async def one():
            with suppress(aiohttp.ClientError):
                async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                    await answer.read()

        async with asyncio.TaskGroup() as sending:
            while not stop():
                sending.create_task(one())
                await asyncio.sleep(1.0 / rate_rps)


async def test_a_running_instance_corrects_its_twin(tmp_path):
    """The replica is a third as fast as the profile that serve was told."""
    (port,) = free_ports(1)
    real = Member("real", f"127.0.0.1:{port}", NAME, speed=0.33)
    command = simulated_command(real)
    replica = subprocess.Popen(command.argv, env=os.environ | command.environment)
    try:
        options = [
            "--window",
            "1",
            "--replica",
            real.url,
            "--profile",
            NAME,
            "--synthesizer",
            "none",
        ]
        with serving(tmp_path, *options) as gateway:

            def ask(query):
                return json.loads(run("sql", query, "--format", "json", cwd=tmp_path)[1])

            def fitted():
                told = f"kind = 'twin' and subject = '{NAME}'"
                return [row["message"] for row in ask(f"select message from events where {told}")]

            def off():
                """Return how far the time per token was off in each window, relatively."""
                return [
                    abs(row["twin"] / row["observed"] - 1.0)
                    for row in ask(
                        "select observed, twin from twin_errors where metric = 'tpot_mean_s' "
                        "order by window_id"
                    )
                ]

            stop = asyncio.Event()
            sending = asyncio.create_task(send_steadily(gateway.url, 16.0, stop.is_set))
            while not (messages := await asyncio.to_thread(fitted)):
                assert not sending.done()
                await asyncio.sleep(1.0)
            assert messages[0].startswith("fitted anew: error "), messages
            async with asyncio.timeout(30):
                while max((course := await asyncio.to_thread(off))[-3:]) > 0.25:
                    await asyncio.sleep(1.0)
            assert min(course[:3]) > 0.5
            stop.set()
            await sending
    finally:
        replica.kill()
        replica.wait()
    found = Fit.from_bytes((tmp_path / ".autopoiesis/profiles" / f"{NAME}.fit.json").read_bytes())
    assert found.error < 0.5 * found.error_before
