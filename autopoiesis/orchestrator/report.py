"""What happened in a span of time, in numbers: arms, gain over people's arms, drift, synthesis and its cost.

All of it comes from the telemetry, through the same read-only SQL as everybody's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from scipy import stats

from autopoiesis.orchestrator.catalogue import Ask
from autopoiesis.orchestrator.report_queries import (
    ARMS,
    COURSE,
    DRIFT,
    EVENTS,
    GAINS,
    GATES,
    REPLICAS,
    SHARES,
    SYNTHESES,
    TOTALS,
    TWIN,
)

BLOCKS = 20
"""Pieces of the span whose spread gives the interval of a gain: neighbouring windows are not independent."""
FEWEST_PER_BLOCK = 2
"""Windows in a piece; there are fewer pieces where there are few windows."""
FEWEST_BLOCKS = 3
"""Below that there is no interval."""
CONFIDENCE = 0.95
POINTS = 400
"""Points of a curve; where there are more windows, each is a mean over several."""
MOST_ROWS = 50_000

Row = dict[str, Any]


class ReportError(ValueError):
    """There is nothing to report on: one sentence."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What serving earned over one arm that people wrote, had that served alone."""

    arm_id: str
    name: str
    gain: float
    """Mean utility per request, as served minus this arm's."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval; None where there are too few windows for one."""
    windows: int
    """Windows in which there is an estimate for the arm."""


@dataclass(frozen=True, slots=True)
class Report:
    """The numbers of a report. Rows have the names of the telemetry's columns."""

    first_window: int
    last_window: int
    since_s: float
    until_s: float
    objective: dict[str, float]
    totals: Row
    gains: tuple[Gain, ...]
    """One per human arm with estimates, the best arm first."""
    arms: tuple[Row, ...]
    syntheses: tuple[Row, ...]
    gates: tuple[Row, ...]
    drift: tuple[Row, ...]
    events: tuple[Row, ...]
    replicas: tuple[Row, ...]
    twin_errors: tuple[Row, ...]
    course: dict[str, list[Any]]
    """Curves: one value per point in time."""
    shares: dict[str, list[float]]
    """Arm → its share of the traffic at each point in time."""

    @property
    def best_human(self) -> Gain | None:
        """Return the gain over the human arm that would have earned most."""
        return self.gains[0] if self.gains else None


def make_report(ask: Ask, since_s: float | None, until_s: float | None, for_s: float) -> Report:
    """Read the windows that began between `since_s` and `until_s`, or in the last `for_s` seconds.

    Raises:
        ReportError: no window began then.
        QueryError, TelemetryError: the telemetry cannot be read.
    """
    questions = _Questions(ask)
    first, last = _span(questions, since_s, until_s, for_s)
    windows = f"window_id between {first} and {last}"
    totals = questions.rows(TOTALS.format(windows=windows))[0]
    began_s, ended_s = float(totals.pop("since_s")), float(totals.pop("until_s"))
    happened = f"at_s between {began_s!r} and {ended_s!r}"
    every = max(1, -(-(last - first + 1) // POINTS))
    course = questions.columns(COURSE.format(windows=windows, first=first, every=every))
    return Report(
        first_window=first,
        last_window=last,
        since_s=began_s,
        until_s=ended_s,
        objective=totals.pop("objective"),
        totals=totals,
        gains=_gains(
            questions.rows(
                GAINS.format(
                    windows=windows,
                    first=first,
                    count=last - first + 1,
                    blocks=max(1, min(BLOCKS, (last - first + 1) // FEWEST_PER_BLOCK)),
                )
            )
        ),
        arms=questions.rows(ARMS.format(windows=windows)),
        syntheses=questions.rows(SYNTHESES.format(windows=windows)),
        gates=questions.rows(GATES.format(windows=windows)),
        drift=questions.rows(DRIFT.format(windows=windows)),
        events=questions.rows(EVENTS.format(happened=happened)),
        replicas=questions.rows(REPLICAS.format(happened=happened, windows=windows)),
        twin_errors=questions.rows(TWIN.format(windows=windows)),
        course=course,
        shares=_shares(
            questions.rows(SHARES.format(windows=windows, first=first, every=every)),
            course["point"],
        ),
    )


class _Questions:
    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def rows(self, query: str) -> tuple[Row, ...]:
        result = self._ask(query, MOST_ROWS)
        return tuple(dict(zip(result.columns, row, strict=True)) for row in result.rows)

    def columns(self, query: str) -> dict[str, list[Any]]:
        result = self._ask(query, MOST_ROWS)
        return {name: [row[i] for row in result.rows] for i, name in enumerate(result.columns)}


def _span(
    questions: _Questions, since_s: float | None, until_s: float | None, for_s: float
) -> tuple[int, int]:
    """Return the first and the last window of the span."""
    (there,) = questions.rows(
        "select min(started_s) as first_s, max(ended_s) as last_s from windows"
    )
    if there["first_s"] is None:
        raise ReportError(
            "The telemetry has no windows yet; let `autopoiesis serve` run for a while."
        )
    end_s = float(there["last_s"]) if until_s is None else until_s
    start_s = end_s - for_s if since_s is None else since_s
    (found,) = questions.rows(
        "select min(window_id) as first, max(window_id) as last from windows "  # noqa: S608
        f"where started_s >= {start_s!r} and started_s < {end_s!r}"
    )
    if found["first"] is None:
        raise ReportError(
            f"No window began between {moment(start_s)} and {moment(end_s)}; "
            f"the telemetry has windows from {moment(there['first_s'])} to {moment(there['last_s'])}."
        )
    return found["first"], found["last"]


def moment(time_s: float) -> str:
    """Return a time for people, in UTC."""
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _gains(rows: Sequence[Row]) -> tuple[Gain, ...]:
    """Turn sums per arm and block into gains with intervals, the best arm first.

    The interval is Student's t over block means: served minus estimated, weighted by requests.
    """
    gains: list[Gain] = []
    for arm_id in dict.fromkeys(row["arm_id"] for row in rows):
        mine = [row for row in rows if row["arm_id"] == arm_id and row["requests"] > 0]
        weights = np.array([row["requests"] for row in mine], np.float64)
        means = np.array([row["difference"] for row in mine], np.float64) / weights
        gain = float(np.average(means, weights=weights))
        windows = sum(row["windows"] for row in mine)
        low = high = None
        if len(mine) >= FEWEST_BLOCKS:
            # The mean is weighted by requests, and so is its variance: a ratio estimator's.
            squares = (weights / weights.sum() * (means - gain)) ** 2
            error = float(np.sqrt(squares.sum() * len(mine) / (len(mine) - 1)))
            reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(mine) - 1)) * error
            low, high = gain - reach, gain + reach
        gains.append(Gain(arm_id, mine[0]["name"], gain, low, high, windows))
    most = max((gain.windows for gain in gains), default=0)
    known = [gain for gain in gains if 2 * gain.windows >= most]
    return tuple(sorted(known, key=lambda gain: gain.gain))


def _shares(rows: Sequence[Row], points: Sequence[int]) -> dict[str, list[float]]:
    at = {point: i for i, point in enumerate(points)}
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["point"] in at:
            shares.setdefault(row["arm_id"], [0.0] * len(points))[at[row["point"]]] = row["share"]
    return shares
