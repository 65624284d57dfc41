"""What the operator wants: the one definition of utility, used live and in the twin."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Objective:
    """Service-level objective for latency.

    A request's utility is 1 when both objectives are met, else `late_worth` times
    `min(1, slo_ttft/ttft) * min(1, slo_tpot/tpot)`, and 0 when it was shed or failed.
    """

    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.1
    late_worth: float = 1.0
    """What a request is worth that only just misses [0..1]; 0 counts nothing but those in time."""

    def __post_init__(self) -> None:
        if not (self.slo_ttft_s > 0 and self.slo_tpot_s > 0):
            raise ValueError(f"SLOs must be above 0 s, got {self.slo_ttft_s} and {self.slo_tpot_s}")
        if not 0.0 <= self.late_worth <= 1.0:
            raise ValueError(f"late_worth must be from 0 to 1, got {self.late_worth}")

    def utility(self, ttft_s: Floats, tpot_s: Floats) -> Floats:
        """Return each request's utility in [0, 1]; NaN in `ttft_s` means it never answered.

        A NaN in `tpot_s` (a single output token) counts as met.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            first = np.minimum(1.0, self.slo_ttft_s / ttft_s)
            each = np.where(np.isnan(tpot_s), 1.0, np.minimum(1.0, self.slo_tpot_s / tpot_s))
        return self.graded(np.nan_to_num(first, nan=0.0) * each)

    def graded(self, timeliness: Floats) -> Floats:
        """Return the utility of requests of some timeliness: 1 in time, the less the later."""
        return np.where(timeliness < 1.0, self.late_worth * timeliness, timeliness)

    def met(self, ttft_s: Floats, tpot_s: Floats) -> NDArray[np.bool_]:
        """Tell which requests met both objectives (goodput counts these)."""
        return (ttft_s <= self.slo_ttft_s) & (np.isnan(tpot_s) | (tpot_s <= self.slo_tpot_s))

    def as_dict(self) -> dict[str, float]:
        """Return the objective as it is stored with each window."""
        return asdict(self)
