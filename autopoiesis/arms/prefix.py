"""Prefix caches as flat arrays: per replica a bounded set of block hashes in LRU order.

A block's hash is chained on its parent's, so equal hashes mean equal prefixes. The gateway uses
this as its approximate index of what each replica has cached.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.kernels import entry, kernel

BLOCK_TOKENS = 256
"""Tokens per block where prompts are text; traces bring their own block size."""
CHARS_PER_TOKEN = 4
"""Characters of prompt text taken as one token until usage reports say better."""


def block_hashes(
    text: str, salt: bytes = b"", chars: int = BLOCK_TOKENS * CHARS_PER_TOKEN
) -> NDArray[np.int64]:
    """Hash the full blocks of a prompt, each chained on the one before; the partial tail has none."""
    data = text.encode("utf-8", "surrogatepass")
    count = len(data) // chars
    hashes = np.empty(count, np.int64)
    parent = hashlib.blake2b(salt, digest_size=8).digest()
    for i in range(count):
        parent = hashlib.blake2b(
            data[i * chars : (i + 1) * chars], digest_size=8, key=parent
        ).digest()
        hashes[i] = int.from_bytes(parent, "little", signed=True)
    return hashes


class PrefixIndex(NamedTuple):
    """What each of R replicas has probably cached: per replica at most `capacity[r]` blocks, LRU."""

    capacity: NDArray[np.int64]
    """(R,): blocks; 0 switches the index off for that replica."""
    used: NDArray[np.int64]
    """(R,): blocks held."""
    key: NDArray[np.int64]
    """(R, slots): block hash of a slot."""
    chain: NDArray[np.int32]
    """(R, slots): next slot in the same bucket, -1 at the end."""
    bucket: NDArray[np.int32]
    """(R, buckets): first slot of a bucket, -1 if empty."""
    newer: NDArray[np.int32]
    """(R, slots + 1): LRU list; the last column is the sentinel, whose `older` is the newest slot."""
    older: NDArray[np.int32]


def prefix_index(replicas: int, slots: int) -> PrefixIndex:
    """Make an empty index with room for `slots` blocks per replica."""
    buckets = 1 << max(4, int(slots * 2 - 1).bit_length())
    return PrefixIndex(
        capacity=np.full(replicas, slots, np.int64),
        used=np.zeros(replicas, np.int64),
        key=np.zeros((replicas, slots), np.int64),
        chain=np.full((replicas, slots), -1, np.int32),
        bucket=np.full((replicas, buckets), -1, np.int32),
        newer=np.full((replicas, slots + 1), slots, np.int32),
        older=np.full((replicas, slots + 1), slots, np.int32),
    )


@kernel
def _bucket_of(index: PrefixIndex, block: int) -> int:
    # Folded to 31 bits first, so that the product fits 63 and means the same without compilation.
    mixed = ((block ^ (block >> 31)) & 0x7FFFFFFF) * 0x9E3779B1
    return (mixed ^ (mixed >> 32)) & (index.bucket.shape[1] - 1)


@kernel
def _find(index: PrefixIndex, r: int, block: int) -> int:
    slot = index.bucket[r, _bucket_of(index, block)]
    while slot >= 0 and index.key[r, slot] != block:
        slot = index.chain[r, slot]
    return slot


@kernel
def _unlink(index: PrefixIndex, r: int, slot: int) -> None:
    newer, older = index.newer[r, slot], index.older[r, slot]
    index.older[r, newer] = older
    index.newer[r, older] = newer


@kernel
def _make_newest(index: PrefixIndex, r: int, slot: int) -> None:
    sentinel = index.key.shape[1]
    newest = index.older[r, sentinel]
    index.older[r, slot], index.newer[r, slot] = newest, sentinel
    index.newer[r, newest] = slot
    index.older[r, sentinel] = slot


@kernel
def _unchain(index: PrefixIndex, r: int, slot: int) -> None:
    home = _bucket_of(index, index.key[r, slot])
    if index.bucket[r, home] == slot:
        index.bucket[r, home] = index.chain[r, slot]
        return
    before = index.bucket[r, home]
    while index.chain[r, before] != slot:
        before = index.chain[r, before]
    index.chain[r, before] = index.chain[r, slot]


@kernel
def matching_blocks(index: PrefixIndex, r: int, blocks: NDArray[np.int64]) -> int:
    """Return how many leading blocks replica r probably holds."""
    count = 0
    while count < len(blocks) and _find(index, r, blocks[count]) >= 0:
        count += 1
    return count


@kernel
def remember(index: PrefixIndex, r: int, blocks: NDArray[np.int64]) -> None:
    """Note that replica r now holds these blocks; the least recently used make room.

    The tail is touched first, so that a prefix outlives its continuations.
    """
    for i in range(len(blocks) - 1, -1, -1):
        block = blocks[i]
        slot = _find(index, r, block)
        if slot >= 0:
            _unlink(index, r, slot)
            _make_newest(index, r, slot)
            continue
        if index.used[r] < min(index.capacity[r], index.key.shape[1]):
            slot = index.used[r]
            index.used[r] += 1
        elif index.used[r] == 0:
            return
        else:
            slot = index.newer[r, index.key.shape[1]]
            _unlink(index, r, slot)
            _unchain(index, r, slot)
        home = _bucket_of(index, block)
        index.key[r, slot] = block
        index.chain[r, slot] = index.bucket[r, home]
        index.bucket[r, home] = slot
        _make_newest(index, r, slot)


@entry
def forget_oldest(index: PrefixIndex, r: int, count: int) -> None:
    """Drop the `count` blocks of replica r that were used least recently, all if it has fewer."""
    sentinel = index.key.shape[1]
    for _ in range(min(count, index.used[r])):
        oldest = index.newer[r, sentinel]
        _unlink(index, r, oldest)
        _unchain(index, r, oldest)
        index.used[r] -= 1
        last = index.used[r]
        if last == oldest:
            continue
        # Slots in use are the first ones: the last of them moves into the gap.
        newer, older = index.newer[r, last], index.older[r, last]
        index.newer[r, oldest], index.older[r, oldest] = newer, older
        index.older[r, newer] = oldest
        index.newer[r, older] = oldest
        _unchain(index, r, last)
        home = _bucket_of(index, index.key[r, last])
        index.key[r, oldest] = index.key[r, last]
        index.chain[r, oldest] = index.bucket[r, home]
        index.bucket[r, home] = oldest


@entry
def forget_replica(index: PrefixIndex, r: int) -> None:
    """Empty replica r's index: it restarted, slept or was lost."""
    sentinel = index.key.shape[1]
    index.used[r] = 0
    index.bucket[r, :] = -1
    index.newer[r, sentinel] = sentinel
    index.older[r, sentinel] = sentinel
