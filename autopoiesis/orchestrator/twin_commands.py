"""`twin calibrate` and `twin validate`: the twin against the telemetry of an instance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autopoiesis.orchestrator.catalogue import ask_telemetry
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.telemetry.records import RequestRecord
from autopoiesis.telemetry.requests import COLUMNS, requests_of
from autopoiesis.twin.calibration import Calibration, CalibrationError, calibrate
from autopoiesis.twin.latency import Profile, profile
from autopoiesis.twin.profile_files import write_profile
from autopoiesis.twin.recorded import Recorded, observed, recorded
from autopoiesis.twin.split import early_and_late, in_turns
from autopoiesis.twin.trace import write_trace
from autopoiesis.twin.validation import Validation, plot, validate

MOST_REQUESTS = 100_000
WAITED = 5
"""Samples with requests waiting from which the engine's limit on sequences is taken as seen."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """What is known of the engine beside its step times; None: as the profile says, or as seen."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_tokens: int | None = None


def stored_requests(settings: Settings, windows: int | None) -> list[RequestRecord]:
    """Return the requests of the last windows, of all if None; of a running instance or a stopped one.

    Raises:
        CalibrationError: there are none.
    """
    last = "select max(window_id) from windows"
    since = "true" if windows is None else f"window_id > ({last}) - {windows}"
    query = f"select {', '.join(COLUMNS)} from requests where {since} order by arrived_s"  # noqa: S608
    requests = requests_of(
        [tuple(row) for row in ask_telemetry(settings, query, MOST_REQUESTS).rows]
    )
    if not requests:
        raise CalibrationError(
            f"{settings.telemetry_file} has no requests in that span; serve some, or take more windows"
        )
    return requests


def calibrate_command(
    settings: Settings,
    replicas: Sequence[str],
    windows: int | None,
    engine: Engine,
    target: Path | None,
    tell: Tell,
) -> Calibration:
    """Fit the first profile of the settings to what these replicas (all if none) did; write it to `target`."""
    recordings = _recordings(settings, replicas, windows)
    start = starting_profile(settings, recordings, engine)
    calibration = calibrate(recordings, start, tell=tell)
    if target is not None:
        named = replace(calibration.profile, name=target.stem)
        write_profile(named, target)
        calibration = replace(calibration, profile=named)
    return calibration


def validate_command(
    settings: Settings,
    replicas: Sequence[str],
    windows: int | None,
    engine: Engine,
    share: float,
    turn_s: float | None,
    calibrated: bool,
    picture: Path | None,
    tell: Tell,
) -> tuple[Validation, Calibration | None]:
    """Calibrate on the first share of the time, or on every other turn, and compare on the rest.

    It is drawn to `picture`.
    """
    recordings = _recordings(settings, replicas, windows)
    start = starting_profile(settings, recordings, engine)
    try:
        split = early_and_late(recordings, share) if turn_s is None else in_turns(turn_s)
        calibration = calibrate(recordings, start, split.fitted, tell) if calibrated else None
        tell("comparing")
        chosen = calibration.profile if calibration else start
        speeds = calibration.speeds if calibration else {}
        validation = validate(recordings, chosen, split.compared, speeds, settings.seed)
    except CalibrationError:
        raise
    except ValueError as error:
        raise CalibrationError(str(error)) from None
    if picture is not None:
        if picture.suffix not in {".svg", ".png", ".pdf"}:
            raise CalibrationError(f"cannot draw {picture}: give a file that ends in .svg or .png")
        plot(validation, picture)
    return validation, calibration


def export_trace(settings: Settings, windows: int | None, target: Path) -> int:
    """Write stored requests as a trace and return how many; those that were nobody's are left out."""
    trace, _ = observed(stored_requests(settings, windows))
    if not len(trace):
        raise CalibrationError("no request of that span can be replayed; take more windows")
    write_trace(
        replace(trace, arrival_s=trace.arrival_s - trace.arrival_s[0], name=target.stem), target
    )
    return len(trace)


def _recordings(
    settings: Settings, replicas: Sequence[str], windows: int | None
) -> tuple[Recorded, ...]:
    found = recorded(stored_requests(settings, windows))
    names = {r.replica for r in found}
    unknown = set(replicas) - names
    if unknown:
        raise CalibrationError(
            f"no replica {min(unknown)!r} served requests; there are {', '.join(sorted(names))}"
        )
    return tuple(r for r in found if not replicas or r.replica in replicas)


def starting_profile(settings: Settings, recordings: Sequence[Recorded], engine: Engine) -> Profile:
    """Return the first profile of the settings with the engine's limits, as given or as seen."""
    start = profile(settings.profile[0])
    changes: dict[str, Any] = {}
    limit = engine.max_num_seqs or _limit_seen(settings, [r.replica for r in recordings])
    if limit:
        changes["max_num_seqs"] = limit
    if engine.max_num_batched_tokens:
        changes["max_num_batched_tokens"] = engine.max_num_batched_tokens
    if engine.kv_tokens:
        changes["kv_blocks"] = max(engine.kv_tokens // start.kv_block_tokens, 1)
    return replace(start, **changes)


def _limit_seen(settings: Settings, replicas: Sequence[str]) -> int | None:
    """Return the engine's limit on sequences if it was seen: the most that ran while others waited."""
    names = ", ".join("'" + name.replace("'", "''") + "'" for name in replicas)
    query = (
        "with busy as (select running from replicas where waiting > 0 "  # noqa: S608
        f"and replica in ({names})) select max(running), count(*) filter "
        "(running = (select max(running) from busy)), count(*) from busy"
    )
    most, at_most, waited = ask_telemetry(settings, query, 1).rows[0]
    return round(most) if waited >= WAITED and at_most > 0.5 * waited else None
