"""Waiting for processes to come up: what shows that they have, and who is named where one does not."""

import asyncio
import sys
from contextlib import asynccontextmanager

import pytest

from autopoiesis.orchestrator.child import Child
from autopoiesis.orchestrator.startup import CannotStartError, check_port, until_up
from autopoiesis.replicas.fleet import free_ports

SERVES = "import http.server, sys; http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]))"
LISTENS = "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); time.sleep(60)"
ENDS = "raise SystemExit('no licence')"
SLEEPS = "import time; time.sleep(60)"


@asynccontextmanager
async def running(folder, **programs):
    """Yield children by name, each running a program with its arguments."""
    children = {
        name: Child(name, [sys.executable, "-c", *words], folder / f"{name}.log")
        for name, words in programs.items()
    }
    for child in children.values():
        await child.start()
    try:
        yield children
    finally:
        await asyncio.gather(*(child.stop(1.0) for child in children.values()))


async def test_all_signs_are_waited_for(tmp_path):
    (port,), path = free_ports(1), tmp_path / "socket"
    programs = {"server": (SERVES, str(port)), "listener": (LISTENS, str(path))}
    async with running(tmp_path, **programs) as children:
        signs = {f"http://127.0.0.1:{port}/": children["server"], path: children["listener"]}
        await until_up(signs, list(children.values()), 30.0)
        assert path.exists()
        with pytest.raises(CannotStartError, match=f"Cannot listen on 127.0.0.1:{port}"):
            check_port("127.0.0.1", port, "--port")


async def test_a_child_that_ends_again_and_again_is_named_with_its_last_words(tmp_path):
    """Even where it is another one, which works, whose sign is missing for it."""
    async with running(tmp_path, worker=(ENDS,), server=(SLEEPS,)) as children:
        signs = {tmp_path / "never": children["server"]}
        with pytest.raises(CannotStartError, match=r"(?s)^worker does not come up.*no licence"):
            await until_up(signs, list(children.values()), 60.0)


async def test_a_child_that_takes_too_long_is_named(tmp_path):
    async with running(tmp_path, worker=(SLEEPS,), server=(SLEEPS,)) as children:
        signs = {tmp_path: children["worker"], tmp_path / "never": children["server"]}
        with pytest.raises(CannotStartError, match=r"^server does not come up"):
            await until_up(signs, list(children.values()), 0.5)
