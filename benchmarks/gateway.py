"""What the gateway costs: the same mock replica, reached directly and through Envoy and the picker.

    python benchmarks/gateway.py [--rounds 5] [--seconds 2] [--json FILE|-]

Direct and gateway take turns within each round, so that other work on the machine hits both. CPU is
what the kernel charged to Envoy and to the picker, divided by the requests that they carried. Last
the picker is killed with -9 under load and started again, and every answer is counted.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from autopoiesis.gateway import envoy
from autopoiesis.gateway.settings import RunDir
from autopoiesis.replicas.fleet import Member, free_ports, write_fleet

CONNECTIONS = (1, 64)
PROMPT = "Tell me what the gateway costs. " * 32
BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 16}
).encode()
CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "word " * 16},
    "finish_reason": "length",
}
USAGE = {"prompt_tokens": 260, "completion_tokens": 16, "total_tokens": 276}
ANSWER = json.dumps(
    {"id": "c", "object": "chat.completion", "choices": [CHOICE], "usage": USAGE}
).encode()


def request_bytes(port: int) -> bytes:
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        f"host: 127.0.0.1:{port}",
        "content-type: application/json",
        f"content-length: {len(BODY)}",
        "\r\n",
    )
    return "\r\n".join(head).encode() + BODY


class MockReplica(asyncio.Protocol):
    """Answers at once, whatever is asked."""

    HEAD = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(ANSWER)}\r\n\r\n".encode()

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = content_length(self._received[:end])
            if len(self._received) < end + 4 + length:
                return
            self._received = self._received[end + 4 + length :]
            self._transport.write(self.HEAD + ANSWER)


def content_length(head: bytes) -> int:
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0


def is_complete(answer: bytes) -> bool:
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    if b"transfer-encoding: chunked" in answer[:end]:
        return answer.endswith(b"\r\n0\r\n\r\n")
    return len(answer) >= end + 4 + content_length(answer[:end])


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it was answered, and connects again if it must."""

    def __init__(self, port: int, load: "Load") -> None:
        self._request = request_bytes(port)
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
        self._received += data
        if not is_complete(self._received):
            return
        self._load.latencies_s.append(time.perf_counter() - self._sent_s)
        if not self._received.startswith(b"HTTP/1.1 200"):
            self._load.failures.append(self._received.split(b"\r\n", 1)[0].decode())
        if b"x-autopoiesis-arm" in self._received:
            self._load.decided += 1
        self._received, self._waiting = b"", False
        if self._load.over:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        """Count a request that got no answer."""
        if self._waiting and not self._load.over:
            self._load.failures.append(f"connection lost: {error}")
        self._load.left.release()

    def _ask(self) -> None:
        self._sent_s, self._waiting = time.perf_counter(), True
        self._transport.write(self._request)


@dataclass
class Load:
    """A closed-loop load and what came of it."""

    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    decided: int = 0
    """Answers on which the picker decided."""
    over: bool = False
    left: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))


async def run_load(port: int, connections: int, seconds: float) -> Load:
    load = Load()
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: Client(port, load), "127.0.0.1", port)
    await asyncio.sleep(seconds)
    load.over = True
    for _ in range(connections):
        await load.left.acquire()
    return load


