"""The guard rails in force: stored before they count, on a running instance and on a stopped one."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.registry import Registry
from autopoiesis.orchestrator.rails import Order, obey
from autopoiesis.orchestrator.registrar import Said
from autopoiesis.orchestrator.rollback import last_good
from autopoiesis.telemetry.records import EventRow, GuardRails
from autopoiesis.telemetry.store import Store


@dataclass(frozen=True, slots=True)
class Command:
    """An order with what it needs."""

    order: Order
    arm: str = ""
    """Whom to allocate everything to."""
    on: bool = True
    """Whether a dry run or human-only begins or ends."""


class Governor:
    """Keeps the guard rails of one instance."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        say: Callable[[EventRow], None],
        constrain: Callable[[GuardRails], None],
    ) -> None:
        """Resume from the store. `say` is told of events, which are stored already; `constrain` of what is in force."""
        self.rails = store.load_guard_rails()
        self._registry = registry
        self._store = store
        self._say = say
        self._constrain = constrain
        constrain(self.rails)

    def obey(
        self, command: Command, said: Said, window: int, current: Allocation | None
    ) -> GuardRails:
        """Carry out an order and return what is in force then.

        Raises:
            OrderError: it cannot be obeyed as things are.
            UnknownArmError: there is no such arm.
            TelemetryError: it cannot be stored; nothing is changed.
        """
        after = obey(
            self.rails,
            command.order,
            self._registry,
            current,
            lambda arms: last_good(self._store.query, {arm.id for arm in arms}),
            command.arm,
            command.on,
        )
        self._put(after, command.order, said.of(self._done(command, after)), window)
        return after

    def follow(self, window: int) -> None:
        """Lift what cannot hold any more: an arm that serves no more cannot have everything."""
        only = self.rails.only
        if only and not self._registry.get(only).serves:
            told = f"{self._name(only)} serves no more; it does not have everything any longer"
            self._put(replace(self.rails, only=""), Order.ALLOCATE, told, window)

    def hold(self, allocation: Allocation) -> None:
        """Hold the first allocation there is, where there was none when it was frozen."""
        if self.rails.hold and self.rails.held is None:
            told = "the first allocation is held"
            self._put(replace(self.rails, held=allocation), Order.FREEZE, told, allocation.window)

    def _put(self, rails: GuardRails, order: Order, reason: str, window: int) -> None:
        event = EventRow(self._store.clock(), "operator", window, order, reason)
        self._store.write_guard_rails(rails, reason, [event])
        self.rails = rails
        self._constrain(rails)
        self._say(event)

    def _done(self, command: Command, after: GuardRails) -> str:
        match command.order:
            case Order.FREEZE:
                return "frozen"
            case Order.UNFREEZE:
                return "unfrozen"
            case Order.ROLLBACK:
                window = after.held.window if after.held else -1
                return f"rolled back to the allocation of window {window}, frozen"
            case Order.HUMAN_ONLY:
                return "human arms only" if command.on else "synthesized arms may serve again"
            case Order.DRY_RUN:
                return "dry run begun" if command.on else "dry run ended"
            case Order.ALLOCATE:
                return f"everything to {self._name(after.only)}"
            case Order.RELEASE:
                return "all guard rails lifted"

    def _name(self, arm_id: str) -> str:
        return self._registry.get(arm_id).name
