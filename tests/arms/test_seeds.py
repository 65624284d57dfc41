"""Each seed arm behaves as the policy it is named after."""

from collections import Counter

import numpy as np
import pytest

from autopoiesis.arms import features as f
from autopoiesis.arms import fleet as k
from autopoiesis.arms.arm import Origin, State
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms

PROGRAMS = {arm.name: compile_policy(verify(arm.source)) for arm in seed_arms()}
BLOCKS = np.arange(1, 65, dtype=np.int64)  # 64 blocks of 16 tokens


class Scene:
    """Four replicas, and what a seed decides on them."""

    def __init__(self, name, replicas=4):
        self.program = PROGRAMS[name]
        self.state = k.fleet_state(replicas, Objective(1.0, 0.1), 512, 16)
        self.group = k.group_of(np.arange(replicas), 1.0)
        for r in range(replicas):
            k.join(self.state, r, 1.0, 512, 0.0)

    def set(self, r, **values):
        for name, value in values.items():
            self.state.replica[r, f.Replica._fields.index(name)] = value

    def registers(self, tokens=1000.0, draw=0.5, priority=0.0, waited_s=0.0):
        registers = self.program.registers.copy()
        k.describe_request(registers, self.state, tokens, 100.0, priority, waited_s)
        k.describe_fleet(registers, self.state, self.group, 1.0, draw)
        return registers

    def order(self, tokens=1000.0, draw=0.5, session=0, blocks=BLOCKS[:0]):
        order = np.zeros(len(self.group.members), np.int64)
        registers = self.registers(tokens, draw)
        n = k.place(self.program, registers, self.state, self.group, blocks, session, 1.0, order)
        return order[:n].tolist()

    def first(self, **request):
        return self.order(**request)[0]

    def urgency(self, **request):
        return k.urgency(self.program, self.registers(**request))

    def admits(self, **request):
        return k.admits(self.program, self.registers(**request))


