"""Is there an OpenAI-compatible server at this URL, and which one?"""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import orjson

TIMEOUT_S = 5.0
SIMULATED = "autopoiesis-simulated"
"""`owned_by` of the models of a simulated replica."""


class ProbeError(RuntimeError):
    """There is no usable server; the message says what was found, and what to do."""


@dataclass(frozen=True, slots=True)
class Server:
    """What answers at a URL."""

    url: str
    """Base URL, without `/v1`."""
    address: str
    """host:port, the host a numeric IP."""
    models: tuple[str, ...]
    owned_by: str
    version: str | None
    """What `/version` says (vLLM has it), None if nothing."""

    @property
    def simulated(self) -> bool:
        """True for a simulated replica of ours (or a gateway in front of such)."""
        return self.owned_by == SIMULATED


def base_url(url: str) -> str:
    """Normalise what a person types (`host:port`, a trailing `/v1`) to `http://host:port`."""
    text = url.strip() if "://" in url else f"http://{url.strip()}"
    text = text.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ProbeError(
            f"{url} is not a URL ({error}); give one like http://10.0.0.1:8000"
        ) from None
    if parts.scheme != "http":
        raise ProbeError(
            f"{url}: only http:// is spoken to replicas; give the server's plain HTTP address"
        )
    if not parts.hostname or parts.path or parts.query or parts.username:
        raise ProbeError(
            f"{url} is not the base URL of a server; give one like http://10.0.0.1:8000"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"http://{host}:{port or 80}"


async def probe(url: str, timeout_s: float = TIMEOUT_S, api_key: str = "") -> Server:
    """Ask a server for its models and version; raise `ProbeError` with one sentence."""
    base = base_url(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    address = await _numeric(base)
    limit = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(timeout=limit, headers=headers) as session:
        models = await _models(session, base, timeout_s)
        version = await _version(session, base)
    return Server(
        url=base,
        address=address,
        models=tuple(str(model["id"]) for model in models),
        owned_by=str(models[0].get("owned_by") or ""),
        version=version,
    )


async def answers(
    session: aiohttp.ClientSession, url: str, statuses: Container[int] = (200,)
) -> bool:
    """Tell whether a GET of this URL gives one of these statuses within the session's time limit."""
    try:
        async with session.get(url) as answer:
            return answer.status in statuses
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def _numeric(base: str) -> str:
    """Resolve the host: load balancers take numeric addresses only."""
    parts = urlsplit(base)
    host, port = parts.hostname or "", parts.port or 80
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:
        raise ProbeError(f"{base}: there is no host called {host}; check the name") from None
    best = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    ip = ipaddress.ip_address(str(best[4][0]).partition("%")[0])
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"


async def _models(
    session: aiohttp.ClientSession, base: str, timeout_s: float
) -> list[dict[str, Any]]:
    try:
        async with session.get(f"{base}/v1/models", allow_redirects=False) as answer:
            status, kind = answer.status, answer.content_type
            body = await answer.content.read(1 << 20)
    except TimeoutError:
        raise ProbeError(
            f"{base} did not answer within {timeout_s:g} s; is it starting, or behind a firewall?"
        ) from None
    except aiohttp.ClientConnectorError as error:
        refused = error.os_error.errno == errno.ECONNREFUSED
        why = (
            "refuses connections; start the server there"
            if refused
            else f"cannot be reached ({error.strerror})"
        )
        raise ProbeError(f"{base} {why}, or check host and port") from None
    except (aiohttp.ServerDisconnectedError, ConnectionResetError):
        raise ProbeError(
            f"{base} closed the connection without an answer; is it an HTTP server, and not HTTPS?"
        ) from None
    except aiohttp.ClientError as error:
        first = str(error).splitlines()[0][:120]
        raise ProbeError(
            f"{base} does not speak HTTP ({first}); give the address of an HTTP server"
        ) from None
    if status in {401, 403}:
        raise ProbeError(
            f"{base} wants an API key ({status} for /v1/models); give one, or start it without"
        )
    if status == 404:
        raise ProbeError(
            f"{base} has no /v1/models; give the base URL of an OpenAI-compatible server"
        )
    if status != 200:
        raise ProbeError(f"{base} answered {status} for /v1/models; look at that server's log")
    if "html" in kind:
        raise ProbeError(
            f"{base} serves a web page, no OpenAI API; give the URL of the model server itself"
        )
    try:
        models: Any = orjson.loads(body)["data"]
        named = [cast("dict[str, Any]", model) for model in models if model["id"]]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ProbeError(
            f"{base} answers /v1/models, but not as OpenAI does; is it a model server?"
        ) from None
    if not named:
        raise ProbeError(f"{base} serves no model; load one there first")
    return named


async def _version(session: aiohttp.ClientSession, base: str) -> str | None:
    try:
        async with session.get(f"{base}/version", allow_redirects=False) as answer:
            told: Any = (
                orjson.loads(await answer.content.read(1 << 16)) if answer.status == 200 else {}
            )
            return str(told["version"])
    except (
        aiohttp.ClientError,
        TimeoutError,
        OSError,
        orjson.JSONDecodeError,
        KeyError,
        TypeError,
    ):
        return None
