"""Fleets of servers that come and go without us: a list is followed, and nobody unknown gets traffic."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from autopoiesis.orchestrator.discovery import Discovery
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.probe import ProbeError

Serve = Callable[[str], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start servers that say which model they serve; return each one's address."""
    runners: list[web.AppRunner] = []

    async def start(model: str) -> str:
        async def models(_request: web.Request) -> web.Response:
            return web.json_response({"object": "list", "data": [{"id": model}]})

        app = web.Application()
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return f"{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()


def discovery(said: list[str], **settings) -> Discovery:
    return Discovery(Settings.model_validate(settings), said.append)


async def test_a_list_is_followed(tmp_path, serve: Serve):
    one, two, other = await serve("m"), await serve("m"), await serve("another")
    path, said = tmp_path / "fleet", []
    path.write_text(f"http://{one}\n")
    found = discovery(said, fleet_file=path)
    (first,) = await found.first()
    assert (first.address, first.kind, first.leaving) == (one, "remote", False)

    path.write_text(
        f"http://{one} leaving\nhttp://{two} speed=2\nhttp://{other}\nhttp://127.0.0.1:9\n"
    )
    members = {m.address: m for m in await found.look()}
    assert members.keys() == {one, two}
    assert members[one].name == first.name
    assert (members[one].leaving, members[two].speed) == (True, 2.0)
    assert any("serves another" in line for line in said)
    assert any("refuses connections" in line for line in said)
    told = len(said)
    await found.look()
    assert len(said) == told, "nothing is said twice"

    path.write_text("what is this?\n")
    assert {m.address for m in await found.look()} == {one, two}, "it stays as it was"
    path.write_text(f"http://{two}\n")
    assert [m.address for m in await found.look()] == [two]


async def test_names_and_urls_stand_side_by_side(serve: Serve):
    fixed, named = await serve("m"), await serve("m")
    port = named.partition(":")[2]
    found = discovery([], replica=(f"http://{fixed}", f"dns://localhost:{port}"))
    members = await found.first()
    assert [m.address for m in members] == [fixed, named]
    assert members[0].name == "replica-0"


async def test_without_any_replica_there_is_no_start(tmp_path):
    path = tmp_path / "fleet"
    path.write_text("http://127.0.0.1:9\n")
    with pytest.raises(ProbeError, match=r"No replica is there yet: http://127.0.0.1:9 refuses"):
        await discovery([], fleet_file=path).first()


async def test_replicas_of_one_fleet_serve_one_model(serve: Serve):
    urls = [f"http://{await serve(model)}" for model in ("m", "another")]
    with pytest.raises(ProbeError, match=r"serves another and .* m; replicas of one fleet"):
        await discovery([], replica=tuple(urls)).first()
