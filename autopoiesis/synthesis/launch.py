"""Starts a synthesis worker and waits for its verdicts; whatever becomes of it, a row comes back.

Where language models are asked, a clerk is started beside it, and a socket pair joins the two.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from autopoiesis.synthesis.brief import Brief
from autopoiesis.synthesis.llm.clerk import Errand
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow

COMPILE_S = 300.0
"""Time beyond its budget that a worker may take: starting, and on a new machine compiling."""
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


async def run_worker(
    brief: Brief,
    timeout_s: float | None = None,
    errand: Errand | None = None,
    recording: Path | None = None,
) -> SynthesisRow:
    """Run one cycle in a worker process and return its verdicts.

    With an `errand`, a clerk asks language models on the worker's behalf; with a `recording`, the
    replies in it are given again. Never raises for what goes wrong in the worker: a crash, a kill, or
    more time than `timeout_s` (by default the budget and time to compile) come back as a row whose
    `error` says so. Cancelled, it kills both.
    """
    started_s = time.monotonic()
    limit_s = brief.budget_s + COMPILE_S if timeout_s is None else timeout_s
    data = brief.to_bytes()
    started: list[Process] = []
    mine, clerks = socket.socketpair()
    try:
        with mine, clerks:
            arguments = ["--recording", str(recording)] if recording else []
            if errand is not None:
                arguments = ["--clerk", str(mine.fileno())]
                clerk = await _start(
                    "llm.clerk", [str(clerks.fileno())], clerks, os.environ, answers=False
                )
                started.append(clerk)
                _tell(clerk, errand.to_bytes(data, brief.synthesizer.value))
            worker = await _start("worker", arguments, mine, _without_key(errand))
            started.append(worker)
        out, err = await asyncio.wait_for(worker.communicate(data), limit_s)
    except TimeoutError:
        return _failed(brief, started_s, f"The synthesis worker was stopped after {limit_s:g} s.")
    except OSError as error:
        return _failed(brief, started_s, f"The synthesis worker could not be started: {error}.")
    finally:
        for process in started:
            await _end(process)
    if worker.returncode == 0:
        with suppress(orjson.JSONDecodeError, KeyError, TypeError):
            return row_from_json(out)
    words = err.decode(errors="replace").strip().splitlines()
    last = f" {words[-1][:500]}" if words else ""
    return _failed(brief, started_s, f"The synthesis worker ended {_how(worker.returncode)}.{last}")


def run_worker_now(
    brief: Brief,
    timeout_s: float | None = None,
    errand: Errand | None = None,
    recording: Path | None = None,
) -> SynthesisRow:
    """Run one cycle as `run_worker` does and wait for it; not for use inside an event loop."""
    return asyncio.run(run_worker(brief, timeout_s, errand, recording))


async def _start(
    module: str,
    arguments: Sequence[str],
    connection: socket.socket,
    environment: Mapping[str, str],
    *,
    answers: bool = True,
) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"autopoiesis.synthesis.{module}",
        *arguments,
        stdin=PIPE,
        stdout=PIPE if answers else DEVNULL,
        stderr=PIPE if answers else DEVNULL,
        env={**environment, **_ONE_THREAD},
        start_new_session=True,
        pass_fds=(connection.fileno(),),
    )


def _without_key(errand: Errand | None) -> dict[str, str]:
    """Return the environment without the models' key: whoever races policies has no use for it."""
    name = str(errand.settings.get("api_key_env") or "") if errand else ""
    return {variable: value for variable, value in os.environ.items() if variable != name}


def _tell(process: Process, data: bytes) -> None:
    """Send a process all that it gets on stdin."""
    if process.stdin is not None:
        process.stdin.write(data)
        process.stdin.write_eof()


async def _end(process: Process) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def row_from_json(data: bytes) -> SynthesisRow:
    """Read a SynthesisRow; KeyError or TypeError if the JSON is another object."""
    plain: dict[str, Any] = orjson.loads(data)
    candidates: list[dict[str, Any]] = plain["candidates"]
    for candidate in candidates:
        candidate["parents"] = tuple(candidate["parents"])
    plain["candidates"] = tuple(CandidateRow(**candidate) for candidate in candidates)
    plain["promoted"] = tuple(plain["promoted"])
    return SynthesisRow(**plain)


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"by signal {signal.Signals(-code).name}"
    return f"with code {code}" if code else "without verdicts"


def _failed(brief: Brief, started_s: float, error: str) -> SynthesisRow:
    return SynthesisRow(
        started_s=brief.asked_s,
        window=brief.window,
        since_window=brief.since_window,
        trigger=brief.trigger,
        synthesizer=brief.synthesizer.value,
        seconds=time.monotonic() - started_s,
        cpu_seconds=0.0,
        tokens=0,
        cost_usd=0.0,
        error=error,
    )
