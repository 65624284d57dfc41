"""What was bred before, kept by regime: where the next cycle under similar traffic starts.

Each regime has a few islands, and each island a population in which every cell of behaviour holds
its best policy. A cycle works on one island, in turn; now and then the best of the next island come
to visit. All is bounded and lies in one JSON file, written whole or not at all.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from autopoiesis.arms.arm import arm_id
from autopoiesis.arms.language import PolicyError, verify
from autopoiesis.arms.parts import parts_of
from autopoiesis.arms.slow import verify_slow
from autopoiesis.atomic import write_atomically
from autopoiesis.synthesis.behaviour import Behaviour, Cell
from autopoiesis.synthesis.brief import Brief
from autopoiesis.synthesis.complement import by_complement

VERSION = 1
REGIMES = 12
"""Most regimes that are kept; the one used longest ago is given up first."""
ISLANDS = 3
ELITES = 12
"""Most policies of an island."""
MIGRATION = 3
"""Every so many cycles of a regime its island has visitors."""
VISITORS = 4
NEAR = 1.0
"""Largest distance of traffic to a regime's centre, in doublings of rates and lengths."""

Centre = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Elite:
    """A policy that did well in a regime."""

    id: str
    source: str
    """Its fast functions, and behind them its slow ones where plans were judged."""
    gains: tuple[float, ...]
    """Over the best incumbent, on each recent window of the cycle that raced it last."""
    behaviour: Behaviour
    raced_s: float
    """When that cycle was asked for, Unix time [s]."""

    @property
    def gain(self) -> float:
        """Return the mean of its gains."""
        return sum(self.gains) / len(self.gains)

    @property
    def cell(self) -> Cell:
        """Return the cell that it competes for."""
        return self.behaviour.cell()


@dataclass(slots=True)
class Regime:
    """The populations bred under one kind of traffic."""

    centre: Centre
    islands: list[list[Elite]] = field(default_factory=lambda: [[] for _ in range(ISLANDS)])
    cycles: int = 0
    used_s: float = 0.0
    """Unix time of the last cycle [s]."""
    gpus: str = ""
    """What plans were made of; empty where the fleet was fixed."""

    def starters(self) -> list[Elite]:
        """Return whom the next cycle starts from, best first: its island, and visitors if it is time."""
        at = self.cycles % ISLANDS
        crew = list(self.islands[at])
        if self.cycles % MIGRATION == MIGRATION - 1 or not crew:
            there = {elite.id for elite in crew}
            guests = [
                elite
                for k in range(1, ISLANDS)
                for elite in self.islands[(at + k) % ISLANDS]
                if elite.id not in there
            ]
            unique = {elite.id: elite for elite in reversed(guests)}
            crew += sorted(unique.values(), key=lambda e: -e.gain)[:VISITORS]
        return sorted(crew, key=lambda e: -e.gain)

    def take_in(self, bred: Iterable[Elite], failed: Collection[str], at_s: float) -> None:
        """Let what a cycle bred compete for the cells of its island, and turn to the next island.

        What was raced again counts with what it did now, and what `failed` is given up.
        """
        at = self.cycles % ISLANDS
        fresh = {elite.id: elite for elite in bred}
        best: dict[Cell, Elite] = {}
        before = (e for e in self.islands[at] if e.id not in fresh and e.id not in failed)
        for elite in (*fresh.values(), *before):
            rival = best.get(elite.cell)
            if rival is None or elite.gain > rival.gain:
                best[elite.cell] = elite
        self.islands[at] = _kept(list(best.values()))
        self.cycles += 1
        self.used_s = at_s


def _kept(elites: list[Elite]) -> list[Elite]:
    """Return the elites that together add most to the incumbents, where there are too many.

    Windows of different cycles are different windows.
    """
    columns = {(e.raced_s, w): 0 for e in elites for w in range(len(e.gains))}
    columns = {key: i for i, key in enumerate(columns)}
    table = np.full((len(elites), len(columns)), np.nan)
    for row, elite in zip(table, elites, strict=True):
        row[[columns[elite.raced_s, w] for w in range(len(elite.gains))]] = elite.gains
    order = by_complement(table, np.zeros(len(columns)))[:ELITES]
    return sorted((elites[i] for i in order), key=lambda e: -e.gain)


