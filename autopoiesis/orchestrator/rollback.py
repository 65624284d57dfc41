"""The last allocation that was good, for an operator who wants to go back to it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.telemetry.query import QueryResult

WINDOWS = 360
"""How many windows back it is looked for."""
MOST_ROWS = 10_000
Z = 1.645
"""Standard errors of a difference that are significant: one-sided 5 %."""


@dataclass(frozen=True, slots=True)
class _Arrangement:
    """Windows in which every replica served the same arm."""

    newest: Allocation
    utilities: tuple[float, ...]
    """Of its windows with requests."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.utilities))


def last_good(ask: Callable[[str, int], QueryResult], arms: Collection[str]) -> Allocation | None:
    """Return the newest other allocation that was no worse than the best; None if there is none.

    Windows in which every replica served the same arm count together, as one arrangement. Those
    other than the present one, and of arms that may all serve (`arms`), are compared by their mean
    utility per window: it is the one that served last of those that are not significantly below the
    best. Load is not taken into account: a quiet hour looks good whoever served it.
    """
    query = (
        "select a.window_id, a.cell, a.arm_id, a.replicas, a.shards, a.propensity, w.utility "  # noqa: S608
        "from allocations as a left join windows as w using (window_id) "
        f"where a.window_id > (select max(window_id) - {WINDOWS} from allocations) order by 1, 2"
    )
    tried = _arrangements(ask(query, MOST_ROWS).rows)
    deviation = _deviation(tried)
    known = [a for a in tried[:-1] if a.utilities and set(a.newest.arms()) <= set(arms)]
    if not known:
        return None
    best = max(known, key=lambda a: a.mean)

    def is_good(a: _Arrangement) -> bool:
        error = deviation * float(np.sqrt(1.0 / len(a.utilities) + 1.0 / len(best.utilities)))
        return a.mean >= best.mean - Z * error

    return next(a.newest for a in reversed(known) if is_good(a))


def _arrangements(rows: Sequence[Sequence[Any]]) -> list[_Arrangement]:
    """Return the arrangements, the one that served last at the end."""
    found: dict[frozenset[tuple[str, str]], list[tuple[Allocation, float | None]]] = {}
    for window, group in groupby(rows, key=lambda row: int(row[0])):
        cells = list(group)
        parts = tuple(Cell(row[2], tuple(row[3]), tuple(row[4]), row[5]) for row in cells)
        arms = frozenset((replica, cell.arm_id) for cell in parts for replica in cell.replicas)
        before = found.pop(arms, [])
        found[arms] = [*before, (Allocation(window, parts), cells[0][6])]
    return [
        _Arrangement(kept[-1][0], tuple(u for _, u in kept if u is not None))
        for kept in found.values()
    ]


def _deviation(tried: Sequence[_Arrangement]) -> float:
    """Return the standard deviation of a window's utility within arrangements; 0 if each served once."""
    within = [np.array(a.utilities) - a.mean for a in tried if len(a.utilities) > 1]
    freedom = sum(len(d) - 1 for d in within)
    return float(np.sqrt(sum(float(d @ d) for d in within) / freedom)) if freedom else 0.0
