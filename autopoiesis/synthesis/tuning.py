"""Turning the numbers of a policy: its structure stays, its constants are searched by CMA-ES.

Constants are registers of the compiled program, so a try costs a replay and no compilation. Each
number keeps its sign and moves on a logarithmic scale; a zero says that something is off, and stays.

N. Hansen, A. Ostermeier, Completely derandomized self-adaptation in evolution strategies,
Evolutionary Computation 9(2), 2001.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray

from autopoiesis.arms.compiler import compile_policy, constants_of, with_constants
from autopoiesis.arms.language import Policy, PolicyError
from autopoiesis.arms.literals import with_literals
from autopoiesis.arms.slow import SlowPolicy
from autopoiesis.synthesis.race import Cell, Course, OutOfTime, Pair

SPREAD = 1.0
"""First standard deviation of a number's logarithm: two thirds of the tries scale it by 0.6 to 1.65."""
REACH = 4.0
"""Largest change of a number's logarithm: 55 times as large or as small."""
SHARED_CELLS = 2
"""Replays per try in a generation. All of it run the same ones; the next generation runs others."""
MOST_REPLAYS = 600
"""Most replays that the tuning of one policy may take."""
PATIENCE = 3
"""Judgements on all cells without progress after which it stops."""
DIGITS = 4
"""Significant digits of a tuned number, so that people can read it."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning came to."""

    policy: Policy
    """The best found; the policy itself if nothing better was."""
    gain: float
    """Over the policy as it was, on the cells it was tuned on: an optimistic figure."""
    replays: int


def tune(
    policy: Policy,
    course: Course,
    cells: Sequence[Cell],
    rng: np.random.Generator,
    most_replays: int = MOST_REPLAYS,
    slow: SlowPolicy | None = None,
) -> Tuned:
    """Search the policy's numbers for more utility on the cells, until the course says time is up.

    Replays are paired: every try of a generation meets the same traffic with the same seed. The numbers
    of its `slow` functions stay.
    """
    search = _Search(policy, course, cells, most_replays, slow)
    if len(search.free):
        with suppress(OutOfTime):
            search.run(int(rng.integers(1 << 31)))
    return search.result()


class _Search:
    """Ask, replay, tell; now and then judge the centre of the distribution on all cells."""

    def __init__(
        self,
        policy: Policy,
        course: Course,
        cells: Sequence[Cell],
        most_replays: int,
        slow: SlowPolicy | None,
    ) -> None:
        self._policy = policy
        self._slow = slow
        self._program = compile_policy(policy)
        self._constants = constants_of(self._program)
        self.free = np.flatnonzero(self._constants)
        self._course = course
        self._cells = list(cells)
        self._left = most_replays
        self._replays = 0
        self._best = np.zeros(len(self.free))
        self._before: float | None = None
        self._utility = -np.inf

    def run(self, seed: int) -> None:
        """Search until patience, replays or time run out."""
        self._before = self._utility = self._judged(self._best)
        # CMA needs two dimensions at least; the second of a policy with one number does nothing.
        dimensions = max(len(self.free), 2)
        bounds = np.tile([-REACH, REACH], (dimensions, 1))
        optimizer = CMA(np.zeros(dimensions), SPREAD, bounds, seed=seed)
        per_generation = min(SHARED_CELLS, len(self._cells))
        generations_per_pass = -(-len(self._cells) // per_generation)
        generation = waited = 0
        while waited < PATIENCE and not optimizer.should_stop():
            cells = [
                self._cells[(generation * per_generation + k) % len(self._cells)]
                for k in range(per_generation)
            ]
            if self._left < optimizer.population_size * len(cells) + len(self._cells):
                return
            tries = [optimizer.ask() for _ in range(optimizer.population_size)]
            optimizer.tell([(x, -self._replayed(x, cells)) for x in tries])
            generation += 1
            if generation % generations_per_pass == 0:
                waited = 0 if self._improves(optimizer.mean) else waited + 1

    def _improves(self, x: Floats) -> bool:
        utility = self._judged(x)
        if utility <= self._utility:
            return False
        self._utility, self._best = utility, x[: len(self.free)].copy()
        return True

    def _judged(self, x: Floats) -> float:
        return self._replayed(x, self._cells)

    def _replayed(self, x: Floats, cells: Sequence[Cell]) -> float:
        program = with_constants(self._program, self._values(x).tolist())
        runs = Pair(program, self._slow) if self._slow else program
        utility = float(np.mean([self._course.replay(runs, cell) for cell in cells]))
        self._left -= len(cells)
        self._replays += len(cells)
        return utility

    def _values(self, x: Floats) -> Floats:
        values = self._constants.copy()
        moved = values[self.free] * np.exp(x[: len(self.free)])
        changed = x[: len(self.free)] != 0.0
        values[self.free[changed]] = [float(f"{v:.{DIGITS}g}") for v in moved[changed]]
        return values

    def result(self) -> Tuned:
        """Write the best numbers down as a policy."""
        found = self._policy
        if self._best.any():
            with suppress(PolicyError):  # a number too large to be written
                found = with_literals(self._policy, self._values(self._best).tolist())
        gain = 0.0 if self._before is None else self._utility - self._before
        return Tuned(found, gain if found is not self._policy else 0.0, self._replays)
