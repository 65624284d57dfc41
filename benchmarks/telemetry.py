"""What telemetry costs, and how fast it answers: a year of windows, and an instance under load.

    python benchmarks/telemetry.py year [--windows 3153600] [--keep FILE]
    python benchmarks/telemetry.py serving [--rate 500] [--seconds 60]

`year` fills a telemetry file with windows of 10 s (and the detail that its retention keeps), then asks
every ready query of docs/telemetry.md. `serving` starts an instance with simulated replicas, sends it
requests at a rate, and meanwhile measures queries, the page in headless Chromium, and the CPU of the
control plane (Envoy, picker and controller); the part of telemetry is what writing the same windows costs
a process that does nothing else.
"""

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb
import psutil
from rich.console import Console
from rich.table import Table

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.orchestrator.catalogue import add_seeds
from autopoiesis.replicas.fleet import free_ports
from autopoiesis.telemetry.records import (
    ArmEstimate,
    CellRow,
    RequestRecord,
    Status,
    TwinErrorRow,
    WindowRow,
)
from autopoiesis.telemetry.store import Store

DOCUMENT = Path(__file__).parents[1] / "docs" / "telemetry.md"
WINDOW_S = 10.0
REPLICAS = 4
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu"]
ASKED = "select * from window_summary order by window_id desc limit 20"

out = Console()


def ready_queries() -> list[tuple[str, str]]:
    """Return the queries of the document, each with the line above it."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(r"\n([^\n]+):\n\n```sql\n(.*?)```", text, re.DOTALL)


# --- a year -----------------------------------------------------------------------------------

YEAR = Path(__file__).with_name("telemetry_year.sql")


def fill_a_year(file: Path, windows: int, requests: int) -> None:
    """Write what an instance leaves behind: rows as it writes them, in their order."""
    with Store.open(file) as store:
        add_seeds(Registry(store))
    text = YEAR.read_text().format(
        start=time.time() - windows * WINDOW_S,
        windows=windows,
        window_s=WINDOW_S,
        requests=requests,
        kept_windows=min(windows, int(168 * 3600 / WINDOW_S)),
    )
    with duckdb.connect(str(file)) as connection:
        connection.execute(
            "create temp table arms_there as select list(id order by id) as arms from arms"
        )
        for statement in connection.extract_statements(text):
            connection.execute(statement)


def year(windows: int, requests: int, keep: Path | None) -> dict[str, float]:
    """Measure the ready queries on a year of windows; return the median of each [s]."""
    with tempfile.TemporaryDirectory() as folder:
        file = keep or Path(folder) / "telemetry.duckdb"
        if not file.exists():
            fill_a_year(file, windows, requests)
        with Store.open(file) as store:
            counted = "select count(*) from"
            rows = {
                t: store.query(f"{counted} {t}", timeout_s=60).rows[0][0]
                for t in ("windows", "cells", "arm_estimates", "requests", "replicas")
            }
            title = ", ".join(f"{n:,} {t}" for t, n in rows.items())
            table = Table(title=f"{title}; {file.stat().st_size / 2**30:.2f} GiB")
            for name in ("query", "median [ms]", "worst of 5 [ms]"):
                table.add_column(name, justify="left" if name == "query" else "right")
            medians: dict[str, float] = {}
            for name, query in ready_queries():
                times = [store.query(query, timeout_s=120).seconds for _ in range(5)]
                medians[name] = statistics.median(times)
                table.add_row(name, f"{1e3 * medians[name]:.0f}", f"{1e3 * max(times):.0f}")
    out.print(table)
    return medians


# --- an instance under load --------------------------------------------------------------------


@contextmanager
def instance(folder: Path) -> Iterator[tuple[psutil.Process, int, int]]:
    """Run `serve` with simulated replicas; yield its process and its two ports."""
    port, control_port = free_ports(2)
    log = folder / "serve.log"
    command = [sys.executable, "-m", "autopoiesis", "serve", "--simulate", str(REPLICAS), "--synthesizer", "none",
               "--port", str(port), "--control-port", str(control_port)]  # fmt: skip
    with log.open("wb") as told:
        process = subprocess.Popen(command, cwd=folder, stdout=told, stderr=told)
    try:
        while "control API" not in log.read_text():
            if process.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.2)
        yield psutil.Process(process.pid), port, control_port
    finally:
        process.terminate()
        process.wait(60)


async def send(port: int, rate: float, seconds: float) -> int:
    """Send short completions at a rate, over kept connections; return how many were answered."""
    body = json.dumps({"model": "simulated", "prompt": "the sea " * 200, "max_tokens": 1}).encode()
    head = ("POST /v1/completions HTTP/1.1", "host: l", "content-type: application/json",
            f"content-length: {len(body)}", "\r\n")  # fmt: skip
    request = "\r\n".join(head).encode() + body
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    answered = 0

    async def one() -> None:
        nonlocal answered
        reader, writer = (
            free.get_nowait() if free.qsize() else await asyncio.open_connection("127.0.0.1", port)
        )
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if length:
            await reader.readexactly(int(length[1]))
        answered += head.startswith(b"HTTP/1.1 200")
        free.put_nowait((reader, writer))

    began = time.perf_counter()
    running: set[asyncio.Task[None]] = set()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        task = asyncio.create_task(one())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running, return_exceptions=True)
    return answered


def cpu_s(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Return the CPU time that each has used [s]."""
    return {name: sum(p.cpu_times()[:2]) for name, p in processes.items()}


