"""The link between picker and controller: one JSON message per line on a Unix socket.

The controller sends allocations; the picker sends what happened, in numbered batches that it keeps
until they are acknowledged and sends again after a reconnect. Either side may die and come back.
"""

import asyncio
import logging
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell
from autopoiesis.arms.objective import Objective
from autopoiesis.telemetry.records import OpenRequest, ReplicaSample, RequestRecord, Status

log = logging.getLogger(__name__)

LONGEST_LINE = 64 << 20
BATCH_INTERVAL_S = 0.5
MOST_PER_BATCH = 2_000
MOST_BUFFERED = 50_000
"""Requests kept for a controller that is away; the oldest are dropped first."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.05, 2.0


class LinkError(ValueError):
    """A message is not understood; the message says why."""


@dataclass(frozen=True, slots=True)
class Allocate:
    """Serve by this allocation from now on."""

    allocation: Allocation
    arms: dict[str, str]
    """Arm id → source of its policy."""
    objective: Objective
    slow_ids: dict[str, str] = field(default_factory=dict[str, str])
    """Arm id → id of its slow policy, where it has one: both are in the arm's id."""
    baseline: str = ""
    """The arm that decides where another fails; empty: the picker's own."""
    standing: tuple[str, ...] = ()
    """Arms that may serve: what they hold leaves by their rules where others have taken over."""

    def encode(self) -> bytes:
        """Return the message as one line of JSON, without the line's end."""
        return orjson.dumps(
            {
                "kind": "allocate",
                "window": self.allocation.window,
                "cells": self.allocation.cells,
                "arms": self.arms,
                "slow_ids": self.slow_ids,
                "baseline": self.baseline,
                "standing": self.standing,
                "objective": self.objective,
            }
        )

    @classmethod
    def decode(cls, message: Mapping[str, Any]) -> "Allocate":
        """Read a message; raise `LinkError`."""
        try:
            cells = tuple(
                Cell(
                    str(c["arm_id"]),
                    tuple(c["replicas"]),
                    tuple(c["shards"]),
                    float(c["propensity"]),
                )
                for c in message["cells"]
            )
            window, arms = int(message["window"]), dict(message["arms"])
            objective = Objective(**message["objective"])
            slow_ids = dict(message.get("slow_ids", {}))
            baseline = str(message.get("baseline", ""))
            standing = tuple(map(str, message.get("standing", ())))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LinkError(f"The allocation is not understood: {error!r}.") from None
        shards: list[object] = [shard for cell in cells for shard in cell.shards]
        if any(not isinstance(s, int) or not 0 <= s < SHARDS for s in shards) or len(
            set(shards)
        ) < len(shards):
            raise LinkError(
                f"The allocation's shards must be distinct whole numbers from 0 to {SHARDS - 1}."
            )
        return cls(Allocation(window, cells), arms, objective, slow_ids, baseline, standing)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that went wrong in the picker; `arm_id` is empty if no arm had a part in it."""

    arm_id: str
    count: int
    message: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What happened since the batch before."""

    sequence: int
    boot: str
    """Differs each time the picker starts; sequences begin anew with it."""
    requests: tuple[RequestRecord, ...]
    open_requests: tuple[OpenRequest, ...]
    """What is in flight or held now."""
    replicas: tuple[ReplicaSample, ...]
    faults: tuple[Fault, ...]

    def encode(self) -> bytes:
        """Return the batch as one line of JSON, without the line's end."""
        return orjson.dumps(
            {
                "kind": "batch",
                "sequence": self.sequence,
                "boot": self.boot,
                "requests": self.requests,
                "open_requests": self.open_requests,
                "replicas": self.replicas,
                "faults": self.faults,
            }
        )

    @classmethod
    def decode(cls, message: Mapping[str, Any]) -> "Batch":
        """Read a message; raise `LinkError`."""
        try:
            return cls(
                sequence=int(message["sequence"]),
                boot=str(message["boot"]),
                requests=tuple(_request(row) for row in message["requests"]),
                open_requests=tuple(_open_request(row) for row in message["open_requests"]),
                replicas=tuple(ReplicaSample(**row) for row in message["replicas"]),
                faults=tuple(Fault(**row) for row in message["faults"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LinkError(f"The batch is not understood: {error!r}.") from None


def _request(row: dict[str, Any]) -> RequestRecord:
    row["status"] = Status(row["status"])
    row["blocks"] = tuple(row["blocks"])
    return RequestRecord(**row)


def _open_request(row: dict[str, Any]) -> OpenRequest:
    row["blocks"] = tuple(row["blocks"])
    return OpenRequest(**row)


def decode_line(line: bytes) -> dict[str, Any]:
    """Read one line; raise `LinkError` if it is no message."""
    try:
        message = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise LinkError(f"A line on the link is not JSON: {error}.") from None
    if not isinstance(message, dict) or "kind" not in message:
        raise LinkError("A message on the link must be an object with a kind.")
    return cast("dict[str, Any]", message)


class Outbox:
    """The picker's batches until they are acknowledged."""

    def __init__(
        self,
        most_buffered: int = MOST_BUFFERED,
        open_requests: Callable[[], tuple[OpenRequest, ...]] = tuple,
    ) -> None:
        """Keep at most `most_buffered` requests; `open_requests` tells what is in flight or held."""
        self.boot = secrets.token_hex(4)
        self._open_requests = open_requests
        self._most_buffered = most_buffered
        self._requests: deque[RequestRecord] = deque()
        self._samples: dict[tuple[str, int], ReplicaSample] = {}
        self._faults: Counter[tuple[str, str]] = Counter()
        self._unacknowledged: deque[Batch] = deque()
        self._sequence = 0
        self._buffered = 0
        self._dropped = 0

    @property
    def unacknowledged(self) -> tuple[Batch, ...]:
        """Batches that were made and not acknowledged, oldest first."""
        return tuple(self._unacknowledged)

    def add_request(self, record: RequestRecord) -> None:
        """Add a request that ended."""
        self._requests.append(record)
        self._buffered += 1
        while self._buffered > self._most_buffered:
            self._drop_oldest()

    def add_sample(self, sample: ReplicaSample) -> None:
        """Add what a replica reports; of those that come within a second, the last is kept."""
        self._samples[sample.replica, int(sample.at_s)] = sample
        if len(self._samples) > self._most_buffered:
            del self._samples[next(iter(self._samples))]

    def add_fault(self, arm_id: str, message: str, count: int = 1) -> None:
        """Count a fault."""
        self._faults[arm_id, message] += count

    def next_batch(self) -> Batch | None:
        """Make a batch of what has come in; None if nothing has."""
        if self._dropped:
            self._faults["", "request records were dropped because the controller was away"] += (
                self._dropped
            )
            self._dropped = 0
        if not (self._requests or self._samples or self._faults):
            return None
        count = min(MOST_PER_BATCH, len(self._requests))
        self._sequence += 1
        batch = Batch(
            sequence=self._sequence,
            boot=self.boot,
            requests=tuple(self._requests.popleft() for _ in range(count)),
            open_requests=self._open_requests(),
            replicas=tuple(self._samples.values()),
            faults=tuple(Fault(arm, n, message) for (arm, message), n in self._faults.items()),
        )
        self._samples.clear()
        self._faults.clear()
        self._unacknowledged.append(batch)
        return batch

    def acknowledge(self, sequence: int) -> None:
        """Forget the batches up to this one."""
        while self._unacknowledged and self._unacknowledged[0].sequence <= sequence:
            self._buffered -= len(self._unacknowledged.popleft().requests)

    def _drop_oldest(self) -> None:
        if self._unacknowledged:
            lost = len(self._unacknowledged.popleft().requests)
        else:
            self._requests.popleft()
            lost = 1
        self._buffered -= lost
        self._dropped += lost


class LinkServer:
    """The picker's side. One controller at a time: a newer connection replaces the older one."""

    def __init__(self, outbox: Outbox, on_allocate: Callable[[Allocate], None]) -> None:
        self._outbox = outbox
        self._on_allocate = on_allocate
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def start(self, path: Path) -> None:
        """Listen on a Unix socket."""
        path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(path), limit=LONGEST_LINE)

    async def run(self) -> None:
        """Send batches until cancelled."""
        while True:
            await asyncio.sleep(BATCH_INTERVAL_S)
            if self._writer is not None:
                while batch := self._outbox.next_batch():
                    self._writer.write(batch.encode() + b"\n")
                    if len(batch.requests) < MOST_PER_BATCH:
                        break

    async def close(self) -> None:
        """Stop listening and hang up."""
        if self._writer:
            self._writer.close()
        if self._server:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = writer
        try:
            for batch in self._outbox.unacknowledged:
                writer.write(batch.encode() + b"\n")
                await writer.drain()
            async for line in reader:
                self._take(line)
        except (ConnectionError, ValueError) as error:  # ValueError: a line beyond the limit
            log.warning("The link to the controller broke: %s", error)
        finally:
            if self._writer is writer:
                self._writer = None
            writer.close()

    def _take(self, line: bytes) -> None:
        try:
            message = decode_line(line)
            if message["kind"] == "allocate":
                self._on_allocate(Allocate.decode(message))
            elif message["kind"] == "ack":
                self._outbox.acknowledge(int(message["sequence"]))
            else:
                raise LinkError(f"A message of kind {message['kind']!r} is not understood.")
        except (LinkError, KeyError, TypeError, ValueError) as error:
            log.warning("%s", error)
            self._outbox.add_fault("", str(error))


class PickerLink:
    """The controller's side: `async with PickerLink(path) as link: async for batch in link: ...`.

    It connects by itself, again and again; the last allocation is sent anew after each connect.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batches: asyncio.Queue[Batch] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None
        self._last_allocation: bytes | None = None
        self._seen: tuple[str, int] = ("", 0)
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "PickerLink":
        """Begin to connect."""
        self._keeper = asyncio.create_task(self._keep_connected(), name="picker link")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Hang up."""
        if self._keeper:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Iterate over batches as they come, each once."""
        return self

    async def __anext__(self) -> Batch:
        """Wait for the next batch."""
        return await self._batches.get()

    @property
    def is_connected(self) -> bool:
        """Whether the picker is there."""
        return self._writer is not None and not self._writer.is_closing()

    def allocate(self, message: Allocate) -> None:
        """Have the picker serve by this allocation, now or as soon as it is there again."""
        line = message.encode() + b"\n"
        self._last_allocation = line
        self._send(line)

    def acknowledge(self, batches: Sequence[Batch]) -> None:
        """Tell the picker that these batches are safe; call it after they were written."""
        boot = self._seen[0]
        if sequences := [batch.sequence for batch in batches if batch.boot == boot]:
            self._send(orjson.dumps({"kind": "ack", "sequence": max(sequences)}) + b"\n")

    def _send(self, line: bytes) -> None:
        if self._writer is not None and self.is_connected:
            self._writer.write(line)

    async def _keep_connected(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(
                    str(self._path), limit=LONGEST_LINE
                )
            except OSError:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                continue
            backoff_s = FIRST_BACKOFF_S
            self._writer = writer
            if self._last_allocation:
                writer.write(self._last_allocation)
            try:
                async for line in reader:
                    self._take(line)
            except (ConnectionError, ValueError) as error:
                log.warning("The link to the picker broke: %s", error)
            finally:
                self._writer = None
                writer.close()

    def _take(self, line: bytes) -> None:
        try:
            batch = Batch.decode(decode_line(line))
        except LinkError as error:
            log.warning("%s", error)
            return
        boot, sequence = self._seen
        if batch.boot == boot and batch.sequence <= sequence:
            return  # sent again after a reconnect, but it is here already
        self._seen = (batch.boot, batch.sequence)
        self._batches.put_nowait(batch)
