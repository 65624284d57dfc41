"""Windows that cannot be written wait; the disk is full because no file of this process may grow."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from page_scene import REPLICAS

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.gateway.link import Batch
from autopoiesis.orchestrator import recorder
from autopoiesis.orchestrator.loop import Settled
from autopoiesis.orchestrator.recorder import ClosedWindow, Recorder
from autopoiesis.telemetry.records import EventRow, RequestRecord, Status, WindowRow
from autopoiesis.telemetry.store import Store

START_S = 1_790_000_000.0


@contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Desk:
    """A recorder, and what it has told."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.acknowledged: list[int] = []
        self.said: list[str] = []
        self.recorder = Recorder(store, self._acknowledge, self.said.append)

    def _acknowledge(self, batches: Sequence[Batch]) -> None:
        self.acknowledged += [batch.sequence for batch in batches]

    def record(self, window: int, requests: int = 2) -> bool:
        batch = Batch(
            window, "boot", tuple(_request(window, i) for i in range(requests)), (), (), ()
        )
        settled = Settled(
            window=_row(window), cells=(), estimates=(), twin_errors=(), events=(), trigger=None
        )
        event = EventRow(START_S, "arm", window, "x", "happened")
        allocation = Allocation(window + 1, (Cell("a", REPLICAS, tuple(range(SHARDS)), 1.0),))
        return self.recorder.record(ClosedWindow(settled, allocation, [batch], [event], {}))

    def counts(self, table: str) -> list[list[int]]:
        query = f"select window_id, count(*) from {table} group by all order by all"
        return self.store.query(query).rows


def _row(window: int) -> WindowRow:
    start_s = START_S + 10 * window
    return WindowRow(window, start_s, start_s + 10, {}, {}, 2, 2, 0, 0, 1.0, 0.2, 0.9, 0.02, 0.05, 9.0, 0.8, 0.01, 0.0,
                     0.03, "", 0.5)  # fmt: skip


def _request(window: int, number: int) -> RequestRecord:
    return RequestRecord(
        f"{window}-{number}", START_S + 10 * window + number, "/v1/completions", "m", Status.COMPLETED, 200, "a",
        window, 0, 0, "r0", 1, False, 10, 10, 10, 0, True, 0.0, 0.0, 0.0003, None, 1.0,
    )  # fmt: skip


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Store.open(tmp_path / "telemetry.duckdb") as store:
        yield Desk(store)


def test_windows_that_waited_are_written_in_order_with_all_their_detail(desk: Desk) -> None:
    assert desk.record(0)
    with full_disk():
        assert not desk.record(1)
        assert not desk.record(2)
        assert 2 == len(desk.recorder)
        assert [[1]] == desk.store.query("select count(*) from windows").rows
    assert desk.record(3)

    assert [[w, 1] for w in range(4)] == desk.counts("windows") == desk.counts("events")
    assert [[w, 2] for w in range(4)] == desk.counts("requests")
    assert [0, 1, 2, 3] == desk.acknowledged
    assert "windows cannot be written and wait in memory" in desk.said[0]
    assert ["windows are written again; 2 waited"] == desk.said[1:]


def test_what_fails_for_long_is_written_without_detail(desk: Desk) -> None:
    with full_disk():
        for window in range(6):
            assert not desk.record(window)
    assert [0] == desk.acknowledged
    assert desk.record(6)

    assert [[w, 1] for w in range(7)] == desk.counts("windows")
    assert [[w, 2] for w in range(1, 7)] == desk.counts("requests")
    assert list(range(7)) == desk.acknowledged
    assert desk.said[-1] == "windows are written again; 6 waited, 2 requests were dropped"


def test_memory_is_bounded_detail_goes_first_and_what_is_lost_is_said(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "MOST_REQUESTS", 10)
    monkeypatch.setattr(recorder, "MOST_WINDOWS", 4)
    with full_disk():
        for window in range(6):
            desk.record(window, requests=4)
        assert 4 == len(desk.recorder)
    assert desk.record(6, requests=4)

    assert [[w, 1] for w in range(2, 7)] == desk.counts("windows")
    assert [[4, 4], [5, 4], [6, 4]] == desk.counts("requests")
    assert list(range(7)) == desk.acknowledged
    assert "16 requests were dropped, 2 windows were lost" in desk.said[-1]


def test_a_long_queue_is_worked_off_in_steps(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "AT_ONCE", 2)
    with full_disk():
        for window in range(4):
            desk.record(window)
    assert not desk.record(4)
    assert 3 == len(desk.recorder)
    assert not desk.record(5)
    assert not desk.record(6)
    assert desk.record(7)
    assert desk.said[-1].startswith("windows are written again; 7 waited")
    assert [[w, 1] for w in range(8)] == desk.counts("windows")
