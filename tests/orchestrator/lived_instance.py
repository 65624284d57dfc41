"""A stopped instance that served a trace on a fleet unlike the one that its twin believes in."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from traffic import registry

from autopoiesis.arms.arm import Arm
from autopoiesis.arms.objective import Objective
from autopoiesis.orchestrator.loop import LoopSettings, WindowLoop
from autopoiesis.orchestrator.replay import observe
from autopoiesis.orchestrator.rerun import sim_cells
from autopoiesis.telemetry.records import RequestRecord
from autopoiesis.telemetry.records import Status as Ending
from autopoiesis.telemetry.store import Store
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.simulation import ReplicaSpec, Simulation
from autopoiesis.twin.trace import Trace

BEGAN_S = 1.7e9
_ENDINGS = {Status.COMPLETED: Ending.COMPLETED, Status.SHED: Ending.SHED}


def live_through(
    folder: Path,
    trace: Trace,
    real: Sequence[ReplicaSpec],
    believed: Sequence[ReplicaSpec],
    arms: Sequence[Arm],
    objective: Objective,
    window_s: float,
    settings: LoopSettings | None = None,
) -> Path:
    """Serve the trace on the `real` fleet, the loop's twin being of the `believed` one; return the data directory."""
    known = registry(*arms)
    loop = WindowLoop(known, objective, 0, settings)
    simulation = Simulation(trace, real, objective, 0)
    data_dir = folder / ".autopoiesis"
    data_dir.mkdir()
    with Store.open(data_dir / "telemetry.duckdb") as store:
        for arm in arms:
            store.save_arm(arm)
        windows = int(trace.duration_s // window_s) + 2
        for window in range(windows):
            allocation = loop.next_allocation(window, believed)
            store.write_allocation(allocation)
            simulation.allocate(sim_cells(allocation, known, real))
            simulation.advance((window + 1) * window_s)
            settled = loop.settle(observe(simulation, window, window_s, tuple(believed)))
            if settled:
                at = settled.window
                row = replace(at, started_s=at.started_s + BEGAN_S, ended_s=at.ended_s + BEGAN_S)
                store.write_window(row, settled.cells, estimates=settled.estimates)
        simulation.advance(np.inf)
        records = _records(trace, simulation.outcome(), real)
        end_s = row.ended_s
        last = replace(row, window=windows, requests=0, started_s=end_s, ended_s=end_s + window_s)
        store.write_window(last, requests=records)
    return data_dir


def _records(trace: Trace, o: Outcome, fleet: Sequence[ReplicaSpec]) -> list[RequestRecord]:
    return [
        RequestRecord(
            id=f"r{i}", arrived_s=BEGAN_S + o.arrival_s[i], path="/v1/completions", model="m",
            status=_ENDINGS.get(Status(o.status[i]), Ending.FAILED), http_status=200, arm_id="", window=0,
            shard=int(o.shard[i]), session=int(trace.session[i]),
            replica=fleet[o.replica[i]].name if o.replica[i] >= 0 else "", attempts=1, stream=True,
            input_tokens=int(o.input_tokens[i]), output_tokens=int(o.output_tokens[i]),
            max_output_tokens=int(trace.max_output_tokens[i]), cached_tokens=int(o.cached_tokens[i]),
            usage_counted=True, priority_class=0.0,
            held_s=float(np.nan_to_num(o.dispatched_s[i] - o.arrival_s[i])), decision_s=0.0,
            ttft_s=None if np.isnan(o.ttft_s[i]) else float(o.ttft_s[i]),
            e2e_s=float(np.nan_to_num(o.finished_s[i] - o.arrival_s[i])),
        )
        for i in range(len(trace))
    ]  # fmt: skip
