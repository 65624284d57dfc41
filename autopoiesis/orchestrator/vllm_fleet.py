"""Brings up vLLM replicas: starts them at their places, says how far they are, explains a failure."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp

from autopoiesis.orchestrator.child import Child
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.devices import Place, gpus, places, usable_cores
from autopoiesis.replicas.fleet import Member, free_ports
from autopoiesis.replicas.probe import ProbeError, Server, answers, probe
from autopoiesis.replicas.vllm_process import Vllm, describe, stage, tail

TELL_S = 10.0
"""How often a long start is told of."""
POLL_S = 0.5

Start = Callable[[str, list[str], dict[str, str]], Awaitable[Child]]
Say = Callable[[str], None]


class ReplicaFailedError(RuntimeError):
    """A replica did not come up; the message says which, why, and what to do."""


@dataclass(slots=True)
class _Starting:
    member: Member
    child: Child
    log: Path
    log_from: int
    server: Server | None = None


async def bring_up(settings: Settings, start: Start, say: Say) -> tuple[Member, ...]:
    """Start `settings.replicas` servers and return them once all of them answer.

    Raises:
        ReplicaFailedError: one ended, took too long, or serves another model than its siblings.
        PlacementError, FleetError: they cannot be started as asked.
    """
    assert settings.vllm is not None
    vllm = Vllm(settings.vllm, settings.vllm_arguments, settings.vllm_python)
    found = gpus()
    spots = places(settings.replicas, vllm.tensor_parallel, found, usable_cores())
    say(f"starting {settings.replicas} vLLM replicas of {vllm.model} on {describe(spots)}")
    began_s = time.monotonic()
    starting = [await _start(m, s, vllm, settings, start) for m, s in _members(settings, spots)]
    told_s = began_s
    while any(s.server is None for s in starting):
        await asyncio.sleep(POLL_S)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            for one in starting:
                await _look(one, vllm, began_s, session)
        now_s = time.monotonic()
        if now_s - began_s > settings.vllm_start_s:
            late = next(s for s in starting if s.server is None)
            raise ReplicaFailedError(
                f"{late.member.name} was not up after {settings.vllm_start_s:g} s (it was "
                f"{stage(_log(late))}); raise vllm_start_s, or look at {late.log}"
            )
        if now_s - told_s >= TELL_S:
            told_s = now_s
            say(f"{now_s - began_s:.0f} s: {_progress(starting)}")
    _check_alike(starting)
    return tuple(s.member for s in starting)


def _members(settings: Settings, spots: Sequence[Place]) -> list[tuple[Member, Place]]:
    ports = free_ports(len(spots))
    names = settings.profile
    return [
        (Member(f"replica-{i}", f"127.0.0.1:{port}", names[i % len(names)], kind="vllm"), spot)
        for i, (port, spot) in enumerate(zip(ports, spots, strict=True))
    ]


async def _start(
    member: Member, place: Place, vllm: Vllm, settings: Settings, start: Start
) -> _Starting:
    log = settings.data_dir / "logs" / f"{member.name}.log"
    log_from = log.stat().st_size if log.exists() else 0
    command = vllm.command(member, place)
    try:
        child = await start(member.name, command.argv, command.environment)
    except OSError as error:
        raise ReplicaFailedError(
            f"{vllm.python} cannot be run ({error.strerror}); name an interpreter with --vllm-python"
        ) from None
    return _Starting(member, child, log, log_from)


async def _look(one: _Starting, vllm: Vllm, began_s: float, session: aiohttp.ClientSession) -> None:
    if one.server is not None:
        return
    if one.child.deaths:
        cause = vllm.why_it_failed(_log(one))
        raise ReplicaFailedError(f"{one.member.name} did not start: {cause} (log: {one.log})")
    if await answers(session, f"{one.member.url}/health"):
        try:
            one.server = await probe(one.member.url)
        except ProbeError:
            return
        one.member = replace(one.member, start_s=time.monotonic() - began_s)


def _progress(starting: Sequence[_Starting]) -> str:
    return ", ".join(f"{s.member.name} {'is up' if s.server else stage(_log(s))}" for s in starting)


def _log(one: _Starting) -> str:
    return tail(one.log, one.log_from)


def _check_alike(starting: Sequence[_Starting]) -> None:
    first = starting[0]
    for other in starting[1:]:
        if first.server and other.server and set(first.server.models) != set(other.server.models):
            raise ReplicaFailedError(
                f"{other.member.name} serves {', '.join(other.server.models)} and "
                f"{first.member.name} {', '.join(first.server.models)}; replicas of one fleet serve one model"
            )
