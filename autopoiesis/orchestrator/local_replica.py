"""A replica whose process is ours: started, put to sleep, woken and stopped, with all that took."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

from autopoiesis.orchestrator.child import Child
from autopoiesis.replicas.devices import PlacementError
from autopoiesis.replicas.fleet import Command, Member
from autopoiesis.replicas.limits import Limits
from autopoiesis.replicas.probe import ProbeError, Server, answers, probe
from autopoiesis.replicas.vllm_phases import Phases, phases
from autopoiesis.replicas.vllm_process import tail

POLL_S = 0.2
ASK_S = 2.0
WAKE_S = 120.0
"""Longest time in which a replica falls asleep or wakes up."""
WARM_UP_S = 120.0
"""Longest first answer: some kernels are compiled by the first request that needs them."""


class ReplicaFailedError(RuntimeError):
    """A replica did not come up; the message says which, why, and what to do."""


class Started(NamedTuple):
    """What came up, and what it took."""

    server: Server
    seconds: float
    """Until it had given its first answers."""
    phases: Phases
    warmup_s: float
    """How much longer its first answer took than its second."""

    @property
    def import_s(self) -> float:
        """What the log does not tell of: processes, imports, opening the port."""
        return max(self.seconds - self.phases.seconds - self.warmup_s, 0.0)


@dataclass(slots=True)
class LocalReplica:
    """One replica and its process."""

    member: Member
    """As it runs, or was started last."""
    child: Child
    command: Callable[[Member], Command]
    """How to start it with the limits that it is to have; raises PlacementError."""
    explain: Callable[[str], str]
    """The cause of a failed start, from its log."""
    released: Callable[[str], None] = lambda _name: None
    """Told when it has stopped: its GPUs are free."""
    start_limit_s: float = 60.0
    grace_s: float = 5.0
    api_key: str = ""
    log_from: int = 0
    """Where the log of the last start begins."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.member.name

    @property
    def limits(self) -> Limits:
        """What it may do at once."""
        return self.member.limits

    def log(self) -> str:
        """Return what it has logged since its last start."""
        return tail(self.child.log, self.log_from)

    async def start(self, member: Member) -> Started:
        """Start it as `member` says and return once it answers requests.

        Raises:
            ReplicaFailedError: it ended or took too long, and is stopped; or it has no place to run.
        """
        began_s = time.monotonic()
        self.member = member
        deaths = self.child.deaths
        await self.begin()
        try:
            server = await self._up(deaths, began_s + self.start_limit_s)
        except ReplicaFailedError:
            await self.stop()
            raise
        warmup_s = await self._warm_up(server)
        return Started(server, time.monotonic() - began_s, phases(self.log()), warmup_s)

    async def begin(self) -> None:
        """Start its process, and do not wait for anything. Raises ReplicaFailedError."""
        try:
            command = self.command(self.member)
        except PlacementError as error:
            raise ReplicaFailedError(str(error)) from None
        self.child.change(command.argv, command.environment, command.cores)
        with suppress(OSError):
            self.log_from = self.child.log.stat().st_size
        try:
            await self.child.start()
        except OSError as error:
            raise ReplicaFailedError(
                f"{command.argv[0]} cannot be run ({error.strerror}); name an interpreter with --vllm-python"
            ) from None

    async def stop(self) -> None:
        """End its process; what is in flight there should have ended before."""
        await self.child.stop(self.grace_s)
        self.released(self.name)

    async def sleep(self) -> None:
        """Free its GPU's memory; it holds requests silently from then on. Raises ReplicaFailedError."""
        await self._post("/sleep?level=1")
        await self._until_sleeping(True)

    async def wake(self) -> Started:
        """Let it answer again. Raises ReplicaFailedError."""
        began_s = time.monotonic()
        await self._post("/wake_up")
        await self._until_sleeping(False)
        try:
            server = await probe(self.member.url, api_key=self.api_key)
        except ProbeError as error:
            raise ReplicaFailedError(str(error)) from None
        warmup_s = await self._warm_up(server)
        nothing = Phases(0.0, 0.0, 0.0, 0.0)
        return Started(server, time.monotonic() - began_s, nothing, warmup_s)

    async def _up(self, deaths: int, until_s: float) -> Server:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_S)) as session:
            while True:
                if self.child.deaths > deaths:
                    cause = self.explain(self.log())
                    raise ReplicaFailedError(
                        f"{self.name} did not start: {cause} (log: {self.child.log})"
                    )
                if await answers(session, f"{self.member.url}/health"):
                    with suppress(ProbeError):
                        return await probe(self.member.url, api_key=self.api_key)
                if time.monotonic() > until_s:
                    raise ReplicaFailedError(
                        f"{self.name} was not up after {self.start_limit_s:g} s; raise vllm_start_s, or "
                        f"look at {self.child.log}"
                    )
                await asyncio.sleep(POLL_S)

    async def _warm_up(self, server: Server) -> float:
        """Ask for two short answers; return how much longer the first one took [s], 0 if it gives none."""
        body = {"model": server.models[0], "prompt": "Warm up.", "max_tokens": 2}
        took_s: list[float] = []
        limit = aiohttp.ClientTimeout(total=WARM_UP_S)
        async with aiohttp.ClientSession(timeout=limit, headers=self._headers()) as session:
            for _ in range(2):
                began_s = time.monotonic()
                try:
                    async with session.post(
                        f"{self.member.url}/v1/completions", json=body
                    ) as answer:
                        await answer.read()
                        if answer.status != 200:
                            return 0.0  # a model that completes nothing: of embeddings, say
                except (aiohttp.ClientError, TimeoutError, OSError):
                    return 0.0
                took_s.append(time.monotonic() - began_s)
        return max(took_s[0] - took_s[1], 0.0)

    async def _post(self, path: str) -> None:
        await self._ask("POST", path)

    async def _until_sleeping(self, sleeping: bool) -> None:
        until_s = time.monotonic() + WAKE_S
        while True:
            told = await self._ask("GET", "/is_sleeping")
            if isinstance(told, dict) and told.get("is_sleeping") is sleeping:  # pyright: ignore[reportUnknownMemberType]
                return
            if time.monotonic() > until_s:
                how = "fall asleep" if sleeping else "wake up"
                raise ReplicaFailedError(f"{self.name} did not {how} within {WAKE_S:g} s")
            await asyncio.sleep(POLL_S)

    async def _ask(self, method: str, path: str) -> Any:
        limit = aiohttp.ClientTimeout(total=WAKE_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=limit, headers=self._headers()) as session,
                session.request(method, f"{self.member.url}{path}") as answer,
            ):
                if answer.status != 200:
                    raise ReplicaFailedError(
                        f"{self.name} answered {answer.status} to {path.partition('?')[0]}; is "
                        "--enable-sleep-mode among its arguments, and its vLLM new enough?"
                    )
                return await answer.json(content_type=None) if method == "GET" else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ReplicaFailedError(
                f"{self.name} did not answer to {path.partition('?')[0]}: {error}"
            ) from None

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
