"""What clients lose when something fails: each fault is done for real, under load, and counted.

    python benchmarks/faults.py [FAULT]... [--clients 16] [--seconds 8] [--json FILE|-]

Half of the clients ask for streams, half for answers in one piece; each asks again as soon as it was
answered. Replicas are mocks that answer after 20 ms. `lost` are requests that no replica answered,
`broken` answers that ended too early, `errors` a replica's own, passed on; the rate is compared before
the fault and from 2 s after it on. Without names all faults are tried (`--list` tells them).
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop
from gateway_stack import Load, Stack, request_bytes, run_load, running_stack, until_decided
from rich.console import Console
from rich.table import Table

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway import envoy
from autopoiesis.gateway.link import Allocate, PickerLink
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir

DELAY_S = 0.02
EACH_S = 0.01
"""From token to token where streams break between them."""
SETTLE_S = 2.0
"""From so long after a fault the rate is measured."""
HANGS_S = 5.0
"""Who waited for longer, hung."""
OPEN_CONNECTIONS = 10_000
EXTREME = "def score(request, replica, fleet):\n    return 0.0 / (replica.in_flight - replica.in_flight)\n"
"""A policy that divides by zero at every decision."""


@dataclass
class Outcome:
    """What one fault did."""

    fault: str
    answered: int
    lost: int
    broken: int
    errors: int
    rate_before: float
    """Answers per second."""
    rate_after: float
    note: str
    why_lost: list[str]


class Scene:
    """A gateway under load, in which one thing goes wrong."""

    def __init__(self, stack: Stack, seconds: float) -> None:
        self.stack = stack
        self.plain, self.streams = Load(), Load()
        self.seconds = seconds
        self.at_s = 0.0
        """When it went wrong, on the performance counter."""
        self.note = ""
        self.writers: list[asyncio.StreamWriter] = []
        """Connections that stay open until the end."""

    def share_of(self, name: str) -> float:
        """Return a replica's share of the answers since the rate is measured."""
        since_s = self.at_s + SETTLE_S
        counts = self.plain.shares(since_s) + self.streams.shares(since_s)
        return counts[name] / max(counts.total(), 1)


Fault = Callable[[Scene], Awaitable[None]]
FAULTS: dict[str, Fault] = {}


def fault(act: Fault) -> Fault:
    FAULTS[act.__name__.replace("_", "-")] = act
    return act


@fault
async def nothing(scene: Scene) -> None:
    """Go on undisturbed, to compare with."""


@fault
async def picker_killed(scene: Scene) -> None:
    """Kill the control plane's half in the path with -9 and start it again."""
    scene.stack.kill("picker")
    await asyncio.sleep(1.0)
    scene.stack.start_picker()


@fault
async def picker_frozen(scene: Scene) -> None:
    """Stop the picker for three seconds."""
    scene.stack.processes["picker"].send_signal(signal.SIGSTOP)
    await asyncio.sleep(3.0)
    scene.stack.processes["picker"].send_signal(signal.SIGCONT)


@fault
async def envoy_killed(scene: Scene) -> None:
    """Kill Envoy with -9 and start it again, as the supervisor does."""
    scene.stack.kill("envoy")
    await asyncio.sleep(0.2)
    scene.stack.start_envoy()
    scene.note = (
        "lost: what was in flight, and connections refused until it is back are not counted"
    )


@fault
async def replica_killed(scene: Scene) -> None:
    """Kill one of the replicas with -9."""
    scene.stack.kill("mock-1")


@fault
async def replica_killed_in_prefill(scene: Scene) -> None:
    """Kill one with -9 while its streams have got their headers, and no token."""
    for member in scene.stack.members:
        scene.stack.tell(member, "mode/prefill")
        scene.stack.tell(member, f"delay/{10.0 * DELAY_S}")
    await asyncio.sleep(1.0)
    scene.stack.kill("mock-1")


@fault
async def replica_frozen(scene: Scene) -> None:
    """Stop one of the replicas: it takes connections and answers nothing."""
    scene.stack.processes["mock-1"].send_signal(signal.SIGSTOP)
    await rest(scene)
    both = (scene.plain, scene.streams)
    hung = [waited_s for load in both for waited_s in load.latencies_s if waited_s > HANGS_S]
    if hung:
        scene.note = f"{len(hung)} that hung there were answered by another after {max(hung):.0f} s"


@fault
async def replica_slow(scene: Scene) -> None:
    """Make one replica ten times slower."""
    scene.stack.tell(scene.stack.members[1], "mode/slow")
    await rest(scene)
    scene.note = f"{scene.share_of('mock-1'):.0%} of the traffic goes to it"


@fault
async def replica_errors(scene: Scene) -> None:
    """Have one replica answer 500 to everything."""
    scene.stack.tell(scene.stack.members[1], "mode/errors")
    scene.note = "its 500s are passed on: they may be the request's own fault"


@fault
async def replica_garbage(scene: Scene) -> None:
    """Have one replica answer what is no HTTP."""
    scene.stack.tell(scene.stack.members[1], "mode/garbage")


@fault
async def replica_breaks(scene: Scene) -> None:
    """Have one replica close streams after the fifth token."""
    for member in scene.stack.members:
        scene.stack.tell(member, f"each/{EACH_S}")
    scene.stack.tell(scene.stack.members[1], "mode/breaks")
    scene.note = "streams that had begun cannot be saved"


