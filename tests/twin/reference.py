"""A plain engine that steps token by token: what the fast one is compared with.

Written for reading, from the rules of vLLM's V1 scheduler; it shares no code with the twin.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from autopoiesis.twin.latency import Profile


@dataclass(eq=False)
class Sequence:
    name: int
    input_tokens: int
    output_tokens: int
    hashes: list[int]
    priority: float
    number: int
    generated: int = 0
    computed: int = 0
    private: int = 0
    shared: list[int] = field(default_factory=list)
    cached: int | None = None

    @property
    def total(self) -> int:
        return self.input_tokens + self.generated

    @property
    def urgency(self) -> tuple[float, int]:
        return (self.priority, self.number)


class ReferenceEngine:
    def __init__(self, profile: Profile, entry_tokens: int) -> None:
        self.profile = profile
        self.block = profile.kv_block_tokens
        self.entry_tokens = entry_tokens
        self.entry_blocks = entry_tokens // self.block
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.users: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.private = 0
        self.scheduled: list[tuple[Sequence, int]] | None = None
        self.preemptions = 0
        self.submitted = 0

    # --- blocks ---------------------------------------------------------------------------------

    def used(self) -> int:
        return self.private + sum(n > 0 for n in self.users.values()) * self.entry_blocks

    def free(self) -> int:
        return self.profile.kv_blocks - self.used()

    def private_needed(self, sequence: Sequence, tokens: int) -> int:
        whole = -(-tokens // self.block)
        return max(0, whole - len(sequence.shared) * self.entry_blocks)

    def use(self, block: int) -> None:
        self.idle.pop(block, None)
        self.users[block] += 1

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Give a sequence the blocks for that many tokens, and publish its full prefix blocks."""
        more = self.private_needed(sequence, tokens) - sequence.private
        sequence.private += more
        self.private += more
        while self.used() + len(self.idle) * self.entry_blocks > self.profile.kv_blocks:
            block, _ = self.idle.popitem(last=False)
            del self.users[block]
        if not self.entry_blocks:
            return
        while len(sequence.shared) < min(len(sequence.hashes), tokens // self.entry_tokens):
            block = sequence.hashes[len(sequence.shared)]
            self.users.setdefault(block, 0)
            self.use(block)
            sequence.shared.append(block)
            sequence.private -= self.entry_blocks
            self.private -= self.entry_blocks

    def give_back(self, sequence: Sequence) -> None:
        self.private -= sequence.private
        for block in reversed(sequence.shared):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.idle[block] = None
        sequence.private, sequence.shared, sequence.computed = 0, [], 0

    # --- requests -------------------------------------------------------------------------------

    def fits(self, input_tokens: int, output_tokens: int) -> bool:
        return -(-(input_tokens + output_tokens - 1) // self.block) <= self.profile.kv_blocks

    def submit(
        self, name: int, input_tokens: int, output_tokens: int, hashes: list[int], priority: float
    ) -> Sequence:
        full = hashes[: input_tokens // self.entry_tokens] if self.entry_tokens else []
        sequence = Sequence(name, input_tokens, output_tokens, full, priority, self.submitted)
        self.submitted += 1
        self.queue(sequence)
        return sequence

    def queue(self, sequence: Sequence, *, first: bool = False) -> None:
        if first:
            self.waiting.insert(0, sequence)
        else:
            self.waiting.append(sequence)
        if self.profile.scheduling == "priority":
            self.waiting.sort(key=lambda s: s.urgency)

    def abort(self, name: int) -> None:
        for sequence in [s for s in self.running if s.name == name]:
            self.give_back(sequence)
            self.running.remove(sequence)
        self.waiting = [s for s in self.waiting if s.name != name]

    # --- steps ----------------------------------------------------------------------------------

    def start_step(self) -> float | None:
        while self.running or self.waiting:
            self.scheduled = self.schedule()
            if self.scheduled:
                return self.duration_s(self.scheduled)
        self.scheduled = None
        return None

    def schedule(self) -> list[tuple[Sequence, int]]:
        left = self.profile.max_num_batched_tokens
        taken: dict[Sequence, int] = {}
        preempted = False
        for sequence in list(self.running):
            if sequence not in self.running:
                continue
            if left <= 0:
                break
            take = min(sequence.total - sequence.computed, left)
            lost = False
            while True:
                need = self.private_needed(sequence, sequence.computed + take) - sequence.private
                if need <= self.free():
                    break
                victim = self.running[-1]
                if self.profile.scheduling == "priority":
                    victim = max(self.running, key=lambda s: s.urgency)
                left += taken.pop(victim, 0)
                self.running.remove(victim)
                self.give_back(victim)
                self.queue(victim, first=True)
                self.preemptions += 1
                preempted = True
                if victim is sequence:
                    lost = True
                    break
            if lost:
                break
            self.grow(sequence, sequence.computed + take)
            taken[sequence] = take
            left -= take
        while not preempted and self.waiting and left > 0:
            if len(self.running) >= self.profile.max_num_seqs:
                break
            sequence = self.waiting[0]
            hits: list[int] = []
            for block in sequence.hashes:
                if block not in self.users:
                    break
                hits.append(block)
            whole_blocks_but_one_token = (sequence.total - 1) // self.block * self.block
            cached = min(len(hits) * self.entry_tokens, whole_blocks_but_one_token)
            take = min(sequence.total - cached, left)
            sequence.shared = hits
            need = self.private_needed(sequence, cached + take)
            revived = sum(block in self.idle for block in hits) * self.entry_blocks
            if need + revived > self.free():
                sequence.shared = []
                break
            for block in hits:
                self.use(block)
            sequence.computed = cached
            if sequence.cached is None:
                sequence.cached = cached
            self.waiting.pop(0)
            self.running.append(sequence)
            self.grow(sequence, cached + take)
            taken[sequence] = take
            left -= take
        return [(s, taken[s]) for s in self.running if s in taken]

    def duration_s(self, scheduled: list[tuple[Sequence, int]]) -> float:
        step = self.profile.step
        decodes = [s for s, n in scheduled if n == 1 and s.computed >= s.input_tokens]
        prefills = [(s, n) for s, n in scheduled if s not in decodes]
        context = sum(s.computed + 1 for s in decodes)
        tokens = sum(n for _, n in scheduled)
        sampling = sum(s.computed + n == s.total for s, n in scheduled)
        time_s = step.host_s + step.host_sequence_s * len(scheduled)
        time_s += step.head_s + step.head_sequence_s * sampling
        time_s += (step.weights_s**step.knee + (step.token_s * tokens) ** step.knee) ** (
            1 / step.knee
        )
        if not prefills:
            time_s += step.decode_s + step.decode_context_token_s * context
            return time_s + step.decode_sequence_s * len(decodes)
        time_s += step.mixed_s + (step.mixed_decode_s if decodes else 0.0)
        time_s += step.mixed_context_token_s * context + step.mixed_sequence_s * len(decodes)
        for s, n in prefills:
            time_s += step.prefill_token_s * n + step.prefill_cached_token_s * s.computed
            time_s += step.prefill_pair_s * sum(s.computed + i + 0.5 for i in range(n))
        return time_s

    def finish_step(self) -> list[tuple[Sequence, bool, bool]]:
        assert self.scheduled is not None
        emitted: list[tuple[Sequence, bool, bool]] = []
        for sequence, tokens in self.scheduled:
            if sequence not in self.running:  # aborted
                continue
            sequence.computed += tokens
            if sequence.computed < sequence.total:
                continue
            sequence.generated += 1
            last = sequence.generated == sequence.output_tokens
            emitted.append((sequence, sequence.generated == 1, last))
            if last:
                self.give_back(sequence)
                self.running.remove(sequence)
        self.scheduled = None
        return emitted


@dataclass
class Served:
    first_token_s: float = math.nan
    finished_s: float = math.nan
    cached: int = 0
    failed: bool = False


def serve(
    profile: Profile,
    entry_tokens: int,
    arrivals: list[tuple[float, int, int, list[int], float]],
) -> tuple[list[Served], int]:
    """Serve (arrival_s, input, output, hashes, priority) in order; return the times and the preemptions."""
    engine = ReferenceEngine(profile, entry_tokens)
    served = [Served() for _ in arrivals]
    now_s, at = 0.0, 0
    while True:
        while at < len(arrivals) and arrivals[at][0] <= now_s:
            _, input_tokens, output_tokens, hashes, priority = arrivals[at]
            if engine.fits(input_tokens, output_tokens):
                engine.submit(at, input_tokens, output_tokens, hashes, priority)
            else:
                served[at].failed = True
            at += 1
        duration_s = engine.start_step()
        if duration_s is None:
            if at == len(arrivals):
                return served, engine.preemptions
            now_s = arrivals[at][0]
            continue
        now_s += duration_s
        for sequence, first, last in engine.finish_step():
            if first:
                served[sequence.name].first_token_s = now_s
            if last:
                served[sequence.name].finished_s = now_s
                served[sequence.name].cached = sequence.cached or 0
