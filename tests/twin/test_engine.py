"""The engine as a real-time replica uses it."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.twin.engine import Engine
from autopoiesis.twin.latency import profile

H100 = profile("h100-llama-3-8b-tp1-bf16")
NONE = np.empty(0, np.int64)


def drain(engine: Engine) -> dict[int, int]:
    """Step until idle; return the tokens that each slot emitted."""
    tokens: dict[int, int] = {}
    while engine.start_step() is not None:
        for emission in engine.finish_step():
            tokens[emission.slot] = tokens.get(emission.slot, 0) + 1
    return tokens


def test_every_token_is_emitted_once() -> None:
    engine = Engine(H100, 256)
    slots = [engine.submit(100 + i, 1 + i, NONE, 0.0) for i in range(40)]
    assert drain(engine) == {slot: 1 + i for i, slot in enumerate(slots)}
    assert engine.running == engine.waiting == 0
    assert engine.kv_usage == 0.0


def test_slots_and_hashes_grow_and_are_reused() -> None:
    engine = Engine(H100, 256)
    for round_ in range(3):
        for i in range(700):
            blocks = np.arange(8, dtype=np.int64) + 1 + 100_000 * round_ + 100 * i
            engine.submit(8 * 256 + 5, 2, blocks, 0.0)
        assert sum(drain(engine).values()) == 1400
    assert engine.prefix_hits == 0
    assert engine.prefix_queries == 3 * 700 * (8 * 256 + 5)


def test_a_prefix_is_found_again() -> None:
    engine = Engine(H100, 256)
    blocks = np.arange(1, 5, dtype=np.int64)
    engine.submit(4 * 256, 3, blocks, 0.0)
    engine.start_step()
    cold_s = None
    drain_first = engine.finish_step()
    assert drain_first[0].first
    drain(engine)
    slot = engine.submit(4 * 256, 3, blocks, 0.0)
    warm_s = engine.start_step()
    assert (
        engine.cached_tokens(slot) == 4 * 256 - 16
    )  # one token must be computed, by whole KV blocks
    engine.finish_step()
    drain(engine)
    cold = Engine(H100, 256)
    cold.submit(4 * 256, 3, blocks, 0.0)
    cold_s = cold.start_step()
    assert warm_s is not None
    assert cold_s is not None
    assert warm_s < cold_s / 2


def test_a_request_that_can_never_fit_is_refused() -> None:
    engine = Engine(replace(H100, kv_blocks=10), 0)
    with pytest.raises(ValueError, match="KV cache of 160 tokens"):
        engine.submit(100, 62, NONE, 0.0)
    slot = engine.submit(100, 61, NONE, 0.0)
    assert drain(engine) == {slot: 61}


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 1), (1, 0), (-5, 3)])
def test_a_request_without_tokens_is_refused(inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Engine(H100, 0).submit(inputs, outputs, NONE, 0.0)


def test_aborting_frees_everything() -> None:
    engine = Engine(replace(H100, max_num_seqs=2), 0)
    slots = [engine.submit(500, 50, NONE, 0.0) for _ in range(4)]
    engine.start_step()
    engine.abort(slots[0])  # in the step under way
    engine.abort(slots[3])  # waiting
    assert {e.slot for e in engine.finish_step()} == {slots[1]}
    engine.abort(slots[0])  # a second time: nothing
    assert drain(engine) == {slots[1]: 49, slots[2]: 50}
    assert engine.kv_usage == 0.0


def test_steps_must_alternate() -> None:
    engine = Engine(H100, 0)
    assert engine.start_step() is None
    with pytest.raises(RuntimeError):
        engine.finish_step()
    engine.submit(1, 1, NONE, 0.0)
    engine.start_step()
    with pytest.raises(RuntimeError):
        engine.start_step()


def test_priority_scheduling_serves_the_urgent_first() -> None:
    engine = Engine(replace(H100, scheduling="priority", max_num_seqs=1), 0)
    running = engine.submit(10, 5, NONE, 0.0)
    engine.start_step()
    engine.finish_step()
    normal, urgent = engine.submit(10, 5, NONE, 0.0), engine.submit(10, 5, NONE, -1.0)
    order = list(drain(engine))
    assert order == [running, urgent, normal]


UNCOMPILED = """
import time
import numpy as np
from autopoiesis.twin.engine import Engine
from autopoiesis.twin.latency import profile
engine = Engine(profile("h100-llama-3-8b-tp1-bf16"), 256)
for i in range(32):
    engine.submit(100 + i, 200, np.arange(i % 4) + 1, 0.0)
engine.start_step(); engine.finish_step()
times = []
for _ in range(150):
    begin = time.process_time()
    engine.start_step(); assert len(engine.finish_step()) == 32
    times.append(time.process_time() - begin)
print(sorted(times)[75])
"""


def test_a_step_uncompiled_takes_under_a_millisecond() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", UNCOMPILED],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 1e-3
