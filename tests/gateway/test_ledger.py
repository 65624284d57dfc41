import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
from test_state import Clock, flight, make

from autopoiesis.gateway.access_log import Ending
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.ledger import Ledger
from autopoiesis.gateway.state import GatewayState
from autopoiesis.telemetry.records import RequestRecord, Status

ENDING = Ending(
    key="0", arm_id="a", window=1, shard=0, request_id="0", path="/v1/chat/completions", status=Status.COMPLETED,
    http_status=200, address="127.0.0.1:1", attempts=1, started_unix_s=-1.0, ended_s=3.0, body_bytes=2400,
    input_tokens=80, output_tokens=10,
)  # fmt: skip


@pytest.fixture
def records() -> list[RequestRecord]:
    return []


@pytest.fixture
def state() -> GatewayState:
    return make(1)


@pytest.fixture
def ledger(state: GatewayState, records: list[RequestRecord]) -> Ledger:
    return Ledger(state, records.append)


@pytest.fixture
def send(state: GatewayState, ledger: Ledger) -> Callable[..., Flight]:
    def sent(number: int = 0, **fields: object) -> Flight:
        one = flight(number, **fields)
        assert state.decide(one)
        ledger.open(one)
        return one

    return sent


def test_a_request_ends_with_what_the_access_log_counted(
    send: Callable[..., Flight], state: GatewayState, ledger: Ledger, records: list[RequestRecord]
):
    send()
    assert state.membership.in_flight("r0") == 1
    ledger.close(ENDING)
    assert (state.membership.in_flight("r0"), len(ledger)) == (0, 0)
    (record,) = records
    assert (record.input_tokens, record.output_tokens, record.usage_counted) == (80, 10, True)
    assert record.e2e_s == pytest.approx(2.0)  # the second of upload is the client's own


def test_usage_teaches_how_long_tokens_are(send: Callable[..., Flight], ledger: Ledger):
    before = ledger.chars_per_token, ledger.bytes_per_token
    for number in range(100):
        send(number)
        ledger.close(
            replace(
                ENDING, key=str(number), request_id=str(number), input_tokens=200, body_bytes=1000
            )
        )
    assert before == (4.0, 240.0)
    assert ledger.chars_per_token == pytest.approx(2.0, abs=0.1)  # 400 characters, 200 tokens
    assert ledger.bytes_per_token == pytest.approx(100.0, abs=2.0)


def test_uncounted_output_is_estimated_from_the_stream_and_marked(
    send: Callable[..., Flight], ledger: Ledger, records: list[RequestRecord]
):
    send()
    ledger.close(replace(ENDING, output_tokens=None))
    assert (records[0].output_tokens, records[0].usage_counted) == (10, False)


def test_a_decision_that_envoy_did_not_wait_for_is_void(
    send: Callable[..., Flight], state: GatewayState, ledger: Ledger, records: list[RequestRecord]
):
    send()
    ledger.close(replace(ENDING, key="", arm_id="", window=-1))
    assert (state.membership.in_flight("r0"), len(ledger)) == (0, 0)
    assert [(r.arm_id, r.status) for r in records] == [("", Status.COMPLETED)]


def test_a_decision_that_comes_after_the_end_is_void(
    send: Callable[..., Flight], state: GatewayState, ledger: Ledger, records: list[RequestRecord]
):
    ledger.close(replace(ENDING, key="", arm_id="", window=-1))
    send()
    assert (state.membership.in_flight("r0"), len(ledger), len(records)) == (0, 0, 1)


def test_what_the_picker_itself_ended_is_recorded_once(
    ledger: Ledger, records: list[RequestRecord]
):
    ledger.settle(flight(), Status.SHED, 429)
    ledger.close(replace(ENDING, key="", address="", status=Status.REJECTED, http_status=429))
    assert [r.status for r in records] == [Status.SHED]


def test_two_requests_with_one_id_are_two_requests(
    send: Callable[..., Flight], state: GatewayState, ledger: Ledger, records: list[RequestRecord]
):
    send(0).request_id = "same"
    send(1).request_id = "same"
    ledger.close(replace(ENDING, key="0", request_id="same"))
    ledger.close(replace(ENDING, key="1", request_id="same"))
    assert (state.membership.in_flight("r0"), len(ledger), len(records)) == (0, 0, 2)


def test_what_another_picker_decided_is_recorded_for_its_arm(
    ledger: Ledger, records: list[RequestRecord]
):
    ledger.close(replace(ENDING, key="before-1", arm_id="arm", window=9, shard=4))
    assert [(r.arm_id, r.window, r.shard, r.replica) for r in records] == [("arm", 9, 4, "r0")]


def test_the_end_of_envoy_ends_everything(
    send: Callable[..., Flight], state: GatewayState, ledger: Ledger, records: list[RequestRecord]
):
    for number in range(3):
        send(number)
    flights = ledger.flights()
    send(3)
    assert ledger.abandon(flights) == 3
    assert ledger.abandon(flights) == 0
    ledger.close(replace(ENDING, key="3"))
    assert (state.membership.in_flight("r0"), len(ledger)) == (0, 0)
    assert [r.status for r in records] == [*[Status.ABORTED] * 3, Status.COMPLETED]


def test_a_replica_with_nothing_to_do_has_done_what_it_was_sent(
    send: Callable[..., Flight], state: GatewayState, ledger: Ledger
):
    old = send(0)
    assert ledger.reconcile("r0", old.dispatched_s) == 0
    assert ledger.reconcile("elsewhere", old.dispatched_s + 1.0) == 0
    assert ledger.reconcile("r0", old.dispatched_s + 1.0) == 1
    assert (state.membership.in_flight("r0"), len(ledger)) == (0, 0)


def test_thousands_of_requests_leave_nothing_behind():
    """The soak in short: what is kept of requests that ended does not grow with their number."""
    clock = Clock()
    state = make(2, clock)
    ledger = Ledger(state, lambda _: None)
    statuses = (Status.COMPLETED, Status.ABORTED, Status.FAILED, Status.REJECTED)

    def some(first: int, count: int) -> int:
        for number in range(first, first + count):
            one = flight(number, stream=number % 2 == 0)
            state.decide(one)
            ledger.open(one)
            key = str(number) if number % 5 else ""  # now and then Envoy did not wait for it
            status = statuses[number % 4]
            ending = replace(ENDING, key=key, request_id=str(number), status=status)
            if number % 3 == 0:
                state.accounts.first_token(one, number % 2)
            ledger.close(ending)
            clock.now_s += 0.01
            if number % 25 == 0:
                state.accounts.assume_first_tokens()
                state.accounts.pace.judge(ledger.flights())
        gc.collect()
        return len(gc.get_objects())

    before = some(0, 3000)
    assert some(3000, 3000) - before < 100
    assert (len(ledger), len(state.held)) == (0, 0)
    assert [state.membership.in_flight(f"r{i}") for i in range(2)] == [0, 0]


def test_a_tokenizer_s_word_counts_until_answers_tell_better(
    send: Callable[..., Flight], ledger: Ledger
):
    ledger.start_from(3.1)
    assert ledger.chars_per_token == 3.1
    send()
    ledger.close(replace(ENDING, input_tokens=100))
    learned = ledger.chars_per_token
    assert learned > 3.1
    ledger.start_from(2.0)
    assert ledger.chars_per_token == learned
