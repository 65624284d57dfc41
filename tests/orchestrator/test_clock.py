"""A clock that is set while windows run: they go on, every request is stored, one message tells of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count, pairwise
from pathlib import Path

import pytest

from autopoiesis.gateway.link import LinkServer, Outbox, PickerLink
from autopoiesis.orchestrator.clock import Moment, set_between
from autopoiesis.orchestrator.controller import Controller
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.triggers import Triggers
from autopoiesis.replicas.fleet import Member
from autopoiesis.telemetry.records import RequestRecord, Status
from autopoiesis.telemetry.store import Store

MEMBER = Member("r0", "127.0.0.1:1", "h100-llama-3-8b-tp1-bf16")
EVERY_S = 0.1
numbers = count()


def request() -> RequestRecord:
    number = next(numbers)
    return RequestRecord(
        f"request-{number}", time.time(), "/v1/completions", "m", Status.COMPLETED, 200, "", -1, number % 64, number,
        "r0", 1, True, 100, 10, 10, 0, True, 0.0, 0.0, 0.0003, 0.05, 0.2,
    )  # fmt: skip


@asynccontextmanager
async def running(folder: Path, store: Store) -> AsyncIterator[Outbox]:
    """Run a controller on windows of 1 s, and the picker's side of its link."""
    settings = Settings(data_dir=folder, window_s=1.0, synthesizer="none")
    outbox, stop = Outbox(), asyncio.Event()
    picker = LinkServer(outbox, lambda _: None)
    await picker.start(folder / "link")
    sending = asyncio.create_task(picker.run())
    async with PickerLink(folder / "link") as link:
        controller = Controller(settings, store, (MEMBER,), link)
        serving = asyncio.create_task(controller.run(stop))
        try:
            yield outbox
        finally:
            stop.set()
            await serving
            sending.cancel()
            await picker.close()


@pytest.mark.parametrize("by_s", [-7200.0, 7200.0])
async def test_windows_go_on_when_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    real, offset, sent = time.time, [0.0], 0
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    with Store.open(tmp_path / "telemetry.duckdb") as store:
        async with running(tmp_path, store) as outbox:
            for until in (3, 7):
                deadline = time.monotonic() + 60
                while store.last_window() < until:
                    assert time.monotonic() < deadline
                    outbox.add_request(request())
                    sent += 1
                    await asyncio.sleep(EVERY_S)
                offset[0] = by_s
        windows = store.query(
            "select started_s, ended_s, utility, requests from windows order by window_id"
        ).rows
        told = store.query("select message from events where kind = 'clock'").rows
        stored = store.query("select count(*), count(distinct id) from requests").rows
        ids = store.query("select list(window_id order by window_id) from windows").rows[0][0]

    assert [[f"the clock of this machine was set by {by_s:+.0f} s"]] == told
    assert [[sent, sent]] == stored
    assert list(range(len(windows))) == ids
    assert all(0.5 < ended - started < 5 for started, ended, _, _ in windows)
    steps = [later[0] - earlier[0] for earlier, later in pairwise(windows)]
    assert 1 == sum(abs(step - by_s) < 60 for step in steps)
    assert 1.0 == pytest.approx(min(w[2] for w in windows if w[2] is not None))
    assert sum(w[3] for w in windows[-3:]) >= 15


def test_a_clock_that_is_corrected_a_little_was_not_set() -> None:
    earlier = Moment(1000.0, 50.0)

    assert 0.0 == set_between(earlier, Moment(1010.4, 60.0))
    assert -3600.0 == set_between(earlier, Moment(-2590.0, 60.0))


def test_a_pause_between_syntheses_is_as_long_as_it_would_have_been() -> None:
    triggers = Triggers()
    triggers.ended(1000.0)
    pause_s = triggers.settings.cooldown_s
    triggers.follow_clock(-500.0)

    assert not triggers.ready(500.0 + pause_s - 1)
    assert triggers.ready(500.0 + pause_s)
