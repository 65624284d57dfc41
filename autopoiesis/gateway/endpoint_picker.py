"""Answers "which replica?" for one request after another, whoever asks it in whatever protocol.

Reads the request, has `state` decide, keeps those waiting whom no replica takes yet, and tells
each asker when its turn has come.
"""

import asyncio
import itertools
import logging
import math
import secrets
import time
from hashlib import blake2b
from typing import NamedTuple, Protocol

from autopoiesis.arms.allocation import ROOT_TOKENS, shard_of
from autopoiesis.arms.prefix import BLOCK_TOKENS, block_hashes
from autopoiesis.gateway.access_log import CLIENT_CLOSED
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.ledger import Ledger
from autopoiesis.gateway.prompt import Prompt, read_prompt
from autopoiesis.gateway.settings import LONGEST_ID
from autopoiesis.gateway.state import Addresses, GatewayState, Shed
from autopoiesis.telemetry.records import Status

log = logging.getLogger(__name__)

HOLD_S = 60.0
"""Longest time for which a request is held before it is shed."""
TICK_S = 0.05
"""Held requests are looked at this often, whatever happens."""
LEAST_PATIENCE_S = 10.0
"""A request that hangs for less is not sent to a second replica, however fast they usually are."""
JUDGE_EVERY = 5
"""Ticks from one look at how fast the replicas work to the next."""
RELEASE_SHARE = 0.1
"""Share of the time that looking at held requests may take."""
ROOT_BLOCKS = ROOT_TOKENS // BLOCK_TOKENS


class Question(NamedTuple):
    """A request as it came: what is needed to decide on it."""

    path: str
    request_id: str
    content_type: str
    session: str
    """The client's own name of its session, empty if it gave none."""
    body: bytes


class Asker(Protocol):
    """Who waits for a decision."""

    def chosen(self, addresses: Addresses) -> None:
        """Go there, in this order; nowhere in particular if there are none."""
        ...

    def shed(self, reason: str) -> None:
        """Tell the client to come again later."""
        ...


class Stream(Protocol):
    """An answer that comes token by token."""

    def stalled(self, for_s: float) -> bool:
        """End it if its replica may not be silent for so long; tell whether it is ended."""
        ...


