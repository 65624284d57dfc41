"""A child keeps to its cores, and its log stays bounded while it runs."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from autopoiesis.orchestrator import child
from autopoiesis.orchestrator.child import Child

TALKATIVE = (
    "import sys, time\nwhile True:\n    print('word ' * 200, flush=True)\n    time.sleep(0.001)\n"
)


async def test_the_log_of_a_talkative_child_is_set_aside_as_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(child, "LOG_BYTES", 20_000)
    monkeypatch.setattr(child, "LOG_LOOK_S", 0.02)
    log = tmp_path / "talk.log"
    talking = Child("talk", [sys.executable, "-c", TALKATIVE], log)
    await talking.start()
    try:
        async with asyncio.timeout(30):
            while not (aside := tmp_path / "talk.log.1").exists():
                await asyncio.sleep(0.02)
            while not (again := log.read_bytes()):  # it writes on where the file now ends
                await asyncio.sleep(0.002)
        assert aside.read_text().startswith("word")
        assert b"\0" not in again
        assert talking.restarts == 0
    finally:
        await talking.stop(5.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only there can a process be kept to cores")
async def test_a_child_and_what_it_starts_keep_to_the_cores_that_it_was_given(tmp_path: Path):
    core = max(os.sched_getaffinity(0))
    tell = "import os; print(os.sched_getaffinity(0), flush=True)"
    script = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {tell!r}]); time.sleep(60)"
    kept = Child("kept", [], log := tmp_path / "kept.log")
    kept.change([sys.executable, "-c", script], cores=[core])
    await kept.start()
    try:
        async with asyncio.timeout(30):
            while not log.exists() or not log.read_text().endswith("\n"):
                await asyncio.sleep(0.02)
        assert log.read_text() == f"{{{core}}}\n"
    finally:
        await kept.stop(5.0)
