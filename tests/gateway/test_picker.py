"""The picker without Envoy: what it reads at its start, and what it answers when its inside fails."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.arm import arm_id
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway.exchange import Exchange
from autopoiesis.gateway.link import Allocate
from autopoiesis.gateway.picker import Picker
from autopoiesis.gateway.settings import RunDir
from autopoiesis.replicas.fleet import Member

POLICY = verify("def score(request, replica, fleet):\n    return -replica.position\n")
CELL = Cell(POLICY.id, ("r0", "r1"), tuple(range(SHARDS)))
MEMBERS = [Member(name=f"r{i}", address=f"127.0.0.1:{i + 1}", profile="p") for i in range(2)]


class Call:
    """A call of Envoy's: the answers it got."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.is_over = False

    def send(self, answer: bytes) -> None:
        assert not self.is_over
        self.answers.append(ext_proc.ProcessingResponse.FromString(answer))

    def end(self) -> None:
        self.is_over = True


def asked(picker: Picker, *messages: Any) -> Call:
    """Have the picker answer messages of one call."""
    call = Call()
    exchange = Exchange(picker.service, call)  # pyright: ignore[reportArgumentType]
    for message in messages:
        exchange.received(message.SerializeToString())
    return call


def body(**fields: object) -> Any:
    data = orjson.dumps({"messages": [{"role": "user", "content": "hi"}], **fields})
    message = ext_proc.ProcessingRequest(
        request_body=ext_proc.HttpBody(body=data, end_of_stream=True)
    )
    told = message.attributes["envoy.filters.http.ext_proc"].fields
    told["request.path"].string_value = "/v1/chat/completions?x=1"
    told["request.id"].string_value = "id"
    return message


def chosen(answer: Any) -> tuple[str, ...]:
    fields = answer.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    return tuple(fields["x-gateway-destination-endpoint"].string_value.split(","))


@pytest.fixture
def picker(tmp_path: Path) -> Picker:
    made = Picker(RunDir(tmp_path))
    made.state.set_members(MEMBERS)
    return made


def test_the_choice_is_the_arms_order(picker: Picker):
    picker.allocate(Allocate(Allocation(3, (CELL,)), {POLICY.id: POLICY.source}, Objective()))
    call = asked(picker, body())
    (answer,) = call.answers
    assert chosen(answer) == ("127.0.0.1:2", "127.0.0.1:1")
    decision = answer.dynamic_metadata.fields["autopoiesis"].struct_value.fields
    assert (decision["arm"].string_value, decision["window"].number_value) == (POLICY.id, 3)


def test_an_allocation_comes_back_after_a_restart(picker: Picker, tmp_path: Path):
    picker.allocate(Allocate(Allocation(3, (CELL,)), {POLICY.id: POLICY.source}, Objective()))
    again = Picker(RunDir(tmp_path))
    again.state.set_members(MEMBERS)
    again.read_allocation()
    call = asked(again, body())
    assert chosen(call.answers[0])[0] == "127.0.0.1:2"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": "allocate"}', b"\xff\xfe"])
def test_an_unreadable_allocation_leaves_the_baseline(
    picker: Picker, tmp_path: Path, content: bytes
):
    RunDir(tmp_path).allocation.write_bytes(content)
    picker.read_allocation()
    call = asked(picker, body())
    assert len(chosen(call.answers[0])) == 2
    batch = picker.outbox.next_batch()
    assert batch
    assert "the baseline serves" in batch.faults[0].message


@pytest.mark.parametrize(
    "source", ["def score(", POLICY.source.replace("-", "2.0 * "), "import os"]
)
def test_no_arm_is_served_that_does_not_verify_as_what_it_claims_to_be(picker: Picker, source: str):
    picker.allocate(Allocate(Allocation(3, (CELL,)), {POLICY.id: source}, Objective()))
    call = asked(picker, body())
    decision = call.answers[0].dynamic_metadata.fields["autopoiesis"].struct_value.fields
    assert decision["arm"].string_value not in {"", POLICY.id}
    batch = picker.outbox.next_batch()
    assert batch
    assert batch.faults[0].arm_id == POLICY.id


def test_a_failure_of_our_own_is_passed_over_and_counted(
    picker: Picker, monkeypatch: pytest.MonkeyPatch
):
    def fails(_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(picker.state, "decide", fails)
    call = asked(picker, body())
    assert len(chosen(call.answers[0])) == 2
    assert list(picker.state.faults.untold) == [("", "ZeroDivisionError: oh")]


SLOW_ID = "0123456789ab"
BOTH = arm_id(POLICY.id, SLOW_ID)


def test_an_arm_with_slow_functions_is_served_under_its_own_id(picker: Picker):
    cell = Cell(BOTH, ("r0", "r1"), tuple(range(SHARDS)))
    for slow_ids in ({}, {BOTH: SLOW_ID}):
        picker.allocate(
            Allocate(Allocation(3, (cell,)), {BOTH: POLICY.source}, Objective(), slow_ids)
        )
        call = asked(picker, body())
        decision = call.answers[0].dynamic_metadata.fields["autopoiesis"].struct_value.fields
        assert (decision["arm"].string_value == BOTH) == bool(slow_ids)


NONSENSE = verify("def score(request, replica, fleet):\n    return 1e308 * 10\n")


def test_an_arm_that_answers_nonsense_is_answered_by_the_baseline_that_was_sent(
    picker: Picker, tmp_path: Path
):
    message = Allocate(
        Allocation(3, (Cell(NONSENSE.id, ("r0", "r1"), tuple(range(SHARDS))),)),
        {NONSENSE.id: NONSENSE.source, POLICY.id: POLICY.source},
        Objective(),
        baseline=POLICY.id,
    )
    picker.allocate(message)
    again = Picker(RunDir(tmp_path))  # a restart keeps the baseline
    again.state.set_members(MEMBERS)
    again.read_allocation()
    for each in (picker, again):
        call = asked(each, body())
        assert chosen(call.answers[0]) == ("127.0.0.1:2", "127.0.0.1:1")  # as the baseline orders
        decision = call.answers[0].dynamic_metadata.fields["autopoiesis"].struct_value.fields
        assert decision["arm"].string_value == POLICY.id
        assert list(each.state.faults.untold) == [
            (NONSENSE.id, "the scores of all replicas are infinite")
        ]


def test_a_fault_in_reading_lets_the_request_pass(picker: Picker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("autopoiesis.gateway.endpoint_picker.block_hashes", None)
    call = asked(picker, body())
    (answer,) = call.answers
    assert answer.HasField("request_body")
    assert not answer.dynamic_metadata.fields


def test_a_failed_stream_is_no_first_token(picker: Picker):
    message = ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders())
    told = message.attributes["envoy.filters.http.ext_proc"].fields
    told["response.code"].number_value = 500
    asked(picker, body(stream=True), message)
    (flight,) = picker.ledger.flights()
    assert not flight.answered
    told["response.code"].number_value = 200
    asked(picker, body(stream=True), message)
    assert [f.answered for f in picker.ledger.flights()] == [False, True]


def test_the_salt_is_secret_and_stays(picker: Picker, tmp_path: Path):
    salt = RunDir(tmp_path).salt
    assert salt.stat().st_mode & 0o777 == 0o600
    before = salt.read_bytes()
    Picker(RunDir(tmp_path))
    assert salt.read_bytes() == before


def test_a_missing_run_directory_is_explained(tmp_path: Path):
    argv = [sys.executable, "-m", "autopoiesis.gateway.picker", "--run-dir", str(tmp_path / "no")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "There is no run directory" in ended.stderr
