"""Open-loop load: a trace's requests, each sent at its time, whatever became of the earlier ones."""

import asyncio
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import uvloop
from numpy.typing import NDArray

from autopoiesis.gateway.load_prompts import PromptText, request_body
from autopoiesis.replicas.probe import Server, probe
from autopoiesis.twin.trace import Trace

DRAIN_S = 30.0
"""How long the last requests may take after the last one was sent."""
CONNECT_S = 30.0
TAIL_BYTES = 1024
"""The end of a stream, where `usage` is."""
PROGRESS_S = 5.0
SHED = 429

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    index: int
    """Its place in the trace."""
    status: int
    """HTTP status; 0 if there was no answer, -1 if it was still running at the end."""
    complete: bool
    """Status 200 and the stream came to its proper end."""
    lag_s: float
    """How much later than planned it was sent: the generator's own fault."""
    ttft_s: float | None
    """Sent to first body chunk."""
    e2e_s: float
    output_tokens: int
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What a load run measured; percentiles are over completed requests, None if there are none."""

    trace: str
    url: str
    model: str
    requests: int
    completed: int
    shed: int
    failed: int
    unfinished: int
    duration_s: float
    requests_s: float
    tokens_s: float
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    e2e_mean_s: float | None
    e2e_p50_s: float | None
    e2e_p99_s: float | None
    lag_p50_s: float | None
    lag_p99_s: float | None
    statuses: dict[str, int]
    """HTTP status → answers."""
    errors: dict[str, int]
    """What went wrong → how often; the most frequent ones."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON and tables."""
        return {name: getattr(self, name) for name in self.__slots__}


async def replay_load(
    trace: Trace,
    url: str,
    speed: float = 1.0,
    until_s: float | None = None,
    max_requests: int | None = None,
    on_done: Callable[[Answer], None] | None = None,
    seed: int = 0,
    drain_s: float = DRAIN_S,
    stop: asyncio.Event | None = None,
) -> LoadSummary:
    """Send the trace, `speed` times as fast, for `until_s` seconds or until `stop` is set.

    Then wait up to `drain_s` for what still runs. Errors are counted, not raised.

    Raises:
        ProbeError: there is no OpenAI-compatible server at the URL.
    """
    server = await probe(url)
    chosen = trace if max_requests is None else trace.head(max_requests)
    due = chosen.arrival_s / speed
    count = len(due) if until_s is None else int(np.searchsorted(due, until_s))
    run = _Run(chosen, server, PromptText(chosen, seed), on_done)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await run.send(session, due[:count], stop or asyncio.Event())
        await run.drain(drain_s, stop or asyncio.Event())
    return run.summary()


