"""Whole hours as Parquet files, and what is forgotten: every row is in the store or in a file, and only once."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from nursery import Nursery
from telemetry_rows import (
    START_S,
    allocation,
    cell_row,
    estimates,
    event,
    replica_sample,
    request,
    twin_error,
    window_row,
)

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.telemetry.answers import as_json
from autopoiesis.telemetry.history import GROUPS, HOUR_S
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.telemetry.store import Retention, Store, TelemetryError

HOUR = START_S // HOUR_S * HOUR_S + HOUR_S
FOR_EVER = Retention(1e9, 1e9)
TABLES = [table for group in GROUPS for table, _ in group.tables()]


def write_at(store: Store, times_s: Sequence[float]) -> None:
    """Write a window with all that belongs to it at each of these times."""
    for time_s in times_s:
        window = store.last_window() + 1
        store.write_window(
            replace(window_row(window), started_s=time_s, ended_s=time_s + 10),
            [cell_row(window, 0), cell_row(window, 1)],
            [request(i, window, time_s + i) for i in range(3)],
            estimates(),
            allocation(window + 1),
            [twin_error(window)],
            [replace(replica_sample(window, 1), at_s=time_s)],
            [replace(event(window), at_s=time_s)],
        )


def synthesis(started_s: float) -> SynthesisRow:
    candidates = (
        CandidateRow("aaaa", "src", "promoted", "promoted", "better", 0.1, 0.05, 0.2),
        CandidateRow("", "bad", "rejected", "verify", "no loop", None, None, None),
    )
    return SynthesisRow(started_s, 3, "regret", "genetic", 4.0, 3.0, 0, 0.0, candidates=candidates)


def history(store: Store) -> Path:
    return store.path.parent / "history"


def rows_of(store: Store, table: str) -> Counter[str]:
    return Counter(map(repr, store.query(f"select * from {table}", 100_000).rows))


def forgotten(store: Store, table: str) -> Counter[str]:
    """Return the rows that are in files only."""
    files = store.query(f"select file from sealed where name = '{table}' and forgotten").rows
    with duckdb.connect() as outside:
        read: Counter[str] = Counter()
        for (file,) in files:
            path = store.path.parent / file
            read += Counter(map(repr, _plain(outside, f"from read_parquet('{path}')")))
        return read


def _plain(connection: duckdb.DuckDBPyConnection, query: str) -> list[list[object]]:
    return [[as_json(x) for x in row] for row in connection.execute(query).fetchall()]


def all_rows(store: Store) -> dict[str, Counter[str]]:
    """Return every row there is, in the store or in files only."""
    return {table: rows_of(store, table) + forgotten(store, table) for table in TABLES}


def test_a_settled_hour_is_a_file_that_others_read(store: Store) -> None:
    write_at(store, [HOUR + 100, HOUR + 3500, HOUR + 3700])
    files = store.keep_history(history(store), FOR_EVER, HOUR + 2 * HOUR_S)

    file = (
        history(store) / "requests" / f"{time.strftime('%Y-%m-%dT%H', time.gmtime(HOUR))}.parquet"
    )
    assert file in files
    assert 6 == pq.read_metadata(file).num_rows
    assert {"id", "arrived_at", "ttft_s", "blocks"} <= set(pq.read_schema(file).names)
    with duckdb.connect() as outside:
        told = _plain(outside, f"from read_parquet('{file}')")
    assert rows_of(store, "requests where window_id < 2") == Counter(map(repr, told))
    assert {f.parent.name for f in files} == {
        "requests", "replicas", "windows", "cells", "arm_estimates", "allocations", "twin_errors", "events",
    }  # fmt: skip


def test_an_hour_that_has_not_settled_is_not_sealed(store: Store) -> None:
    write_at(store, [HOUR + 100])
    assert [] == store.keep_history(history(store), FOR_EVER, HOUR + 2 * HOUR_S - 1)
    assert not history(store).exists()


def test_detail_is_forgotten_before_windows_and_both_by_whole_hours(store: Store) -> None:
    write_at(store, [HOUR + 10, HOUR + HOUR_S + 10, HOUR + 2 * HOUR_S + 10, HOUR + 3 * HOUR_S])
    before = all_rows(store)
    now_s = HOUR + 4 * HOUR_S + 1800
    store.keep_history(history(store), Retention(2 * HOUR_S, 3 * HOUR_S), now_s)

    requests = store.query("select distinct window_id from requests order by all").rows
    windows = store.query("select window_id from windows order by all").rows
    cells = store.query("select distinct window_id from cells order by all").rows
    assert [[2], [3]] == requests
    assert [[1], [2], [3]] == windows == cells
    assert all_rows(store) == before


def test_what_was_done_is_not_done_again(store: Store) -> None:
    write_at(store, [HOUR + 10, HOUR + HOUR_S + 10])
    now_s = HOUR + 9 * HOUR_S
    first = store.keep_history(history(store), FOR_EVER, now_s)
    before = {file: file.stat().st_mtime_ns for file in first}
    assert [] == store.keep_history(history(store), FOR_EVER, now_s)
    assert before == {file: file.stat().st_mtime_ns for file in first}


def test_the_newest_window_and_synthesis_stay_so_that_counting_goes_on(store: Store) -> None:
    write_at(store, [HOUR, HOUR + HOUR_S])
    for hour in range(2):
        store.write_synthesis(synthesis(HOUR + hour * HOUR_S))
    store.keep_history(history(store), Retention(0, 0), HOUR + 1000 * HOUR_S)

    assert [[1]] == store.query("select window_id from windows").rows
    assert [[1]] == store.query("select synthesis from syntheses").rows
    assert [[0]] == store.query("select count(*) from requests").rows
    store.close()
    with Store.open(store.path) as again:
        assert again.last_window() == 1


def test_races_of_arms_that_are_known_stay(store: Store) -> None:
    store.save_arm(Arm("aaaa", "a", Origin.GENETIC, State.LIVE, "source", HOUR, reason="won"))
    for hour in range(2):
        store.write_synthesis(synthesis(HOUR + hour * HOUR_S))
    store.keep_history(history(store), Retention(0, 0), HOUR + 1000 * HOUR_S)

    kept = store.query("select synthesis, arm_id from candidates order by all").rows
    assert [[0, "aaaa"], [1, ""], [1, "aaaa"]] == kept
    assert 2 == forgotten(store, "candidates").total()


def test_what_comes_late_is_sealed_before_its_hour_is_forgotten(store: Store) -> None:
    write_at(store, [HOUR + 10, HOUR + HOUR_S + 10])
    store.keep_history(history(store), FOR_EVER, HOUR + 5 * HOUR_S)
    late = replace(window_row(2), started_s=HOUR + 2 * HOUR_S, ended_s=HOUR + 2 * HOUR_S)
    store.write_window(late, requests=[request(9, 2, HOUR + 20)])
    before = all_rows(store)
    store.keep_history(history(store), Retention(0, 1e9), HOUR + 9 * HOUR_S)

    assert [[0]] == store.query("select count(*) from requests").rows
    assert before == all_rows(store)


def test_what_comes_after_its_hour_was_forgotten_has_a_file_of_its_own(store: Store) -> None:
    write_at(store, [HOUR + 10])
    store.keep_history(history(store), Retention(0, 1e9), HOUR + 5 * HOUR_S)
    store.write_window(
        replace(window_row(1), started_s=HOUR + 30, ended_s=HOUR + 40),
        requests=[request(9, 1, HOUR + 20)],
    )
    before = all_rows(store)
    store.keep_history(history(store), Retention(0, 1e9), HOUR + 6 * HOUR_S)

    assert 2 == len(list((history(store) / "requests").iterdir()))
    assert [[0]] == store.query("select count(*) from requests").rows
    assert before == all_rows(store)


def test_an_allocation_whose_window_never_closed_goes_with_the_next_one(store: Store) -> None:
    write_at(store, [HOUR])
    skipped = replace(window_row(5), started_s=HOUR + 60, ended_s=HOUR + 70)
    store.write_window(skipped, allocation=allocation(6))
    store.keep_history(history(store), Retention(0, 0), HOUR + 9 * HOUR_S)
    write_at(store, [HOUR + 12 * HOUR_S])
    store.keep_history(history(store), Retention(0, 0), HOUR + 20 * HOUR_S)

    assert [[6], [7]] == store.query("select distinct window_id from allocations order by 1").rows
    assert {"1"} == {row.strip("[").split(",")[0] for row in forgotten(store, "allocations")}


def test_files_of_another_telemetry_are_left_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with Store.open(tmp_path / f"{name}.duckdb") as store:
            write_at(store, [HOUR])
            store.keep_history(tmp_path / "history", Retention(0, 1e9), HOUR + 9 * HOUR_S)
    files = sorted((tmp_path / "history" / "requests").iterdir())
    assert 2 == len(files)
    assert [3, 3] == [pq.read_metadata(file).num_rows for file in files]


def test_where_no_file_can_be_written_nothing_is_forgotten(store: Store) -> None:
    write_at(store, [HOUR, HOUR + HOUR_S])
    before = all_rows(store)
    history(store).write_text("no folder")
    with pytest.raises(TelemetryError, match=r"parquet was not written"):
        store.keep_history(history(store), Retention(0, 0), HOUR + 9 * HOUR_S)
    assert before == all_rows(store)
    history(store).unlink()
    store.keep_history(history(store), Retention(0, 0), HOUR + 9 * HOUR_S)
    assert before == all_rows(store)


def test_with_a_clock_that_jumps_every_row_is_there_once(store: Store) -> None:
    """Windows begin whenever the clock says, earlier than those before them, too."""
    written = 0
    for offsets, now_h, kept_h in (([5000, 9000], 6, 2), ([100, 12_000], 7, 3), ([5010], 9, 0)):
        write_at(store, [HOUR + offset for offset in offsets])
        written += len(offsets)
        kept = Retention(kept_h * HOUR_S / 2, kept_h * HOUR_S)
        store.keep_history(history(store), kept, HOUR + now_h * HOUR_S)
        there = all_rows(store)
        assert {table: rows.total() for table, rows in there.items() if rows} == {
            "requests": 3 * written, "replicas": written, "windows": written, "cells": 2 * written,
            "arm_estimates": 2 * written, "allocations": 2 * written, "twin_errors": written,
            "events": written,
        }  # fmt: skip
        assert {1} == {
            n for table in ("requests", "windows", "cells") for n in there[table].values()
        }


def test_a_kill_between_sealing_and_forgetting_loses_and_doubles_nothing(
    nursery: Nursery, tmp_path: Path
) -> None:
    path = tmp_path / "telemetry.duckdb"
    with Store.open(path) as store:
        write_at(store, [HOUR + i * HOUR_S for i in range(3)])
        before = all_rows(store)
    rng = random.Random(5)
    kills = 0
    while True:
        keeper = nursery.child("keep", path, HOUR + 999 * HOUR_S)
        keeper.wait_for(1)
        time.sleep(rng.uniform(0.0, 0.05 * (kills + 1)))
        if keeper.kill()[-1] == "done":
            break
        kills += 1
        assert kills < 100
    assert kills >= 1
    with Store.open(path) as store:
        assert before == all_rows(store)
        assert 1 == rows_of(store, "windows").total()
