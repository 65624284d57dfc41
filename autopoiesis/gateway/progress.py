"""How far streams are: nobody counts each one's tokens, but replicas say how many they have generated."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class Progress:
    """Tokens that a sequence which has run all the time would have by now, replica by replica.

    Between two reports it goes on as between those before. `clock` gives seconds, never going back.
    """

    def __init__(self, replicas: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens: NDArray[np.float64] = np.zeros(replicas)
        self._per_s: NDArray[np.float64] = np.zeros(replicas)
        self._reports: dict[int, tuple[float, float, float]] = {}
        """Replica → when it reported last, its total of generated tokens, and how many sequences ran."""

    def reported(self, replica: int, generated_tokens: float, running: float) -> None:
        """Take in a replica's total of generated tokens and how many sequences it runs."""
        now_s = self._clock()
        at_s, total, ran = self._reports.get(replica, (now_s, generated_tokens, running))
        if now_s > at_s and generated_tokens >= total:
            each = (generated_tokens - total) / max((ran + running) / 2.0, 1.0)
            self._tokens[replica] += each
            self._per_s[replica] = each / (now_s - at_s)
        self._reports[replica] = now_s, generated_tokens, running

    def tokens(self, replica: int) -> float:
        """Return the tokens by now, 0 of no replica (-1); only differences mean anything."""
        if replica not in self._reports:
            return 0.0
        since_s = self._clock() - self._reports[replica][0]
        return float(self._tokens[replica] + self._per_s[replica] * since_s)

    def forget(self, replica: int) -> None:
        """Begin anew: another replica has its place."""
        self._reports.pop(replica, None)
        self._tokens[replica] = self._per_s[replica] = 0.0
