"""What is believed of the arms in the context at hand, and how a settled window changes it.

The bandit learns how far each arm is from the level of its window: the mean of all arms' estimates
or, without them, what was to be expected in that context. What a window does to all arms alike is
most of the noise, and would hide which arm is better.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from autopoiesis.orchestrator.bandit import BanditSettings, LinearThompson
from autopoiesis.orchestrator.context import FEATURES, Scaler
from autopoiesis.orchestrator.regimes import Regimes
from autopoiesis.telemetry.records import CellRow

Floats = NDArray[np.float64]

LEVEL = "level"
"""Name under which the level of all arms is learned."""
HALF_WEIGHT_REQUESTS = 20
"""Requests of a cell at which its utility is worth half an observation."""


class Beliefs:
    """The bandit over the arms' advantages, the model of their level, the context, and what was like it."""

    def __init__(self, settings: BanditSettings) -> None:
        self.bandit = LinearThompson(FEATURES, settings)
        self.regimes = Regimes()
        self.context: dict[str, float] | None = None
        self.foresight: dict[str, float] = {}
        """Advantages that the twin foresees, by its words on the newest windows."""
        self.newest_word: dict[str, float] = {}
        """The same by the long run alone, as told when the newest window ended; urgent trials go by it."""
        self.foresight_weight = 0.0
        self.foreseen_level: float | None = None
        """Mean utility of all arms that the twin saw there; None where it has not said anything."""
        self._level = LinearThompson(FEATURES, settings)
        self._level.add(LEVEL)
        self._scaler = Scaler()

    @property
    def arms(self) -> list[str]:
        """The arms of which anything is believed."""
        return self.bandit.arms

    def meet(self, arms: Collection[str]) -> None:
        """Know these arms and no others; a new one is taken for the average of those there are."""
        for arm in [a for a in self.bandit.arms if a not in arms]:
            self.bandit.remove(arm)
        known = [self.bandit.weights(a) for a in self.bandit.arms]
        mean = np.mean(known, axis=0) if known else 0.0
        for arm in arms:
            if arm not in self.bandit.arms:
                self.bandit.add(arm, mean)
        self.regimes.meet(arms)

    def enter(self, context: dict[str, float]) -> None:
        """Take the context of the window that has just ended for the present one."""
        self.context = context
        self._scaler.update(context)
        self.regimes.enter(context)

    @property
    def vector(self) -> Floats:
        """The present context, standardised: (FEATURES,), the first being 1."""
        return self._scaler.standardise(self.context)

    def means(self, vector: Floats | None = None) -> dict[str, float]:
        """Return the utility expected of each arm, in the present context or another."""
        x = self.vector if vector is None else vector
        level = float(x @ self._level.weights(LEVEL))
        return {arm: level + float(x @ self.bandit.weights(arm)) for arm in self.bandit.arms}

    def earning(self) -> dict[str, float]:
        """Return what each arm would earn now: the twin's newest word where there is one, else as `means`.

        What was learned over many windows follows a sudden change too slowly to tell what is at stake.
        """
        if self.foreseen_level is None:
            return self.means()
        return self.means() | {a: self.foreseen_level + u for a, u in self.newest_word.items()}

    def deviations(self) -> dict[str, float]:
        """Return the standard deviation of each arm's expected advantage in the present context."""
        return dict(zip(self.arms, self.bandit.predict(self.vector)[1].tolist(), strict=True))

    def probabilities(
        self,
        rng: np.random.Generator,
        eligible: Iterable[str],
        caps: Mapping[str, float] | None,
        sample: bool,
        charges: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return each eligible arm's probability per cell in the present context; some may be charged."""
        return self._outlook().probabilities(self.vector, rng, eligible, caps, sample, charges)

    def gaps(self, arms: Collection[str]) -> dict[str, float]:
        """Return how much less than the best of these arms each of them is expected to earn next."""
        outlook = self._outlook()
        mean = dict(zip(outlook.arms, outlook.predict(self.vector)[0].tolist(), strict=True))
        best = max((mean[a] for a in arms), default=0.0)
        return {a: best - mean[a] for a in arms}

    def _outlook(self) -> LinearThompson:
        """Return the bandit as if it had learned what is foreseen and what is recalled of the regime.

        What is foreseen is learned when the window settles; what is recalled counts while it is there.
        """
        bandit = LinearThompson.from_arrays(self.bandit.to_arrays(), self.bandit.settings)
        said = [(arm, gain, self.foresight_weight) for arm, gain in self.foresight.items()]
        said += [(arm, *memory) for arm, memory in self.regimes.recalled().items()]
        for arm, advantage, weight in said:
            if arm in bandit.arms:
                bandit.update(arm, self.vector, advantage, weight, imputed=True)
        return bandit

    def learn(
        self,
        rows: Sequence[CellRow],
        vector: Floats,
        context: Mapping[str, float],
        estimates: Mapping[str, float],
        lean: Mapping[str, float],
        trust: float,
        imputed_weight: float,
    ) -> float | None:
        """Learn a window decided in the context `vector`; return what was observed minus expected.

        `context` is what the window turned out to be like: it tells in which regime this is remembered.
        `estimates` are the doubly robust ones, `lean` is added to them, `trust` is the twin's and
        `imputed_weight` what its word on an arm that did not play is worth, in observations. None if
        nothing was observed.
        """
        self.bandit.tick()
        self._level.tick()
        seen = [row for row in rows if row.utility is not None and row.arm_id in self.bandit.arms]
        observed = [row.utility for row in seen if row.utility is not None]
        if not observed:
            return None
        level = float(np.mean([*estimates.values()] or observed))
        self._level.begin_at(level)
        expected = float(vector @ self._level.weights(LEVEL))
        self._level.update(LEVEL, vector, level)
        base = level if estimates else expected
        trust = trust if estimates else 0.0
        residual = total = 0.0
        seen_of: dict[str, tuple[float, float]] = {}
        for row, utility in zip(seen, observed, strict=True):
            arm = row.arm_id
            weight = row.requests / (row.requests + HALF_WEIGHT_REQUESTS)
            advantage = float(vector @ self.bandit.weights(arm))
            residual += weight * (utility - expected - advantage)
            total += weight
            word = trust * estimates.get(arm, utility) + (1.0 - trust) * utility
            gain = word - base + lean.get(arm, 0.0)
            self.bandit.update(arm, vector, gain, weight)
            mean, known = seen_of.get(arm, (0.0, 0.0))
            seen_of[arm] = (mean + (gain - mean) * weight / (known + weight), known + weight)
        for arm, estimate in estimates.items():
            if arm not in seen_of and arm in self.bandit.arms:
                gain = estimate - base + lean.get(arm, 0.0)
                self.bandit.update(arm, vector, gain, imputed_weight, imputed=True)
                seen_of[arm] = (gain, imputed_weight)
        self.regimes.learn(context, seen_of)
        return residual / total

    def temper(self, keep: float) -> None:
        """Keep only a share of what is known: the world has changed."""
        self.bandit.temper(keep)
        self._level.temper(keep)
        self.regimes.temper(keep)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return all that is believed as named arrays."""
        arrays: dict[str, NDArray[Any]] = {}
        parts = {
            "bandit": self.bandit,
            "level": self._level,
            "scaler": self._scaler,
            "regimes": self.regimes,
        }
        for part, owner in parts.items():
            arrays |= {f"{part}/{name}": array for name, array in owner.to_arrays().items()}
        present = [
            self.context,
            self.foresight,
            self.foresight_weight,
            self.foreseen_level,
            self.newest_word,
        ]
        arrays["present"] = np.frombuffer(orjson.dumps(present), np.uint8).copy()
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], settings: BanditSettings) -> "Beliefs":
        """Read what `to_arrays` gave; arrays of other owners are passed over.

        Raises:
            ValueError: the arrays are of another version.
            KeyError: some are missing.
        """
        beliefs = cls(settings)
        beliefs.bandit = LinearThompson.from_arrays(_part(arrays, "bandit/"), settings)
        beliefs._level = LinearThompson.from_arrays(_part(arrays, "level/"), settings)
        beliefs._scaler = Scaler.from_arrays(_part(arrays, "scaler/"))
        if regimes := _part(arrays, "regimes/"):  # states of before there were any have none
            beliefs.regimes = Regimes.from_arrays(regimes)
        present = orjson.loads(np.asarray(arrays["present"], np.uint8).tobytes())
        beliefs.context, beliefs.foresight, beliefs.foresight_weight, *rest = present
        level, word = [*rest, None, None][:2]  # older states have none
        beliefs.foreseen_level, beliefs.newest_word = level, word or {}
        return beliefs


def _part(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
