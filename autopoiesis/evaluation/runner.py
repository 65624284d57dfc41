"""Units of work in a pool of processes; what is there already is not done again."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from autopoiesis.evaluation.parts import Part, key_of, load, save
from autopoiesis.evaluation.unit import Unit
from autopoiesis.twin.warm import warm_up

NICENESS = 5
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

Tell = Callable[[str, int, int], None]
"""Called with what was done last, how many units are done, and of how many."""


class UnitFailed(RuntimeError):  # noqa: N818 - the sentence reads so
    """A unit of work raised; the message names it and says what it said."""


def run_units(units: Sequence[Unit], out: Path, jobs: int, tell: Tell) -> list[Part]:
    """Run what is not there yet; return all parts, in the order of the units.

    Raises UnitFailed after all others are done if one could not be done. Interrupted, it leaves what
    is done on the disk.
    """
    keys = [key_of(unit.depends_on()) for unit in units]
    done = {key: part for key in dict.fromkeys(keys) if (part := load(out, key)) is not None}
    missing = {key: unit for key, unit in zip(keys, units, strict=True) if key not in done}
    tell("", len(done), len(done) + len(missing))
    failures: list[str] = []
    if missing:
        warm_up()  # compiled once here rather than by every process at the same time
    total = len(done) + len(missing)
    for key, outcome in _run(missing, jobs):
        unit = missing[key]
        if isinstance(outcome, Part):
            save(out, key, outcome)
            done[key] = outcome
        else:
            failures.append(f"{unit.name}: {type(outcome).__name__}: {outcome}")
        tell(unit.name, len(done) + len(failures), total)
    if failures:
        raise UnitFailed(
            f"{len(failures)} of {total} units failed, the others are kept; first {failures[0]}"
        )
    return [done[key] for key in keys]


def _run(missing: Mapping[str, Unit], jobs: int) -> Iterator[tuple[str, Part | BaseException]]:
    """Yield each unit's key with its part or its exception, as they come; the longest begin first."""
    order = sorted(missing, key=lambda key: -missing[key].heavy)
    if jobs == 1:
        for key in order:
            yield key, _attempt(missing[key])
        return
    for name in _ONE_THREAD:
        os.environ.setdefault(name, "1")
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_calm) as pool:
        futures: dict[Future[Part], str] = {pool.submit(_work, missing[key]): key for key in order}
        try:
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _attempt(unit: Unit) -> Part | BaseException:
    try:
        return unit.run()
    except Exception as error:
        return error


def _work(unit: Unit) -> Part:
    return unit.run()


def _calm() -> None:
    """Be nice, and quiet: a solver's library prints to standard output, which is the command's."""
    os.nice(NICENESS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
