"""Money and tokens: reserved before they are spent, in a file that outlives the process.

A question reserves the most that it can cost. What is settled takes the reservation's place; a
reservation that is never settled, because its process was killed, stays spent for its day. Several
processes may use one ledger.
"""

import fcntl
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.synthesis.llm.settings import LlmSettings


class BudgetError(RuntimeError):
    """Nothing may be spent; the message says which budget is used up, and what to do."""


@dataclass(frozen=True, slots=True)
class Spent:
    """An amount of tokens and money."""

    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.tokens + other.tokens, self.usd + other.usd)


@dataclass(slots=True)
class _Day:
    """What the file holds: one day's sums, and what is reserved."""

    day: str
    """UTC date."""
    settled: Spent = Spent()
    reserved: dict[str, Spent] = field(default_factory=dict[str, Spent])

    @property
    def total(self) -> Spent:
        return sum(self.reserved.values(), self.settled)


class Ledger:
    """The books of one cycle, in those of the day."""

    def __init__(
        self, path: Path, limits: LlmSettings, clock: Callable[[], float] = time.time
    ) -> None:
        """Keep the day's books in `path`; its folder is made if it is missing."""
        self._path = path
        self._limits = limits
        self._clock = clock
        self._cycle = Spent()

    @property
    def cycle(self) -> Spent:
        """What this cycle has settled or reserved."""
        return self._cycle

    def reserve(self, most: Spent) -> str:
        """Set aside the most that a question can cost; return the name of the reservation.

        Raises BudgetError if that would go beyond a budget, or if the books cannot be kept.
        """
        limits = self._limits
        cycle = self._cycle + most
        _within(cycle.tokens, limits.budget_tokens, "tokens", "budget_tokens", "this cycle")
        _within(cycle.usd, limits.budget_usd, "USD", "budget_usd", "this cycle")
        name = uuid.uuid4().hex
        with self._day() as day:
            total = day.total + most
            _within(
                total.tokens,
                limits.budget_tokens_per_day,
                "tokens",
                "budget_tokens_per_day",
                "today",
            )
            _within(total.usd, limits.budget_usd_per_day, "USD", "budget_usd_per_day", "today")
            day.reserved[name] = most
        self._cycle = cycle
        return name

    def settle(self, name: str, most: Spent, spent: Spent) -> None:
        """Put what was spent in the place of a reservation; BudgetError if that cannot be written."""
        with self._day() as day:
            day.reserved.pop(name, None)
            day.settled += spent
        self._cycle += Spent(spent.tokens - most.tokens, spent.usd - most.usd)

    @contextmanager
    def _day(self) -> Generator[_Day]:
        """Lend today's books; what was changed is safe on disk when this ends."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                day = self._read()
                yield day
                self._write(day)
        except OSError as error:
            raise BudgetError(
                f"The ledger {self._path} cannot be kept ({error.strerror}), so nothing is spent; make it writable."
            ) from None

    def _read(self) -> _Day:
        today = datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
        try:
            plain: dict[str, Any] = orjson.loads(self._path.read_bytes())
            kept = _Day(
                str(plain["day"]),
                Spent(**plain["settled"]),
                {str(name): Spent(**amount) for name, amount in plain["reserved"].items()},
            )
        except FileNotFoundError:
            return _Day(today)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise BudgetError(
                f"The ledger {self._path} is damaged, so nothing is spent; remove it to start with an empty one."
            ) from None
        return kept if kept.day >= today else _Day(today)

    def _write(self, day: _Day) -> None:
        plain = {"day": day.day, "settled": asdict(day.settled)}
        plain["reserved"] = {name: asdict(amount) for name, amount in day.reserved.items()}
        write_atomically(self._path, orjson.dumps(plain), durable=True)


def _within(amount: float, limit: float, unit: str, setting: str, when: str) -> None:
    if amount > limit:
        raise BudgetError(
            f"The budget is used up: {when} the next question could bring it to {amount:.6g} {unit}, and "
            f"llm.{setting} allows {limit:g}."
        )
