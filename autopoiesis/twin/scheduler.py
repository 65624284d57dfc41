"""vLLM's V1 scheduler for R replicas on flat arrays: continuous batching, one step at a time.

A step serves running sequences first (one token each, or the rest of a chunk), then waiting ones,
until the token budget or the sequence limit is reached; prompts are chunked. A sequence that
finds no KV block preempts the newest one (the least urgent one under priority scheduling), which
loses its blocks, goes back to the head of the queue and is recomputed; no step that preempted
admits.

Between steps all running sequences decode, except perhaps the last, whose prompt is partly done.
Decoding sequences advance together, so they are kept as sums: their number, their context, a
histogram of where their blocks end, a heap of when they finish. A step that touches no prompt
costs O(1), and a run of such steps is one event (`plan`). Where sequences do not advance together
(preemption, more sequences than tokens), `_schedule_each` walks them one by one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopoiesis.arms.kernels import kernel
from autopoiesis.twin import kv
from autopoiesis.twin.kv import (
    CAPACITY,
    KvCache,
    allocate,
    blank_blocks,
    cached_entries,
    free_blocks,
    kv_cache,
    publish,
    release,
    use_cached,
)
from autopoiesis.twin.latency import COEFFICIENTS, DECODE_CONTEXT, Profile, at_speed, step_s

MAX_SEQS, MAX_TOKENS, BY_PRIORITY = range(3)
"""Columns of `Engines.limits`."""

WAITING, RUNNING, DECODING, CONTEXT, TICK, STEPS, TAKEN, EACH = range(8)
"""Columns of `Engines.counts`: sequences waiting, running, decoding; tokens that the decoding ones
have computed; decode steps done; steps planned (0: none); whether the first of them already has its
blocks; whether the step was scheduled one by one."""
WAITING_HEAD, WAITING_TAIL, RUNNING_HEAD, RUNNING_TAIL, PREFILL_HEAD = range(8, 13)
"""Ends of the linked lists; the first running sequence whose prompt the step computes; -1: none."""
PREEMPTIONS, PREFIX_QUERIES, PREFIX_HITS, TICKETS = range(13, 17)
"""Totals: preemptions; prompt tokens looked up and found; sequences submitted."""

START, END, FIRST_STEP, GROWTH = range(4)
"""Columns of `Engines.clock` [s]: of the planned steps; duration of the first, growth per step."""

INPUT, OUTPUT, GENERATED, COMPUTED, SCHEDULED, PRIVATE, SHARED, CACHED = range(8)
"""Columns of `Engines.slots` [tokens; KV blocks; cache entries]. While decoding, COMPUTED is what is
computed minus the replica's TICK, and GENERATED and PRIVATE follow from it. CACHED is -1 before
admission."""
TICKET, AFTER, BEFORE, PLACE, HASHES_FROM, HASHES, THERE = range(8, 15)
"""More columns: order of submission, list neighbours, where it is, its usable block hashes, and tokens that
are in memory when it is admitted, of its own."""

NOWHERE, WAITS, PREFILLS, DECODES = range(4)
"""Values of PLACE."""

ADMITTED, BLOCKED, TIED = range(3)
"""What became of the head of the queue."""

TOKEN_OUT, FIRST_OUT, LAST_OUT = 0, 1, 2
"""Bits of an event: a token, the request's first one, its last one."""


class Engines(NamedTuple):
    """R engines and the sequences in them."""

    coefficients: NDArray[np.float64]
    """(R, coefficients of the step model)."""
    limits: NDArray[np.int64]
    """(R, 3)"""
    counts: NDArray[np.int64]
    """(R, 17)"""
    clock: NDArray[np.float64]
    """(R, 4)"""
    phase: NDArray[np.int64]
    """(R, tokens per KV block): decoding sequences by `COMPUTED` modulo the block."""
    heap: NDArray[np.int64]
    """(R, most sequences): of the decoding sequences, tick of the last token << 32 | slot."""
    slots: NDArray[np.int64]
    """(sequences, 15)"""
    priority: NDArray[np.float64]
    """(sequences,): lower is more urgent."""
    hashes: NDArray[np.int64]
    """Prefix block hashes of all sequences."""
    events: NDArray[np.int64]
    """(most sequences, 2): what the last `complete` let out: slot, bits."""
    kv: KvCache


