"""`replay --counterfactual`: stored windows and the arms asked for, put to the evaluation."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from autopoiesis.arms.arm import Arm
from autopoiesis.arms.registry import Registry
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.orchestrator.counterfactual import (
    FEWEST_WINDOWS,
    TOO_FEW,
    CounterfactualError,
    CounterfactualReport,
    evaluate,
)
from autopoiesis.orchestrator.rehearsal import WARMUP_WINDOWS
from autopoiesis.orchestrator.replay_command import arms_by_key
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.orchestrator.stored import (
    MOST_ROWS,
    StoredWindow,
    stored_arms,
    stored_fleet,
    stored_requests_between,
    stored_windows,
)
from autopoiesis.twin.recorded import observed
from autopoiesis.twin.warm import warm_up

USUAL_WINDOWS = 60


class _Kept:
    """Arms for the length of an evaluation."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._arms = {arm.id: arm for arm in arms}

    def load_arms(self) -> list[Arm]:
        return list(self._arms.values())

    def save_arm(self, arm: Arm) -> None:
        self._arms[arm.id] = arm


def counterfactual_command(
    settings: Settings, arms: Sequence[str], windows: int | None, *, quiet: bool
) -> CounterfactualReport:
    """Evaluate the arms asked for, or all that serve, on the newest stored windows of the data directory.

    Raises:
        CounterfactualError: there are too few windows.
        RegistryError: no arm is called so, or a file is no policy.
    """
    stored = _affordable(stored_windows(settings, windows or USUAL_WINDOWS))
    if len(stored) < FEWEST_WINDOWS:
        raise CounterfactualError(TOO_FEW.format(len(stored)))
    registry = Registry(_Kept([*seed_arms(), *stored_arms(settings)]))
    asked = [
        registry.add(replace(arm, parents=())) for arm in arms_by_key(arms, lambda: registry)
    ] or list(registry.serving())
    first, last = stored[0], stored[-1]
    from_s = first.started_s - WARMUP_WINDOWS * (first.ended_s - first.started_s)
    to_s = 2.0 * last.ended_s - last.started_s
    names = sorted({r for w in stored for cell in w.allocation.cells for r in cell.replicas})
    fleet = {spec.name: spec for spec in stored_fleet(settings, names)}
    history = observed(stored_requests_between(settings, from_s, to_s), (), names)
    warm_up()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(f"{len(stored)} windows", total=1.0)
        return evaluate(
            stored,
            history,
            fleet,
            registry,
            asked,
            settings.seed,
            lambda done: bar.update(task, completed=done),
        )


def _affordable(stored: Sequence[StoredWindow]) -> tuple[StoredWindow, ...]:
    """Return the newest windows whose requests can be read at once; the very last lacks what follows it."""
    kept: list[StoredWindow] = []
    requests = 0
    for window in reversed(stored):
        requests += window.requests
        if requests > MOST_ROWS:
            break
        kept.append(window)
    return tuple(reversed(kept))
