"""What vLLM replicas say of themselves on `/metrics`, polled from all of them."""

import asyncio
import errno
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import aiohttp

log = logging.getLogger(__name__)

_NAMES: dict[str, tuple[bytes, ...]] = {
    "running": (b"vllm:num_requests_running",),
    "waiting": (b"vllm:num_requests_waiting",),
    "kv_usage": (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc"),
    "prefix_queries_total": (
        b"vllm:prefix_cache_queries_total",
        b"vllm:gpu_prefix_cache_queries_total",
    ),
    "prefix_hits_total": (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total"),
    "preemptions_total": (b"vllm:num_preemptions_total",),
    "generated_tokens_total": (b"vllm:generation_tokens_total",),
}
"""Field → the metric's name now, then older ones."""
_CACHE = b"vllm:cache_config_info"
_GPU_BLOCKS = re.compile(rb'[{,]num_gpu_blocks="(\d+)"')
_BLOCK_SIZE = re.compile(rb'[{,]block_size="(\d+)"')


@dataclass(frozen=True, slots=True)
class Scrape:
    """One replica's figures, summed over its engines (`kv_usage`: their mean); None: not told."""

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    prefix_queries_total: float | None = None
    prefix_hits_total: float | None = None
    preemptions_total: float | None = None
    generated_tokens_total: float | None = None
    kv_blocks: int | None = None
    block_size: int | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the figures that the replica does not tell."""
        return tuple(name for name in self.__slots__ if getattr(self, name) is None)


def parse_metrics(text: bytes) -> Scrape:
    """Read the few families that are needed from Prometheus text."""
    data = b"\n" + text
    values = {field: _values(data, names) for field, names in _NAMES.items()}
    sums = {field: sum(found) if found else None for field, found in values.items()}
    usage = values["kv_usage"]
    caches = list(_labels(data, _CACHE))
    blocks = [int(found[1]) for labels in caches if (found := _GPU_BLOCKS.search(labels))]
    sizes = [int(found[1]) for labels in caches if (found := _BLOCK_SIZE.search(labels))]
    return Scrape(
        running=sums["running"],
        waiting=sums["waiting"],
        kv_usage=sum(usage) / len(usage) if usage else None,
        prefix_queries_total=sums["prefix_queries_total"],
        prefix_hits_total=sums["prefix_hits_total"],
        preemptions_total=sums["preemptions_total"],
        generated_tokens_total=sums["generated_tokens_total"],
        kv_blocks=sum(blocks) if blocks else None,
        block_size=sizes[0] if sizes else None,
    )


def _values(data: bytes, names: tuple[bytes, ...]) -> list[float]:
    """Return the samples of the first of these names that there is."""
    for name in names:
        found = list(_samples(data, name))
        if found:
            return found
    return []


def _lines(data: bytes, name: bytes) -> list[bytes]:
    """Return what follows the name on each of its sample lines."""
    lines: list[bytes] = []
    start = data.find(b"\n" + name)
    while start >= 0:
        after = start + 1 + len(name)
        end = data.find(b"\n", after)
        end = len(data) if end < 0 else end
        if data[after : after + 1] in {b"{", b" "}:
            lines.append(data[after:end])
        start = data.find(b"\n" + name, end)
    return lines


def _samples(data: bytes, name: bytes) -> list[float]:
    samples: list[float] = []
    for line in _lines(data, name):
        words = line[line.rfind(b"}") + 1 :].split()
        try:
            value = float(words[0])
        except (IndexError, ValueError):
            continue
        if value == value and abs(value) != float("inf"):  # noqa: PLR0124 - NaN differs from itself
            samples.append(value)
    return samples


def _labels(data: bytes, name: bytes) -> list[bytes]:
    return [line[: line.rfind(b"}") + 1] for line in _lines(data, name)]


@dataclass(frozen=True, slots=True)
class Health:
    """What polling one replica has shown so far."""

    replica: str
    scrape: Scrape | None = None
    """The last one that succeeded."""
    scraped_s: float = float("-inf")
    """When that was, on the scraper's clock."""
    failures: int = 0
    """Failures in a row."""
    healthy: bool = False
    """It answered within the last few polls; False before its first answer."""
    error: str = ""
    """What went wrong last time, empty if nothing."""
    refused: bool = False
    """Nobody listened at its address: the server is gone, not only slow."""

    def age_s(self, now_s: float) -> float:
        """Return how old the figures are."""
        return now_s - self.scraped_s


def _was_refused(error: Exception) -> bool:
    return (
        isinstance(error, aiohttp.ClientConnectorError)
        and error.os_error.errno == errno.ECONNREFUSED
    )


class Scraper:
    """Polls each replica's `/metrics` on its own schedule, so that a slow one delays no other."""

    def __init__(
        self,
        replicas: Mapping[str, str],
        on_result: Callable[[Health], None],
        interval_s: float = 0.5,
        timeout_s: float = 2.0,
        unhealthy_after: int = 3,
        clock: Callable[[], float] = time.monotonic,
        told_missing: set[tuple[str, str]] | None = None,
    ) -> None:
        """Prepare to poll `replicas` (name → host:port); `on_result` is told after every poll.

        `told_missing` holds the figures (replica, name) whose absence was told already; new ones join it.
        """
        self.health = {name: Health(name) for name in replicas}
        self._addresses = dict(replicas)
        self._on_result = on_result
        self._interval_s = interval_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._unhealthy_after = unhealthy_after
        self._clock = clock
        self._told_missing = set[tuple[str, str]]() if told_missing is None else told_missing

    async def run(self) -> None:
        """Poll until cancelled."""
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=self._timeout, connector=connector) as session,
            asyncio.TaskGroup() as polls,
        ):
            for place, name in enumerate(self._addresses):
                offset_s = self._interval_s * place / len(self._addresses)
                polls.create_task(self._poll(session, name, offset_s))

    async def _poll(self, session: aiohttp.ClientSession, name: str, offset_s: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + offset_s
        while True:
            await asyncio.sleep(due - loop.time())
            self.health[name] = await self._scraped(session, name)
            self._on_result(self.health[name])
            # A poll that took longer than the interval skips turns instead of catching up.
            due = max(due + self._interval_s, loop.time())

    async def _scraped(self, session: aiohttp.ClientSession, name: str) -> Health:
        before = self.health[name]
        try:
            async with session.get(f"http://{self._addresses[name]}/metrics") as answer:
                if answer.status != 200:
                    return self._failed(before, f"/metrics answered {answer.status}")
                scrape = parse_metrics(await answer.read())
        except TimeoutError:
            return self._failed(before, f"/metrics took longer than {self._timeout.total:g} s")
        except (aiohttp.ClientError, OSError) as error:
            told = str(error).partition("\n")[0] or type(error).__name__
            return self._failed(before, told, refused=_was_refused(error))
        self._tell_missing(name, scrape)
        return Health(name, scrape, self._clock(), 0, healthy=True)

    def _failed(self, before: Health, error: str, *, refused: bool = False) -> Health:
        failures = before.failures + 1
        healthy = before.healthy and failures < self._unhealthy_after and not refused
        return replace(before, failures=failures, healthy=healthy, error=error, refused=refused)

    def _tell_missing(self, name: str, scrape: Scrape) -> None:
        new = [field for field in scrape.missing if (name, field) not in self._told_missing]
        if new:
            self._told_missing.update((name, field) for field in new)
            log.warning(
                "%s does not tell %s on /metrics; it is taken as unknown", name, ", ".join(new)
            )
