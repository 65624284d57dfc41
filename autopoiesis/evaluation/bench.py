"""`bench`: a suite run, measured and told; what is done already is not done again."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from autopoiesis import __version__
from autopoiesis.atomic import replaced, write_atomically
from autopoiesis.evaluation.parts import Part
from autopoiesis.evaluation.report import write_reports
from autopoiesis.evaluation.runner import run_units
from autopoiesis.evaluation.suites import SUITES, Suite
from autopoiesis.evaluation.summary import HUMAN, Results, summary_of

PACKAGES = ("numpy", "numba", "scipy", "pyarrow", "cmaes")


class BenchError(ValueError):
    """A benchmark that cannot be run as asked; one sentence says why and what to do."""


def traces_folder(given: Path | None = None) -> Path:
    """Return the folder of the sample traces: the given one, or that of a checkout.

    Raises BenchError where there is none.
    """
    package = Path(__file__).parent.parent
    for folder in [given] if given else [package / "traces", package.parent / "traces"]:
        if folder.is_dir():
            return folder
    where = str(given) if given else "beside the package"
    raise BenchError(f"There is no folder of traces {where}; name the checkout's with --traces.")


def run_bench(
    name: str,
    out: Path,
    *,
    quick: bool = False,
    seeds: int | None = None,
    first_seed: int = 0,
    jobs: int | None = None,
    scenarios: Sequence[str] = (),
    without: Sequence[str] = (),
    traces: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a suite into `out` and return its summary.

    Raises:
        BenchError: there is no such suite, scenario or contestant, nobody is left to compare, or no traces.
        TraceError: a trace is missing or broken.
        UnitFailed: something could not be run; the rest is kept.
    """
    if name not in SUITES:
        raise BenchError(f"There is no suite {name!r}; suites are {', '.join(SUITES)}.")
    suite = _without(_chosen(SUITES[name](quick), scenarios), without)
    suite = replace(suite, seeds=seeds or suite.seeds, first_seed=first_seed)
    out.mkdir(parents=True, exist_ok=True)
    units = suite.units(traces_folder(traces))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(name, total=len(units))

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what or name, completed=done, total=total)

        parts = run_units(units, out, 1 if suite.live else jobs or os.cpu_count() or 1, tell)
    results = Results(suite.name, suite.cost, tuple(parts))
    summary = summary_of(results, suite.ours) | {
        "quick": quick,
        "command": command_of(name, quick, seeds, first_seed, scenarios, without),
        "machine": machine(),
    }
    write_tables(parts, out)
    write_atomically(out / "summary.json", orjson.dumps(summary, option=_PRETTY))
    write_reports(results, summary, out)
    return summary


_PRETTY = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY


def _chosen(suite: Suite, wanted: Sequence[str]) -> Suite:
    """Keep the scenarios whose names hold one of the words wanted; all if none is."""
    if not wanted:
        return suite
    kept = tuple(s for s in suite.scenarios if any(word in s.name for word in wanted))
    if not kept:
        known = ", ".join(s.name for s in suite.scenarios)
        raise BenchError(f"No scenario is called {' or '.join(wanted)}; there are: {known}.")
    return replace(suite, scenarios=kept)


def _without(suite: Suite, unwanted: Sequence[str]) -> Suite:
    """Leave out the contestants whose names hold one of the words: the tuned take most of the time."""
    kept = tuple(c for c in suite.contestants if not any(word in c for word in unwanted))
    known = ", ".join(suite.contestants)
    for word in unwanted:
        if not any(word in contestant for contestant in suite.contestants):
            raise BenchError(f"No contestant is called {word}; there are: {known}.")
    if unwanted and not (suite.ours in kept and any(c.startswith(HUMAN) for c in kept)):
        raise BenchError(
            f"{suite.ours!r} and a human policy have to take part, since gains are of the one over the "
            f"other; leave out fewer than {' and '.join(unwanted)}."
        )
    return replace(suite, contestants=kept)


def command_of(
    name: str,
    quick: bool,
    seeds: int | None,
    first_seed: int,
    scenarios: Sequence[str],
    without: Sequence[str],
) -> str:
    """Return the command that gives these results."""
    words = ["autopoiesis", "bench", name, "--out", "out/"]
    words += ["--quick"] if quick else []
    words += ["--seeds", str(seeds)] if seeds else []
    words += ["--first-seed", str(first_seed)] if first_seed else []
    for word in scenarios:
        words += ["--scenario", f'"{word}"']
    for word in without:
        words += ["--without", f'"{word}"']
    return " ".join(words)


def machine() -> dict[str, Any]:
    """Return on what it ran: results of thinking time depend on it, results in the twin do not."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "autopoiesis": __version__,
        **{package: version(package) for package in PACKAGES},
    }


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or "unknown"


def write_tables(parts: Sequence[Part], out: Path) -> None:
    """Write `results.parquet`, a row per unit, and `windows.parquet`, a row per window of each."""
    labels = [
        {"suite": p.suite, "scenario": p.scenario, "contestant": p.contestant, "seed": p.seed}
        for p in parts
    ]
    rows = [label | p.row | {"seconds": p.seconds} for label, p in zip(labels, parts, strict=True)]
    windows = [
        label | dict(zip(p.windows, values, strict=True))
        for label, p in zip(labels, parts, strict=True)
        for values in zip(*p.windows.values(), strict=True)
    ]
    for name, table in (("results", rows), ("windows", windows)):
        with replaced(out / f"{name}.parquet") as draft:
            pq.write_table(pa.Table.from_pylist(table), draft, compression="zstd")
