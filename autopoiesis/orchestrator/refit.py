"""The twin corrects itself: a profile is fitted again to what the replicas do.

`Refits` decides when, keeps what was found, and starts `python -m autopoiesis.orchestrator.refit` for
each class of replicas (those with the same profile), one after the other, at the lowest priority. The
fit is made on every other stretch of the last windows and is taken only if it is nearer to the
stretches between than what is in use. It is on probation then: what the twin is for is telling utility,
and if it tells that worse with the new profile than before, the former one comes back.
"""

import argparse
import asyncio
import logging
import os
import re
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson

from autopoiesis.atomic import write_atomically
from autopoiesis.orchestrator.child import die_with_parent
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.twin_commands import Engine, starting_profile, stored_requests
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.limits import with_limits
from autopoiesis.telemetry.records import TwinErrorRow
from autopoiesis.telemetry.store import TelemetryError
from autopoiesis.twin.calibration import CalibrationError, calibrate
from autopoiesis.twin.latency import Profile, profile
from autopoiesis.twin.profile_files import ProfileError, profile_from
from autopoiesis.twin.recorded import recorded
from autopoiesis.twin.simulation import ReplicaSpec
from autopoiesis.twin.split import in_turns
from autopoiesis.twin.validation import validate

log = logging.getLogger(__name__)

LATENCIES = ("ttft_mean_s", "tpot_mean_s")
OFF = 0.15
"""Relative error of a latency above which the twin is off."""
WINDOWS_OFF = 6
"""Windows of which the median counts, so that one odd window does not."""
PAUSE_S = 300.0
"""Shortest time from the end of a fit to the next one."""
LONGEST_S = 180.0
"""A fit that takes longer is stopped; on a new machine it compiles first."""
WINDOWS = 60
"""Windows of telemetry that a fit looks at."""
TURNS = 10
"""Stretches of time that are fitted to and compared on in turns."""
BETTER = 0.9
"""A fit is taken when its error is at most this much of the error of what is in use."""
FEWEST = 200
"""Requests of the last `WINDOWS` that must have been answered; some dozens fit many profiles."""
PROBATION = 3
"""Windows after which a fit can be taken back, of which the median counts."""
WORSE = 0.1
"""Utility by which the twin may be further off with a fit than without."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a fit of one class of replicas found."""

    profile: Profile
    speeds: dict[str, float]
    """Replica → its speed relative to the profile."""
    requests: int
    error_before: float
    """Median relative error of a request's latencies with what was in use, on requests not fitted to."""
    error: float
    """The same with what was found."""

    @property
    def better(self) -> bool:
        """Tell whether it is to be used."""
        return self.error <= BETTER * self.error_before

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Fit":
        """Read what `to_bytes` gave; a `ProfileError` if it is anything else."""
        try:
            told: dict[str, Any] = orjson.loads(data)
            return cls(profile=profile_from(told.pop("profile")), **told)
        except (ValueError, TypeError, KeyError) as error:
            raise ProfileError(str(error)) from None


@dataclass(frozen=True, slots=True)
class _Probation:
    """New fits, until it is known how well the twin tells utility with them."""

    off: float
    """How far off it was before."""
    former: dict[str, Fit | None]
    """Class → what was used before its new fit."""


