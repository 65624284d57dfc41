"""The same comparison on real processes: `serve` with simulated replicas, loaded over HTTP.

What the twin leaves out is in here: Envoy, the picker's own time, scraping, and windows that end
on a real clock. Times are wall time, so one unit runs at a time and results differ from run to run.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autopoiesis.arms.seeds import seed_arms
from autopoiesis.evaluation import recorded
from autopoiesis.evaluation.contestants import OURS, SWITCHING, Ran
from autopoiesis.evaluation.scenario import Situation
from autopoiesis.gateway.load import replay_load
from autopoiesis.gateway.load_summary import SHED, Answer
from autopoiesis.orchestrator.replay_fleet import Served
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.fleet import free_ports
from autopoiesis.twin.outcome import Outcome, Status

START_S = 180.0
"""Longest start of an instance; the first on a machine compiles kernels."""
VLLM_START_S = 600.0
"""The same with vLLM servers."""
VLLM_PYTHON, VLLM_MODEL = "AUTOPOIESIS_VLLM_PYTHON", "AUTOPOIESIS_VLLM_MODEL"
"""Environment variables: an interpreter that has vLLM, and the model's directory."""
VLLM_ARGUMENTS = (
    "--dtype", "float32", "--enforce-eager", "--served-model-name", "tiny", "--max-model-len", "2048",
    "--max-num-seqs", "16", "--max-num-batched-tokens", "2048", "--kv-cache-memory-bytes", str(64 << 20),
)  # fmt: skip
"""For a tiny model on the CPU, as `twin/profiles.json` has it."""
STOP_S = 60.0
DRAIN_S = 300.0
"""Longest wait for what still runs after the last request, since the twin serves to the end as well."""
COMMAND_S = 300.0
"""Longest time of one command: a machine that serves and loads at once is slow to start another process."""


class LiveError(RuntimeError):
    """An instance could not be started, or stopped serving; one sentence says so."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A running gateway."""

    url: str
    folder: Path


def live(name: str, situation: Situation) -> Ran:
    """Serve a situation's whole trace over HTTP under one contestant.

    A `human/NAME` is ordered to hold the whole fleet; the learning system decides by itself, with the
    genetic synthesizer or without one.

    Raises LiveError, or TelemetryError if what it has recorded cannot be read.
    """
    synthesizer = "genetic" if name == OURS else "none"
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory(prefix="autopoiesis-live-") as folder:
        with serving(situation, Path(folder), synthesizer) as instance:
            if name not in {OURS, SWITCHING}:
                _command("control", "allocate", name.partition("/")[2], "--data-dir", folder)
            began_s = time.time()
            load = replay_load(
                situation.trace, instance.url, on_done=answers.append, drain_s=DRAIN_S
            )
            asyncio.run(load)
        replica_s = len(situation.fleet.replicas) * situation.trace.duration_s
        served = Served(outcome_of(situation, answers), replica_s)
        telemetry = Settings.model_validate({"data_dir": folder}).telemetry_file
        return recorded.ran(situation, served, telemetry, began_s)


@contextmanager
def serving(situation: Situation, folder: Path, synthesizer: str) -> Generator[Instance]:
    """Start an instance with simulated replicas like the situation's, and stop it afterwards."""
    port, control = free_ports(2)
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *_AUTOPOIESIS,
                "serve",
                *serve_options(situation, synthesizer, folder, (port, control)),
            ],
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for page in (f"{url}/v1/models", f"http://127.0.0.1:{control}/"):
                _wait_until_it_answers(
                    process, page, folder, VLLM_START_S if situation.scenario.vllm else START_S
                )
            yield Instance(url, folder)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_AUTOPOIESIS = (sys.executable, "-m", "autopoiesis")


def serve_options(
    situation: Situation, synthesizer: str, folder: Path, ports: tuple[int, int]
) -> list[str]:
    """Return the options of `serve` for a situation. Raises LiveError where there is no vLLM and one is asked for."""
    objective = situation.objective
    given: dict[str, object] = {
        "--port": ports[0],
        "--control-port": ports[1],
        "--data-dir": folder,
        "--window": f"{situation.window_s:g}",
        "--slo-ttft": f"{objective.slo_ttft_s:g}",
        "--slo-tpot": f"{objective.slo_tpot_s:g}",
        "--synthesizer": synthesizer,
        "--seed": situation.seed,
    }
    options = [word for name, value in given.items() for word in (name, str(value))]
    behind = ["--", *VLLM_ARGUMENTS] if situation.scenario.vllm else []
    return [*fleet_options(situation), *options, *behind]


def fleet_options(situation: Situation) -> list[str]:
    """Return the options of `serve` that make the situation's fleet. Raises LiveError without a vLLM."""
    count = str(len(situation.fleet.replicas))
    if not situation.scenario.vllm:
        profiles = [w for r in situation.fleet.replicas for w in ("--profile", r.profile.name)]
        return ["--simulate", count, *profiles]
    python, model = (os.environ.get(name, "") for name in (VLLM_PYTHON, VLLM_MODEL))
    if not python or not model:
        raise LiveError(
            f"Real servers need {VLLM_PYTHON} and {VLLM_MODEL}; tests/real_vllm/install.sh makes the first."
        )
    return ["--vllm", model, "--replicas", count, "--vllm-python", python]


def _wait_until_it_answers(
    process: "subprocess.Popen[bytes]", page: str, folder: Path, limit_s: float
) -> None:
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        if process.poll() is not None:
            said = (folder / "serve.log").read_text("utf-8", "replace").strip().splitlines()
            raise LiveError(f"serve ended before it was ready: {said[-1] if said else 'no word'}")
        try:
            with urllib.request.urlopen(page, timeout=5.0):  # noqa: S310 - our own child
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise LiveError(f"serve was not ready after {limit_s:g} s")


def _command(*arguments: str) -> None:
    done = subprocess.run(
        [*_AUTOPOIESIS, *arguments], capture_output=True, text=True, check=False, timeout=COMMAND_S
    )
    if done.returncode:
        raise LiveError(f"autopoiesis {' '.join(arguments[:2])} failed: {done.stderr.strip()}")


def outcome_of(situation: Situation, answers: Sequence[Answer]) -> Outcome:
    """Return what clients saw, in the twin's terms; times count from when each request was due.

    How late the generator sent a request is not held against the gateway.
    """
    trace = situation.trace
    n = len(trace)
    first_s, end_s = np.full(n, np.nan), np.full(n, np.nan)
    status = np.full(n, int(Status.FAILED))
    tokens = trace.output_tokens.copy()
    for a in answers:
        if a.complete:
            status[a.index] = Status.COMPLETED
            tokens[a.index] = max(a.output_tokens, 1)
            end_s[a.index] = trace.arrival_s[a.index] + a.e2e_s
            if a.ttft_s is not None:
                first_s[a.index] = trace.arrival_s[a.index] + a.ttft_s
        elif a.status == SHED:
            status[a.index] = Status.SHED
    nothing = np.full(n, -1)
    return Outcome(
        arrival_s=trace.arrival_s,
        input_tokens=trace.input_tokens,
        output_tokens=tokens,
        shard=np.zeros(n, np.int64),
        cell=nothing,
        replica=nothing,
        dispatched_s=first_s,
        first_token_s=first_s,
        finished_s=end_s,
        status=status,
        cached_tokens=np.zeros(n, np.int64),
        generated_tokens=tokens,
    )


def live_contestants() -> tuple[str, ...]:
    """Return who takes part: every human arm, and the learning system without and with evolution."""
    return (*(f"human/{arm.name}" for arm in seed_arms()), SWITCHING, OURS)
