"""Brings up vLLM replicas: starts them at their places, says how far they are, explains a failure."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from autopoiesis.orchestrator.child import Child
from autopoiesis.orchestrator.first_fleet import check_alike
from autopoiesis.orchestrator.local_replica import LocalReplica, ReplicaFailedError, Started
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.devices import Berths, Place, gpus, places, usable_cores
from autopoiesis.replicas.fleet import Command, Member, free_ports
from autopoiesis.replicas.kv_subscriber import available
from autopoiesis.replicas.probe import ProbeError
from autopoiesis.replicas.vllm_process import DEV_MODE, Vllm, describe, knows_kv_events, stage

TELL_S = 10.0
"""How often a long start is told of."""

LONGEST_SOCKET_PATH = 100
"""Characters; the systems allow from 103 on."""

NewChild = Callable[[str], Child]
Say = Callable[[str], None]


class BroughtUp(NamedTuple):
    """A replica that is up, and what its start took."""

    replica: LocalReplica
    began_s: float
    """Unix time."""
    started: Started


async def bring_up(settings: Settings, new_child: NewChild, say: Say) -> list[BroughtUp]:
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
    # On a CPU vLLM refuses the option, and its developers' routes pause it: no memory is freed.
    sleeps = vllm.can_sleep or (not found and os.environ.get(DEV_MODE) == "1")
    members = [replace(m, sleeps=sleeps) for m in _members(settings, vllm, spots)]
    if vllm.may_publish and available() and knows_kv_events(vllm.python):
        members = [replace(m, kv_events=_endpoint(settings, m.name)) for m in members]
    berths = Berths({m.name: spot for m, spot in zip(members, spots, strict=True)}, found)
    replicas = [
        LocalReplica(
            member,
            new_child(member.name),
            command=lambda m: _command(vllm, berths, m),
            explain=vllm.why_it_failed,
            released=berths.leave,
            start_limit_s=settings.vllm_start_s,
            api_key=vllm.api_key,
        )
        for member in members
    ]
    began_s = time.time()
    telling = asyncio.create_task(_tell(replicas, say), name="tell of the start")
    starts = [asyncio.create_task(r.start(r.member), name=f"start {r.name}") for r in replicas]
    try:
        started = await asyncio.gather(*starts)
    finally:
        for task in (*starts, telling):
            task.cancel()
        await asyncio.wait((*starts, telling))
    for replica, start in zip(replicas, started, strict=True):
        replica.member = replace(replica.member, start_s=start.seconds)
    _check_alike(started)
    return [
        BroughtUp(replica, began_s, start) for replica, start in zip(replicas, started, strict=True)
    ]


def _command(vllm: Vllm, berths: Berths, member: Member) -> Command:
    place = berths.take(member.name, member.tensor_parallel or vllm.tensor_parallel)
    return vllm.command(member, place)


def _members(settings: Settings, vllm: Vllm, spots: Sequence[Place]) -> list[Member]:
    ports = free_ports(len(spots))
    limits = vllm.limits
    return [
        Member(
            f"replica-{i}",
            f"127.0.0.1:{port}",
            settings.profile_of(i),
            kind="vllm",
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            tensor_parallel=limits.tensor_parallel,
        )
        for i, port in enumerate(ports)
    ]


def _endpoint(settings: Settings, name: str) -> str:
    """Return where a replica publishes its KV events: a socket in the run directory, which is ours only.

    On a TCP port vLLM would publish everybody's prompts to the whole network. Empty where the path is too long.
    """
    path = settings.run_dir.resolve() / f"{name}.kv"
    return f"ipc://{path}" if len(str(path)) <= LONGEST_SOCKET_PATH else ""


async def _tell(replicas: Sequence[LocalReplica], say: Say) -> None:
    """Say every now and then how far the starts are."""
    began_s = time.monotonic()
    while True:
        await asyncio.sleep(TELL_S)
        told = ", ".join(f"{r.name} {stage(r.log())}" for r in replicas)
        say(f"{time.monotonic() - began_s:.0f} s: {told}")


def _check_alike(started: Sequence[Started]) -> None:
    try:
        check_alike([one.server for one in started])
    except ProbeError as error:
        raise ReplicaFailedError(str(error)) from None
