import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from telemetry_rows import fill

from autopoiesis.telemetry.query import (
    QueryError,
    QueryResult,
    format_result,
    query_file,
)
from autopoiesis.telemetry.store import Store, TelemetryError

HOSTILE = [
    # what would change tables
    "delete from windows",
    "update arms set state = 'live'",
    "insert into events values ('x', 0, 's', 'm', 0)",
    "drop table windows",
    "alter table windows add column x int",
    "truncate windows",
    "create table t as select 1",
    "create temp table t as select 1",
    "create view v as select 1",
    "create or replace macro f(x) as x",
    "create sequence s",
    "merge into arms using arms as b on arms.id = b.id when matched then delete",
    "with gone as (delete from windows returning *) select * from gone",
    "with new as (insert into arms select * from arms returning *) select * from new",
    "select * from (with gone as (delete from cells returning *) select count(*) from gone)",
    "with x as (update arms set pinned = true returning *) from x",
    "explain analyze delete from windows",
    "explain delete from windows",
    "explain analyze with gone as (delete from windows returning *) select * from gone",
    # what would end the read-only transaction
    "commit",
    "rollback",
    "begin transaction",
    "commit; delete from windows",
    "select 1; delete from windows",
    "rollback; begin; delete from windows; commit",
    # what would touch files or the network
    "copy windows to '{out}'",
    "copy (select 1) to '{out}' (format parquet)",
    "export database '{out}'",
    "import database '{out}'",
    "attach '{out}' as other",
    "attach 'http://localhost:9/x.duckdb'",
    "detach telemetry",
    "use memory",
    "install httpfs",
    "load httpfs",
    "select * from read_csv('/etc/passwd')",
    "from '/etc/passwd'",
    "from 'file:///etc/passwd'",
    "from '/etc/hosts.csv'",
    "select * from read_text('/etc/passwd')",
    "select * from read_blob('/etc/passwd')",
    "select * from read_parquet('/tmp/*.parquet')",
    "select * from read_json('/etc/passwd')",
    "select * from read_duckdb('{file}')",
    "select * from sniff_csv('/etc/passwd')",
    "select * from parquet_metadata('/tmp/x.parquet')",
    "select * from glob('/etc/*')",
    "select * from duckdb_secrets()",
    "create secret s (type s3)",
    # what would change or drive the engine
    "set memory_limit = '10GB'",
    "set threads = 64",
    "set variable x = 1",
    "set enable_external_access = true",
    "reset lock_configuration",
    "pragma memory_limit = '10GB'",
    "pragma enable_profiling",
    "pragma database_list",
    "call pragma_version()",
    "checkpoint",
    "force checkpoint",
    "vacuum",
    "analyze",
    "select * from checkpoint()",
    "select * from CHECKPOINT()",
    "select * from \"checkpoint\"()",
    "explain analyze select * from checkpoint()",
    "select * from (select 1) where exists (from force_checkpoint())",
    "select write_log('x')",
    "select setseed(0.5)",
    "select sleep_ms(100000)",
    "select * from truncate_duckdb_logs()",
    "select * from enable_logging('QueryLog', storage = 'file', storage_config = {{'path': '{out}'}})",
    "select * from query('select * from checkpoint()')",
    "select * from query_table('windows')",
    "select * from json_execute_serialized_sql(json_serialize_sql('select 1'))",
    "prepare p as delete from windows",
    "execute p",
    "deallocate p",
    # what would reach into the process
    "select * from hostile_local",
    "select getenv('HOME')",
    "select * from arrow_scan(1, 2, 3)",
    "select * from python_map_function(1)",
    # what is no query
    "",
    ";",
    "-- nothing",
    "selec 1",
    "select \0 1",
    "select ?",
    "select $x",
    "select '\ud800'",
    "select " + "(" * 5000 + "1" + ")" * 5000,
    "select 1 " + "union all select 1 " * 20_000,
    "select * from windows where",
    "select nothing from windows",
    "select error('x')",
    "select 1::int + 'x'::int",
    "pivot windows on drift using count(*)",
]  # fmt: skip
"""Statements that must change, read and write nothing, whatever they answer."""


