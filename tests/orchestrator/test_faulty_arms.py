"""Arms whose decisions fail are taken off, and the last one that serves stays."""

import asyncio
from dataclasses import replace

import pytest

from autopoiesis.arms.arm import State
from autopoiesis.gateway.link import PickerLink
from autopoiesis.orchestrator.controller import MOST_FAULTS, Controller
from autopoiesis.orchestrator.observation import Observation
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.fleet import Member
from autopoiesis.telemetry.records import ReplicaSample
from autopoiesis.telemetry.store import Store

MEMBER = Member("r", "127.0.0.1:1", "h100-llama-3-8b-tp1-bf16")


@pytest.fixture
def controller(tmp_path):
    settings = Settings(data_dir=tmp_path)
    with Store.open(settings.telemetry_file) as store:
        yield Controller(settings, store, (MEMBER,), PickerLink(tmp_path / "link"))


def test_an_arm_is_taken_off_after_some_faults(controller):
    faulty, other = controller.registry.serving()[:2]
    controller._faults.update({faulty.id: MOST_FAULTS, other.id: MOST_FAULTS - 1, "": 99})
    controller._take_off_the_faulty(5.0)

    assert State.QUARANTINED == controller.registry.get(faulty.id).state
    assert f"{MOST_FAULTS} of its decisions failed" == controller.registry.get(faulty.id).reason
    assert State.LIVE == controller.registry.get(other.id).state
    assert faulty.id not in {arm.id for arm in controller.registry.serving()}
    assert any(event.subject == faulty.name for event in controller._events)


def test_the_last_live_arm_stays(controller):
    *others, last = controller.registry.serving()
    controller._faults.update({arm.id: MOST_FAULTS for arm in (*others, last)})
    controller._take_off_the_faulty(5.0)

    assert 1 == len(controller.registry.serving())
    assert any("not taken off" in event.message for event in controller._events)


def test_a_dead_replica_does_not_count_in_capacity(tmp_path):
    members = tuple(replace(MEMBER, name=f"r{i}", address=f"127.0.0.1:{i + 1}") for i in range(3))
    settings = Settings(data_dir=tmp_path)
    with Store.open(settings.telemetry_file) as store:
        controller = Controller(settings, store, members, PickerLink(tmp_path / "link"))
        seen: list[Observation] = []
        controller._loop.settle = seen.append
        controller._fleet.saw(sample("r1", healthy=False))
        controller._allocate(0.0)
        asyncio.run(controller._close_window(0.0, 10.0))
        assert ["r0", "r2"] == [replica.name for replica in seen[0].replicas]
        served = {r for cell in controller.status.allocation.cells for r in cell.replicas}
        assert {"r0", "r2"} == served
        for name in ("r0", "r2"):
            controller._fleet.saw(sample(name, healthy=False))
        asyncio.run(controller._close_window(10.0, 20.0))
        # With all of them gone there is nobody to choose from, and whoever comes back has traffic at once.
        assert ["r0", "r1", "r2"] == [replica.name for replica in seen[1].replicas]
        assert 3 == sum("does not answer" in event.message for event in controller._events)


def sample(name: str, *, healthy: bool) -> ReplicaSample:
    return ReplicaSample(1.0, name, "127.0.0.1:1", healthy, 0, 0, 0, 0.0, 0, 0, 0)
