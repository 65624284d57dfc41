"""Who is in the fleet when `serve` starts: servers that are there already, and simulated ones."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from autopoiesis.orchestrator.child import Child
from autopoiesis.orchestrator.local_replica import LocalReplica
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.fleet import Member, free_ports, simulated_command
from autopoiesis.replicas.probe import ProbeError, Server, probe
from autopoiesis.replicas.vllm_process import OLDEST, last_line, too_old

SIMULATED_START_S = 60.0


async def remote_members(settings: Settings) -> tuple[Member, ...]:
    """Return the servers at the URLs that were given.

    Raises:
        ProbeError: one does not answer, or serves another model than its siblings.
    """
    found = await asyncio.gather(*(probe(url) for url in settings.replica))
    check_alike(found)
    return tuple(
        Member(f"replica-{i}", server.address, settings.profile_of(i), kind="remote")
        for i, server in enumerate(found)
    )


def check_alike(servers: Sequence[Server]) -> None:
    """Raise ProbeError where a server has no model in common with the first, or is a vLLM that is too old."""
    for server in servers:
        if server.owned_by == "vllm" and too_old(server.version):
            raise ProbeError(
                f"{server.url} runs vLLM {server.version}; {'.'.join(map(str, OLDEST))} or newer is needed"
            )
    for server in servers[1:]:
        if not set(server.models) & set(servers[0].models):
            raise ProbeError(
                f"{server.url} serves {', '.join(server.models)} and {servers[0].url} "
                f"{', '.join(servers[0].models)}; replicas of one fleet serve one model"
            )


def simulated_replicas(
    settings: Settings, new_child: Callable[[str], Child], model: str | None = None
) -> tuple[LocalReplica, ...]:
    """Return the simulated replicas, which serve a model of this name; none of them runs yet."""
    members = [
        Member(f"sim-{i}", f"127.0.0.1:{port}", settings.profile_of(i), kind="simulated")
        for i, port in enumerate(free_ports(settings.simulate))
    ]
    return tuple(
        LocalReplica(
            member,
            new_child(member.name),
            partial(simulated_command, model=model),
            explain=last_line,
            start_limit_s=SIMULATED_START_S,
        )
        for member in members
    )
