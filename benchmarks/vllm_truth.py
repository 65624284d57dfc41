"""The twin against real vLLM replicas on this machine: its errors, and its ranking of the human arms.

    python benchmarks/vllm_truth.py --python VENV/bin/python --model MODEL_DIR --out DIR

Truth: one replica under several loads in turns, recorded through Envoy and the picker to DIR/truth;
then `autopoiesis twin validate --data-dir DIR/truth --turns SECONDS` calibrates on the loads at odd
places and validates on those at even ones.

Ranking: two replicas, one of which takes few sequences at once, serve the same requests under one
human arm after another, in rounds; the twin, calibrated on the first round, ranks them on the others.

The load, Envoy and the picker run on the same machine as vLLM. With one replica they keep off its core;
rates must be moderate all the same, and the machine quiet. Where something else runs, start this with
`nice -n -15` and without autogroups (`sysctl kernel.sched_autogroup_enabled=0`), under which niceness
counts only within a session.
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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau, spearmanr

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.gateway import envoy
from autopoiesis.gateway.link import Allocate, PickerLink
from autopoiesis.gateway.load import replay_load
from autopoiesis.gateway.settings import RunDir
from autopoiesis.replicas.devices import places, usable_cores
from autopoiesis.replicas.fleet import Member, free_ports, write_fleet
from autopoiesis.replicas.probe import answers
from autopoiesis.replicas.vllm_process import Vllm
from autopoiesis.telemetry.records import RequestRecord, Status, WindowRow
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.calibration import calibrate
from autopoiesis.twin.capacity import ReplicaSpec
from autopoiesis.twin.composition import splice
from autopoiesis.twin.latency import profile
from autopoiesis.twin.recorded import observed, recorded
from autopoiesis.twin.simulation import run_arm
from autopoiesis.twin.trace import Trace

KV_MIB, MAX_SEQS, MAX_TOKENS, MAX_LEN = 64, 16, 2048, 2048
SIZES = ("--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny",
         "--max-model-len", str(MAX_LEN), "--max-num-batched-tokens", str(MAX_TOKENS),
         "--kv-cache-memory-bytes", str(KV_MIB << 20))  # fmt: skip
KV_TOKENS = 65_536
FEW_SEQS = 1
"""Sequences that the second replica of the ranking takes at once."""
GRACE_S = 3.0

out = Console()


def chat(rate_rps: float, seconds: float, seed: int) -> Trace:
    """Poisson arrivals of short chats, in tokens of the load generator (about a third of vLLM's)."""
    rng = np.random.default_rng(seed)
    n = round(rate_rps * seconds)
    arrival_s = np.cumsum(rng.exponential(1.0 / rate_rps, n))
    return Trace(
        arrival_s=arrival_s * seconds / arrival_s[-1],
        input_tokens=np.clip(rng.lognormal(4.4, 0.8, n).astype(np.int64), 8, 400),
        output_tokens=np.clip(rng.lognormal(4.2, 0.6, n).astype(np.int64), 4, 250),
        max_output_tokens=np.full(n, 256),
        session=np.zeros(n, np.int64),
        priority=np.zeros(n),
        block_start=np.zeros(n + 1, np.int64),
        blocks=np.empty(0, np.int64),
        block_tokens=256,
        name=f"chat at {rate_rps:g}/s",
    )


class Stack:
    """Envoy and a picker in front of vLLM replicas; this process is the controller."""

    def __init__(self, port: int, members: Sequence[Member], link: PickerLink) -> None:
        self.port = port
        self.members = tuple(members)
        self.records: list[RequestRecord] = []
        self._link = link
        self._window = -1

    def allocate(self, source: str) -> None:
        """Give the whole fleet to one policy, in a window of its own."""
        self._window += 1
        policy = verify(source)
        cell = Cell(policy.id, tuple(m.name for m in self.members), tuple(range(SHARDS)), 1.0)
        allocation = Allocation(self._window, (cell,))
        self._link.allocate(Allocate(allocation, {policy.id: policy.source}, Objective()))

    async def listen(self) -> None:
        """Collect what the picker records."""
        async for batch in self._link:
            self.records.extend(batch.requests)
            self._link.acknowledge([batch])

    async def serve(self, trace: Trace, seed: int) -> list[RequestRecord]:
        """Send a trace and return its records."""
        before = len(self.records)
        await replay_load(trace, f"http://127.0.0.1:{self.port}", seed=seed)
        await asyncio.sleep(GRACE_S)
        return self.records[before:]


@asynccontextmanager
async def stack(vllm: Vllm, limits: Sequence[int], logs: Path) -> AsyncIterator[Stack]:
    """Start replicas (one for each limit on sequences), a picker and Envoy; stop them at the end."""
    logs.mkdir(parents=True, exist_ok=True)
    port, *ports = free_ports(1 + len(limits))
    members = [
        Member(f"replica-{i}", f"127.0.0.1:{p}", "h100-llama-3-8b-tp1-bf16", kind="vllm")
        for i, p in enumerate(ports)
    ]
    children: list[subprocess.Popen[bytes]] = []

    def start(name: str, argv: list[str], environment: dict[str, str] | None = None) -> None:
        with (logs / f"{name}.log").open("wb") as log:
            children.append(
                subprocess.Popen(
                    argv,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, **(environment or {})},
                )
            )

    with tempfile.TemporaryDirectory(prefix="ap-") as folder:
        run_dir = Path(folder)
        write_fleet(RunDir(run_dir).fleet, members)
        try:
            spots = places(len(members), 1, (), usable_cores()[: max(len(members), 1)])
            for member, limit, spot in zip(members, limits, spots, strict=True):
                own = replace(vllm, arguments=(*vllm.arguments, "--max-num-seqs", str(limit)))
                command = own.command(member, spot)
                start(member.name, command.argv, command.environment)
            await asyncio.gather(*(_answering(f"{m.url}/health", children, logs) for m in members))
            if spare := usable_cores()[len(members) :]:
                keep_off(spare, [child.pid for child in children])
            python = [sys.executable, "-m", "autopoiesis.gateway.picker"]
            start("picker", [*python, "--run-dir", str(run_dir)])
            start("envoy", envoy.prepare(run_dir, "127.0.0.1", port, members))
            async with PickerLink(RunDir(run_dir).link_socket) as link:
                made = Stack(port, members, link)
                listening = asyncio.create_task(made.listen())
                made.allocate(SEEDS["least-requests"])
                await _answering(f"http://127.0.0.1:{port}/v1/models", children, logs)
                await made.serve(chat(4.0, 8.0, 999), 999)
                yield made
                listening.cancel()
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGTERM)
            time.sleep(2.0)
            for child in children:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def keep_off(spare: Sequence[int], servers: Sequence[int]) -> None:
    """Leave the engines' cores to the engines: move this process, its next children and the API servers.

    An engine is a process of its own, which binds itself; Envoy, the picker and the load beside it
    would take from its core what no replica of a real fleet loses.
    """
    for pid in (os.getpid(), *servers):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), spare)


