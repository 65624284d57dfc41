"""A set is worth what its best member is worth, window by window.

F. Liu et al., EoH-S: Evolution of heuristic set using LLMs for automated heuristic design, 2025:
the value of a set is the mean over instances of the best member's score. It is submodular, so that
taking the largest marginal gain again and again comes within 1 - 1/e of the best set.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def value_of_set(utility: Floats, members: Sequence[int], base: Floats) -> float:
    """Return the mean over windows of the best of the members and the base.

    `utility` is (policies, windows), `base` (windows,); NaN where a policy was not tried.
    """
    rows = np.vstack([base, np.nan_to_num(utility[list(members)], nan=-np.inf)])
    return float(rows.max(axis=0).mean())


def by_complement(utility: Floats, base: Floats) -> list[int]:
    """Order policies by what each adds to those before it, ties by their own mean, then by index.

    `utility` is (policies, windows) with NaN where not tried, `base` (windows,) what there is already.
    """
    known = np.nan_to_num(utility, nan=-np.inf)
    own = [
        float(np.mean(row[np.isfinite(row)])) if np.isfinite(row).any() else -np.inf
        for row in known
    ]
    left, order, reached = list(range(len(known))), list[int](), base.astype(np.float64)
    while left:
        added = {i: float(np.maximum(known[i] - reached, 0.0).sum()) for i in left}
        best = max(left, key=lambda i: (added[i], own[i], -i))
        left.remove(best)
        order.append(best)
        reached = np.maximum(reached, known[best])
    return order
