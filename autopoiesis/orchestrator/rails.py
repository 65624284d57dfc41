"""Guard rails: what an operator may order, and what is then in force.

Orders are stored, so they outlive every process. While frozen or in dry run nothing is applied:
the allocation stays, arms stay in their state (but for those that fault and what the operator does to
them), nothing is synthesized; learning goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum

from autopoiesis.arms.allocation import Allocation
from autopoiesis.arms.arm import Arm, Origin
from autopoiesis.arms.registry import Registry
from autopoiesis.telemetry.records import GuardRails


class Order(StrEnum):
    """What an operator can order."""

    FREEZE = "freeze"
    UNFREEZE = "unfreeze"
    ROLLBACK = "rollback"
    HUMAN_ONLY = "human-only"
    DRY_RUN = "dry-run"
    ALLOCATE = "allocate"
    RELEASE = "release"


AT_ONCE = frozenset({Order.ROLLBACK, Order.HUMAN_ONLY, Order.ALLOCATE})
"""Orders that do not wait for the running window to end."""


class OrderError(ValueError):
    """The order cannot be obeyed as things are: one sentence."""


def obey(
    rails: GuardRails,
    order: Order,
    registry: Registry,
    current: Allocation | None,
    last_good: Callable[[Sequence[Arm]], Allocation | None],
    arm: str = "",
    on: bool = True,
) -> GuardRails:
    """Return what is in force after an order.

    `arm` is whom to allocate everything to; `on` turns a dry run or human-only on or off; `last_good`
    finds the allocation to go back to, given the arms that may serve.

    Raises:
        OrderError: it cannot be obeyed as things are.
        UnknownArmError: there is no such arm.
    """
    held = rails.held or current
    match order:
        case Order.FREEZE:
            return replace(rails, frozen=True, held=held)
        case Order.UNFREEZE:
            return replace(rails, frozen=False, held=held if rails.dry_run else None)
        case Order.DRY_RUN:
            holding = on or rails.frozen
            return replace(rails, dry_run=on, held=held if holding else None)
        case Order.ROLLBACK:
            good = last_good(eligible(registry.serving(), rails))
            if good is None:
                raise OrderError(
                    "There is no earlier allocation that could serve again; nothing is changed."
                )
            return replace(rails, frozen=True, only="", held=good)
        case Order.HUMAN_ONLY:
            return _human_only(rails, registry) if on else replace(rails, human_only=False)
        case Order.ALLOCATE:
            return _all_to(rails, registry.get(arm))
        case Order.RELEASE:
            return GuardRails()


def eligible(serving: Sequence[Arm], rails: GuardRails) -> tuple[Arm, ...]:
    """Return those of the serving arms that may have traffic; all, where no human one is left."""
    human = tuple(arm for arm in serving if arm.origin is Origin.HUMAN)
    return human if rails.human_only and human else tuple(serving)


def in_force(rails: GuardRails, name: Callable[[str], str]) -> str:
    """Say in a few words what is in force; empty if nothing is."""
    parts = [
        "frozen" if rails.frozen else "",
        "dry run" if rails.dry_run else "",
        "human arms only" if rails.human_only else "",
        f"everything to {name(rails.only)}" if rails.only else "",
    ]
    return ", ".join(part for part in parts if part)


def _human_only(rails: GuardRails, registry: Registry) -> GuardRails:
    _refuse_if_held(rails)
    if not any(arm.origin is Origin.HUMAN for arm in registry.serving()):
        raise OrderError("No human arm serves; promote one first.")
    if rails.only and registry.get(rails.only).origin is not Origin.HUMAN:
        rails = replace(rails, only="")
    return replace(rails, human_only=True)


def _all_to(rails: GuardRails, arm: Arm) -> GuardRails:
    _refuse_if_held(rails)
    if not arm.source:
        raise OrderError(f"{arm.name} has only slow functions; it decides on no request.")
    if not arm.serves:
        raise OrderError(f"{arm.name} is {arm.state} and does not serve; promote it first.")
    if rails.human_only and arm.origin is not Origin.HUMAN:
        raise OrderError(
            f"{arm.name} was not written by people, and only such arms may serve now; release that first."
        )
    return replace(rails, only=arm.id)


def _refuse_if_held(rails: GuardRails) -> None:
    if rails.hold:
        raise OrderError(
            f"The allocation stays as it is ({in_force(rails, str)}); unfreeze it, end the dry run, or go back "
            "with `autopoiesis control rollback`."
        )
