"""A real gateway, started as an operator would start it."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from autopoiesis.replicas.fleet import free_ports

START_LIMIT_S = 170.0
COMMAND = [sys.executable, "-m", "autopoiesis"]


def run(*arguments, cwd, timeout=120):
    """Run a command to its end; return its exit code, output and errors."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@dataclass
class Gateway:
    process: subprocess.Popen
    folder: Path
    port: int
    control_port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def processes(self):
        """Return every process of the gateway, grandchildren included."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def running(self, word):
        """Return the running processes that have a word in their command line."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):  # it may end while we look
                if any(word in part for part in process.cmdline()):
                    found.append(process)
        return found

    def status(self):
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.control_port}/status", timeout=5
        ) as answer:
            return json.load(answer)

    def stop(self, number=signal.SIGTERM, timeout=60):
        self.process.send_signal(number)
        return self.process.wait(timeout)


@contextmanager
def serving(folder, *arguments, start_limit_s=START_LIMIT_S):
    """Start `serve` in a folder and wait until it is ready."""
    port, control_port = free_ports(2)
    command = [
        *COMMAND,
        "serve",
        "--port",
        str(port),
        "--control-port",
        str(control_port),
        *arguments,
    ]
    log = (folder / "serve.log").open("wb")
    with log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"COLUMNS": "200"}
        )
    gateway = Gateway(process, folder, port, control_port)
    try:
        wait_until(lambda: ready(gateway), start_limit_s)
        yield gateway
    finally:
        if process.poll() is None:
            gateway.stop()


def ready(gateway):
    assert gateway.process.poll() is None, (gateway.folder / "serve.log").read_text()
    return "control API" in (gateway.folder / "serve.log").read_text()


def wait_until(holds, limit_s):
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def post(url, body):
    """POST raw bytes; return status and answer, also where the server answers before it has read all."""
    there = urllib.parse.urlsplit(url)
    with closing(http.client.HTTPConnection(there.hostname, there.port, timeout=30)) as connection:
        connection.putrequest("POST", there.path)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(body)
        answer = connection.getresponse()
        return answer.status, answer.read()
