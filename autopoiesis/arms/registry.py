"""The registry: every arm there ever was, and how far each has come. It forgets nothing."""

from dataclasses import replace
from typing import Protocol

from autopoiesis.arms.arm import Arm, State
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.files import verified
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.machine import Program

MOVES: dict[State, frozenset[State]] = {
    State.CANDIDATE: frozenset({State.SHADOW, State.CANARY, State.QUARANTINED, State.RETIRED}),
    State.SHADOW: frozenset({State.CANARY, State.QUARANTINED, State.RETIRED}),
    State.CANARY: frozenset({State.SHADOW, State.LIVE, State.QUARANTINED, State.RETIRED}),
    State.LIVE: frozenset({State.CANARY, State.QUARANTINED, State.RETIRED}),
    State.QUARANTINED: frozenset({State.SHADOW, State.CANARY, State.RETIRED}),
    State.RETIRED: frozenset({State.CANDIDATE, State.CANARY}),
}
"""Where an arm may go from each state. Nothing becomes live without having been a canary."""


class RegistryError(ValueError):
    """No such arm, or a step that is not allowed."""


class UnknownArmError(RegistryError):
    """No arm is called so, or more than one."""


class ArmStore(Protocol):
    """Where arms are kept."""

    def load_arms(self) -> list[Arm]:
        """Return all arms, oldest first."""
        ...

    def save_arm(self, arm: Arm) -> None:
        """Insert the arm, or replace the one with its id."""
        ...


class Registry:
    """All arms by id. Every change is saved before it is seen.

    Arms loaded from the store are verified again; one that no longer verifies is retired with the
    reason and kept.
    """

    def __init__(self, store: ArmStore) -> None:
        self._store = store
        self._arms: dict[str, Arm] = {}
        self._programs: dict[str, Program] = {}
        for arm in store.load_arms():
            self._arms[arm.id] = arm
            fault = _fault(arm)
            if fault and arm.state != State.RETIRED:
                self._save(replace(arm, state=State.RETIRED, reason=fault))

    def all(self) -> tuple[Arm, ...]:
        """Return every arm, in the order in which they came."""
        return tuple(self._arms.values())

    def fast(self) -> tuple[Arm, ...]:
        """Return every arm that has fast functions, whatever its state."""
        return tuple(arm for arm in self._arms.values() if arm.source)

    def serving(self) -> tuple[Arm, ...]:
        """Return the arms that may receive traffic."""
        return tuple(arm for arm in self._arms.values() if arm.serves)

    def planning(self) -> tuple[Arm, ...]:
        """Return the arms that may be asked for plans."""
        return tuple(arm for arm in self._arms.values() if arm.plans)

    def get(self, key: str) -> Arm:
        """Find an arm by id, name or the unique beginning of an id. Raises UnknownArmError."""
        if key in self._arms:
            return self._arms[key]
        found = [arm for arm in self._arms.values() if arm.name == key]
        if not found and key:
            found = [arm for arm in self._arms.values() if arm.id.startswith(key)]
        if len(found) > 1:
            names = ", ".join(f"{arm.id} ({arm.name})" for arm in found)
            raise UnknownArmError(f"{key!r} could be {names}; give more digits of the id")
        if not found:
            raise UnknownArmError(f"there is no arm {key!r}; `arms list` shows those there are")
        return found[0]

    def program(self, key: str) -> Program:
        """Return the arm's compiled fast functions. Raises RegistryError, PolicyError."""
        arm = self.get(key)
        if not arm.source:
            raise RegistryError(f"{arm.name} has only slow functions; it decides on no request")
        if arm.id not in self._programs:
            self._programs[arm.id] = compile_policy(verify(arm.source))
        return self._programs[arm.id]

    def add(self, arm: Arm) -> Arm:
        """Take an arm in and return it as kept: its name made unique, its source canonical.

        An arm whose policy is already here is not added again: the one here is returned. Raises
        PolicyError if a source does not verify, RegistryError if its id is not its sources'.
        """
        canonical = verified(arm)
        if canonical.id != arm.id:
            raise RegistryError(f"the source of arm {arm.id} has id {canonical.id}; correct the id")
        if arm.id in self._arms:
            return self._arms[arm.id]
        return self._save(replace(canonical, name=self._unique(arm.name)))

    def move(self, key: str, state: State, reason: str) -> Arm:
        """Move an arm to another state and return it. Raises RegistryError.

        A pinned arm is not retired, and the last live arm that decides on requests stays live.
        """
        arm = self.get(key)
        reason = " ".join(reason.split())
        if not reason:
            raise RegistryError(f"moving {arm.name} to {state} needs a reason; give one")
        if state not in MOVES[arm.state]:
            ways = ", ".join(sorted(MOVES[arm.state]))
            raise RegistryError(f"{arm.name} is {arm.state} and cannot become {state}, only {ways}")
        if state == State.RETIRED and arm.pinned:
            raise RegistryError(f"{arm.name} is pinned; unpin it before retiring it")
        live = [a for a in self.fast() if a.state is State.LIVE]
        if live == [arm]:
            raise RegistryError(f"{arm.name} is the last live arm; bring another one live first")
        fault = _fault(arm)
        if fault and state != State.RETIRED:
            raise RegistryError(f"{arm.name} cannot serve: {fault}")
        return self._save(replace(arm, state=state, reason=reason))

    def pin(self, key: str) -> Arm:
        """Keep an arm from being retired."""
        return self._save(replace(self.get(key), pinned=True))

    def unpin(self, key: str) -> Arm:
        """Let an arm be retired again."""
        return self._save(replace(self.get(key), pinned=False))

    def _save(self, arm: Arm) -> Arm:
        self._store.save_arm(arm)
        self._arms[arm.id] = arm
        return arm

    def _unique(self, name: str) -> str:
        names = {arm.name for arm in self._arms.values()}
        tried, count = name, 1
        while tried in names:
            count += 1
            tried = f"{name}-{count}"
        return tried


def _fault(arm: Arm) -> str:
    """Say why the arm's source cannot run, empty if it can."""
    try:
        now = verified(arm).id
    except PolicyError as error:
        return f"no longer verifies: {error}"
    return "" if now == arm.id else f"its source has another id now: {now}"