def engines(
    profiles: list[Profile],
    speeds: list[float],
    slots: int,
    hashes: NDArray[np.int64],
    entry_tokens: int,
    may_become: Sequence[Profile] = (),
) -> Engines:
    """Make idle engines with room for `slots` sequences whose prefix hashes are `hashes`.

    There is room, too, to `equip` any of them with the profiles in `may_become`.
    """
    replicas = len(profiles)
    block_tokens = profiles[0].kv_block_tokens
    if any(p.kv_block_tokens != block_tokens for p in [*profiles, *may_become]):
        raise ValueError("all replicas must have the same kv_block_tokens")
    most = max(p.max_num_seqs for p in [*profiles, *may_become])
    largest = max([0, *(p.kv_blocks for p in may_become)])
    counts = np.zeros((replicas, 17), np.int64)
    counts[:, WAITING_HEAD : PREFILL_HEAD + 1] = -1
    clock = np.zeros((replicas, 4))
    clock[:, END] = np.inf
    made = Engines(
        coefficients=np.zeros((replicas, len(COEFFICIENTS))),
        limits=np.zeros((replicas, 3), np.int64),
        counts=counts,
        clock=clock,
        phase=np.zeros((replicas, block_tokens), np.int64),
        heap=np.zeros((replicas, most), np.int64),
        slots=np.zeros((slots, 15), np.int64),
        priority=np.zeros(slots),
        hashes=hashes,
        events=np.zeros((most, 2), np.int64),
        kv=kv_cache(
            np.array([max(p.kv_blocks, largest) for p in profiles], np.int64),
            block_tokens,
            entry_tokens,
        ),
    )
    for r, (profile, speed) in enumerate(zip(profiles, speeds, strict=True)):
        equip(made, r, profile, speed)
    return made


def equip(e: Engines, r: int, profile: Profile, speed: float) -> None:
    """Give replica r, which is empty, the step times and limits of a profile."""
    e.coefficients[r] = at_speed(profile.step, speed)
    e.limits[r] = (
        profile.max_num_seqs,
        profile.max_num_batched_tokens,
        profile.scheduling == "priority",
    )
    e.kv.blocks[r, CAPACITY] = profile.kv_blocks


def clear(e: Engines, r: int) -> None:
    """Take everything out of replica r, KV cache included; its totals go on."""
    counts = e.counts[r]
    counts[:WAITING_HEAD] = 0
    counts[WAITING_HEAD : PREFILL_HEAD + 1] = -1
    e.clock[r] = 0.0
    e.clock[r, END] = np.inf
    e.phase[r] = 0
    kv.clear(e.kv, r)


# --- lists ------------------------------------------------------------------------------------


@kernel
def _insert(e: Engines, r: int, head: int, slot: int, before: int) -> None:
    """Insert into the list that begins at column `head` (its end follows); `before` -1 appends."""
    counts, slots = e.counts[r], e.slots
    after = counts[head + 1] if before < 0 else slots[before, BEFORE]
    slots[slot, BEFORE], slots[slot, AFTER] = after, before
    if after < 0:
        counts[head] = slot
    else:
        slots[after, AFTER] = slot
    if before < 0:
        counts[head + 1] = slot
    else:
        slots[before, BEFORE] = slot


@kernel
def _remove(e: Engines, r: int, head: int, slot: int) -> None:
    counts, slots = e.counts[r], e.slots
    before, after = slots[slot, BEFORE], slots[slot, AFTER]
    if before < 0:
        counts[head] = after
    else:
        slots[before, AFTER] = after
    if after < 0:
        counts[head + 1] = before
    else:
        slots[after, BEFORE] = before


@kernel
def _goes_before(e: Engines, a: int, b: int) -> bool:
    if e.priority[a] != e.priority[b]:
        return e.priority[a] < e.priority[b]
    return e.slots[a, TICKET] < e.slots[b, TICKET]


