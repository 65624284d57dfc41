"""The whole of `serve` before mock replicas, for benchmarks of what stands behind the data plane, too."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from autopoiesis.replicas.fleet import free_ports

START_S, STOP_S = 240.0, 60.0
MOCK = Path(__file__).with_name("mock_replica.py")


@dataclass
class Serving:
    """A running instance and its mock replicas."""

    folder: Path
    data_dir: Path
    port: int
    control_port: int
    process: subprocess.Popen[bytes]
    mocks: dict[int, subprocess.Popen[bytes]]
    """By port."""

    def children(self, word: str) -> list[psutil.Process]:
        """Return the instance's processes with a word in their command line."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in found if p.is_running() and any(word in part for part in p.cmdline())]

    def controller(self) -> psutil.Process:
        """Return the controller's process."""
        return self.children("orchestrator.controller")[0]

    def start_mock(self, port: int) -> None:
        """Start a mock replica."""
        self.mocks[port] = subprocess.Popen([sys.executable, str(MOCK), str(port)])

    def stop_mock(self, port: int) -> None:
        """Kill a mock replica."""
        process = self.mocks.pop(port)
        process.kill()
        process.wait()

    def tell(self, path: str) -> None:
        """Tell all mock replicas how to behave."""
        for port in self.mocks:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5):
                pass

    def ask(self, query: str) -> list[list[Any]]:
        """Ask the telemetry."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.control_port}/sql",
            json.dumps({"query": query}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)["rows"]

    async def until_asked(self, query: str, limit_s: float = 60.0) -> list[list[Any]]:
        """Ask until there is an answer: the controller may be on its way back."""
        deadline_s = time.monotonic() + limit_s
        while True:
            try:
                return await asyncio.to_thread(self.ask, query)
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(0.2)

    def log(self) -> str:
        """Return what it said."""
        return (self.folder / "serve.log").read_text()


@contextmanager
def serving(
    folder: Path,
    *arguments: str,
    replicas: int = 3,
    data_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Serving]:
    port, control_port, *mocks = free_ports(2 + replicas)
    data_dir = data_dir or folder / "data"
    command = [sys.executable, "-m", "autopoiesis", "serve", "--port", str(port)]
    command += ["--control-port", str(control_port), "--data-dir", str(data_dir)]
    command += ["--window", "1", "--synthesizer", "none", *arguments]
    for mock in mocks:
        command += ["--replica", f"http://127.0.0.1:{mock}"]
    running: dict[int, subprocess.Popen[bytes]] = {}
    instance: Serving | None = None
    try:
        for mock in mocks:
            running[mock] = subprocess.Popen([sys.executable, str(MOCK), str(mock)])
        time.sleep(1.0)
        with (folder / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **(environment or {})}
            )
        instance = Serving(folder, data_dir, port, control_port, process, running)
        deadline_s = time.monotonic() + START_S
        while "control API" not in instance.log():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"serve does not come up:\n{instance.log()}")
            time.sleep(0.2)
        yield instance
    finally:
        if instance and instance.process.poll() is None:
            instance.process.send_signal(signal.SIGTERM)
            instance.process.wait(STOP_S)
        for process in running.values():
            process.kill()
            process.wait()
