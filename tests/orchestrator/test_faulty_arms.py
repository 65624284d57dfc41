"""Arms whose decisions fail are taken off, and the last one that serves stays."""

import pytest

from autopoiesis.arms.arm import State
from autopoiesis.gateway.link import PickerLink
from autopoiesis.orchestrator.controller import MOST_FAULTS, Controller
from autopoiesis.orchestrator.settings import Settings
from autopoiesis.replicas.fleet import Member
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
