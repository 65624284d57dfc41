"""A long run at a fixed rate while replicas come and go: nothing is lost, and no process grows."""

import asyncio
import itertools
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from gateway_stack import PROMPT
from rich.console import Console
from rich.table import Table
from scipy import stats
from serve_stack import Serving, serving

REPLICAS = 4
CHANGE_EVERY_S = 20.0
"""A replica goes, and comes back half of this later."""
SAMPLES = 120
WARM_UP = 0.25
"""Share of the run that is left out of the slopes: caches fill, ratios are learned."""
MIB = 1 << 20


@dataclass
class Growth:
    """How a process's memory went [MiB], and how fast it grew after the warm-up, with a 95 % interval."""

    process: str
    first_mib: float
    last_mib: float
    mib_per_hour: float
    low: float
    high: float


class Counts:
    """What became of the requests."""

    def __init__(self) -> None:
        self.answered, self.refused, self.late = 0, 0, 0
        self.lost: list[str] = []


async def soak(folder: Path, seconds: float, rate_rps: float) -> dict[str, Any]:
    counts = Counts()
    with serving(folder, "--window", "5", replicas=REPLICAS) as instance:
        instance.tell("delay/0.02")
        began_s = time.monotonic()
        samples: list[tuple[float, dict[str, float]]] = []
        changes = asyncio.create_task(_come_and_go(instance))
        watching = asyncio.create_task(_watch(instance, samples, began_s, seconds / SAMPLES))
        await _send(instance.port, seconds, rate_rps, counts)
        for task in (changes, watching):
            task.cancel()
        restarts = [line for line in instance.log().splitlines() if "started again" in line]
    growths = [_growth(name, samples, seconds) for name in samples[-1][1]]
    _show(growths, counts, seconds, len(restarts))
    return {
        "soak_s": seconds,
        "rate_rps": rate_rps,
        "answered": counts.answered,
        "late": counts.late,
        "lost": len(counts.lost),
        "why_lost": sorted(set(counts.lost))[:5],
        "restarts": len(restarts),
        "why_restarted": sorted(set(restarts))[:5],
        "memory": [asdict(growth) for growth in growths],
    }


async def _send(port: int, seconds: float, rate_rps: float, counts: Counts) -> None:
    """Send at the rate, whatever comes back; every third request asks for a stream."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    loop, running = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        began_s = loop.time()
        for number in itertools.count():
            due_s = began_s + number / rate_rps
            if due_s > began_s + seconds:
                break
            wait_s = due_s - loop.time()
            counts.late += wait_s < -1.0
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.create_task(_ask(session, port, number, counts))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running, return_exceptions=True)


async def _ask(session: aiohttp.ClientSession, port: int, number: int, counts: Counts) -> None:
    messages = [{"role": "user", "content": f"{number % 997} {PROMPT}"}]
    body = {"model": "m", "messages": messages, "max_tokens": 16, "stream": number % 3 == 0}
    try:
        async with session.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json=body,
            headers={"x-session-id": str(number % 5003)},
        ) as answer:
            await answer.read()
            if answer.status == 200:
                counts.answered += 1
            else:
                counts.lost.append(f"status {answer.status}")
    except (aiohttp.ClientError, TimeoutError) as error:
        counts.lost.append(type(error).__name__)


async def _come_and_go(instance: Serving) -> None:
    ports = list(instance.mocks)
    for port in itertools.cycle(ports):
        await asyncio.sleep(CHANGE_EVERY_S / 2)
        instance.stop_mock(port)
        await asyncio.sleep(CHANGE_EVERY_S / 2)
        instance.start_mock(port)
        await asyncio.sleep(1.0)
        instance.tell("delay/0.02")


async def _watch(
    instance: Serving, samples: list[tuple[float, dict[str, float]]], began_s: float, every_s: float
) -> None:
    while True:
        await asyncio.sleep(every_s)
        samples.append((time.monotonic() - began_s, _memory(instance)))


def _memory(instance: Serving) -> dict[str, float]:
    words = {"envoy": "_bin/envoy", "picker": "gateway.picker", "controller": "orchestrator.controller"}  # fmt: skip
    found = {name: instance.children(word) for name, word in words.items()}
    own = {"supervisor": [psutil.Process(instance.process.pid)], **found}
    return {name: sum(p.memory_info().rss for p in these) / MIB for name, these in own.items()}


def _growth(name: str, samples: list[tuple[float, Mapping[str, float]]], seconds: float) -> Growth:
    """Fit a robust line (Theil and Sen) through the memory after the warm-up."""
    kept = [(at, told[name]) for at, told in samples if at >= WARM_UP * seconds and name in told]
    hours, mib = np.array([at / 3600 for at, _ in kept]), np.array([m for _, m in kept])
    fit = stats.theilslopes(mib, hours, 0.95)
    return Growth(
        name, samples[0][1][name], float(mib[-1]), fit.slope, fit.low_slope, fit.high_slope
    )


def _show(growths: list[Growth], counts: Counts, seconds: float, restarts: int) -> None:
    table = Table()
    for column in ("process", "first MiB", "last MiB", "MiB an hour", "95 % interval"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for g in growths:
        between = f"{g.low:+.1f} to {g.high:+.1f}"
        table.add_row(
            g.process, f"{g.first_mib:.0f}", f"{g.last_mib:.0f}", f"{g.mib_per_hour:+.1f}", between
        )
    console = Console(file=sys.stderr, width=110)
    console.print(table)
    console.print(
        f"{seconds:.0f} s: {counts.answered:,} answered, {len(counts.lost)} lost, "
        f"{counts.late} sent more than 1 s late, {restarts} processes started again"
    )
