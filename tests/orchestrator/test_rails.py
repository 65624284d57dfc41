"""What an operator orders, and what the loop then does and does not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_loop import OBJECTIVE, Drive
from traffic import LEAST_REQUESTS_BUT_ELSEWHERE, SHED_ALL, fleet, human, poisson, registry, written
from typer.testing import CliRunner

from autopoiesis.arms.allocation import Allocation, Cell
from autopoiesis.arms.arm import Arm, State
from autopoiesis.arms.registry import Registry, UnknownArmError
from autopoiesis.cli import app
from autopoiesis.orchestrator.catalogue import show_guard_rails
from autopoiesis.orchestrator.governor import Command, Governor
from autopoiesis.orchestrator.holding import same_cells
from autopoiesis.orchestrator.loop import WindowLoop
from autopoiesis.orchestrator.rails import Order, OrderError, obey
from autopoiesis.orchestrator.registrar import Said
from autopoiesis.orchestrator.rollback import last_good
from autopoiesis.telemetry.records import EventRow, GuardRails, WindowRow
from autopoiesis.telemetry.store import Store

A, B, C = ("a" * 12, "b" * 12, "c" * 12)
ALICE = Said("alice", "because")


def over(*arms: str, window: int = 0) -> Allocation:
    """Return an allocation that gives each arm one replica and its part of the shards."""
    size = 64 // len(arms)
    return Allocation(
        window,
        tuple(
            Cell(arm, (f"r{i}",), tuple(range(i * size, (i + 1) * size)), 0.5)
            for i, arm in enumerate(arms)
        ),
    )


def nothing(_arms: object) -> None:
    return None


def ordered(rails: GuardRails, order: Order, arms: Registry, **more: object) -> GuardRails:
    return obey(rails, order, arms, over(A), nothing, **more)  # type: ignore[arg-type]


# --- orders ----------------------------------------------------------------------------------------


def test_freezing_holds_what_serves_until_it_is_unfrozen():
    arms = registry(*human("random", "least-requests"))
    frozen = ordered(GuardRails(), Order.FREEZE, arms)
    assert (frozen.frozen, frozen.held) == (True, over(A))
    assert obey(frozen, Order.FREEZE, arms, over(B), nothing).held == over(A)
    both = ordered(frozen, Order.DRY_RUN, arms)
    assert ordered(both, Order.UNFREEZE, arms) == GuardRails(dry_run=True, held=over(A))
    assert ordered(both, Order.DRY_RUN, arms, on=False) == frozen
    assert ordered(frozen, Order.UNFREEZE, arms) == GuardRails()
    assert ordered(both, Order.RELEASE, arms) == GuardRails()


def test_who_has_everything_must_serve_and_may_serve():
    random, least = human("random", "least-requests")
    canary, candidate = (
        written(SHED_ALL, "canary"),
        written(LEAST_REQUESTS_BUT_ELSEWHERE, "cand", State.CANDIDATE),
    )
    arms = registry(random, least, canary, candidate)
    all_to_canary = ordered(GuardRails(), Order.ALLOCATE, arms, arm="canary")
    assert all_to_canary.only == canary.id
    only_human = ordered(all_to_canary, Order.HUMAN_ONLY, arms)
    assert only_human == GuardRails(human_only=True)
    assert ordered(only_human, Order.ALLOCATE, arms, arm="random").only == arms.get("random").id
    with pytest.raises(OrderError, match="not written by people"):
        ordered(only_human, Order.ALLOCATE, arms, arm="canary")
    with pytest.raises(OrderError, match="promote it first"):
        ordered(GuardRails(), Order.ALLOCATE, arms, arm="cand")
    with pytest.raises(UnknownArmError):
        ordered(GuardRails(), Order.ALLOCATE, arms, arm="nobody")
    with pytest.raises(OrderError, match="No human arm"):
        ordered(GuardRails(), Order.HUMAN_ONLY, registry(canary))


@pytest.mark.parametrize("held", [GuardRails(frozen=True), GuardRails(dry_run=True)])
def test_while_the_allocation_is_held_it_is_not_ordered_otherwise(held: GuardRails):
    arms = registry(*human("random", "least-requests"))
    for order in (Order.ALLOCATE, Order.HUMAN_ONLY):
        with pytest.raises(OrderError, match="stays as it is"):
            ordered(held, order, arms, arm="random")


# --- rolling back ----------------------------------------------------------------------------------


def window_row(window: int, utility: float | None) -> WindowRow:
    return WindowRow(
        window, window * 10.0, window * 10.0 + 10.0, {}, {}, 50, 50, 0, 0, 1.0, None, None, None, None, 1.0, utility,
        None, None, None, "", 0.0,
    )  # fmt: skip


def history(*served: tuple[tuple[str, ...], float | None]) -> Store:
    """Return telemetry in which these arms served one window after the other, with these utilities."""
    store = Store.open(Path(":memory:"))
    for window, (arms, _) in enumerate(served):
        store.write_allocation(over(*arms, window=window))
    for window, (_, utility) in enumerate(served):
        store.write_window(window_row(window, utility))
    return store


def found(store: Store, *arms: str) -> int | None:
    good = last_good(store.query, arms or (A, B, C))
    return good.window if good else None


def test_the_allocation_before_a_bad_change_is_the_last_good_one():
    with history(((A,), 0.9), ((A,), 0.92), ((A, B), 0.91), ((A, B), 0.9), ((C,), 0.2)) as store:
        assert found(store) == 3
        assert found(store, A, C) == 1  # B serves no more


def test_a_short_detour_that_was_worse_is_passed_over():
    rounds = [((A,), 0.9), ((A,), 0.92), ((A,), 0.91), ((B,), 0.5), ((C,), 0.2), ((C,), 0.1)]
    with history(*rounds) as store:
        assert found(store) == 2


def test_what_serves_now_and_windows_without_requests_are_nothing_to_go_back_to():
    with history(((A,), 0.9), ((A,), 0.8)) as store:
        assert found(store) is None
    with history(((B,), None), ((A,), 0.8)) as store:
        assert found(store) is None
    with Store.open(Path(":memory:")) as store:
        assert found(store) is None


def test_arms_that_take_turns_are_compared_over_all_their_windows():
    turns = [
        ((A,), 0.9),
        ((B,), 0.5),
        ((A,), 0.92),
        ((B,), 0.55),
        ((A,), 0.88),
        ((B,), 0.5),
        ((C,), 0.1),
    ]
    with history(*turns) as store:
        assert found(store) == 4
    with history(((A,), 0.9), ((B,), 0.88), ((C,), 0.1)) as store:
        assert found(store) == 0  # nothing tells how much a window varies: the best it is


def test_rolling_back_freezes_the_good_one_and_is_told_and_kept(tmp_path: Path):
    random, least = human("random", "least-requests")
    with history(((random.id,), 0.9), ((random.id,), 0.9), ((least.id,), 0.2)) as store:
        arms = Registry(store)
        for arm in (random, least):
            arms.add(arm)
        told: list[EventRow] = []
        constrained: list[GuardRails] = []
        governor = Governor(arms, store, told.append, constrained.append)
        governor.obey(Command(Order.ROLLBACK), ALICE, 3, store.load_allocation())
        assert governor.rails.frozen
        assert governor.rails.held
        assert governor.rails.held.arms() == (random.id,)
        assert [rails.frozen for rails in constrained] == [False, True]
        assert store.load_guard_rails() == governor.rails
        message = "rolled back to the allocation of window 1, frozen by alice: because"
        assert [event.message for event in told] == [message]
        assert store.query("select kind, subject, message from events").rows == [
            ["operator", "rollback", message]
        ]
        shown = show_guard_rails(store.query)
        assert (shown["in_force"], shown["held_window"], shown["reason"]) == ("frozen", 1, message)
        assert Governor(arms, store, told.append, constrained.append).rails == governor.rails


def test_without_anything_to_go_back_to_nothing_is_changed():
    with Store.open(Path(":memory:")) as store:
        arms = Registry(store)
        for arm in human("random"):
            arms.add(arm)
        governor = Governor(arms, store, lambda _e: None, lambda _r: None)
        with pytest.raises(OrderError, match="no earlier allocation"):
            governor.obey(Command(Order.ROLLBACK), ALICE, 0, None)
        assert store.load_guard_rails() == GuardRails()
        assert store.query("select count(*) from events").rows == [[0]]


def test_an_arm_that_serves_no_more_does_not_keep_everything():
    with Store.open(Path(":memory:")) as store:
        arms = Registry(store)
        for arm in (*human("random"), written(SHED_ALL, "canary")):
            arms.add(arm)
        governor = Governor(arms, store, lambda _e: None, lambda _r: None)
        governor.obey(Command(Order.ALLOCATE, "canary"), ALICE, 0, None)
        governor.follow(1)
        assert governor.rails.only
        arms.move("canary", State.QUARANTINED, "errors")
        governor.follow(2)
        assert governor.rails == store.load_guard_rails() == GuardRails()
        assert (
            "canary serves no more"
            in store.query("select message from events order by rowid").rows[-1][0]
        )


# --- the loop under orders -------------------------------------------------------------------------


def drive(*arms: Arm, rate_rps: float = 24.0) -> Drive:
    return Drive(registry(*arms), poisson(3, rate_rps, 200, 500, 100))


def frozen_at(run: Drive) -> GuardRails:
    return GuardRails(frozen=True, held=run.allocations[-1])


def messages(run: Drive) -> list[str]:
    return [event.message for settled in run.settled for event in settled.events]


def test_while_frozen_nothing_moves_and_learning_goes_on():
    refuser = written(SHED_ALL, "refuser")
    run = drive(*human("random", "least-requests"), refuser)
    run.loop.welcome(refuser.id, None, 0.3, 50.0)
    run.run(1)
    while refuser.id not in run.allocations[-1].arms() and run.window < 8:
        run.run(1)
    assert refuser.id in run.allocations[-1].arms()
    # The window in which the refuser serves has just ended, and the guard has taken it out.
    run.loop.registry.move(refuser.id, State.CANARY, "for the test")
    run.loop.constrain(frozen_at(run))
    before, believed = run.allocations[-1], run.loop.beliefs.to_arrays()
    states = {arm.id: arm.state for arm in run.loop.registry.all()}
    run.run(5)
    assert all(same_cells(before, allocation) for allocation in run.allocations[-5:])
    assert {arm.id: arm.state for arm in run.loop.registry.all()} == states
    assert sum("would be quarantined (frozen)" in told for told in messages(run)) == 1
    assert not np.array_equal(believed["bandit/mean"], run.loop.beliefs.to_arrays()["bandit/mean"])
    assert "(frozen)" in run.loop.why(run.allocations[-1], run.allocations[-2])
    run.loop.constrain(GuardRails(only=refuser.id))
    run.run(1)
    assert run.loop.registry.get(refuser.id).state is State.QUARANTINED


def test_while_frozen_the_fleet_may_shrink_and_grow():
    loop = WindowLoop(registry(*human("random", "least-requests")), OBJECTIVE, 0)
    first = loop.next_allocation(0, fleet(6))
    loop.constrain(GuardRails(frozen=True, held=first))
    for window, there in enumerate(([0, 1, 2, 4, 5], [5], [0, 1, 2, 3, 4, 5]), start=1):
        allocation = loop.next_allocation(window, [fleet(6)[i] for i in there])
        assert sorted(r for c in allocation.cells for r in c.replicas) == [f"r{i}" for i in there]
        assert sum(len(c.shards) for c in allocation.cells) == 64
    assert same_cells(allocation, first)
    assert "joined" in loop.why(allocation, loop.next_allocation(3, fleet(3)))


def test_no_synthesis_is_asked_for_while_frozen():
    run = Drive(registry(*human("random")), poisson(3, 30, 60, 2500, 200))
    run.run(1)
    run.loop.constrain(frozen_at(run))
    run.run(8)
    assert all(settled.trigger is None for settled in run.settled)
    assert any(told.startswith("not asked (frozen): best arm below") for told in messages(run))


def test_with_human_arms_only_the_others_wait_in_their_state():
    newcomer = written(LEAST_REQUESTS_BUT_ELSEWHERE, "newcomer")
    run = drive(*human("random", "least-requests"), newcomer)
    run.loop.welcome(newcomer.id, None, 0.3, 50.0)
    run.loop.constrain(GuardRails(human_only=True))
    run.run(6)
    assert max(run.share(newcomer.id)) == 0.0
    assert run.loop.registry.get(newcomer.id).state is State.CANARY
    run.loop.constrain(GuardRails())
    run.run(6)
    assert max(run.share(newcomer.id)) > 0.0


def test_in_a_dry_run_the_loop_says_what_it_would_do():
    worse, better = sorted(
        human("random", "least-requests"), key=lambda arm: arm.name == "least-requests"
    )
    run = Drive(registry(worse, better), poisson(0, 26, 200, 1200, 150))
    run.loop.constrain(GuardRails(only=worse.id))
    run.run(1)
    run.loop.constrain(GuardRails(dry_run=True, held=run.allocations[-1]))
    run.run(8)
    assert run.share(worse.id) == [1.0] * 9
    assert run.loop.proposed
    proposed, why = run.loop.proposed
    assert proposed.share(better.id) > 0.5
    assert "least-requests leads" in why
    assert "dry run" in why
    run.loop.constrain(GuardRails())
    run.run(3)
    assert run.loop.proposed is None
    assert run.share(better.id)[-1] > 0.5


def test_orders_end_a_switchback():
    good = written(LEAST_REQUESTS_BUT_ELSEWHERE, "newcomer", State.LIVE)
    run = drive(*human("random"), good, rate_rps=26.0)
    run.loop.welcome(good.id, None, 0.2, 50.0)
    while run.loop.lifecycle.switchback is None and run.window < 20:
        run.run(1)
    assert run.loop.lifecycle.switchback
    run.loop.constrain(GuardRails(human_only=True))
    assert run.loop.lifecycle.switchback is None
    run.run(3)
    assert run.share(good.id)[-3:] == [0.0] * 3


def test_every_change_of_allocation_has_a_reason():
    good = written(LEAST_REQUESTS_BUT_ELSEWHERE, "newcomer", State.LIVE)
    refuser = written(
        SHED_ALL, "refuser"
    )  # on trial before the twin is proven and would foresee harm
    run = drive(*human("random", "least-requests", "round-robin"), good, refuser)
    whys: list[str] = []
    for _ in range(25):
        run.run(1)
        before, after = [None, *run.allocations][-2:]
        if before is None or not same_cells(before, after):
            whys.append(run.loop.why(after, before))
    assert len(whys) > 3
    assert all(why.endswith(")") and not why.endswith("()") for why in whys)
    assert any("leads" in why for why in whys)
    assert any("challenges" in why or "is on trial" in why for why in whys)
    assert any("refuser is quarantined" in why for why in whys)


def test_a_loop_that_was_killed_while_frozen_goes_on_as_it_was():
    run = drive(*human("random", "least-requests")).run(3)
    rails = frozen_at(run)
    resumed = WindowLoop(run.loop.registry, OBJECTIVE, 0, state=run.loop.state())
    for loop in (run.loop, resumed):
        loop.constrain(rails)
    one, other = (loop.next_allocation(3, run.fleet) for loop in (run.loop, resumed))
    assert (
        one
        == other
        == replace(one, cells=tuple(replace(c, propensity=1.0) for c in run.allocations[-1].cells))
    )


# --- commands --------------------------------------------------------------------------------------


def test_a_stopped_instance_keeps_orders_for_its_next_start(tmp_path: Path):
    def control(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["control", *words, "--data-dir", str(tmp_path / "data")])
        assert done.exit_code == code, done.output
        return done.stdout if code == 0 else done.stderr

    assert json.loads(control("show", "--json", "-"))["in_force"] == "nothing: the loop decides"
    assert not (tmp_path / "data").exists()
    assert "In force: everything to random" in control("allocate", "random", "--why", "a test")
    assert "human arms only, everything to random" in control("human-only")
    assert json.loads(control("freeze", "--json", "-"))["frozen"]
    assert "stays as it is" in control("allocate", "random", code=2)
    assert "no earlier allocation" in control("rollback", code=2)
    assert "frozen, dry run" in control("dry-run", "on")
    assert "human arms only" in control("unfreeze")
    assert "on" in control("dry-run", "maybe", code=2)
    told = json.loads(control("show", "--json", "-"))
    assert (told["frozen"], told["dry_run"], told["human_only"]) == (False, True, True)
    with Store.open(tmp_path / "data/telemetry.duckdb") as store:
        assert (
            store.load_guard_rails().only
            == store.query("select id from arms where name = 'random'").rows[0][0]
        )
        assert store.query("select count(*) from events where kind = 'operator'").rows == [[5]]
    assert "all guard rails lifted" in control("release")
