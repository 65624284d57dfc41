"""The command from end to end on two contestants, and that it goes on where it was stopped."""

from dataclasses import replace

import orjson
import pyarrow.parquet as pq
import pytest
from evaluation_scenes import CALM, SHIFT, tiny_suite
from typer.testing import CliRunner

from autopoiesis.cli import app
from autopoiesis.evaluation import bench, suites
from autopoiesis.evaluation.bench import BenchError, run_bench
from autopoiesis.evaluation.contestants import ORACLE, OURS
from autopoiesis.evaluation.parts import FOLDER, key_of
from autopoiesis.evaluation.runner import UnitFailed, run_units

CONTESTANTS = ("human/least-requests", "human/least-tokens", OURS, ORACLE)


@pytest.fixture(scope="module")
def done(traces, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "tiny", lambda _quick: tiny_suite(CONTESTANTS, (SHIFT, CALM)))
        summary = run_bench("tiny", out, jobs=1, traces=traces, quiet=True)
        before = {path.name: path.stat().st_mtime_ns for path in (out / FOLDER).iterdir()}
        again = run_bench("tiny", out, jobs=1, traces=traces, quiet=True)
        after = {path.name: path.stat().st_mtime_ns for path in (out / FOLDER).iterdir()}
    return out, summary, again, before, after


def test_the_summary_is_written_and_says_what_was_compared(done):
    out, summary, *_ = done
    told = orjson.loads((out / "summary.json").read_bytes())
    assert told["suite"] == "tiny"
    assert {"mean_gain", "gain_low", "gain_high", "against", "scenarios", "machine"} <= set(told)
    assert [s["name"] for s in told["scenarios"]] == ["short to long", "calm"]
    assert set(told["scenarios"][0]["miss_share"]) == set(CONTESTANTS)
    assert summary["seeds"] == told["seeds"] == 2


def test_no_contestant_serves_other_requests_than_the_others(done):
    out, *_ = done
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert len(rows) == 2 * len(CONTESTANTS) * 2
    for scenario, seed in {(r["scenario"], r["seed"]) for r in rows}:
        same = [r for r in rows if (r["scenario"], r["seed"]) == (scenario, seed)]
        assert len({r["requests"] for r in same}) == 1
        for row in same:
            assert row["completed"] + row["shed"] + row["failed"] == row["requests"]
            assert 0.0 <= row["miss_share"] <= 1.0
    windows = pq.read_table(out / "windows.parquet").to_pylist()
    assert sum(w["requests"] for w in windows) == sum(r["requests"] for r in rows)


def test_the_oracle_is_no_worse_than_the_arms_it_is_made_of(done):
    rows = pq.read_table(done[0] / "results.parquet").to_pylist()
    best = {}
    for row in rows:
        if row["contestant"] != OURS:
            key = (row["scenario"], row["seed"], row["contestant"] == ORACLE)
            best[key] = max(best.get(key, 0.0), row["utility"])
    for scenario, seed, is_oracle in best:
        if is_oracle:
            assert best[scenario, seed, True] >= best[scenario, seed, False] - 1e-9


def test_a_second_run_does_no_work_and_says_the_same(done):
    _, summary, again, before, after = done
    assert before == after
    assert len(before) == 2 * len(CONTESTANTS) * 2
    assert orjson.dumps(again) == orjson.dumps(summary)  # NaN is not equal to itself


def test_reports_have_the_plots_and_every_scenario(done):
    out, *_ = done
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for words in (page, text):
        assert "short to long" in words
        assert "least-tokens" in words
    assert page.count("<svg") == len(list((out / "plots").glob("*.svg"))) == 4


def test_a_result_is_filed_under_what_it_depends_on(traces):
    unit = tiny_suite(CONTESTANTS).units(traces)[0]
    other = replace(unit, scenario=replace(unit.scenario, slo_ttft_s=2.0))
    assert key_of(unit.depends_on()) == key_of(replace(unit, traces="elsewhere").depends_on())
    assert key_of(unit.depends_on()) != key_of(other.depends_on())
    assert key_of(unit.depends_on()) != key_of(replace(unit, seed=1).depends_on())


