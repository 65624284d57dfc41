"""Watches the replicas: polls what they say of themselves, notices who is away and who is back."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from autopoiesis.gateway.background import keep_up
from autopoiesis.gateway.ledger import Ledger
from autopoiesis.gateway.membership import Member, Membership
from autopoiesis.replicas.kv_events import News
from autopoiesis.replicas.kv_subscriber import KvEvents
from autopoiesis.replicas.scrape import Health, Scrape, Scraper
from autopoiesis.telemetry.records import ReplicaSample

AWAY_AFTER = 3
"""Polls in a row that must fail before a replica gets no more requests; one where nobody listens."""
IDLE_S = 10.0
"""A replica that reports nothing to do has done what it was sent this long before."""


class Listener(Protocol):
    """Who wants to know what the watch finds."""

    def sampled(self, sample: ReplicaSample) -> None:
        """A replica was polled."""
        ...

    def changed(self) -> None:
        """A replica went away or came back."""
        ...

    def silent(self, replica: str, for_s: float) -> None:
        """A replica that is away has answered nothing for so long."""
        ...

    def fault(self, arm_id: str, message: str) -> None:
        """Something is wrong."""
        ...


class ReplicaWatch:
    """Keeps `membership` true to how the replicas are, and `ledger` to what they have left to do."""

    def __init__(self, membership: Membership, ledger: Ledger, listener: Listener) -> None:
        self._membership = membership
        self._ledger = ledger
        self._listener = listener
        self._addresses: dict[str, str] = {}
        self._polling: asyncio.Task[None] | None = None
        self._events = KvEvents(self._heard)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._silent_since_s: dict[str, float] = {}
        """Replica → when it failed to answer a poll for the first time since it last did."""
        self._told_missed: set[str] = set()
        self._told_missing: set[tuple[str, str]] = set()

    def follow(self, members: Sequence[Member]) -> None:
        """Watch these from now on."""
        if self._polling:
            self._polling.cancel()
        self._loop = asyncio.get_running_loop()
        self._events.follow({m.name: m.kv_events for m in members if m.kv_events})
        self._addresses = {m.name: m.address for m in members}
        scraper = Scraper(self._addresses, self.polled, told_missing=self._told_missing)
        self._polling = asyncio.create_task(keep_up(scraper.run, self._listener.fault))

    def stop(self) -> None:
        """Watch no more."""
        if self._polling:
            self._polling.cancel()
        self._events.stop()

    def _heard(self, name: str, news: News) -> None:
        """Pass on news of the events' thread to the loop, if it still runs."""
        if self._loop:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.cache_changed, name, news)

    def cache_changed(self, name: str, news: News) -> None:
        """Take in what a replica's KV events told."""
        self._membership.cache_changed(name, news)
        if news.missed and name not in self._told_missed:
            self._told_missed.add(name)
            self._listener.fault("", f"{news.missed} messages of {name}'s KV events were missed")

    def polled(self, health: Health) -> None:
        """Take in what a poll has shown."""
        name = health.replica
        if name not in self._addresses:
            return
        # A server without /metrics is there all the same.
        down = (
            not health.healthy
            and (health.failures >= AWAY_AFTER or health.refused)
            and not health.error.startswith("/metrics answered")
        )
        if self._membership.set_healthy(name, not down):
            how = f"away: {health.error}" if down else "back"
            self._listener.fault("", f"replica {name} is {how}")
            self._listener.changed()
        self._note_silence(health, down)
        scrape = health.scrape or Scrape()
        if health.scrape:
            if scrape.running == scrape.waiting == 0.0:
                self._settle(name)
            scrape = self._completed(name, scrape)
            self._take(name, scrape)
        self._listener.sampled(
            ReplicaSample(
                at_s=time.time(),
                replica=name,
                address=self._addresses[name],
                healthy=not down,
                in_flight=self._membership.in_flight(name),
                running=scrape.running or 0.0,
                waiting=scrape.waiting or 0.0,
                kv_usage=scrape.kv_usage or 0.0,
                prefix_queries_total=scrape.prefix_queries_total or 0.0,
                prefix_hits_total=scrape.prefix_hits_total or 0.0,
                preemptions_total=scrape.preemptions_total or 0.0,
            )
        )

    def _note_silence(self, health: Health, down: bool) -> None:
        if not health.failures:
            self._silent_since_s.pop(health.replica, None)
            return
        now_s = time.monotonic()
        for_s = now_s - self._silent_since_s.setdefault(health.replica, now_s)
        if down:
            self._listener.silent(health.replica, for_s)

    def _completed(self, name: str, scrape: Scrape) -> Scrape:
        """Fill in what a replica does not tell of its load: that is not 0, and our own count is the next best."""
        in_flight, kv_usage = self._membership.own_account(name)
        running, waiting = scrape.running, scrape.waiting
        if running is None:
            running = max(in_flight - (waiting or 0.0), 0.0)
        if waiting is None:
            waiting = max(in_flight - running, 0.0)
        told = scrape.kv_usage
        return replace(
            scrape, running=running, waiting=waiting, kv_usage=kv_usage if told is None else told
        )

    def _take(self, name: str, scrape: Scrape) -> None:
        self._membership.report(
            name, scrape.running or 0.0, scrape.waiting or 0.0, scrape.kv_usage or 0.0
        )
        if scrape.generated_tokens_total is not None:
            running = scrape.running or 0.0
            self._membership.report_generated(name, scrape.generated_tokens_total, running)
        if scrape.kv_blocks and scrape.block_size:
            self._membership.set_kv_tokens(name, scrape.kv_blocks * scrape.block_size)

    def _settle(self, name: str) -> None:
        """End what was sent to a replica long ago, which says itself that it has nothing to do."""
        lost = self._ledger.reconcile(name, time.monotonic() - IDLE_S)
        if lost:
            self._listener.fault("", f"the end of {lost} requests to {name} was never told")
