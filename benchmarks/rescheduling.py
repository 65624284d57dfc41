"""What clients feel when replicas die, and when they are restarted on purpose.

    python benchmarks/rescheduling.py [--replicas 4] [--kills 20] [--clients 16] [--json FILE|-]
    python benchmarks/rescheduling.py --vllm MODEL --vllm-python PYTHON --replicas 2 --kills 3 --clients 4 \
        -- --max-num-seqs 16 ...

A gateway is started as an operator would (`autopoiesis serve`), and clients ask for streams, each again as
soon as it was answered. Then a replica is killed with -9, again and again, each time after all are back; and
at last all replicas are restarted one after the other with other limits (`autopoiesis control restart`).

*Avoided after* is the time from the kill to the last connection that Envoy tried in vain to open to the dead
replica, by Envoy's own counters, until it is back; 0 where there was none. *Lost* are requests that got no
byte of an answer; *broken* are streams that had begun on the dead replica: nobody can save those.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from autopoiesis.gateway.settings import RunDir
from autopoiesis.replicas.fleet import free_ports

START_S = 900.0
BACK_S = 600.0
COMMAND = [sys.executable, "-m", "autopoiesis"]
PROGRESS = Console(stderr=True)
SETTLE_S = 3.0
LOOK_S = 0.05
"""How often Envoy's counters are read."""


@dataclass
class Answered:
    """One request as its client saw it; times on the wall clock."""

    began_s: float
    ttft_s: float
    e2e_s: float
    how: str
    """whole, broken or lost."""


