"""Who serves the next window: from beliefs, limits and orders to an allocation.

Random numbers come from (seed, window).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.arm import Arm
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.allocator import (
    Layout,
    Limits,
    allocate,
    concentrated,
    lay_out,
    members_of,
    with_trial,
)
from autopoiesis.orchestrator.beliefs import Beliefs
from autopoiesis.orchestrator.grounds import Grounds
from autopoiesis.orchestrator.lifecycle import Lifecycle
from autopoiesis.orchestrator.rails import eligible, in_force
from autopoiesis.telemetry.records import GuardRails
from autopoiesis.twin.simulation import ReplicaSpec

TRUSTED = 0.5
"""Trust in the twin from which on one cell is sampled too: every arm is informed every window."""
EXPLORATION = (0.25, 0.05)
"""Most of the cells that go to challengers, with no and with full trust in the twin."""
DEAR = 0.05
"""Cost of splitting the fleet [utility] from which on no canary gets a cell for its trial's sake."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a draw depends on beside beliefs and limits."""

    window: int
    replicas: tuple[ReplicaSpec, ...]
    last: Allocation | None
    """The allocation before."""
    load: NDArray[np.float64]
    """Recent traffic of each shard, (SHARDS,)."""
    trust: float
    """In the twin [0..1]."""
    split_cost: float
    """Utility that a cell of its own for a challenger costs, by the twin."""
    rails: GuardRails


class Draw:
    """Draws allocations; it has no memory of its own."""

    def __init__(
        self,
        registry: Registry,
        beliefs: Beliefs,
        lifecycle: Lifecycle,
        seed: int,
        cell_replicas: int,
    ) -> None:
        self._registry = registry
        self._beliefs = beliefs
        self._lifecycle = lifecycle
        self._seed = seed
        self._cell_replicas = cell_replicas

    def allocation(self, now: Situation) -> tuple[Allocation, Grounds]:
        """Return who serves, and why. Raises ValueError: no replica is there, or no arm serves."""
        layout = self._layout(now)
        cells = len(layout.groups)
        rng = np.random.default_rng([self._seed, now.window])
        arms = eligible(self._registry.serving(), now.rails)
        uncapped = self._drawn(now, arms, cells, None)
        self._lifecycle.settle_baseline(arms, uncapped)
        limits = self._lifecycle.limits(arms)
        if limits.arms() and now.rails == GuardRails():
            told = self._beliefs.newest_word, self._beliefs.earning()
            self._lifecycle.want(now.window, arms, uncapped, now.trust > 0.0, rng, *told)
        switchback = self._lifecycle.switchback
        tried = switchback.arm_of(now.window) if switchback else None
        if tried or now.rails.only:
            limits = Limits()
        probabilities = {tried: 1.0} if tried else self.probabilities(now)
        drawn = allocate(now.window, layout, probabilities, limits, now.last, rng)
        return drawn, self.grounds(now.window, now.rails, probabilities)

    def probabilities(self, now: Situation) -> dict[str, float]:
        """Return each serving arm's probability per cell, few challengers among them."""
        if now.rails.only:
            return {now.rails.only: 1.0}
        cells = len(self._layout(now).groups)
        arms = eligible(self._registry.serving(), now.rails)
        limits = self._lifecycle.limits(arms)
        without, trusted = EXPLORATION
        exploration = without + (trusted - without) * now.trust
        incumbent = self._incumbent(now.last, arms)
        drawn = self._drawn(now, arms, cells, limits)
        charged = drawn
        if cells > 1 and incumbent is not None and now.split_cost > 0.0:
            charged = self._drawn(now, arms, cells, limits, incumbent)
        trial = None
        if cells > 1 and now.split_cost < DEAR:
            trial = self._lifecycle.on_trial(arms, self._beliefs.newest_word)
        if trial is not None:
            drawn, charged = (with_trial(p, trial, cells) for p in (drawn, charged))
        gaps = self._beliefs.gaps([a.id for a in arms])
        return concentrated(drawn, limits, cells, exploration, incumbent, charged, gaps)

    def _incumbent(self, last: Allocation | None, arms: Sequence[Arm]) -> str | None:
        """Return who is to be beaten: who served most, or who did best when a known regime is back."""
        if last is None:
            return None
        serving = max(last.arms(), key=last.share)
        return self._beliefs.regimes.successor([a.id for a in arms], serving) or serving

    def _layout(self, now: Situation) -> Layout:
        return lay_out(members_of(now.replicas), now.last, now.load, self._cell_replicas)

    def grounds(self, window: int, rails: GuardRails, probabilities: dict[str, float]) -> Grounds:
        """Return what an allocation was decided by."""
        switchback = self._lifecycle.switchback
        tried = switchback if switchback and switchback.arm_of(window) else None
        arms = eligible(self._registry.serving(), rails)
        return Grounds(
            order=in_force(rails, lambda arm: self._registry.get(arm).name),
            switchback=(tried.arm_id, tried.control_id) if tried else None,
            trial=self._lifecycle.on_trial(arms, self._beliefs.newest_word),
            probabilities=probabilities,
            states={a.id: a.state for a in self._registry.fast()},
        )

    def _drawn(
        self,
        now: Situation,
        arms: Sequence[Arm],
        cells: int,
        limits: Limits | None,
        spared: str | None = None,
    ) -> dict[str, float]:
        """Return probabilities before few are left; all but the `spared` arm pay for a split, if there is one."""
        paying = [a.id for a in arms if a.id != spared] if spared is not None else []
        return self._beliefs.probabilities(
            np.random.default_rng([self._seed, now.window, 1]),
            eligible=[a.id for a in arms],
            caps=limits.caps(cells) if limits else None,
            sample=cells > 1 or now.trust >= TRUSTED,
            charges=dict.fromkeys(paying, now.split_cost),
        )
