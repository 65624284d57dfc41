"""Shadow: a new arm decides beside the arm that serves, on real windows, and moves no traffic.

Each window that has just ended is replayed in the twin under the shadow arm and under the arm that held most of
the fleet, from the same backlog and with the same seed. The windows are newer than all that the arm
was bred on. Its utility in the long run must not be lower by more than a margin, and its decisions must be sane:
unless it earns more, no more requests refused than the live arm refuses, no replica flooded, none starved that the
live arm uses. After one window with enough requests it becomes a canary; a fault retires it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.arm import State
from autopoiesis.orchestrator.lifecycle import Move
from autopoiesis.orchestrator.reward import Judged
from autopoiesis.twin.outcome import Status
from autopoiesis.twin.simulation import ReplicaSpec


@dataclass(frozen=True, slots=True)
class ShadowSettings:
    """How far a shadow arm may differ from the live one."""

    windows: int = 1
    """Windows with enough requests that it must come through."""
    min_requests: int = 30
    """Fewest requests of a window that say anything."""
    at_most: int = 6
    """Windows after which it goes on, however few requests there were: a canary is capped and guarded."""
    harm_margin: float = 0.05
    """Loss of mean utility against the live arm that is harm."""
    shed_share: float = 0.1
    """Share of requests refused above the live arm's."""
    flooded: float = 0.75
    """Share of the requests at one replica that is too much, where the live arm gives it less than half of that."""
    starved: float = 0.05
    """Share of its part by speed below which a replica is starved, if the live arm gives it half its part."""


@dataclass(frozen=True, slots=True)
class ShadowRecord:
    """What a shadow arm has come through."""

    seen: int = 0
    """Windows since it came."""
    counted: int = 0
    """Those with enough requests."""
    difference: float = 0.0
    """Sum over the counted ones of its utility minus the live arm's."""


class Shadow:
    """The shadow arms' records."""

    def __init__(self, settings: ShadowSettings = ShadowSettings()) -> None:
        self.settings = settings
        self._records: dict[str, ShadowRecord] = {}

    def review(
        self,
        arms: Sequence[str],
        judged: Mapping[str, Judged],
        worth: Mapping[str, float],
        live: tuple[str, str],
        replicas: Sequence[ReplicaSpec],
    ) -> list[Move]:
        """Take a window into account and return the moves that it leads to.

        `arms` are the shadow arms, `judged` the window's requests under each of them that was
        replayed and under the `live` arm (its id and name), `worth` their utilities in the long run.
        """
        self._records = {arm: self._records.get(arm, ShadowRecord()) for arm in arms}
        beside, name = judged.get(live[0]), live[1]
        moves: list[Move] = []
        for arm in arms:
            record = self._records[arm]
            record = ShadowRecord(record.seen + 1, record.counted, record.difference)
            if beside is not None and arm in judged:
                mine, theirs = worth.get(arm), worth.get(live[0])
                gain = None if mine is None or theirs is None else mine - theirs
                fault, difference = self._compare(judged[arm], beside, gain, name, replicas)
                if fault:
                    moves.append(Move(arm, State.RETIRED, f"in shadow: {fault}"))
                    continue
                if difference is not None:
                    total = record.difference + difference
                    record = ShadowRecord(record.seen, record.counted + 1, total)
            self._records[arm] = record
            if record.counted >= self.settings.windows:
                mean = record.difference / record.counted
                why = f"{record.counted} windows in shadow: utility {mean:+.3f} beside {name} in the twin"
                moves.append(Move(arm, State.CANARY, why))
            elif record.seen >= self.settings.at_most:
                why = (
                    f"{record.seen} windows in shadow with too few requests to tell it from {name}"
                )
                moves.append(Move(arm, State.CANARY, why))
        for move in moves:
            self._records.pop(move.arm_id, None)
        return moves

    def _compare(
        self,
        mine: Judged,
        beside: Judged,
        gain: float | None,
        name: str,
        replicas: Sequence[ReplicaSpec],
    ) -> tuple[str, float | None]:
        """Return what is wrong with the arm's window, and its gain over the live arm if it tells anything."""
        limits = self.settings
        if len(mine.outcome.status) < limits.min_requests or gain is None:
            return "", None
        if gain > 0.0:
            # Beside the queues that the live arm left, refusing and sending elsewhere may be right.
            return "", gain
        shed, usual = _shed_share(mine), _shed_share(beside)
        if shed > usual + limits.shed_share:
            return (
                f"it refuses {shed:.0%} of the requests, {name} {usual:.0%}, and earns no more",
                None,
            )
        share, others = _shares(mine, len(replicas)), _shares(beside, len(replicas))
        speed = np.array([spec.speed for spec in replicas])
        part = speed / speed.sum()
        for r in _where((share > limits.flooded) & (others < limits.flooded / 2)):
            return (
                f"it sends {share[r]:.0%} of the requests to {replicas[r].name}, {name} {others[r]:.0%}",
                None,
            )
        for r in _where((share < limits.starved * part) & (others >= 0.5 * part)):
            # Where a replica's part is a request or two, none is chance.
            if part[r] * len(mine.outcome.status) >= limits.min_requests / 2:
                return f"it starves {replicas[r].name}, to which {name} sends {others[r]:.0%}", None
        if gain < -limits.harm_margin:
            return f"utility {gain:+.3f} in the twin beside {name}", None
        return "", gain

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {arm: asdict(record) for arm, record in self._records.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        self._records = {arm: ShadowRecord(**record) for arm, record in state.items()}


def _where(mask: NDArray[np.bool_]) -> list[int]:
    return np.flatnonzero(mask).tolist()


def _shed_share(judged: Judged) -> float:
    return float((judged.outcome.status == Status.SHED).mean())


def _shares(judged: Judged, replicas: int) -> NDArray[np.float64]:
    """Return which share of the dispatched requests each replica got, (replicas,)."""
    sent = judged.outcome.replica[judged.outcome.replica >= 0]
    return np.bincount(sent, minlength=replicas) / max(len(sent), 1)
