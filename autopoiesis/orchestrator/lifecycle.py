"""How arms rise and fall: canary, live, confirmed; quarantined, tried again; retired.

Human arms never move. A synthesized one comes out of the shadow as canary. It is quarantined at once when its
requests fail or are shed far more than others' (a counter, no statistics), and as soon as it is
shown to be worse than the control by more than a margin. It becomes live when it has served for some
windows and does not look that much worse: asking for proof that it is better would keep good arms
out far longer than bad ones cost. No arm, human ones too, holds more than half of the fleet until a
switchback of the whole fleet has confirmed it; the first human arm to lead is the baseline and needs
none, since somebody must serve. Drift gives the quarantined another chance.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.orchestrator.allocator import LEAD, Limits
from autopoiesis.orchestrator.harm import HarmTest
from autopoiesis.synthesis.complement import by_complement
from autopoiesis.telemetry.records import CellRow


@dataclass(frozen=True, slots=True)
class Trial:
    """How an arm is confirmed."""

    after: int
    """Windows in a row in which the bandit wants it to lead before a switchback."""
    pairs: int
    """Pairs of windows in the switchback."""
    pause: int
    """Windows from its end until it may be tried again."""


@dataclass(frozen=True, slots=True)
class LifecycleSettings:
    """How careful to be with synthesized arms."""

    canary_windows: int = 4
    """Windows that a canary must have served."""
    proven_canary_windows: int = 2
    """The same while the twin is proven: it has told what the arm would earn, and is told off if it does not."""
    harm_margin: float = 0.1
    """Loss of utility against the control that is harm."""
    guard_requests: int = 20
    """Fewest requests of a window on which the guard acts."""
    guard_share: float = 0.25
    """Share of failed and shed requests above the control's at which it acts."""
    confirm_margin: float = 0.02
    """Loss against the control that a switchback forgives; where the twin stands for the control, `harm_margin`."""
    trial: Trial = Trial(after=1, pairs=1, pause=10)
    """While the twin tells what load adds."""
    blind_trial: Trial = Trial(after=3, pairs=2, pause=30)
    """Without the twin."""
    second_chances: int = 2
    """Quarantined arms that a drift brings back."""
    max_serving: int = 32
    """Arms that serve at once; weaker synthesized ones are retired."""


@dataclass(frozen=True, slots=True)
class Move:
    """An arm goes to another state."""

    arm_id: str
    state: State
    reason: str


@dataclass(frozen=True, slots=True)
class Switchback:
    """A fleet-wide comparison: in each of some windows the whole fleet serves one of two arms."""

    arm_id: str
    control_id: str
    first_window: int
    order: tuple[str, ...]
    """Which arm serves in each of the windows: pairs in random order, or the arm first if much is expected of it,
    or the arm alone while the twin is proven."""
    pause: int = 30
    """Windows from its end until the arm may be tried again."""

    def arm_of(self, window: int) -> str | None:
        """Return the arm that serves the window, None if the switchback is over."""
        at = window - self.first_window
        return self.order[at] if 0 <= at < len(self.order) else None


SETTLES_AFTER = 2
"""Windows from the beginning of one until what it was worth is known."""
MEMORY = 60
"""Windows by which is told what arms add to each other."""