def test_what_fails_is_named_and_the_rest_is_kept(traces, tmp_path, monkeypatch):
    broken = replace(SHIFT, name="broken", judged=(replace(SHIFT.judged[0], seconds=9999.0),))
    suite = tiny_suite(CONTESTANTS[:1], (broken, CALM), seeds=1)
    monkeypatch.setitem(bench.SUITES, "tiny", lambda _quick: suite)
    with pytest.raises(UnitFailed, match=r"1 of 2 units failed.*broken"):
        run_bench("tiny", tmp_path, jobs=1, traces=traces, quiet=True)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert not (tmp_path / "summary.json").exists()


def test_a_run_that_was_stopped_goes_on_where_it_was(traces, tmp_path):
    units = tiny_suite(CONTESTANTS[:2], (CALM,)).units(traces)

    def stop(_what, done, _total):
        if done == 2:
            raise KeyboardInterrupt

    def files():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).iterdir()}

    with pytest.raises(KeyboardInterrupt):
        run_units(units, tmp_path, 1, stop)
    kept, told = files(), []
    parts = run_units(units, tmp_path, 1, lambda *what: told.append(what))
    assert len(kept) == 2
    assert kept.items() <= files().items()
    assert [done for _, done, _ in told] == [2, 3, 4]
    whole = run_units(units, tmp_path / "whole", 1, lambda *_: None)
    assert [part.row for part in parts] == [part.row for part in whole]


def test_units_run_in_processes_of_their_own(traces, tmp_path, monkeypatch):
    suite = tiny_suite((CONTESTANTS[0], OURS), (CALM,), seeds=1)
    monkeypatch.setitem(bench.SUITES, "tiny", lambda _quick: suite)
    with pytest.raises(BenchError, match="no suite 'nothing'"):
        run_bench("nothing", tmp_path)
    rows = run_bench("tiny", tmp_path / "out", jobs=2, traces=traces, quiet=True)
    assert rows["scenarios"][0]["name"] == "calm"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "There is no suite 'nothing'"),
        (["dynamics", "--quick", "--scenario", "nowhere"], "No scenario is called nowhere"),
        (["dynamics", "--quick", "--without", "nobody"], "No contestant is called nobody"),
        (["dynamics", "--quick", "--without", "evolved"], "have to take part"),
        (["paper", "--quick", "--without", "human/"], "have to take part"),
        (["dynamics", "--quick", "--traces", "/nonexistent"], "There is no folder of traces"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments, said, tmp_path):
    found = CliRunner().invoke(app, ["bench", *arguments, "--out", str(tmp_path / "out")])
    assert found.exit_code == 2
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_contestants_can_be_left_out(traces, tmp_path, monkeypatch):
    monkeypatch.setitem(
        suites.SUITES, "tiny", lambda _quick: tiny_suite(CONTESTANTS, (CALM,), seeds=1)
    )
    command = ["bench", "tiny", "--without", "least-tokens", "--without", ORACLE, "--jobs", "1"]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, [*command, "--quiet", "--traces", str(traces), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert {row["contestant"] for row in rows} == {"human/least-requests", OURS}
    told = orjson.loads((out / "summary.json").read_bytes())
    assert told["command"].endswith(f'--without "least-tokens" --without "{ORACLE}"')


def test_other_seeds_than_those_built_with_can_be_run(traces, tmp_path, monkeypatch):
    monkeypatch.setitem(
        suites.SUITES, "tiny", lambda _quick: tiny_suite((CONTESTANTS[0], OURS), (CALM,), seeds=1)
    )
    command = ["bench", "tiny", "--seeds", "2", "--first-seed", "10", "--jobs", "1", "--quiet"]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*command, "--traces", str(traces), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert sorted({row["seed"] for row in rows}) == [10, 11]
    told = orjson.loads((out / "summary.json").read_bytes())
    assert told["command"].endswith("--seeds 2 --first-seed 10")
