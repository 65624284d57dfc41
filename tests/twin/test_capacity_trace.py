"""Capacity traces: what is read, what is refused, and what becomes of a fleet under them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopoiesis.twin.capacity import Action
from autopoiesis.twin.capacity_trace import (
    CapacityTrace,
    StartUp,
    fleet_course,
    is_capacity,
    read_capacity,
)
from autopoiesis.twin.trace import TraceError

TRACES = Path(__file__).parents[2] / "traces"


@pytest.mark.parametrize(
    ("name", "changes", "hours", "lowest", "mean", "highest", "lost", "largest"),
    [  # traces/README.md
        ("spot_aws_p3_v100", 162, 11.37, 10, 24.0, 32, 167, 6),
        ("spot_gcp_a100", 74, 27.02, 17, 57.3, 64, 154, 36),
    ],
)
def test_the_spot_traces_have_their_published_figures(
    name: str,
    changes: int,
    hours: float,
    lowest: int,
    mean: float,
    highest: int,
    lost: int,
    largest: int,
) -> None:
    found = read_capacity(TRACES / f"{name}.parquet").summary()
    assert found.changes == changes
    assert found.duration_s / 3600 == pytest.approx(hours, abs=0.01)
    assert (found.nodes_min, found.nodes_max) == (lowest, highest)
    assert found.nodes_mean == pytest.approx(mean, abs=0.05)
    assert (found.lost, found.largest_loss) == (lost, largest)


def test_csv_is_read_as_parquet_is(tmp_path: Path) -> None:
    for header in ("t_s,nodes", "time_s,zone,available_gpus", " nodes , t_s"):
        columns = [name.strip() for name in header.split(",")]
        rows = [("100", "a", "4"), ("100.5", "b", "2"), ("130", "c", "3")]
        of = {"t_s": 0, "time_s": 0, "zone": 1, "nodes": 2, "available_gpus": 2}
        lines = [",".join(row[of[name]] for name in columns) for row in rows]
        file = tmp_path / "c.csv"
        file.write_text("\n".join([header, *lines]) + "\n")
        trace = read_capacity(file)
        assert is_capacity(file)
        assert trace.at_s.tolist() == [0.0, 0.5, 30.0]
        assert trace.nodes.tolist() == [4, 2, 3]
        assert trace.name == "c"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no capacity trace"),
        (b"a,b\n1,2\n", "is no capacity trace"),
        (b"\x89PNG\xff\xfe", "cannot be read"),
        (b"PAR1 and then nothing", "cannot be read"),
        (b"t_s,nodes\n", "has no rows"),
        (b"t_s,nodes\n0,1\n5\n", "line 3: `nodes` is ''; it must be a number"),
        (b"t_s,nodes\nsoon,1\n", "line 2: `t_s` is 'soon'"),
        (b"t_s,nodes\n0,1\n\nnan,1\n", "line 4: `t_s` is nan"),
        (b"t_s,nodes\n-1,1\n", "line 2: `t_s` is -1"),
        (b"t_s,nodes\n0,1\n9,-3\n", "line 3: `nodes` is -3"),
        (b"t_s,nodes\n0,1.5\n", "line 2: `nodes` is 1.5; it must be a whole number"),
        (b"t_s,nodes\n5,1\n4,1\n", "line 3: `t_s` is earlier"),
        (b"t_s,nodes\n0,0\n9,0\n", "`nodes` is 0 in every row"),
        (b"t_s,nodes\n0,1\n1,\xff\n", "cannot be read"),
    ],
)
def test_a_broken_capacity_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "broken"
    file.write_bytes(content)
    with pytest.raises(TraceError) as error:
        read_capacity(file)
    assert says in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_a_broken_capacity_parquet_is_named(tmp_path: Path) -> None:
    def says(**columns: object) -> str:
        file = tmp_path / "t.parquet"
        pq.write_table(pa.table(columns), file)
        with pytest.raises(TraceError) as error:
            read_capacity(file)
        return str(error.value)

    assert "is no capacity trace" in says(arrival_s=[1.0])
    assert "has no rows" in says(t_s=pa.array([], pa.float64()), nodes=pa.array([], pa.int32()))
    assert "row 2: `nodes` is nan" in says(t_s=[0.0, 1.0], nodes=[1, None])
    assert "row 2: `t_s` is earlier" in says(t_s=[1.0, 0.0], nodes=[1, 2])
    with pytest.raises(TraceError, match="there is no such file"):
        read_capacity(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="cannot be read"):
        read_capacity(tmp_path)


def test_requests_are_no_capacity() -> None:
    assert is_capacity(TRACES / "spot_gcp_a100.parquet")
    assert not is_capacity(TRACES / "azure2023_code_a.parquet")
    assert not is_capacity(TRACES / "none.parquet")
    with pytest.raises(TraceError, match="is no capacity trace"):
        read_capacity(TRACES / "azure2023_code_a.parquet")


def test_the_fleet_stands_for_the_most_machines() -> None:
    trace = CapacityTrace(np.arange(4.0), np.array([64, 53, 17, 0]), "t")
    assert trace.replicas(8).tolist() == [8, 7, 2, 1]
    assert trace.replicas(8, at_least=0).tolist() == [8, 7, 2, 0]
    assert trace.replicas(8, at_least=3).tolist() == [8, 7, 3, 3]
    assert trace.speed(4.0).at_s.tolist() == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match="at_least must be 0 to the fleet's 8 replicas, got 9"):
        trace.replicas(8, at_least=9)
    with pytest.raises(ValueError, match="speed"):
        trace.speed(0.0)


@st.composite
def capacities(draw: st.DrawFn) -> CapacityTrace:
    gaps = draw(st.lists(st.floats(0, 100), min_size=0, max_size=12))
    nodes = draw(st.lists(st.integers(0, 40), min_size=len(gaps) + 1, max_size=len(gaps) + 1))
    return CapacityTrace(np.cumsum([0.0, *gaps]), np.array([max(nodes[0], 1), *nodes[1:]]), "t")


@settings(max_examples=150, deadline=None)
@given(capacities(), st.integers(1, 20), st.integers(0, 2**32), st.floats(0, 60), st.integers(0, 3))
def test_a_fleet_follows_its_capacity(
    trace: CapacityTrace, fleet: int, seed: int, notice_s: float, at_least: int
) -> None:
    at_least = min(at_least, fleet)
    course = fleet_course(trace, fleet, seed, at_least=at_least, notice_s=notice_s)
    assert course == fleet_course(trace, fleet, seed, at_least=at_least, notice_s=notice_s)
    assert [c.at_s for c in course.changes] == sorted(c.at_s for c in course.changes)
    wanted = trace.replicas(fleet, at_least)
    there = set(course.present)
    assert len(there) == wanted[0]
    since = dict.fromkeys(there, 0.0)
    told: dict[int, float] = {}
    seen: dict[float, int] = {}
    for change in course.changes:
        r, at_s = change.replica, change.at_s
        if change.action is Action.START:
            assert r not in there
            there.add(r)
            since[r] = at_s
        elif change.action is Action.DRAIN:
            assert notice_s > 0.0
            assert r in there
            told[r] = at_s
        else:
            assert change.action is Action.LOSE
            there.remove(r)
            if notice_s > 0.0:
                assert told.pop(r) == max(at_s - notice_s, since[r])
        seen[at_s] = len(there)
        assert len(there) <= fleet
    assert not told
    ends = np.append(np.flatnonzero(np.diff(trace.at_s) > 0), len(wanted) - 1)
    for i in ends.tolist():
        upto = [n for at_s, n in seen.items() if at_s <= trace.at_s[i]]
        assert (upto[-1] if upto else len(course.present)) == wanted[i]


def test_start_ups_are_as_their_distribution_says() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([StartUp().draw(rng) for _ in range(4000)])
    assert np.percentile(drawn, [5, 50, 95]) == pytest.approx([31, 60, 116], rel=0.06)
    assert StartUp(42.0, 0.0).draw(rng) == 42.0
    trace = read_capacity(TRACES / "spot_aws_p3_v100.parquet")
    starts = [
        c.duration_s
        for c in fleet_course(trace, 16, 0, start_up=StartUp(20.0, 0.0)).changes
        if c.action is Action.START
    ]
    assert starts
    assert set(starts) == {20.0}


def test_another_seed_takes_other_replicas() -> None:
    trace = read_capacity(TRACES / "spot_gcp_a100.parquet")
    assert fleet_course(trace, 16, 0) != fleet_course(trace, 16, 1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"notice_s": -1.0}, "notice"),
        ({"notice_s": np.inf}, "notice"),
        ({"start_up": StartUp(-1.0)}, "start-up"),
        ({"start_up": StartUp(1.0, -1.0)}, "spread"),
        ({"at_least": 9}, "at_least"),
    ],
)
def test_a_course_that_cannot_be_is_refused(wrong: dict[str, object], says: str) -> None:
    trace = CapacityTrace(np.arange(2.0), np.array([2, 1]), "t")
    with pytest.raises(ValueError, match=says):
        fleet_course(trace, 8, 0, **wrong)