class EndpointPicker:
    """Decides by `state` and accounts in `ledger`."""

    def __init__(
        self,
        state: GatewayState,
        ledger: Ledger,
        salt: bytes,
        least_patience_s: float = LEAST_PATIENCE_S,
    ) -> None:
        """`salt` keeps the hashes of sessions and prompts from being guessed.

        No second replica is asked sooner than after `least_patience_s`.
        """
        self._least_patience_s = least_patience_s
        self.state = state
        self.ledger = ledger
        self._salt = salt
        self._boot = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, tuple[Flight, Asker]] = {}
        """Key → held request, in order of arrival."""
        self._streams: dict[str, tuple[Flight, Stream]] = {}
        """Key → stream that has begun and not ended."""
        self._release_after_s = 0.0

    def arrival(self, question: Question, subset: frozenset[str] | None = None) -> Flight:
        """Read a request, for the replicas at these addresses only; BadRequestError says what is wrong with it."""
        prompt = read_prompt(question.path, question.content_type, question.body)
        blocks = block_hashes(prompt.text, self._salt)
        name = question.session or prompt.user
        session = (self._hash(name) or 1) if name else 0
        request_id = question.request_id[:LONGEST_ID]
        root = session or (int(blocks[:ROOT_BLOCKS][-1]) if len(blocks) else self._hash(request_id))
        return Flight(
            key=f"{self._boot}-{next(self._numbers)}",
            request_id=request_id,
            path=question.path,
            model=prompt.model[:LONGEST_ID],
            stream=prompt.stream,
            characters=len(prompt.text),
            input_tokens=self._estimated_tokens(prompt),
            max_output_tokens=float(prompt.max_output_tokens),
            priority_class=prompt.priority_class,
            session=session,
            shard=shard_of(root),
            arrived_s=self.state.clock(),
            arrived_unix_s=time.time(),
            blocks=blocks,
            subset=subset,
        )

    def decide(self, flight: Flight, asker: Asker, started_s: float) -> bool:
        """Tell `asker` now, or later if the request is held (False). `started_s`: performance counter."""
        try:
            addresses = self._by_policy(flight)
        except Shed as refusal:
            self._shed(flight, asker, str(refusal))
            return True
        flight.decision_s = time.perf_counter() - started_s
        if addresses is None:
            self._waiting[flight.key] = (flight, asker)
            return False
        self.ledger.open(flight)
        asker.chosen(addresses)
        return True

    def patience_s(self, flight: Flight) -> int | None:
        """Return after how long without a byte a second replica is asked, too; None: never.

        In steps of factors of two, for there are not many different answers then.
        """
        patience_s = self.state.accounts.pace.patience_s(flight)
        if patience_s is None:
            return None
        steps = math.ceil(math.log2(max(patience_s / self._least_patience_s, 1.0)))
        return math.ceil(self._least_patience_s * 2**steps)

    def give_up(self, flight: Flight) -> bool:
        """Its client went away: if the request is held, it ends here (True)."""
        if self._waiting.pop(flight.key, None) is None:
            return False
        self.state.drop_held(flight)
        self.ledger.settle(flight, Status.ABORTED, CLIENT_CLOSED)
        return True

    def began(self, flight: Flight, stream: Stream) -> None:
        """Its first token is out."""
        self._streams[flight.key] = flight, stream
        self.release()

    def ended(self, flight: Flight) -> None:
        """It is over."""
        self._streams.pop(flight.key, None)

    def silent(self, replica: str, for_s: float) -> int:
        """A replica has answered nothing for so long: end the streams that stall on it; return how many."""
        stalled = [
            flight
            for flight, stream in self._streams.values()
            if self.state.membership.name_of(flight.replica) == replica and stream.stalled(for_s)
        ]
        for flight in stalled:
            self.ended(flight)
        return len(stalled)

    def release(self) -> None:
        """Let held requests go for which there is a replica now."""
        before_s = self.state.clock()
        if not self._waiting or before_s < self._release_after_s:
            return
        for flight, addresses in self.state.release():
            _, asker = self._waiting.pop(flight.key)
            self.ledger.open(flight)
            asker.chosen(addresses)
        after_s = self.state.clock()
        self._release_after_s = after_s + (after_s - before_s) * (1.0 / RELEASE_SHARE - 1.0)

    async def tick(self) -> None:
        """Look after held requests until cancelled."""
        for turn in itertools.count():
            await asyncio.sleep(TICK_S)
            self.state.accounts.assume_first_tokens()
            if turn % JUDGE_EVERY == 0:
                self._judge_replicas()
            self.release()
            self._shed_overdue()

    def _judge_replicas(self) -> None:
        for told in self.state.accounts.pace.judge(self.ledger.flights()):
            self.state.faults.note("", told)

    def _shed_overdue(self) -> None:
        oldest_s = self.state.clock() - HOLD_S
        while self._waiting:
            flight, asker = next(iter(self._waiting.values()))
            if flight.arrived_s > oldest_s:
                return
            del self._waiting[flight.key]
            self.state.drop_held(flight)
            self._shed(flight, asker, f"No replica was free for {HOLD_S:.0f} s")

    def _shed(self, flight: Flight, asker: Asker, reason: str) -> None:
        self.ledger.settle(flight, Status.SHED, 429)
        asker.shed(reason)

    def _by_policy(self, flight: Flight) -> Addresses | None:
        try:
            return self.state.decide(flight)
        except Shed:
            raise
        except Exception as error:  # no arm's fault, but ours
            self.state.faults.count("", error)
            return self.state.least_loaded(flight)

    def _estimated_tokens(self, prompt: Prompt) -> float:
        text_tokens = len(prompt.text) / self.ledger.chars_per_token
        return float(max(1, round(prompt.counted_tokens + text_tokens)))

    def _hash(self, text: str) -> int:
        data = text.encode("utf-8", "surrogatepass")
        digest = blake2b(data, digest_size=8, key=self._salt).digest()
        return int.from_bytes(digest, "little", signed=True)
