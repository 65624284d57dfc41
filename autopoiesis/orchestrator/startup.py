"""What an instance needs to start: a port of its own, and processes that come up."""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp

from autopoiesis.orchestrator.child import Child
from autopoiesis.replicas.probe import answers

UP = frozenset({200, 401})
"""What a gateway that is up answers, the second if it wants a key."""
MOST_RESTARTS = 3
"""A process that ended so often while it was waited for will not come up."""
LOOK_S = 0.1


class CannotStartError(RuntimeError):
    """Something needed is missing or taken; the message says what, and what to do."""


def check_port(host: str, port: int, option: str) -> None:
    """Raise `CannotStartError` if the port is taken; `option` gives another one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise CannotStartError(
                f"Cannot listen on {host}:{port}: {error.strerror}; give another port with {option}."
            ) from None


async def until_up(
    signs: Mapping[str | Path, Child], children: Sequence[Child], limit_s: float
) -> None:
    """Return once each child has shown its sign: a URL that answers, or a socket that is there.

    Raises:
        CannotStartError: one of the children ended again and again, or a sign was not seen in time.
    """
    clock = asyncio.get_running_loop().time
    until_s = clock() + limit_s
    own = aiohttp.TCPConnector(ssl=False)  # its certificate is for its clients to judge
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=2), connector=own
    ) as session:
        missing = dict(signs)
        while missing := {s: c for s, c in missing.items() if not await _seen(session, s)}:
            ending = next((c for c in children if c.restarts >= MOST_RESTARTS), None)
            if ending or clock() > until_s:
                child = ending or next(iter(missing.values()))
                raise CannotStartError(
                    f"{child.name} does not come up; the end of {child.log} says:\n{child.last_words()}"
                )
            await asyncio.sleep(LOOK_S)


async def _seen(session: aiohttp.ClientSession, sign: str | Path) -> bool:
    return sign.exists() if isinstance(sign, Path) else await answers(session, sign, UP)
