"""The fleet itself as author: one question at a time, to one replica, only while there is room.

The controller knows what goes on and says on its control port whether the fleet is idle and which
replica is the idlest. A question is put only then, and called off as soon as traffic rises: closing
the connection makes vLLM abort it. Questions go to the replica directly, so clients' figures and
windows stay free of them.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import aiohttp
import orjson

from autopoiesis.synthesis.llm.conversation import Fault
from autopoiesis.synthesis.llm.endpoint import Endpoint
from autopoiesis.synthesis.llm.post import Addressee, NoAddresseeError
from autopoiesis.synthesis.llm.settings import LlmSettings

LOOK_EVERY_S = 0.5
"""How often the fleet is looked at while it is idle, or waited for."""
BLIND_S = 3.0
"""Without news for this long, the fleet counts as busy."""
ANSWER_SHARE = 4
"""An answer may take at most one n-th of the model's context."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spare:
    """What the fleet has to spare."""

    idle: bool
    why: str
    """One line, without a full stop."""
    replica: str = ""
    """Name of the idlest replica."""

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """Read what the control port says."""
        return cls(bool(plain["idle"]), str(plain["why"]), str(plain["replica"]))


class Fleet:
    """Lends the idlest replica of a running instance."""

    def __init__(
        self, settings: LlmSettings, key: str, control_url: str, fleet: Mapping[str, str]
    ) -> None:
        """Ask the controller at `control_url` about the `fleet`: base URLs, without `/v1`, by name."""
        self._fleet = fleet
        self._settings = settings
        self._key = key
        self._control_url = control_url
        self._endpoints: dict[str, Endpoint] = {}
        self._models: dict[str, tuple[str, int]] = {}

    async def addressee(self, model: str, within_s: float) -> Addressee:
        """Wait until the fleet is idle and return its idlest replica. Raises NoAddresseeError."""
        del model
        until_s = time.monotonic() + within_s
        while not (spare := await self._look()).idle:
            if time.monotonic() + LOOK_EVERY_S >= until_s:
                raise NoAddresseeError(Fault.LATE, f"the fleet has no time to spare: {spare.why}.")
            await asyncio.sleep(LOOK_EVERY_S)
        s = self._settings
        if spare.replica not in self._fleet:
            raise NoAddresseeError(Fault.BROKEN, f"{spare.replica} has joined the fleet since.")
        endpoint = self._endpoints.setdefault(
            spare.replica, Endpoint(f"{self._fleet[spare.replica]}/v1", self._key, s.timeout_s)
        )
        name, context_tokens = await self._model(spare.replica, endpoint)
        longest = (
            min(s.max_tokens, context_tokens // ANSWER_SHARE) if context_tokens else s.max_tokens
        )
        extras = {"priority": s.fleet_priority} if s.fleet_priority else {}
        return Addressee(endpoint, name, longest, extras)

    async def unless_called_off(self, work: Awaitable[T]) -> T:
        """Wait for an answer; raise NoAddresseeError as soon as the fleet is no longer idle."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                done, _ = await asyncio.wait({task}, timeout=LOOK_EVERY_S)
                if done:
                    return task.result()
                spare = await self._look()
                if not spare.idle:
                    raise NoAddresseeError(
                        Fault.TRAFFIC, f"called off, traffic has come: {spare.why}."
                    )
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def close(self) -> None:
        """Hang up everywhere."""
        for endpoint in self._endpoints.values():
            await endpoint.close()

    async def _model(self, replica: str, endpoint: Endpoint) -> tuple[str, int]:
        """Return the model that a replica serves, and how many tokens its context has (0: unknown)."""
        if replica not in self._models:
            listed = await endpoint.models()
            if not listed:
                raise NoAddresseeError(
                    Fault.BROKEN, f"{replica} does not say which model it serves."
                )
            context = listed[0].get("max_model_len")
            self._models[replica] = (listed[0]["id"], context if isinstance(context, int) else 0)
        return self._models[replica]

    async def _look(self) -> Spare:
        """Ask the controller; without an answer the fleet counts as busy."""
        try:
            timeout = aiohttp.ClientTimeout(total=BLIND_S)
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"{self._control_url}/spare") as response,
            ):
                return Spare.of(orjson.loads(await response.read()))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return Spare(False, f"the controller at {self._control_url} does not answer")