def test_seeds_are_live_human_arms_with_an_origin():
    arms = seed_arms()
    assert len(arms) >= 12
    assert len({arm.id for arm in arms}) == len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        assert arm.origin == Origin.HUMAN
        assert arm.state == State.LIVE
        assert arm.id == verify(arm.source).id
        assert len(arm.thought) > 20
        assert arm.reason


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_seed_orders_all_usable_replicas_and_survives_extremes(name):
    scene = Scene(name)
    assert sorted(scene.order()) == [0, 1, 2, 3]
    scene.set(2, draining=1)
    assert sorted(scene.order()) == [0, 1, 3]
    for value in (0.0, 1e308, -1e308):
        scene.state.replica[:, :12] = value
        assert len(scene.order(tokens=abs(value))) in {0, 3}
    alone = Scene(name, replicas=1)
    assert alone.order() == [0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_seed_herds_on_an_idle_fleet(name):
    scene = Scene(name)
    rng = np.random.default_rng(2)
    firsts = Counter()
    for _ in range(200):
        order = scene.order(draw=rng.random())
        firsts[order[0]] += 1
        k.dispatch(scene.state, order[0], 1000.0, BLOCKS[:0], 0)
        k.finish(scene.state, order[0], 1000.0, 1100.0, False, 0.0, 0.0, False)
    assert min(firsts[r] for r in range(4)) > 25, firsts


def test_round_robin():
    scene = Scene("round-robin")
    assert [scene.order() for _ in range(5)] == [
        [0, 1, 2, 3],
        [1, 2, 3, 0],
        [2, 3, 0, 1],
        [3, 0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_random():
    scene = Scene("random")
    rng = np.random.default_rng(1)
    firsts = Counter(scene.first(draw=rng.random()) for _ in range(4000))
    assert all(900 < firsts[r] < 1100 for r in range(4))


def test_least_requests():
    scene = Scene("least-requests")
    for r, in_flight in enumerate([3, 1, 2, 4]):
        scene.set(r, in_flight=in_flight)
    assert scene.order() == [1, 2, 0, 3]
    scene.set(3, speed=4.0)  # five of its requests take as long as one and a quarter
    assert scene.order() == [3, 1, 2, 0]


def test_power_of_two_takes_the_less_loaded_of_two_uniform_draws():
    scene = Scene("power-of-two")
    for r, in_flight in enumerate([3, 0, 2, 1]):
        scene.set(r, in_flight=in_flight)
    rng = np.random.default_rng(4)
    firsts = Counter(scene.first(draw=rng.random()) for _ in range(6000))
    # Of the 6 pairs, the least loaded replica is in 3, the next one best in 2, the next in 1.
    assert firsts[0] == 0
    for r, share in [(1, 3 / 6), (3, 2 / 6), (2, 1 / 6)]:
        assert firsts[r] / 6000 == pytest.approx(share, abs=0.03)


def test_session_affinity():
    scene = Scene("session-affinity")
    k.dispatch(scene.state, 2, 10.0, BLOCKS[:0], 77)
    scene.set(2, in_flight=500)
    assert scene.first(session=77) == 2
    assert scene.first(session=78) != 2
    assert scene.first() != 2


def test_prefix_affinity_follows_the_prefix_until_the_load_is_uneven():
    scene = Scene("prefix-affinity")
    k.dispatch(scene.state, 3, 1024.0, BLOCKS, 0)
    k.dispatch(scene.state, 1, 1024.0, BLOCKS[:40], 0)
    assert scene.order(blocks=BLOCKS, tokens=1024.0)[:2] == [3, 1]
    scene.set(3, in_flight=30)
    assert scene.order(blocks=BLOCKS, tokens=1024.0)[0] == 1
    assert scene.order(blocks=BLOCKS, tokens=1024.0)[-1] == 3
    assert scene.first(blocks=BLOCKS[:5], tokens=1024.0) in {0, 2}  # too little in common


def test_weighted_scorer_weighs_queue_memory_and_prefix():
    scene = Scene("weighted-scorer")
    for r in range(4):
        scene.set(r, in_flight=4)
    scene.set(1, kv_usage=0.9)
    scene.set(2, in_flight=8)
    assert set(scene.order()[:2]) == {0, 3}
    scene.set(0, waiting=9)
    assert scene.first() == 3
    k.dispatch(scene.state, 1, 1024.0, BLOCKS, 0)
    assert scene.first(blocks=BLOCKS, tokens=1024.0) == 1  # the prefix outweighs memory ...
    scene.set(1, in_flight=40, kv_usage=1.0)
    assert scene.first(blocks=BLOCKS, tokens=1024.0) == 3  # ... but not queue and memory


def test_least_tokens():
    scene = Scene("least-tokens")
    scene.set(0, in_flight=1, queued_prefill_tokens=9000)
    scene.set(1, in_flight=20, queued_prefill_tokens=100, decoding_tokens=2000)
    scene.set(2, in_flight=2, decoding_tokens=30000)
    scene.set(3, in_flight=9, queued_prefill_tokens=1000)
    assert scene.order() == [1, 3, 2, 0]
    k.dispatch(scene.state, 3, 1024.0, BLOCKS, 0)
    scene.set(3, queued_prefill_tokens=1000)
    assert scene.first(blocks=BLOCKS, tokens=1024.0) == 3  # 501 to compute less 1,023 cached


def test_least_predicted_ttft():
    scene = Scene("least-predicted-ttft")
    scene.set(0, queued_prefill_tokens=5000)
    scene.set(1, queued_prefill_tokens=5000, speed=3.0)
    scene.set(2, kv_usage=0.99)
    scene.set(3, waiting=30)
    assert scene.order() == [1, 0, 3, 2]


def test_least_kv():
    scene = Scene("least-kv")
    for r, usage in enumerate([0.5, 0.2, 0.4, 0.3]):
        scene.set(r, kv_usage=usage, in_flight=10, running=10)
    assert scene.order() == [1, 3, 2, 0]
    scene.set(1, in_flight=40)  # thirty that it has not reported yet
    assert scene.order() == [3, 2, 1, 0]


@pytest.mark.parametrize("name", ["shortest-prompt-first", "deadline-slack"])
def test_queueing_seeds_hold_while_every_replica_has_a_full_step_queued(name):
    scene = Scene(name)
    for r in range(4):
        scene.set(r, queued_prefill_tokens=9000, in_flight=3)
    assert scene.order() == []
    scene.set(2, queued_prefill_tokens=8000)
    assert scene.first() == 2
    scene.set(2, in_flight=256)
    assert scene.order() == []


def test_shortest_prompt_first_with_ageing():
    scene = Scene("shortest-prompt-first")
    assert scene.urgency(tokens=100.0) < scene.urgency(tokens=200.0)
    assert scene.urgency(tokens=4000.0, waited_s=5.0) < scene.urgency(tokens=200.0)


def test_least_slack_first():
    scene = Scene("deadline-slack")
    assert scene.urgency(waited_s=0.8) < scene.urgency(waited_s=0.3)
    assert scene.urgency(tokens=8000.0) < scene.urgency(tokens=100.0)
    late = scene.urgency(waited_s=1.5)
    assert late > scene.urgency(waited_s=0.0)  # it has missed already: others first,
    assert scene.urgency(waited_s=6.0) > late  # and the least late before the later
    assert scene.urgency(priority=-1.0) < scene.urgency(waited_s=0.8)


def test_shedding_when_saturated():
    scene = Scene("shed-when-saturated")
    for i in range(200):
        k.arrive(scene.state, 500.0, i * 0.1)  # 10 a second
    assert scene.admits()
    scene.group.counters[1] = 15  # held for a second and a half: clients still wait
    assert scene.admits()
    scene.group.counters[1] = 60
    assert not scene.admits()
    assert scene.admits(priority=-1.0)
    scene.group.counters[1] = 0
    for r in range(4):
        scene.set(r, kv_usage=0.99, in_flight=100)
    assert not scene.admits()
    scene.set(0, kv_usage=0.5)
    assert scene.admits()