def digest(store: Store) -> list[object]:
    """Return all that is in the file: objects, and per table its number of rows and a hash of all."""
    objects = "select type, name, sql from sqlite_master order by all"
    tables = [row[0] for row in store._owner.fetch("select table_name from duckdb_tables()")]
    contents = " union all ".join(
        f"select '{t}', count(*), sum(hash(x)) from {t} x" for t in tables
    )
    return store._owner.fetch(objects) + store._owner.fetch(contents)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("live") / "telemetry.duckdb") as store:
        fill(store, range(3))
        yield store


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, list[object]]]:
    """A store that only hostile statements are put to, and what was in it before them."""
    with Store.open(tmp_path_factory.mktemp("untouched") / "telemetry.duckdb") as store:
        fill(store, range(3))
        yield store, digest(store)


@pytest.mark.parametrize(
    "statement", HOSTILE, ids=lambda s: s[:50].encode("ascii", "replace").decode()
)
def test_hostile_statements_get_one_sentence_and_change_nothing(
    untouched: tuple[Store, list[object]], tmp_path: Path, statement: str
) -> None:
    live, before = untouched
    hostile_local = [1, 2, 3]
    sql = statement
    if "{out}" in sql or "{file}" in sql:
        sql = sql.format(out=tmp_path / "out", file=live.path)
    beside = sorted(live.path.parent.iterdir())
    with pytest.raises(QueryError) as refused:
        live.query(sql, timeout_s=5)
    message = str(refused.value)
    assert message
    assert "\n" not in message
    assert len(message) < 400
    assert digest(live) == before
    assert list(tmp_path.iterdir()) == []
    assert sorted(live.path.parent.iterdir()) == beside
    assert hostile_local == [1, 2, 3]


def test_the_store_is_written_as_before_after_all_that(
    untouched: tuple[Store, list[object]],
) -> None:
    store, before = untouched
    fill(store, [store.last_window() + 1], requests=2)
    assert digest(store) != before


def test_hostile_statements_leave_a_stopped_file_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.duckdb"
    with Store.open(path) as store:
        fill(store, range(3))
    before = path.read_bytes()
    for statement in HOSTILE[:60:4]:
        sql = statement.replace("{out}", str(tmp_path / "out")).replace("{file}", str(path))
        with pytest.raises(QueryError):
            query_file(path, sql)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "endless",
    [
        "select count(*) from range(1000000) a, range(1000000) b where a.range % 7 = b.range % 11",
        "with recursive r as (select 1 as n union all select n + 1 from r) select count(*) from r",
        "explain analyze select count(*) from range(1000000) a, range(1000000) b where a.range > b.range",
    ],
)
def test_an_endless_query_is_stopped(live: Store, endless: str) -> None:
    started = time.monotonic()
    with pytest.raises(QueryError, match=r"took longer than 0.3 s|more memory"):
        live.query(endless, timeout_s=0.3)
    assert time.monotonic() - started < 4
    assert live.query("select 1").rows == [[1]]


def test_more_rows_than_asked_for_are_cut_and_said_so(live: Store) -> None:
    huge = "select * from range(1000000000)"
    result = live.query(huge, max_rows=10)
    assert result.rows == [[i] for i in range(10)]
    assert result.truncated
    assert not live.query("select * from range(10)", max_rows=10).truncated


@pytest.mark.parametrize(
    "large",
    [
        "select list(range) from range(1000001)",
        "select repeat('x', 1000001)",
        "select * from range(1000000000) order by hash(range)",
    ],
)
def test_a_result_too_large_to_hold_is_refused(live: Store, large: str) -> None:
    with pytest.raises(QueryError, match=r"too large|more memory|took longer"):
        live.query(large, timeout_s=1)


@pytest.mark.parametrize(
    "harmless",
    [
        "select count(*) from windows",
        "from windows",
        "table windows",
        "values (1)",
        "show tables",
        "describe windows",
        "summarize cells",
        "explain select * from windows",
        "EXPLAIN ANALYZE select * from windows",
        "with w as (from windows) select max(regret) from w;",
        "select 'delete from windows; checkpoint()' as text",
        "select context['arrival_rate_rps'] from windows",
        "select unnest(blocks) from requests",
        "select count(*) from requests where arrived_at < now() + interval 100 year",
    ],
)
def test_questions_are_answered_live_and_from_a_stopped_file(tmp_path: Path, harmless: str) -> None:
    with Store.open(tmp_path / "t.duckdb") as store:
        fill(store, range(2))
        answer = store.query(harmless)
    assert answer.rows
    if "ANALYZE" not in harmless:
        assert query_file(store.path, harmless).rows == answer.rows


