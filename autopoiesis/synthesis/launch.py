"""Starts a synthesis worker and waits for its verdicts; whatever becomes of it, a row comes back."""

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

import orjson

from autopoiesis.synthesis.brief import Brief
from autopoiesis.telemetry.records import CandidateRow, SynthesisRow

COMPILE_S = 300.0
"""Time beyond its budget that a worker may take: starting, and on a new machine compiling."""
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


async def run_worker(brief: Brief, timeout_s: float | None = None) -> SynthesisRow:
    """Run one cycle in a worker process and return its verdicts.

    Never raises for what goes wrong in the worker: a crash, a kill, or more time than `timeout_s`
    (by default the budget and time to compile) come back as a row whose `error` says so. Cancelled,
    it kills the worker.
    """
    started_s = time.monotonic()
    limit_s = brief.budget_s + COMPILE_S if timeout_s is None else timeout_s
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "autopoiesis.synthesis.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,
        )
    except OSError as error:
        return _failed(brief, started_s, f"The synthesis worker could not be started: {error}.")
    try:
        out, err = await asyncio.wait_for(process.communicate(brief.to_bytes()), limit_s)
    except TimeoutError:
        return _failed(brief, started_s, f"The synthesis worker was stopped after {limit_s:g} s.")
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode == 0:
        with suppress(orjson.JSONDecodeError, KeyError, TypeError):
            return row_from_json(out)
    words = err.decode(errors="replace").strip().splitlines()
    last = f" {words[-1][:500]}" if words else ""
    return _failed(
        brief, started_s, f"The synthesis worker ended {_how(process.returncode)}.{last}"
    )


def run_worker_now(brief: Brief, timeout_s: float | None = None) -> SynthesisRow:
    """Run one cycle as `run_worker` does and wait for it; not for use inside an event loop."""
    return asyncio.run(run_worker(brief, timeout_s))


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
        trigger=brief.trigger,
        synthesizer=brief.synthesizer.value,
        seconds=time.monotonic() - started_s,
        cpu_seconds=0.0,
        tokens=0,
        cost_usd=0.0,
        error=error,
    )
