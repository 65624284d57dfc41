"""`demo`: simulated replicas under a real trace, so that the whole loop is seen within two minutes."""

import asyncio
import contextlib
import sys
import webbrowser
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from rich.console import Console
from rich.live import Live

from autopoiesis.gateway.settings import DataPlaneSettings
from autopoiesis.orchestrator.catalogue import asking, list_arms
from autopoiesis.orchestrator.child import die_with_parent
from autopoiesis.orchestrator.control_access import read_token
from autopoiesis.orchestrator.live_view import one_line, render
from autopoiesis.orchestrator.serve import describe, stop_on_signals
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.supervisor import Supervisor, data_directory
from autopoiesis.orchestrator.tables import arms_table, number
from autopoiesis.twin.composition import splice
from autopoiesis.twin.trace import Trace, read_trace, write_trace

FLEET = (
    "a100-llama-3-8b-tp1-bf16",
    "a100-llama-3-8b-tp1-bf16",
    "h100-llama-3-8b-tp1-bf16",
    "h100-llama-3-8b-tp1-bf16",
)
"""A mixed fleet: what suits one GPU type does not suit the other."""
WINDOW_S = 5.0
REFRESH_S = 0.5


def built_in_trace(for_s: float) -> Trace:
    """Return code completion that turns into long conversations with shared prefixes half-way."""
    code = read_trace(_sample("azure2023_code_a.parquet")).slice(1725.0, 2390.0).speed(6.0)
    talk = read_trace(_sample("mooncake_conversation_a.parquet")).speed(1.2)
    half = for_s / 2
    return splice((code.slice(0.0, half), talk.slice(60.0, 60.0 + half)), "demo")


def run_demo(
    settings: Settings, trace: Path | None, for_s: float, open_page: bool, console: Console
) -> int:
    """Run the demo and print its summary; return the exit code."""
    chosen = read_trace(trace) if trace else built_in_trace(for_s)
    changes = {
        "profile": FLEET,
        "window_s": WINDOW_S,
        "synthesis_budget_s": 12.0,
        "synthesis_cooldown_s": 10.0,
        "target_utility": 0.99,
    }
    asked = settings.model_copy(
        update={k: v for k, v in changes.items() if k not in settings.model_fields_set}
    )
    with data_directory(asked):
        return asyncio.run(_demo(asked, chosen, for_s, open_page, console))


async def _demo(
    settings: Settings, trace: Trace, for_s: float, open_page: bool, console: Console
) -> int:
    stop = stop_on_signals()
    lines: list[str] = []

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    settings = settings.model_copy(update={"gateway": DataPlaneSettings()})  # open to its own load
    supervisor = Supervisor(settings, say)
    say(
        "demo: starting 4 simulated replicas, Envoy, the picker and the controller "
        "(the first start on a machine compiles the kernels: a minute or two)"
    )
    try:
        await supervisor.start()
        title = f"autopoiesis demo   {supervisor.url}/v1   {describe(supervisor)}   {trace.name}"
        say(title)
        if open_page:
            webbrowser.open(supervisor.control_url)
        load = await _start_load(settings, trace, supervisor.url, for_s)
        try:
            token = read_token(settings.data_dir)
            await _watch(supervisor.control_url, token, stop, load, title, console)
        finally:
            if load.returncode is None:
                load.terminate()
                await load.wait()
        await _settle(settings, stop)
        lines = [*_client_view(settings)]
        with asking(settings) as ask:
            console.print(arms_table(list_arms(ask)))
    finally:
        await supervisor.stop()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"telemetry: {settings.telemetry_file}", highlight=False, markup=False)
    hint = 'autopoiesis sql "select * from window_summary order by window_id desc limit 10"'
    console.print(f"ask it:    {hint}", highlight=False, markup=False, soft_wrap=True)
    return 1 if load.returncode not in {0, None} and not stop.is_set() else 0


def print_plainly(line: str) -> None:
    """Print at once, for pipes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _start_load(
    settings: Settings, trace: Trace, url: str, for_s: float
) -> asyncio.subprocess.Process:
    """Send the load from a process of its own, so that drawing does not delay it."""
    target = settings.run_dir / "demo.parquet"
    write_trace(trace, target)
    argv = [sys.executable, "-m", "autopoiesis", "load", str(target), "--url", url, "--for", str(for_s), "--quiet",
            "--json", str(settings.run_dir / "load.json")]  # fmt: skip
    log = (settings.data_dir / "logs" / "load.log").open("wb")
    with log:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )


async def _watch(
    control_url: str,
    token: str,
    stop: asyncio.Event,
    load: asyncio.subprocess.Process,
    title: str,
    console: Console,
) -> None:
    """Show the controller's status until the load ends or the user stops it."""
    told = -1
    live = Live(console=console, auto_refresh=False, screen=False) if console.is_terminal else None
    with live or contextlib.nullcontext():
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"}, timeout=aiohttp.ClientTimeout(total=5)
        ) as session:
            while load.returncode is None and not stop.is_set():
                status = await _status(session, control_url)
                if status and live:
                    live.update(render(status, title), refresh=True)
                elif status:
                    told = _tell_new_windows(status, told)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(load.wait(), REFRESH_S)


def _tell_new_windows(status: Mapping[str, Any], told: int) -> int:
    names = {arm["id"]: arm["name"] for arm in status["arms"]}
    for window in status["windows"]:
        if window["window"] > told:
            told = window["window"]
            print_plainly(one_line(window, names))
    return told


async def _status(session: aiohttp.ClientSession, control_url: str) -> dict[str, Any] | None:
    try:
        async with session.get(f"{control_url}/status") as answer:
            return await answer.json() if answer.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


async def _settle(settings: Settings, stop: asyncio.Event) -> None:
    """Give the last windows time to close, so that the telemetry tells the whole story."""
    if not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 2 * settings.window_s + 1.0)


def _client_view(settings: Settings) -> list[str]:
    """Tell what the load generator itself measured."""
    try:
        measured = orjson.loads((settings.run_dir / "load.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return ["the load generator left no summary; see load.log"]
    wanted = (
        "requests",
        "completed",
        "shed",
        "failed",
        "ttft_p50_s",
        "ttft_p99_s",
        "tpot_p50_s",
        "tokens_s",
    )
    return [
        "clients:   " + ", ".join(f"{k} {number(measured[k], 2)}" for k in wanted if k in measured)
    ]


def _sample(name: str) -> Path:
    """Find a sample trace: in the source tree, or in the installed package."""
    package = Path(str(files("autopoiesis")))
    installed = package / "traces" / name
    return installed if installed.exists() else package.parent / "traces" / name
