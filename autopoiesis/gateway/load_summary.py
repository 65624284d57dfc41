"""What a load run measured."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopoiesis.replicas.probe import Server

SHED = 429


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    index: int
    """Its place in the trace."""
    status: int
    """HTTP status; 0 if there was no answer, -1 if it was still running at the end."""
    complete: bool
    """Status 200 and the stream came to its proper end."""
    lag_s: float
    """How much later than planned it was sent: the generator's own fault."""
    ttft_s: float | None
    """Sent to first body chunk."""
    e2e_s: float
    output_tokens: int
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What a load run measured; percentiles are over completed requests, None if there are none."""

    trace: str
    url: str
    model: str
    requests: int
    completed: int
    shed: int
    failed: int
    unfinished: int
    duration_s: float
    requests_s: float
    tokens_s: float
    ttft_mean_s: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_mean_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    e2e_mean_s: float | None
    e2e_p50_s: float | None
    e2e_p99_s: float | None
    lag_p50_s: float | None
    lag_p99_s: float | None
    statuses: dict[str, int]
    """HTTP status → answers."""
    errors: dict[str, int]
    """What went wrong → how often; the most frequent ones."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON and tables."""
        return {name: getattr(self, name) for name in self.__slots__}


def summarise(
    trace: str, server: Server, answers: Sequence[Answer], duration_s: float
) -> LoadSummary:
    """Sum up a run of that length."""
    done = [a for a in answers if a.complete]
    wrong = Counter(a.error for a in answers if a.error and a.status >= 0)
    shed = sum(a.status == SHED for a in answers)
    unfinished = sum(a.status < 0 for a in answers)
    ttft = _mean_p50_p99([a.ttft_s for a in done])
    tpot = _mean_p50_p99([a.tpot_s for a in done])
    e2e = _mean_p50_p99([a.e2e_s for a in done])
    lag = _mean_p50_p99([a.lag_s for a in answers])
    statuses = Counter(str(a.status) for a in answers if a.status > 0)
    return LoadSummary(
        trace=trace,
        url=server.url,
        model=server.models[0],
        requests=len(answers),
        completed=len(done),
        shed=shed,
        failed=len(answers) - len(done) - shed - unfinished,
        unfinished=unfinished,
        duration_s=duration_s,
        requests_s=len(done) / duration_s,
        tokens_s=sum(a.output_tokens for a in done) / duration_s,
        ttft_mean_s=ttft[0],
        ttft_p50_s=ttft[1],
        ttft_p99_s=ttft[2],
        tpot_mean_s=tpot[0],
        tpot_p50_s=tpot[1],
        tpot_p99_s=tpot[2],
        e2e_mean_s=e2e[0],
        e2e_p50_s=e2e[1],
        e2e_p99_s=e2e[2],
        lag_p50_s=lag[1],
        lag_p99_s=lag[2],
        statuses=dict(sorted(statuses.items())),
        errors=dict(wrong.most_common(5)),
    )


def _mean_p50_p99(values: list[float | None]) -> tuple[float | None, float | None, float | None]:
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return None, None, None
    return float(known.mean()), float(np.median(known)), float(np.percentile(known, 99))