def control_plane(parent: psutil.Process) -> dict[str, psutil.Process]:
    """Return Envoy, the picker and the controller."""
    words = {"envoy": "envoy", "gateway.picker": "picker", "orchestrator.controller": "controller"}
    found: dict[str, psutil.Process] = {}
    for child in parent.children(recursive=True):
        line = " ".join(child.cmdline())
        found |= {name: child for word, name in words.items() if word in line and name not in found}
    return found


def simulated(parent: psutil.Process) -> list[psutil.Process]:
    """Return the simulated replicas."""
    return [
        child for child in parent.children() if "replicas.simulated" in " ".join(child.cmdline())
    ]


def asked(control_port: int, times: int) -> list[float]:
    """Put a query again and again; return how long each answer took [s]."""
    body = json.dumps({"query": ASKED}).encode()
    url = f"http://127.0.0.1:{control_port}/sql"
    took: list[float] = []
    for _ in range(times):
        post = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        began = time.perf_counter()
        with closing(urllib.request.urlopen(post)) as answer:
            answer.read()
        took.append(time.perf_counter() - began)
        time.sleep(0.05)
    return took


def first_paints(control_port: int, times: int) -> list[float]:
    """Open the page in fresh contexts; return when its first content was painted [s]."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    paints: list[float] = []
    with sync_playwright() as playing:
        browser = playing.chromium.launch(
            executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS
        )
        for _ in range(times):
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{control_port}")
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            entry = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            paints.append(page.evaluate(entry) / 1e3)
            context.close()
        browser.close()
    return paints


def writing_cpu_s(rate: float, windows: int = 20) -> float:
    """Return the CPU time that writing one window of so many requests takes, checkpoints included [s]."""
    arms = [arm.id for arm in seed_arms()]
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "telemetry.duckdb")
        made = [_window(number, arms, int(rate * WINDOW_S)) for number in range(windows + 1)]
        store.write_window(**made[0])
        began = time.process_time()
        for each in made[1:]:
            store.write_window(**each)
        store.close()
        return (time.process_time() - began) / windows


def _window(number: int, arms: list[str], requests: int) -> dict[str, object]:
    start = 1.79e9 + number * WINDOW_S
    cells = tuple(
        Cell(arm, (f"r{2 * i}", f"r{2 * i + 1}"), tuple(range(32 * i, 32 * i + 32)), 0.5)
        for i, arm in enumerate(arms[:2])
    )
    return {
        "window": WindowRow(number, start, start + WINDOW_S, {"slo_ttft_s": 1.0}, {"rate": 500.0}, requests, requests,
                            0, 0, 9.0, 0.2, 0.9, 0.02, 0.05, 9.0, 0.8, 0.01, 0.0, 0.05, "", 0.5),
        "cells": [CellRow(number, i, c.arm_id, c.replicas, 32, 0.5, requests // 2, requests // 2, 0, 0, 0, 1, 1, 0.2,
                          0.9, 0.02, 9.0, 0.8, 20.0) for i, c in enumerate(cells)],
        "requests": [
            RequestRecord(f"{number}-{i}", start + i / 500, "/v1/chat/completions", "m", Status.COMPLETED, 200,
                          arms[i % 2], number, i % 64, i * 7919, f"r{i % 4}", 1, True, 900, 200, 512, 256, True, 0.0,
                          0.0, 0.0003, 0.2, 4.0, tuple(range(i, i + 56)))
            for i in range(requests)
        ],
        "estimates": [ArmEstimate(arm, 0.8, None, 0.8, 0.8, 0.02, 0.06) for arm in arms],
        "allocation": Allocation(number + 1, cells),
        "twin_errors": [TwinErrorRow(number, "ttft_mean_s", 0.5, 0.5)],
    }  # fmt: skip


def serving(rate: float, seconds: float) -> dict[str, float]:
    """Measure an instance under load; return the figures."""
    with (
        tempfile.TemporaryDirectory() as folder,
        instance(Path(folder)) as (process, port, control),
    ):
        parts = control_plane(process)
        asyncio.run(send(port, rate, 5.0))
        before, began = cpu_s(parts), time.perf_counter()
        answered = asyncio.run(send(port, rate, seconds))
        wall_s = time.perf_counter() - began
        used = {name: after - before[name] for name, after in cpu_s(parts).items()}
        loaded = subprocess.Popen(
            [sys.executable, __file__, "load", str(port), str(rate), "40"],
            stdout=subprocess.DEVNULL,
        )
        for elsewhere in (psutil.Process(loaded.pid), *simulated(process)):
            elsewhere.nice(10)  # users and GPUs are other machines
        time.sleep(2)
        queries = asked(control, 200)
        paints = first_paints(control, 5)
        loaded.terminate()
        loaded.wait()
    wrote_s = writing_cpu_s(answered / wall_s)
    total_s = sum(used.values()) / wall_s * WINDOW_S
    figures = {
        "answered_rps": answered / wall_s,
        **{f"{name}_cpu_ms_per_window": 1e3 * s / wall_s * WINDOW_S for name, s in used.items()},
        "telemetry_cpu_ms_per_window": 1e3 * wrote_s,
        "telemetry_share": wrote_s / total_s,
        "sql_p50_ms": 1e3 * statistics.median(queries),
        "sql_p99_ms": 1e3 * statistics.quantiles(queries, n=100)[98],
        "first_paint_ms": 1e3 * statistics.median(paints),
    }
    table = Table(title=f"Under {rate:g} requests a second")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    out.print(table)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_year = commands.add_parser("year")
    of_year.add_argument("--windows", type=int, default=365 * 24 * 360)
    of_year.add_argument("--requests", type=int, default=3_000_000)
    of_year.add_argument("--keep", type=Path, help="make this file, or use it if it is there")
    of_serving = commands.add_parser("serving")
    of_serving.add_argument("--rate", type=float, default=500.0)
    of_serving.add_argument("--seconds", type=float, default=60.0)
    of_load = commands.add_parser("load")
    for name, kind in (("port", int), ("rate", float), ("seconds", float)):
        of_load.add_argument(name, type=kind)
    given = parser.parse_args()
    if given.command == "year":
        year(given.windows, given.requests, given.keep)
    elif given.command == "serving":
        serving(given.rate, given.seconds)
    else:
        asyncio.run(send(given.port, given.rate, given.seconds))


if __name__ == "__main__":
    main()
