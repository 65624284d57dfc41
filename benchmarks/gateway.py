"""What the gateway costs: the same mock replica, reached directly and through Envoy and the picker.

    python benchmarks/gateway.py [--rounds 5] [--seconds 2] [--beside NAME=VENV]... [--lua] [--at-once] [--json FILE|-]

Direct and gateway take turns within each round, so that other work on the machine hits both; so do
routers that are named with `--beside` (`other_routers.py` tells which), with `--lua` an Envoy that
decides by itself (`lua_gateway.py`), and with `--at-once` one that keeps no headers back. CPU is what
the kernel charged to each process, divided by the requests that it carried; a stream has 18 chunks,
which come at once, or `paced`, one every 5 ms.
Last the picker is killed with -9 under load and started again, and every answer is counted.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop
from gateway_stack import Load, Stack, run_load, running_stack, until_decided
from lua_gateway import deciding_by_itself
from other_routers import COMMANDS, running_routers, until_answered
from rich.console import Console
from rich.table import Table
from second_envoy import headers_at_once, running_envoy

CONNECTIONS = (1, 64)
CHUNKS = 18
"""Of a stream: 16 tokens, the usage, the end."""
EACH_S = 0.005
"""From one token to the next of a stream that is paced, so that each travels alone."""
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
        "failed": sum(load.failed for load in loads),
    }


class Way(NamedTuple):
    """A way to the replicas, and the processes on it."""

    name: str
    port: int
    processes: Mapping[str, int] = {}
    """Process ids by name; their children count with them."""

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU time that its processes have used."""
        return {name: _cpu_s(pid) for name, pid in self.processes.items()}


def _cpu_s(pid: int) -> float:
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def compare(
    ways: Sequence[Way], connections: int, stream: bool, rounds: int, seconds: float
) -> dict[str, Any]:
    """Load all ways in turns; the first is the direct one."""
    loads: dict[str, list[Load]] = {way.name: [] for way in ways}
    spent_s: dict[str, dict[str, float]] = {
        way.name: dict.fromkeys(way.processes, 0.0) for way in ways
    }
    for _ in range(rounds):
        for way in ways:
            before = way.cpu_s()
            loads[way.name].append(await run_load(way.port, connections, seconds, stream))
            await asyncio.sleep(0.2)  # the access log comes a moment later
            for name, cpu_s in way.cpu_s().items():
                spent_s[way.name][name] += cpu_s - before[name]
    told = {name: summary(found, seconds) for name, found in loads.items()}
    direct = told[ways[0].name]
    compared = ("p50_ms", "p50_best_round_ms", "p99_ms", "first_byte_p50_ms")
    return {
        "connections": connections,
        "stream": stream,
        "ways": {
            name: {
                **figures,
                "added": {k: figures[k] - direct[k] for k in compared},
                "cpu_ms_per_request": {
                    process: 1e3 * cpu_s / max(sum(len(x.latencies_s) for x in loads[name]), 1)
                    for process, cpu_s in spent_s[name].items()
                },
            }
            for name, figures in told.items()
        },
    }


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
        "failed": load.failed,
        "failures": sorted(set(load.lost))[:5],
        "decided_by_picker": load.decided,
        "picker_back_after_s": back_s,
    }


async def measure(
    rounds: int, seconds: float, beside: Sequence[tuple[str, Path]], lua: bool, at_once: bool
) -> dict[str, Any]:
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        stack = running.enter_context(running_stack(folder))
        await until_decided(stack)
        await run_load(stack.port, 16, 1.0)  # warm connections
        replicas = [f"http://{member.address}" for member in stack.members]
        routers = running.enter_context(running_routers(beside, replicas, folder))
        pids = {name: stack.processes[name].pid for name in ("envoy", "picker")}
        ways = [
            Way("direct", int(stack.members[0].address.rpartition(":")[2])),
            Way("gateway", stack.port, pids),
        ]
        if lua:
            alone = deciding_by_itself(stack.members)
            own = running.enter_context(running_envoy("lua", folder, stack, alone))
            ways.append(Way("in Envoy", own.port, {"envoy": own.pid}))
        if at_once:
            own = running.enter_context(running_envoy("at-once", folder, stack, headers_at_once))
            ways.append(Way("headers at once", own.port, {**pids, "envoy": own.pid}))
        for router in routers:
            await until_answered(router, folder)
            ways.append(Way(router.name, router.port, {router.name: router.process.pid}))
        for way in ways[2:]:
            await run_load(way.port, 16, 1.0)
        load_before = os.getloadavg()[0]
        pairs = [
            await compare(ways, n, stream, rounds, seconds)
            for stream in (False, True)
            for n in CONNECTIONS
        ]
        for member in stack.members:
            stack.tell(member, f"each/{EACH_S}")
        paced = await compare(ways, CONNECTIONS[-1], True, rounds, seconds)
        pairs.append({**paced, "paced": True})
        for member in stack.members:
            stack.tell(member, "each/0")
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
    console = Console(width=140)
    machine = told["machine"]
    table = Table(
        title=f"{machine['cores']} cores, load average {machine['load_average_before']:.1f} before, "
        f"{machine['rounds']} rounds of {machine['seconds']:g} s each way"
    )
    for column in (
        "answers",
        "conn.",
        "way",
        "p50 ms",
        "p99 ms",
        "added p50",
        "best",
        "first byte",
    ):
        table.add_column(column, justify="right")
    for column in ("req/s", "failed", "CPU ms a request"):
        table.add_column(column, justify="right")
    for pair in told["pairs"]:
        kind = "paced" if "paced" in pair else "streams" if pair["stream"] else "plain"
        for way, row in pair["ways"].items():
            added = row["added"]
            gained = (
                f"{added[k]:+.2f}" for k in ("p50_ms", "p50_best_round_ms", "first_byte_p50_ms")
            )
            cpu = " + ".join(f"{ms:.2f} {of}" for of, ms in row["cpu_ms_per_request"].items())
            table.add_row(
                kind, str(pair["connections"]), way, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}",
                *gained, f"{row['requests_s']:,.0f}", f"{row['failed']:.0f}", cpu,
            )  # fmt: skip
        table.add_section()
    console.print(table)
    plain, paced = (
        {way: sum(row["cpu_ms_per_request"].values()) for way, row in pair["ways"].items()}
        for pair in (told["pairs"][len(CONNECTIONS) - 1], told["pairs"][-1])
    )
    chunks = {way: 1e3 * (paced[way] - plain[way]) / CHUNKS for way in plain if way != "direct"}
    console.print(
        f"CPU per streamed chunk at {CONNECTIONS[-1]}, over that of a plain request: "
        f"{', '.join(f'{way} {us:.0f} us' for way, us in chunks.items())}."
    )
    console.print(
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
        "--beside",
        action="append",
        default=[],
        metavar="NAME=VENV",
        help=f"measure another router, too: {', '.join(COMMANDS)}",
    )
    parser.add_argument("--lua", action="store_true", help="measure an Envoy that decides, too")
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="measure an Envoy that keeps no headers back until the first byte, too",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures here; - for standard output"
    )
    chosen = parser.parse_args()
    beside = [(name, Path(venv)) for name, _, venv in (b.partition("=") for b in chosen.beside)]
    if unknown := {name for name, _ in beside} - set(COMMANDS):
        raise SystemExit(f"--beside knows {', '.join(COMMANDS)}, not {', '.join(unknown)}.")
    told = uvloop.run(measure(chosen.rounds, chosen.seconds, beside, chosen.lua, chosen.at_once))
    if chosen.json == "-":
        print(json.dumps(told, indent=2))
        return
    show(told)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
