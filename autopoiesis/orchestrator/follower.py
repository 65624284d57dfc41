"""Makes the replicas that run here do what their targets say, and writes down what that took.

A replica that is changed is taken out of the fleet file first, so that nobody sends anything there, and put
back once it answers. One that does not come up with new limits gets its old ones back.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace

from autopoiesis.orchestrator.local_replica import LocalReplica, ReplicaFailedError, Started
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.limits import Limits
from autopoiesis.replicas.roster import Roster
from autopoiesis.replicas.targets import ChangeLog, Target, TargetFile, Want
from autopoiesis.telemetry.records import Reconfiguration

FOLLOW_EVERY_S = 0.2
UNSEEN_S = 1.2
"""So long the gateway takes at most to read that a replica is out of the fleet."""

Say = Callable[[str], None]


class Follower:
    """Follows the target file; each replica is changed by a task of its own."""

    def __init__(
        self,
        replicas: Sequence[LocalReplica],
        targets: TargetFile,
        changes: ChangeLog,
        roster: Roster,
        say: Say,
    ) -> None:
        """All replicas run, with the limits of their members."""
        self._replicas = tuple(replicas)
        self._targets = targets
        self._changes = changes
        self._roster = roster
        self._say = say
        self._first = {r.name: r.limits for r in replicas}
        self._present = {r.name: Target(Want.ON, r.limits) for r in replicas}
        self._followed: dict[str, Target] = dict(self._present)
        self._changing: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                self._look(self._targets.read())
                await asyncio.sleep(FOLLOW_EVERY_S)
        finally:
            for task in self._changing.values():
                task.cancel()
            await asyncio.gather(*self._changing.values(), return_exceptions=True)

    def _look(self, targets: Mapping[str, Target]) -> None:
        for replica in self._replicas:
            name = replica.name
            changing = self._changing.get(name)
            if changing and not changing.done():
                continue
            target = targets.get(name, Target())
            target = replace(target, limits=target.limits.over(self._first[name]))
            if target.want is Want.ASLEEP and not replica.member.sleeps:
                target = replace(target, want=Want.OFF)
            if target != self._followed[name]:
                followed, self._followed[name] = self._followed[name], target
                again = target.restart != followed.restart
                change = self._change(replica, target, again)
                self._changing[name] = asyncio.create_task(change, name=f"change {name}")

    async def _change(self, replica: LocalReplica, target: Target, again: bool) -> None:
        """Bring one replica from what it does to its target."""
        action = action_for(self._present[replica.name], target, again)
        if action is not None:
            try:
                await self._carry_out(replica, action, target)
            except OSError as error:
                self._say(f"{replica.name}: {action} cannot be written down: {error.strerror}")

    async def _carry_out(self, replica: LocalReplica, action: str, target: Target) -> None:
        present = self._present[replica.name]
        began_s, steady_s, error = time.time(), time.monotonic(), ""
        started: Started | None = None
        self._roster.change(replica.name, serves=False)
        await asyncio.sleep(UNSEEN_S if present.want is Want.ON else 0.0)
        try:
            started = await self._act(replica, action, target)
            self._present[replica.name] = target
        except ReplicaFailedError as failure:
            error = str(failure)
            self._say(f"{replica.name}: {action} failed: {error}")
            await self._take_back(replica, present)
        self._serve_again(replica)
        took_s = time.monotonic() - steady_s
        change = reconfiguration(replica, action, began_s, took_s, started, error)
        self._changes.append(change)
        if not error:
            self._say(
                f"{replica.name}: {action} took {change.seconds:.1f} s, with {replica.limits}"
            )

    async def _act(self, replica: LocalReplica, action: str, target: Target) -> Started | None:
        if action == "sleep":
            await replica.sleep()
            return None
        if action == "wake":
            return await replica.wake()
        if action in {"stop", "restart"}:
            await replica.stop()
        if action == "stop":
            return None
        return await replica.start(with_limits_of(replica, target.limits))

    async def _take_back(self, replica: LocalReplica, present: Target) -> None:
        """Let a replica be what it was before a change that failed; where that fails too it is tried on and on."""
        self._present[replica.name] = replace(present, want=Want.OFF)
        if present.want is Want.OFF:
            replica.member = with_limits_of(replica, present.limits)
            return
        await replica.stop()
        try:
            await replica.start(with_limits_of(replica, present.limits))
            self._say(f"{replica.name} runs again, with {present.limits}")
        except ReplicaFailedError as failure:
            self._say(f"{replica.name} does not run again yet: {failure}")
            with suppress(ReplicaFailedError):
                await replica.begin()
        self._present[replica.name] = replace(present, want=Want.ON)

    def _serve_again(self, replica: LocalReplica) -> None:
        if self._present[replica.name].want is not Want.ON:
            return
        fields = asdict(replica.limits) | {"serves": True, "start_s": replica.member.start_s}
        self._roster.change(replica.name, **fields)


def with_limits_of(replica: LocalReplica, limits: Limits) -> Member:
    """Return the replica's member as it is to be started."""
    return replace(replica.member, **asdict(limits))


def action_for(present: Target, target: Target, again: bool) -> str | None:
    """Return what leads from one to the other, None where nothing is to be done."""
    same = present.limits == target.limits
    match present.want, target.want:
        case Want.ON, Want.ON:
            return "restart" if again or not same else None
        case Want.ON, Want.ASLEEP:
            return "sleep"
        case ((Want.ON | Want.ASLEEP), Want.OFF):
            return "stop"
        case Want.ASLEEP, Want.ON:
            return "wake" if same and not again else "restart"
        case Want.OFF, Want.ON:
            return "start"
        case _:
            return None


def reconfiguration(
    replica: LocalReplica,
    action: str,
    began_s: float,
    seconds: float,
    started: Started | None,
    error: str = "",
) -> Reconfiguration:
    """Return the account of a change that has just ended."""
    parts, limits = started.phases if started else None, replica.limits
    return Reconfiguration(
        replica=replica.name,
        action=action,
        began_s=began_s,
        seconds=seconds,
        import_s=started.import_s if started else 0.0,
        load_s=parts.load_s if parts else 0.0,
        compile_s=parts.compile_s if parts else 0.0,
        capture_s=parts.capture_s if parts else 0.0,
        engine_s=parts.engine_s if parts else 0.0,
        warmup_s=started.warmup_s if started else 0.0,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        tensor_parallel=limits.tensor_parallel,
        error=error,
    )
