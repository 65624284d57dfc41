"""KV blocks and the prefix cache of R replicas, as flat arrays.

A replica's blocks are private to one sequence, or belong to a cache entry: one block of the
trace's prefix hashes (`entry_blocks` KV blocks). Entries count their users; one without users is
idle, keeps its content, and is evicted least recently used when blocks run out, as in vLLM. Two
differences to vLLM, both small: blocks without content go first, and eviction takes whole entries.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.kernels import kernel

CAPACITY, USED, IDLE, ENTRIES = range(4)
"""Columns of `KvCache.blocks`: all blocks, those in use, those of idle entries; entries there are."""

HASH_NEXT, NEWER, OLDER = range(3)
"""Columns of `KvCache.link`: next entry in the same bucket, neighbours in the LRU list."""


class KvCache(NamedTuple):
    """The KV caches of R replicas, each with room for E entries."""

    blocks: NDArray[np.int64]
    """(R, 4)"""
    key: NDArray[np.int64]
    """(R, E): block hash of an entry."""
    users: NDArray[np.int64]
    """(R, E): sequences that use it."""
    link: NDArray[np.int64]
    """(R, E + 1, 3): the last row is the LRU list's sentinel, whose `OLDER` is the newest entry."""
    bucket: NDArray[np.int64]
    """(R, buckets): first entry of a bucket, -1 if empty."""
    unused: NDArray[np.int64]
    """(R, E): stack of the entries that hold nothing; `E - blocks[r, ENTRIES]` of them."""
    sizes: NDArray[np.int64]
    """(3,): tokens per KV block, tokens per entry, KV blocks per entry."""


def kv_cache(capacity: NDArray[np.int64], block_tokens: int, entry_tokens: int) -> KvCache:
    """Make empty caches of `capacity` KV blocks per replica; `entry_tokens` 0 means no prefix cache."""
    if entry_tokens % block_tokens:
        raise ValueError(
            f"prefix blocks of {entry_tokens} tokens are not whole KV blocks of {block_tokens} tokens; "
            f"use a multiple of {block_tokens}"
        )
    replicas = len(capacity)
    entry_blocks = entry_tokens // block_tokens
    entries = int(capacity.max()) // entry_blocks if entry_blocks else 0
    blocks = np.zeros((replicas, 4), np.int64)
    blocks[:, CAPACITY] = capacity
    link = np.full((replicas, entries + 1, 3), entries, np.int64)
    buckets = 1 << max(2, (2 * entries - 1).bit_length() if entries else 0)
    return KvCache(
        blocks=blocks,
        key=np.zeros((replicas, entries), np.int64),
        users=np.zeros((replicas, entries), np.int64),
        link=link,
        bucket=np.full((replicas, buckets), -1, np.int64),
        unused=np.tile(np.arange(entries, dtype=np.int64), (replicas, 1)),
        sizes=np.array([block_tokens, entry_tokens, entry_blocks], np.int64),
    )


@kernel
def free_blocks(kv: KvCache, r: int) -> int:
    """Return how many blocks can be had, those of idle entries included."""
    return kv.blocks[r, CAPACITY] - kv.blocks[r, USED]


@kernel
def blank_blocks(kv: KvCache, r: int) -> int:
    """Return how many blocks can be had without an eviction."""
    return kv.blocks[r, CAPACITY] - kv.blocks[r, USED] - kv.blocks[r, IDLE]


@kernel
def _bucket_of(kv: KvCache, block: int) -> int:
    return (block ^ (block >> 17) ^ (block >> 34)) & (kv.bucket.shape[1] - 1)


@kernel
def _find(kv: KvCache, r: int, block: int) -> int:
    entry = kv.bucket[r, _bucket_of(kv, block)]
    while entry >= 0 and kv.key[r, entry] != block:
        entry = kv.link[r, entry, HASH_NEXT]
    return entry


@kernel
def _unlink(kv: KvCache, r: int, entry: int) -> None:
    newer, older = kv.link[r, entry, NEWER], kv.link[r, entry, OLDER]
    kv.link[r, newer, OLDER] = older
    kv.link[r, older, NEWER] = newer


