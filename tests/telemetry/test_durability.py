"""What becomes of the file when the process, the disk or the bytes fail. Real processes and files."""

import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest
from nursery import Nursery
from telemetry_rows import fill, window_row

from autopoiesis.arms.arm import State
from autopoiesis.telemetry import database
from autopoiesis.telemetry.database import SCHEMA_VERSION
from autopoiesis.telemetry.query import query_file
from autopoiesis.telemetry.recovery import set_wal_aside
from autopoiesis.telemetry.store import Store, TelemetryError

SCHEMA_1 = Path(__file__).with_name("schema_version_1.sql")
HERE = str(Path(__file__).parent)


def whole(path: Path) -> int:
    """Check that every window of the file is there with all its rows; return the last one."""
    per_window = {"cells": 2, "requests": 20, "arm_estimates": 2, "twin_errors": 1, "events": 1}
    last, windows, replicas, *counts = query_file(
        path,
        "select max(window_id), count(*), (select count(*) from replicas),"
        + ",".join(f"(select count(*) from {table})" for table in per_window)
        + ", (select count(distinct window_id) from allocations) from windows",
    ).rows[0]
    assert windows == last + 1
    assert replicas == 4 * windows
    assert counts == [n * windows for n in per_window.values()] + [windows]
    return last


KILLS = 50


def test_fifty_killed_writers_lose_no_acknowledged_window_and_tear_none(
    nursery: Nursery, tmp_path: Path
) -> None:
    path = tmp_path / "telemetry.duckdb"
    rng = random.Random(7)
    acknowledged = -1
    for _ in range(KILLS):
        writer = nursery.child("write", path)
        writer.wait_for(1 + rng.randrange(1, 4))
        time.sleep(rng.uniform(0, 0.02))
        acknowledged = int(writer.kill()[-1])
        assert whole(path) >= acknowledged
    assert acknowledged >= KILLS - 1
    with Store.open(path) as store:
        fill(store, [store.last_window() + 1])
    assert whole(path) > acknowledged


