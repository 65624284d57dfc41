"""`autopoiesis report`: ask, draw, write."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autopoiesis.atomic import write_atomically
from autopoiesis.orchestrator.catalogue import ask_telemetry
from autopoiesis.orchestrator.report import Report, ReportError, make_report
from autopoiesis.orchestrator.report_page import render_report, summary
from autopoiesis.orchestrator.settings import Settings

LAST_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Written:
    """A report that was written."""

    report: Report
    file: Path

    def as_dict(self) -> dict[str, Any]:
        """Return its numbers."""
        return asdict(self.report)

    def text(self) -> str:
        """Return the summary, and where the page is."""
        return "\n".join([*summary(self.report), f"The report is {self.file}."])


def write_report(
    settings: Settings, since: str | None, until: str | None, for_s: float | None, file: Path
) -> Written:
    """Write the report of the windows that began from `since` (or `for_s` before the end) to `until`.

    Raises:
        ReportError: a time is none, no window began then, or the file cannot be written.
        QueryError, TelemetryError: the telemetry cannot be read.
    """
    report = make_report(
        lambda query, max_rows: ask_telemetry(settings, query, max_rows),
        _time(since, "--since"),
        _time(until, "--until"),
        for_s or LAST_DAY_S,
    )
    try:
        write_atomically(file, render_report(report).encode())
    except OSError as error:
        raise ReportError(
            f"The report {file} cannot be written: {error.strerror}; choose another --out."
        ) from None
    return Written(report, file)


def _time(text: str | None, option: str) -> float | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ReportError(
            f"{option} {text!r} is no time; write it like 2026-11-24T13:00."
        ) from None
