"""The archive keeps what is good and different, within bounds, and survives whatever happens to its file."""

from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthesis_scenes import BY_SPEED, ROUND_ROBIN, Scripted, idle_brief, uneven_brief

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.synthesis import archive as a
from autopoiesis.synthesis.archive import Archive, Elite, centre_of, from_archive
from autopoiesis.synthesis.behaviour import Behaviour, behaviour_of
from autopoiesis.synthesis.complement import by_complement, value_of_set
from autopoiesis.synthesis.cycle import answer_to
from autopoiesis.synthesis.genetic import GeneticProposer
from autopoiesis.synthesis.launch import row_from_json
from autopoiesis.synthesis.step import step
from autopoiesis.twin.simulation import run_arm


def policy(k: int):
    return verify(f"def score(request, replica, fleet):\n    return {k + 1}.0 * replica.running\n")


def elite(k: int, gains=(0.1,), behaviour=None, raced_s: float = 0.0) -> Elite:
    made = policy(k)
    return Elite(made.id, made.source, tuple(gains), behaviour or Behaviour(0, 0, 0, 0), raced_s)


tables = st.integers(1, 6).flatmap(
    lambda n: st.integers(1, 5).flatmap(
        lambda w: st.lists(
            st.lists(st.floats(-1.0, 1.0), min_size=w, max_size=w), min_size=n, max_size=n
        )
    )
)


@given(tables)
@settings(max_examples=80, deadline=None)
def test_the_greedy_set_is_within_its_bound_of_the_best_and_values_only_rise(rows):
    table = np.array(rows)
    base = np.zeros(table.shape[1])
    order = by_complement(table, base)
    assert sorted(order) == list(range(len(table)))
    values = [value_of_set(table, order[:k], base) for k in range(len(order) + 1)]
    assert values == sorted(values)
    pairs = [value_of_set(table, [i, j], base) for i in order for j in order]
    assert values[min(2, len(order))] >= (1.0 - 1.0 / np.e) * max(pairs) - 1e-12


def test_a_specialist_comes_before_a_copy_of_the_best():
    table = np.array([[0.5, 0.5, 0.0], [0.5, 0.49, 0.0], [0.0, 0.0, 0.1], [np.nan, np.nan, np.nan]])
    assert by_complement(table, np.zeros(3)) == [0, 2, 1, 3]


def test_behaviour_is_what_policies_do():
    brief = uneven_brief()
    trace = brief.windows[0]

    def measured(source: str) -> Behaviour:
        program = compile_policy(verify(source))
        outcome = run_arm(trace, brief.replicas, program, brief.objective, 0)
        return behaviour_of(outcome, brief.objective, len(brief.replicas))

    spread = measured(ROUND_ROBIN)
    assert spread.concentration == pytest.approx(0.0, abs=0.01)
    assert (spread.shed, spread.hold) == (0.0, pytest.approx(0.0, abs=1e-6))
    one = measured("def score(request, replica, fleet):\n    return replica.position\n")
    assert one.concentration == 1.0
    assert one.cell() != spread.cell()
    shy = measured(ROUND_ROBIN + "def admit(request, fleet):\n    return fleet.draw - 0.5\n")
    assert 0.3 < shy.shed < 0.7
    held = measured(ROUND_ROBIN + "def ceiling(request, replica, fleet):\n    return 1.0\n")
    assert held.hold > 0.5


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.floats(-0.5, 0.5), st.floats(0, 1)), max_size=30),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None)
def test_islands_stay_bounded_with_one_policy_per_cell(cycles):
    regime = a.Regime((0.0,) * 5)
    for at_s, bred in enumerate(cycles):
        regime.take_in(
            [elite(k, (g,), Behaviour(b, 1 - b, b / 5, b), at_s) for k, g, b in bred], (), at_s
        )
        for island in regime.islands:
            assert len(island) <= a.ELITES
            assert len({e.cell for e in island}) == len(island)
            assert len({e.id for e in island}) == len(island)
    starters = regime.starters()
    assert [e.gain for e in starters] == sorted((e.gain for e in starters), reverse=True)
    assert len({e.id for e in starters}) == len(starters)


def test_the_better_of_a_cell_stays_and_what_failed_goes():
    regime = a.Regime((0.0,) * 5)
    regime.take_in([elite(0, (0.1,)), elite(1, (0.2,))], (), 1.0)
    assert [e.id for e in regime.islands[0]] == [policy(1).id]
    regime.cycles = 0
    regime.take_in([elite(2, (0.15,))], {policy(1).id}, 2.0)
    assert [e.id for e in regime.islands[0]] == [policy(2).id]


def test_an_island_starts_alone_but_for_visitors_now_and_then():
    regime = a.Regime((0.0,) * 5)
    for k in range(a.ISLANDS):
        regime.take_in([elite(k, (0.1 * k,))], (), 1.0)
    alone = regime.starters()
    assert [e.id for e in alone] == [policy(0).id]
    regime.cycles += a.MIGRATION - 1
    visited = regime.starters()
    assert {e.id for e in visited} == {policy(k).id for k in range(a.ISLANDS)}


