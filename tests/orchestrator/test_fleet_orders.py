"""An operator's orders change replicas one at a time, and never below the minimum."""

from dataclasses import replace

import pytest
from traffic import fleet

from autopoiesis.orchestrator.capacity import Standing
from autopoiesis.orchestrator.fleet_orders import FleetCommand, FleetOrder, FleetOrders
from autopoiesis.orchestrator.live_capacity import LiveBackend
from autopoiesis.orchestrator.rails import OrderError
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.limits import Limits
from autopoiesis.replicas.targets import Target, TargetFile, Want
from autopoiesis.telemetry.records import Reconfiguration, ReplicaSample

SPECS = {f"r{i}": replace(spec, name=f"r{i}") for i, spec in enumerate(fleet(3))}


class Scene:
    """A supervisor that does at once what it is told, and replicas that are idle and well."""

    def __init__(self, folder, minimum=1, fails=(), **fields):
        self.members = [
            Member(name, f"127.0.0.1:{8000 + i}", "h100-llama-3-8b-tp1-bf16", **fields)
            for i, name in enumerate(SPECS)
        ]
        self.targets = TargetFile(folder / "targets.json")
        self.backend = LiveBackend(self.members, lambda m: SPECS[m.name], self.targets)
        self.said = []
        self.orders = FleetOrders(
            self.backend, minimum, 1, lambda name, told: self.said.append(f"{name}: {told}")
        )
        self.fails = set(fails)
        self.now_s = 100.0
        self.done = {}
        self.most_away = 0

    def take(self, order, *names, max_num_seqs=0):
        return self.orders.take(FleetCommand(FleetOrder(order), names, Limits(max_num_seqs)))

    def ready(self):
        return [n for n in SPECS if self.backend.standing(n) is Standing.READY]

    def pass_time(self, steps=60):
        for _ in range(steps):
            self.now_s += 0.5
            self.supervise()
            serving = {n: 1 for n in SPECS if self.backend.takes_traffic(n)}
            samples = [
                ReplicaSample(self.now_s, m.name, m.address, True, 0, 0, 0, 0.0, 0, 0, 0)
                for m in self.backend.members.values()
                if m.serves
            ]
            self.backend.saw(samples, serving)
            self.orders.go_on()
            self.most_away = max(self.most_away, len(SPECS) - len(self.ready()))

    def supervise(self):
        for name, target in self.targets.read().items():
            if self.done.get(name) == target:
                continue
            before, self.done[name] = self.done.get(name, Target()), target
            if (before.want, before.restart) == (target.want, target.restart):
                continue  # it is so already: limits were taken back
            on = target.want is Want.ON
            restarted = target.restart != before.restart
            action = "restart" if restarted else "start" if on else "stop"
            error = "it does not fit" if name in self.fails and restarted else ""
            members = list(self.backend.members.values())
            self.backend.follow([replace(m, serves=on) if m.name == name else m for m in members])
            change = Reconfiguration(name, action, self.now_s, 0.1, error=error)
            self.backend.heard(change)
            self.orders.heard(change)


def test_a_rolling_restart_gives_every_replica_new_limits_one_after_the_other(tmp_path):
    scene = Scene(tmp_path, minimum=2)
    assert scene.take("restart", max_num_seqs=8) == ("r0", "r1", "r2")
    with pytest.raises(OrderError, match="still being carried out"):
        scene.take("stop", "r0")
    scene.pass_time()
    assert scene.most_away == 1
    assert not scene.orders.pending
    told = scene.orders.told()
    assert [(r["standing"], r["max_num_seqs"], r["ordered"]) for r in told] == [
        ("ready", 8, "")
    ] * 3


def test_after_a_restart_that_fails_the_others_stay_as_they_are(tmp_path):
    scene = Scene(tmp_path, fails=["r0"])
    before = scene.orders.told()
    scene.take("restart", max_num_seqs=8)
    scene.pass_time()
    after = scene.orders.told()
    assert after[0].pop("error") == "it does not fit"
    assert before[0].pop("error") == ""
    assert before == after
    assert "r0: the order ends here; r1, r2 stay as they are" in scene.said


def test_a_stopped_replica_is_off_until_it_is_started(tmp_path):
    scene = Scene(tmp_path)
    scene.take("stop", "r1")
    scene.pass_time()
    assert scene.ready() == ["r0", "r2"]
    assert scene.backend.standing("r1") is Standing.OFF
    with pytest.raises(OrderError, match="r1 is off already"):
        scene.take("restart", "r1")
    assert scene.take("start") == ("r1",)
    scene.pass_time()
    assert scene.ready() == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("order", "names", "fields", "says"),
    [
        ("stop", ("r0", "r1", "r2"), {}, "at least 1 must serve"),
        ("stop", ("nobody",), {}, "There is no replica nobody; there are: r0, r1, r2"),
        ("stop", (), {}, "Name the replicas to stop"),
        ("start", (), {}, "no replica to start"),
        ("start", ("r0",), {}, "r0 is ready"),
        ("sleep", ("r0",), {}, "--enable-sleep-mode"),
        ("restart", ("r0",), {"kind": "remote"}, "r0 runs elsewhere"),
        ("restart", (), {"kind": "remote"}, "no replica to restart"),
    ],
)
def test_what_cannot_be_ordered_is_refused_with_its_reason(tmp_path, order, names, fields, says):
    scene = Scene(tmp_path, **fields)
    with pytest.raises(OrderError, match=says):
        scene.take(order, *names)
    assert not scene.orders.pending


def test_a_remote_replica_that_is_stopped_only_gets_no_traffic(tmp_path):
    scene = Scene(tmp_path, kind="remote")
    scene.take("stop", "r2")
    scene.pass_time()
    assert scene.ready() == ["r0", "r1"]
    scene.take("start", "r2")
    scene.pass_time()
    assert scene.ready() == ["r0", "r1", "r2"]