class Refits:
    """When to fit again, and what was found so far."""

    def __init__(
        self, folder: Path, members: Sequence[Member], say: Callable[[str, str], None]
    ) -> None:
        """Take up earlier fits in `folder`; `say(subject, message)` tells of new ones."""
        self._folder = folder
        self._say = say
        self._classes: dict[str, list[Member]] = {}
        self._fits: dict[str, Fit] = {}
        self.follow(members)
        self._off: deque[float] = deque(maxlen=WINDOWS_OFF)
        self._utility_off: deque[float] = deque(maxlen=WINDOWS_OFF)
        self._answered: deque[int] = deque(maxlen=WINDOWS)
        self._probation: _Probation | None = None
        self._not_before_s = float("-inf")
        self.running = False

    def follow(self, members: Sequence[Member]) -> None:
        """Take over who is in the fleet, and earlier fits of what was not in it before."""
        known = self._classes
        self._classes = {m.profile: [n for n in members if n.profile == m.profile] for m in members}
        new = {name: f for name in self._classes.keys() - known if (f := self._earlier(name))}
        self._fits |= new

    def spec(self, member: Member) -> ReplicaSpec:
        """Return the replica as the twin simulates it, with the limits that it has now."""
        spec = self._fitted(member)
        return replace(spec, profile=with_limits(spec.profile, member.limits))

    def _fitted(self, member: Member) -> ReplicaSpec:
        fit = self._fits.get(member.profile)
        if fit is None:
            return ReplicaSpec(member.name, profile(member.profile), member.speed)
        fitted = [m for m in self._classes[member.profile] if fit.speeds.get(m.name) == 1.0]
        unseen = member.speed / fitted[0].speed if fitted else 1.0
        speed = fit.speeds.get(member.name, unseen)
        return ReplicaSpec(member.name, fit.profile, speed, declared_speed=member.speed)

    def wanted(
        self,
        at_s: float,
        errors: Sequence[TwinErrorRow],
        drifted: Sequence[str],
        answered: int,
    ) -> str | None:
        """Take a window into account, with how many of its requests were answered; return why to fit now, or None."""
        off = [
            abs(e.twin / e.observed - 1.0) for e in errors if e.metric in LATENCIES and e.observed
        ]
        if off:
            self._off.append(max(off))
        self._utility_off.extend(abs(e.twin - e.observed) for e in errors if e.metric == "utility")
        self._answered.append(answered)
        self._probe(at_s)
        if self.running or at_s < self._not_before_s or sum(self._answered) < FEWEST:
            return None
        if "twin" in drifted:
            return "its error has drifted"
        if len(self._off) == WINDOWS_OFF and median(self._off) > OFF:
            return f"its latencies are {median(self._off):.0%} off"
        return None

    def _probe(self, at_s: float) -> None:
        """Take fits back with which the twin tells utility worse; a fit that stands is on probation no longer."""
        probation = self._probation
        if probation is None or len(self._utility_off) < PROBATION:
            return
        now_off = median(self._utility_off)
        if now_off > probation.off + WORSE:
            for name, former in probation.former.items():
                self._take_back(name, former)
                told = f"its utilities are {now_off:.2f} off, and were {probation.off:.2f} before"
                self._say(name, f"taken back: {told}")
            self._off.clear()
            self._not_before_s = at_s + PAUSE_S
            self._probation = None
        elif len(self._utility_off) == WINDOWS_OFF:
            self._probation = None

    def _take_back(self, name: str, former: Fit | None) -> None:
        """Use again what was used before a fit; the fit's file stays for people to look at."""
        file = self._file(name)
        with suppress(OSError):
            file.replace(file.with_suffix(".taken-back.json"))
        if former is None:
            self._fits.pop(name, None)
        else:
            self._use(name, former)

    def _use(self, name: str, fit: Fit) -> None:
        with suppress(OSError):  # then it is used until the next start
            self._folder.mkdir(exist_ok=True)
            write_atomically(self._file(name), fit.to_bytes())
        self._fits[name] = fit

    async def run(
        self, data_dir: Path, now_s: Callable[[], float], whole_until_s: float = float("inf")
    ) -> None:
        """Fit every class of replicas on the last windows; never raises for what goes wrong.

        Of requests that ended after `whole_until_s` [Unix seconds] the load is not known as a whole.
        """
        self.running = True
        former: dict[str, Fit | None] = {}
        try:
            for name, members in self._classes.items():
                in_use = self._fits.get(name)
                if await self._fit(name, members, data_dir, whole_until_s):
                    former[name] = in_use
        finally:
            self.running = False
            if former and self._utility_off:
                self._probation = _Probation(median(self._utility_off), former)
                self._utility_off.clear()
            self._off.clear()
            self._not_before_s = now_s() + PAUSE_S

    async def _fit(
        self, name: str, members: Sequence[Member], data_dir: Path, whole_until_s: float
    ) -> bool:
        """Fit one class; tell whether what was found is used now."""
        argv = ["--data-dir", str(data_dir), "--profile", name]
        argv += ["--whole-until", repr(whole_until_s)]
        argv += [part for m in members for part in ("--replica", m.name, repr(m.speed))]
        if members[0].kv_tokens:
            argv += ["--kv-tokens", str(members[0].kv_tokens)]
        if name in self._fits:
            argv += ["--in-use", str(self._file(name))]
        try:
            fit = Fit.from_bytes(await _in_process(argv))
        except (OSError, TimeoutError, CalibrationError, ProfileError) as error:
            self._say(name, f"not fitted: {error or 'it took too long'}")
            return False
        told = (
            f"error {fit.error_before:.0%}, {fit.error:.0%} when fitted to {fit.requests} requests"
        )
        if not fit.better:
            self._say(name, f"kept as it is: {told}")
            return False
        self._use(name, fit)
        self._say(name, f"fitted anew: {told}")
        return True

    def _earlier(self, name: str) -> Fit | None:
        try:
            return Fit.from_bytes(self._file(name).read_bytes())
        except OSError:
            return None
        except ProfileError as error:
            log.warning("%s cannot be used and is left: %s", self._file(name), error)
            return None

    def _file(self, name: str) -> Path:
        return self._folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-.')}.fit.json"


