"""Which model to ask: the one that may gain most per unit of cost, by an upper confidence bound.

For each model the mean reward and the mean cost of an answer are kept; the index is
(mean reward + sqrt(ln(1 + t) / (2 n))) / cost, the budgeted bound of Xia et al. 2017 (c-UCB). An answer's
reward is the best gain in utility that the race measured among its policies, as a share of `FULL_GAIN`
and at most 1. Its cost is its price and a share of the mean price of all models, because an answer also
takes time: without that a model that costs next to nothing would be asked for ever, whatever it says.
Every model is asked once, the cheapest first. Old answers count less, so that a model which has
become better or worse is seen to.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.synthesis.llm.settings import LlmSettings

FULL_GAIN = 0.05
"""Gain in mean utility that counts as a full reward."""
TIME_COST = 0.5
"""What an answer's time is worth, as a share of what an answer costs in the mean."""
MEMORY = 0.98
"""What an answer counts after the next one."""
USUAL_TOKENS = (6000, 1500)
"""Prompt and answer tokens by which models are compared before they have answered."""


@dataclass(slots=True)
class Record:
    """What is known of a model; all three fade with every further answer."""

    answers: float = 0.0
    reward: float = 0.0
    """Sum over answers."""
    cost: float = 0.0
    """Sum over answers: US dollars if every model has a price, else tokens."""


class ModelChoice:
    """Remembers in a file how the models did, in this cycle and before."""

    def __init__(self, path: Path, settings: LlmSettings) -> None:
        """Read what is known; a file that cannot be read counts as none."""
        self._path = path
        self._settings = settings
        self._priced = all(model in settings.prices for model in settings.models)
        self.records = {model: Record() for model in settings.models}
        try:
            plain: dict[str, dict[str, Any]] = orjson.loads(path.read_bytes())
            known = {model: Record(**record) for model, record in plain.items()}
        except (OSError, orjson.JSONDecodeError, TypeError, AttributeError):
            known = {}
        self.records |= {m: known[m] for m in settings.models if m in known and _sane(known[m])}

    def choose(self) -> str:
        """Return the model to ask next."""
        untried = [m for m, record in self.records.items() if record.answers <= 0.0]
        if untried:
            return min(untried, key=self._expected_cost)
        total = sum(record.answers for record in self.records.values())
        costs = {m: record.cost / record.answers for m, record in self.records.items()}
        time_cost = TIME_COST * sum(costs.values()) / len(costs)

        def index(model: str) -> float:
            record = self.records[model]
            bonus = math.sqrt(math.log1p(total) / (2.0 * record.answers))
            return (record.reward / record.answers + bonus) / max(costs[model] + time_cost, 1e-12)

        return max(self.records, key=index)

    def answered(self, model: str, gain: float | None, tokens: int, usd: float) -> None:
        """Note an answer: the best gain measured among its policies (None: none got so far), its cost."""
        if model not in self.records:
            return
        for record in self.records.values():
            record.answers *= MEMORY
            record.reward *= MEMORY
            record.cost *= MEMORY
        record = self.records[model]
        record.answers += 1.0
        record.reward += min(max((gain or 0.0) / FULL_GAIN, 0.0), 1.0)
        record.cost += usd if self._priced else tokens

    def save(self) -> None:
        """Keep what is known; an unwritable file costs only the memory."""
        data = orjson.dumps({m: asdict(r) for m, r in self.records.items()})
        with suppress(OSError):
            write_atomically(self._path, data)

    def _expected_cost(self, model: str) -> float:
        return self._settings.cost_usd(model, *USUAL_TOKENS)


def _sane(record: Record) -> bool:
    values: Mapping[str, Any] = asdict(record)
    return all(isinstance(v, float | int) and math.isfinite(v) and v >= 0 for v in values.values())