@pytest.fixture(scope="module")
def remains(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed writer left: a file with a write-ahead log of at least ten windows."""
    path = tmp_path_factory.mktemp("killed") / "telemetry.duckdb"
    writer = nursery.child("write", path)
    writer.wait_for(12)
    writer.kill()
    return path


@pytest.fixture
def killed(remains: Path, tmp_path: Path) -> Path:
    shutil.copy(wal_of(remains), tmp_path)
    return Path(shutil.copy(remains, tmp_path))


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def test_a_running_owner_is_named(nursery: Nursery, tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    writer = nursery.child("write", path)
    writer.wait_for(1)
    try:
        with pytest.raises(TelemetryError, match=f"in use by process {writer.pid};"):
            Store.open(path)
        with pytest.raises(TelemetryError, match=f"in use by process {writer.pid};"):
            query_file(path, "select 1")
    finally:
        writer.kill()
    Store.open(path).close()


def test_a_truncated_log_opens_as_a_prefix_of_whole_windows(killed: Path) -> None:
    log = wal_of(killed).read_bytes()
    rng = random.Random(3)
    for _ in range(6):
        wal_of(killed).write_bytes(log[: rng.randrange(len(log) // 3, len(log))])
        whole(killed)
    Store.open(killed).close()


def test_a_flipped_log_is_named_and_set_aside_with_the_windows_before_it_kept(
    killed: Path,
) -> None:
    log = bytearray(wal_of(killed).read_bytes())
    log[int(len(log) * 0.7)] ^= 0x10
    wal_of(killed).write_bytes(log)
    with pytest.raises(TelemetryError, match=r"write-ahead log of .* is damaged; `python -m"):
        Store.open(killed)
    with pytest.raises(TelemetryError, match="damaged"):
        query_file(killed, "select 1")
    done = subprocess.run(
        [sys.executable, "-m", "autopoiesis.telemetry.recovery", str(killed)],
        capture_output=True,
        text=True,
        check=True,
    )
    aside = wal_of(killed).with_name(wal_of(killed).name + ".damaged-1")
    assert str(aside) in done.stdout
    assert aside.read_bytes() == bytes(log)
    last = whole(killed)
    assert last >= 3
    with Store.open(killed) as store:
        assert store.last_window() == last
        fill(store, [last + 1])


def test_a_log_that_is_damaged_at_its_head_goes_back_to_the_checkpoint(killed: Path) -> None:
    log = bytearray(wal_of(killed).read_bytes())
    for i in range(0, len(log), 50):
        log[i] ^= 0xFF
    wal_of(killed).write_bytes(log)
    try:
        Store.open(killed).close()
    except TelemetryError:
        set_wal_aside(killed)
    with Store.open(killed) as store:
        assert store.last_window() == -1
        fill(store, [0])


def test_there_must_be_a_log_to_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    Store.open(path).close()
    with pytest.raises(TelemetryError, match="no write-ahead log"):
        set_wal_aside(path)


def test_a_file_from_the_future_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    Store.open(path).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute("update meta set schema_version = 99")
        connection.execute("create table of_the_future (x int)")
    before = path.read_bytes()
    for opened in (Store.open, lambda p: query_file(p, "select 1")):
        with pytest.raises(TelemetryError, match=r"schema version 99.*upgrade autopoiesis"):
            opened(path)
    assert path.read_bytes() == before


def test_an_older_file_is_brought_up_to_date_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "telemetry.duckdb"
    with Store.open(path) as store:
        fill(store, range(2))
    steps = {
        "two.sql": "alter table windows add column note varchar default 'none'",
        "three.sql": "update windows set note = 'moved'",
    }
    original = database.package_sql
    monkeypatch.setattr(database, "package_sql", lambda name: steps.get(name) or original(name))
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, *steps))
    monkeypatch.setattr(database, "SCHEMA_VERSION", SCHEMA_VERSION + 2)
    for _ in range(2):
        with Store.open(path) as store:
            assert store.query("select distinct note from windows").rows == [["moved"]]
            assert store.query("select schema_version from meta").rows == [[SCHEMA_VERSION + 2]]


def version_1(path: Path) -> None:
    """Make a file as schema version 1 left it: two seeds and an arm that has come a long way."""
    with duckdb.connect(str(path)) as connection:
        connection.execute(SCHEMA_1.read_text())
        connection.execute("insert into meta values (1, '2.0.0', timestamp '2026-11-24 00:00:00')")
        columns = "(id, name, origin, state, reason, pinned, parents, created_s, thought, source)"
        connection.execute(
            f"insert into arms {columns} values "
            "('a', 'seed', 'human', 'live', 'by people', false, [], 0, '', 's'), "
            "('b', 'bred', 'genetic', 'live', 'no harm: +0.1', true, ['a'], 1.8e9, 'hm', 's'), "
            "('c', 'late', 'genetic', 'retired', 'weakest', false, ['b'], 1.8e9, '', 's')"
        )
        connection.execute(
            "insert into events values ('arm', 1, 'bred', 'canary: gain 0.1', 1.8e9 + 1), "
            "('arm', 2, 'bred', 'live: no harm: +0.1', 1.8e9 + 5), "
            "('arm', 2, 'bred', 'confirmed by a switchback: +0.1', 1.8e9 + 6), "
            "('arm', 2, 'late', 'canary: gain 0.2', 1.8e9 + 7), "
            "('allocation', 2, '', 'live: bred on 4', 1.8e9 + 7)"
        )


def test_a_file_of_version_1_is_brought_up_to_date_with_what_it_tells_of_arms(
    tmp_path: Path,
) -> None:
    path = tmp_path / "telemetry.duckdb"
    version_1(path)
    assert query_file(path, "select count(*) from arms").rows == [[3]]
    for _ in range(2):
        with Store.open(path) as store:
            assert [(a.id, a.pinned, a.slow) for a in store.load_arms()] == [
                ("a", False, ""),
                ("b", True, ""),
                ("c", False, ""),
            ]
            history = store.query(
                "select arm_id, state, reason, at_s from arm_history order by rowid"
            )
            assert history.rows == [
                ["a", "live", "by people", 1_795_478_400.0],
                ["b", "canary", "gain 0.1", 1.8e9 + 1],
                ["b", "live", "no harm: +0.1", 1.8e9 + 5],
                ["c", "canary", "gain 0.2", 1.8e9 + 7],
                ["c", "retired", "weakest", 1.8e9 + 7],
            ]
            assert store.query("select schema_version from meta").rows == [[SCHEMA_VERSION]]
            assert store.query("select count(*) from events").rows == [[5]]
    with Store.open(path) as store:
        store.save_arm(replace(store.load_arms()[0], state=State.CANARY, reason="doubts"))
        steps = store.query("select state from arm_history where arm_id = 'a' order by rowid")
        assert steps.rows == [["live"], ["canary"]]


def test_a_migration_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "telemetry.duckdb"
    with Store.open(path) as store:
        fill(store, range(2))
    original = database.package_sql
    broken = "alter table windows add column note varchar; drop table not_there"
    with monkeypatch.context() as patch:
        patch.setattr(database, "package_sql", lambda n: broken if n == "x.sql" else original(n))
        patch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, "x.sql"))
        patch.setattr(database, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        with pytest.raises(TelemetryError, match="not_there"):
            Store.open(path)
    with Store.open(path) as store:
        assert "note" not in store.query("from windows").columns
        assert store.last_window() == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"arrived,input\n" * 1000, bytes(20_000)])
def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "telemetry.duckdb"
    path.write_bytes(content)
    with pytest.raises(TelemetryError, match="is no DuckDB file"):
        Store.open(path)
    assert path.read_bytes() == content


def test_somebody_elses_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("create table theirs as select 1 as x")
    with pytest.raises(TelemetryError, match="not of ours"):
        Store.open(path)
    with duckdb.connect(str(path)) as connection:
        assert connection.execute("from theirs").fetchall() == [(1,)]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    with Store.open(path) as store:
        fill(store, range(5))
    damaged = bytearray(path.read_bytes())
    for i in range(4096, len(damaged), 97):
        damaged[i] ^= 0x5A
    path.write_bytes(damaged)
    with pytest.raises(TelemetryError, match="is damaged"):
        Store.open(path)
    path.write_bytes(damaged[: len(damaged) // 4])
    with pytest.raises(TelemetryError, match="is damaged"):
        Store.open(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match=r"cannot be written|cannot be used"):
        Store.open(tmp_path / "not there" / "telemetry.duckdb")
    with pytest.raises(TelemetryError, match="cannot be"):
        Store.open(tmp_path)


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from nursery import Nursery
from telemetry_rows import fill
from autopoiesis.telemetry.store import Store, TelemetryError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.RLIM_INFINITY
store = Store.open(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, unlimited))
refused = 0
while refused < 3:
    try:
        fill(store, [store.last_window() + 1], requests=400)
    except TelemetryError as error:
        assert "free disk space" in str(error), error
        refused += 1
        full = store.last_window()
assert full >= 1
counted = "select (select count(*) from windows), (select count(*) from requests)"
assert store.query(counted).rows == [[full + 1, 400 * (full + 1)]]
resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
fill(store, [full + 1], requests=400)
store.close()
with Store.open(Path(sys.argv[1])) as store:
    assert store.query(counted).rows == [[full + 2, 400 * (full + 2)]]
print("whole")
"""


def test_a_full_disk_refuses_the_window_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "telemetry.duckdb"), HERE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "whole\n", done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting needs root")
def test_a_full_file_system_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine does not let us mount")
    try:
        path = small / "telemetry.duckdb"
        store = Store.open(path)
        with pytest.raises(TelemetryError, match="free disk space"):
            fill(store, range(400), requests=400)
        full = store.last_window()
        assert store.query("select count(*) from requests").rows == [[400 * (full + 1)]]
        store.close()
        roomy = shutil.copytree(small, tmp_path / "roomy") / "telemetry.duckdb"
        with Store.open(roomy) as again:
            assert again.last_window() == full
            again.write_window(window_row(full + 1))
    finally:
        subprocess.run(["umount", str(small)], check=True)