def test_regimes_are_told_apart_and_the_oldest_is_given_up():
    busy, idle = uneven_brief(), idle_brief()
    archive = Archive()
    archive.enter(busy, [elite(1)])
    assert archive.nearest(idle) is None
    archive.enter(replace(idle, asked_s=5.0), [elite(2)])
    assert [e.id for e in archive.nearest(busy).islands[0]] == [policy(1).id]
    assert [e.id for e in archive.nearest(idle).islands[0]] == [policy(2).id]
    again = replace(busy, windows=busy.windows[1:])
    assert archive.nearest(again) is archive.nearest(busy)
    for k in range(a.REGIMES):
        archive.regimes.append(a.Regime((100.0 + 2 * k,) * 5, used_s=10.0 + k))
    archive.enter(replace(idle, asked_s=99.0), [])
    assert len(archive.regimes) == a.REGIMES
    assert archive.nearest(busy) is None
    assert archive.nearest(idle) is not None


def test_what_is_written_is_read_again_and_nothing_else_lies_there(tmp_path):
    path = tmp_path / "synthesis" / "archive.json"
    archive = Archive()
    archive.enter(
        uneven_brief(), [elite(k, (0.1, k / 10), Behaviour(k / 5, 0, 0, 0)) for k in range(5)]
    )
    archive.save(path)
    again = Archive.open(path)
    assert (again.remark, again.regimes) == ("", archive.regimes)
    assert [p.name for p in path.parent.iterdir()] == ["archive.json"]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_broken_file_is_set_aside_and_told_and_the_archive_starts_anew(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("archive") / "archive.json"
    archive = Archive()
    archive.enter(uneven_brief(), [elite(1)])
    archive.save(path)
    whole = path.read_bytes()
    plain = orjson.loads(whole)
    regime = plain["regimes"][0]
    broken = data.draw(
        st.sampled_from(
            [
                whole[: len(whole) // 2],
                b"",
                b"\xff\x00",
                b"[]",
                b"null",
                orjson.dumps({**plain, "version": 99}),
                orjson.dumps({**plain, "regimes": [{**regime, "islands": [[]]}]}),
                orjson.dumps({**plain, "regimes": [{**regime, "centre": [1.0]}]}),
                orjson.dumps(
                    {
                        **plain,
                        "regimes": [{**regime, "islands": [[{"source": "import os"}], [], []]}],
                    }
                ),
            ]
        )
        | st.binary(max_size=30)
    )
    path.write_bytes(broken)
    again = Archive.open(path)
    assert again.regimes == []
    assert again.remark.startswith(f"The archive {path} cannot be read")
    assert again.remark.count("\n") == 0
    assert path.with_name("archive.json.broken").read_bytes() == broken
    again.enter(uneven_brief(), [elite(2)])
    again.save(path)
    assert Archive.open(path).remark == ""


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    archive = Archive()
    archive.save(tmp_path / "file" / "archive.json")
    assert "cannot be written" in archive.remark


def test_a_second_cycle_starts_from_what_the_first_one_bred(tmp_path):
    path = tmp_path / "archive.json"
    brief, remark = from_archive(replace(uneven_brief(), max_candidates=24), path)
    assert (remark, brief.archived) == ("", ())
    first = row_from_json(answer_to(brief.to_bytes()))
    assert first.promoted
    regime = Archive.open(path).nearest(brief)
    assert regime.cycles == 1
    assert any(e.gain > 0.0 for e in regime.islands[0])
    assert all(len(e.gains) == len(brief.windows) for e in regime.islands[0])
    for _ in range(a.ISLANDS - 1):  # the other islands have bred nothing yet
        archive = Archive.open(path)
        archive.enter(brief, [])
        archive.save(path)
    brief, _ = from_archive(brief, path)
    best = regime.starters()[0]
    assert brief.archived[0] == best.source
    again = step(replace(brief, max_candidates=len(brief.archived)), Scripted())
    assert {c.arm_id for c in again.candidates if c.gate not in {"tuned", "tuning"}} <= {
        verify(s).id for s in brief.archived
    }
    assert again.promoted


def test_an_archived_policy_that_is_worse_now_is_given_up():
    worse = verify("def score(request, replica, fleet):\n    return replica.speed\n")
    archive = Archive()
    brief = replace(uneven_brief(), max_candidates=2, archived=(worse.source,))
    archive.enter(brief, [Elite(worse.id, worse.source, (0.1,), Behaviour(1, 0, 0, 0), 0.0)])
    archive.regimes[0].cycles = 0
    step(brief, Scripted([BY_SPEED]), archive=archive)
    assert [e.id for e in archive.regimes[0].islands[0]] == [verify(BY_SPEED).id]


def test_the_centre_moves_by_one_when_traffic_doubles():
    brief = uneven_brief()
    twice = replace(
        brief, windows=tuple(replace(w, input_tokens=2 * w.input_tokens) for w in brief.windows)
    )
    difference = np.subtract(centre_of(twice), centre_of(brief))
    assert difference == pytest.approx([0.0, 1.0, 0.0, 0.0, 0.0])


def test_a_genetic_cycle_with_an_archive_repeats_bit_for_bit():
    brief = replace(uneven_brief(), max_candidates=24, archived=(verify(BY_SPEED).source,))
    rows = [step(brief, GeneticProposer(), clock=lambda: 0.0) for _ in range(2)]
    assert rows[0].candidates == rows[1].candidates
    assert rows[0].candidates[0].thought or rows[0].candidates[0].parents