class _Run:
    """One replay under way."""

    def __init__(
        self,
        trace: Trace,
        server: Server,
        text: PromptText,
        on_done: Callable[[Answer], None] | None,
    ) -> None:
        self._trace = trace
        self._server = server
        self._text = text
        self._on_done = on_done
        self._url = f"{server.url}/v1/chat/completions"
        self._running: set[asyncio.Task[None]] = set()
        self._answers: list[Answer] = []
        self._start_s = time.monotonic()
        self._end_s = self._start_s

    async def send(
        self, session: aiohttp.ClientSession, due: NDArray[np.float64], stop: asyncio.Event
    ) -> None:
        """Start each request at its time."""
        self._start_s = time.monotonic()
        for i, due_s in enumerate(due.tolist()):
            body = request_body(self._trace, i, self._text.of(i), self._server)
            wait_s = self._start_s + due_s - time.monotonic()
            if wait_s > 0 and await _set_within(stop, wait_s):
                return
            task = asyncio.create_task(self._request(session, i, body, self._start_s + due_s))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            await asyncio.sleep(0)

    async def drain(self, drain_s: float, stop: asyncio.Event) -> None:
        """Wait for what still runs, at most `drain_s`; the rest is cut off and counted as unfinished."""
        if self._running:
            ended = asyncio.gather(*self._running)
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait(
                {ended, stopped}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED
            )
            stopped.cancel()
            ended.cancel()
            await asyncio.gather(ended, stopped, return_exceptions=True)
        self._end_s = time.monotonic()

    async def _request(
        self, session: aiohttp.ClientSession, i: int, body: bytes, due_s: float
    ) -> None:
        headers = {"Content-Type": "application/json"}
        if session_hash := int(self._trace.session[i]):
            headers["x-session-id"] = f"{session_hash & (2**64 - 1):016x}"
        sent_s = time.monotonic()
        status, ttft_s, events, tail, error = 0, None, 0, b"", ""
        try:
            async with session.post(self._url, data=body, headers=headers) as response:
                status = response.status
                async for chunk in response.content.iter_any():
                    if ttft_s is None:
                        ttft_s = time.monotonic() - sent_s
                    events += chunk.count(b"data:")
                    tail = (tail + chunk)[-TAIL_BYTES:]
        except asyncio.CancelledError:
            status, error = -1, "still running at the end"
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            error = f"{type(problem).__name__}: {problem}".partition("\n")[0][:120]
        if status == 200 and not error:
            error = (
                ""
                if b"data: [DONE]" in tail and b'data: {"error"' not in tail
                else "stream broke off"
            )
        elif status > 0 and not error:
            error = f"HTTP {status}"
        usage = _COMPLETION_TOKENS.search(tail)
        answer = Answer(
            index=i,
            status=status,
            complete=not error,
            lag_s=sent_s - due_s,
            ttft_s=ttft_s,
            e2e_s=time.monotonic() - sent_s,
            output_tokens=int(usage[1]) if usage else max(events - 2, 0),
            error=error,
        )
        self._answers.append(answer)
        if self._on_done:
            self._on_done(answer)

    def summary(self) -> LoadSummary:
        """Sum up."""
        done = [a for a in self._answers if a.complete]
        wrong = Counter(a.error for a in self._answers if a.error and a.status >= 0)
        duration_s = max(self._end_s - self._start_s, 1e-9)
        shed = sum(a.status == SHED for a in self._answers)
        unfinished = sum(a.status < 0 for a in self._answers)
        ttft = _mean_p50_p99([a.ttft_s for a in done])
        tpot = _mean_p50_p99([a.tpot_s for a in done])
        e2e = _mean_p50_p99([a.e2e_s for a in done])
        lag = _mean_p50_p99([a.lag_s for a in self._answers])
        statuses = Counter(str(a.status) for a in self._answers if a.status > 0)
        return LoadSummary(
            trace=self._trace.name,
            url=self._server.url,
            model=self._server.models[0],
            requests=len(self._answers),
            completed=len(done),
            shed=shed,
            failed=len(self._answers) - len(done) - shed - unfinished,
            unfinished=unfinished,
            duration_s=duration_s,
            requests_s=len(done) / duration_s,
            tokens_s=sum(a.output_tokens for a in done) / duration_s,
            ttft_mean_s=ttft[0],
            ttft_p50_s=ttft[1],
            ttft_p99_s=ttft[2],
            tpot_mean_s=tpot[0],
            tpot_p50_s=tpot[1],
            tpot_p99_s=tpot[2],
            e2e_mean_s=e2e[0],
            e2e_p50_s=e2e[1],
            e2e_p99_s=e2e[2],
            lag_p50_s=lag[1],
            lag_p99_s=lag[2],
            statuses=dict(sorted(statuses.items())),
            errors=dict(wrong.most_common(5)),
        )


def _mean_p50_p99(values: list[float | None]) -> tuple[float | None, float | None, float | None]:
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return None, None, None
    return float(known.mean()), float(np.median(known)), float(np.percentile(known, 99))


async def _set_within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True


def run_load(
    trace: Trace,
    url: str,
    speed: float,
    for_s: float | None,
    max_requests: int | None,
    seed: int,
    quiet: bool,
) -> LoadSummary:
    """Replay a trace from the command line; SIGINT and SIGTERM end it early, with its summary."""
    return uvloop.run(_run_load(trace, url, speed, for_s, max_requests, seed, quiet))


async def _run_load(
    trace: Trace,
    url: str,
    speed: float,
    for_s: float | None,
    max_requests: int | None,
    seed: int,
    quiet: bool,
) -> LoadSummary:
    _allow_connections()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    counts: Counter[str] = Counter()

    def count(answer: Answer) -> None:
        counts[
            "completed" if answer.complete else "shed" if answer.status == SHED else "failed"
        ] += 1

    progress = asyncio.create_task(_tell(counts)) if not quiet else None
    try:
        return await replay_load(trace, url, speed, for_s, max_requests, count, seed, stop=stop)
    finally:
        if progress:
            progress.cancel()


async def _tell(counts: Counter[str]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        sys.stderr.write(", ".join(f"{n} {what}" for what, n in counts.items()) + "\n")


def _allow_connections() -> None:
    """Raise the limit on open files: open-loop load has as many connections as requests in flight."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
