"""What an arm would have earned on windows that others served: off-policy evaluation.

Every stored window is replayed in the twin under the arm (Dudík, Langford and Li, 2011, with the twin as
the direct model). With y the observed utility of a cell's requests and m the twin's for the same
requests under the arm that really played,

    V(a) = mean m(a) + C + own(a)
    C = mean over windows of the request-weighted (y - m) of all cells
    own(a) = n/(n + 1) * sum w (y - m - C) / sum w    over the cells that a played, w = share / propensity

The first term is the twin's word, C what it misses whichever arm plays, `own` where it errs about this arm:
self-normalised inverse-propensity weighting, shrunk by one pseudo-window, n being the number of windows
that the weights are worth (Kish, 1965). An arm that never played rests on the twin and C alone, and its
interval says so. Means are over requests. Every window begins with the backlog that there really was: what an
arm would have spared itself, or brought upon itself, over many windows is not in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.allocation import SHARDS
from autopoiesis.arms.arm import Arm
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.observation import Observation, unfinished
from autopoiesis.orchestrator.rehearsal import WARMUP_WINDOWS, Rehearsal
from autopoiesis.orchestrator.reward import Judged, fresh_shards, judge
from autopoiesis.orchestrator.stored import StoredWindow
from autopoiesis.twin.capacity import ReplicaSpec
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.trace import Trace

Floats = NDArray[np.float64]

LARGEST_WEIGHT = 20.0
"""Inverse propensities are cut off here."""
RESAMPLES = 1000
BLOCK = 3
"""Windows that are resampled together: neighbours are not independent."""
OWN_ERROR_PRIOR = (0.05, 3.0)
"""Standard deviation of the twin's errors about single arms, and how many arms that is worth."""
TOO_FEW = "There are {} stored windows that can be replayed; let the instance serve for longer."
FEWEST_WINDOWS = 3

Progress = Callable[[float], None]


class CounterfactualError(ValueError):
    """Nothing can be said: one sentence."""


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """What one arm would have earned, had it served all the windows; bounds are of 95 % intervals."""

    id: str
    policy: str
    utility: float
    low: float
    high: float
    twin: float
    """The twin's word alone."""
    correction: float
    """What observation adds to it."""
    windows_played: int
    weight: float
    """How many windows the arm's own correction is worth."""
    gain: float
    """Over what the windows really earned."""
    gain_low: float
    gain_high: float


