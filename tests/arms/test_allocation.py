import random

from autopoiesis.arms.allocation import SHARDS, Allocation, Cell, shard_of


def test_allocation_by_arm():
    allocation = Allocation(
        7,
        (
            Cell("a", ("r0", "r1"), tuple(range(32))),
            Cell("b", ("r2",), tuple(range(32, 48)), 0.2),
            Cell("a", ("r3",), tuple(range(48, 64))),
        ),
    )
    assert allocation.arms() == ("a", "b")
    assert allocation.share("a") == 0.75
    assert allocation.share("nobody") == 0.0
    assert allocation.group("a") == ("r0", "r1", "r3")
    assert allocation.group("b") == ("r2",)


def test_shards_are_even_and_in_range():
    rng = random.Random(3)
    for keys in (range(64_000), [rng.getrandbits(64) - 2**63 for _ in range(64_000)]):
        counts = [0] * SHARDS
        for key in keys:
            counts[shard_of(key)] += 1
        assert min(counts) > 800
        assert max(counts) < 1200
