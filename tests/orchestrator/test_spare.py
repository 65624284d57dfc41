"""The fleet is idle when nothing is held, nothing waits, and no replica is used much."""

from dataclasses import replace

import pytest

from autopoiesis.orchestrator.spare import spare
from autopoiesis.replicas.fleet import Member
from autopoiesis.telemetry.records import OpenRequest, ReplicaSample

PROFILE = "h100-llama-3-8b-tp1-bf16"
NOW_S = 1000.0


def member(name: str, port: int, kind: str = "remote") -> Member:
    return Member(name, f"127.0.0.1:{port}", PROFILE, kind=kind)


def sample(name: str, **more) -> ReplicaSample:
    quiet = ReplicaSample(NOW_S - 0.5, name, "", True, 2, 2.0, 0.0, 0.05, 0.0, 0.0, 0.0)
    return replace(quiet, **more)


MEMBERS = (member("a", 9001), member("b", 9002))
QUIET = {"a": sample("a", kv_usage=0.1), "b": sample("b")}
SENT, HELD = OpenRequest(999.0, 1, 10, 10, replica="a"), OpenRequest(999.0, 2, 10, 10)


def test_the_idlest_replica_of_a_quiet_fleet_is_lent():
    found = spare(MEMBERS, QUIET, (SENT,), NOW_S, 0.25)
    assert (found.idle, found.replica) == (True, "b")


@pytest.mark.parametrize(
    ("changes", "held", "words"),
    [
        ({}, (HELD, SENT), "1 requests are held"),
        ({"a": sample("a", waiting=3.0)}, (), "3 requests wait at a"),
        ({"a": sample("a", kv_usage=0.3)}, (), "a is used to 30%, not below 25%"),
        ({"b": sample("b", in_flight=100)}, (), "b is used to 39%"),
        ({"b": sample("b", running=70.0)}, (), "b is used to 27%"),
        ({"b": sample("b", at_s=NOW_S - 60.0)}, (), "b has not reported"),
        (
            {"a": sample("a", healthy=False), "b": sample("b", healthy=False)},
            (),
            "no replica answers",
        ),
    ],
)
def test_a_fleet_with_clients_to_serve_is_not_lent(changes, held, words):
    found = spare(MEMBERS, QUIET | changes, held, NOW_S, 0.25)
    assert (found.idle, found.replica) == (False, "")
    assert words in found.why


def test_a_replica_that_is_down_is_not_lent():
    samples = QUIET | {"b": sample("b", healthy=False)}
    assert spare(MEMBERS, samples, (), NOW_S, 0.25).replica == "a"


def test_simulated_replicas_are_not_asked():
    simulated = tuple(replace(m, kind="simulated") for m in MEMBERS)
    assert "simulated" in spare(simulated, QUIET, (), NOW_S, 0.25).why
    mixed = (simulated[0], MEMBERS[1])
    assert spare(mixed, QUIET, (), NOW_S, 0.25).replica == "b"
    assert not spare(MEMBERS, {}, (), NOW_S, 0.25).idle
