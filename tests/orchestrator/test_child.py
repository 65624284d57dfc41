"""A child's log stays bounded while it runs."""

import asyncio
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