def test_a_stopped_file_that_is_not_there_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match="no telemetry"):
        query_file(tmp_path / "none.duckdb", "select 1")
    assert list(tmp_path.iterdir()) == []


def test_queries_run_beside_each_other_and_beside_writes(live: Store) -> None:
    failures: list[Exception] = []

    def ask() -> None:
        try:
            for _ in range(15):
                live.query(
                    "select count(*), avg(cells.utility) from cells join windows using (window_id)"
                )
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    fill(live, range(live.last_window() + 1, live.last_window() + 10), requests=50)
    for thread in threads:
        thread.join()
    assert failures == []


EVERYTHING = """
select 1 as number, 1.5 as real, 'nan'::double as nan, '-inf'::double as infinite, null as nothing,
    timestamp '2026-11-24 10:00:00.5' as time, date '2026-11-24' as day, [1, null, 3] as list,
    map {'a': 1.0::double, 'b': 'inf'::double} as map, {'x': 1, 'y': 'z'} as struct, true as truth,
    '\\xAA'::blob as bytes, 170141183460469231731687303715884105727::hugeint as huge,
    1.25::decimal(9, 2) as money, 'a,"b"
c' as text, 2 as number
"""  # fmt: skip


def test_every_kind_of_value_has_a_json_form(live: Store) -> None:
    result = live.query(EVERYTHING)
    (row,) = json.loads(format_result(result, "json"))  # type: ignore[arg-type]
    assert row == {
        "number": 1,
        "real": 1.5,
        "nan": None,
        "infinite": None,
        "nothing": None,
        "time": "2026-11-24T10:00:00.500000",
        "day": "2026-11-24",
        "list": [1, None, 3],
        "map": {"a": 1.0, "b": None},
        "struct": {"x": 1, "y": "z"},
        "truth": True,
        "bytes": "aa",
        "huge": 1.7014118346046923e38,
        "money": 1.25,
        "text": 'a,"b"\nc',
        "number:1": 2,
    }
    assert result.types[:4] == ("INTEGER", "DECIMAL(2,1)", "DOUBLE", "DOUBLE")


def test_csv_has_a_header_and_quotes_what_needs_it(live: Store) -> None:
    import csv

    text = format_result(live.query(EVERYTHING), "csv")
    assert isinstance(text, str)
    header, row = csv.reader(io.StringIO(text))
    named = dict(zip(header, row, strict=True))
    assert named["text"] == 'a,"b"\nc'
    assert (named["nan"], named["nothing"]) == ("", "")
    assert json.loads(named["list"]) == [1, None, 3]


@pytest.fixture
def printed() -> Callable[[QueryResult, int], str]:
    def render(result: QueryResult, width: int) -> str:
        console = Console(width=width, file=io.StringIO(), legacy_windows=False)
        console.print(format_result(result, "table"))
        return console.file.getvalue()  # type: ignore[attr-defined]

    return render


def test_a_wide_table_shows_every_column_of_a_narrow_console(
    live: Store, printed: Callable[[QueryResult, int], str]
) -> None:
    result = live.query("select * from windows limit 2")
    text = printed(result, 80)
    for shown in (*result.columns, "arrival_rate_rps=3.5", "0.05", "2026-09-21T14:13:20.123457"):
        assert shown in text, shown
    across = printed(live.query("select window_id, regret from windows limit 2"), 80)
    assert len(across.splitlines()) == 6
    assert "There are more than these 2 rows" in printed(
        live.query("from windows", max_rows=2), 200
    )


def test_text_is_never_taken_for_markup(
    live: Store, printed: Callable[[QueryResult, int], str]
) -> None:
    assert "[red]x[/red]" in printed(live.query("select '[red]x[/red]' as \"[bold]\""), 80)


def test_another_format_is_refused(live: Store) -> None:
    with pytest.raises(ValueError, match="use table, json or csv"):
        format_result(live.query("select 1"), "xml")
