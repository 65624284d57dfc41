"""What happens in the simulated fleet when a replica starts, drains, sleeps, reloads or is lost."""

from dataclasses import dataclass

import numpy as np

from autopoiesis.arms.fleet import DRAINING as DRAINS
from autopoiesis.arms.fleet import join
from autopoiesis.arms.prefix import forget_replica
from autopoiesis.twin import events, kv, scheduler
from autopoiesis.twin.capacity import FROM, Action, CapacityChange, ReplicaSpec, ReplicaState
from autopoiesis.twin.events import NOW, World
from autopoiesis.twin.outcome import Status


@dataclass(slots=True)
class _Then:
    """What follows when a replica has drained."""

    state: ReplicaState = ReplicaState.OFF
    duration_s: float = 0.0
    spec: ReplicaSpec | None = None


class Lifecycle:
    """The states of the replicas of one simulated fleet, and how long each has been there."""

    def __init__(self, replicas: tuple[ReplicaSpec, ...], present: tuple[bool, ...]) -> None:
        self.specs = list(replicas)
        self._then = [_Then() for _ in replicas]
        self._since_s: list[float | None] = [0.0 if there else None for there in present]
        self._spent_s = 0.0

    def prepare(self, w: World) -> None:
        """Put the replicas that are there at the start into the fleet."""
        for r, since_s in enumerate(self._since_s):
            if since_s is not None:
                self._make_ready(w, r)

    def change(self, w: World, change: CapacityChange) -> None:
        """Carry a change out now; a ValueError says why it cannot be."""
        r, action = change.replica, change.action
        if r >= len(self.specs):
            raise ValueError(f"there is no replica {r}; there are 0 to {len(self.specs) - 1}")
        state = self.state(w, r)
        name = self.specs[r].name
        if state not in FROM[action]:
            raise ValueError(f"{name} is {state.name.lower()} and cannot {action}")
        if change.spec is not None:
            _check_fits(w, change.spec)
        if state is ReplicaState.OFF and action is not Action.START:
            return
        now_s = float(w.clock_s[NOW])
        match action:
            case Action.START:
                self._since_s[r] = now_s
                self._start(w, r, change.duration_s, change.spec)
            case Action.WAKE:
                self._start(w, r, change.duration_s, None)
            case Action.DRAIN:
                self._drain(w, r, _Then())
            case Action.SLEEP:
                self._drain(w, r, _Then(ReplicaState.ASLEEP))
            case Action.RELOAD:
                self._drain(w, r, _Then(ReplicaState.STARTING, change.duration_s, change.spec))
            case Action.LOSE:
                self._lose(w, r)

    def go_on(self, w: World, r: int) -> None:
        """Take replica r, at which the event loop has stopped, into its next state."""
        if self.state(w, r) is ReplicaState.STARTING:
            self._make_ready(w, r)
        else:
            self._drained(w, r)

    def state(self, w: World, r: int) -> ReplicaState:
        """Return what replica r is doing."""
        return ReplicaState(int(w.state[r]))

    def replica_seconds(self, w: World) -> float:
        """Return how long replicas have been there, all together, in whatever state but off [s]."""
        now_s = float(w.clock_s[NOW])
        return self._spent_s + sum(now_s - s for s in self._since_s if s is not None)

    def _start(self, w: World, r: int, duration_s: float, spec: ReplicaSpec | None) -> None:
        if spec is not None:
            self.specs[r] = spec
            scheduler.equip(w.engines, r, spec.profile, spec.speed)
        w.state[r] = ReplicaState.STARTING
        w.engines.clock[r, scheduler.END] = w.clock_s[NOW] + duration_s
        if duration_s == 0.0:
            self._make_ready(w, r)

    def _make_ready(self, w: World, r: int) -> None:
        spec = self.specs[r]
        entry_tokens = int(w.engines.kv.sizes[1])
        blocks = spec.profile.kv_tokens // entry_tokens if entry_tokens else 0
        w.engines.clock[r, scheduler.END] = np.inf
        w.state[r] = ReplicaState.READY
        join(w.fleet, r, spec.speed, blocks, float(w.clock_s[NOW]))
        if len(w.groups.of_replica) and w.groups.of_replica[r] >= 0:
            events.release(w, int(w.groups.of_replica[r]))

    def _drain(self, w: World, r: int, then: _Then) -> None:
        self._then[r] = then
        busy = w.state[r] in (ReplicaState.READY, ReplicaState.DRAINING) and bool(
            w.engines.counts[r, scheduler.RUNNING] + w.engines.counts[r, scheduler.WAITING]
        )
        w.state[r] = ReplicaState.DRAINING
        w.fleet.replica[r, DRAINS] = 1.0
        if not busy:
            self._drained(w, r)

    def _drained(self, w: World, r: int) -> None:
        then, self._then[r] = self._then[r], _Then()
        _clear(w, r)
        w.state[r] = then.state
        if then.state is ReplicaState.STARTING:
            self._start(w, r, then.duration_s, then.spec)
        elif then.state is ReplicaState.OFF:
            self._switch_off(w, r)

    def _lose(self, w: World, r: int) -> None:
        ledger, now_s = w.ledger, w.clock_s[NOW]
        here = np.flatnonzero((ledger.replica == r) & (ledger.status == Status.PENDING))
        streamed = ~np.isnan(ledger.first_token_s[here])
        failed = here[streamed]
        ledger.status[failed], ledger.finished_s[failed] = Status.FAILED, now_s
        _clear(w, r)
        self._switch_off(w, r)
        events.rescue(w, here[~streamed])

    def _switch_off(self, w: World, r: int) -> None:
        w.state[r] = ReplicaState.OFF
        began_s = self._since_s[r]
        if began_s is not None:
            self._spent_s += float(w.clock_s[NOW]) - began_s
        self._since_s[r] = None


def _clear(w: World, r: int) -> None:
    """Forget all that replica r had in memory, and all that the gateway had counted for it."""
    scheduler.clear(w.engines, r)
    w.leaving[r] = -1
    w.fleet.replica[r, :] = 0.0
    w.fleet.replica[r, DRAINS] = 1.0
    forget_replica(w.fleet.prefixes, r)


def _check_fits(w: World, spec: ReplicaSpec) -> None:
    """Raise a ValueError unless there is room for such a replica in the simulation's arrays."""
    profile = spec.profile
    if profile.kv_block_tokens != w.engines.kv.sizes[0]:
        raise ValueError(
            f"{profile.name} has KV blocks of {profile.kv_block_tokens} tokens, the fleet's have "
            f"{w.engines.kv.sizes[0]}; all replicas must have the same"
        )
    if profile.max_num_seqs > w.engines.heap.shape[1] or not kv.has_room(
        w.engines.kv, profile.kv_blocks
    ):
        raise ValueError(
            f"{profile.name} is larger than any replica that was announced; "
            "name its spec in the simulation's `capacity` or `may_become`"
        )