@kernel
def _queue(e: Engines, r: int, slot: int, first: bool) -> None:
    before = -1
    if e.limits[r, BY_PRIORITY]:
        at = e.counts[r, WAITING_TAIL]
        while at >= 0 and _goes_before(e, slot, at):
            before = at
            at = e.slots[at, BEFORE]
    elif first:
        before = e.counts[r, WAITING_HEAD]
    _insert(e, r, WAITING_HEAD, slot, before)
    e.slots[slot, PLACE] = WAITS
    e.counts[r, WAITING] += 1


# --- decoding sequences as sums -----------------------------------------------------------------


@kernel
def _push(heap: NDArray[np.int64], size: int, item: int) -> None:
    at = size
    while at > 0 and heap[(at - 1) >> 1] > item:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = item


@kernel
def _pop(heap: NDArray[np.int64], size: int) -> None:
    """Drop the least of `size` items."""
    item = heap[size - 1]
    at = 0
    while 2 * at + 1 < size - 1:
        child = 2 * at + 1
        if child + 1 < size - 1 and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item


@kernel
def _start_decoding(e: Engines, r: int, slot: int) -> None:
    """Add a running sequence, whose COMPUTED is absolute, to the sums."""
    counts, row = e.counts[r], e.slots[slot]
    counts[CONTEXT] += row[COMPUTED]
    row[COMPUTED] -= counts[TICK]
    row[PLACE] = DECODES
    e.phase[r, row[COMPUTED] % e.phase.shape[1]] += 1
    _push(e.heap[r], counts[DECODING], (row[INPUT] + row[OUTPUT] - 1 - row[COMPUTED]) << 32 | slot)
    counts[DECODING] += 1


