"""The seam at which authors of policies plug in: a person, a search, a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autopoiesis.arms.arm import Origin
from autopoiesis.synthesis.brief import Brief
from autopoiesis.telemetry.records import CandidateRow


def joined(fast: str, slow: str) -> str:
    """Return fast and slow functions as one text, which `arms.parts` takes apart again."""
    return f"{fast}\n\n{slow}" if slow else fast


@dataclass(frozen=True, slots=True)
class Parent:
    """A policy to start from."""

    id: str
    source: str
    name: str
    gain: float | None
    """Mean gain in utility over the best incumbent on the recent windows; None if not raced."""
    by_window: tuple[float | None, ...] = ()
    """Utility on each recent window, oldest first; None where it was not raced."""
    slow: str = ""
    """Its slow functions, in a cycle that judges them too."""

    @property
    def text(self) -> str:
        """All of its source."""
        return joined(self.source, self.slow)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One suggested policy, unchecked."""

    source: str | bytes
    """Its functions; slow ones stand beside the fast ones."""
    origin: Origin
    parents: tuple[str, ...] = ()
    """Ids of the policies it was made from."""
    thought: str = ""
    """What its author says of it: one line."""
    tokens: int = 0
    cost_usd: float = 0.0
    model: str = ""
    """The language model that wrote it."""
    prompt: str = ""
    """What the model was asked."""
    answer: str = ""
    """What it answered, repairs included."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a proposer has used in a cycle, and what went wrong."""

    tokens: int = 0
    cost_usd: float = 0.0
    remarks: tuple[str, ...] = ()
    """A sentence for each thing that kept it from proposing."""


class Proposer(Protocol):
    """An author of policies."""

    @property
    def origin(self) -> Origin:
        """Under which name its policies are kept."""
        ...

    @property
    def account(self) -> Account:
        """What it has used so far, proposals that came to nothing included."""
        ...

    def propose(
        self, brief: Brief, parents: Sequence[Parent], n: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Return at most n proposals; none means that it has no more to say in this cycle.

        `brief` comes without its hold-out windows. `parents` are ordered best first. It never raises for
        what goes wrong with an author: its account says.
        """
        ...

    def learn(self, verdicts: Sequence[tuple[Proposal, CandidateRow]]) -> None:
        """Take note of how a finished cycle decided; proposals it had no time for are left out."""
        ...
