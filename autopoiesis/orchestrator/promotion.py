"""Carrying out how arms rise and fall: the registry follows the lifecycle, as far as orders allow."""

from collections.abc import Callable, Mapping, Sequence

from autopoiesis.arms.arm import Arm, Origin, State
from autopoiesis.arms.registry import Registry, RegistryError
from autopoiesis.orchestrator.lifecycle import Lifecycle, Move
from autopoiesis.orchestrator.rails import in_force
from autopoiesis.telemetry.database import TelemetryError
from autopoiesis.telemetry.records import GuardRails

Say = Callable[[str, str, str], None]
"""Called with the kind, the subject and the text of an event."""


class Promotion:
    """Moves arms between their states, or says once what it would do while an order holds them."""

    def __init__(self, registry: Registry, lifecycle: Lifecycle, say: Say) -> None:
        self.rails = GuardRails()
        self._registry = registry
        self._lifecycle = lifecycle
        self._say = say
        self._withheld: set[tuple[str, State]] = set()

    def constrain(self, rails: GuardRails) -> None:
        """Move arms from now on within what an operator has ordered."""
        self.rails = rails
        self._withheld.clear()
        if rails != GuardRails():
            self._lifecycle.switchback = None

    def control(self, means: Mapping[str, float]) -> Arm:
        """Return the arm to compare with: the human one believed to be best."""
        serving = self._registry.serving()
        human = [a for a in serving if a.origin is Origin.HUMAN] or list(serving)
        return max(human, key=lambda a: means.get(a.id, 0.0))

    def review(
        self,
        utility: Mapping[str, tuple[float, int]],
        estimates: Mapping[str, float],
        means: Mapping[str, float],
        drifted: Sequence[str],
    ) -> None:
        """Let arms rise and fall by a settled window: what the played ones earned, what all would have.

        `means` is what was expected of each.
        """
        control = self.control(means).id
        baseline = estimates.get(control, means[control])
        self.move(self._lifecycle.review(self._registry.serving(), utility, baseline))
        if drifted:
            self.move(self._lifecycle.second_chances(self._registry.fast(), means))
        self.move(self._lifecycle.superfluous(self._registry.fast(), means))

    def compare(
        self,
        window: int,
        utility: Mapping[str, tuple[float, int]],
        twin: Mapping[str, float],
        lean: Mapping[str, float],
    ) -> None:
        """Go on with the switchback, if one runs.

        What an arm earned above the `twin`'s word on the control, what it misses of all arms made good, evens
        out load; by how much more the arm is worth in the long run (`lean`) counts as it does for the draw.
        """
        switchback = self._lifecycle.switchback
        if switchback is None:
            return
        arm, control = switchback.arm_of(window) or "", switchback.control_id
        gain, _ = utility.get(arm, (None, 0))
        if gain is not None and twin:
            known = {arm, control} <= twin.keys()
            ahead = lean.get(arm, 0.0) - lean.get(control, 0.0)
            gain = gain - twin[control] + ahead if known else None
        if verdict := self._lifecycle.compare(window, gain, levelled=bool(twin)):
            tried = self._registry.get(switchback.arm_id)
            self._say("arm", tried.name, verdict)
            if tried.state is State.CANARY and self._lifecycle.is_confirmed(tried.id):
                self.move([Move(tried.id, State.LIVE, verdict)])

    def unmask(self, own: Mapping[str, float]) -> None:
        """Confirm arms no longer that earn far less than the twin says of them, by `own`."""
        for arm_id, gain in own.items():
            if gain < -self._lifecycle.settings.harm_margin and self._lifecycle.withdraw(arm_id):
                told = f"no longer confirmed: it earns {-gain:.2f} less than the twin says"
                self._say("arm", self.name(arm_id), told)

    def move(self, moves: Sequence[Move]) -> None:
        """Carry moves out, each with an event."""
        for move in moves:
            if self.rails.hold:
                self._withhold(move)
                continue
            try:
                arm = self._registry.move(move.arm_id, move.state, move.reason)
                self._say("arm", arm.name, f"{move.state}: {move.reason}")
            except (RegistryError, TelemetryError) as error:
                self._say("arm", self.name(move.arm_id), f"not moved: {error}")
                continue
            if move.state is State.QUARANTINED:
                self._lifecycle.forget(move.arm_id)
        self._lifecycle.abandon(frozenset(a.id for a in self._registry.serving()))

    def name(self, arm_id: str) -> str:
        """Return an arm's name."""
        return self._registry.get(arm_id).name

    def _withhold(self, move: Move) -> None:
        if (move.arm_id, move.state) not in self._withheld:
            self._withheld.add((move.arm_id, move.state))
            order = in_force(self.rails, self.name)
            self._say(
                "arm", self.name(move.arm_id), f"would be {move.state} ({order}): {move.reason}"
            )
