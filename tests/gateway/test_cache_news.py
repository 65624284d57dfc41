"""The prefix index follows what a replica's KV events tell, and what a replica does not tell is not 0."""

import asyncio
from collections import OrderedDict

import numpy as np
import pytest

from autopoiesis.arms import fleet
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway.ledger import Ledger
from autopoiesis.gateway.state import GatewayState
from autopoiesis.gateway.watch import ReplicaWatch
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.kv_events import News
from autopoiesis.replicas.scrape import Health, Scrape

BLOCK = 256
FITS = 64 * BLOCK
POLICY = verify("def score(request, replica, fleet):\n    return replica.in_flight\n")


class Listener:
    def __init__(self):
        self.samples, self.faults = [], []

    def sampled(self, sample):
        self.samples.append(sample)

    def changed(self):
        pass

    def fault(self, arm_id, message):
        self.faults.append(message)


@pytest.fixture
def state():
    state = GatewayState(
        Objective(), (POLICY.id, compile_policy(POLICY)), np.random.default_rng(0), lambda: 1.0
    )
    state.set_members([Member("r0", "127.0.0.1:1", "", kv_tokens=FITS)])
    return state


def send(state, blocks):
    """Send a prompt of these blocks; return the tokens expected in the cache."""
    tokens = len(blocks) * BLOCK + 1.0
    array = np.array(blocks, np.int64)
    return tokens - fleet.dispatch(state.membership.fleet, 0, tokens, array, 0)


def test_a_cleared_cache_is_forgotten(state):
    send(state, range(8))
    state.membership.cache_changed("r0", News(cleared=True))
    assert 0.0 == send(state, range(8))


def test_without_evictions_all_is_kept_and_with_them_the_oldest_goes_in_proportion(state):
    for prompt in range(10):
        send(state, [prompt])
    state.membership.cache_changed("r0", News(missed=2))
    assert 10 == state.membership.fleet.prefixes.used[0]
    for _ in range(3):  # 6.4 blocks of 64, three times: 10 %, of 10 blocks, then of 9, then of 8
        state.membership.cache_changed("r0", News(evicted_tokens=FITS // 10))
    assert 8 == state.membership.fleet.prefixes.used[0]
    assert (0.0, BLOCK) == (send(state, [0]), send(state, [9]))
    state.membership.cache_changed("r0", News(evicted_tokens=100 * FITS))
    assert 0 == state.membership.fleet.prefixes.used[0]
    state.membership.cache_changed("gone", News(cleared=True))


class Engine:
    """A prefix cache as vLLM's: least recently used blocks go, those of answers too."""

    def __init__(self, blocks):
        self.room, self.held = blocks, OrderedDict()

    def serve(self, prompt, answer):
        """Return how many leading blocks hit, and how many blocks were evicted."""
        hit = 0
        while hit < len(prompt) and prompt[hit] in self.held:
            hit += 1
        evicted = 0
        for block in reversed([*prompt, *answer]):
            self.held.pop(block, None)
            if len(self.held) == self.room:
                self.held.popitem(last=False)
                evicted += 1
            self.held[block] = None
        return hit, evicted


def error_of(state, told):
    """Replay conversations about 40 subjects; return the mean error of the expected hits [tokens]."""
    rng, engine, errors = np.random.default_rng(1), Engine(64), []
    for number in range(3000):
        subject = int(rng.zipf(1.3)) % 40
        prompt = [subject * 10 + i for i in range(4)]
        hit, evicted = engine.serve(prompt, [10_000 + number * 3 + i for i in range(3)])
        errors.append(abs(send(state, prompt) - hit * BLOCK))
        if told:
            state.membership.cache_changed("r0", News(evicted_tokens=evicted * BLOCK))
    return float(np.mean(errors[500:]))


def test_the_error_of_expected_hits_is_smaller_with_the_events(state):
    blind = error_of(state, told=False)
    state.membership.cache_changed("r0", News(cleared=True))
    assert error_of(state, told=True) < 0.5 * blind


@pytest.fixture
def listener():
    return Listener()


@pytest.fixture
async def watch(state, listener):
    watch = ReplicaWatch(state.membership, Ledger(state, lambda _record: None), listener)
    watch.follow([Member("r0", "127.0.0.1:1", "", kv_tokens=FITS)])
    yield watch
    watch.stop()
    await asyncio.sleep(0)


def seen(state):
    row = state.membership.fleet.replica[0]
    return tuple(float(row[i]) for i in (fleet.RUNNING, fleet.WAITING, fleet.KV_USAGE))


async def test_what_a_replica_does_not_tell_is_our_own_count(state, watch, listener):
    for prompt in range(4):
        send(state, [prompt])
    use = 4 * (BLOCK + 1.0) / FITS
    for told, expected in (
        (Scrape(running=1.0), (1.0, 3.0, use)),
        (Scrape(waiting=1.0), (3.0, 1.0, use)),
        (Scrape(), (4.0, 0.0, use)),
        (Scrape(running=9.0, kv_usage=0.0), (9.0, 0.0, 0.0)),
        (Scrape(running=1.0, waiting=0.0, kv_usage=0.5), (1.0, 0.0, 0.5)),
    ):
        watch.polled(Health("r0", told, healthy=True))
        assert expected == pytest.approx(seen(state))
        last = listener.samples[-1]
        assert expected == pytest.approx((last.running, last.waiting, last.kv_usage))


async def test_missed_events_are_told_once(state, watch, listener):
    watch.cache_changed("r0", News(missed=2))
    watch.cache_changed("r0", News(missed=5))
    assert ["2 messages of r0's KV events were missed"] == listener.faults
