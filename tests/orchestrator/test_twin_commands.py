"""`twin calibrate`, `twin validate` and `traces export` on a real telemetry file."""

import json

import numpy as np
import pytest
from recordings import H100, SLOWER, hidden, loads, record
from typer.testing import CliRunner

from autopoiesis.cli import app
from autopoiesis.orchestrator import refit
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.twin_commands import Engine
from autopoiesis.telemetry.records import RequestRecord, Status, WindowRow
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.calibration import CalibrationError
from autopoiesis.twin.trace import read_trace

run = CliRunner().invoke


def records(seed=1):
    """Return requests as the gateway would have recorded them before a slower H100."""
    r = record(hidden(SLOWER), loads([2.0, 6.0, 4.0], 40.0, seed), seed)
    trace = r.trace
    return [
        RequestRecord(
            id=str(i), arrived_s=1e9 + float(trace.arrival_s[i]) - 0.1, path="/v1/chat/completions",
            model="m", status=Status.COMPLETED, http_status=200, arm_id="a", window=int(i // 200), shard=0,
            session=0, replica="replica-0", attempts=1, stream=True,
            input_tokens=int(trace.input_tokens[i]), output_tokens=int(trace.output_tokens[i]),
            max_output_tokens=4096, cached_tokens=0, usage_counted=True, priority_class=0.0, held_s=0.1,
            decision_s=0.0, ttft_s=float(r.ttft_s[i]) + 0.1, e2e_s=float(r.e2e_s[i]) + 0.1, blocks=(10**9, i + 1),
        )
        for i in range(len(trace))
    ]  # fmt: skip


WINDOW = WindowRow(
    window=5, started_s=1e9, ended_s=1e9 + 10, objective={}, context={}, requests=480, completed=480, shed=0,
    failed=0, throughput_tokens_s=1.0, ttft_p50_s=None, ttft_p99_s=None, tpot_p50_s=None, tpot_p99_s=None,
    goodput_rps=1.0, utility=1.0, regret=None, regret_low=None, regret_high=None, drift="", twin_weight=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with Store.open(folder / "telemetry.duckdb") as store:
        store.write_window(WINDOW, requests=records())
    return folder


def test_calibrate_writes_a_profile_that_other_commands_take(data_dir, tmp_path):
    file = tmp_path / "mine.json"
    done = run(
        app, ["twin", "calibrate", "--data-dir", str(data_dir), "--out", str(file), "--json", "-"]
    )
    assert 0 == done.exit_code, done.output
    told = json.loads(done.stdout)
    assert told["error"] < told["error_before"]
    assert "mine" == json.loads(file.read_text())["name"]
    validated = ["twin", "validate", "--data-dir", str(data_dir), "--no-calibrate", "--json", "-"]
    errors = {}
    for profile in (str(file), H100.name):
        done = run(app, [*validated, "--profile", profile])
        assert 0 == done.exit_code, done.output
        rows = json.loads(done.stdout)["errors"]
        errors[profile] = next(
            abs(r["error"]) for r in rows if (r["measure"], r["statistic"]) == ("tpot_s", "p50")
        )
    assert errors[str(file)] < 0.1 < errors[H100.name]


def test_validate_prints_a_table_and_draws(data_dir, tmp_path):
    picture = tmp_path / "v.svg"
    done = run(app, ["twin", "validate", "--data-dir", str(data_dir), "--plot", str(picture)])
    assert 0 == done.exit_code, done.output
    assert "ttft_s" in done.output
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["validate", "--split", "1.5"], "between 0 and 1"),
        (["validate", "--plot", "x.gif"], "ends in .svg or .png"),
        (["calibrate", "--replica", "nobody"], "no replica 'nobody' served"),
        (["calibrate", "--profile", "none.json"], "none.json: cannot be read"),
        (["calibrate", "--kv-tokens", "100"], "cannot hold in"),
    ],
)
def test_wrong_use_is_refused(data_dir, options, says):
    done = run(app, ["twin", *options, "--data-dir", str(data_dir)])
    assert 2 == done.exit_code
    assert says in " ".join(done.output.split())


def test_without_telemetry_there_is_nothing_to_calibrate_on(tmp_path):
    done = run(app, ["twin", "calibrate", "--data-dir", str(tmp_path / "none")])
    assert done.exit_code in {2, 3}
    assert "Traceback" not in done.output


def test_export_writes_a_trace_that_replays(data_dir, tmp_path):
    file = tmp_path / "yesterday.parquet"
    done = run(app, ["traces", "export", str(file), "--data-dir", str(data_dir)])
    assert 0 == done.exit_code, done.output
    trace = read_trace(file)
    assert [r.input_tokens for r in records()] == trace.input_tokens.tolist()
    assert 0.0 == trace.arrival_s[0]
    assert 1 + len(trace) == len(np.unique(trace.blocks))


def test_a_refit_leaves_out_what_ran_beside_requests_that_are_not_known_yet(tmp_path):
    """Of those the long ones are still to end, and what is known says too much of the short ones."""
    with Store.open(tmp_path / "telemetry.duckdb") as store:
        store.write_window(WINDOW, requests=records())
    settings = Settings.model_validate({"data_dir": tmp_path, "profile": (H100.name,)})

    def fitted(whole_until_s):
        return refit.fit(settings, {"replica-0": 1.0}, Engine(), None, whole_until_s)

    whole, half = fitted(float("inf")), fitted(1e9 + 70.0)
    assert whole.requests > half.requests > 50
    assert half.error < 0.5 * half.error_before
    with pytest.raises(CalibrationError, match="too few"):
        fitted(1e9 + 5.0)
