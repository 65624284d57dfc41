import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from telemetry_rows import (
    START_S,
    allocation,
    cell_row,
    estimates,
    event,
    fill,
    replica_sample,
    request,
    twin_error,
    window_row,
)

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.telemetry import records
from autopoiesis.telemetry.arrays import pack, unpack
from autopoiesis.telemetry.records import CandidateRow, GuardRails, SynthesisRow
from autopoiesis.telemetry.store import Store, TelemetryError

ARM = Arm(
    id="aaaa",
    name="least requests",
    origin=Origin.HUMAN,
    state=State.LIVE,
    source="def score(request, replica, fleet):\n    return replica.in_flight\n",
    created_at=1_790_000_000.1234567,
    parents=("p1", "p2"),
    reason="a seed",
    pinned=True,
    thought="Ünïcode ✓",
    slow="def schedule(window, fleet, plan):\n    return plan\n",
    prompt="Write …",
    answer="Here: …",
)
SYNTHESIS = SynthesisRow(
    started_s=START_S,
    window=3,
    trigger="regret",
    synthesizer="genetic",
    seconds=4.0,
    cpu_seconds=3.0,
    tokens=0,
    cost_usd=0.0,
    promoted=("aaaa",),
    candidates=(
        CandidateRow("aaaa", "src", "promoted", "promoted", "better", 0.1, 0.05, 0.2),
        CandidateRow("", "bad", "rejected", "verify", "no loop", None, None, None, slow="x", model="m", tokens=7,
                     cost_usd=0.5),
    ),
    conclusion="one promoted",
    since_window=2,
)  # fmt: skip


def rows(store: Store, query: str) -> list[dict[str, object]]:
    result = store.query(query)
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def stored(store: Store, table: str, record: object) -> None:
    """Check that the table's newest row holds every field of the record."""
    (row,) = rows(store, f"select * from {table} order by rowid desc limit 1")
    for field in fields(record):  # type: ignore[arg-type]
        if isinstance(record, CandidateRow) and field.name in {"prompt", "answer"}:
            continue  # kept with the arm
        value = getattr(record, field.name)
        column = {"window": "window_id", "created_at": "created_s"}.get(field.name, field.name)
        expected = list(value) if isinstance(value, tuple) else value
        assert row[column] == expected, field.name


def test_every_field_of_every_record_is_stored(store: Store) -> None:
    fill(store, [0, 1])
    stored(store, "windows", window_row(1))
    stored(store, "cells", cell_row(1, 1))
    stored(store, "requests", request(19, 1))
    stored(store, "arm_estimates", estimates()[1])
    stored(store, "twin_errors", twin_error(1))
    stored(store, "replicas", replica_sample(1, 3))
    stored(store, "events", event(1))
    store.save_arm(ARM)
    stored(store, "arms", ARM)
    store.write_synthesis(SYNTHESIS)
    store.write_synthesis(SYNTHESIS)
    stored(store, "candidates", SYNTHESIS.candidates[1])
    (row,) = rows(store, "select * from syntheses where synthesis = 1")
    for field in fields(SYNTHESIS):
        if field.name not in {"window", "promoted", "candidates"}:
            assert row[field.name] == getattr(SYNTHESIS, field.name)
    assert (row["window_id"], row["promoted"], row["candidates"]) == (3, ["aaaa"], 2)


def test_times_are_exact_for_programs_and_readable_in_utc(store: Store) -> None:
    fill(store, [0])
    (row,) = rows(store, "select started_s, started_at from windows")
    assert row == {"started_s": START_S, "started_at": "2026-09-21T14:13:20.123457"}


def test_requests_come_back_equal_and_in_order_of_arrival(store: Store) -> None:
    late, early = request(7, arrived_s=START_S + 9), request(3, arrived_s=START_S + 1)
    same = request(5, arrived_s=START_S + 1)
    outside = request(6, arrived_s=START_S + 10)
    store.write_window(window_row(0), requests=[late, early, same, outside])
    assert store.requests_between(START_S, START_S + 10) == [early, same, late]
    assert store.requests_between(START_S + 11, START_S + 99) == []


def test_arms_round_trip_and_are_replaced_by_id(store: Store, tmp_path: Path) -> None:
    younger = replace(ARM, id="bbbb", created_at=ARM.created_at + 1, parents=(), pinned=False)
    store.save_arm(younger)
    store.save_arm(ARM)
    moved = replace(younger, state=State.RETIRED, reason="lost")
    store.save_arm(moved)
    assert store.load_arms() == [ARM, moved]
    store.close()
    with Store.open(store.path) as again:
        assert again.load_arms() == [ARM, moved]


