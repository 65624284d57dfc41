"""What the control port sends to the live page."""

import time
from collections.abc import AsyncIterator

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from page_scene import WINDOWS, write_scene

from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.live import Picture, Sent
from autopoiesis.orchestrator.page_routes import Page, page_files
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.status import Status
from autopoiesis.telemetry.records import EventRow
from autopoiesis.telemetry.store import Store

PARTS = {
    "now", "windows", "allocations", "twin_errors", "arms", "cells", "replicas", "syntheses", "events",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    file = tmp_path_factory.mktemp("live") / "telemetry.duckdb"
    write_scene(file, time.time())
    with Store.open(file) as opened:
        yield opened


@pytest.fixture
def status(store):
    return Status(Settings(), Registry(store))


def application(store, status) -> web.Application:
    app, page = web.Application(), Page(store, status.as_dict)
    app.add_routes([
        web.get("/", page.page), web.get("/page/{name}", page.page_file), web.get("/live", page.live),
    ])  # fmt: skip
    app.on_shutdown.append(page.stop)
    return app


@pytest.fixture
async def client(store, status) -> AsyncIterator[TestClient]:
    app = application(store, status)
    async with TestClient(TestServer(app)) as opened:
        yield opened


async def test_first_everything_then_only_what_changed(store, status):
    picture, sent = Picture(store, status.as_dict), Sent()
    first = await picture.changes(sent)
    quiet = await picture.changes(sent)
    status.say(EventRow(1.0, "operator", 3, "x", "something was done"))
    changed = await picture.changes(sent)

    assert PARTS == set(first)
    assert WINDOWS == len(first["windows"]["rows"])
    assert {"now"} == set(quiet)
    assert [] == changed["windows"]["rows"]
    assert {WINDOWS} == {row[0] for row in changed["allocations"]["rows"]}
    assert "something was done" in [row[-1] for row in changed["events"]["rows"]]


async def test_two_pages_are_told_apart(store, status):
    picture, one, two = Picture(store, status.as_dict), Sent(), Sent()
    await picture.changes(one)
    late = await picture.changes(two)

    assert WINDOWS == len(late["windows"]["rows"])


async def test_the_stream_tells_each_part_as_an_event(client):
    async with client.get("/live") as answer:
        head = await answer.content.readuntil(b"\n\n")

        assert 200 == answer.status
        assert "text/event-stream" == answer.content_type
        assert head.startswith(b"event: now\ndata: ")
        assert "traffic" in orjson.loads(head.split(b"data: ")[1])


async def test_the_stream_ends_when_the_server_stops(store, status):
    app = application(store, status)
    async with TestClient(TestServer(app)) as client:
        answer = await client.get("/live")
        await answer.content.readuntil(b"\n\n")
        await client.server.runner.cleanup()
        rest = await answer.content.read()

    assert rest.endswith(b"\n\n")


async def test_files_come_with_a_strict_policy_and_a_tag(client):
    page = await client.get("/")
    again = await client.get("/", headers={"If-None-Match": page.headers["ETag"]})

    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert "text/html" == page.content_type
    assert 304 == again.status


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fcontrol.py", "%00", ""])
async def test_there_is_nothing_beside_the_page_s_files(client, name):
    assert 404 == (await client.get(f"/page/{name}")).status


def test_no_file_has_inline_script_or_style_or_an_address_elsewhere():
    for name, (content, _) in page_files().items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        for forbidden in ("http:", "https:", "innerHTML", " style=", " onclick=", "eval("):
            assert forbidden not in text, (name, forbidden)
        assert "<script>" not in text