QUIET = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from nursery import Nursery
from telemetry_rows import fill
from autopoiesis.telemetry.store import Store
store = Store.open(Path(sys.argv[1]))
fill(store, range(3))
asking = threading.Thread(target=lambda: [store.query("from windows") for _ in range(5)])
asking.start()
store.load_arms(), store.requests_between(0, 9e9)
asking.join()
store.close()
"""


def test_nothing_is_left_to_complain_at_exit(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET, str(path), HERE],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == [path]


def test_opening_a_file_that_is_up_to_date_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    Store.open(path).close()
    before = path.read_bytes()
    Store.open(path).close()
    assert path.read_bytes() == before


def test_a_file_of_version_2_learns_how_much_regret_there_has_been(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    with duckdb.connect(str(path)) as connection:
        for step in database.MIGRATIONS[:2]:
            connection.execute(database.package_sql(step))
        connection.execute("insert into meta values (2, '2.0.0', timestamp '2026-11-24 00:00:00')")
        connection.execute(
            "insert into windows by name select w as window_id, if(w = 1, null, 0.1) as regret, "
            "'' as drift, map{'a': 1.0} as objective, map{'a': 1.0} as context, w * 10.0 as started_s, "
            "w * 10.0 + 10 as ended_s, "
            + ", ".join(f"1 as {name}" for name in ("requests", "completed", "shed", "failed",
                                                    "goodput_rps", "throughput_tokens_s", "twin_weight"))
            + " from range(4) as r(w)"
        )  # fmt: skip
    with Store.open(path) as store:
        store.write_window(window_row(4))
        store.write_window(replace(window_row(5), regret=float("nan")))
        told = "select regret_so_far from regret_over_time order by window_id"
        sums = [row[0] for row in store.query(told).rows]
    assert sums == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.35, 0.35])
