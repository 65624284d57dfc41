"""Paired comparison in the twin: the same traffic, the same seeds, one policy against another."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.sandbox.slow_arm import SlowArm
from autopoiesis.arms.slow import SlowPolicy
from autopoiesis.synthesis.behaviour import Behaviour, behaviour_of, mean_behaviour
from autopoiesis.synthesis.brief import Brief
from autopoiesis.twin.composition import splice
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.perturbation import perturbed
from autopoiesis.twin.planned import serve_planned
from autopoiesis.twin.simulation import ReplicaSpec, run_arm
from autopoiesis.twin.trace import Trace
from autopoiesis.twin.yard import Yard

CONFIDENCE = 0.8
"""Coverage of the intervals that verdicts rest on: one-sided 90 %.

A canary's traffic is capped and watched for harm, so the race need not be sure: asking for more
before an arm may enter costs more regret than it saves (research on gates: 2.5 times).
"""
SCREEN_REQUESTS = 400
"""Requests that count in the short replay of the screen."""


class Surge(NamedTuple):
    """More load than there was."""

    rate: float = 1.0
    """How many times as fast requests come."""
    prompts: int = 1
    """How many times as long their prompts are."""


SURGES = (Surge(rate=2.0), Surge(prompts=3), Surge(rate=1.5), Surge(rate=3.0))
"""Those of a race: what is only bred on what was would be lost when the load rises."""
FUTURE_SURGES = (Surge(rate=1.5), Surge(prompts=3), Surge(rate=2.5))
"""Those of perturbed futures."""
SURGE_WINDOWS = 8
"""Windows that a surge is made of, one after the other, so that a backlog builds up."""


Clock = Callable[[], float]


class OutOfTime(Exception):  # noqa: N818 - not an error: the budget is spent
    """The budget is spent."""


class Deadline:
    """Says when time is up, and notes at which look it was: run again, a cycle can stop there too."""

    def __init__(self, clock: Clock = time.monotonic, stops: Collection[int] | None = None) -> None:
        """Go by the clock or, with the `stops` of an earlier run, by them alone."""
        self.until_s = math.inf
        self.stops: list[int] = []
        """The looks at which time was up; the first look is number 1."""
        self._clock = clock
        self._looks = 0
        self._again = stops

    @property
    def left_s(self) -> float:
        """Time that is left [s]; always some when an earlier run is repeated."""
        left_s = self.until_s - self._clock()
        return left_s if self._again is None else max(left_s, 1.0)

    def look(self) -> None:
        """Raise `OutOfTime` if time is up."""
        self._looks += 1
        over = self.left_s <= 0.0 if self._again is None else self._looks in self._again
        if over:
            self.stops.append(self._looks)
            raise OutOfTime


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One replay: traffic, a seed, and the window it is made from."""

    trace: Trace
    counts: NDArray[np.bool_]
    """(n,): which requests count: those after the warm-up."""
    seed: int
    window: int
    yard: int = -1
    """The window whose plans are judged on it, where that is another."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean difference in utility with its interval; without one where a single window tells it."""

    mean: float
    low: float = -np.inf
    high: float = np.inf

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_gain(
    differences: Sequence[float], windows: Sequence[int], confidence: float = CONFIDENCE
) -> Gain:
    """Return the mean of per-window mean differences with Student's t interval over windows.

    Replays of one window are not independent, so the window is the unit.
    """
    labels = np.asarray(windows)
    means = np.array([np.mean(np.asarray(differences)[labels == w]) for w in np.unique(labels)])
    mean = float(means.mean())
    if len(means) < 2:
        return Gain(mean)
    half = float(
        stdtrit(len(means) - 1, 0.5 + confidence / 2) * means.std(ddof=1) / np.sqrt(len(means))
    )
    return Gain(mean, mean - half, mean + half)


def mean_utility(outcome: Outcome, objective: Objective, counts: NDArray[np.bool_]) -> float:
    """Return the mean utility of the requests that count; shed and failed ones have none."""
    each = objective.utility(outcome.ttft_s, outcome.tpot_s)
    return float(np.where(outcome.status == Status.COMPLETED, each, 0.0)[counts].mean())


@dataclass(frozen=True, slots=True)
class Pair:
    """Fast functions on a fleet whose plan slow ones make."""

    program: Program
    slow: SlowPolicy


Runs = Program | Pair
"""What can be replayed."""
MOST_PLANNERS = 6
"""Processes of slow policies that are kept at a time."""