async def _answering(url: str, children: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while not await answers(session, url):
            if any(child.poll() is not None for child in children):
                sys.exit(f"a process ended; see {logs}")
            await asyncio.sleep(0.2)


SEEDS = {arm.name: arm.source for arm in seed_arms()}


def store(records: Sequence[RequestRecord], folder: Path) -> None:
    """Write the records as the telemetry of an instance."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "telemetry.duckdb").unlink(missing_ok=True)
    first, last = min(r.arrived_s for r in records), max(r.arrived_s for r in records)
    unknown = [
        "ttft_p50_s",
        "ttft_p99_s",
        "tpot_p50_s",
        "tpot_p99_s",
        "utility",
        "regret",
        "regret_low",
    ]
    nothing = dict.fromkeys([*unknown, "regret_high"])
    row = WindowRow(
        window=max(r.window for r in records), started_s=first, ended_s=last, objective={}, context={},
        requests=len(records), completed=sum(r.status is Status.COMPLETED for r in records), shed=0, failed=0,
        throughput_tokens_s=0.0, goodput_rps=0.0, drift="", twin_weight=0.0, **nothing,
    )  # fmt: skip
    with Store.open(folder / "telemetry.duckdb") as file:
        file.write_window(row, requests=records)


async def truth(
    vllm: Vllm, rates: Sequence[float], seconds: float, turns: int, folder: Path
) -> list[RequestRecord]:
    async with stack(vllm, [MAX_SEQS], folder / "logs") as running:
        phases = [chat(rate, seconds, i) for i, rate in enumerate([*rates] * turns)]
        records = await running.serve(splice(phases, "loads"), 0)
    store(records, folder / "truth")
    return records


async def ranking(
    vllm: Vllm, arms: Sequence[str], rate: float, seconds: float, rounds: int, folder: Path
) -> dict[str, list[list[RequestRecord]]]:
    served: dict[str, list[list[RequestRecord]]] = {arm: [] for arm in arms}
    async with stack(vllm, [MAX_SEQS, FEW_SEQS], folder / "logs-ranking") as running:
        for turn in range(rounds):
            for arm in arms if turn % 2 == 0 else [*arms][::-1]:
                running.allocate(SEEDS[arm])
                records = await running.serve(chat(rate, seconds, turn), turn)
                store(records, folder / "ranking" / f"{arm}-{turn}")
                served[arm].append(records)
    return served


def mean_utility(ttft_s: Any, tpot_s: Any, objective: Objective) -> float:
    return float(np.nanmean(np.nan_to_num(objective.utility(ttft_s, tpot_s), nan=0.0)))


def fitted_fleet(served: dict[str, list[list[RequestRecord]]]) -> list[ReplicaSpec]:
    """Calibrate each replica on what it did in the first round."""
    start = replace(
        profile("h100-llama-3-8b-tp1-bf16"),
        max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS, kv_blocks=KV_TOKENS // 16,
    )  # fmt: skip
    first = [r for runs in served.values() for r in runs[0]]
    return [
        ReplicaSpec(r.replica, calibrate([r], replace(start, max_num_seqs=limit)).profile)
        for r, limit in zip(recorded(first), (MAX_SEQS, FEW_SEQS), strict=True)
    ]


def compare(served: dict[str, list[list[RequestRecord]]], seed: int) -> dict[str, Any]:
    """Rank the arms as they served after the first round, and as the twin has it."""
    fleet = fitted_fleet(served)
    http_s = fleet[0].profile.client.request_s
    served = {arm: runs[1:] for arm, runs in served.items()}
    everything = [r for runs in served.values() for run in runs for r in run]
    usual_ttft = float(np.median([r.ttft_s for r in everything if r.ttft_s is not None]))
    usual_tpot = float(np.median([r.tpot_s for r in everything if r.tpot_s is not None]))
    # Missed by those that wait for others, not by what a busy machine adds.
    objective = Objective(slo_ttft_s=3 * usual_ttft, slo_tpot_s=2 * usual_tpot)
    rows: list[dict[str, Any]] = []
    for arm, runs in served.items():
        program = compile_policy(verify(SEEDS[arm]))
        real: list[float] = []
        twin: list[float] = []
        for run in runs:
            trace, outcome = observed(run)
            real.append(mean_utility(outcome.ttft_s, outcome.tpot_s, objective))
            trace = replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0])
            made = run_arm(trace, fleet, program, objective, seed)
            twin.append(mean_utility(made.ttft_s + http_s, made.tpot_s, objective))
        rows.append(
            {"arm": arm, "real": float(np.mean(real)), "twin": float(np.mean(twin)), "runs": real}
        )
    real_u, twin_u = [r["real"] for r in rows], [r["twin"] for r in rows]
    return {
        "objective": objective.as_dict(),
        "arms": sorted(rows, key=lambda r: -r["real"]),
        "spearman": float(spearmanr(real_u, twin_u).statistic),
        "kendall": float(kendalltau(real_u, twin_u).statistic),
        "same_best": rows[int(np.argmax(real_u))]["arm"] == rows[int(np.argmax(twin_u))]["arm"],
    }


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--model", required=True, help="directory of a tiny model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="*", default=[2.0, 4.0, 6.0, 5.0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--turns", type=int, default=3, help="how often each load comes")
    parser.add_argument(
        "--arms",
        nargs="*",
        default=["round-robin", "random", "least-requests", "power-of-two", "least-predicted-ttft"],
    )
    parser.add_argument("--ranking-rate", type=float, default=4.0)
    parser.add_argument("--ranking-seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    unknown = set(options.arms) - set(SEEDS)
    if unknown:
        sys.exit(f"no human arm is called {min(unknown)}; there are {', '.join(SEEDS)}")
    vllm = Vllm(options.model, SIZES, options.python)
    if options.rates:
        records = await truth(vllm, options.rates, options.seconds, options.turns, options.out)
        out.print(f"{len(records)} requests recorded in {options.out / 'truth'}")
    if not options.arms:
        return
    served = await ranking(
        vllm,
        options.arms,
        options.ranking_rate,
        options.ranking_seconds,
        options.rounds,
        options.out,
    )
    told = compare(served, 0)
    (options.out / "ranking.json").write_text(json.dumps(told, indent=1))
    table = Table(title=f"Spearman {told['spearman']:.2f}, Kendall {told['kendall']:.2f}")
    for column in ("arm", "real", "twin", "runs"):
        table.add_column(column)
    for row in told["arms"]:
        runs = " ".join(f"{u:.3f}" for u in row["runs"])
        table.add_row(row["arm"], f"{row['real']:.3f}", f"{row['twin']:.3f}", runs)
    out.print(table)


if __name__ == "__main__":
    asyncio.run(main())