@kernel
def _evict(kv: KvCache, r: int) -> None:
    sentinel = kv.key.shape[1]
    entry = kv.link[r, sentinel, NEWER]
    _unlink(kv, r, entry)
    home = _bucket_of(kv, kv.key[r, entry])
    if kv.bucket[r, home] == entry:
        kv.bucket[r, home] = kv.link[r, entry, HASH_NEXT]
    else:
        before = kv.bucket[r, home]
        while kv.link[r, before, HASH_NEXT] != entry:
            before = kv.link[r, before, HASH_NEXT]
        kv.link[r, before, HASH_NEXT] = kv.link[r, entry, HASH_NEXT]
    kv.blocks[r, IDLE] -= kv.sizes[2]
    kv.blocks[r, ENTRIES] -= 1
    kv.unused[r, kv.key.shape[1] - 1 - kv.blocks[r, ENTRIES]] = entry


@kernel
def allocate(kv: KvCache, r: int, count: int) -> None:
    """Take `count` private blocks, of which there must be as many free."""
    kv.blocks[r, USED] += count
    while kv.blocks[r, USED] + kv.blocks[r, IDLE] > kv.blocks[r, CAPACITY]:
        _evict(kv, r)


@kernel
def _use(kv: KvCache, r: int, entry: int) -> None:
    if kv.users[r, entry] == 0:
        _unlink(kv, r, entry)
        kv.blocks[r, IDLE] -= kv.sizes[2]
        kv.blocks[r, USED] += kv.sizes[2]
    kv.users[r, entry] += 1


@kernel
def cached_entries(kv: KvCache, r: int, hashes: NDArray[np.int64]) -> tuple[int, int]:
    """Return how many leading blocks are cached, and how many of them are idle."""
    count = idle = 0
    while count < len(hashes):
        entry = _find(kv, r, hashes[count])
        if entry < 0:
            break
        if kv.users[r, entry] == 0:
            idle += 1
        count += 1
    return count, idle


@kernel
def use_cached(kv: KvCache, r: int, hashes: NDArray[np.int64]) -> None:
    """Become a user of these entries, all of which are there."""
    for block in hashes:
        _use(kv, r, _find(kv, r, block))


@kernel
def publish(kv: KvCache, r: int, hashes: NDArray[np.int64]) -> None:
    """Turn private blocks into entries that others can use too.

    Where an entry of that hash exists, it is used instead and the private blocks are given back.
    """
    for block in hashes:
        kv.blocks[r, USED] -= kv.sizes[2]
        entry = _find(kv, r, block)
        if entry >= 0:
            _use(kv, r, entry)
            continue
        entry = kv.unused[r, kv.key.shape[1] - 1 - kv.blocks[r, ENTRIES]]
        kv.blocks[r, ENTRIES] += 1
        kv.blocks[r, USED] += kv.sizes[2]
        home = _bucket_of(kv, block)
        kv.key[r, entry] = block
        kv.users[r, entry] = 1
        kv.link[r, entry, HASH_NEXT] = kv.bucket[r, home]
        kv.bucket[r, home] = entry


@kernel
def release(kv: KvCache, r: int, private: int, hashes: NDArray[np.int64]) -> None:
    """Give back private blocks and stop using these entries; the last ones will be evicted first."""
    kv.blocks[r, USED] -= private
    sentinel = kv.key.shape[1]
    for i in range(len(hashes) - 1, -1, -1):
        entry = _find(kv, r, hashes[i])
        kv.users[r, entry] -= 1
        if kv.users[r, entry] == 0:
            kv.blocks[r, USED] -= kv.sizes[2]
            kv.blocks[r, IDLE] += kv.sizes[2]
            newest = kv.link[r, sentinel, OLDER]
            kv.link[r, entry, NEWER] = sentinel
            kv.link[r, entry, OLDER] = newest
            kv.link[r, newest, NEWER] = entry
            kv.link[r, sentinel, OLDER] = entry


def has_room(kv: KvCache, capacity: int) -> bool:
    """Tell whether the arrays are large enough for a cache of that many blocks."""
    return kv.sizes[2] == 0 or capacity // int(kv.sizes[2]) <= kv.key.shape[1]


def clear(kv: KvCache, r: int) -> None:
    """Empty replica r's cache, used blocks and all: it restarted, slept or was lost."""
    entries = kv.key.shape[1]
    kv.blocks[r, USED] = kv.blocks[r, IDLE] = kv.blocks[r, ENTRIES] = 0
    kv.users[r, :] = 0
    kv.link[r, :, :] = entries
    kv.bucket[r, :] = -1
    kv.unused[r, :] = np.arange(entries)
