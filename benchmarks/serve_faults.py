"""What is lost when the machine under `serve` is in trouble: disk, telemetry file, clock. And a soak.

    python benchmarks/serve_faults.py [FAULT]... [--seconds 24] [--json FILE|-]
    python benchmarks/serve_faults.py soak --seconds 3600 [--rate 200]

Each fault is done for real to a whole instance under load (16 clients, half of them with streams,
three mock replicas of 20 ms). Counted are, beside requests, windows that are missing from the
telemetry. `disk-full` fills a file system of its own (and needs root, to mount it), `clock-step`
needs gcc. `soak` sends requests at a fixed rate while replicas come and go, and tells by how much
the memory of each process grows.
"""

import argparse
import asyncio
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import uvloop
from faults import Outcome, show
from gateway_stack import Load, run_load
from serve_stack import Serving, serving
from soak import soak

DISK_BYTES = 96 << 20
SETTLE_S, RECORD_S = 2.0, 60.0
MISSING = (
    "select count(*) from range((select min(window_id) from windows)::bigint, "
    "(select max(window_id) from windows)::bigint) as r(w) "
    "where w not in (select window_id from windows)"
)


class Scene:
    """An instance under load, and what surrounds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.environment: dict[str, str] = {}
        self.serving: Serving
        self.note = ""


Fault = Callable[[Scene, float], Awaitable[None]]
FAULTS: dict[str, tuple[Fault, Callable[[Scene], Any]]] = {}


@contextmanager
def nothing_special(_: Scene) -> Iterator[None]:
    yield


def fault(around: Callable[[Scene], Any] = nothing_special) -> Callable[[Fault], Fault]:
    """Name a fault; `around` prepares what it needs before the instance starts."""

    def named(act: Fault) -> Fault:
        FAULTS[act.__name__.replace("_", "-")] = act, around
        return act

    return named


@fault()
async def nothing(_: Scene, __: float) -> None:
    """Go on undisturbed, to compare with."""


@fault()
async def controller_killed(scene: Scene, _: float) -> None:
    """Kill the controller with -9; its parent starts it again."""
    scene.serving.controller().kill()


@contextmanager
def small_disk(scene: Scene) -> Iterator[None]:
    scene.data_dir.mkdir()
    where = str(scene.data_dir)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", where], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


@fault(small_disk)
async def disk_full(scene: Scene, seconds: float) -> None:
    """Fill the telemetry's file system to the last byte, and make room again."""
    filler = scene.data_dir / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            scene.note = f"{filler.stat().st_size >> 20} MiB written, then: {error.strerror}"
    await asyncio.sleep(seconds)
    filler.unlink()


@fault()
async def telemetry_locked(scene: Scene, seconds: float) -> None:
    """Kill the controller, and have somebody else hold its file while it wants to start again."""
    file = scene.data_dir / "telemetry.duckdb"
    scene.serving.controller().kill()
    deadline_s = time.monotonic() + 5.0
    while True:
        try:
            holder = duckdb.connect(str(file))
            break
        except duckdb.Error:
            if time.monotonic() > deadline_s:
                scene.note = "the file could not be held: the controller was faster"
                return
            await asyncio.sleep(0.005)
    await asyncio.sleep(seconds)
    holder.close()


@contextmanager
def settable_clock(scene: Scene) -> Iterator[None]:
    library, offset = scene.folder / "clock_shim.so", scene.folder / "offset"
    source = Path(__file__).with_name("clock_shim.c")
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    offset.write_bytes(struct.pack("d", 0.0))
    scene.environment = {"LD_PRELOAD": str(library), "CLOCK_SHIM": str(offset)}
    yield


@fault(settable_clock)
async def clock_step(scene: Scene, seconds: float) -> None:
    """Set the wall clock of all processes an hour forth, and later two hours back."""
    offset = scene.folder / "offset"
    for hours in (1.0, -1.0):
        with offset.open("r+b") as file:
            file.write(struct.pack("d", 3600.0 * hours))
        await asyncio.sleep(seconds / 2)


async def play(name: str, clients: int, seconds: float) -> Outcome:
    act, around = FAULTS[name]
    with tempfile.TemporaryDirectory() as directory:
        scene = Scene(Path(directory))
        with (
            around(scene),
            serving(
                scene.folder, data_dir=scene.data_dir, environment=scene.environment
            ) as instance,
        ):
            scene.serving = instance
            instance.tell("delay/0.02")
            return await under_load(name, act, scene, clients, seconds)


async def under_load(name: str, act: Fault, scene: Scene, clients: int, seconds: float) -> Outcome:
    instance, plain, streams = scene.serving, Load(), Load()
    began_s = time.perf_counter()
    loads = asyncio.gather(
        run_load(instance.port, clients // 2, seconds, False, plain),
        run_load(instance.port, clients // 2, seconds, True, streams),
    )
    await asyncio.sleep(seconds / 4)
    at_s = time.perf_counter()
    await act(scene, seconds / 4)
    await loads
    both, end_s = (plain, streams), began_s + seconds
    answered = sum(len(load.latencies_s) for load in both)
    await asyncio.sleep(5.0)  # until the last windows are settled
    recorded = await until_recorded(instance, answered)
    (missing,), *_ = await instance.until_asked(MISSING)
    counts = f"{missing} windows missing, {recorded:,} requests recorded"
    return Outcome(
        fault=name,
        answered=answered,
        lost=sum(len(load.lost) for load in both),
        broken=sum(load.broken for load in both),
        errors=sum(len(load.errors) for load in both),
        rate_before=sum(load.rate(began_s + 0.5, at_s) for load in both),
        rate_after=sum(load.rate(at_s + SETTLE_S, end_s) for load in both),
        note="; ".join(filter(None, (counts, scene.note))),
        why_lost=sorted({why for load in both for why in load.lost})[:4],
    )


async def until_recorded(instance: Serving, answered: int) -> int:
    """Return how many requests are recorded once all are, or after a minute."""
    deadline_s = time.monotonic() + RECORD_S
    while True:
        (recorded,), *_ = await instance.until_asked("select count(*) from requests")
        if recorded >= answered or time.monotonic() > deadline_s:
            return recorded
        await asyncio.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", nargs="*")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second of the soak")
    parser.add_argument("--json", metavar="FILE")
    chosen = parser.parse_args()
    if unknown := set(chosen.fault) - {*FAULTS, "soak"}:
        known = ", ".join((*FAULTS, "soak"))
        sys.exit(f"There is no fault {', '.join(sorted(unknown))}; there are {known}.")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    told: list[Any] = []
    if "soak" in chosen.fault:
        with tempfile.TemporaryDirectory() as directory:
            told.append(uvloop.run(soak(Path(directory), chosen.seconds, chosen.rate)))
    names = [name for name in chosen.fault or FAULTS if name != "soak"]
    outcomes = [uvloop.run(play(name, chosen.clients, chosen.seconds)) for name in names]
    told += [asdict(one) for one in outcomes]
    if outcomes and chosen.json != "-":
        show(outcomes)
    if chosen.json:
        text = json.dumps(told, indent=2)
        sys.stdout.write(text + "\n") if chosen.json == "-" else Path(chosen.json).write_text(text)


if __name__ == "__main__":
    main()
