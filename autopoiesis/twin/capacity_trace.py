"""Capacity traces: how many machines there were, as spot markets take and give them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from autopoiesis.twin.capacity import Action, CapacityChange
from autopoiesis.twin.trace_columns import TraceError, checked, in_order

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TIMES = ("t_s", "time_s")
COUNTS = ("available_gpus", "nodes")


@dataclass(frozen=True, slots=True)
class CapacitySummary:
    """A capacity trace in a few figures."""

    name: str
    changes: int
    duration_s: float
    nodes_min: int
    nodes_mean: float
    """Over time."""
    nodes_max: int
    lost: int
    regained: int
    largest_loss: int


@dataclass(frozen=True, slots=True, eq=False)
class CapacityTrace:
    """How many machines there were: `nodes[i]` from `at_s[i]` on, the last to the end of time."""

    at_s: Floats
    """(n,): from 0, never falling."""
    nodes: Ints
    """(n,): at least 0, and once at least 1."""
    name: str

    def __post_init__(self) -> None:
        if len(self.at_s) != len(self.nodes) or not len(self.at_s):
            raise ValueError(f"capacity {self.name}: needs as many times as counts, at least one")
        if self.at_s[0] != 0.0 or np.any(np.diff(self.at_s) < 0):
            raise ValueError(f"capacity {self.name}: `at_s` must begin at 0 and never fall")
        if self.nodes.min() < 0 or self.nodes.max() < 1:
            raise ValueError(f"capacity {self.name}: `nodes` must be at least 0, and once 1")

    @property
    def duration_s(self) -> float:
        """Time of the last row [s]."""
        return float(self.at_s[-1])

    def speed(self, factor: float) -> "CapacityTrace":
        """Return the same changes `factor` times as fast."""
        if not factor > 0:
            raise TraceError(f"a trace's speed must be above 0, not {factor}")
        return replace(self, at_s=self.at_s / factor)

    def replicas(self, fleet: int, at_least: int = 1) -> Ints:
        """Return how many of a fleet's replicas there are from each time on, (n,).

        The whole fleet stands for the most machines that the trace has.
        """
        if not 0 <= at_least <= fleet:
            raise ValueError(f"at_least must be 0 to the fleet's {fleet} replicas, got {at_least}")
        scaled = np.floor(self.nodes * fleet / self.nodes.max() + 0.5).astype(np.int64)
        return np.clip(scaled, at_least, fleet)

    def summary(self) -> CapacitySummary:
        """Describe the trace."""
        steps = np.diff(self.nodes)
        lasted_s = np.diff(self.at_s)
        mean = float(self.nodes[:-1] @ lasted_s / lasted_s.sum()) if lasted_s.sum() > 0 else None
        return CapacitySummary(
            name=self.name,
            changes=int(np.count_nonzero(steps)),
            duration_s=self.duration_s,
            nodes_min=int(self.nodes.min()),
            nodes_mean=float(self.nodes[0]) if mean is None else mean,
            nodes_max=int(self.nodes.max()),
            lost=int(-steps[steps < 0].sum()),
            regained=int(steps[steps > 0].sum()),
            largest_loss=int(-steps.min(initial=0)),
        )


# --- a fleet under it -------------------------------------------------------------------------


class StartUp(NamedTuple):
    """How long a replica takes from its start to its first request: log-normal, or fixed.

    The default has its 5th and 95th percentile at 31 and 116 s, after the public figures for a
    full start of vLLM (30 to over 100 s). It is not a measurement of yours.
    """

    median_s: float = 60.0
    spread: float = 0.4
    """Standard deviation of the logarithm; 0 is always the median."""

    def draw(self, rng: np.random.Generator) -> float:
        """Return one duration [s]."""
        return self.median_s * float(np.exp(self.spread * rng.standard_normal()))


START_UP = StartUp()


class FleetCourse(NamedTuple):
    """What becomes of a fleet: which replicas there are at first, and what changes."""

    present: tuple[int, ...]
    """Indexes of the replicas that are ready at 0."""
    changes: tuple[CapacityChange, ...]
    """In order of time."""


def fleet_course(
    trace: CapacityTrace,
    fleet: int,
    seed: int,
    *,
    at_least: int = 1,
    notice_s: float = 0.0,
    start_up: StartUp = START_UP,
) -> FleetCourse:
    """Return what a capacity trace does to a fleet of so many replicas.

    Which replicas go, and which of the absent ones come back, is chosen at random. With a notice a
    replica drains for `notice_s` before it is lost, or since its start if that is later. A replica
    that comes is started when the machine is there, and serves after its start-up.

    Raises:
        ValueError: an argument that cannot be.
    """
    if not (0.0 <= notice_s < np.inf and 0.0 <= start_up.median_s < np.inf):
        raise ValueError(
            f"notice and start-up must be at least 0 s, got {notice_s} and {start_up.median_s}"
        )
    if fleet < 1 or not 0.0 <= start_up.spread < np.inf:
        raise ValueError("a fleet needs at least 1 replica, and a start-up a spread of at least 0")
    rng = np.random.default_rng(seed)
    wanted = trace.replicas(fleet, at_least).tolist()
    first = rng.choice(fleet, wanted[0], replace=False).tolist()
    since = dict.fromkeys(first, 0.0)
    """When each replica that is there came."""
    changes: list[CapacityChange] = []
    for at_s, count in zip(trace.at_s.tolist(), wanted, strict=True):
        if count < len(since):
            for r in rng.choice(sorted(since), len(since) - count, replace=False).tolist():
                if notice_s > 0.0:
                    told_s = max(at_s - notice_s, since[r])
                    changes.append(CapacityChange(told_s, r, Action.DRAIN))
                changes.append(CapacityChange(at_s, r, Action.LOSE))
                del since[r]
        elif count > len(since):
            absent = sorted(set(range(fleet)) - since.keys())
            for r in rng.choice(absent, count - len(since), replace=False).tolist():
                changes.append(CapacityChange(at_s, r, Action.START, start_up.draw(rng)))
                since[r] = at_s
    changes.sort(key=lambda change: change.at_s)
    return FleetCourse(tuple(sorted(first)), tuple(changes))


# --- files ------------------------------------------------------------------------------------


def is_capacity(path: Path) -> bool:
    """Tell whether a file has the columns of a capacity trace; False for what cannot be read."""
    try:
        return _named(_header(path)) is not None
    except TraceError:
        return False


def read_capacity(path: str | PathLike[str]) -> CapacityTrace:
    """Read a capacity trace: Parquet or CSV with `t_s` and `available_gpus` (or `nodes`).

    Each row holds from its time on. Times count from the first row.

    Raises:
        TraceError: one sentence with the file, the row and the field.
    """
    file = Path(path)
    named = _named(_header(file))
    if named is None:
        raise TraceError(
            f"{file}: is no capacity trace; give Parquet or CSV with the columns "
            f"{TIMES[0]} and {' or '.join(COUNTS)}"
        )
    at, count = named
    places, times, counts = (_parquet if _is_parquet(file) else _csv)(file, at, count)
    if not len(times):
        raise TraceError(f"{file}: has no rows; a capacity trace has at least one")
    at_s = in_order(file, places.__getitem__, at, checked(file, places.__getitem__, at, times, 0))
    nodes = checked(file, places.__getitem__, count, counts, 0, whole=True).astype(np.int64)
    if nodes.max() < 1:
        raise TraceError(f"{file}: `{count}` is 0 in every row; there must once be a machine")
    return CapacityTrace(at_s - at_s[0], nodes, file.stem)


def _named(header: Sequence[str]) -> tuple[str, str] | None:
    at = next((name for name in TIMES if name in header), None)
    count = next((name for name in COUNTS if name in header), None)
    return None if at is None or count is None else (at, count)


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _header(path: Path) -> Sequence[str]:
    try:
        if _is_parquet(path):
            return pq.read_schema(path).names
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [name.strip() for name in next(csv.reader(file), [])]
    except FileNotFoundError:
        raise TraceError(f"{path}: there is no such file; give the path of a trace") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


_Rows = tuple[Sequence[str], Sequence[Any], Sequence[Any]]
"""What rows are called, their times, and their counts."""


def _parquet(path: Path, at: str, count: str) -> _Rows:
    try:
        table = pq.read_table(path, columns=[at, count])
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    places = [f"row {i + 1}" for i in range(table.num_rows)]
    return places, table.column(at).to_pylist(), table.column(count).to_pylist()


def _csv(path: Path, at: str, count: str) -> _Rows:
    places: list[str] = []
    times: list[str | None] = []
    counts: list[str | None] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            for row in reader:
                places.append(f"line {reader.line_num}")
                times.append(row[at])
                counts.append(row[count])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: broken CSV ({error})") from None
    return places, times, counts
