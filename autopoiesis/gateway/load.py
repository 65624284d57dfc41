"""Open-loop load: a trace's requests, each sent at its time, whatever became of the earlier ones."""

import asyncio
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

import aiohttp
import numpy as np
import uvloop
from numpy.typing import NDArray

from autopoiesis.gateway.load_prompts import PromptText, request_body
from autopoiesis.gateway.load_summary import SHED, Answer, LoadSummary, summarise
from autopoiesis.replicas.probe import Server, probe
from autopoiesis.twin.trace import Trace

DRAIN_S = 30.0
"""How long the last requests may take after the last one was sent."""
CONNECT_S = 30.0
TAIL_BYTES = 1024
"""The end of a stream, where `usage` is."""
PROGRESS_S = 5.0

_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


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
    chosen = (trace if max_requests is None else trace.head(max_requests)).speed(speed)
    due = chosen.arrival_s
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
        duration_s = max(self._end_s - self._start_s, 1e-9)
        return summarise(self._trace.name, self._server, self._answers, duration_s)


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
