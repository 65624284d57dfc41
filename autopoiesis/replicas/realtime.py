"""The twin's engine run in real time: a step takes as long as the step model says it takes."""

import asyncio
import time
from collections.abc import Callable

from autopoiesis.replicas.generation import Prompt
from autopoiesis.replicas.vllm_metrics import ReplicaMetrics
from autopoiesis.twin.engine import Engine

MOST_LAG_S = 1.0
"""When the machine stalled for longer than this, lost time is not caught up with."""

OnToken = Callable[[bool], None]
"""Called for each token; True with the last one."""


class Sequence:
    """One sequence in the engine, and when what happened to it."""

    __slots__ = (
        "arrived_s",
        "cached_tokens",
        "first_s",
        "last_s",
        "on_token",
        "output_tokens",
        "prompt",
        "reason",
        "slot",
    )

    def __init__(
        self, prompt: Prompt, output_tokens: int, reason: str, on_token: OnToken, now_s: float
    ) -> None:
        self.prompt = prompt
        self.output_tokens = output_tokens
        self.reason = reason
        """Why it will finish: `stop` or `length`."""
        self.on_token = on_token
        self.arrived_s = now_s
        self.first_s = self.last_s = 0.0
        self.cached_tokens = 0
        self.slot = -1


class RealtimeEngine:
    """Steps an engine on a monotonic schedule: each step begins where the one before ended."""

    def __init__(
        self,
        engine: Engine,
        metrics: ReplicaMetrics,
        speed: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing moves before `run`. Steps take 1/`speed` of what the profile says."""
        self.engine = engine
        self._metrics = metrics
        self._speed = speed
        self._clock = clock
        self._sequences: dict[int, Sequence] = {}
        self._queued: dict[int, Sequence] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(
        self, prompt: Prompt, output_tokens: int, reason: str, priority: float, on_token: OnToken
    ) -> Sequence:
        """Queue a sequence; ValueError if it can never fit into the KV cache."""
        sequence = Sequence(prompt, output_tokens, reason, on_token, self._clock())
        slot = self.engine.submit(prompt.tokens, output_tokens, prompt.blocks, priority)
        sequence.slot = slot
        self._sequences[slot] = self._queued[slot] = sequence
        self._work.set()
        self._idle.clear()
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence and free its place; one that has finished is left alone."""
        if self._sequences.get(sequence.slot) is sequence:
            self.engine.abort(sequence.slot)
            self._forget(sequence.slot)

    async def wait_idle(self) -> None:
        """Wait until no sequence is left."""
        await self._idle.wait()

    async def run(self) -> None:
        """Step for ever; cancel to stop."""
        due_s = self._clock()
        while True:
            duration_s = self.engine.start_step()
            if duration_s is None:
                self._work.clear()
                await self._work.wait()
                due_s = self._clock()
                continue
            self._note_admitted(due_s)
            due_s = max(due_s, self._clock() - MOST_LAG_S) + duration_s / self._speed
            await asyncio.sleep(max(due_s - self._clock(), 0.0))
            self._deliver()

    def _deliver(self) -> None:
        emissions = self.engine.finish_step()
        now_s = self._clock()
        metrics = self._metrics
        metrics.generation_tokens += len(emissions)
        for slot, first, finished in emissions:
            sequence = self._sequences[slot]
            if first:
                sequence.first_s = now_s
                sequence.cached_tokens = self.engine.cached_tokens(slot)
                metrics.first_token.observe(now_s - sequence.arrived_s)
                metrics.prompt_tokens += sequence.prompt.tokens
            else:
                metrics.inter_token.observe(now_s - sequence.last_s)
            sequence.last_s = now_s
            if finished:
                self._finish(sequence, now_s)
            sequence.on_token(finished)

    def _finish(self, sequence: Sequence, now_s: float) -> None:
        metrics = self._metrics
        self._forget(sequence.slot)
        metrics.finished[sequence.reason] += 1
        metrics.e2e.observe(now_s - sequence.arrived_s)
        metrics.request_prompt.observe(sequence.prompt.tokens)
        metrics.request_generation.observe(sequence.output_tokens)
        if sequence.output_tokens > 1:
            decode_s = now_s - sequence.first_s
            metrics.per_output_token.observe(decode_s / (sequence.output_tokens - 1))

    def _forget(self, slot: int) -> None:
        del self._sequences[slot]
        self._queued.pop(slot, None)
        if not self._sequences:
            self._idle.set()

    def _note_admitted(self, now_s: float) -> None:
        """Observe the queueing time of those that the step took from the queue, oldest first."""
        admitted = len(self._queued) - self.engine.waiting
        for slot in list(self._queued)[: max(admitted, 0)]:
            sequence = self._queued.pop(slot)
            self._metrics.queue.observe(max(now_s - sequence.arrived_s, 0.0))
