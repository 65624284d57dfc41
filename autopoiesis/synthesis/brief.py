"""What a synthesis cycle is asked: why, for which fleet and traffic, against whom, within what.

A brief is a value that travels to the worker's process as bytes.
"""

import base64
import time
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from autopoiesis.arms.arm import Origin
from autopoiesis.arms.objective import Objective
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.trace import Trace
from autopoiesis.twin.yard import Yard, profile_from_plain, yard_from_plain, yard_to_plain


class BriefError(ValueError):
    """The brief cannot be worked on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Incumbent:
    """An arm that a candidate has to beat."""

    arm_id: str
    source: str
    origin: Origin
    name: str
    slow: str = ""
    """Its slow functions, in a cycle that judges them too."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What became of a policy that did not make it."""

    gate: str
    """The gate that refused it."""
    reason: str
    thought: str = ""
    """What its author had in mind."""


@dataclass(frozen=True, slots=True, eq=False)
class Brief:
    """One request for new policies."""

    trigger: str
    """Why it is asked, in one line."""
    objective: Objective
    replicas: tuple[ReplicaSpec, ...]
    """The fleet as the twin models it."""
    windows: tuple[Trace, ...]
    """Recent traffic, oldest first: candidates are screened and raced on it."""
    holdout: tuple[Trace, ...]
    """Traffic that proposers never see and that only finalists are judged on."""
    incumbents: tuple[Incumbent, ...]
    seed: int
    budget_s: float
    """Longest time the cycle may take [s]."""
    max_candidates: int = 2000
    min_gain: float = 0.002
    """Smallest gain in mean utility worth a new arm."""
    warmup_s: float = 0.0
    """Head of each window [s] that fills queues and caches and does not count."""
    known: tuple[str, ...] = ()
    """Ids of policies that need not be tried again: retired, quarantined or rejected before."""
    archived: tuple[str, ...] = ()
    """Policies to race first, such as those bred under such traffic before, the best first."""
    archive: str = ""
    """The file that takes in what is bred; empty: nothing is kept."""
    synthesizer: Origin = Origin.GENETIC
    """Which proposer: genetic, files, openai or fleet."""
    folder: str = ""
    """Where the `files` proposer writes briefs and finds policies."""
    policies_asked: int = 4
    """Policies that language models are asked for at a time."""
    window: int = -1
    """The window in which it was asked."""
    since_window: int | None = None
    """The first window of what it answers; None for one by hand."""
    asked_s: float = field(default_factory=time.time)
    """When it was asked, Unix time [s]."""
    left_s: float = 0.0
    """What is left of the budget [s] when a proposer is asked."""
    lessons: tuple[Lesson, ...] = ()
    """Policies refused before, in this cycle and in earlier ones, the most telling first."""
    yards: tuple[Yard, ...] = ()
    """What plans are made of, for each window and then each hold-out window: slow functions evolve too."""
    allow_unsandboxed: bool = False
    """Run slow functions also where the machine cannot shut them off."""
    diagnosis: str = ""
    """What the twin shows of the best policies so far, in words; filled in as the cycle goes."""

    def __post_init__(self) -> None:
        if not self.incumbents:
            raise BriefError("A brief needs at least one incumbent to beat; pass the serving arms.")
        if not self.replicas:
            raise BriefError("A brief needs at least one replica; pass the fleet.")
        if len(self.windows) < 2:
            raise BriefError(
                "A brief needs at least 2 windows; wait for more traffic or cut it shorter."
            )
        for trace in (*self.windows, *self.holdout):
            if not len(trace) or not self.counting(trace).any():
                raise BriefError(
                    f"Window {trace.name!r} has no request after its warm-up of {self.warmup_s:g} s; "
                    "leave it out or shorten the warm-up."
                )
        if not (self.budget_s > 0 and self.max_candidates > 0):
            raise BriefError("A brief needs a budget above 0 s and room for at least 1 candidate.")
        self._check_yards()

    def _check_yards(self) -> None:
        if not self.yards:
            return
        if len(self.yards) != len(self.windows) + len(self.holdout):
            raise BriefError("A brief with yards needs one for each window; give as many.")
        lacking = [incumbent.name for incumbent in self.incumbents if not incumbent.slow]
        if lacking:
            raise BriefError(
                f"Where plans are judged every incumbent makes some, but {lacking[0]} has no slow functions."
            )

    def counting(self, trace: Trace) -> NDArray[np.bool_]:
        """Tell which requests of a window count: those that arrive after its warm-up."""
        return trace.arrival_s >= self.warmup_s

    def for_proposers(self, **known: Any) -> Self:
        """Return the brief without what proposers must not see, the hold-out windows.

        `known` are fields with what the cycle has found out: the time left, lessons, a diagnosis.
        """
        return replace(self, holdout=(), yards=self.yards[: len(self.windows)], **known)

    def to_bytes(self) -> bytes:
        """Serialise to JSON; arrays as base64 of their little-endian bytes."""
        plain: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        plain["objective"] = asdict(self.objective)
        plain["replicas"] = [asdict(spec) for spec in self.replicas]
        plain["windows"] = [_trace_to_plain(trace) for trace in self.windows]
        plain["holdout"] = [_trace_to_plain(trace) for trace in self.holdout]
        plain["incumbents"] = [asdict(incumbent) for incumbent in self.incumbents]
        plain["lessons"] = [asdict(lesson) for lesson in self.lessons]
        plain["yards"] = [yard_to_plain(yard) for yard in self.yards]
        return orjson.dumps(plain)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote; BriefError if it is something else."""
        try:
            plain = orjson.loads(data)
            plain["objective"] = Objective(**plain["objective"])
            plain["replicas"] = tuple(_replica_from_plain(spec) for spec in plain["replicas"])
            plain["windows"] = tuple(_trace_from_plain(trace) for trace in plain["windows"])
            plain["holdout"] = tuple(_trace_from_plain(trace) for trace in plain["holdout"])
            plain["incumbents"] = tuple(
                Incumbent(
                    i["arm_id"], i["source"], Origin(i["origin"]), i["name"], i.get("slow", "")
                )
                for i in plain["incumbents"]
            )
            plain["known"] = tuple(plain["known"])
            plain["archived"] = tuple(plain["archived"])
            plain["lessons"] = tuple(Lesson(**lesson) for lesson in plain["lessons"])
            plain["synthesizer"] = Origin(plain["synthesizer"])
            plain["yards"] = tuple(yard_from_plain(yard) for yard in plain.get("yards", ()))
            return cls(**plain)
        except BriefError:
            raise
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BriefError(
                f"This is not a brief ({type(error).__name__}: {error}); pass what to_bytes wrote."
            ) from None


def _replica_from_plain(plain: dict[str, Any]) -> ReplicaSpec:
    plain["profile"] = profile_from_plain(plain["profile"])
    return ReplicaSpec(**plain)


def _trace_to_plain(trace: Trace) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for each in fields(trace):
        value = getattr(trace, each.name)
        if isinstance(value, np.ndarray):
            little = value.astype(value.dtype.newbyteorder("<"))
            value = {
                "dtype": little.dtype.str,
                "base64": base64.b64encode(little.tobytes()).decode(),
            }
        plain[each.name] = value
    return plain


def _trace_from_plain(plain: dict[str, Any]) -> Trace:
    values: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            array = np.frombuffer(base64.b64decode(value["base64"]), value["dtype"])
            value = array.astype(array.dtype.newbyteorder("="))  # noqa: PLW2901 - the decoded form
        values[name] = value
    return Trace(**values)


def cut(
    trace: Trace, window_s: float, warmup_s: float = 0.0, holdout_every: int = 3, at_most: int = 12
) -> tuple[tuple[Trace, ...], tuple[Trace, ...]]:
    """Cut a trace into windows: those to race on, and every n-th for the hold-out (never the newest).

    Each begins with the `warmup_s` before it, which are not to count. Windows without requests that
    count are left out; of more than `at_most` the newest are taken.
    """
    starts = np.arange(0.0, max(trace.duration_s - warmup_s, 1e-9), window_s)
    pieces = [trace.slice(start, start + warmup_s + window_s) for start in starts]
    pieces = [piece for piece in pieces if len(piece) and piece.arrival_s[-1] >= warmup_s][
        -at_most:
    ]
    ages = range(len(pieces) - 1, -1, -1)
    named = [
        (age, replace(p, name=f"{trace.name}[-{age}]")) for age, p in zip(ages, pieces, strict=True)
    ]
    return (
        tuple(piece for age, piece in named if age % holdout_every != holdout_every - 1),
        tuple(piece for age, piece in named if age % holdout_every == holdout_every - 1),
    )
