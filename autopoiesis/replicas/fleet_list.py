"""Lists of replicas that others keep: a file with a line for each, or all addresses of a name in DNS."""

import asyncio
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from autopoiesis.replicas.probe import ProbeError, base_url

DNS = "dns://"
"""Begins a URL that stands for a server at each address of its host."""


class FleetListError(ValueError):
    """A list of replicas cannot be read; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One replica as a list has it."""

    url: str
    profile: str = ""
    """Its latency profile; empty for the fleet's."""
    speed: float = 1.0
    leaving: bool = False
    """It will be lost soon: it is to get nothing new."""
    kv_events: str = ""
    """ZMQ endpoint of its KV events, as to connect to it from here; empty for none."""


def read_fleet_list(path: Path) -> tuple[Listed, ...]:
    """Read a file of lines `URL [profile=NAME] [speed=X] [kv_events=ENDPOINT] [leaving]`; `#` begins a remark.

    Raises:
        FleetListError: it is missing, or a line is none of these.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise FleetListError(f"The list of replicas {path} cannot be read: {why}.") from None
    listed: dict[str, Listed] = {}
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].split():
            try:
                one = _listed(words)
            except (ValueError, ProbeError) as error:
                raise FleetListError(f"{path}, line {number}: {error}") from None
            listed[one.url] = one
    return tuple(listed.values())


def _listed(words: Sequence[str]) -> Listed:
    profile, speed, leaving, kv_events = "", 1.0, False, ""
    for word in words[1:]:
        name, _, value = word.partition("=")
        if word == "leaving":
            leaving = True
        elif name == "profile" and value:
            profile = value
        elif name == "speed" and _is_speed(value):
            speed = float(value)
        elif name == "kv_events" and re.fullmatch(r"(tcp|ipc)://[^*]+", value):
            kv_events = value
        else:
            raise ValueError(
                f"{word!r} is not understood; after the URL come profile=NAME, speed=X, "
                "kv_events=tcp://HOST:PORT or leaving."
            )
    return Listed(base_url(words[0]), profile, speed, leaving, kv_events)


def _is_speed(text: str) -> bool:
    try:
        return 0.0 < float(text) < 1e6
    except ValueError:
        return False


async def resolve(url: str) -> tuple[Listed, ...]:
    """Return a server for each address that DNS has for the host of `dns://HOST:PORT`, in order.

    Raises:
        FleetListError: the name cannot be resolved, or the URL is none.
    """
    try:
        parts = urlsplit(url)
        host, port, path = parts.hostname, parts.port, parts.path
    except ValueError:
        host = port = path = None
    if not host or not port or path not in {"", "/"}:
        raise FleetListError(
            f"{url} is no name to resolve; give one like dns://vllm.internal:8000."
        )
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise FleetListError(f"{host} cannot be resolved: {error.strerror}.") from None
    addresses = sorted({str(entry[4][0]).partition("%")[0] for entry in found})
    return tuple(
        Listed(f"http://{f'[{address}]' if ':' in address else address}:{port}")
        for address in addresses
    )
