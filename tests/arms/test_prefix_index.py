"""The flat-array prefix index against an OrderedDict."""

from collections import OrderedDict

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from lent import bucket_of, matching_blocks, remember

from autopoiesis.arms.prefix import (
    block_hashes,
    forget_oldest,
    forget_replica,
    prefix_index,
)


class LeastRecentlyUsed:
    def __init__(self, capacity):
        self.capacity = capacity
        self.blocks = OrderedDict()

    def remember(self, blocks):
        for block in reversed(blocks):
            if block in self.blocks:
                self.blocks.move_to_end(block)
            elif self.capacity:
                if len(self.blocks) == self.capacity:
                    self.blocks.popitem(last=False)
                self.blocks[block] = None

    def matching(self, blocks):
        count = 0
        while count < len(blocks) and blocks[count] in self.blocks:
            count += 1
        return count


def held_oldest_first(index, r):
    sentinel = index.key.shape[1]
    slot, found = index.newer[r, sentinel], []
    while slot != sentinel:
        found.append(int(index.key[r, slot]))
        slot = index.newer[r, slot]
    return found


LARGE = st.integers(-(2**63), 2**63 - 1)
SEQUENCES = st.one_of(
    st.lists(st.integers(-3, 12), max_size=9),
    st.lists(st.one_of(LARGE, st.sampled_from([0, 2**31, 2**62, -(2**63), 2**63 - 1])), max_size=5),
    st.integers(0, 40).flatmap(lambda n: st.just(list(range(n, n + 12)))),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["remember", "remember", "remember", "match", "evict", "forget"]),
        st.integers(0, 2),
        SEQUENCES,
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_index_is_an_lru_cache(steps):
    slots = 8
    capacities = [8, 3, 0]
    index = prefix_index(3, slots)
    index.capacity[:] = capacities
    oracle = [LeastRecentlyUsed(capacity) for capacity in capacities]
    for step, r, blocks in steps:
        array = np.array(blocks, np.int64)
        if step == "remember":
            remember(index, r, array)
            oracle[r].remember(blocks)
        elif step == "forget":
            forget_replica(index, r)
            oracle[r].blocks.clear()
        elif step == "evict":
            forget_oldest(index, r, len(blocks))
            for _ in range(min(len(blocks), len(oracle[r].blocks))):
                oracle[r].blocks.popitem(last=False)
        else:
            assert matching_blocks(index, r, array) == oracle[r].matching(blocks)
        for i in range(3):
            assert held_oldest_first(index, i) == list(oracle[i].blocks)
            assert index.used[i] == len(oracle[i].blocks)
            for block in oracle[i].blocks:
                assert 1 == matching_blocks(index, i, np.array([block], np.int64))


def test_a_long_prompt_keeps_its_head():
    index = prefix_index(1, 4)
    blocks = np.arange(10, dtype=np.int64)
    remember(index, 0, blocks)
    assert matching_blocks(index, 0, blocks) == 4


def test_buckets_spread_both_counters_and_hashes():
    index = prefix_index(1, 1024)
    rng = np.random.default_rng(5)
    for blocks in (np.arange(1024), rng.integers(-(2**63), 2**63 - 1, 1024), np.arange(1024) << 32):
        buckets = {bucket_of(index, block) for block in blocks.astype(np.int64)}
        # 1024 keys in 2048 buckets: a random function fills 1024 * (1 - exp(-1/2)) * 2 = 806.
        assert len(buckets) > 700


def test_block_hashes_are_chained_and_salted():
    text = "abcd" * 10
    hashes = block_hashes(text, chars=8)
    assert hashes.dtype == np.int64
    assert len(hashes) == 5
    assert len(set(hashes.tolist())) == 5  # equal blocks at other places hash otherwise
    assert (block_hashes(text[:-1], chars=8) == hashes[:4]).all()
    changed = block_hashes("X" + text[1:], chars=8)
    assert not set(changed.tolist()) & set(hashes.tolist())
    late = block_hashes(text[:-1] + "X", chars=8)
    assert (late[:4] == hashes[:4]).all()
    assert late[4] != hashes[4]
    assert block_hashes(text, b"salt", chars=8)[0] != hashes[0]
    assert len(block_hashes("", chars=8)) == 0
    assert len(block_hashes("\ud800" * 8, chars=8)) == 3  # three bytes each


@pytest.mark.parametrize("chars", [1, 1024])
def test_block_hashes_count_bytes(chars):
    assert len(block_hashes("x" * 2048, chars=chars)) == 2048 // chars