@fault
async def all_replicas_gone(scene: Scene) -> None:
    """Kill all replicas and start them again two seconds later."""
    for member in scene.stack.members:
        scene.stack.kill(member.name)
    await asyncio.sleep(2.0)
    for member in scene.stack.members:
        scene.stack.start_replica(member)
    scene.note = "lost while there was none"


@fault
async def clients_leave(scene: Scene) -> None:
    """Have 200 clients disconnect at once after asking."""
    writers = await asking(scene.stack, 200, request_bytes(scene.stack.port, stream=True))
    for writer in writers:
        writer.close()


@fault
async def clients_read_slowly(scene: Scene) -> None:
    """Have 50 clients ask for streams and read nothing."""
    scene.writers = await asking(scene.stack, 50, request_bytes(scene.stack.port, stream=True))


@fault
async def clients_send_half(scene: Scene) -> None:
    """Have 200 clients send half a request and stay."""
    half = request_bytes(scene.stack.port)[:-500]
    scene.writers = await asking(scene.stack, 200, half)


@fault
async def many_connections(scene: Scene) -> None:
    """Open 10,000 further connections."""
    before = scene.stack.memory_bytes("envoy")
    scene.writers = await asking(scene.stack, OPEN_CONNECTIONS, b"")
    more = scene.stack.memory_bytes("envoy") - before
    scene.note = f"{more >> 20} MiB more in Envoy"


@fault
async def settings_change(scene: Scene) -> None:
    """Change Envoy's configuration ten times."""
    stack = scene.stack
    for i in range(10):
        settings = DataPlaneSettings(headers_timeout_s=10.0 + i)
        await asyncio.to_thread(envoy.change, stack.run_dir, "127.0.0.1", stack.port, settings)
        await asyncio.sleep(0.2)


@fault
async def policy_divides_by_zero(scene: Scene) -> None:
    """Give all traffic to a policy that divides by zero."""
    policy = verify(EXTREME)
    cell = Cell(policy.id, tuple(m.name for m in scene.stack.members), tuple(range(SHARDS)))
    async with PickerLink(RunDir(scene.stack.run_dir).link_socket) as link:
        link.allocate(Allocate(Allocation(1, (cell,)), {policy.id: policy.source}, Objective()))
        await asyncio.sleep(1.0)


@fault
async def controller_away(scene: Scene) -> None:
    """Let nobody take the picker's records: there is no controller all the time."""
    scene.note = "records are kept for it and sent when it is back"


async def asking(stack: Stack, count: int, data: bytes) -> list[asyncio.StreamWriter]:
    writers: list[asyncio.StreamWriter] = []
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        writer.write(data)
        writers.append(writer)
    return writers


async def rest(scene: Scene) -> None:
    """Wait until the load is about to end."""
    end_s = scene.at_s + 0.75 * scene.seconds - 0.5
    await asyncio.sleep(max(end_s - time.perf_counter(), 0.0))


async def play(name: str, clients: int, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory() as directory, running_stack(Path(directory), 3) as stack:
        await until_decided(stack)
        for member in stack.members:
            stack.tell(member, f"delay/{DELAY_S}")
        scene = Scene(stack, seconds)
        began_s = time.perf_counter()
        loads = asyncio.gather(
            run_load(stack.port, clients // 2, seconds, False, scene.plain),
            run_load(stack.port, clients // 2, seconds, True, scene.streams),
        )
        await asyncio.sleep(seconds / 4)
        scene.at_s = time.perf_counter()
        await FAULTS[name](scene)
        await asyncio.sleep(max(began_s + seconds - time.perf_counter(), 0.0))
        for process in stack.processes.values():
            process.send_signal(signal.SIGCONT)
        await loads
        both = (scene.plain, scene.streams)
        after_s, end_s = scene.at_s + SETTLE_S, began_s + seconds
        return Outcome(
            fault=name,
            answered=sum(len(load.latencies_s) for load in both),
            lost=sum(len(load.lost) for load in both),
            broken=sum(load.broken for load in both),
            errors=sum(len(load.errors) for load in both),
            rate_before=sum(load.rate(began_s + 0.5, scene.at_s) for load in both),
            rate_after=sum(load.rate(after_s, end_s) for load in both),
            note=scene.note,
            why_lost=sorted({why for load in both for why in load.lost})[:4],
        )


def show(outcomes: list[Outcome]) -> None:
    table = Table()
    table.add_column("fault")
    for column in ("answered", "lost", "broken", "errors", "before /s", "after /s"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for one in outcomes:
        counts = f"{one.answered:,}", str(one.lost), str(one.broken), str(one.errors)
        rates = f"{one.rate_before:.0f}", f"{one.rate_after:.0f}"
        why = "; ".join((one.note, *one.why_lost)).strip("; ")
        table.add_row(one.fault, *counts, *rates, why)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", nargs="*")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--list", action="store_true", help="name the faults")
    chosen = parser.parse_args()
    if chosen.list:
        for name, act in FAULTS.items():
            print(f"{name:24} {(act.__doc__ or '').strip()}")
        return
    if unknown := set(chosen.fault) - set(FAULTS):
        sys.exit(f"There is no fault {', '.join(sorted(unknown))}; --list names them.")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    outcomes = [
        uvloop.run(play(name, chosen.clients, chosen.seconds)) for name in chosen.fault or FAULTS
    ]
    told: list[Any] = [asdict(one) for one in outcomes]
    if chosen.json == "-":
        print(json.dumps(told, indent=2))
        return
    show(outcomes)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