class Archive:
    """All regimes, and the file they lie in."""

    def __init__(self, regimes: Sequence[Regime] = (), remark: str = "") -> None:
        self.regimes = list(regimes)
        self.remark = remark
        """What was wrong with the file, in one sentence; empty if nothing was."""

    def nearest(self, brief: Brief) -> Regime | None:
        """Return the regime of the brief's traffic and fleet, if it was met before."""
        centre, gpus = centre_of(brief), gpus_of(brief)
        alike = [(i, r) for i, r in enumerate(self.regimes) if r.gpus == gpus]
        near = [(_distance(centre, r.centre), i) for i, r in alike]
        distance, at = min(near, default=(math.inf, -1))
        return self.regimes[at] if distance <= NEAR else None

    def enter(self, brief: Brief, bred: Iterable[Elite], failed: Collection[str] = ()) -> None:
        """Take in what a cycle bred; a regime met for the first time is founded.

        `failed` are the ids of policies that proved clearly worse than the incumbents.
        """
        regime = self.nearest(brief)
        if regime is None:
            regime = Regime(centre_of(brief), gpus=gpus_of(brief))
            self.regimes.append(regime)
        regime.take_in(bred, failed, brief.asked_s)
        self.regimes.sort(key=lambda r: -r.used_s)
        del self.regimes[REGIMES:]

    # --- the file -----------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path) -> "Archive":
        """Read an archive; a missing file is an empty one, a broken one is set aside and told."""
        try:
            return cls(_regimes_from_plain(orjson.loads(path.read_bytes())))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, PolicyError) as error:
            aside = path.with_name(f"{path.name}.broken")
            try:
                path.replace(aside)
                where = f"it lies in {aside} now"
            except OSError:
                where = "it could not be set aside"
            why = " ".join(str(error).split())[:200]
            return cls(
                remark=f"The archive {path} cannot be read ({why}) and starts anew; {where}."
            )

    def save(self, path: Path) -> None:
        """Write the archive, whole or not at all; a sentence in `remark` if it cannot be written."""
        plain = {"version": VERSION, "regimes": [asdict(regime) for regime in self.regimes]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, orjson.dumps(plain, default=list))
        except OSError as error:
            self.remark = f"The archive {path} cannot be written: {error.strerror}."


def from_archive(brief: Brief, path: Path) -> tuple[Brief, str]:
    """Give a brief what was bred in its regime before; return it with a remark on the file, if any."""
    archive = Archive.open(path)
    regime = archive.nearest(brief)
    sources = tuple(elite.source for elite in regime.starters()) if regime else ()
    return replace(brief, archived=(*sources, *brief.archived), archive=str(path)), archive.remark


def centre_of(brief: Brief) -> Centre:
    """Describe the traffic and the fleet: binary logarithms, so that a doubling is 1 away."""
    sizes = [
        (
            int(brief.counting(trace).sum()),
            max(float(trace.arrival_s[-1]) - brief.warmup_s, 1e-3),
            float(trace.input_tokens[brief.counting(trace)].mean()),
            float(trace.output_tokens[brief.counting(trace)].mean()),
        )
        for trace in brief.windows
    ]
    requests, span_s, inputs, outputs = np.array(sizes).T
    speeds = np.array([spec.speed for spec in brief.replicas])
    rate_rps = requests.sum() / span_s.sum() / speeds.sum()
    uneven = float(speeds.std() / speeds.mean())
    logs = np.log2([rate_rps, inputs.mean(), outputs.mean(), float(len(speeds))])
    return (*logs.tolist(), 4.0 * uneven)


def gpus_of(brief: Brief) -> str:
    """Describe what plans are made of: the ways to run a replica, and whether GPUs come and go."""
    ways = {f"{way.gpu} x{way.tensor_parallel}" for yard in brief.yards for way in yard.ways}
    moving = any(len(gpu.at_s) > 1 for yard in brief.yards for gpu in yard.gpus)
    return ", ".join(sorted(ways)) + (", coming and going" if moving else "")


def _distance(a: Centre, b: Centre) -> float:
    return float(np.max(np.abs(np.subtract(a, b))))


def _regimes_from_plain(plain: Any) -> list[Regime]:
    if plain["version"] != VERSION:
        raise ValueError(f"it has version {plain['version']}, this reads {VERSION}")
    regimes: list[Regime] = []
    for each in plain["regimes"][:REGIMES]:
        islands = [[_elite_from_plain(e) for e in island[:ELITES]] for island in each["islands"]]
        centre = tuple(float(x) for x in each["centre"])
        if len(islands) != ISLANDS or len(centre) != 5 or not np.isfinite(centre).all():
            raise ValueError("a regime has another shape")
        regimes.append(
            Regime(
                centre,
                islands,
                int(each["cycles"]),
                float(each["used_s"]),
                str(each.get("gpus", "")),
            )
        )
    return regimes


def _elite_from_plain(plain: Any) -> Elite:
    fast, slow = parts_of(plain["source"])
    policy = verify(fast)
    id_ = arm_id(policy.id, verify_slow(slow).id if slow else "")
    gains = tuple(float(gain) for gain in plain["gains"])
    behaviour = Behaviour(*(float(x) for x in plain["behaviour"]))
    raced_s = float(plain["raced_s"])
    if not gains or not np.isfinite((*gains, *behaviour, raced_s)).all():
        raise ValueError("a policy's figures are not all there, or not finite")
    return Elite(id_, plain["source"], gains, behaviour, raced_s)