class Course:
    """Cells on which policies are run, each policy at most once per cell."""

    def __init__(
        self,
        replicas: Sequence[ReplicaSpec],
        objective: Objective,
        in_time: Callable[[], None],
        yards: Sequence[Yard] = (),
        *,
        allow_unsandboxed: bool = False,
    ) -> None:
        """Prepare; `in_time` is called before each replay and raises `OutOfTime` to stop.

        `yards` are what plans are made of, for each window; without them there are no pairs. Slow functions
        run where they cannot be shut off only if `allow_unsandboxed` says so.
        """
        self.replays = 0
        self._allow_unsandboxed = allow_unsandboxed
        self._yards = tuple(yards)
        self._planners: dict[str, SlowArm] = {}
        self._replicas = tuple(replicas)
        self._objective = objective
        self._in_time = in_time
        self._utility: dict[tuple[str, Cell], float] = {}
        self._behaviour: dict[tuple[str, Cell], Behaviour] = {}

    def utility(self, policy_id: str, program: Runs, cell: Cell) -> float:
        """Return the policy's mean utility on a cell."""
        key = (policy_id, cell)
        if key not in self._utility:
            outcome = self._run(program, cell)
            self._utility[key] = mean_utility(outcome, self._objective, cell.counts)
            self._behaviour[key] = behaviour_of(
                outcome.select(cell.counts), self._objective, len(self._replicas)
            )
        return self._utility[key]

    def behaviour(self, policy_id: str, cells: Iterable[Cell]) -> Behaviour:
        """Return how a policy behaves on cells that it has been run on."""
        return mean_behaviour([self._behaviour[policy_id, cell] for cell in cells])

    def replay(self, program: Runs, cell: Cell) -> float:
        """Run a program on a cell, even if it was run there before; return its mean utility."""
        return mean_utility(self._run(program, cell), self._objective, cell.counts)

    def _run(self, program: Runs, cell: Cell) -> Outcome:
        self._in_time()
        self.replays += 1
        if not isinstance(program, Pair):
            return run_arm(cell.trace, self._replicas, program, self._objective, cell.seed)
        planner = self._planner(program.slow)
        yard = self._yards[cell.window if cell.yard < 0 else cell.yard]
        return serve_planned(
            cell.trace, program.program, planner, yard, self._objective, cell.seed
        ).outcome

    def _planner(self, slow: SlowPolicy) -> SlowArm:
        """Return the slow policy's process; those used longest ago end. Raises SandboxError."""
        planner = self._planners.pop(slow.id, None) or SlowArm(
            slow, allow_unsandboxed=self._allow_unsandboxed
        )
        self._planners[slow.id] = planner
        while len(self._planners) > MOST_PLANNERS:
            self._planners.pop(next(iter(self._planners))).close()
        return planner

    def close(self) -> None:
        """End the processes of slow policies."""
        for planner in self._planners.values():
            planner.close()
        self._planners.clear()

    def known(self, policy_id: str, cell: Cell) -> float | None:
        """Return the policy's utility on a cell if it has been run there."""
        return self._utility.get((policy_id, cell))

    def mean(self, policy_id: str, program: Runs, cells: Iterable[Cell]) -> float:
        """Return the policy's utility, averaged over cells."""
        return float(np.mean([self.utility(policy_id, program, cell) for cell in cells]))


def screen_cell(brief: Brief) -> Cell:
    """Return the head of a surge: there policies differ also while all is well."""
    rng = np.random.default_rng([brief.seed, 3])
    surge = surge_cells(brief, brief.windows, SURGES[:1], rng)[0]
    head = surge.trace.head(SCREEN_REQUESTS)
    return replace(surge, trace=head, counts=surge.counts[: len(head)])


def window_cells(brief: Brief) -> list[Cell]:
    """Return every recent window as it was, newest first."""
    newest_first = list(enumerate(brief.windows))[::-1]
    return [Cell(trace, brief.counting(trace), brief.seed, i) for i, trace in newest_first]


def race_cells(brief: Brief, as_it_was: Sequence[Cell] = ()) -> list[Cell]:
    """Return the recent windows as they were, surges among the first of them, and varied copies.

    `as_it_was` are the `window_cells` to take, if there are any already.
    """
    rng = np.random.default_rng([brief.seed, 1])
    windows = list(as_it_was or window_cells(brief))
    varied = [replace(c, trace=perturbed(c.trace, rng), seed=brief.seed + 1) for c in windows]
    surges = surge_cells(brief, brief.windows, SURGES, rng)
    first = [cell for pair in zip(surges, windows, strict=False) for cell in pair]
    return [*first, *surges[len(windows) :], *windows[len(surges) :], *varied]


def surge_cells(
    brief: Brief, windows: Sequence[Trace], surges: Sequence[Surge], rng: np.random.Generator
) -> list[Cell]:
    """Return the newest of these windows joined and varied, in each of the surges."""
    joined = splice([t.slice(brief.warmup_s, np.inf) for t in windows[-SURGE_WINDOWS:]], "surge")
    counts = np.ones(len(joined), np.bool_)
    first = len(brief.windows) + len(brief.holdout)
    return [
        Cell(
            perturbed(
                replace(joined, input_tokens=joined.input_tokens * surge.prompts),
                rng,
                rate=surge.rate,
            ),
            counts,
            brief.seed + 31 + i,
            first + i,
            len(brief.windows) - 1,
        )
        for i, surge in enumerate(surges)
    ]


def holdout_cells(brief: Brief) -> list[Cell]:
    """Return the hold-out windows as they were."""
    first = len(brief.windows)
    return [
        Cell(t, brief.counting(t), brief.seed + 11, first + i) for i, t in enumerate(brief.holdout)
    ]


def future_cells(brief: Brief) -> list[Cell]:
    """Return perturbed futures: hold-out windows and the newest recent ones varied, and surges of the former."""
    rng = np.random.default_rng([brief.seed, 2])
    first = len(brief.windows)
    sources = [(first + i, trace) for i, trace in enumerate(brief.holdout)]
    sources += list(enumerate(brief.windows))[-max(len(brief.holdout), 2) :]
    varied = [
        Cell(perturbed(trace, rng), brief.counting(trace), brief.seed + 21, window)
        for window, trace in sources
    ]
    surges = surge_cells(brief, brief.holdout, FUTURE_SURGES, rng)
    return [*varied, *(replace(c, window=c.window + len(SURGES)) for c in surges)]
