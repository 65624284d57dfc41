"""What the gateway costs: the same mock replica, reached directly and through Envoy and the picker.

    python benchmarks/gateway.py [--rounds 5] [--seconds 2] [--json FILE|-]

Direct and gateway take turns within each round, so that other work on the machine hits both. CPU is
what the kernel charged to Envoy and to the picker, divided by the requests that they carried; a
stream has 18 chunks. Last the picker is killed with -9 under load and started again, and every
answer is counted.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from gateway_stack import Load, Stack, run_load, running_stack, until_decided
from rich.console import Console
from rich.table import Table

CONNECTIONS = (1, 64)
CHUNKS = 18
"""Of a stream: 16 tokens, the usage, the end."""
IDLE_CONNECTIONS = 500


def summary(loads: list[Load], seconds: float) -> dict[str, float]:
    latencies = sorted(x for load in loads for x in load.latencies_s)
    p50s = [statistics.median(load.latencies_s) for load in loads]
    first_bytes = [x for load in loads for x in load.first_bytes_s]
    return {
        "p50_ms": 1e3 * statistics.median(latencies),
        "p50_best_round_ms": 1e3 * min(p50s),
        "p99_ms": 1e3 * latencies[int(0.99 * (len(latencies) - 1))],
        "first_byte_p50_ms": 1e3 * statistics.median(first_bytes),
        "requests_s": len(latencies) / (seconds * len(loads)),
        "failed": sum(len(load.lost) + load.broken for load in loads),
    }


async def compare(
    stack: Stack, connections: int, stream: bool, rounds: int, seconds: float
) -> dict[str, Any]:
    mock_port = int(stack.members[0].address.rpartition(":")[2])
    loads: dict[str, list[Load]] = {"direct": [], "gateway": []}
    spent_s = {"envoy": 0.0, "picker": 0.0}
    for _ in range(rounds):
        loads["direct"].append(await run_load(mock_port, connections, seconds, stream))
        before = {name: stack.cpu_s(name) for name in spent_s}
        loads["gateway"].append(await run_load(stack.port, connections, seconds, stream))
        await asyncio.sleep(0.2)  # the access log comes a moment later
        for name, cpu_s in before.items():
            spent_s[name] += stack.cpu_s(name) - cpu_s
    told: dict[str, Any] = {name: summary(found, seconds) for name, found in loads.items()}
    requests = sum(len(load.latencies_s) for load in loads["gateway"])
    compared = ("p50_ms", "p50_best_round_ms", "p99_ms", "first_byte_p50_ms")
    added = {k: told["gateway"][k] - told["direct"][k] for k in compared}
    cpu_ms = {name: 1e3 * cpu_s / requests for name, cpu_s in spent_s.items()}
    about = {"connections": connections, "stream": stream}
    return {**about, **told, "added": added, "cpu_ms_per_request": cpu_ms}


async def idle_bytes(stack: Stack) -> float:
    """Return what an idle connection of a client costs Envoy in memory [bytes]."""
    before = stack.memory_bytes("envoy")
    writers = [
        (await asyncio.open_connection("127.0.0.1", stack.port))[1] for _ in range(IDLE_CONNECTIONS)
    ]
    await asyncio.sleep(1.0)
    more = stack.memory_bytes("envoy") - before
    for writer in writers:
        writer.close()
    return more / IDLE_CONNECTIONS


async def kill_picker(stack: Stack, connections: int = 16, seconds: float = 8.0) -> dict[str, Any]:
    """Kill the picker under load and start it again; tell what was lost and when decisions resumed."""
    running = asyncio.create_task(run_load(stack.port, connections, seconds))
    await asyncio.sleep(seconds / 4)
    stack.kill("picker")
    await asyncio.sleep(seconds / 8)
    stack.start_picker()
    restarted_s = time.monotonic()
    await until_decided(stack)
    back_s = time.monotonic() - restarted_s
    load = await running
    return {
        "requests": len(load.latencies_s),
        "failed": len(load.lost) + load.broken,
        "failures": sorted(set(load.lost))[:5],
        "decided_by_picker": load.decided,
        "picker_back_after_s": back_s,
    }


async def measure(rounds: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, running_stack(Path(directory)) as stack:
        await until_decided(stack)
        await run_load(stack.port, 16, 1.0)  # warm connections
        load_before = os.getloadavg()[0]
        pairs = [
            await compare(stack, n, stream, rounds, seconds)
            for stream in (False, True)
            for n in CONNECTIONS
        ]
        per_connection = await idle_bytes(stack)
        killed = await kill_picker(stack)
    about = {
        "cores": os.cpu_count(),
        "load_average_before": load_before,
        "rounds": rounds,
        "seconds": seconds,
    }
    return {
        "machine": about,
        "pairs": pairs,
        "bytes_per_idle_connection": per_connection,
        "picker_killed": killed,
    }


def show(told: dict[str, Any]) -> None:
    console = Console(width=110)
    machine = told["machine"]
    table = Table(
        title=f"{machine['cores']} cores, load average {machine['load_average_before']:.1f} before, "
        f"{machine['rounds']} rounds of {machine['seconds']:g} s each way"
    )
    columns = ("answers", "conn.", "way", "p50 ms", "best p50", "p99 ms", "first byte", "req/s")
    columns += ("failed",)
    columns += ("Envoy CPU ms", "picker CPU ms")
    for column in columns:
        table.add_column(column, justify="right")
    for pair in told["pairs"]:
        for way in ("direct", "gateway"):
            row = pair[way]
            cpu = pair["cpu_ms_per_request"] if way == "gateway" else {}
            names = ("p50_ms", "p50_best_round_ms", "p99_ms", "first_byte_p50_ms")
            figures = [f"{row[k]:.2f}" for k in names]
            spent = [f"{cpu[name]:.3f}" if name in cpu else "" for name in ("envoy", "picker")]
            counts = f"{row['requests_s']:,.0f}", f"{row['failed']:.0f}"
            kind = "streams" if pair["stream"] else "plain"
            table.add_row(kind, str(pair["connections"]), way, *figures, *counts, *spent)
        added = (f"{v:+.2f}" for v in pair["added"].values())
        table.add_row("", "", "added", *added, end_section=True)
    console.print(table)
    streams = [pair["cpu_ms_per_request"] for pair in told["pairs"] if pair["stream"]]
    per_chunk = ", ".join(f"{1e3 * sum(cpu.values()) / CHUNKS:.0f}" for cpu in streams)
    console.print(
        f"CPU per streamed chunk: {per_chunk} us. "
        f"An idle connection holds {told['bytes_per_idle_connection'] / 1024:.0f} KiB in Envoy."
    )
    killed = told["picker_killed"]
    console.print(
        f"Picker killed with -9 under load: {killed['failed']} of {killed['requests']:,} requests lost "
        f"{killed['failures'] or ''}; started again, it decided after {killed['picker_back_after_s']:.1f} s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures here; - for standard output"
    )
    chosen = parser.parse_args()
    told = uvloop.run(measure(chosen.rounds, chosen.seconds))
    if chosen.json == "-":
        print(json.dumps(told, indent=2))
        return
    show(told)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
