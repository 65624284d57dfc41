"""Every query of docs/telemetry.md runs, and says what happened."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from telemetry_rows import START_S, allocation, fill, window_row

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow
from autopoiesis.telemetry.store import Store

DOCUMENT = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text()
QUERIES = re.findall(r"```sql\n(.*?)```", DOCUMENT, re.DOTALL)
BEFORE_METRICS = DOCUMENT.partition("\n## Metrics")[0]
TABLES = re.findall(r"^\| `(\w+)[`(]", BEFORE_METRICS, re.MULTILINE)


def arm(id: str, name: str, origin: Origin) -> Arm:  # noqa: A002
    return Arm(id, name, origin, State.LIVE, "source", START_S, reason="because")


def tell(store: Store) -> None:
    store.save_arm(arm("aaaa", "least requests", Origin.HUMAN))
    store.save_arm(arm("bbbb", "evolved", Origin.GENETIC))
    store.write_allocation(allocation(0))
    fill(store, range(10))
    candidate = CandidateRow("bbbb", "src", "promoted", "promoted", "better", 0.1, 0.0, 0.2)
    store.write_synthesis(
        SynthesisRow(START_S, 4, "regret", "genetic", 1, 1, 0, 0.0, candidates=(candidate,))
    )


@pytest.fixture
def told(store: Store) -> Store:
    tell(store)
    return store


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(tmp_path_factory.mktemp("shelf") / "telemetry.duckdb") as store:
        tell(store)
        yield store


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: q[:40])
def test_every_query_of_the_page_has_an_answer(shelf: Store, query: str) -> None:
    assert shelf.query(query).rows


def test_the_page_tells_of_every_table_and_view(told: Store) -> None:
    assert len(QUERIES) >= 10
    there = {row[0] for row in told.query("show tables").rows} | {"why"}
    assert set(TABLES) == there


def test_arm_scores(told: Store) -> None:
    rows = told.query(
        "select name, traffic_share, utility, posterior_mean, windows, requests, replica_seconds "
        "from arm_scores order by name"
    ).rows
    assert rows == [
        ["evolved", 0.25, pytest.approx(0.7), 0.7, 10, 200, 200.0],
        ["least requests", 0.75, pytest.approx(0.9), 0.86, 10, 200, 200.0],
    ]


def test_an_arm_that_never_served_is_there_with_no_share(told: Store) -> None:
    told.save_arm(arm("cccc", "new", Origin.GENETIC))
    query = "select traffic_share, utility, windows, requests from arm_scores where id = 'cccc'"
    assert told.query(query).rows == [[0, None, 0, 0]]


def test_time_to_traffic(told: Store) -> None:
    moved = SynthesisRow(
        START_S + 25.0, 2, "drift", "genetic", 4.0, 1, 0, 0.0, promoted=("bbbb",), since_window=1
    )
    told.write_synthesis(moved)
    rows = told.query(
        "select * exclude (trigger, synthesizer, promoted, shifted_at) from time_to_traffic"
    ).rows
    assert rows[0] == [0, None, 1.0, None, None, None]
    assert rows[1] == [1, 15.0, 4.0, 3, 1.0, 20.0]


def test_window_summary_has_one_row_per_window(told: Store) -> None:
    told.write_window(window_row(10))
    query = "select window_id, seconds, requests_rps from window_summary order by 1"
    assert told.query(query).rows == [[n, pytest.approx(10), pytest.approx(4)] for n in range(11)]


def test_scores_are_of_the_last_ten_thousand_windows(told: Store) -> None:
    told.write_window(window_row(10_005))
    query = "select windows, requests from arm_scores where id = 'aaaa'"
    assert told.query(query).rows == [[4, 80]]


def test_regret_adds_up_and_unknown_regret_adds_nothing(told: Store) -> None:
    told.write_window(replace(window_row(10), regret=None, regret_low=None, regret_high=None))
    rows = told.query("select regret_so_far from regret_over_time order by window_id").rows
    assert [row[0] for row in rows] == pytest.approx(
        [0.05 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10)]
    )


def test_the_newest_allocation_waits_for_its_reward(told: Store) -> None:
    query = (
        "select window_id, name, share, propensity, reward from allocation_history "
        "where window_id > 8 order by all"
    )
    assert told.query(query).rows == [
        [9, "evolved", 0.25, 0.3, pytest.approx(0.7)],
        [9, "least requests", 0.75, 0.7, 0.9],
        [10, "evolved", 0.25, 0.3, None],
        [10, "least requests", 0.75, 0.7, None],
    ]


def test_why_tells_what_the_window_before_said_of_each_arm(told: Store) -> None:
    told.write_allocation(Allocation(10, (Cell("bbbb", ("r-0",), tuple(range(64)), 0.25),)))
    result = told.query(
        "select name, share_before, share, reward, twin_utility, estimate, probability, events from why(10)"
    )
    assert result.rows == [
        ["evolved", 0.25, 1.0, pytest.approx(0.7), 0.81, None, 0.25, None],
        ["least requests", 0.75, 0.0, 0.9, 0.82, 0.88, 0.75, ["arm: promoted"]],
    ]
