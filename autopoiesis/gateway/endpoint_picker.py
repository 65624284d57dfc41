"""Envoy's external processor: answers "which replica?" for one request after another.

Per request one gRPC stream: the body comes, the decision goes; for a streamed answer the first
body chunk comes too, which is the first token, and then Envoy goes on alone.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from typing import Any

from autopoiesis.arms.allocation import ROOT_TOKENS, shard_of
from autopoiesis.arms.prefix import BLOCK_TOKENS, block_hashes
from autopoiesis.gateway import protocol
from autopoiesis.gateway.access_log import CLIENT_CLOSED
from autopoiesis.gateway.errors import INVALID_REQUEST, OVERLOADED, openai_error
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.ledger import Ledger
from autopoiesis.gateway.prompt import BadRequestError, Prompt, read_prompt
from autopoiesis.gateway.protocol import GO_ON, Message, Stream
from autopoiesis.gateway.settings import LONGEST_ID, SESSION_HEADER, DataPlaneSettings
from autopoiesis.gateway.state import Addresses, GatewayState, Shed
from autopoiesis.telemetry.records import Status

log = logging.getLogger(__name__)

HOLD_S = 60.0
"""Longest time for which a request is held before it is shed."""
RETRY_AFTER_S = 1
TICK_S = 0.05
"""Held requests are looked at this often, whatever happens."""
RELEASE_SHARE = 0.1
"""Share of the time that looking at held requests may take."""
WAIT = protocol.wait(DataPlaneSettings().longest_hold_s)


class EndpointPicker:
    """The service; it decides by `state` and accounts in `ledger`."""

    def __init__(self, state: GatewayState, ledger: Ledger, salt: bytes) -> None:
        """`salt` keeps the hashes of sessions and prompts from being guessed."""
        self._state = state
        self._ledger = ledger
        self._salt = salt
        self._boot = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Addresses]] = {}
        self._release_after_s = 0.0

    async def tick(self) -> None:
        """Look after held requests until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._state.assume_first_tokens()
            self.release()

    def release(self) -> None:
        """Let held requests go for which there is a replica now."""
        before_s = self._state.clock()
        if not self._waiting or before_s < self._release_after_s:
            return
        for flight, addresses in self._state.release():
            future = self._waiting.get(flight.key)
            if future is not None and not future.done():
                future.set_result(addresses)
            else:
                self._state.retract(flight)  # nobody waits any more
        after_s = self._state.clock()
        self._release_after_s = after_s + (after_s - before_s) * (1.0 / RELEASE_SHARE - 1.0)

    async def process(self, _: object, stream: Stream) -> None:
        """Serve one request: a gRPC stream of its own."""
        with suppress(protocol.BROKEN):  # Envoy's own log tells
            await self._converse(stream)

    async def _converse(self, stream: Stream) -> None:
        flight: Flight | None = None
        while (message := await stream.read()) is not protocol.END:
            kind = message.WhichOneof("request")
            if kind == "request_body" and flight is None:
                flight = await self._request(message, stream)
                if flight is None or not flight.stream:
                    return
            else:
                await stream.write(GO_ON[kind])
                if kind == "response_body" and flight is not None:
                    self._first_chunk(flight, protocol.attributes(message))
                    return

    async def _request(self, message: Message, stream: Stream) -> Flight | None:
        """Decide on a request and answer; None if it goes nowhere or is none of the picker's business."""
        started_s = time.perf_counter()
        attributes = protocol.attributes(message)
        try:
            flight = self._arrival(attributes, message.request_body.body)
        except BadRequestError as error:
            told = openai_error(str(error), INVALID_REQUEST, "bad_request", error.param)
            await stream.write(protocol.refusal(400, told))
            return None
        except Exception:
            log.exception("A request could not be read")
            self._state.faults.note("", "a request could not be read")
            await stream.write(GO_ON["request_body"])
            return None
        addresses = await self._decide(flight, started_s, stream)
        if addresses is None:
            return None
        self._ledger.open(flight)
        try:
            await stream.write(protocol.choice(flight, addresses))
        except BaseException:  # Envoy gave up waiting, or its client did
            self._ledger.retract(flight)
            raise
        return flight

    async def _decide(self, flight: Flight, started_s: float, stream: Stream) -> Addresses | None:
        """Return where to send the request, after a wait if need be; None if it was refused."""
        try:
            addresses = self._by_policy(flight)
            flight.decision_s = time.perf_counter() - started_s
            return addresses if addresses is not None else await self._hold(flight, stream)
        except Shed as refusal:
            self._ledger.settle(flight, Status.SHED, 429)
            message = f"{refusal}; try again in {RETRY_AFTER_S} s."
            error = openai_error(message, OVERLOADED, "overloaded")
            await stream.write(protocol.refusal(429, error, {"retry-after": str(RETRY_AFTER_S)}))
            return None

    def _by_policy(self, flight: Flight) -> Addresses | None:
        try:
            return self._state.decide(flight)
        except Shed:
            raise
        except Exception as error:  # no arm's fault, but ours
            self._state.faults.count("", error)
            return self._state.least_loaded(flight)

    async def _hold(self, flight: Flight, stream: Stream) -> Addresses:
        future: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
        self._waiting[flight.key] = future
        try:
            await stream.write(WAIT)
            return await asyncio.wait_for(future, HOLD_S)
        except TimeoutError:
            self._state.drop_held(flight)
            raise Shed(f"No replica was free for {HOLD_S:.0f} s") from None
        except BaseException:  # the client went away
            self._state.drop_held(flight)
            self._state.retract(flight)  # in case it was placed at this very moment
            self._ledger.settle(flight, Status.ABORTED, CLIENT_CLOSED)
            raise
        finally:
            del self._waiting[flight.key]

    def _first_chunk(self, flight: Flight, attributes: Mapping[str, Any]) -> None:
        answered = "response.code" in attributes and attributes["response.code"].number_value < 400
        if answered:
            address = (
                attributes["upstream.address"].string_value
                if "upstream.address" in attributes
                else ""
            )
            self._state.first_token(flight, self._state.at_address(address))
            self.release()

    def _arrival(self, attributes: Mapping[str, Any], body: bytes) -> Flight:
        def text(name: str) -> str:
            return attributes[name].string_value if name in attributes else ""

        path = text("request.path").partition("?")[0]
        request_id = text("request.id")[:LONGEST_ID]
        prompt = read_prompt(path, text("request.headers['content-type']"), body)
        blocks = block_hashes(prompt.text, self._salt)
        session = self._session(text(f"request.headers['{SESSION_HEADER}']") or prompt.user)
        root = session or (
            int(blocks[: ROOT_TOKENS // BLOCK_TOKENS][-1])
            if len(blocks)
            else self._hash(request_id)
        )
        return Flight(
            key=f"{self._boot}-{next(self._numbers)}",
            request_id=request_id,
            path=path,
            model=prompt.model[:LONGEST_ID],
            stream=prompt.stream,
            characters=len(prompt.text),
            input_tokens=self._estimated_tokens(prompt),
            max_output_tokens=float(prompt.max_output_tokens),
            priority_class=prompt.priority_class,
            session=session,
            shard=shard_of(root),
            arrived_s=self._state.clock(),
            arrived_unix_s=time.time(),
            blocks=blocks,
        )

    def _estimated_tokens(self, prompt: Prompt) -> float:
        return float(
            max(1, round(prompt.counted_tokens + len(prompt.text) / self._ledger.chars_per_token))
        )

    def _session(self, name: str) -> int:
        return (self._hash(name) or 1) if name else 0

    def _hash(self, text: str) -> int:
        digest = blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=8, key=self._salt
        ).digest()
        return int.from_bytes(digest, "little", signed=True)