async def _in_process(argv: Sequence[str]) -> bytes:
    command = [sys.executable, "-m", "autopoiesis.orchestrator.refit", *argv]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), LONGEST_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        words = err.decode(errors="replace").strip().splitlines()
        raise CalibrationError(words[-1][:300] if words else f"code {process.returncode}")
    return out


def fit(
    settings: Settings,
    speeds: Mapping[str, float],
    engine: Engine,
    in_use: Fit | None,
    whole_until_s: float = float("inf"),
) -> Fit:
    """Fit the first profile of the settings to those of these replicas (with their speeds) that served.

    What ended after `whole_until_s` [Unix seconds], when requests that had arrived were still to end, only loads
    the replicas: of what ran beside it the short ones have ended and are known, the long ones are not.

    Raises:
        CalibrationError: there is too little to fit to.
    """
    requests = [
        r if r.arrived_s + r.e2e_s <= whole_until_s else replace(r, ttft_s=None)
        for r in stored_requests(settings, WINDOWS)
    ]
    recordings = [r for r in recorded(requests) if r.replica in speeds]
    start = starting_profile(settings, recordings, engine)
    span_s = max((float(r.trace.arrival_s[-1]) for r in recordings), default=0.0)
    split = in_turns(max(span_s / TURNS, 1e-3))
    found = calibrate(recordings, start, split.fitted)

    def error(of: Profile, with_speeds: Mapping[str, float]) -> float:
        medians = validate(recordings, of, split.compared, dict(with_speeds)).median_error
        return float(np.nanmean([medians["ttft_s"], medians["tpot_s"]]))

    before = error(in_use.profile, in_use.speeds) if in_use else error(start, speeds)
    named = replace(found.profile, name=start.name)
    return Fit(named, found.speeds, found.requests, before, error(found.profile, found.speeds))


def main() -> None:
    """Fit one class of replicas and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument(
        "--replica", nargs=2, metavar=("NAME", "SPEED"), action="append", required=True
    )
    parser.add_argument("--kv-tokens", type=int)
    parser.add_argument("--in-use", type=Path)
    parser.add_argument("--whole-until", type=float, default=float("inf"))
    options = parser.parse_args()
    die_with_parent()
    os.nice(19)
    settings = Settings.model_validate(
        {"data_dir": options.data_dir, "profile": (options.profile,)}
    )
    in_use = Fit.from_bytes(options.in_use.read_bytes()) if options.in_use else None
    try:
        speeds = {name: float(speed) for name, speed in options.replica}
        engine = Engine(kv_tokens=options.kv_tokens)
        found = fit(settings, speeds, engine, in_use, options.whole_until)
    except (ValueError, TelemetryError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(found.to_bytes())


if __name__ == "__main__":
    main()
