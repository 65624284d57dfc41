"""The seam between who writes prompts and who speaks to a model: questions, replies, faults."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol, Self

from autopoiesis.synthesis.letter import Message


class Fault(StrEnum):
    """Why a question has no answer."""

    BUDGET = "budget"
    """A budget is used up; nothing was sent."""
    KEY = "key"
    """There is no key, or it was refused."""
    REFUSED = "refused"
    """The endpoint does not take the question."""
    TOO_LONG = "too_long"
    """The prompt does not fit into the model's context."""
    TIME = "time"
    """No answer in time."""
    BUSY = "busy"
    """The endpoint is overloaded or limits the rate."""
    BROKEN = "broken"
    """The endpoint or the way to it fails."""
    NONSENSE = "nonsense"
    """What came is no answer of the API."""
    TRAFFIC = "traffic"
    """Called off: the fleet has clients to serve."""
    LATE = "late"
    """The cycle has no time left for an answer."""
    GONE = "gone"
    """Nobody is there to speak for us."""


FINAL = frozenset({Fault.BUDGET, Fault.KEY, Fault.REFUSED, Fault.LATE, Fault.GONE})
"""Faults after which asking again in the same cycle is of no use."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to a model."""

    messages: tuple[Message, ...]
    choices: int = 1
    """Answers wanted."""
    grammar: bool = False
    """Have the engine answer in the policy language's grammar, if it can."""
    model: str = ""
    """Which model; empty: whoever speaks for us chooses."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**asdict(self), "messages": [list(message) for message in self.messages]}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """Read what `as_dict` gave; KeyError, TypeError or ValueError if it is something else."""
        messages = tuple(Message(str(role), str(text)) for role, text in plain["messages"])
        return cls(messages, int(plain["choices"]), bool(plain["grammar"]), str(plain["model"]))


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a question."""

    texts: tuple[str, ...] = ()
    cut: tuple[bool, ...] = ()
    """Which texts end because the answer became too long."""
    model: str = ""
    grammar: bool = False
    """Whether the engine was held to the grammar."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    counted: bool = True
    """Whether the endpoint counted the tokens; else they are an upper bound."""
    cost_usd: float = 0.0
    """Of all attempts."""
    tokens: int = 0
    """Of all attempts, prompts and answers."""
    fault: Fault | None = None
    reason: str = ""
    """A sentence, where there is a fault."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """Read what `as_dict` gave; KeyError, TypeError or ValueError if it is something else."""
        fault = Fault(plain["fault"]) if plain["fault"] else None
        texts, cut = tuple(map(str, plain["texts"])), tuple(map(bool, plain["cut"]))
        others = {k: v for k, v in plain.items() if k not in {"texts", "cut", "fault"}}
        return cls(texts=texts, cut=cut, fault=fault, **others)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How well an answer did in the race."""

    model: str
    gain: float | None
    """The best gain in utility among its policies; None if none of them was raced."""
    tokens: int
    cost_usd: float


class Correspondent(Protocol):
    """Whoever speaks to the models for a proposer. It never raises."""

    def ask(self, ask: Ask, within_s: float) -> Reply:
        """Put a question and wait for what comes of it, at most `within_s`."""
        ...

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        """Take note of how well answers did, for the choice of models."""
        ...
