import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from autopoiesis.replicas.fleet import Member, free_ports, simulated_command

PROFILE = "h100-llama-3-8b-tp1-bf16"


class Running:
    """A simulated replica in its own process."""

    def __init__(self, member: Member, process: subprocess.Popen[bytes]) -> None:
        self.member = member
        self.url = member.url
        self.process = process


def start(speed: float, profile: str = PROFILE) -> Running:
    member = Member("sim-0", f"127.0.0.1:{free_ports(1)[0]}", profile, speed=speed)
    command = simulated_command(member, seed=1)
    process = subprocess.Popen(
        command.argv, env=os.environ | command.environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{member.url}/health", timeout=1).close()
            return Running(member, process)
        time.sleep(0.05)
    process.kill()
    raise RuntimeError(f"the replica did not start ({process.wait()})")


def stop(running: Running) -> int:
    running.process.send_signal(signal.SIGTERM)
    try:
        return running.process.wait(10)
    except subprocess.TimeoutExpired:
        running.process.kill()
        raise


@pytest.fixture(scope="module")
def replica() -> Iterator[Running]:
    running = start(speed=4.0)
    yield running
    stop(running)


@pytest.fixture
def start_replica() -> Iterator[Callable[..., Running]]:
    all_running: list[Running] = []

    def start_one(speed: float = 1.0, profile: str = PROFILE) -> Running:
        all_running.append(start(speed, profile))
        return all_running[-1]

    yield start_one
    for running in all_running:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