class Lifecycle:
    """What is known of each synthesized arm besides its utility."""

    def __init__(self, settings: LifecycleSettings = LifecycleSettings()) -> None:
        self.settings = settings
        self.switchback: Switchback | None = None
        self.twin_is_proven = False
        """Whether its word stands for a control that does not serve, and trials are short."""
        self._tests: dict[str, HarmTest] = {}
        self._confirmed: set[str] = set()
        self._wanted: dict[str, int] = {}
        self._not_before: dict[str, int] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._memory: deque[dict[str, float]] = deque(maxlen=MEMORY)

    def limits(self, arms: Sequence[Arm]) -> Limits:
        """Return which of the serving arms are limited, and how."""
        canaries = frozenset(a.id for a in arms if _is_canary(a))
        confirmed = canaries | self._confirmed
        return Limits(canaries, frozenset(a.id for a in arms if a.id not in confirmed))

    def settle_baseline(self, arms: Sequence[Arm], probabilities: Mapping[str, float]) -> None:
        """Let the likeliest human arm have the fleet where none may have it yet."""
        human = [a.id for a in arms if a.origin is Origin.HUMAN]
        if human and self._confirmed.isdisjoint(human):
            self._confirmed.add(max(human, key=lambda a: probabilities.get(a, 0.0)))

    def on_trial(
        self, arms: Sequence[Arm], foresight: Mapping[str, float] | None = None
    ) -> str | None:
        """Return the canary to give a cell: one that has not served long enough to be judged.

        The one of which much more is foreseen than of the others, or that has served least. Of which harm
        is foreseen by a proven twin has to wait for other traffic.
        """
        foreseen = foresight or {}
        step = self.settings.harm_margin
        best = max((foreseen.get(a.id, -np.inf) for a in arms), default=-np.inf)
        least = best - step if self.twin_is_proven else -np.inf
        waiting = [a.id for a in arms if _is_canary(a) and foreseen.get(a.id, np.inf) >= least]
        windows = {a: self._tests.get(a, HarmTest()).windows for a in waiting}

        def turn(arm_id: str) -> tuple[float, int]:
            return -round(foreseen.get(arm_id, 0.0) / step), windows[arm_id]

        next_one = min(windows, key=turn, default=None)
        return next_one if next_one and windows[next_one] < self._canary_windows else None

    @property
    def _canary_windows(self) -> int:
        s = self.settings
        return s.proven_canary_windows if self.twin_is_proven else s.canary_windows

    def guard(
        self,
        arms: Sequence[Arm],
        rows: Sequence[CellRow],
        twin: Mapping[str, float] | None = None,
        said: Mapping[str, float] | None = None,
    ) -> list[Move]:
        """Return the arms to take out at once, by counters of a window that has just ended.

        Who refuses requests and earns no less than people's arms do is spared: refusing in time what would
        be late is what serves the others. `twin` is what each arm is worth in the long run, which a window
        that begins a surge does not show; it counts for an arm that earned about what is `said` of it in this window.
        """
        human = {a.id for a in arms if a.origin is Origin.HUMAN}
        beside = [r for r in rows if r.arm_id in human]
        control = _lost_share(beside)
        earned, worth = _utility(beside), dict(twin or {})
        expected = said or worth
        rival = max((u for a, u in worth.items() if a in human), default=np.inf)
        share = self.settings.guard_share
        moves: list[Move] = []
        for arm in arms:
            mine = [r for r in rows if r.arm_id == arm.id]
            if arm.id in human or sum(r.requests for r in mine) < self.settings.guard_requests:
                continue
            lost, utility = _lost_share(mine), _utility(mine)
            pays = utility is not None and (
                (earned is not None and utility >= earned)
                or (
                    worth.get(arm.id, -np.inf) >= rival
                    and utility >= expected.get(arm.id, np.inf) - share
                )
            )
            if pays and _share(mine, lambda row: row.failed) <= share:
                continue
            if lost - control > share:
                why = f"{lost:.0%} of its requests failed or were shed, {control:.0%} of the control's"
                moves.append(Move(arm.id, State.QUARANTINED, why))
        return moves

    def excelling(
        self, arms: Sequence[Arm], rows: Sequence[CellRow], twin: Mapping[str, float]
    ) -> list[Move]:
        """Return the canaries that earned far more than the control in a window that has just ended: they are live.

        The `twin` has to agree. Where everybody else serves nearly all too late, waiting longer costs most.
        """
        human = {a.id for a in arms if a.origin is Origin.HUMAN}
        said = [u for a, u in twin.items() if a in human]
        beside = _utility([r for r in rows if r.arm_id in human])
        control = max(said, default=1.0) if beside is None else beside
        margin = self.settings.harm_margin
        moves: list[Move] = []
        for arm in filter(_is_canary, arms):
            mine = [r for r in rows if r.arm_id == arm.id]
            utility, requests = _utility(mine), sum(r.requests for r in mine)
            if utility is None or requests < self.settings.guard_requests or not said:
                continue
            if utility > control + margin and twin.get(arm.id, 0.0) > max(said) + margin:
                why = (
                    f"earned {utility:.2f} where the control earned {control:.2f}; the twin agrees"
                )
                moves.append(Move(arm.id, State.LIVE, why))
        return moves

    def review(
        self,
        arms: Sequence[Arm],
        utility: Mapping[str, tuple[float, int]],
        control_utility: float,
    ) -> list[Move]:
        """Take a settled window into account and return the moves that it leads to.

        `utility` holds the played arms' utilities and requests. The control is what the human arms
        earned in the same window, or `control_utility` where none played.
        """
        human = [a.id for a in arms if a.origin is Origin.HUMAN and a.id in utility]
        total = sum(utility[a][1] for a in human)
        control = (
            sum(utility[a][0] * utility[a][1] for a in human) / total if total else control_utility
        )
        moves: list[Move] = []
        for arm in arms:
            if arm.state is not State.CANARY or arm.id not in utility:
                continue
            test = self._tests.get(arm.id, HarmTest()).observe(utility[arm.id][0] - control)
            self._tests[arm.id] = test
            margin = self.settings.harm_margin
            if test.interval[1] < -margin:
                why = f"loses at least {-test.interval[1]:.2f} of utility against the control"
                moves.append(Move(arm.id, State.QUARANTINED, why))
            elif test.windows >= self._canary_windows and test.mean > -margin:
                why = f"no harm in {test.windows} windows (mean difference {test.mean:+.3f})"
                moves.append(Move(arm.id, State.LIVE, why))
        return moves

    def second_chances(self, arms: Sequence[Arm], mean: Mapping[str, float]) -> list[Move]:
        """Return the quarantined arms that a drift brings back, the best of them by `mean` first."""
        waiting = [a for a in arms if a.state is State.QUARANTINED and a.origin is not Origin.HUMAN]
        waiting.sort(key=lambda a: -mean.get(a.id, 0.0))
        why = "another chance after drift"
        return [Move(a.id, State.CANARY, why) for a in waiting[: self.settings.second_chances]]

    def remember(self, estimates: Mapping[str, float]) -> None:
        """Note what a settled window was worth under each arm."""
        if estimates:
            self._memory.append(dict(estimates))

    def superfluous(self, arms: Sequence[Arm], mean: Mapping[str, float]) -> list[Move]:
        """Return the synthesized arms beyond the number that may serve: those that add least.

        A set of arms is worth its best member, window by window; `mean` is what is expected of each
        now, and counts as one more window. A canary is spared until it has waited for all windows remembered.
        """
        serving = [a for a in arms if a.state in {State.CANARY, State.LIVE}]
        excess = max(len(serving) - self.settings.max_serving, 0)
        if not excess:
            return []
        windows = [*self._memory, mean]
        table = np.array([[w.get(a.id, np.nan) for w in windows] for a in serving])
        order = by_complement(table, np.zeros(len(windows)))
        least_first = [serving[i] for i in reversed(order)]
        out = [
            a
            for a in least_first
            if a.origin is not Origin.HUMAN
            and not a.pinned
            and (a.state is State.LIVE or self._has_waited(a.id))
        ]
        why = f"adds least to the others among more than {self.settings.max_serving} serving arms"
        return [Move(a.id, State.RETIRED, why) for a in out[:excess]]

    def _has_waited(self, arm_id: str) -> bool:
        return len(self._memory) == MEMORY and all(arm_id in window for window in self._memory)

    # --- confirmation -------------------------------------------------------------------------

    def is_confirmed(self, arm_id: str) -> bool:
        """Tell whether a switchback of the whole fleet has confirmed the arm."""
        return arm_id in self._confirmed

    def withdraw(self, arm_id: str) -> bool:
        """Confirm an arm no longer; tell whether it was."""
        was = arm_id in self._confirmed
        self._confirmed.discard(arm_id)
        return was

    def want(
        self,
        window: int,
        arms: Sequence[Arm],
        uncapped: Mapping[str, float],
        twin: bool,
        rng: np.random.Generator,
        foresight: Mapping[str, float] | None = None,
        earning: Mapping[str, float] | None = None,
    ) -> Switchback | None:
        """Begin a switchback from `window` on for an arm that the bandit wants more of, if any.

        `uncapped` are the probabilities that the bandit would give without limits; the control is the
        likeliest human arm that may have the fleet. `twin` tells whether its word evens out load, `foresight`
        what it expects of the arms: one that is far ahead begins, and goes on if it proves that. Canaries
        and arms that have failed are tried, too, if more is to be gained than the control is `earning`, which is all
        there is to lose.
        """
        limits = self.limits(arms)
        foreseen = foresight or {}

        def ahead(arm_id: str, control_id: str) -> float:
            return foreseen.get(arm_id, 0.0) - foreseen.get(control_id, 0.0)

        human = [a.id for a in arms if a.id in self._confirmed and a.origin is Origin.HUMAN]
        likeliest = max(human, key=lambda a: uncapped.get(a, 0.0), default="")
        at_stake = max((earning or {}).get(likeliest, np.inf), self.settings.harm_margin)
        bets = {a for a in limits.arms() if ahead(a, likeliest) > at_stake}
        unconfirmed = limits.unconfirmed | bets
        trial = self.settings.trial if twin else self.settings.blind_trial
        rival = max((p for a, p in uncapped.items() if a not in unconfirmed), default=0.0)
        best = max(uncapped, key=lambda a: uncapped[a], default="")
        wanted = [a for a in unconfirmed if a == best and uncapped[a] >= LEAD * rival]
        self._wanted = {a: self._wanted.get(a, 0) + 1 for a in wanted}
        due = [
            a
            for a, n in self._wanted.items()
            if n >= trial.after and (a in bets or window >= self._not_before.get(a, 0))
        ]
        if self.switchback is not None or not due or len(arms) < 2:
            return None
        arm = max(due, key=lambda a: uncapped[a])
        others = [a.id for a in arms if a.id != arm]
        control = likeliest or max(others, key=lambda a: uncapped.get(a, 0.0))
        pairs = range(trial.pairs)
        if self.twin_is_proven:  # what the control would have earned beside it is known
            order = [arm] * SETTLES_AFTER
        elif ahead(arm, control) > self.settings.harm_margin:
            # It goes on until it is known how it began.
            order = [a for _ in pairs for a in (arm, control) for _ in range(SETTLES_AFTER)]
        else:
            order = [
                a for _ in pairs for a in ((arm, control) if rng.random() < 0.5 else (control, arm))
            ]
        self.switchback = Switchback(arm, control, window, tuple(order), trial.pause)
        self._sums = {}
        return self.switchback

    def compare(self, window: int, utility: float | None, *, levelled: bool = False) -> str | None:
        """Take a settled window of the switchback into account; say in one line how it ended, if so.

        `utility` may be counted from a baseline, as long as both arms' windows are. Where that is the twin's
        word on the control (`levelled`), an arm that is far above it needs no window of the control, and none
        does while the twin is proven.
        """
        switchback = self.switchback
        arm = switchback.arm_of(window) if switchback else None
        if switchback is None or arm is None:
            return None
        if utility is not None:
            total, n = self._sums.get(arm, (0.0, 0))
            self._sums[arm] = (total + utility, n + 1)
        margin = self.settings.harm_margin
        enough = -np.inf if self.twin_is_proven else margin
        alone = levelled and arm == switchback.arm_id
        sure = alone and utility is not None and utility > enough
        if not sure and window < switchback.first_window + len(switchback.order) - 1:
            return None
        self.switchback = None
        means = {a: total / n for a, (total, n) in self._sums.items()}
        if sure:
            means.setdefault(switchback.control_id, 0.0)
        self._wanted.pop(switchback.arm_id, None)
        self._not_before[switchback.arm_id] = window + switchback.pause
        missing = {switchback.arm_id, switchback.control_id} - means.keys()
        if missing == {switchback.control_id} and missing.isdisjoint(switchback.order):
            return "the twin, which stood for the control, is proven no longer; not confirmed"
        if missing:
            return "switchback without requests; not confirmed"
        gain = means[switchback.arm_id] - means[switchback.control_id]
        if gain < -(margin if self.twin_is_proven else self.settings.confirm_margin):
            return f"not confirmed by a switchback: {gain:+.3f} against the control"
        self._confirmed.add(switchback.arm_id)
        return f"confirmed by a switchback: {gain:+.3f} against the control"

    def abandon(self, serving: frozenset[str]) -> None:
        """End the switchback if one of its two arms does not serve any more."""
        s = self.switchback
        if s is not None and not {s.arm_id, s.control_id} <= serving:
            self.switchback = None

    def forget(self, arm_id: str) -> None:
        """Forget how an arm has done: it is out, and begins anew if it comes back."""
        self._tests.pop(arm_id, None)
        self._confirmed.discard(arm_id)
        self._wanted.pop(arm_id, None)

    # --- state --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "switchback": asdict(self.switchback) if self.switchback else None,
            "tests": {arm: asdict(test) for arm, test in self._tests.items()},
            "confirmed": sorted(self._confirmed),
            "wanted": self._wanted,
            "not_before": self._not_before,
            "memory": list(self._memory),
            "sums": {arm: list(sums) for arm, sums in self._sums.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        s = state["switchback"]
        self.switchback = None
        if s is not None:
            order = tuple(str(arm) for arm in s["order"])
            kept = (s["arm_id"], s["control_id"], s["first_window"], order, s.get("pause", 30))
            self.switchback = Switchback(*kept)
        self._tests = {arm: HarmTest(**test) for arm, test in state["tests"].items()}
        self._confirmed = set(state["confirmed"])
        self._wanted = dict(state["wanted"])
        self._not_before = dict(state["not_before"])
        self._memory = deque(state.get("memory", []), MEMORY)
        self._sums = {arm: (total, n) for arm, (total, n) in state["sums"].items()}


def _is_canary(arm: Arm) -> bool:
    return arm.state is State.CANARY and arm.origin is not Origin.HUMAN


def _utility(rows: Sequence[CellRow]) -> float | None:
    known = [(r.utility, r.requests) for r in rows if r.utility is not None and r.requests]
    requests = sum(n for _, n in known)
    return sum(u * n for u, n in known) / requests if requests else None


def _share(rows: Sequence[CellRow], lost: Callable[[CellRow], int]) -> float:
    requests = sum(r.requests for r in rows)
    return sum(lost(r) for r in rows) / requests if requests else 0.0


def _lost_share(rows: Sequence[CellRow]) -> float:
    return _share(rows, lambda row: row.failed + row.shed)