@kernel
def _private_blocks(e: Engines, slot: int, computed: int) -> int:
    """Return how many private blocks a sequence with that many tokens needs."""
    tokens = e.kv.sizes[0]
    return max((computed + tokens - 1) // tokens - e.slots[slot, SHARED] * e.kv.sizes[2], 0)


@kernel
def _stop_sums(e: Engines, r: int) -> None:
    """Give every decoding sequence its own figures again; the sums are empty then."""
    counts = e.counts[r]
    slot = counts[RUNNING_HEAD]
    while slot >= 0:
        row = e.slots[slot]
        if row[PLACE] == DECODES:
            row[COMPUTED] += counts[TICK]
            row[GENERATED] = row[COMPUTED] - row[INPUT] + 1
            row[PRIVATE] = _private_blocks(e, slot, row[COMPUTED])
        slot = row[AFTER]
    e.phase[r, :] = 0
    counts[DECODING] = counts[CONTEXT] = 0


@kernel
def _block_demand(e: Engines, r: int, first: int, steps: int) -> int:
    """Return the KV blocks that `steps` decode steps take, the first `first` ticks from now."""
    width = e.phase.shape[1]
    demand = steps // width * e.counts[r, DECODING]
    for i in range(steps % width):
        demand += e.phase[r, -(e.counts[r, TICK] + first + i) % width]
    return demand


@kernel
def _steps_within(e: Engines, r: int, first: int, blocks: int, most: int) -> int:
    """Return how many decode steps (at most `most`) that many KV blocks allow."""
    width = e.phase.shape[1]
    steps = min(blocks // e.counts[r, DECODING] * width, most)
    blocks -= steps // width * e.counts[r, DECODING]
    while steps < most:
        blocks -= e.phase[r, -(e.counts[r, TICK] + first + steps) % width]
        if blocks < 0:
            break
        steps += 1
    return steps


# --- a sequence's way in and out ----------------------------------------------------------------


@kernel
def fits(e: Engines, r: int, input_tokens: int, output_tokens: int) -> bool:
    """Tell whether replica r's KV cache could hold the request when it has it all to itself."""
    tokens = e.kv.sizes[0]
    return (input_tokens + output_tokens - 1 + tokens - 1) // tokens <= e.kv.blocks[r, 0]


@kernel
def submit(
    e: Engines,
    r: int,
    slot: int,
    input_tokens: int,
    output_tokens: int,
    hashes_from: int,
    hashes: int,
    priority: float,
) -> None:
    """Queue a request that fits in a free slot of replica r. A partly filled last block is not used."""
    row = e.slots[slot]
    row[:] = 0
    row[INPUT], row[OUTPUT] = input_tokens, output_tokens
    row[CACHED] = -1
    row[TICKET] = e.counts[r, TICKETS]
    e.counts[r, TICKETS] += 1
    row[HASHES_FROM] = hashes_from
    if e.kv.sizes[1] > 0:
        row[HASHES] = min(hashes, input_tokens // e.kv.sizes[1])
    e.priority[slot] = priority
    _queue(e, r, slot, False)


@kernel
def go_on(e: Engines, slot: int, generated: int) -> None:
    """Let a request that was just queued go on after so many tokens, with all of them and its prompt in memory."""
    row = e.slots[slot]
    row[GENERATED] = generated
    row[THERE] = row[INPUT] + generated - 1


@kernel
def _leave(e: Engines, r: int, slot: int) -> None:
    """Take a sequence that is not in the sums out of the running ones; its blocks become free."""
    row = e.slots[slot]
    start = row[HASHES_FROM]
    release(e.kv, r, row[PRIVATE], e.hashes[start : start + row[SHARED]])
    row[PRIVATE] = row[SHARED] = row[COMPUTED] = 0
    row[PLACE] = NOWHERE
    _remove(e, r, RUNNING_HEAD, slot)
    e.counts[r, RUNNING] -= 1


@kernel
def abort(e: Engines, r: int, slot: int) -> None:
    """Take a sequence out, between steps."""
    place = e.slots[slot, PLACE]
    if place == WAITS:
        _remove(e, r, WAITING_HEAD, slot)
        e.counts[r, WAITING] -= 1
        e.slots[slot, PLACE] = NOWHERE
    elif place == PREFILLS:
        _leave(e, r, slot)
    elif place == DECODES:
        _stop_sums(e, r)
        _leave(e, r, slot)
        _resume_sums(e, r)


@kernel
def _resume_sums(e: Engines, r: int) -> None:
    slot = e.counts[r, RUNNING_HEAD]
    while slot >= 0:
        if e.slots[slot, PLACE] == DECODES:
            _start_decoding(e, r, slot)
        slot = e.slots[slot, AFTER]


# --- scheduling -----------------------------------------------------------------------------------


@kernel
def _take(e: Engines, r: int, slot: int, tokens: int) -> None:
    """Schedule tokens of a prompt, for which there are blocks."""
    row = e.slots[slot]
    row[SCHEDULED] = tokens
    reached = row[COMPUTED] + tokens
    need = _private_blocks(e, slot, reached)
    allocate(e.kv, r, need - row[PRIVATE])
    row[PRIVATE] = need
    if row[HASHES] > row[SHARED]:
        full = min(row[HASHES], reached // e.kv.sizes[1])
        if full > row[SHARED]:
            start = row[HASHES_FROM]
            publish(e.kv, r, e.hashes[start + row[SHARED] : start + full])
            row[SHARED] = full
            row[PRIVATE] = _private_blocks(e, slot, reached)


@kernel
def _admit(e: Engines, r: int, left: int) -> int:
    """Move the head of the queue to the running ones with up to `left` tokens, if it finds blocks.

    Returns `ADMITTED`, `BLOCKED`, or `TIED` when an eviction might change what it needs.
    """
    counts = e.counts[r]
    slot = counts[WAITING_HEAD]
    row = e.slots[slot]
    total = row[INPUT] + row[GENERATED]
    start = row[HASHES_FROM]
    count = idle = cached = 0
    if row[HASHES] > 0:
        count, idle = cached_entries(e.kv, r, e.hashes[start : start + row[HASHES]])
        tokens = e.kv.sizes[0]
        cached = min(count * e.kv.sizes[1], (total - 1) // tokens * tokens)
    there = max(cached, row[THERE])
    take = min(total - there, left)
    row[SHARED] = count
    need = _private_blocks(e, slot, there + take)
    if need + idle * e.kv.sizes[2] > free_blocks(e.kv, r):
        row[SHARED] = 0
        return TIED if idle > 0 and total > left else BLOCKED
    use_cached(e.kv, r, e.hashes[start : start + count])
    _remove(e, r, WAITING_HEAD, slot)
    counts[WAITING] -= 1
    _insert(e, r, RUNNING_HEAD, slot, -1)
    counts[RUNNING] += 1
    row[PLACE] = PREFILLS
    row[PRIVATE] = _private_blocks(e, slot, there)
    allocate(e.kv, r, row[PRIVATE])
    row[COMPUTED] = there
    row[THERE] = 0  # once preempted, it is computed anew
    if row[CACHED] < 0:
        row[CACHED] = cached
        counts[PREFIX_QUERIES] += row[INPUT]
        counts[PREFIX_HITS] += cached
    _take(e, r, slot, take)
    return ADMITTED


@kernel
def _partial(e: Engines, r: int) -> int:
    """Return the running sequence whose prompt is partly done, or -1: only the last can be."""
    tail = e.counts[r, RUNNING_TAIL]
    return tail if tail >= 0 and e.slots[tail, PLACE] == PREFILLS else -1


@kernel
def _advances_together(e: Engines, r: int) -> bool:
    """Tell whether every running sequence gets its token and its block."""
    left = e.limits[r, MAX_TOKENS] - e.counts[r, DECODING]
    if left < 0:
        return False
    need = _block_demand(e, r, 0, 1)
    slot = _partial(e, r)
    if slot >= 0:
        row = e.slots[slot]
        take = min(row[INPUT] + row[GENERATED] - row[COMPUTED], left)
        need += _private_blocks(e, slot, row[COMPUTED] + take) - row[PRIVATE]
    return need <= free_blocks(e.kv, r)


@kernel
def _schedule_together(e: Engines, r: int, now_s: float, longest: int) -> None:
    """Plan a step, or a run of up to `longest` decode steps, when all sequences advance together."""
    counts = e.counts[r]
    decodes = counts[DECODING]
    allocate(e.kv, r, _block_demand(e, r, 0, 1))
    counts[TAKEN] = 1
    counts[EACH] = 0
    counts[PREFILL_HEAD] = -1
    left = e.limits[r, MAX_TOKENS] - decodes
    slot = _partial(e, r)
    if slot >= 0 and left > 0:
        row = e.slots[slot]
        take = min(row[INPUT] + row[GENERATED] - row[COMPUTED], left)
        _take(e, r, slot, take)
        counts[PREFILL_HEAD] = slot
        left -= take
    head = ADMITTED
    while counts[WAITING] > 0 and left > 0 and counts[RUNNING] < e.limits[r, MAX_SEQS]:
        slot = counts[WAITING_HEAD]
        head = _admit(e, r, left)
        if head != ADMITTED:
            break
        left -= e.slots[slot, SCHEDULED]
        if counts[PREFILL_HEAD] < 0:
            counts[PREFILL_HEAD] = slot
    steps = 1
    if counts[PREFILL_HEAD] < 0 and longest > 1:
        until_finish = (e.heap[r, 0] >> 32) - counts[TICK]
        blocks = blank_blocks(e.kv, r) if head == TIED else free_blocks(e.kv, r)
        steps += _steps_within(e, r, 1, blocks, min(until_finish, longest) - 1)
    _start(e, r, now_s, steps, decodes, counts[CONTEXT] + decodes, counts[PREFILL_HEAD])


@kernel
def _start(
    e: Engines, r: int, now_s: float, steps: int, decodes: int, context: int, prefill_head: int
) -> None:
    """Start the planned steps; sequences from `prefill_head` on that have tokens scheduled prefill."""
    sampling = sequences = decodes
    prefill = cached = 0
    pairs = 0.0
    slot = prefill_head
    while slot >= 0:
        row = e.slots[slot]
        take, before = row[SCHEDULED], row[COMPUTED]
        if take > 0:
            sequences += 1
            if before + take == row[INPUT] + row[GENERATED]:
                sampling += 1
            if take == 1 and before >= row[INPUT]:
                decodes += 1
                context += before + 1
            else:
                prefill += take
                cached += before
                pairs += take * (before + 0.5 * take)
        slot = row[AFTER]
    clock = e.clock[r]
    c = e.coefficients[r]
    clock[START] = now_s
    clock[FIRST_STEP] = step_s(
        c, decodes + prefill, sequences, sampling, decodes, context, prefill, pairs, cached
    )
    clock[GROWTH] = c[DECODE_CONTEXT] * decodes
    e.counts[r, STEPS] = steps
    clock[END] = now_s + span_s(e, r, steps)


@kernel
def span_s(e: Engines, r: int, steps: int) -> float:
    """Return the duration of the first `steps` planned steps."""
    return steps * e.clock[r, FIRST_STEP] + e.clock[r, GROWTH] * (0.5 * steps * (steps - 1))


@kernel
def _preempt(e: Engines, r: int) -> int:
    """Send a running sequence back to the queue; return it. Sequences must not be in the sums."""
    counts = e.counts[r]
    victim = counts[RUNNING_TAIL]
    if e.limits[r, BY_PRIORITY]:
        slot = counts[RUNNING_HEAD]
        while slot >= 0:
            if _goes_before(e, victim, slot):
                victim = slot
            slot = e.slots[slot, AFTER]
    _leave(e, r, victim)
    _queue(e, r, victim, True)
    counts[PREEMPTIONS] += 1
    return victim


@kernel
def _schedule_each(e: Engines, r: int, now_s: float) -> bool:
    """Plan one step sequence by sequence; False if preemption left nothing to do in it.

    It comes when tokens or blocks run out, so nothing can be admitted.
    """
    counts = e.counts[r]
    _stop_sums(e, r)
    slot = counts[RUNNING_HEAD]
    while slot >= 0:
        e.slots[slot, SCHEDULED] = 0
        slot = e.slots[slot, AFTER]
    left = e.limits[r, MAX_TOKENS]
    scheduled = 0
    slot = counts[RUNNING_HEAD]
    while slot >= 0 and left > 0:
        row = e.slots[slot]
        take = min(row[INPUT] + row[GENERATED] - row[COMPUTED], left)
        victim = -1
        while _private_blocks(e, slot, row[COMPUTED] + take) - row[PRIVATE] > free_blocks(e.kv, r):
            victim = _preempt(e, r)
            if e.slots[victim, SCHEDULED] > 0:
                left += e.slots[victim, SCHEDULED]
                scheduled -= 1
                e.slots[victim, SCHEDULED] = 0
            if victim == slot:
                break
        if victim == slot:
            break
        _take(e, r, slot, take)
        scheduled += 1
        left -= take
        slot = row[AFTER]
    if scheduled == 0:
        _resume_sums(e, r)
        return False
    counts[TAKEN] = counts[EACH] = 1
    counts[PREFILL_HEAD] = -1
    _start(e, r, now_s, 1, 0, 0, counts[RUNNING_HEAD])
    return True


@kernel
def plan(e: Engines, r: int, now_s: float, longest: int) -> bool:
    """Start replica r's next step, or a run of up to `longest` decode steps; False if it is idle.

    The run ends where a sequence finishes or KV blocks run out; `cut` ends it earlier.
    """
    while e.counts[r, RUNNING] + e.counts[r, WAITING] > 0:
        if _advances_together(e, r):
            _schedule_together(e, r, now_s, longest)
            return True
        if _schedule_each(e, r, now_s):
            return True
    e.counts[r, STEPS] = 0
    e.clock[r, END] = np.inf
    return False


@kernel
def steps_until(e: Engines, r: int, now_s: float) -> int:
    """Return after how many of the planned steps (at least 1) `now_s` is reached."""
    elapsed = now_s - e.clock[r, START]
    first, growth = e.clock[r, FIRST_STEP], e.clock[r, GROWTH]
    if growth > 0.0:
        b = first - 0.5 * growth
        steps = int(np.ceil((np.sqrt(b * b + 2.0 * growth * max(elapsed, 0.0)) - b) / growth))
    else:
        steps = int(np.ceil(elapsed / first))
    steps = max(1, min(steps, e.counts[r, STEPS]))
    while steps > 1 and e.clock[r, START] + span_s(e, r, steps - 1) >= now_s:
        steps -= 1
    while steps < e.counts[r, STEPS] and e.clock[r, START] + span_s(e, r, steps) < now_s:
        steps += 1
    return steps


@kernel
def cut(e: Engines, r: int, now_s: float) -> None:
    """End a run of steps after the step under way, so that a new request is looked at."""
    if e.counts[r, STEPS] > 1:
        e.counts[r, STEPS] = steps_until(e, r, now_s)
        e.clock[r, END] = e.clock[r, START] + span_s(e, r, e.counts[r, STEPS])


@kernel
def used_blocks(e: Engines, r: int, now_s: float) -> int:
    """Return the KV blocks in use at that time within the planned steps."""
    used = e.kv.blocks[r, 1]
    if e.counts[r, STEPS] > 1:
        used += _block_demand(e, r, 1, steps_until(e, r, now_s) - 1)
    return used


@kernel
def count_generated(
    e: Engines, replica: NDArray[np.int64], now_s: float, counts: NDArray[np.int64]
) -> None:
    """Set the tokens that each sequence has let out, (sequences,), at that time within the planned steps."""
    for slot in range(len(counts)):
        row = e.slots[slot]
        counts[slot] = row[GENERATED]
        r = replica[slot]
        if row[PLACE] == DECODES and r >= 0 and e.counts[r, EACH] == 0:
            ticks = e.counts[r, TICK]
            if e.counts[r, STEPS] > 1:
                ticks += steps_until(e, r, now_s) - 1
            counts[slot] = row[COMPUTED] + ticks - row[INPUT] + 1


@kernel
def _emit(e: Engines, count: int, slot: int, bits: int) -> int:
    e.events[count, 0], e.events[count, 1] = slot, bits
    return count + 1


@kernel
def complete(e: Engines, r: int, every_token: bool) -> int:
    """End the planned steps; return how many `events` they let out.

    Without `every_token` only first and last tokens are told.
    """
    counts = e.counts[r]
    steps = counts[STEPS]
    count = 0
    slot = counts[PREFILL_HEAD]
    if counts[EACH]:
        counts[TICK] += 1
        slot = counts[RUNNING_HEAD]
    elif steps > 0:
        allocate(e.kv, r, _block_demand(e, r, counts[TAKEN], steps - counts[TAKEN]))
        counts[TICK] += steps
        counts[CONTEXT] += steps * counts[DECODING]
        if every_token:
            count = _emit_running(e, r)
        while counts[DECODING] > 0 and e.heap[r, 0] >> 32 <= counts[TICK]:
            done = e.heap[r, 0] & 0xFFFFFFFF
            _pop(e.heap[r], counts[DECODING])
            counts[DECODING] -= 1
            row = e.slots[done]
            e.phase[r, row[COMPUTED] % e.phase.shape[1]] -= 1
            row[COMPUTED] += counts[TICK]
            counts[CONTEXT] -= row[COMPUTED]
            row[PRIVATE] = _private_blocks(e, done, row[COMPUTED])
            _leave(e, r, done)
            if not every_token:
                count = _emit(e, count, done, LAST_OUT)
    while slot >= 0:
        count, slot = _advance(e, r, slot, count, every_token)
    counts[STEPS] = counts[TAKEN] = counts[EACH] = 0
    counts[PREFILL_HEAD] = -1
    e.clock[r, END] = np.inf
    return count


@kernel
def _emit_running(e: Engines, r: int) -> int:
    count = 0
    slot = e.counts[r, RUNNING_HEAD]
    while slot >= 0:
        row = e.slots[slot]
        if row[PLACE] == DECODES:
            last = row[COMPUTED] + e.counts[r, TICK] >= row[INPUT] + row[OUTPUT] - 1
            count = _emit(e, count, slot, LAST_OUT if last else TOKEN_OUT)
        slot = row[AFTER]
    return count


@kernel
def _advance(e: Engines, r: int, slot: int, count: int, every_token: bool) -> tuple[int, int]:
    """Credit a sequence that is not in the sums with its tokens; return the events and the next one."""
    row = e.slots[slot]
    after = row[AFTER]
    take = row[SCHEDULED]
    row[COMPUTED] += take
    row[SCHEDULED] = 0
    if take > 0 and row[COMPUTED] == row[INPUT] + row[GENERATED]:
        row[GENERATED] += 1
        bits = FIRST_OUT if row[GENERATED] == 1 else TOKEN_OUT
        if row[GENERATED] == row[OUTPUT]:
            bits |= LAST_OUT
            _leave(e, r, slot)
        else:
            _start_decoding(e, r, slot)
        if every_token or bits:
            count = _emit(e, count, slot, bits)
    elif row[PLACE] == DECODES:
        _start_decoding(e, r, slot)
    return count, after
