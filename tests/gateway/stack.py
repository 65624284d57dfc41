"""A whole data plane for tests: real Envoy, a picker process, small upstream servers."""

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopoiesis.gateway import envoy
from autopoiesis.gateway.settings import DataPlaneSettings
from autopoiesis.replicas.fleet import Member, free_ports, write_fleet

UPSTREAM = Path(__file__).with_name("upstream.py")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Stack:
    run_dir: Path
    port: int
    members: list[Member]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    patience_s: float = 10.0
    settings: DataPlaneSettings = field(default_factory=DataPlaneSettings)

    def start(self, name: str, argv: Sequence[str]) -> None:
        with (self.run_dir / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(argv, stdout=log, stderr=log)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(10)

    def log(self, name: str) -> str:
        return (self.run_dir / f"{name}.log").read_text()

    def start_upstream(self, member: Member) -> None:
        port = member.address.rpartition(":")[2]
        self.start(member.name, [sys.executable, str(UPSTREAM), port, member.name])

    def listens(self, member: Member) -> bool:
        host, _, port = member.address.rpartition(":")
        with socket.socket() as trial:
            return trial.connect_ex((host, int(port))) == 0

    def start_picker(self) -> None:
        before = self.log("picker").count("ready") if (self.run_dir / "picker.log").exists() else 0
        argv = [sys.executable, "-m", "autopoiesis.gateway.picker", "--run-dir", str(self.run_dir)]
        self.start("picker", [*argv, "--patience-s", str(self.patience_s)])
        wait_until(lambda: self.log("picker").count("ready") > before, 120)

    def start_envoy(self) -> None:
        self.start(
            "envoy",
            envoy.prepare(self.run_dir, "127.0.0.1", self.port, self.members, self.settings),
        )
        wait_until(lambda: asyncio.run(envoy.is_ready(self.run_dir)), 30)
        wait_until(lambda: _answers(self), 30)

    def post(
        self,
        body: object,
        path: str = "/v1/chat/completions",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request(
            "POST", path, data, {"content-type": "application/json", **(headers or {})}
        )

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(
                response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
            )
        finally:
            connection.close()


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def wait_until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)


@contextmanager
def running_stack(
    run_dir: Path,
    replicas: int = 3,
    picker: bool = True,
    patience_s: float = 10.0,
    settings: DataPlaneSettings | None = None,
) -> Iterator[Stack]:
    port, *ports = free_ports(replicas + 1)
    members = [
        Member(
            name=f"r{i}",
            address=f"127.0.0.1:{p}",
            profile="h100-llama-3-8b-tp1-bf16",
            kind="remote",
        )
        for i, p in enumerate(ports)
    ]
    stack = Stack(
        run_dir, port, members, patience_s=patience_s, settings=settings or DataPlaneSettings()
    )
    write_fleet(run_dir / "fleet.json", members)
    try:
        for member in members:
            stack.start_upstream(member)
        if picker:
            stack.start_picker()
        stack.start_envoy()
        yield stack
    finally:
        for process in stack.processes.values():
            process.kill()
        for process in stack.processes.values():
            process.wait(10)


def _answers(stack: Stack) -> bool:
    try:
        return stack.request("GET", "/v1/models").status == 200
    except OSError:
        return False
