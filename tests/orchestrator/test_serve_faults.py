"""What may happen to the machine under a whole `serve`: its clock is set, its telemetry is somebody else's."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from gateway_process import serving, wait_until

SHIM = Path(__file__).parents[2] / "benchmarks" / "clock_shim.c"
HOLD = """
import sys, time, duckdb
while True:
    try:
        held = duckdb.connect(sys.argv[1])
        break
    except duckdb.Error:
        time.sleep(0.005)
print("held", flush=True)
sys.stdin.read()
"""
MISSING = (
    "select count(*) from range((select min(window_id) from windows)::bigint, "
    "(select max(window_id) from windows)::bigint) as r(w) "
    "where w not in (select window_id from windows)"
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """Serve under a clock that a file sets."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is needed to put a clock between the processes and the kernel's")
    folder = tmp_path_factory.mktemp("faults")
    library = folder / "clock.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    set_clock(folder, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        patch.setenv("CLOCK_SHIM", str(folder / "offset"))
        with serving(
            folder, "--simulate", "2", "--window", "1", "--synthesizer", "none"
        ) as running:
            patch.delenv("LD_PRELOAD")
            yield running


def set_clock(folder, hours):
    file = folder / "offset"
    file.touch()
    with file.open("r+b") as opened:
        opened.write(struct.pack("d", 3600.0 * hours))


def asked(gateway, query):
    url = f"http://127.0.0.1:{gateway.control_port}/sql"
    answer = httpx.post(url, json={"query": query}, timeout=20)
    assert 200 == answer.status_code, answer.text
    return answer.json()["rows"]


def last_window(gateway):
    try:
        return asked(gateway, "select coalesce(max(window_id), 0) from windows")[0][0]
    except httpx.HTTPError:  # the controller is on its way back
        return -1


def answers(gateway):
    body = {"model": "simulated", "prompt": "the sea", "max_tokens": 2}
    return 200 == httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=20).status_code


def windows_pass(gateway, count):
    """Wait for further windows, requests being answered all the while."""
    before = last_window(gateway)

    def passed():
        assert answers(gateway)
        return before >= 0 and last_window(gateway) >= before + count

    wait_until(passed, 60)


def test_a_clock_that_is_set_costs_no_request_and_no_window(gateway):
    windows_pass(gateway, 1)
    for hours in (1.0, -1.0, 0.0):
        set_clock(gateway.folder, hours)
        windows_pass(gateway, 3)
    assert [[0]] == asked(gateway, MISSING)
    assert 3 <= len(asked(gateway, "select 1 from events where message like '%clock%'"))


def test_a_telemetry_file_that_somebody_holds_costs_no_request(gateway):
    file = gateway.folder / ".autopoiesis" / "telemetry.duckdb"
    before = last_window(gateway)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
    )  # fmt: skip
    try:
        gateway.running("orchestrator.controller")[0].kill()
        assert b"held" in os.read(holder.stdout.fileno(), 10)
        for _ in range(20):
            assert answers(gateway)
        assert -1 == last_window(gateway)  # nobody can write
    finally:
        holder.communicate(timeout=30)
    wait_until(lambda: last_window(gateway) > before, 60)
    windows_pass(gateway, 1)