@dataclass(frozen=True, slots=True)
class CounterfactualReport:
    """The arms on the same windows; `as_dict` is what the command line prints."""

    windows: int
    first_window: int
    last_window: int
    requests: int
    objective: dict[str, float]
    observed_utility: float
    arms: tuple[Counterfactual, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return asdict(self)


class _Cell(NamedTuple):
    """A cell that played: what was seen of its requests, and what the twin says of the same ones."""

    window: int
    """Place among the windows."""
    arm: str
    share: float
    weight: float
    miss: float
    """Observed utility minus the twin's."""


def evaluate(
    windows: Sequence[StoredWindow],
    history: tuple[Trace, Outcome],
    fleet: Mapping[str, ReplicaSpec],
    registry: Registry,
    arms: Sequence[Arm],
    seed: int,
    progress: Progress = lambda _done: None,
) -> CounterfactualReport:
    """Estimate what each arm would have earned on these windows.

    `history` holds the requests from two windows before the first to one after the last with what became
    of them, row by row; `fleet` the replicas by name; `registry` every arm that played.

    Raises:
        CounterfactualError: fewer than three windows can be replayed.
    """
    words: list[dict[str, float]] = []
    cells: list[_Cell] = []
    observed: list[float] = []
    counts: list[int] = []
    used: list[StoredWindow] = []
    before: StoredWindow | None = None
    for i, window in enumerate(windows):
        progress(i / len(windows))
        previous, before = before, window
        played = [arm for arm in window.allocation.arms() if _known(registry, arm)]
        programs = {a.id: registry.program(a.id) for a in arms}
        programs |= {arm: registry.program(arm) for arm in played}
        rehearsal = _rehearsal(window, history, fleet, seed)
        if not rehearsal.requests():
            continue
        twin = rehearsal.under(programs)
        seen = _seen(window, previous, rehearsal.seen.outcome)
        word = {a.id: u for a in arms if (u := twin[a.id].mean_utility()) is not None}
        total = seen.mean_utility()
        if total is None or len(word) < len(arms):
            continue
        cells += _cells(len(used), window, seen, twin)
        words.append(word)
        observed.append(total)
        counts.append(int(seen.counts.sum()))
        used.append(window)
    if len(used) < FEWEST_WINDOWS:
        raise CounterfactualError(TOO_FEW.format(len(used)))
    weights = np.array(counts, np.float64)
    draws = _blocks(len(used), np.random.default_rng(seed))
    spread = _own_spread(cells, weights)
    estimates = [
        _estimate(arm, np.array([w[arm.id] for w in words]), np.array(observed), weights, cells, draws, spread)
        for arm in arms
    ]  # fmt: skip
    return CounterfactualReport(
        windows=len(used),
        first_window=used[0].allocation.window,
        last_window=used[-1].allocation.window,
        requests=int(weights.sum()),
        objective=used[-1].objective.as_dict(),
        observed_utility=float(np.average(observed, weights=weights)),
        arms=tuple(sorted(estimates, key=lambda e: -e.utility)),
    )


def _known(registry: Registry, arm_id: str) -> bool:
    return any(arm.id == arm_id for arm in registry.all())


def _rehearsal(
    window: StoredWindow,
    history: tuple[Trace, Outcome],
    fleet: Mapping[str, ReplicaSpec],
    seed: int,
) -> Rehearsal:
    """Return what the loop saw of the window when it settled: nothing of later than one window after it."""
    length_s = window.ended_s - window.started_s
    now_s = window.ended_s + length_s
    trace, outcome = history
    last = int(np.searchsorted(trace.arrival_s, now_s))
    since_s = window.started_s - WARMUP_WINDOWS * length_s
    rows = np.flatnonzero(unfinished(outcome.select(slice(0, last)), since_s))
    names = dict.fromkeys(r for cell in window.allocation.cells for r in cell.replicas)
    seen = Observation(
        window.allocation.window,
        window.ended_s,
        now_s,
        trace.select(rows),
        _as_of(outcome.select(rows), now_s),
        tuple(fleet[name] for name in names if name in fleet),
    )
    return Rehearsal(seen, window.started_s, window.ended_s, window.objective, seed)


def _as_of(outcome: Outcome, now_s: float) -> Outcome:
    """Return what was known of the requests at `now_s`."""
    running = (outcome.status == Status.COMPLETED) & (outcome.finished_s > now_s)
    return outcome._replace(
        first_token_s=np.where(outcome.first_token_s > now_s, np.nan, outcome.first_token_s),
        finished_s=np.where(running, np.nan, outcome.finished_s),
        status=np.where(running, Status.PENDING, outcome.status),
        # Each window has a fleet of its own, so a replica's number means nothing in the next one.
        replica=np.full(len(outcome.replica), -1, np.int64),
    )


def _seen(window: StoredWindow, previous: StoredWindow | None, outcome: Outcome) -> Judged:
    fresh = fresh_shards(window.allocation, previous.allocation) if previous else None
    now_s = 2.0 * window.ended_s - window.started_s
    return judge(outcome, window.objective, window.started_s, window.ended_s, now_s, fresh)


def _cells(at: int, window: StoredWindow, seen: Judged, twin: Mapping[str, Judged]) -> list[_Cell]:
    found: list[_Cell] = []
    cell_of = np.full(SHARDS, -1)
    for i, cell in enumerate(window.allocation.cells):
        cell_of[list(cell.shards)] = i
    owner = cell_of[seen.outcome.shard]
    for i, cell in enumerate(window.allocation.cells):
        if cell.arm_id not in twin:
            continue
        # Both are told of the same requests, so the window's luck is in neither.
        mine = seen.counts & twin[cell.arm_id].counts & (owner == i)
        if mine.any():
            share = float(mine.sum() / seen.counts.sum())
            weight = share * min(1.0 / max(cell.propensity, 1e-9), LARGEST_WEIGHT)
            miss = float((seen.utility - twin[cell.arm_id].utility)[mine].mean())
            found.append(_Cell(at, cell.arm_id, share, weight, miss))
    return found


def _blocks(windows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each window is drawn in each resample of the moving-block bootstrap (Künsch, 1989)."""
    block = min(BLOCK, windows)
    blocks = -(-windows // block)
    starts = rng.integers(0, windows, (RESAMPLES, blocks))  # circular: every window is as likely
    rows = (starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1) % windows
    drawn = rows[:, :windows]
    return np.stack([np.bincount(row, minlength=windows) for row in drawn])


def _value(
    word: Floats, weights: Floats, drawn: Floats, mine: Floats, misses: Floats, common: Floats
) -> tuple[float, float]:
    """Return V(a), and what its own correction is worth. Each array holds a number per window.

    `mine` and `misses` are sums of w and of w * (y - m) over the cells of the arm; `common` the
    share-weighted mean of y - m over all cells; `drawn` how often the window counts.
    """
    counted = weights * drawn
    total, played = counted.sum(), float(mine @ drawn)
    shared = float(common @ counted / total)
    worth = played**2 / float(mine**2 @ drawn) if played else 0.0
    own = (float(misses @ drawn) / played - shared) * worth / (worth + 1.0) if played else 0.0
    return float(word @ counted / total) + shared + own, worth


def _estimate(
    arm: Arm,
    word: Floats,
    observed: Floats,
    weights: Floats,
    cells: Sequence[_Cell],
    draws: NDArray[np.int64],
    spread: float,
) -> Counterfactual:
    n = len(word)
    mine, misses, common, shares = (np.zeros(n) for _ in range(4))
    for cell in cells:
        common[cell.window] += cell.share * cell.miss
        shares[cell.window] += cell.share
        if cell.arm == arm.id:
            mine[cell.window] += cell.weight
            misses[cell.window] += cell.weight * cell.miss
    common /= np.maximum(shares, 1e-12)
    value, weight = _value(word, weights, np.ones(n), mine, misses, common)
    resampled = np.array([_value(word, weights, k, mine, misses, common)[0] for k in draws])
    earned = draws * weights @ observed / (draws @ weights)
    real = float(observed @ weights / weights.sum())
    unknown = spread / sqrt(1.0 + weight)
    sd, gain_sd = (
        sqrt(float(v.var(ddof=1)) * n / max(n - 1, 1) + unknown**2)
        for v in (resampled, resampled - earned)
    )
    reach = 1.96
    twin = float(word @ weights / weights.sum())
    return Counterfactual(
        id=arm.id,
        policy=arm.name,
        utility=min(max(value, 0.0), 1.0),
        low=min(max(value - reach * sd, 0.0), 1.0),
        high=min(max(value + reach * sd, 0.0), 1.0),
        twin=twin,
        correction=value - twin,
        windows_played=int((mine > 0.0).sum()),
        weight=weight,
        gain=value - real,
        gain_low=value - real - reach * gain_sd,
        gain_high=value - real + reach * gain_sd,
    )


def _own_spread(cells: Sequence[_Cell], weights: Floats) -> float:
    """Return how far the twin's errors about single arms spread, by those that played."""
    sd, worth = OWN_ERROR_PRIOR
    scaled = np.array([cell.share * weights[cell.window] for cell in cells])
    common = float(np.average([c.miss for c in cells], weights=scaled)) if cells else 0.0
    squares, arms = sd**2 * worth, worth
    for arm in {cell.arm for cell in cells}:
        own = [(cell.weight, cell.miss - common) for cell in cells if cell.arm == arm]
        total = sum(w for w, _ in own)
        worth = total**2 / sum(w**2 for w, _ in own)
        certain = worth / (worth + 1.0)
        squares += certain * (sum(w * miss for w, miss in own) / max(total, 1e-12)) ** 2
        arms += certain
    return sqrt(squares / arms)