@dataclass
class Stack:
    """Envoy, a picker and two mock replicas."""

    run_dir: Path
    port: int
    mock_port: int
    processes: dict[str, subprocess.Popen[bytes]]

    def cpu_s(self, name: str) -> float:
        """Return the CPU time that a process has used."""
        times = psutil.Process(self.processes[name].pid).cpu_times()
        return times.user + times.system

    def start_picker(self) -> None:
        """Start the picker."""
        argv = [sys.executable, "-m", "autopoiesis.gateway.picker", "--run-dir", str(self.run_dir)]
        self.start("picker", argv)

    def start(self, name: str, argv: list[str]) -> None:
        """Start a process that logs into the run directory."""
        with (self.run_dir / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(argv, stdout=log, stderr=log)


@contextmanager
def running_stack(run_dir: Path) -> Iterator[Stack]:
    port, *mocks = free_ports(3)
    members = [
        Member(name=f"mock-{p}", address=f"127.0.0.1:{p}", profile="mock", kind="remote")
        for p in mocks
    ]
    write_fleet(RunDir(run_dir).fleet, members)
    stack = Stack(run_dir, port, mocks[0], {})
    try:
        for member, mock in zip(members, mocks, strict=True):
            stack.start(member.name, [sys.executable, __file__, "--mock", str(mock)])
        stack.start_picker()
        stack.start("envoy", envoy.prepare(run_dir, "127.0.0.1", port, members))
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


def summary(loads: list[Load], seconds: float) -> dict[str, float]:
    latencies = sorted(x for load in loads for x in load.latencies_s)
    p50s = [statistics.median(load.latencies_s) for load in loads]
    return {
        "p50_ms": 1e3 * statistics.median(latencies),
        "p50_best_round_ms": 1e3 * min(p50s),
        "p99_ms": 1e3 * latencies[int(0.99 * (len(latencies) - 1))],
        "requests_s": len(latencies) / (seconds * len(loads)),
        "failed": sum(len(load.failures) for load in loads),
    }


async def compare(stack: Stack, connections: int, rounds: int, seconds: float) -> dict[str, Any]:
    loads: dict[str, list[Load]] = {"direct": [], "gateway": []}
    spent_s = {"envoy": 0.0, "picker": 0.0}
    for _ in range(rounds):
        loads["direct"].append(await run_load(stack.mock_port, connections, seconds))
        before = {name: stack.cpu_s(name) for name in spent_s}
        loads["gateway"].append(await run_load(stack.port, connections, seconds))
        await asyncio.sleep(0.2)  # the access log comes a moment later
        for name, cpu_s in before.items():
            spent_s[name] += stack.cpu_s(name) - cpu_s
    told: dict[str, Any] = {name: summary(found, seconds) for name, found in loads.items()}
    requests = sum(len(load.latencies_s) for load in loads["gateway"])
    added = {
        k: told["gateway"][k] - told["direct"][k] for k in ("p50_ms", "p50_best_round_ms", "p99_ms")
    }
    cpu_ms = {name: 1e3 * cpu_s / requests for name, cpu_s in spent_s.items()}
    return {"connections": connections, **told, "added": added, "cpu_ms_per_request": cpu_ms}


async def kill_picker(stack: Stack, connections: int = 16, seconds: float = 8.0) -> dict[str, Any]:
    """Kill the picker under load and start it again; tell what was lost and when decisions resumed."""
    running = asyncio.create_task(run_load(stack.port, connections, seconds))
    await asyncio.sleep(seconds / 4)
    picker = stack.processes["picker"]
    picker.send_signal(signal.SIGKILL)
    picker.wait()
    await asyncio.sleep(seconds / 8)
    stack.start_picker()
    restarted_s = time.monotonic()
    await until_decided(stack)
    back_s = time.monotonic() - restarted_s
    load = await running
    return {
        "requests": len(load.latencies_s),
        "failed": len(load.failures),
        "failures": sorted(set(load.failures))[:5],
        "decided_by_picker": load.decided,
        "picker_back_after_s": back_s,
    }


async def measure(rounds: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, running_stack(Path(directory)) as stack:
        await until_decided(stack)
        await run_load(stack.port, 16, 1.0)  # warm connections
        load_before = os.getloadavg()[0]
        pairs = [await compare(stack, n, rounds, seconds) for n in CONNECTIONS]
        killed = await kill_picker(stack)
    about = {
        "cores": os.cpu_count(),
        "load_average_before": load_before,
        "rounds": rounds,
        "seconds": seconds,
    }
    return {"machine": about, "pairs": pairs, "picker_killed": killed}


def show(told: dict[str, Any]) -> None:
    console = Console(width=110)
    machine = told["machine"]
    table = Table(
        title=f"{machine['cores']} cores, load average {machine['load_average_before']:.1f} before, "
        f"{machine['rounds']} rounds of {machine['seconds']:g} s each way"
    )
    columns = ("connections", "way", "p50 ms", "best p50", "p99 ms", "req/s", "failed")
    columns += ("Envoy CPU ms", "picker CPU ms")
    for column in columns:
        table.add_column(column, justify="right")
    for pair in told["pairs"]:
        for way in ("direct", "gateway"):
            row = pair[way]
            cpu = pair["cpu_ms_per_request"] if way == "gateway" else {}
            figures = [f"{row[k]:.2f}" for k in ("p50_ms", "p50_best_round_ms", "p99_ms")]
            spent = [f"{cpu[name]:.3f}" if name in cpu else "" for name in ("envoy", "picker")]
            counts = f"{row['requests_s']:,.0f}", f"{row['failed']:.0f}"
            table.add_row(str(pair["connections"]), way, *figures, *counts, *spent)
        table.add_row("", "added", *(f"{v:+.2f}" for v in pair["added"].values()), end_section=True)
    console.print(table)
    killed = told["picker_killed"]
    console.print(
        f"Picker killed with -9 under load: {killed['failed']} of {killed['requests']:,} requests lost "
        f"{killed['failures'] or ''}; started again, it decided after {killed['picker_back_after_s']:.1f} s."
    )


async def serve_mock(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(MockReplica, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures here; - for standard output"
    )
    parser.add_argument("--mock", type=int, metavar="PORT", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.mock:
        uvloop.run(serve_mock(chosen.mock))
        return
    told = uvloop.run(measure(chosen.rounds, chosen.seconds))
    if chosen.json == "-":
        print(json.dumps(told, indent=2))
        return
    show(told)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
