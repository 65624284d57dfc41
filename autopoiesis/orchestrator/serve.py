"""`serve`: one gateway in the foreground, until a signal or its time is up."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

from autopoiesis.gateway.envoy import EnvoyError
from autopoiesis.orchestrator.models import Models, data_directories
from autopoiesis.orchestrator.settings import Settings, SettingsError
from autopoiesis.orchestrator.supervisor import Say, Supervisor, data_directory


def serve(settings: Settings, say: Say, detail: Say, read_again: Callable[[], Settings]) -> None:
    """Serve until SIGINT, SIGTERM or `settings.for_s`; nothing is left behind.

    `say` is told what an operator should know, `detail` the rest. On SIGHUP the settings are read
    again, and those of the gateway are taken up.
    """
    held = data_directories if settings.models else data_directory
    with held(settings):
        asyncio.run(_serve(settings, say, detail, read_again))


async def _serve(
    settings: Settings, say: Say, detail: Say, read_again: Callable[[], Settings]
) -> None:
    stop = stop_on_signals()
    supervisor = (Models if settings.models else Supervisor)(settings, say, detail)
    changing = asyncio.create_task(_change_on_hangup(supervisor, say, read_again))
    say("starting (the first start on a machine compiles the kernels: a minute or two)")
    starting = asyncio.create_task(supervisor.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return
        await starting
        say(f"OpenAI-compatible endpoint: {supervisor.url}/v1 ({describe(supervisor)})")
        for one in supervisor.supervisors if isinstance(supervisor, Models) else [supervisor]:
            where, file = one.control_url, one.settings.telemetry_file
            one.say(f"live page and control API: {where}   telemetry: {file}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping, settings.for_s)
        say(f"draining (at most {settings.drain_s:g} s)")
    finally:
        tasks = (starting, stopping, changing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await supervisor.stop()
        say("stopped")


async def _change_on_hangup(
    supervisor: Supervisor | Models, say: Say, read_again: Callable[[], Settings]
) -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
    while True:
        await asked.wait()
        asked.clear()
        try:
            await supervisor.change_gateway(read_again().gateway)
        except (SettingsError, EnvoyError) as error:
            say(f"the gateway's settings stay as they were: {error}")
        else:
            say("the gateway's settings were read again and are in force")


def describe(supervisor: Supervisor | Models) -> str:
    """Return the fleet in a few words."""
    kinds = {member.kind for member in supervisor.members}
    return f"{len(supervisor.members)} {' and '.join(sorted(kinds))} replicas"


def stop_on_signals() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop
