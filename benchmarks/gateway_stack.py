"""A gateway of real Envoy, a real picker and mock replicas, and clients that load it."""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mock_replica import ERROR_BODY, content_length

from autopoiesis.gateway import envoy
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir
from autopoiesis.replicas.fleet import Member, free_ports, write_fleet

PROMPT = "Tell me what the gateway costs. " * 32


def request_bytes(port: int, stream: bool = False, prompt: str = PROMPT) -> bytes:
    messages = [{"role": "user", "content": prompt}]
    body = json.dumps({"model": "m", "messages": messages, "max_tokens": 16, "stream": stream})
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        f"host: 127.0.0.1:{port}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "\r\n",
    )
    return "\r\n".join(head).encode() + body.encode()


@dataclass
class Load:
    """What came of a closed-loop load."""

    latencies_s: list[float] = field(default_factory=list)
    first_bytes_s: list[float] = field(default_factory=list)
    ended_s: list[float] = field(default_factory=list)
    """When each request was answered, on the performance counter."""
    lost: list[str] = field(default_factory=list)
    """Why requests failed that no replica answered."""
    errors: list[str] = field(default_factory=list)
    """Status lines of replicas' own errors."""
    broken: int = 0
    """Answers that ended too early."""
    replicas: list[str] = field(default_factory=list)
    decided: int = 0
    """Answers on which the picker decided."""
    over: bool = False
    left: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    @property
    def failed(self) -> int:
        """Requests that were not answered well."""
        return len(self.lost) + len(self.errors) + self.broken

    def rate(self, from_s: float, to_s: float) -> float:
        """Return answers per second between two times of the performance counter."""
        return sum(from_s <= at < to_s for at in self.ended_s) / (to_s - from_s)

    def shares(self, from_s: float) -> Counter[str]:
        """Count answers per replica since a time."""
        pairs = zip(self.ended_s, self.replicas, strict=True)
        return Counter(replica for at, replica in pairs if at >= from_s)


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it was answered; lost, it is replaced."""

    def __init__(self, port: int, load: Load, stream: bool) -> None:
        self._port = port
        self._stream = stream
        self._request = request_bytes(port, stream)
        self._load = load
        self._received = b""
        self._sent_s = 0.0
        self._waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: Any = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if not self._received:
            self._load.first_bytes_s.append(time.perf_counter() - self._sent_s)
        self._received += data
        if is_complete(self._received):
            self._answered()

    def connection_lost(self, error: Exception | None) -> None:
        """Count a request that got no answer, and begin anew."""
        load = self._load
        if self._waiting and not load.over:
            if self._received:
                load.broken += 1
            else:
                load.lost.append(f"connection lost: {error}")
        if load.over:
            load.left.release()
        else:
            asyncio.get_running_loop().create_task(
                connect(self._port, load, self._stream), name="client"
            )

    def _answered(self) -> None:
        load, now_s = self._load, time.perf_counter()
        head, _, _ = self._received.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 200"):
            load.latencies_s.append(now_s - self._sent_s)
            load.ended_s.append(now_s)
            load.replicas.append(header(head, b"x-autopoiesis-replica"))
        else:
            status = head.split(b"\r\n", 1)[0].decode(errors="replace")
            (load.errors if self._received.endswith(ERROR_BODY) else load.lost).append(status)
        load.decided += b"x-autopoiesis-arm" in head
        self._received, self._waiting = b"", False
        if load.over or b"connection: close" in head:
            self._transport.close()
        else:
            self._ask()

    def _ask(self) -> None:
        self._sent_s, self._waiting = time.perf_counter(), True
        self._transport.write(self._request)


def header(head: bytes, name: bytes) -> str:
    at = head.find(b"\r\n" + name + b":")
    return head[at + len(name) + 3 :].split(b"\r\n", 1)[0].strip().decode() if at >= 0 else ""


def is_complete(answer: bytes) -> bool:
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    if b"transfer-encoding: chunked" in answer[:end].lower():
        return answer.endswith(b"\r\n0\r\n\r\n")
    return len(answer) >= end + 4 + content_length(answer[:end])


async def connect(port: int, load: Load, stream: bool) -> None:
    """Open a connection of a load, again and again until there is one."""
    while True:
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: Client(port, load, stream), "127.0.0.1", port)
        except OSError:
            if load.over:
                load.left.release()
                return
            await asyncio.sleep(0.05)
        else:
            return


async def run_load(
    port: int, connections: int, seconds: float, stream: bool = False, load: Load | None = None
) -> Load:
    load = load or Load()
    for _ in range(connections):
        await connect(port, load, stream)
    await asyncio.sleep(seconds)
    load.over = True
    try:
        async with asyncio.timeout(15):
            for _ in range(connections):
                await load.left.acquire()
    except TimeoutError:
        load.lost.append("no answer until the end")
    return load


@dataclass
class Stack:
    """The processes of one gateway."""

    run_dir: Path
    port: int
    members: list[Member]
    settings: DataPlaneSettings
    processes: dict[str, subprocess.Popen[bytes]]

    def cpu_s(self, name: str) -> float:
        """Return the CPU time that a process has used."""
        times = psutil.Process(self.processes[name].pid).cpu_times()
        return times.user + times.system

    def memory_bytes(self, name: str) -> int:
        """Return how much memory a process holds."""
        return psutil.Process(self.processes[name].pid).memory_info().rss

    def start_picker(self) -> None:
        """Start the picker."""
        argv = [sys.executable, "-m", "autopoiesis.gateway.picker", "--run-dir", str(self.run_dir)]
        self.start("picker", argv)

    def start_envoy(self) -> None:
        """Start Envoy."""
        argv = envoy.prepare(self.run_dir, "127.0.0.1", self.port, self.members, self.settings)
        self.start("envoy", argv)

    def start_replica(self, member: Member) -> None:
        """Start a mock replica."""
        script = str(Path(__file__).with_name("mock_replica.py"))
        self.start(member.name, [sys.executable, script, member.address.rpartition(":")[2]])

    def start(self, name: str, argv: list[str]) -> None:
        """Start a process that logs into the run directory."""
        with (self.run_dir / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(argv, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """Kill a process with -9."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def tell(self, member: Member, path: str) -> None:
        """Tell a mock replica how to behave."""
        with urllib.request.urlopen(f"http://{member.address}/{path}", timeout=5):
            pass


@contextmanager
def running_stack(
    run_dir: Path, replicas: int = 2, settings: DataPlaneSettings | None = None
) -> Iterator[Stack]:
    port, *mocks = free_ports(1 + replicas)
    members = [
        Member(name=f"mock-{i}", address=f"127.0.0.1:{p}", profile="mock", kind="remote")
        for i, p in enumerate(mocks)
    ]
    write_fleet(RunDir(run_dir).fleet, members)
    stack = Stack(run_dir, port, members, settings or DataPlaneSettings(), {})
    try:
        for member in members:
            stack.start_replica(member)
        stack.start_picker()
        stack.start_envoy()
        yield stack
    finally:
        for process in stack.processes.values():
            process.kill()
            process.wait()


async def until_decided(stack: Stack) -> None:
    """Wait until answers come with the picker's decision."""
    deadline_s = time.monotonic() + 240
    while time.monotonic() < deadline_s:
        try:
            if (await run_load(stack.port, 1, 0.05)).decided:
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit(f"The gateway does not come up; see {stack.run_dir}.")