@dataclass
class Clients:
    """Clients that ask for one stream after the other."""

    url: str
    model: str
    tokens: int
    pause_s: float
    answers: list[Answered] = field(default_factory=list)
    why_lost: set[str] = field(default_factory=set)

    async def ask(self, session: aiohttp.ClientSession, number: int) -> None:
        """Ask until cancelled."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"{number} tells of the sea. " * 8}],
            "max_tokens": self.tokens,
            "stream": True,
            "ignore_eos": True,
        }
        while True:
            began_s, first_s, last = time.time(), 0.0, b""
            try:
                async with session.post(f"{self.url}/v1/chat/completions", json=body) as answer:
                    if answer.status != 200:
                        raise aiohttp.ClientError(f"status {answer.status}")
                    async for piece in answer.content.iter_any():
                        first_s = first_s or time.time()
                        last = (last + piece)[-64:]
                how = "whole" if b"[DONE]" in last else "broken"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                how = "broken" if first_s else "lost"
                if how == "lost":
                    self.why_lost.add(str(error)[:120])
                    await asyncio.sleep(0.05)
            ended_s = time.time()
            ttft_s = (first_s or ended_s) - began_s
            self.answers.append(Answered(began_s, ttft_s, ended_s - began_s, how))
            await asyncio.sleep(self.pause_s)

    def between(self, from_s: float, to_s: float) -> list[Answered]:
        """Return what was asked in a stretch of time, or was under way at its beginning."""
        return [a for a in self.answers if a.began_s < to_s and a.began_s + a.e2e_s >= from_s]

    def count(self, how: str, from_s: float, to_s: float) -> int:
        """Count the requests of a stretch of time that ended so."""
        return sum(a.how == how for a in self.between(from_s, to_s))

    def p99_ttft_s(self, from_s: float, to_s: float) -> float:
        """Return the time to first token of whole answers."""
        times = [a.ttft_s for a in self.between(from_s, to_s) if a.how == "whole"]
        return float(np.percentile(times, 99)) if times else float("nan")


@dataclass
class InVain:
    """When Envoy could not connect to a replica, by address, on the wall clock."""

    failed_s: dict[str, list[float]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def read(self, clusters: dict[str, Any], now_s: float) -> None:
        """Take in what Envoy tells of its clusters."""
        before, self._counts = self._counts, {}
        for cluster in clusters["cluster_statuses"]:
            for host in cluster.get("host_statuses", ()):
                socket = host["address"].get("socket_address")
                if socket is None:
                    continue
                address = f"{socket['address']}:{socket['port_value']}"
                stats = {stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]}
                count = stats["cx_connect_fail"]
                if count > before.get(address, 0):
                    self.failed_s.setdefault(address, []).append(now_s)
                self._counts[address] = count

    def last_s(self, address: str, from_s: float, to_s: float) -> float:
        """Return how long after `from_s` the last one was, 0 if there was none."""
        return max(
            (at_s - from_s for at_s in self.failed_s.get(address, ()) if from_s <= at_s < to_s),
            default=0.0,
        )


@dataclass
class Figures:
    """What came of it all."""

    replicas: str
    clients: int
    kills: int
    avoided_after_s: list[float]
    back_after_s: list[float]
    lost_per_kill: list[int]
    broken_per_kill: list[int]
    rolling_restart_s: float
    failed_during_restart: int
    requests_during_restart: int
    p99_ttft_before_s: float
    p99_ttft_during_s: float
    phases: list[dict[str, Any]]
    why_lost: list[str]


class Instance:
    """A running `autopoiesis serve`."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        port, control = free_ports(2)
        self.url, self.control = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{control}"
        (folder / "serve.toml").write_text(
            'window_s = 5.0\nsynthesizer = "none"\ncell_replicas = 1\n'
        )
        argv = [*COMMAND, "serve", "--config", "serve.toml", "--port", str(port)]
        argv += ["--control-port", str(control)]
        if options.vllm:
            argv += ["--vllm", options.vllm, "--replicas", str(options.replicas)]
            argv += ["--vllm-python", options.vllm_python, "--", *options.vllm_arguments]
        else:
            argv += ["--simulate", str(options.replicas)]
        with (folder / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(argv, cwd=folder, stdout=log, stderr=log)

    async def ready(self, session: aiohttp.ClientSession) -> str:
        """Wait until it serves; return the model."""
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            if self.process.poll() is not None:
                sys.exit((self.folder / "serve.log").read_text())
            try:
                async with session.get(f"{self.control}/ready") as answer:
                    if answer.status == 200:
                        async with session.get(f"{self.url}/v1/models") as models:
                            return (await models.json())["data"][0]["id"]
            except (aiohttp.ClientError, OSError, KeyError):
                pass
            await asyncio.sleep(0.2)
        sys.exit("the gateway did not come up")

    async def rows(self, session: aiohttp.ClientSession, query: str) -> list[list[Any]]:
        """Ask the telemetry."""
        async with session.post(f"{self.control}/sql", json={"query": query}) as answer:
            return (await answer.json())["rows"]

    async def all_ready(self, session: aiohttp.ClientSession) -> None:
        """Wait until every replica serves."""
        until_s = time.monotonic() + BACK_S
        while time.monotonic() < until_s:
            async with session.get(f"{self.control}/fleet") as answer:
                replicas = (await answer.json())["replicas"]
            if all(r["standing"] == "ready" for r in replicas):
                return
            await asyncio.sleep(0.2)
        sys.exit("a replica did not come back")

    async def watch(self, in_vain: "InVain") -> None:
        """Note whom Envoy tries in vain to reach, until cancelled."""
        socket = RunDir(self.folder / ".autopoiesis/run").admin_socket
        connector = aiohttp.UnixConnector(path=str(socket))
        async with aiohttp.ClientSession(connector=connector) as admin:
            while True:
                async with admin.get("http://envoy/clusters?format=json") as answer:
                    in_vain.read(await answer.json(content_type=None), time.time())
                await asyncio.sleep(LOOK_S)

    def replica(self, index: int) -> tuple[str, psutil.Process]:
        """Return a replica's address and its process."""
        members = json.loads((self.folder / ".autopoiesis/run/fleet.json").read_text())
        member = members[index % len(members)]
        port = member["address"].rpartition(":")[2]
        for process in psutil.Process(self.process.pid).children():
            words = process.cmdline()
            if "--port" in words and words[words.index("--port") + 1] == port:
                return member["address"], process
        sys.exit(f"{member['name']} has no process")

    def stop(self) -> None:
        """Stop it as an operator would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(120)


async def kill_one(
    instance: Instance, session: aiohttp.ClientSession, index: int
) -> tuple[str, float, float]:
    """Kill a replica and wait until it is back; return its address, when it died, and how long it was away."""
    address, process = instance.replica(index)
    process.kill()
    killed_s = time.time()
    await asyncio.sleep(2.0)  # the gateway reports every half second
    await instance.all_ready(session)
    back_s = time.time() - killed_s
    await asyncio.sleep(SETTLE_S)
    return address, killed_s, back_s


async def measure(instance: Instance, options: argparse.Namespace) -> Figures:
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        model = await instance.ready(session)
        clients = Clients(instance.url, model, options.tokens, options.pause)
        await instance.all_ready(session)
        PROGRESS.log("all replicas serve")
        in_vain = InVain()
        asking = [asyncio.create_task(clients.ask(session, i)) for i in range(options.clients)]
        watching = asyncio.create_task(instance.watch(in_vain))
        await asyncio.sleep(options.rest)
        kills: list[tuple[str, float, float]] = []
        for index in range(options.kills):
            kills.append(await kill_one(instance, session, index))
            PROGRESS.log(f"kill {index + 1} of {options.kills}: back after {kills[-1][2]:.0f} s")

        calm_s = time.time()
        await asyncio.sleep(options.rest)
        began_s = time.time()
        restart = await asyncio.create_subprocess_exec(
            *COMMAND, "control", "restart", "--max-num-seqs", str(options.max_num_seqs),
            cwd=instance.folder, env=os.environ | {"COLUMNS": "160"},
        )  # fmt: skip
        if await restart.wait():
            sys.exit("the rolling restart failed")
        ended_s = time.time()
        await asyncio.sleep(SETTLE_S)
        if watching.done():
            watching.result()  # it only ends by an error
        for task in (*asking, watching):
            task.cancel()
        await asyncio.gather(*asking, watching, return_exceptions=True)
        await asyncio.sleep(12.0)  # two windows: all is written

        names = (
            "replica, seconds, drain_s, import_s, load_s, compile_s, capture_s, engine_s, warmup_s"
        )
        phases = await instance.rows(
            session,
            f"select action, {names} from reconfigurations order by began_s",
        )
    ends = [killed_s for _, killed_s, _ in kills[1:]] + [calm_s]
    spans = [(killed_s, end) for (_, killed_s, _), end in zip(kills, ends, strict=True)]
    avoided = [
        in_vain.last_s(address, killed_s, killed_s + back_s) for address, killed_s, back_s in kills
    ]
    during = clients.between(began_s, ended_s)
    kind = f"{options.replicas} {'vLLM' if options.vllm else 'simulated'}"
    return Figures(
        replicas=kind,
        clients=options.clients,
        kills=len(kills),
        avoided_after_s=avoided,
        back_after_s=[back_s for *_, back_s in kills],
        lost_per_kill=[clients.count("lost", *span) for span in spans],
        broken_per_kill=[clients.count("broken", *span) for span in spans],
        rolling_restart_s=ended_s - began_s,
        failed_during_restart=sum(a.how != "whole" for a in during),
        requests_during_restart=len(during),
        p99_ttft_before_s=clients.p99_ttft_s(calm_s, began_s),
        p99_ttft_during_s=clients.p99_ttft_s(began_s, ended_s),
        phases=[dict(zip(("action", *names.split(", ")), row, strict=True)) for row in phases],
        why_lost=sorted(clients.why_lost),
    )


def show(figures: Figures) -> None:
    table = Table(title=f"{figures.replicas} replicas, {figures.clients} clients")
    table.add_column("what")
    table.add_column("figure", justify="right")
    if figures.kills:
        p99_s = float(np.percentile(figures.avoided_after_s, 99))
        table.add_row(f"avoided after, p99 of {figures.kills} kills", f"{p99_s:.2f} s")
        table.add_row("lost per kill", f"{np.mean(figures.lost_per_kill):.2f}")
        table.add_row("streams broken per kill", f"{np.mean(figures.broken_per_kill):.2f}")
        table.add_row("back after, median", f"{np.median(figures.back_after_s):.1f} s")
    failed, asked = figures.failed_during_restart, figures.requests_during_restart
    table.add_row("rolling restart", f"{figures.rolling_restart_s:.1f} s")
    table.add_row("failed during it", f"{failed} of {asked}")
    table.add_row("p99 TTFT before", f"{1e3 * figures.p99_ttft_before_s:.0f} ms")
    table.add_row("p99 TTFT during", f"{1e3 * figures.p99_ttft_during_s:.0f} ms")
    Console(width=120).print(table)
    changes = Table(title="what changes took [s]")
    for name in figures.phases[0] if figures.phases else ():
        changes.add_column(name.removesuffix("_s"))
    for change in figures.phases:
        changes.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in change.values()))
    Console(width=140).print(changes)
    for why in figures.why_lost:
        print(f"lost: {why}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds between two requests of a client"
    )
    parser.add_argument("--rest", type=float, default=10.0, help="undisturbed seconds in between")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="what the restart sets")
    parser.add_argument("--vllm", metavar="MODEL", default="")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("vllm_arguments", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        instance = Instance(Path(folder), options)
        try:
            figures = asyncio.run(measure(instance, options))
        finally:
            instance.stop()
    if options.json == "-":
        print(json.dumps(asdict(figures), indent=2))
        return
    show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(figures), indent=2))


if __name__ == "__main__":
    main()
