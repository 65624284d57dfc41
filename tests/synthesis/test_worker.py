"""The worker is a real process: whatever happens to it, a row comes back and nothing stays behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from synthesis_scenes import idle_brief, uneven_brief

from autopoiesis.arms.arm import Origin
from autopoiesis.synthesis.brief import Incumbent
from autopoiesis.synthesis.launch import run_worker, run_worker_now
from autopoiesis.synthesis.step import promoted_arms

MODULE = "autopoiesis.synthesis.worker"


def workers_of(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if MODULE in child.cmdline():
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


async def worker_at_work() -> psutil.Process:
    """Wait until a worker has confined itself."""
    for _ in range(600):
        for worker in workers_of(os.getpid()):
            if worker.nice() == 19:
                return worker
        await asyncio.sleep(0.05)
    raise AssertionError("no worker came up")


def gone(pid: int, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_cycle_in_its_own_process_promotes():
    brief = replace(uneven_brief(), max_candidates=24, window=17)
    row = run_worker_now(brief)
    assert row.error == ""
    assert row.promoted
    assert [arm.id for arm in promoted_arms(row, 1.0)] == list(row.promoted)
    assert (row.window, row.trigger, row.synthesizer) == (17, brief.trigger, "genetic")
    assert row.started_s == brief.asked_s
    assert row.cpu_seconds > 0.0


async def test_killed_with_9_it_leaves_an_error_row():
    running = asyncio.create_task(run_worker(replace(uneven_brief(), max_candidates=10**6)))
    worker = await worker_at_work()
    assert os.getpgid(worker.pid) == worker.pid
    worker.send_signal(signal.SIGKILL)
    row = await running
    assert "SIGKILL" in row.error
    assert (row.promoted, row.candidates) == ((), ())
    assert workers_of(os.getpid()) == []


async def test_one_that_takes_too_long_is_stopped():
    row = await run_worker(replace(uneven_brief(), max_candidates=10**6), timeout_s=0.5)
    assert "stopped after 0.5 s" in row.error
    assert workers_of(os.getpid()) == []


async def test_cancelling_the_wait_kills_it():
    running = asyncio.create_task(run_worker(replace(uneven_brief(), max_candidates=10**6)))
    worker = await worker_at_work()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert gone(worker.pid)


def test_it_dies_with_its_parent():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from dataclasses import replace; "
        "from synthesis_scenes import uneven_brief; from autopoiesis.synthesis.launch import run_worker_now; "
        "run_worker_now(replace(uneven_brief(), max_candidates=10**6))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(Path(__file__).parent)])
    try:
        end = time.monotonic() + 60.0
        while not (found := [w for w in workers_of(parent.pid) if w.nice() == 19]):
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.2)  # it has asked the kernel right after it became nice
        parent.kill()
        parent.wait()
        assert gone(found[0].pid)
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"holdout": ()}, "needs at least 1 hold-out window"),
        (
            {"incumbents": (Incumbent("x", "def score(:", Origin.HUMAN, "broken"),)},
            "incumbent is no policy",
        ),
        ({"synthesizer": Origin.FILES}, "needs a folder"),
        ({"synthesizer": Origin.OPENAI}, "needs somebody who speaks to the models"),
        ({"synthesizer": Origin.HUMAN}, "no proposer called 'human'"),
    ],
)
def test_a_brief_it_cannot_work_on_comes_back_as_a_sentence(changes, sentence):
    row = run_worker_now(replace(idle_brief(), **changes))
    assert sentence in row.error
    assert "Traceback" not in row.error


def test_bytes_that_are_no_brief_end_it_with_code_2():
    ended = subprocess.run(
        [sys.executable, "-m", MODULE], input=b"{", capture_output=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == b""
    assert ended.stderr.decode().count("\n") == 1


def test_it_keeps_to_its_limits():
    code = (
        "import os, resource; from autopoiesis.synthesis.confine import confine; confine(); "
        "print(os.nice(0), os.getpgrp() == os.getpid(), resource.getrlimit(resource.RLIMIT_CORE)[0], "
        "resource.getrlimit(resource.RLIMIT_CPU)[0])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True
    ).stdout.decode()
    assert out.split() == ["19", "True", "0", "3600"]
