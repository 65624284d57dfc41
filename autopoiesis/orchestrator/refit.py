"""The twin corrects itself: a profile is fitted again to what the replicas do.

`Refits` decides when, keeps what was found, and starts `python -m autopoiesis.orchestrator.refit` for
each class of replicas (those with the same profile), one after the other, at the lowest priority. The
fit is made on every other stretch of the last windows and is taken only if it is nearer to the
stretches between than what is in use.
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
        self, at_s: float, errors: Sequence[TwinErrorRow], drifted: Sequence[str]
    ) -> str | None:
        """Take a window into account; return why to fit now, or None."""
        off = [
            abs(e.twin / e.observed - 1.0) for e in errors if e.metric in LATENCIES and e.observed
        ]
        if off:
            self._off.append(max(off))
        if self.running or at_s < self._not_before_s:
            return None
        if "twin" in drifted:
            return "its error has drifted"
        if len(self._off) == WINDOWS_OFF and median(self._off) > OFF:
            return f"its latencies are {median(self._off):.0%} off"
        return None

    async def run(self, data_dir: Path, now_s: Callable[[], float]) -> None:
        """Fit every class of replicas on the last windows; never raises for what goes wrong."""
        self.running = True
        try:
            for name, members in self._classes.items():
                await self._fit(name, members, data_dir)
        finally:
            self.running = False
            self._off.clear()
            self._not_before_s = now_s() + PAUSE_S

    async def _fit(self, name: str, members: Sequence[Member], data_dir: Path) -> None:
        argv = ["--data-dir", str(data_dir), "--profile", name]
        argv += [part for m in members for part in ("--replica", m.name, repr(m.speed))]
        if members[0].kv_tokens:
            argv += ["--kv-tokens", str(members[0].kv_tokens)]
        if name in self._fits:
            argv += ["--in-use", str(self._file(name))]
        try:
            fit = Fit.from_bytes(await _in_process(argv))
        except (OSError, TimeoutError, CalibrationError, ProfileError) as error:
            self._say(name, f"not fitted: {error or 'it took too long'}")
            return
        told = (
            f"error {fit.error_before:.0%}, {fit.error:.0%} when fitted to {fit.requests} requests"
        )
        if not fit.better:
            self._say(name, f"kept as it is: {told}")
            return
        with suppress(OSError):  # then it is used until the next start
            self._folder.mkdir(exist_ok=True)
            write_atomically(self._file(name), fit.to_bytes())
        self._fits[name] = fit
        self._say(name, f"fitted anew: {told}")

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
) -> Fit:
    """Fit the first profile of the settings to those of these replicas (with their speeds) that served.

    Raises:
        CalibrationError: there is too little to fit to.
    """
    recordings = [r for r in recorded(stored_requests(settings, WINDOWS)) if r.replica in speeds]
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
    options = parser.parse_args()
    die_with_parent()
    os.nice(19)
    settings = Settings.model_validate(
        {"data_dir": options.data_dir, "profile": (options.profile,)}
    )
    in_use = Fit.from_bytes(options.in_use.read_bytes()) if options.in_use else None
    try:
        speeds = {name: float(speed) for name, speed in options.replica}
        found = fit(settings, speeds, Engine(kv_tokens=options.kv_tokens), in_use)
    except (ValueError, TelemetryError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(found.to_bytes())


if __name__ == "__main__":
    main()