def test_every_step_of_an_arm_is_kept_with_its_time(tmp_path: Path) -> None:
    times = iter([5.0, 6.0, 7.0, 8.0, 9.0])
    arm = replace(ARM, state=State.CANDIDATE, pinned=False)
    with Store.open(tmp_path / "telemetry.duckdb", clock=lambda: next(times)) as store:
        for step in (
            arm,
            replace(arm, state=State.CANARY, reason="good"),
            replace(arm, state=State.CANARY, reason="good", thought="nothing new"),
            replace(arm, state=State.CANARY, reason="good", pinned=True),
            replace(arm, state=State.CANARY, reason="good"),
        ):
            store.save_arm(step)
        history = store.query("select state, pinned, reason, at_s from arm_history order by rowid")
    assert history.rows == [
        ["candidate", False, "a seed", 6.0],
        ["canary", False, "good", 7.0],
        ["canary", True, "pinned", 8.0],
        ["canary", False, "unpinned", 9.0],
    ]


def test_guard_rails_survive_a_restart_with_the_allocation_that_they_hold(store: Store) -> None:
    assert store.load_guard_rails() == GuardRails()
    frozen = GuardRails(frozen=True, only="aaaa", held=allocation(3))
    store.write_guard_rails(frozen, "deployment", [event(0)])
    store.write_guard_rails(replace(frozen, human_only=True), "night", [])
    store.close()
    with Store.open(store.path) as again:
        assert again.load_guard_rails() == replace(frozen, human_only=True)
        told = again.query("select frozen, human_only, only_arm, reason from guard_rails")
        assert told.rows == [[True, False, "aaaa", "deployment"], [True, True, "aaaa", "night"]]
        assert again.query("select count(*) from events").rows == [[1]]


def test_allocation_round_trips_and_may_be_replaced(store: Store) -> None:
    assert store.load_allocation() is None
    store.write_allocation(allocation(0))
    assert store.load_allocation() == allocation(0)
    pinned = Allocation(0, (Cell("bbbb", ("r-0",), tuple(range(64)), 1.0),))
    store.write_allocation(pinned)
    assert store.load_allocation() == pinned
    fill(store, [0])
    assert store.load_allocation() == allocation(1)


def test_numpy_scalars_are_accepted(store: Store) -> None:
    row = replace(window_row(0), requests=np.int64(7), regret=np.float64(0.25))  # type: ignore[arg-type]
    cells = (Cell("aaaa", ("r-0",), tuple(np.arange(64)), np.float64(0.5)),)  # type: ignore[arg-type]
    store.write_window(row, allocation=Allocation(1, cells))
    assert rows(store, "select requests, regret from windows") == [{"requests": 7, "regret": 0.25}]
    assert store.load_allocation() == Allocation(
        1, (Cell("aaaa", ("r-0",), tuple(range(64)), 0.5),)
    )


def test_windows_are_counted_on_after_a_restart(store: Store) -> None:
    assert store.last_window() == -1
    fill(store, [0, 1, 2])
    store.close()
    with Store.open(store.path) as again:
        assert again.last_window() == 2
        with pytest.raises(TelemetryError, match="window 2 is closed already"):
            again.write_window(window_row(2))
        again.write_window(window_row(3))
        assert again.last_window() == 3


def test_a_window_with_one_wrong_row_is_not_written_at_all(store: Store) -> None:
    fill(store, [0])
    tables = ("windows", "cells", "requests", "allocations", "events", "bandit_state")
    before = [rows(store, f"select count(*) as n from {table}") for table in tables]
    wrong = replace(event(1), window="not a number")  # type: ignore[arg-type]
    state = {"a": np.ones(3)}
    with pytest.raises(TelemetryError, match=r"^Nothing of this was written"):
        store.write_window(
            window_row(1),
            [cell_row(1, 0)],
            [request(1, 1)],
            events=[wrong],
            allocation=allocation(2),
            state=state,
        )
    with pytest.raises(TelemetryError, match="does not fit"):
        store.write_window(window_row(1), requests=[replace(request(1), session=2**64)])
    assert [rows(store, f"select count(*) as n from {table}") for table in tables] == before
    assert store.last_window() == 0
    fill(store, [1])
    assert store.last_window() == 1


def test_state_is_replaced_as_a_whole_or_kept(store: Store) -> None:
    store.write_window(window_row(0), state={"a": np.eye(2), "b": np.array(["x", "yy"])})
    store.write_window(window_row(1))
    assert set(store.load_state()) == {"a", "b"}
    store.write_window(window_row(2), state={"c": np.arange(3, dtype=np.int32)})
    state = store.load_state()
    assert list(state) == ["c"]
    assert state["c"].dtype == np.int32
    state["c"][0] = 9
    with pytest.raises(ValueError, match="store numbers or strings"):
        store.write_window(window_row(3), state={"o": np.array([object()])})


DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
    hnp.unicode_string_dtypes(max_len=5),
    hnp.byte_string_dtypes(max_len=5),
)


@given(hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)))
def test_any_array_of_numbers_or_strings_survives_packing(array: np.ndarray) -> None:
    back = unpack("x", *pack("x", array))
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    assert back.tobytes() == array.astype(back.dtype).tobytes()


def test_state_survives_the_store_and_a_restart(store: Store) -> None:
    rng = np.random.default_rng(5)
    shapes = [(), (0,), (3,), (2, 0, 4), (5, 16, 16)]
    state = {f"posterior/{i} ü": rng.normal(size=shape) for i, shape in enumerate(shapes)}
    state["special"] = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])
    state["arms"] = np.array(["3f2a", "", "ü"])
    state["counts"] = np.array([2**63 - 1, -(2**63)])
    store.write_window(window_row(0), state=state)
    store.close()
    with Store.open(store.path) as again:
        loaded = again.load_state()
    assert list(loaded) == list(state)
    for name, array in state.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_a_stored_array_whose_bytes_do_not_fit_is_named(store: Store) -> None:
    store.write_window(window_row(0), state={"precision": np.eye(2)})
    store._owner.transact(lambda c: c.execute("update bandit_state set shape = [3, 2]"))
    with pytest.raises(TelemetryError, match="precision"):
        store.load_state()


def test_windows_are_counted_on_when_the_clock_goes_back(store: Store) -> None:
    times = (START_S, START_S + 10, START_S - 7200, START_S - 7190)
    for window, started_s in enumerate(times):
        store.write_window(
            replace(window_row(window), started_s=started_s, ended_s=started_s + 10),
            requests=[request(1, window, started_s)],
        )
    assert store.query("select window_id, regret_so_far from regret_over_time order by 1").rows == [
        [window, pytest.approx(0.05 * (window + 1))] for window in range(4)
    ]
    earliest_first = [r.window for r in store.requests_between(0, 9e9)]
    assert earliest_first == [2, 3, 0, 1]
    store.close()
    with Store.open(store.path) as again:
        assert again.last_window() == 3


def test_readers_in_other_threads_see_whole_windows_only(store: Store) -> None:
    torn: list[object] = []
    done = threading.Event()

    def read() -> None:
        query = "select count(*) - 20 * (select count(*) from windows) from requests"
        while not done.is_set():
            torn.extend(row for row in store.query(query).rows if row != [0])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    fill(store, range(25))
    done.set()
    for reader in readers:
        reader.join()
    assert torn == []


def test_a_query_that_takes_all_memory_does_not_keep_a_window_from_being_written(
    tmp_path: Path,
) -> None:
    with Store.open(tmp_path / "t.duckdb", memory_limit="120MB") as store:
        answers: list[str] = []

        def hog() -> None:
            with pytest.raises(ValueError) as refused:
                store.query(
                    "select max(l) from (select list(r) l from range(1e9::bigint) t(r) group by r % 7)"
                )
            answers.append(str(refused.value))

        hogs = [threading.Thread(target=hog) for _ in range(2)]
        for thread in hogs:
            thread.start()
        for window in range(8):
            fill(store, [window], requests=200)
        for thread in hogs:
            thread.join()
        assert store.last_window() == 7
        assert len(answers) == 2


def test_closing_stops_queries_and_refuses_what_comes_after(store: Store) -> None:
    stopped: list[Exception] = []

    def ask() -> None:
        try:
            store.query(
                "select count(*) from range(1000000) a, range(1000000) b where a.range % 7 = b.range % 11"
            )
        except ValueError as error:
            stopped.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    store.close()
    thread.join()
    assert time.monotonic() - started < 3
    assert "closing" in str(stopped[0])
    with pytest.raises(TelemetryError, match="closed"):
        store.query("select 1")
    with pytest.raises(TelemetryError, match="closed"):
        store.write_window(window_row(0))
    store.close()


def test_every_record_type_has_its_table() -> None:
    names = {
        name for name in dir(records) if name.endswith(("Row", "Record", "Sample", "Estimate"))
    }
    assert names == {
        "WindowRow", "CellRow", "RequestRecord", "ReplicaSample", "ArmEstimate", "TwinErrorRow",
        "EventRow", "CandidateRow", "SynthesisRow", "PlanRow", "PrefixErrorRow",
    }  # fmt: skip
